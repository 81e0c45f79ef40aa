"""From encoded examples to the batches of a training step: the order of an epoch, padding, what counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

IGNORE = -100  # the label that does not count, as in cross entropy's ignore_index


class Batch(NamedTuple):
    """What one forward pass takes.

    arguments: the keyword arguments of `model.loss`; host arrays in it are moved to the model's device.
    weight: how many units (tokens, pairs, ...) that loss is the mean over; losses are combined in this proportion.
    tokens: tokens of input, padding excluded; for the speed that is shown.
    """

    arguments: dict[str, Any]
    weight: int
    tokens: int


def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch: a permutation that depends on (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(examples)


def counted(labels: np.ndarray) -> int:
    """How many labels count: those that are not -100, without each row's first, which no position predicts."""
    return int((labels[..., 1:] != IGNORE).sum())


def collate(examples: Sequence[tuple[np.ndarray, np.ndarray]], pad_token_id: int = 0) -> Batch:
    """(input_ids, labels) pairs as one batch, padded on the right to the longest.

    The attention mask [B, T] is None where nothing is padded, so that the model takes its path without a mask.
    """
    lengths = [len(ids) for ids, _ in examples]
    shape = (len(examples), max(lengths))
    input_ids, labels = np.full(shape, pad_token_id, np.int64), np.full(shape, IGNORE, np.int64)
    for row, (ids, own) in enumerate(examples):
        input_ids[row, : len(ids)], labels[row, : len(ids)] = ids, own
    mask = None
    if min(lengths) < max(lengths):
        mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int64)
    arguments = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
    return Batch(arguments, counted(labels), sum(lengths))


def check_examples(examples: Sequence[tuple[np.ndarray, np.ndarray]], what: str) -> None:
    """Raises ValueError, naming the example, for ids and labels that do not fit, or where no label counts."""
    for i, example in enumerate(examples):
        if not (isinstance(example, tuple) and len(example) == 2):
            raise ValueError(f"{what} example {i} is not a pair (input_ids, labels) but a {type(example).__name__}")
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
