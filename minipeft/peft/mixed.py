"""Which adapters a call of a model uses: the active ones, or in a mixed batch one for each row.

    rows      a  b  a  -      y = f(x)            the base layer, once for all rows
                              y_a = A_a(x_a)      each adapter around it, for its own rows x_a = (x_0, x_2)
                              (y_a0, y_b, y_a2, y_3)    put back in order; the last row is the base layer's

The choice is fixed for a call in a context variable: a checkpointed block that is computed again in backward uses the
adapters of its forward pass, whatever has been selected since. `mixed_prompts` has what stands in front of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
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
        self.names: list[str] = []  # chosen, in order; a new list for each choice
        self.disabled = False

    @property
    def active(self) -> list[str]:
        """Those in use."""
        return [] if self.disabled else self.names

    @contextmanager
    def call(self, rows: list[str] | None) -> Iterator[list[str] | Rows]:
        """Inside, a call of the model: with the active adapters, or in a mixed batch with one for each of its rows."""
        names = self.active if rows is None else Rows(rows)
        token = _CALL.set((self, names))
        try:
            yield names
        finally:
            _CALL.reset(token)

    def now(self) -> list[str] | Rows:
        """The active adapters, or in a mixed batch the adapter of each row."""
        selection, names = _CALL.get()
        return names if selection is self else self.active


def mixed(layer: Any, rows: Rows, x: Any, arguments: tuple) -> Tensor:
    """An adapted layer's output where each row has an adapter of its own: each row is what it is alone.

    x: [B, ...] for B rows; an array [1, ...] is the same for all. Raises PeftError for another number of rows, and
    where adapters differ on a layer of several inputs, for one that changes them.
    """
    positions = is_array(x) and x.shape[0] == 1  # the same for every row
    if x.shape[0] != len(rows) and not positions:
        raise PeftError(f"adapter_names has {len(rows)} names for an input of {x.shape[0]} rows")
    mine = [name if name in layer.adapters else BASE for name in rows]
    if len(set(mine)) == 1:
        return layer.compute(mine[:1], x, arguments)
    if positions:
        x = xp_of(x).broadcast_to(x, (len(rows), *x.shape[1:]))
    whole = cache(lambda: layer.base_layer(x, *arguments))  # once, and not at all where no adapter asks for it
    parts, order, xp = [], [], xp_of(x if is_array(x) else x.data)
    for name in dict.fromkeys(mine):
        index = [i for i, n in enumerate(mine) if n == name]
        parts.append(_compute(layer, name, x, index, arguments, whole))
        order += index
    return F.cat(parts)[xp.asarray(np.argsort(order))]


def _compute(layer: Any, name: str, x: Any, index: list[int], arguments: tuple, whole: Callable[[], Tensor]) -> Tensor:
    """The output of a layer with one adapter for some of the rows; `whole` is the base layer's for all of them."""
    rows = xp_of(x if is_array(x) else x.data).asarray(index)
    part = x[rows]
    further = [a for a in arguments if a is not None and not isinstance(a, Rng)]
    arguments = tuple(a.take(index) if isinstance(a, Rng) else a for a in arguments)

    def base_layer(z: Any, *arguments: Any) -> Tensor:
        if z is part:
            return whole()[rows]
        if further:
            what = f"the input of a {type(layer.base_layer).__name__}, which has several inputs"
            raise PeftError(f"{name!r} changes {what}: it cannot be mixed with others in a batch")
        return layer.base_layer(z, *arguments)

    return layer.compute([name], part, arguments, base_layer)
