"""The order of training batches: an endless, seeded shuffle that can be left at any batch and taken up again there.

The order of epoch e is a function of (seed, e) alone, so a position needs two integers and not a generator's state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Batches(Iterator[list[T]]):
    """Iterates for ever over lists of `batch_size` examples, every example once an epoch, shuffled anew each epoch.

    The last batch of an epoch is smaller where the examples do not divide evenly. `epoch` and `position` (batches
    already given in this epoch) say where it is; `state_dict()` is JSON-able and `load_state_dict()` continues
    exactly there.
    """

    def __init__(self, examples: Sequence[T], batch_size: int, seed: int, shuffle: bool = True):
        if not len(examples):
            raise ValueError("there are no examples to make batches of")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.examples, self.batch_size, self.seed, self.shuffle = examples, batch_size, seed, shuffle
        self.epoch = self.position = 0
        self._order_of = -1  # the epoch whose order is at hand

    def __len__(self) -> int:
        """Batches in one epoch."""
        return -(-len(self.examples) // self.batch_size)

    def __next__(self) -> list[T]:
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        if self._order_of != self.epoch:
            self._order, self._order_of = self.order(self.epoch), self.epoch
        start = self.position * self.batch_size
        self.position += 1
        return [self.examples[index] for index in self._order[start : start + self.batch_size]]

    def order(self, epoch: int) -> np.ndarray:
        """The indices of the examples in the order of this epoch."""
        if not self.shuffle:
            return np.arange(len(self.examples))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))

    def state_dict(self) -> dict[str, int | bool]:
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "batch_size": self.batch_size,
            "examples": len(self.examples),
        }

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Continues where `state` was taken; ValueError where it is of other batches than these."""
        here = self.state_dict()
        for name in ("seed", "shuffle", "batch_size", "examples"):
            if state.get(name) != here[name]:
                raise ValueError(
                    f"the saved position is of batches with {name} = {state.get(name)}, these have {here[name]}"
                )
        epoch, position = state.get("epoch"), state.get("position")
        if type(epoch) is not int or type(position) is not int or epoch < 0 or not 0 <= position <= len(self):
            raise ValueError(f"the saved position is epoch {epoch}, batch {position}; an epoch has {len(self)} batches")
        self.epoch, self.position = epoch, position
