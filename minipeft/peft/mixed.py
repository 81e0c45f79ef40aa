"""Which adapters a call of a model uses: the active ones, or in a mixed batch one for each row.

    rows      a  b  a  -            computed as  a: rows 0, 2;  b: row 1;  none: row 3;  and put back in order

The choice is fixed for a call in a context variable: a checkpointed block that is computed again in backward uses the
adapters of its forward pass, whatever has been selected since.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Rng, is_array, xp_of
from ..nn.module import Module
from .targets import PeftError

BASE = "__base__"  # in a mixed batch, the name of a row that uses no adapter (as in PEFT)
_CALL: ContextVar[tuple[Any, list[str]]] = ContextVar("call", default=(None, []))


class Rows(list):
    """The adapter of each row of a mixed batch, or BASE."""


class Selection(Module):
    """Which adapters the layers of one model use: the same object in every layer."""

    def __init__(self) -> None:
        self.names: list[str] = []  # active, in order; a new list for each choice

    @contextmanager
    def call(self, rows: list[str] | None) -> Iterator[None]:
        """Inside, a call of the model: with the active adapters, or in a mixed batch with one for each of its rows."""
        token = _CALL.set((self, self.names if rows is None else Rows(rows)))
        try:
            yield
        finally:
            _CALL.reset(token)

    def now(self) -> list[str] | Rows:
        """The active adapters, or in a mixed batch the adapter of each row."""
        selection, names = _CALL.get()
        return names if selection is self else self.names


def mixed(layer: Any, rows: Rows, x: Any, arguments: tuple) -> Tensor:
    """An adapted layer's output where each row has an adapter of its own: once for each adapter, with its rows.

    x: [B, ...] for B rows; an array [1, ...] is the same for all. Raises PeftError for another number of rows; and,
    where the adapters differ, for a random stream (dropout) or further inputs.
    """
    positions = is_array(x) and x.shape[0] == 1  # the same for every row
    if x.shape[0] != len(rows) and not positions:
        raise PeftError(f"adapter_names has {len(rows)} names for an input of {x.shape[0]} rows")
    mine = [name if name in layer.adapters else BASE for name in rows]
    if len(set(mine)) == 1:
        return layer.compute(mine[:1], x, arguments)
    if any(a is not None for a in arguments):
        raise PeftError(
            "a batch that mixes adapters is computed without dropout: leave rng out"
            if all(a is None or isinstance(a, Rng) for a in arguments)
            else f"a {type(layer.base_layer).__name__} with several inputs cannot mix adapters in a batch"
        )
    xp = xp_of(x if is_array(x) else x.data)
    if positions:
        x = xp.broadcast_to(x, (len(rows), *x.shape[1:]))
    parts, order = [], []
    for name in dict.fromkeys(mine):
        index = [i for i, n in enumerate(mine) if n == name]
        parts.append(layer.compute([name], x[xp.asarray(index)], arguments))
        order += index
    return F.cat(parts, axis=0)[xp.asarray(np.argsort(order))]
