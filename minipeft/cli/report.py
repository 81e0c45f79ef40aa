"""What the commands show of a model: its answers to prompts beside the expected ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .streams import printable

if TYPE_CHECKING:
    from rich.console import Console

    from .data import Sample

ANSWER = 48  # tokens of an answer that is shown


def answered(
    models: Mapping[str, Any], tokenizer: Any, samples: Sequence[Sample], template: Any = None
) -> list[tuple[Sample, dict[str, str]]]:
    """Each sample with the answers of the models, by their names: the most probable ANSWER tokens."""
    from ..evaluation import ask

    asked = [sample.record for sample in samples]
    answers = [ask(model, tokenizer, asked, template, max_new_tokens=ANSWER) for model in models.values()]
    return [(sample, dict(zip(models, own))) for sample, *own in zip(samples, *answers)]


def show_samples(console: Console, shown: Sequence[tuple[Sample, dict[str, str]]]) -> None:
    """Each prompt, the answer of each model, and the reference."""
    from rich.table import Table

    for sample, answers in shown:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, text in (("prompt", sample.prompt), *answers.items(), ("reference", sample.reference)):
            table.add_row(name, text.strip())
        console.print(table)
        console.print()


def console(**options: Any) -> Any:
    """The console of standard output: as wide as the terminal, or wide enough for every table where it is a file.

    It shows text as it is: brackets and colons are no markup, and control characters are no commands. The options are
    Rich's.
    """
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(printable(text), **options)

    usual = {"highlight": False, "markup": False, "emoji": False, "width": None if sys.stdout.isatty() else 140}
    return Plain(**usual | options)
