"""What a command trains and tests on: records from a shipped task or the user's file, split, rendered and encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import minipeft as mp

from ..options import configuration, option
from .arguments import COLUMNS


class Data(NamedTuple):
    """Encoded examples to learn from and held out ones, the records of the latter, and what did not fit."""

    train: list[mp.text.examples.Example]
    held_out: list[mp.text.examples.Example]
    held_out_records: list[mp.text.datasets.Record]
    note: str  # "" or one line about records that were cut or left out


@configuration(kw_only=True)
class TaskOptions:
    """What is learned: a shipped task, or the user's file."""

    task: str = option("rewrite", "the shipped task", choices=("rewrite", "define", "use", "source"))
    data: str | None = option(None, "or your .jsonl or .txt file; a tenth, 96 at most, is held out", metavar="FILE")
    columns: list[str] | None = option(None, COLUMNS, metavar="FIELD=NAME")

    def examples(self, seed: int, tokenizer: Any, max_length: int, n: int, held_out: int, split: str) -> Data:
        """The examples: of the user's file, or `n` of a shipped task, chosen by the seed.

        The held-out ones do not depend on the seed: those of `split`, evenly spaced. Of a shipped task all are short
        (as in the lessons), so that a comparison ends soon; of a file, those longer than `max_length` are left out.
        """
        import numpy as np

        shipped = mp.experiments.shipped
        if self.data:
            data = encode(read_records(self.data, self.columns), 0.1, tokenizer, max_length, on_overflow="drop")
            return data._replace(held_out=shipped.spaced(data.held_out, held_out))
        records, test = (shipped.short(self.task, name) for name in ("train", split))
        chosen = [records[i] for i in np.random.default_rng(seed).permutation(len(records))[:n]]
        return encode(chosen, shipped.spaced(test, held_out), tokenizer, max_length, on_overflow="drop")


def longest(base: Any, virtual_tokens: int = 0, wanted: int = 256, insisted: bool = False) -> int:
    """Tokens of an example: `wanted`, or what the virtual tokens leave of the model's positions.

    Raises ValueError where they leave none, and where more is wanted as --max-length, `insisted`.
    """
    positions = base.config.max_position_embeddings
    if positions <= virtual_tokens:
        raise ValueError(f"{virtual_tokens} virtual tokens take all of the model's {positions} positions")
    if insisted and wanted > positions - virtual_tokens:
        taken = f", of which {virtual_tokens} are for virtual tokens" if virtual_tokens else ""
        raise ValueError(f"--max-length {wanted} is more than the {positions} positions of the model{taken}")
    return min(wanted, positions - virtual_tokens)


def columns_of(given: Sequence[str] | None) -> dict[str, str]:
    """--columns: {a form's field: its name in the file}. Raises ValueError for what is not FIELD=NAME, or there twice."""
    columns: dict[str, str] = {}
    for text in given or ():
        field, _, name = text.partition("=")
        if not (field and name) or field in columns:
            wrong = "has that field twice" if name else "is not so"
            raise ValueError(f"--columns takes FIELD=NAME, as prompt=question, each field once; {text!r} {wrong}")
        columns[field] = name
    return columns


def read_records(path: str, columns: Sequence[str] | None = None) -> list[mp.text.datasets.Record]:
    """The records of a file to fine-tune on; `columns` as of the command line. Raises DatasetError, also for pairs."""
    datasets = mp.text.datasets
    records = datasets.read_dataset(path, columns_of(columns))
    if isinstance(records[0], (datasets.Preference, datasets.UnpairedPreference)):
        raise datasets.DatasetError(path, None, "preferences are not something to imitate; give another form")
    return records


def split_off(records: Sequence[Any], fraction: float) -> tuple[list[Any], list[Any]]:
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
    train: Sequence[mp.text.datasets.Record], held_out: Sequence[mp.text.datasets.Record] | float, tokenizer: Any,
    max_length: int, template: mp.text.templates.Template | None = None, on_overflow: str = "error",
) -> Data:  # fmt: skip
    """Both sides encoded; `held_out` is records, or the fraction of `train` to split off (0 holds nothing out).

    A single document is split by its blocks: the last ones are held out. Raises ValueError where it is too short for
    that, where no record of a side fits, and as `split_off` and `encode_examples`, which names a record by its number
    in the whole of `train`.
    """
    encode_examples = mp.text.examples.encode_examples
    if isinstance(held_out, float) and len(train) == 1 and isinstance(train[0], mp.text.datasets.Document):
        blocks = encode_examples(train, tokenizer, max_length).examples
        if held_out and len(blocks) < 2:
            raise ValueError(f"to hold a block of {max_length} tokens out it takes two; the text has {len(blocks)}")
        cut = len(blocks) - (max(1, round(held_out * len(blocks))) if held_out else 0)
        return Data(blocks[:cut], blocks[cut:], [], "")
    whole = train
    if isinstance(held_out, float):
        train, held_out = split_off(train, held_out) if held_out else (train, [])
    notes, sides = [], []
    for name, records in (("training", train), ("held-out", held_out)):
        try:
            encoded = encode_examples(records, tokenizer, max_length, template, on_overflow)
        except ValueError:
            encode_examples(whole, tokenizer, max_length, template, on_overflow)
            raise
        if records and not encoded.examples:
            raise ValueError(f"none of the {len(records)} {name} records fits into {max_length} tokens")
        if found := [f"{n} {what}" for n, what in ((encoded.truncated, "cut"), (encoded.dropped, "left out")) if n]:
            notes.append(f"{' and '.join(found)} of {len(records)} {name} records")
        sides.append(encoded.examples)
    if encoded.dropped:  # of the held-out records, the side that is encoded last
        options = tokenizer, max_length, template, on_overflow
        held_out = [record for record in held_out if encode_examples([record], *options).examples]
    return Data(*sides, list(held_out), f"longer than {max_length} tokens: {'; '.join(notes)}" if notes else "")
