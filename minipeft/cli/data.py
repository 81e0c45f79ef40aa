"""What a command trains and tests on: records from a shipped task or the user's file, split, rendered and encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from ..text.datasets import DatasetError, Document, Preference, Record, UnpairedPreference, read_dataset
from ..text.examples import Example, encode_examples
from ..text.templates import Template, asked_turn
from ..text.tokenizer import Special


class Data(NamedTuple):
    """Encoded examples to learn from and held out ones, the records of the latter, and what did not fit."""

    train: list[Example]
    held_out: list[Example]
    held_out_records: list[Record]
    note: str  # "" or one line about records that were cut or left out


def read_records(path: str) -> list[Record]:
    """The records of a file to fine-tune on. Raises DatasetError, also for preference pairs."""
    records = read_dataset(path)
    if isinstance(records[0], (Preference, UnpairedPreference)):
        raise DatasetError(path, None, "preferences are not something to imitate; this command takes other forms")
    return records


def split_off(records: Sequence[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """(training records, held-out records), about `fraction` of the distinct ones, at least one, held out.

    Those are held out whose digests are lowest: it depends on the records' content alone, so neither their order nor a
    seed moves one across, and a record that stands in the file twice is on one side. Raises ValueError where there are
    fewer than two distinct records.
    """
    digests = [hashlib.blake2b(repr(tuple(record)).encode(), digest_size=8).digest() for record in records]
    distinct = sorted(set(digests))
    if len(distinct) < 2:
        raise ValueError("holding some records out for testing needs at least two different ones; the data has one")
    held = set(distinct[: min(len(distinct) - 1, max(1, round(fraction * len(distinct))))])
    train = [record for record, digest in zip(records, digests) if digest not in held]
    return train, [record for record, digest in zip(records, digests) if digest in held]


def encode(
    train: Sequence[Record],
    held_out: Sequence[Record] | float,
    tokenizer: Any,
    max_length: int,
    template: Template | None = None,
    on_overflow: str = "error",
) -> Data:
    """Both sides encoded; `held_out` is records, or the fraction of `train` to split off (0 holds nothing out).

    A single document is split by its blocks: the last ones are held out. Raises ValueError where it is too short for
    that, where no record of a side fits, and as `split_off` and `encode_examples`.
    """
    if isinstance(held_out, float) and len(train) == 1 and isinstance(train[0], Document):
        blocks = encode_examples(train, tokenizer, max_length).examples
        if held_out and len(blocks) < 2:
            raise ValueError(
                f"the text fills {len(blocks)} block of {max_length} tokens; to hold one out it takes two: give more "
                "text, or shorter blocks"
            )
        cut = len(blocks) - (max(1, round(held_out * len(blocks))) if held_out else 0)
        return Data(blocks[:cut], blocks[cut:], [], "")
    if isinstance(held_out, float):
        train, held_out = split_off(train, held_out) if held_out else (train, [])
    notes, sides = [], []
    for name, records in (("training", train), ("held-out", held_out)):
        encoded = encode_examples(records, tokenizer, max_length, template, on_overflow)
        if records and not encoded.examples:
            raise ValueError(f"none of the {len(records)} {name} records fits into {max_length} tokens")
        if found := [f"{n} {what}" for n, what in ((encoded.truncated, "cut"), (encoded.dropped, "left out")) if n]:
            notes.append(f"{' and '.join(found)} of {len(records)} {name} records")
        sides.append(encoded.examples)
    note = f"longer than {max_length} tokens: {'; '.join(notes)}" if notes else ""
    return Data(sides[0], sides[1], list(held_out), note)


class Sample(NamedTuple):
    """What the model is asked, how that is shown, and the answer that the data has for it."""

    record: str | Record
    prompt: str
    reference: str


def samples(data: Data, tokenizer: Any, n: int, room: int, template: Template | None = None) -> list[Sample]:
    """`n` held-out records whose prompts have at most `room` tokens; of running text, the starts of blocks."""
    found: Iterable[tuple[str | Record, str | None]]
    if not data.held_out_records or isinstance(data.held_out_records[0], Document):
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        halves = ((example.input_ids.tolist(), min(len(example.input_ids) // 2, 32)) for example in data.held_out)
        found = ((decode(ids[:half]), decode(ids[half:][:48])) for ids, half in halves if half)
    else:
        found = ((record, None) for record in data.held_out_records)
    fitting = (_sample(record, reference, tokenizer, room, template) for record, reference in found)
    return list(islice(filter(None, fitting), n))


def _sample(
    record: str | Record, reference: str | None, tokenizer: Any, room: int, template: Template | None
) -> Sample | None:
    """The sample, with its record's own answer where there is no other reference; None where it has no room."""
    turn = asked_turn(record, template, tokenizer)
    if not 1 <= len(tokenizer.encode_pieces(turn.prompt, add_special_tokens=True)) <= room:
        return None
    answer = "".join(piece for piece in turn.completion if not isinstance(piece, Special))
    return Sample(record, "".join(turn.prompt), answer if reference is None else reference)
