"""What the commands show of a model: its answer to a prompt beside the expected one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .data import Sample

ANSWER = 48  # tokens of an answer that is shown


def answer(model: Any, tokenizer: Any, prompt: Sequence[int]) -> str:
    """The model's most probable continuation, up to its end-of-sequence token or ANSWER tokens."""
    from ..nn.generation import generate

    out = generate(model, [list(prompt)], max_new_tokens=ANSWER, eos_token_id=tokenizer.eos_token_id)
    tokens = out[0, len(prompt) :].tolist()
    return tokenizer.decode(tokens, skip_special_tokens=True)


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


def console() -> Any:
    """The console of standard output: as wide as the terminal, or wide enough for every table where it is a file.

    It shows text as it is: brackets and colons are no markup.
    """
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 140)
