"""From encoded examples to the batches of a training step: the order of an epoch, padding or packing, what counts."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

IGNORE = -100  # the label that does not count, as in cross entropy's ignore_index
SPARED = 0.15  # the least share of a batch's tokens, padding included, whose sparing is worth a second forward and backward pass


class Batch(NamedTuple):
    """What one forward pass takes.

    arguments: the keyword arguments of the loss; host arrays among them are moved to the model's device (see `on_device`).
    weight: the number of units (tokens, pairs, ...) that the loss is the mean of; losses are weighted with it.
    tokens: the number of input tokens without padding, from which the speed is computed.
    """

    arguments: dict[str, Any]
    weight: int
    tokens: int


RowsOf = tuple[list[int] | None, Batch]  # which rows of a batch (None: all of them), and a batch of these


def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch: a permutation [examples] that depends on (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(examples)


def counted(labels: np.ndarray) -> int:
    """The number of labels [..., T] that count: not -100, and not the first of a row, which no position predicts."""
    return int((labels[..., 1:] != IGNORE).sum())


def pad_sequences(
    sequences: Sequence[Sequence[int]], pad_value: int, side: str = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """`(values, mask)`, int64 [batch, longest]: rows filled up with `pad_value`; the mask is 1 where a row has some.

    Raises ValueError for a `side` that is neither "right" nor "left".
    """
    if side not in ("right", "left"):
        raise ValueError(f"side must be 'right' or 'left', got {side!r}")
    longest = max((len(sequence) for sequence in sequences), default=0)
    values = np.full((len(sequences), longest), pad_value, np.int64)
    mask = np.zeros((len(sequences), longest), np.int64)
    for row, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
        values[row, where] = sequence
        mask[row, where] = 1
    return values, mask


def collate(examples: Sequence[tuple[np.ndarray, np.ndarray]], pad_token_id: int = 0) -> Batch:
    """(input_ids [n], labels [n]) pairs as one batch [B, T], padded on the right to the longest.

    The attention mask [B, T] is None where nothing is padded, so that the model takes its path without a mask. The first
    token of an example is not learned, also where a soft prompt stands before it (which departs from PEFT): so a loss
    has the same labels for every method, and however examples are cut into batches.
    """
    lengths = [len(ids) for ids, _ in examples]
    input_ids, mask = pad_sequences([ids for ids, _ in examples], pad_token_id)
    labels, _ = pad_sequences([own for _, own in examples], IGNORE)
    labels[:, :1] = IGNORE
    padded = min(lengths) < max(lengths)
    arguments = {"input_ids": input_ids, "labels": labels, "attention_mask": mask if padded else None}
    return Batch(arguments, counted(labels), sum(lengths))


def in_rows(batch: Batch, n: int) -> list[RowsOf]:
    """A batch of `collate` or `collate_packed` as at most n parts: rows of about one length together, padded to the longest of
    them, so that the largest part has as few tokens as n parts allow. Whole where in a part no label counts."""
    order, lengths = _longest_first(batch)

    def bounds(tokens: int) -> list[int]:
        """Where parts begin, and the last one ends, if none may have more tokens, padding included."""
        found = [0]
        while found[-1] < len(order):
            found.append(min(len(order), found[-1] + tokens // lengths[found[-1]]))
        return found

    sizes = range(lengths[0], lengths[0] * len(order) + 1)
    return _cut(batch, order, bounds(sizes[bisect_left(sizes, True, key=lambda tokens: len(bounds(tokens)) <= n + 1)]))


def in_two(batch: Batch) -> list[RowsOf]:
    """The same as two parts, of long rows and of short ones, with the fewest tokens; whole where that spares less than SPARED."""
    order, lengths = _longest_first(batch)
    n = len(order)
    tokens, at = min((lengths[0] * i + lengths[i] * (n - i), i) for i in range(n))  # at 0: whole
    return _cut(batch, order, [0, at, n]) if tokens <= (1 - SPARED) * n * lengths[0] else [(None, batch)]


def _longest_first(batch: Batch) -> tuple[np.ndarray, list[int]]:
    """(the rows of a batch in the order of their lengths, these lengths); packed rows are full."""
    labels, mask = batch.arguments["labels"], batch.arguments["attention_mask"]
    lengths = np.full(len(labels), labels.shape[1]) if mask is None or mask.ndim == 4 else mask.sum(axis=1)
    order = np.argsort(-lengths, kind="stable")
    return order, lengths[order].tolist()


def _cut(batch: Batch, order: np.ndarray, bounds: Sequence[int]) -> list[RowsOf]:
    """The parts; one of rows with padding on the right needs no mask, as causality hides what follows a token."""
    mask, parts = batch.arguments["attention_mask"], []
    for rows in (order[start:stop] for start, stop in pairwise(bounds)):
        own = {name: array if array is None else array[rows] for name, array in batch.arguments.items()}
        tokens = batch.tokens * len(rows) // len(order)
        if mask is not None and mask.ndim == 2:
            tokens, longest = int(own["attention_mask"].sum()), own["attention_mask"].sum(axis=1).max()
            own = {name: array[:, :longest] for name, array in own.items()} | {"attention_mask": None}
        parts.append((rows.tolist(), Batch(own, counted(own["labels"]), tokens)))
    return parts if all(part.weight for _, part in parts) else [(None, batch)]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which examples share a row of `capacity` tokens: for each row, the indices of its examples.

    Best-fit decreasing: each example, the longest first, goes into the row with the least room that still holds it, or
    into a new row. This needs at most 11/9 of the fewest rows possible, plus a constant (Johnson 1973). Raises
    ValueError for an example that no row holds.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens free, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > capacity:
            raise ValueError(f"example {i} has {lengths[i]} tokens, more than the {capacity} of a row")
        best = bisect_left(rooms, (lengths[i], 0))
        if best == len(rooms):
            rooms.append((capacity, len(rows)))
            rows.append([])
        room, row = rooms.pop(best)
        rows[row].append(i)
        insort(rooms, (room - lengths[i], row))
    return rows


def collate_packed(
    examples: Sequence[tuple[np.ndarray, np.ndarray]], pad_token_id: int = 0, capacity: int | None = None
) -> Batch:
    """(input_ids [n], labels [n]) pairs as a batch of fewer rows, in which several stand one after the other (packing).

        input_ids       a0 a1 a2 a3 b0 b1 b2  .      attention_mask   key  a a a a b b b .
        position_ids     0  1  2  3  0  1  2  0        query of a          x x x x              (and nobody sees what
        labels           .  1  2  3  .  1  2  .        query of b                  x x x         follows)

    The positions of each example start at 0, none sees another ([B, 1, T, T] boolean), and the first token of one is
    not learned from the last of another, so loss and gradients are those of `collate` up to rounding. What is saved is
    the padding. (Hugging Face TRL packs the whole data set before training, so that a step holds more examples; here a
    step has the same examples with and without packing.)

    `capacity` is the number of tokens that a row may hold, by default (and at least) those of the longest example: then
    no row is longer than without packing, and attention, whose cost grows with T², costs no more. Longer rows waste
    less where examples are about equally long, and pay in a wide model, in which attention is the smaller part.
    """
    lengths = [len(ids) for ids, _ in examples]
    rows = pack(lengths, max(max(lengths), capacity or 0))
    if len(rows) == len(examples):
        return collate(examples, pad_token_id)
    shape = (len(rows), max(sum(lengths[i] for i in row) for row in rows))
    input_ids, labels = np.full(shape, pad_token_id, np.int64), np.full(shape, IGNORE, np.int64)
    positions, owner = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            where = (r, slice(start, start + lengths[i]))
            input_ids[where], labels[where] = examples[i]
            labels[r, start] = IGNORE
            positions[where], owner[where] = np.arange(lengths[i]), i
            start += lengths[i]
    same = (owner[:, None, :, None] == owner[:, None, None, :]) & (owner >= 0)[:, None, None, :]  # [B, 1, T, T]
    arguments = {"input_ids": input_ids, "labels": labels, "attention_mask": same, "position_ids": positions}
    return Batch(arguments, counted(labels), sum(lengths))


def check_examples(examples: Sequence[tuple[np.ndarray, np.ndarray]], what: str) -> None:
    """Raises ValueError, naming the example, unless it is integers (input_ids [n], labels [n]) and a label counts."""
    for i, example in enumerate(examples):
        if not (isinstance(example, tuple) and len(example) == 2) or any(isinstance(part, str) for part in example):
            made = type(example).__name__
            hint = "; encode records first: minipeft.text.examples.encode_examples" * isinstance(example, tuple | dict)
            raise ValueError(f"{what} example {i} is not a pair (input_ids, labels) but a {made}{hint}")
        ids, labels = (np.asarray(part) for part in example)
        if ids.ndim != 1 or ids.shape != labels.shape or ids.dtype.kind not in "iu" or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{what} example {i}: input_ids and labels must be integer arrays of one length; "
                f"they are {ids.dtype} {ids.shape} and {labels.dtype} {labels.shape}"
            )
        if not counted(labels):
            raise ValueError(
                f"{what} example {i} ({len(ids)} tokens) has no label that counts: all of labels[1:] are {IGNORE}; "
                "leave it out, or keep more of its completion"
            )
