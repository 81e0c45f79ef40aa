"""What the commands show of a model: its answers to held-out prompts beside the expected ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import minipeft as mp

from .bars import console
from .data import Data

ANSWER = 48  # tokens of an answer that is shown


class Sample(NamedTuple):
    """What models are asked, how that is shown, the answer that the data has for it, and theirs by their names."""

    record: str | mp.text.datasets.Record
    prompt: str
    reference: str
    answers: Mapping[str, str]


def sampled(models: Mapping[str, Any], tokenizer: Any, data: Data, n: int, room: int, template: Any) -> list[Sample]:
    """`n` held-out records, with the most probable ANSWER tokens of each model; both fit into `room` tokens.

    Of running text, the starts of blocks.
    """
    found = list(islice(fitting(data, tokenizer, room - ANSWER, template), n))
    asked = [sample.record for sample in found]
    answers = [mp.ask(model, tokenizer, asked, template, max_new_tokens=ANSWER) for model in models.values()]
    return [sample._replace(answers=dict(zip(models, own))) for sample, *own in zip(found, *answers)]


def fitting(data: Data, tokenizer: Any, room: int, template: Any) -> Iterator[Sample]:
    """The held-out records whose prompts have at most `room` tokens."""
    records = [(record, None) for record in data.held_out_records]
    if not records or isinstance(records[0][0], mp.text.datasets.Document):
        blocks = ((e.input_ids.tolist(), min(len(e.input_ids) // 2, 32)) for e in data.held_out)
        parts = ((ids[:half], ids[half:][:48]) for ids, half in blocks if half)
        records = ([tokenizer.decode(ids, skip_special_tokens=True) for ids in part] for part in parts)
    for record, reference in records:
        turn = mp.text.templates.asked_turn(record, template, tokenizer)
        if 1 <= len(tokenizer.encode_pieces(turn.prompt, add_special_tokens=True)) <= room:
            answer = "".join(piece for piece in turn.completion if not isinstance(piece, mp.text.tokenizer.Special))
            yield Sample(record, "".join(turn.prompt), answer if reference is None else reference, {})


def show_samples(samples: Sequence[Sample]) -> None:
    """Each prompt, the answer of each model, and the reference."""
    from rich.table import Table

    for sample in samples:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, text in (("prompt", sample.prompt), *sample.answers.items(), ("reference", sample.reference)):
            table.add_row(name, text.strip())
        console().print(table, "")
