"""What the forms of ops for a device share: for which arrays they are, and gradients that a kernel adds to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import Array
from ..cuda import cupy, product
from .ops import _rows
from .tensor import Term, kernel

FLOATS = ({np.dtype(np.float32)}, {np.dtype(np.float64)})


def device(of: Callable, alike: int = 1) -> Callable[[Callable], Callable]:
    """Register a form of an op for CuPy, where its first `alike` arrays have one dtype, float32 or float64."""

    def register(form: Callable) -> Callable:
        def chosen(*arrays: Any, **options: Any) -> tuple:
            kinds = {getattr(a, "dtype", None) for a in arrays[:alike]}
            return (form if kinds in FLOATS else of.definition)(*arrays, **options)

        return kernel(of, "cupy")(chosen)

    return register


class Sum(Term):
    """A gradient that a kernel adds to the others: `write(out, total)` makes out = total + gradient; None is 0.

    dtype: of the gradient; a weight that is stored in another gets it converted.
    """

    __slots__ = ("dtype", "write")

    def __init__(self, dtype: Any, write: Callable[[Array, Array | None], Any]):
        self.dtype, self.write = dtype, write

    def alone(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """The gradient, C-contiguous."""
        out = cupy().empty(shape, self.dtype)
        self.write(out, None)
        return out.astype(dtype, copy=False)

    def added(self, total: Array, owned: bool) -> Array:
        """total + the gradient, C-contiguous."""
        if total.dtype != self.dtype:
            return total + self.alone(total.shape, total.dtype)
        if not total.flags.c_contiguous:
            total, owned = total.copy(), True
        out = total if owned else cupy().empty_like(total)
        self.write(out, total)
        return out


def products_sum(a: Array, b: Array, alpha: float = 1.0) -> Sum:
    """alpha a [n, k] @ b [k, m] as a gradient [..., m] that cuBLAS adds to the others."""

    def write(out: Array, total: Array | None) -> None:
        if total is not None and total is not out:
            out[...] = total
        product(a, b, alpha, _rows(out), 0.0 if total is None else 1.0)

    return Sum(a.dtype, write)
