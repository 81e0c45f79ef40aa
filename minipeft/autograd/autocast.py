"""Mixed precision: inside `autocast`, each op computes on the numbers that a 16-bit format has, and rounds to them.

              sign  exponent  fraction    largest    smallest    near 1 they are apart by
    bfloat16    1       8         7       3.4e38      9.2e-41        2^-7  = 0.0078
    float16     1       5        10       65504       6.0e-8         2^-10 = 0.00098

Arrays stay float32 (NumPy has no bfloat16, and no fast float16): a number that was rounded is one of the format's. What is
rounded follows from three lists, PyTorch's:

    LOWER     products: inputs and result are rounded, sums inside are float32's, as in tensor cores
    FLOAT32   norms, softmax, losses, exp, log, sums, ...: their results are not rounded
    the rest  rounds its result where all its inputs have been rounded, and else does not

A gradient has the precision of what it is the gradient of: that of a rounded array is rounded, and so is that of a weight
which a product has rounded; in the weight's `.grad` it is float32 again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from ..backend import Array, is_array, xp_of
from .tensor import REGISTRY, Term, _mode, _set_mode, evaluated_by, unbroadcast

DTYPES = ("bfloat16", "float16")
LOWER = frozenset({
    "linear", "addmm", "matmul", "linear_4bit", "scaled_dot_product_attention", "packed_attention", "rotary_attention",
})  # fmt: skip
_ON_BOTH = frozenset({"cross_entropy", "nll_loss", "kl_div", "mse_loss", "inv", "to"})
FLOAT32 = {
    "cpu": _ON_BOTH,
    "cuda": _ON_BOTH | {
        "exp", "log", "pow", "softplus", "layer_norm", "rms_norm", "softmax", "log_softmax", "logsumexp", "sum",
    },
}  # fmt: skip
EXACT = frozenset({  # whose results, and gradients, are their inputs' numbers: nothing to round
    "abs", "neg", "relu", "reshape", "transpose", "swapaxes", "broadcast_to", "getitem", "gather", "_cat",
})  # fmt: skip
_known: dict[str, Any] = {dtype: WeakValueDictionary() for dtype in DTYPES}  # id -> an array that has been rounded


def rounded(x: Array, dtype: str) -> Array:
    """The nearest number that "bfloat16" or "float16" has, of two the even one: floats [...] -> float32 [...], new.

    As IEEE 754 has it: what is too large becomes infinite, what is too small subnormal, then zero. ml_dtypes' and
    PyTorch's casts, bit for bit. Raises ValueError for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    x = x.astype(np.float32, copy=False)
    name = xp_of(x).__name__
    return rounded.forms[name](x, dtype) if name in rounded.forms else _rounded(x, dtype)


rounded.forms = {}  # by array library: see `kernels` and `device`


def _rounded(x: Array, dtype: str) -> Array:
    """The definition: a bfloat16 is the first half of a float32, to which half of its last place is added first."""
    xp = xp_of(x)
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    bits = x.view(xp.uint32)
    bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
    return xp.where(x == x, bits.view(xp.float32), x)  # a NaN stays one


@contextmanager
def autocast(dtype: str = "bfloat16", enabled: bool = True, device_type: str = "cuda") -> Iterator[None]:
    """Inside `with autocast("float16"):`, on this thread, ops compute in mixed precision; as torch.autocast.

    Args:
        dtype: "bfloat16" or "float16".
        enabled: False makes an inner `with` compute in float32.
        device_type: whose list of float32 ops holds, PyTorch's for "cuda" or for "cpu". The CPU's has the losses and
            `inv`, and lets norms, softmax, exp, log, pow, softplus, logsumexp and sum round as their inputs are.

    The backward pass of what was computed inside rounds as well, also when it runs after the `with`. float64 is left
    alone. Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv:1710.03740); the lists of PyTorch 2.13
    (aten/src/ATen/autocast_mode.h). Departures: 1. Arrays are float32, so this saves no memory. 2. What is one op here
    rounds its inputs, its result and their gradients alone: nothing inside attention, `swiglu` or a loss, nor the result
    that a derivative is made of; but `linear_cross_entropy` is `linear` and `cross_entropy`. 3. Gradients that meet are
    added in float32, and then rounded. 4. `device_type` is no place, so it comes last.

    Raises ValueError for other names.
    """
    if dtype not in DTYPES or device_type not in FLOAT32:
        raise ValueError(
            f"autocast takes a dtype of {', '.join(DTYPES)} and a device_type of {', '.join(FLOAT32)}, "
            f"got {dtype!r} and {device_type!r}"
        )
    inside = _Cast(dtype, FLOAT32[device_type]) if enabled else None
    with evaluated_by(inside if _mode.evaluate is None or isinstance(_mode.evaluate, _Cast) else _mode.evaluate):
        yield


@contextmanager
def observed_by(observe: Callable[[str], Callable[[str, Array, Array], None]]) -> Iterator[None]:
    """Inside, each op that autocast evaluates calls `observe(its name)`, and what that returns after each rounding, as
    note("forward" or "backward", before, after), also in a backward pass that comes later.
    """
    with _set_mode("observe", observe):
        yield


class _Cast:
    """How ops are evaluated (`evaluated_by`) inside an `autocast`."""

    def __init__(self, dtype: str, float32: frozenset[str]):
        self.dtype, self.float32, self.known = dtype, float32, _known[dtype]

    def __call__(self, name: str, form: Callable, *arrays: Any, **options: Any) -> tuple:
        floats = [i for i, a in enumerate(arrays) if is_array(a) and a.dtype.kind == "f"]
        if not floats or max(arrays[i].dtype.itemsize for i in floats) > 4:
            return form(*arrays, **options)
        if name == "linear_cross_entropy":
            return self._head_and_loss(*arrays, **options)
        note = _mode.observe and _mode.observe(name)
        arrays = list(arrays)
        if name in LOWER:
            for i in floats:
                if i < 3:  # not the angles of a rotation
                    arrays[i] = self._low(arrays[i], note)
        given = [arrays[i] for i in floats]
        value, *pullbacks = form(*arrays, **options)
        value = np.asarray(value) if isinstance(value, np.generic) else value
        sized = [a for a in given if a.ndim] or given  # numbers count only among themselves, as in PyTorch
        low = name in LOWER or (name not in self.float32 and all(map(self._is_low, sized)))
        if not low:
            value = value.view() if self._is_low(value) else value  # `to` may give its input
        elif name in EXACT:
            self.known[id(value)] = value
        else:
            value = self._low(value, note)
        memo: list[Array] = []  # the gradient of the value, rounded once for all inputs
        for i in floats if name not in EXACT or not low else ():
            if i < len(pullbacks) and pullbacks[i] is not None and (low or self._is_low(arrays[i])):
                pullbacks[i] = self._pulled(pullbacks[i], arrays[i], low, memo, note)
        return value, *pullbacks

    def _is_low(self, a: Array) -> bool:
        return self.known.get(id(a)) is a or a.dtype == self.dtype

    def _low(self, a: Array, note: Callable | None) -> Array:
        """A value, rounded, and known to be."""
        if not self._is_low(a):
            before, a = a, rounded(a, self.dtype)
            self.known[id(a)] = a
            if note:
                note("forward", before, a)
        return a

    def _pulled(self, pullback: Callable, a: Array, low: bool, memo: list, note: Callable | None) -> Callable:
        """The pullback for an input `a`, which rounds what it gives and, of a value that is `low`, what it is given."""
        shape, dtype = a.shape, a.dtype

        def round_(d: Array) -> Array:  # not known to be rounded: the engine may add to it in place
            new = rounded(d, self.dtype)
            if note:
                note("backward", d, new)
            return new

        def pulled(g: Array) -> Array:
            if low and not memo:
                memo.append(round_(g))
            d = pullback(memo[0] if low else g)
            return round_(unbroadcast(d.alone(shape, dtype) if isinstance(d, Term) else d, shape))

        return pulled

    def _head_and_loss(self, hidden: Array, weight: Array, targets: Array, *more: Any, **options: Any) -> tuple:
        """linear_cross_entropy: logits, and their gradient, are rounded."""
        linear, cross_entropy = (REGISTRY[name].forms for name in ("linear", "cross_entropy"))
        library = xp_of(hidden, weight).__name__
        logits, dhidden, dweight, *_ = self("linear", linear.get(library, linear[""]), hidden, weight)
        form = cross_entropy.get(library, cross_entropy[""])
        loss, dlogits, *_ = self("cross_entropy", form, logits, targets, *more, **options)
        memo: list[Array] = []

        def d(g: Array) -> Array:
            if not memo:
                memo.append(dlogits(g))
            return memo[0]

        return loss, lambda g: dhidden(d(g)), lambda g: dweight(d(g))
