"""The book of derivatives: every op, its value and its pullbacks, side by side.

Names and semantics are PyTorch's (`torch.nn.functional`, `torch`), with `axis` for PyTorch's `dim`. Each op works on
plain arrays of any library; `op` makes it a function of Tensors. Where an input may be a Python number, its pullback is
simply never asked for. `minipeft.functional` is this module.

Large elementwise work runs in cache-sized blocks spread over threads (`elementwise`, `parallel_rows`), with `out=` and
few temporaries: the matrix products of NumPy are as fast as anybody's, the passes through memory are what is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import backend
from ..backend import (
    SPLIT,
    Array,
    Rng,
    elementwise,
    get_num_threads,
    is_array,
    one_blas_thread,
    parallel_rows,
    scatter_add,
    split_rows,
    xp_of,
)
from .tensor import Slice, Tensor, checkpoint, op

__all__ = [
    "abs", "add", "addmm", "broadcast_to", "cat", "checkpoint", "clip", "cross_entropy", "div", "dropout", "embedding", "exp",
    "gather", "gelu", "getitem", "layer_norm", "linear", "linear_cross_entropy", "log", "log_softmax", "logsigmoid",
    "logsumexp", "matmul", "max", "maximum", "mean", "minimum", "mul", "neg", "packed_attention", "pow", "relu", "reshape",
    "rms_norm", "rope", "scaled_dot_product_attention", "sigmoid", "silu", "softmax", "softplus", "sqrt", "stack", "sub",
    "sum", "swapaxes", "swiglu", "tanh", "to", "transpose", "where",
]  # fmt: skip

_max, _min = max, min  # Python's own, before PyTorch's names hide them


# ------------------------------------------------------------------------------------------------------- arithmetic


def _binary(symbol: str, fn: Any, a: Array, b: Array) -> Array:
    """fn(a, b) by broadcasting; a shape mismatch becomes one sentence."""
    try:
        if is_array(a) and is_array(b):
            # one pass over fewer elements is done before another thread is awake
            if a.shape == b.shape and a.size >= 4 * SPLIT and a.dtype.kind == b.dtype.kind == "f":
                return elementwise(lambda out, x, y: fn(x, y, out=out), a, b)
            xp_of(a, b)
        return fn(a, b)
    except ValueError as error:
        raise ValueError(f"{symbol}: shapes {_shape(a)} and {_shape(b)} cannot be broadcast together") from error


def _shape(a: Any) -> tuple[int, ...]:
    return a.shape if is_array(a) else ()


@op
def add(a, b):
    """a + b."""
    return _binary("add", xp_of(a, b).add, a, b), lambda g: g, lambda g: g


@op
def sub(a, b):
    """a - b."""
    return _binary("sub", xp_of(a, b).subtract, a, b), lambda g: g, lambda g: -g


@op
def mul(a, b):
    """a * b."""
    return _binary("mul", xp_of(a, b).multiply, a, b), lambda g: g * b, lambda g: g * a


@op
def div(a, b):
    """a / b."""
    y = _binary("div", xp_of(a, b).true_divide, a, b)
    return y, lambda g: g / b, lambda g: g * (-y / b)


@op
def neg(x):
    """-x."""
    return -x, lambda g: -g


@op
def pow(x, exponent):
    """x ** exponent, for a number `exponent` that is not differentiated."""
    return x**exponent, lambda g: g * (exponent * x ** (exponent - 1) if exponent else 0.0), None


@op
def maximum(a, b):
    """Elementwise maximum; where equal, each side receives half of the gradient, as in PyTorch."""
    xp = xp_of(a, b)
    return (
        _binary("maximum", xp.maximum, a, b),
        lambda g: g * ((a > b) + 0.5 * (a == b)).astype(g.dtype),
        lambda g: g * ((b > a) + 0.5 * (a == b)).astype(g.dtype),
    )


@op
def minimum(a, b):
    """Elementwise minimum; where equal, each side receives half of the gradient, as in PyTorch."""
    xp = xp_of(a, b)
    return (
        _binary("minimum", xp.minimum, a, b),
        lambda g: g * ((a < b) + 0.5 * (a == b)).astype(g.dtype),
        lambda g: g * ((b < a) + 0.5 * (a == b)).astype(g.dtype),
    )


@op
def where(condition, a, b):
    """a where `condition` (a boolean array) holds, else b."""
    xp = xp_of(condition, a, b)
    return xp.where(condition, a, b), None, lambda g: xp.where(condition, g, 0), lambda g: xp.where(condition, 0, g)


@op
def clip(x, minimum=None, maximum=None):
    """x limited to [minimum, maximum]; the gradient passes where x lies inside, the ends included, as in PyTorch."""
    xp = xp_of(x)

    def dx(g):
        inside = xp.ones(x.shape, bool)
        if minimum is not None:
            inside &= x >= minimum
        if maximum is not None:
            inside &= x <= maximum
        return xp.where(inside, g, 0)

    return xp.clip(x, minimum, maximum), dx, None, None


@op
def to(x, dtype):
    """x converted to another floating-point dtype (as `tensor.to(dtype)`); its gradient is converted back."""
    return x.astype(dtype, copy=False), lambda g: g, None


# ------------------------------------------------------------------------------------------------ elementwise, unary


@op
def exp(x):
    """e ** x."""
    y = xp_of(x).exp(x)
    return y, lambda g: g * y


@op
def log(x):
    """Natural logarithm."""
    return xp_of(x).log(x), lambda g: g / x


@op
def sqrt(x):
    """Square root."""
    y = xp_of(x).sqrt(x)
    return y, lambda g: g * 0.5 / y


@op
def abs(x):
    """Absolute value; derivative 0 at 0."""
    xp = xp_of(x)
    return xp.absolute(x), lambda g: g * xp.sign(x)


@op
def tanh(x):
    """Hyperbolic tangent."""
    y = xp_of(x).tanh(x)
    return y, lambda g: g * (1 - y * y)


@op
def relu(x):
    """max(x, 0); derivative 0 at 0."""
    xp = xp_of(x)
    y = xp.maximum(x, 0)
    return y, lambda g: xp.where(y > 0, g, 0)


def _sigmoid(x: Array) -> Array:
    xp = xp_of(x)
    e = xp.exp(-xp.absolute(x))  # <= 1: never overflows
    return xp.where(x >= 0, 1 / (1 + e), e / (1 + e))


@op
def sigmoid(x):
    """1 / (1 + e^-x)."""
    y = _sigmoid(x)
    return y, lambda g: g * (y * (1 - y))


@op
def softplus(x):
    """log(1 + e^x), computed as max(x, 0) + log1p(e^-|x|) so that it never overflows."""
    xp = xp_of(x)
    return xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.absolute(x))), lambda g: g * _sigmoid(x)


@op
def logsigmoid(x):
    """log(sigmoid(x)) = -softplus(-x)."""
    xp = xp_of(x)
    return xp.minimum(x, 0) - xp.log1p(xp.exp(-xp.absolute(x))), lambda g: g * _sigmoid(-x)


def _exp_limit(dtype: Any) -> float:
    return {2: 11.0, 4: 88.0, 8: 709.0}[dtype.itemsize]  # the largest x whose e^x is finite


def _silu_into(out: Array, x: Array) -> None:
    """out = x / (1 + e^-x)."""
    xp = xp_of(x)
    e = xp.negative(x)
    xp.minimum(e, _exp_limit(x.dtype), out=e)
    xp.exp(e, out=e)
    e += 1
    xp.true_divide(x, e, out=out)


def _silu_and_slope_into(y: Array, slope: Array, x: Array) -> None:
    """y = x s, slope = dy/dx = s + y (1 - s), with s = 1 / (1 + e^-x)."""
    xp = xp_of(x)
    xp.negative(x, out=slope)
    xp.minimum(slope, _exp_limit(x.dtype), out=slope)
    xp.exp(slope, out=slope)
    slope += 1
    xp.true_divide(1, slope, out=slope)  # s
    xp.multiply(x, slope, out=y)
    rest = xp.subtract(1, slope)
    rest *= y
    slope += rest


@op
def silu(x):
    """x * sigmoid(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415; "swish")."""

    def dx_into(out, g, x):
        _silu_and_slope_into(xp_of(x).empty_like(x), out, x)
        out *= g

    return elementwise(_silu_into, x), lambda g: elementwise(dx_into, g, x)


@op
def swiglu(gate, up):
    """silu(gate) * up: the gated activation of Llama's MLP (Shazeer 2020, arXiv:2002.05202, eq. 6), in one pass.

    Composed of `silu` and `mul` it would keep three arrays; it keeps its two inputs. One exponential serves both gradients.
    """
    memo: dict[str, Array] = {}

    def into(out, gate, up):
        _silu_into(out, gate)
        out *= up

    def both_into(dgate, dup, g, gate, up):
        _silu_and_slope_into(dup, dgate, gate)
        dup *= g
        dgate *= g
        dgate *= up

    def pull(name, g):
        if not memo:
            memo["gate"], memo["up"] = elementwise(both_into, g, gate, up, outputs=2)
        return memo.pop(name)

    return elementwise(into, gate, up), lambda g: pull("gate", g), lambda g: pull("up", g)


_C = math.sqrt(2 / math.pi)


@op
def gelu(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): the tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    This is PyTorch's gelu(approximate="tanh") and Hugging Face's "gelu_new".
    """
    xp = xp_of(x)

    def tanh_into(t, x):  # t = tanh(C x (1 + 0.044715 x^2))
        xp.multiply(x, x, out=t)
        t *= _C * 0.044715
        t += _C
        t *= x
        xp.tanh(t, out=t)

    def into(out, x):
        tanh_into(out, x)
        out += 1
        out *= x
        out *= 0.5

    def dx_into(out, g, x):  # 0.5 (1 + t) + 0.5 x (1 - t^2) C (1 + 3 * 0.044715 x^2)
        t = xp.empty_like(x)
        tanh_into(t, x)
        xp.multiply(x, x, out=out)
        out *= 1.5 * _C * 0.044715
        out += 0.5 * _C
        out *= x
        slope = xp.multiply(t, t)
        xp.subtract(1, slope, out=slope)
        out *= slope
        t *= 0.5
        t += 0.5
        out += t
        out *= g

    return elementwise(into, x), lambda g: elementwise(dx_into, g, x)


@op
def dropout(x, p, rng):
    """x with each element zeroed with probability `p` and the rest scaled by 1/(1-p) (Srivastava et al. 2014).

    Args:
        rng: a `minipeft.backend.Rng`, whose mask depends on the row (first axis) and not on the call; or a generator of
            the array's library (`numpy.random.Generator`), which is drawn from. None, or p = 0, gives x.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability must lie in [0, 1), not {p}")
    if rng is None or p == 0:
        return x, lambda g: g, None, None
    xp = xp_of(x)
    u = rng.uniform_rows(x.shape, xp) if isinstance(rng, Rng) else rng.random(x.shape, dtype=xp.float32)
    keep = u >= p

    def masked(a):
        y = a * keep
        y *= 1 / (1 - p)
        return y

    return masked(x), masked, None, None


# ------------------------------------------------------------------------------------------------------- reductions


def _axis(axis: int, ndim: int) -> int:
    """The axis counted from the front. Raises IndexError where there is no such axis."""
    if not -ndim <= axis < ndim:
        raise IndexError(f"axis {axis} is out of range for a tensor with {ndim} axes")
    return axis % ndim


def _axes(axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    axes = tuple(range(ndim)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    return tuple(_axis(a, ndim) for a in axes)


def _expand(g: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    """Put back the axes that a reduction removed, with size one."""
    return g if keepdims or not axes else xp_of(g).expand_dims(g, axes)


@op
def sum(x, axis=None, keepdims=False):
    """Sum over `axis` (all axes by default)."""
    xp, shape, axes = xp_of(x), x.shape, _axes(axis, x.ndim)
    return x.sum(axis=axes, keepdims=keepdims), lambda g: xp.broadcast_to(_expand(g, axes, keepdims), shape), None, None


@op
def mean(x, axis=None, keepdims=False):
    """Mean over `axis` (all axes by default)."""
    xp, shape, axes = xp_of(x), x.shape, _axes(axis, x.ndim)
    n = math.prod(shape[a] for a in axes)
    return (
        x.mean(axis=axes, keepdims=keepdims),
        lambda g: xp.broadcast_to(_expand(g / n, axes, keepdims), shape),
        None,
        None,
    )


@op
def max(x, axis=None, keepdims=False):
    """Maximum over `axis` (all axes by default); equal maxima share the gradient equally, as `torch.amax` does."""
    axes = _axes(axis, x.ndim)
    y = x.max(axis=axes, keepdims=True)

    def dx(g):
        hit = (x == y).astype(g.dtype)
        hit /= hit.sum(axis=axes, keepdims=True)
        return hit * _expand(g, axes, keepdims)

    return (y if keepdims else y.reshape(tuple(n for i, n in enumerate(x.shape) if i not in axes))), dx, None, None


@op
def logsumexp(x, axis=-1, keepdims=False):
    """log(sum(exp(x))) over `axis`, shifted by the maximum so that it never overflows."""
    xp = xp_of(x)
    m = x.max(axis=axis, keepdims=True)
    e = xp.exp(x - m)
    total = e.sum(axis=axis, keepdims=True)
    y = xp.log(total) + m
    e /= total
    axes = _axes(axis, x.ndim)  # bound here: a pullback that asks x for it would keep x
    return (y if keepdims else y.squeeze(axis)), lambda g: e * _expand(g, axes, keepdims), None, None


@op
def softmax(x, axis=-1):
    """exp(x) / sum(exp(x)) along `axis`. Pullback: y * (g - sum(g * y))."""
    xp = xp_of(x)
    y = xp.exp(x - x.max(axis=axis, keepdims=True))
    y /= y.sum(axis=axis, keepdims=True)

    def dx(g):
        d = g * y
        return d - y * d.sum(axis=axis, keepdims=True)

    return y, dx, None


@op
def log_softmax(x, axis=-1):
    """x - logsumexp(x) along `axis`. Pullback: g - softmax(x) * sum(g)."""
    xp = xp_of(x)
    y = x - x.max(axis=axis, keepdims=True)
    y -= xp.log(xp.exp(y).sum(axis=axis, keepdims=True))
    return y, lambda g: g - xp.exp(y) * g.sum(axis=axis, keepdims=True), None


# ----------------------------------------------------------------------------------------------------------- shapes


@op
def reshape(x, shape):
    """The same elements in another shape."""
    before = x.shape
    try:
        return x.reshape(shape), lambda g: g.reshape(before), None
    except ValueError as error:
        raise ValueError(f"reshape: a tensor of shape {before} cannot be seen as {tuple(shape)}") from error


@op
def transpose(x, axes=None):
    """The axes in another order (reversed by default); a view."""
    inverse = None if axes is None else tuple(sorted(range(x.ndim), key=lambda i: axes[i] % x.ndim))
    return x.transpose(axes), lambda g: g.transpose(inverse), None


@op
def swapaxes(x, axis1, axis2):
    """Two axes exchanged; a view."""
    return x.swapaxes(axis1, axis2), lambda g: g.swapaxes(axis1, axis2), None, None


@op
def broadcast_to(x, shape):
    """x repeated along new or size-one axes; a view."""
    return xp_of(x).broadcast_to(x, shape), lambda g: g, None


@op
def getitem(x, index):
    """x[index], with NumPy's indexing: integers, slices, None, Ellipsis, integer or boolean arrays."""
    parts = index if isinstance(index, tuple) else (index,)
    fancy = any(is_array(i) or isinstance(i, list) for i in parts)
    repeats = any(isinstance(i, list) or (is_array(i) and i.dtype.kind != "b") for i in parts)
    y = x[index]
    return (y if fancy or is_array(y) else xp_of(x).asarray(y)), lambda g: Slice(index, g, repeats), None


@op
def gather(x, indices, axis=-1):
    """x's elements at `indices` along `axis`, where indices has x's number of axes (torch.gather, take_along_axis)."""
    xp, shape, ndim = xp_of(x), x.shape, x.ndim
    axis = _axis(axis, ndim)

    def dx(g):
        # the index arrays of every axis: `indices` itself along `axis`, positions along the others
        grid = [xp.arange(n).reshape((-1,) + (1,) * (ndim - 1 - i)) for i, n in enumerate(indices.shape)]
        grid[axis] = indices
        d = xp.zeros(shape, g.dtype)
        xp.add.at(d, tuple(grid), g)
        return d

    if indices.shape[:axis] != shape[:axis] or indices.shape[axis + 1 :] != shape[axis + 1 :]:
        raise ValueError(f"gather: indices of shape {indices.shape} must equal x's shape {shape} on every axis but {axis}")
    return xp.take_along_axis(x, indices, axis=axis), dx, None, None


@op
def _cat(*arrays, axis):
    xp = xp_of(*arrays)
    try:
        y = xp.concatenate(arrays, axis=axis)
    except ValueError as error:
        raise ValueError(f"cat: shapes {', '.join(str(a.shape) for a in arrays)} differ outside axis {axis}") from error
    before = (slice(None),) * (axis % y.ndim)
    ends = np.cumsum([a.shape[axis] for a in arrays]).tolist()
    return y, *[
        lambda g, i=(*before, slice(end - a.shape[axis], end)): g[i] for a, end in zip(arrays, ends)
    ]


def cat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """The tensors one after the other along an existing axis (torch.cat)."""
    return _cat(*tensors, axis=axis)


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """The tensors along a new axis (torch.stack)."""
    position = _axis(axis, len(tensors[0].shape) + 1)
    return _cat(*[getitem(t, (slice(None),) * position + (None,)) for t in tensors], axis=position)


# -------------------------------------------------------------------------------------------------- matrix products


def _widen(w: Array, x: Array) -> Array:
    """float16 is a storage format: a stored weight is widened when it is used."""
    return w.astype(x.dtype) if w.dtype.itemsize == 2 and x.dtype.itemsize > 2 else w


def _rows(x: Array) -> Array:
    """[..., d] -> [N, d]; unlike reshape(-1, d) also where d is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@op
def matmul(a, b):
    """a @ b, batched over leading axes with broadcasting. dA = g Bᵀ, dB = Aᵀ g."""
    xp = xp_of(a, b)
    if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise ValueError(f"matmul: shapes {a.shape} and {b.shape} do not match (inner dimensions must be equal)")
    def product(a, b):
        if b.ndim == 2 and a.ndim > 1:
            return backend.matmul(_rows(a), b).reshape(*a.shape[:-1], b.shape[1])
        with backend.one_blas_thread():
            return xp.matmul(a, b)

    try:
        y = product(a, b)
    except ValueError as error:
        raise ValueError(f"matmul: the batch axes of {a.shape} and {b.shape} cannot be broadcast together") from error

    a_ndim, b_ndim, inner = a.ndim, b.ndim, a.shape[-1]  # bound here: neither pullback keeps the array it is for

    def da(g):
        if b_ndim == 1:
            return g[..., None] * b
        return product(g[..., None, :] if a_ndim == 1 else g, b.swapaxes(-1, -2)).reshape(*g.shape[:-1], inner)

    def db(g):
        if a_ndim == 1:
            return a[:, None] * g[..., None, :] if b_ndim > 1 else a * g
        if b_ndim == 1:
            return _rows(a * g[..., None]).sum(axis=0)
        if b_ndim == 2:  # [..., n, k]ᵀ [..., n, m]: one product instead of a batch that is summed afterwards
            return backend.matmul(_rows(a).T, _rows(g))
        return product(a.swapaxes(-1, -2), g)

    return y, da, db


@op
def linear(x, weight, bias=None):
    """y = x Wᵀ + b with x [..., in], weight [out, in], bias [out] or None. dx = g W, dW = gᵀ x, db = Σ g."""
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: input {x.shape} does not match weight {weight.shape} (last axis must be {weight.shape[-1]})")
    return _affine(x, weight, bias, transposed=True)


@op
def addmm(bias, x, weight):
    """y = b + x W with x [..., in], weight [in, out], bias [out] or None: GPT-2's `Conv1D` (torch.addmm)."""
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"addmm: input {x.shape} does not match weight {weight.shape} (last axis must be {weight.shape[0]})")
    y, dx, dw, db = _affine(x, weight, bias, transposed=False)
    return y, db, dx, dw


def _affine(x: Array, weight: Array, bias: Array | None, transposed: bool) -> tuple:
    xp = xp_of(x, weight, bias)
    n_out = weight.shape[0 if transposed else 1]
    x2, shape = _rows(x), x.shape  # [N, in]
    w = _widen(weight, x)
    y = backend.matmul(x2, w.T if transposed else w)  # [N, out]
    if bias is not None:
        if bias.shape != (n_out,):
            raise ValueError(f"linear: bias {bias.shape} does not match weight {weight.shape} (must be ({n_out},))")
        y += bias

    def dx(g):
        d, w = xp.empty(shape, g.dtype), _widen(weight, g)
        backend.matmul(_rows(g), w if transposed else w.T, out=_rows(d))
        return d

    def dw(g):
        g2 = _rows(g)
        return backend.matmul(g2.T, x2) if transposed else backend.matmul(x2.T, g2)

    return y.reshape(*shape[:-1], n_out), dx, dw, lambda g: _rows(g).sum(axis=0)


@op
def embedding(ids, weight):
    """Rows of `weight` [V, d] at the integer array `ids` [...]: [..., d]. Its pullback adds each row back (scatter-add)."""
    xp = xp_of(ids, weight)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"embedding: ids must be integers, not {ids.dtype}")
    n = weight.shape[0]
    if ids.size:
        low, high = int(ids.min().item()), int(ids.max().item())
        if low < 0 or high >= n:
            raise IndexError(f"embedding: token id {low if low < 0 else high} is out of range; ids must lie in 0..{n - 1}")

    def dw(g):
        d = xp.zeros(weight.shape, g.dtype)
        scatter_add(d, ids.reshape(-1), g.reshape(-1, weight.shape[1]))
        return d

    rows = weight[ids]
    return rows.astype(xp.float32) if rows.dtype.itemsize == 2 else rows, None, dw


# ---------------------------------------------------------------------------------------------------- normalization


@op
def layer_norm(x, weight, bias, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (Ba et al. 2016, arXiv:1607.06450).

    With x̂ the normalized input and h = g * weight:  dx = (h - mean(h) - x̂ mean(h x̂)) / sqrt(var + eps).
    """
    xp, shape, d = xp_of(x, weight, bias), x.shape, x.shape[-1]
    _check_norm("layer_norm", shape, weight, bias)
    weight, bias = _widen(weight, x), _widen(bias, x)
    x2 = x.reshape(-1, d)
    normed, y, rstd = xp.empty_like(x2), xp.empty_like(x2), xp.empty((x2.shape[0], 1), x.dtype)

    def forward(s):
        xs, n, r = x2[s], normed[s], rstd[s]
        xp.subtract(xs, _row_means(xs), out=n)
        r[...] = 1 / xp.sqrt(_row_means(n, n) + eps)
        n *= r
        xp.multiply(n, weight, out=y[s])
        y[s] += bias

    parallel_rows(xp, forward, x2.shape[0], d)

    def dx(g):
        out, g2 = xp.empty(shape, g.dtype), g.reshape(-1, d)
        out2 = out.reshape(-1, d)

        def block(s):
            h, n, o = g2[s] * weight, normed[s], out2[s]
            xp.multiply(n, _row_means(h, n), out=o)
            h -= _row_means(h)
            xp.subtract(h, o, out=o)
            o *= rstd[s]

        parallel_rows(xp, block, g2.shape[0], d)
        return out

    return y.reshape(shape), dx, lambda g: _sum_products(g.reshape(-1, d), normed), lambda g: g.reshape(-1, d).sum(axis=0)


@op
def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x²) + eps) * weight over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4).

    With x̂ the normalized input and h = g * weight:  dx = (h - x̂ mean(h x̂)) / sqrt(mean(x²) + eps).
    """
    xp, shape, d = xp_of(x, weight), x.shape, x.shape[-1]
    _check_norm("rms_norm", shape, weight, None)
    weight = _widen(weight, x)
    x2 = x.reshape(-1, d)
    normed, y, rstd = xp.empty_like(x2), xp.empty_like(x2), xp.empty((x2.shape[0], 1), x.dtype)

    def forward(s):
        xs, n, r = x2[s], normed[s], rstd[s]
        r[...] = 1 / xp.sqrt(_row_means(xs, xs) + eps)
        xp.multiply(xs, r, out=n)
        xp.multiply(n, weight, out=y[s])

    parallel_rows(xp, forward, x2.shape[0], d)

    def dx(g):
        out, g2 = xp.empty(shape, g.dtype), g.reshape(-1, d)
        out2 = out.reshape(-1, d)

        def block(s):
            h, n, o = g2[s] * weight, normed[s], out2[s]
            xp.multiply(n, _row_means(h, n), out=o)
            xp.subtract(h, o, out=o)
            o *= rstd[s]

        parallel_rows(xp, block, g2.shape[0], d)
        return out

    return y.reshape(shape), dx, lambda g: _sum_products(g.reshape(-1, d), normed)


def _check_norm(name: str, shape: tuple[int, ...], weight: Array, bias: Array | None) -> None:
    for what, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != shape[-1:]:
            raise ValueError(f"{name}: {what} {p.shape} does not match the last axis of the input {shape}")


def _row_means(a: Array, b: Array | None = None) -> Array:
    """Mean over the last axis of a [N, d], or of a * b: [N, 1]. einsum takes a third of the time of `mean`."""
    xp = xp_of(a)
    total = xp.einsum("nd->n", a) if b is None else xp.einsum("nd,nd->n", a, b)
    return total[:, None] / a.shape[1]


def _sum_products(a: Array, b: Array) -> Array:
    """Σ_i a[i] * b[i] over the rows, without a full-size product."""
    return xp_of(a).einsum("nd,nd->d", a, b)


# -------------------------------------------------------------------------------------------------------- attention


@op
def rope(x, cos, sin):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), halves paired as in Hugging Face's Llama.

    Args:
        x: [B, H, T, D] queries or keys; channel i < D/2 is rotated with channel i + D/2.
        cos, sin: [B or 1, T, D/2], of the angle position * theta^(-2i/D).

    The pullback of a rotation is the rotation by the opposite angle.
    """
    xp, half = xp_of(x, cos, sin), x.shape[-1] // 2

    def rotate(x, sin):  # (a, b) -> (a, b) (cos, cos) + (b, a) (-sin, sin): whole channels, as halves make short inner loops
        c, n = xp.concatenate([cos, cos], -1)[:, None], xp.concatenate([-sin, sin], -1)[:, None]  # [B or 1, 1, T, D]
        y = xp.empty_like(x)  # keeps the memory layout of x, so that transposing it back stays free

        def block(s):
            one = slice(None) if c.shape[0] == 1 else s
            part = x[s]
            swapped = xp.empty_like(part)
            swapped[..., :half], swapped[..., half:] = part[..., half:], part[..., :half]
            swapped *= n[one]
            xp.multiply(part, c[one], out=y[s])
            y[s] += swapped

        parallel_rows(xp, block, x.shape[0], x[:1].size)
        return y

    return rotate(x, sin), lambda g: rotate(g, -sin), None, None


QUERY_BLOCK = 64  # queries that are answered together; keys that causality hides from all of them are never touched
TILE = 1 << 19  # scores computed together, at most: several heads and batch rows in one call of each NumPy function


class _Attention:
    """Softmax attention over tiles of (a few batch rows) x (a block of queries); see `scaled_dot_product_attention`.

    A tile keeps its unnormalized weights E = exp(S - max S) and the reciprocal row sums 1/l. With dO' = dO / l:
        O = (E V) / l        dV = Eᵀ dO'       dS = E * (dO' Vᵀ - rowsum(dO' * O))       dQ = dS K       dK = dSᵀ Q
    which needs no normalized copy of the weights.
    """

    def __init__(self, q: Array, k: Array, v: Array, mask: Array | None, causal: bool, scale: float, out: Array):
        self.q, self.k, self.v, self.out, self.scale, self.causal = q, k, v, out, scale, causal
        self.xp = xp_of(q, k, v)
        B, H, T, _ = q.shape
        self.kv, S = k.shape[1], k.shape[2]
        rows = _max(1, _min(TILE // _max(1, H * _min(T, QUERY_BLOCK) * S), -(-B // get_num_threads()))) if self.xp is np else B
        block = QUERY_BLOCK if causal else _max(1, T)
        self.starts = list(range(0, T, block))[::-1]  # the last block sees every key, and so comes first in backward
        self.block, self.rows = block, rows
        self.saved: dict[tuple[int, int], tuple[Array, Array]] = {}
        self._tiles(lambda b, i: self._forward(b, i, mask))

    def _tiles(self, work: Any) -> None:
        """work(batch rows, first query) for every tile; the tiles of one batch row run in order, in one thread."""
        B, rows = self.q.shape[0], self.rows

        def run(s):
            for b in range(s.start, s.stop):
                for i in self.starts:
                    work(slice(b * rows, _min((b + 1) * rows, B)), i)

        if self.xp is np:
            with one_blas_thread():
                split_rows(run, -(-B // rows), self.q.size * self.k.shape[2] // 8)  # a score is worth 5 to 10 elements
        else:
            run(slice(0, 1 if B else 0))

    def _queries(self, array: Array, b: slice, i: int) -> Array:
        """A tile of an array shaped like q, its heads grouped by the key head they share: [b, kv, H/kv * t, D]."""
        part = array[b, :, i : i + self.block]
        return part.reshape(part.shape[0], self.kv, -1, part.shape[3])

    def _forward(self, b: slice, i: int, mask: Array | None) -> None:
        xp, (_, H, T, _), S = self.xp, self.q.shape, self.k.shape[2]
        j = _min(i + self.block, T)  # queries i:j
        n = _max(0, S - T + j) if self.causal else S  # keys that query j - 1 may see
        qs = self._queries(self.q, b, i) * self.scale
        e = xp.matmul(qs, self.k[b, :, :n].swapaxes(-1, -2))  # [b, kv, H/kv * t, n]
        rows = e.shape[0]
        scores = e.reshape(rows, H, j - i, n)
        if self.causal and n:
            first = _max(0, S - T + i + 1)  # keys from here on are hidden from some query of the block
            hidden = xp.arange(first, n)[None, :] > xp.arange(S - T + i, S - T + j)[:, None]
            scores[..., first:] += xp.where(hidden, -xp.inf, 0).astype(e.dtype)
        if mask is not None:
            m = mask[(b if mask.shape[0] > 1 else slice(None))]
            m = m[:, :, (slice(i, j) if m.shape[2] > 1 else slice(None)), : n if m.shape[3] > 1 else None]
            if m.dtype == bool:
                scores[...] = xp.where(m, scores, -xp.inf)
            else:
                scores += m
        if n:
            top = e.max(axis=-1, keepdims=True)
            e -= xp.where(xp.isfinite(top), top, 0)  # a fully masked row: exp(-inf - 0) = 0
            xp.exp(e, out=e)
        total = xp.matmul(e, xp.ones((n, 1), e.dtype))  # row sums, three times as fast as sum(axis=-1)
        inverse = xp.where(total > 0, 1 / xp.where(total > 0, total, 1), 0).astype(e.dtype, copy=False)
        o = xp.matmul(e, self.v[b, :, :n])
        o *= inverse
        self.out[b, :, i:j] = o.reshape(rows, H, j - i, -1)
        self.saved[b.start, i] = e, inverse

    def backward(self, g: Array, dq: Array, dk: Array, dv: Array) -> None:
        """Write the three gradients into the given arrays."""
        xp, (_, H, T, D), S = self.xp, self.q.shape, self.k.shape[2]

        def work(b, i):
            j = _min(i + self.block, T)
            n = _max(0, S - T + j) if self.causal else S
            e, inverse = self.saved.pop((b.start, i))
            qs = self._queries(self.q, b, i) * self.scale
            k, v = self.k[b, :, :n], self.v[b, :, :n]
            do = self._queries(g, b, i) * inverse
            delta = xp.einsum("bhtd,bhtd->bht", do, self._queries(self.out, b, i))[..., None]
            if i == self.starts[0]:
                xp.matmul(e.swapaxes(-1, -2), do, out=dv[b, :, :n])
            else:
                dv[b, :, :n] += xp.matmul(e.swapaxes(-1, -2), do)
            ds = xp.matmul(do, v.swapaxes(-1, -2))
            ds -= delta
            ds *= e
            dqs = xp.matmul(ds, k)
            dqs *= self.scale
            dq[b, :, i:j] = dqs.reshape(-1, H, j - i, D)
            if i == self.starts[0]:
                xp.matmul(ds.swapaxes(-1, -2), qs, out=dk[b, :, :n])
            else:
                dk[b, :, :n] += xp.matmul(ds.swapaxes(-1, -2), qs)

        self._tiles(work)


def _attend(q, k, v, mask, causal, scale) -> _Attention:
    B, H, T, D = q.shape
    xp = xp_of(q, k, v, mask)
    if k.shape[:3] != v.shape[:3] or k.shape[0] != B or k.shape[3] != D or k.shape[1] == 0 or H % k.shape[1]:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not match: [B, H, T, D], [B, H', S, D], [B, H', S, Dv] with H' dividing H"
        )
    if mask is not None:
        want = (B, H, T, k.shape[2])
        if mask.dtype.kind not in "fb":
            raise TypeError(f"attention: the mask must be boolean (True = attend) or additive floats, not {mask.dtype}")
        if mask.ndim > 4 or any(m not in (1, w) for m, w in zip(mask.shape[::-1], want[::-1])):
            raise ValueError(f"attention: a mask of shape {mask.shape} cannot be broadcast to [B, H, T, S] = {want}")
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    out = xp.empty((B, T, H, v.shape[3]), q.dtype).transpose(0, 2, 1, 3)  # merging the heads is then a free view
    return _Attention(q, k, v, mask, causal, 1 / math.sqrt(D) if scale is None else scale, out)


@op
def scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=False, scale=None):
    """softmax(q kᵀ / sqrt(D) + mask) v (Vaswani et al. 2017, eq. 1), as torch.nn.functional has it.

    Args:
        q: [B, H, T, D];  k: [B, H', S, D];  v: [B, H', S, Dv], where H' divides H (grouped-query attention: query head h
            reads key head h // (H/H')).
        attn_mask: plain array broadcastable to [B, H, T, S]; boolean (True = attend) or additive.
        is_causal: query t sees the keys s <= t + (S - T): aligned at the bottom right, so that a cache of S - T earlier
            positions is seen whole. May be combined with a mask.

    A row that may attend to nothing gives 0 and no gradient. Departures from PyTorch: 1. is_causal aligns at the bottom
    right (PyTorch: top left). 2. A fully masked row gives 0 (PyTorch: NaN for boolean masks).
    """
    a = _attend(q, k, v, attn_mask, is_causal, scale)
    memo: dict[str, Array] = {}

    def pull(name, g):
        if not memo:
            xp = a.xp
            memo.update(q=xp.empty_like(q), k=xp.zeros_like(k), v=xp.zeros_like(v))
            a.backward(g, memo["q"], memo["k"], memo["v"])
        return memo.pop(name)

    return a.out, lambda g: pull("q", g), lambda g: pull("k", g), lambda g: pull("v", g), None, None, None


@op
def packed_attention(qkv, num_heads, attn_mask=None, is_causal=True):
    """Attention that takes GPT-2's fused projection: qkv [B, T, 3d] -> [B, T, d].

    The same as slicing q, k, v and splitting d into heads, but the three gradients are written straight into one array
    of qkv's shape; slices would each scatter into a full-size array of zeros.
    """
    B, T, d3 = qkv.shape
    heads = qkv.reshape(B, T, 3, num_heads, d3 // 3 // num_heads).transpose(2, 0, 3, 1, 4)  # [3, B, H, T, D]
    a = _attend(heads[0], heads[1], heads[2], attn_mask, is_causal, None)

    def dqkv(g):
        xp = a.xp
        d = xp.zeros(qkv.shape, qkv.dtype)
        parts = d.reshape(B, T, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
        a.backward(g.reshape(B, T, num_heads, -1).transpose(0, 2, 1, 3), parts[0], parts[1], parts[2])
        return d

    return a.out.transpose(0, 2, 1, 3).reshape(B, T, d3 // 3), dqkv, None, None, None


# ------------------------------------------------------------------------------------------------------------ losses


def _check_targets(name: str, targets: Array, shape: tuple[int, ...], classes: int, ignore_index: int) -> None:
    if targets.shape != shape:
        raise ValueError(f"{name}: targets of shape {targets.shape} must have the shape {shape}, one class id per row of logits")
    if targets.dtype.kind not in "iu":
        raise TypeError(f"{name}: targets must be integer class ids, not {targets.dtype}")
    real = targets[targets != ignore_index]
    if real.size and (int(real.min().item()) < 0 or int(real.max().item()) >= classes):
        bad = int(real.min().item()) if int(real.min().item()) < 0 else int(real.max().item())
        raise IndexError(f"{name}: target {bad} is out of range; class ids must lie in 0..{classes - 1} (or be {ignore_index})")


def _nll(logits: Array, targets: Array, counts: Array) -> tuple[Array, tuple[Array, Array]]:
    """(Σ over counted rows of logsumexp(logits) - logits[target], what softmax divides by), in row blocks.

    The divisor is (max x, Σ exp(x - max x)), both [N, 1]. Their combination max + log Σ would be rounded to the precision
    of the largest logit, and that absolute error in an exponent is a relative one in every probability.
    """
    xp, (rows, classes) = xp_of(logits), logits.shape
    top, total, picked = (xp.empty((rows, 1), logits.dtype) for _ in range(3))

    def block(s):
        x = logits[s]
        top[s] = x.max(axis=1, keepdims=True)
        e = xp.subtract(x, top[s])
        xp.exp(e, out=e)
        total[s] = xp.einsum("nv->n", e)[:, None]
        picked[s, 0] = x[xp.arange(x.shape[0]), targets[s]]

    parallel_rows(xp, block, rows, classes)
    return ((xp.log(total) + (top - picked))[:, 0] * counts).sum(), (top, total)


def _nll_gradient(
    logits: Array, targets: Array, counts: Array, divisor: tuple[Array, Array], g: Array, out: Array
) -> None:
    """out = (softmax(logits) - onehot(targets)) * counts * g, in row blocks; `out` may be `logits` itself."""
    xp, (rows, classes) = xp_of(logits), logits.shape
    weight = (counts * g).reshape(-1, 1).astype(logits.dtype)  # [N, 1]
    top, scale = divisor[0], weight / divisor[1]

    def block(s):
        o = out[s]
        xp.subtract(logits[s], top[s], out=o)
        xp.exp(o, out=o)
        o *= scale[s]
        o[xp.arange(o.shape[0]), targets[s]] -= weight[s, 0]

    parallel_rows(xp, block, rows, classes)


@op
def cross_entropy(logits, targets, ignore_index=-100):
    """Mean over the targets that count of -log softmax(logits)[target]; logits [..., V], targets [...] (class last).

    Targets equal to `ignore_index` do not count. When none counts the loss is NaN, as in PyTorch. The pullback
    (softmax - onehot) / n is computed from the logits again: no second array of their size is kept.
    """
    xp, shape, classes = xp_of(logits, targets), logits.shape, logits.shape[-1]
    _check_targets("cross_entropy", targets, logits.shape[:-1], classes, ignore_index)
    flat, t = logits.reshape(-1, classes), targets.reshape(-1)
    counts = (t != ignore_index).astype(logits.dtype)
    t = xp.where(t == ignore_index, 0, t)
    n = counts.sum()
    total, divisor = _nll(flat, t, counts)
    loss = total / n if n.item() else total * xp.nan

    def dlogits(g):
        d = xp.empty(shape, flat.dtype)
        _nll_gradient(flat, t, counts, divisor, g / n, d.reshape(-1, classes))
        return d

    return loss, dlogits, None, None


@op
def linear_cross_entropy(hidden, weight, targets, ignore_index=-100):
    """cross_entropy(linear(hidden, weight), targets), computing logits only for the rows that count, and holding them once.

    hidden [..., d], weight [V, d], targets [...]. In backward the logits' own memory becomes their gradient, so a 49k-word
    head costs one array of [rows that count, V] instead of two of [all rows, V].
    """
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: input {hidden.shape} does not match weight {weight.shape} (last axis must be {weight.shape[-1]})"
        )
    xp, (classes, width) = xp_of(hidden, weight, targets), weight.shape
    _check_targets("cross_entropy", targets, hidden.shape[:-1], classes, ignore_index)
    flat, t = hidden.reshape(-1, width), targets.reshape(-1)
    rows = xp.nonzero(t != ignore_index)[0]
    everything = rows.size == t.size
    h, t = (flat, t) if everything else (flat[rows], t[rows])
    n = rows.size
    logits = backend.matmul(h, _widen(weight, h).T)  # [n, V]
    counts = xp.ones(n, h.dtype)
    total, divisor = _nll(logits, t, counts)
    loss = total / n if n else total * xp.nan
    memo = {"logits": logits}
    del logits

    def dlogits(g):
        if "logits" in memo:
            logits = memo.pop("logits")
            _nll_gradient(logits, t, counts, divisor, g / n if n else g, out=logits)
            memo["dlogits"] = logits
        return memo["dlogits"]

    def dhidden(g):
        d = (xp.empty if everything else xp.zeros)(hidden.shape, h.dtype)
        if everything:
            backend.matmul(dlogits(g), _widen(weight, h), out=d.reshape(-1, width))
        else:
            d.reshape(-1, width)[rows] = backend.matmul(dlogits(g), _widen(weight, h))
        return d

    return loss, dhidden, lambda g: backend.matmul(dlogits(g).T, h), None, None


# --------------------------------------------------------------------------------------- the operators of a Tensor


def _reversed(fn: Any) -> Any:
    return lambda self, other: fn(other, self)


def _shape_args(args: tuple) -> tuple[int, ...]:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


Tensor.__add__, Tensor.__radd__ = add, add
Tensor.__sub__, Tensor.__rsub__ = sub, _reversed(sub)
Tensor.__mul__, Tensor.__rmul__ = mul, mul
Tensor.__truediv__, Tensor.__rtruediv__ = div, _reversed(div)
Tensor.__matmul__, Tensor.__rmatmul__ = matmul, _reversed(matmul)
Tensor.__pow__, Tensor.__neg__, Tensor.__getitem__ = pow, neg, getitem
Tensor.exp, Tensor.log, Tensor.sqrt, Tensor.tanh, Tensor.abs = exp, log, sqrt, tanh, abs
Tensor.sum, Tensor.mean, Tensor.max, Tensor.to = sum, mean, max, to
Tensor.reshape = lambda self, *shape: reshape(self, _shape_args(shape))
Tensor.transpose = lambda self, *axes: transpose(self, _shape_args(axes) or None)
Tensor.swapaxes = swapaxes
