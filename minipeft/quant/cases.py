"""Inputs for the gradient check of this folder's op: what `minipeft gradcheck` and the tests import, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from ..autograd.cases import Case, cases, normal
from ..autograd.tensor import Tensor
from ..backend import Array
from .bitsandbytes import QuantState, quantize_4bit
from .linear import linear_4bit


@cases("linear_4bit")
def _linear_4bit_cases() -> Iterator[Case]:
    for label, lead, (n_out, n_in), blocksize, kind, nested in (
        ("rows of whole blocks", (2, 3), (6, 64), 64, "nf4", False),
        ("blocks across rows", (4,), (5, 33), 32, "fp4", False),
        ("double quantization", (3,), (9, 40), 64, "nf4", True),
        ("one block", (), (3, 5), 64, "int4", False),
        ("no rows", (0,), (4, 8), 32, "nf4", False),
    ):
        W = normal(n_out, n_in).astype(np.float32)
        packed, state = quantize_4bit(W, blocksize, kind, nested)
        entries = state.as_dict(packed=True)
        call = partial(_applied, list(entries))
        yield Case(label, call, (normal(*lead, n_in), normal(n_out)), (packed, *entries.values()))


def _applied(keys: list[str], x: Tensor, bias: Tensor, packed: Array, *entries: Array) -> Tensor:
    """linear_4bit of a state given as arrays, whose floats may come in any dtype."""
    arrays = [a.astype("float32") if a.dtype.kind == "f" else a for a in entries]
    return linear_4bit(x, packed, QuantState.from_dict(dict(zip(keys, arrays))), bias)
