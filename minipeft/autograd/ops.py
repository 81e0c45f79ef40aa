"""The book of derivatives: the ops on floats, their values and pullbacks, side by side, in plain array code.

    @op
    def mul(a, b):
        return a * b, lambda g: g * b, lambda g: g * a        value, one pullback per input: g = dL/dy -> dL/dx_i

What is not differentiated (ids, a mask, eps) gives None in its place, or nothing where it comes last.
Where PyTorch has the op, name and semantics are PyTorch's (`torch.nn.functional`, `torch`), with `axis` for `dim`; where
an op departs, its docstring says so. Each works on NumPy's and CuPy's arrays; `op` makes it a function of Tensors. An
input may be a number: its pullback is not called. A pullback may return the shape that broadcasting gave: the engine
sums it back.

Elementwise ops, softmax, dropout and norms give x's shape; two inputs broadcast, as in NumPy. Ops raise ValueError for
shapes that do not match, TypeError for wrong dtypes, IndexError for axes, ids and targets out of range (`checks`).

These are the definitions. `kernels` holds faster forms of some for NumPy, in blocks, on several threads or with less
memory, and `device` for CuPy, of few launches; they compute in their place, and each is tested to equal its definition, to
rounding. Arrays of another library are computed by the definitions. `minipeft.functional` is this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backend import Array, Rng, add_at, is_array, scatter_add, xp_of
from . import checks as check
from .tensor import Slice, Tensor, checkpoint, op

__all__ = [
    "abs", "add", "addmm", "argmax", "broadcast_to", "cat", "checkpoint", "clip", "cross_entropy", "div", "dropout",
    "embedding", "exp", "gather", "gelu", "getitem", "inv", "kl_div", "layer_norm", "linear", "linear_cross_entropy",
    "log", "log_softmax", "logsigmoid", "logsumexp", "matmul", "max", "maximum", "mean", "minimum", "mse_loss", "mul", "neg",
    "nll_loss", "packed_attention", "pow", "relu", "reshape", "rms_norm", "rope", "rotary_attention", "scaled_dot_product_attention",
    "sigmoid", "silu", "softmax", "softplus", "sqrt", "stack", "sub", "sum", "swapaxes", "swiglu", "tanh", "to",
    "transpose", "var", "where",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- arithmetic


@op
def add(a, b, *, later=False):
    """a + b; with `later` a device may leave the addition to the norm that reads it: nothing may write to a or b before."""
    return a + b, lambda g: g, lambda g: g


@op
def sub(a, b):
    """a - b."""
    return a - b, lambda g: g, lambda g: -g


@op
def mul(a, b):
    """a * b."""
    return a * b, lambda g: g * b, lambda g: g * a


@op
def div(a, b):
    """a / b."""
    y = a / b
    return y, lambda g: g / b, lambda g: g * (-y / b)


@op
def neg(x):
    """-x."""
    return -x, lambda g: -g


@op
def pow(x, exponent):
    """x ** exponent, for a number `exponent` that is not differentiated."""
    return x**exponent, lambda g: g * (exponent * x ** (exponent - 1) if exponent else 0.0)


@op
def maximum(a, b):
    """Elementwise maximum; where equal, each side receives half of the gradient, as in PyTorch."""
    return (
        xp_of(a, b).maximum(a, b),
        lambda g: g * ((a > b) + 0.5 * (a == b)).astype(g.dtype),
        lambda g: g * ((b > a) + 0.5 * (a == b)).astype(g.dtype),
    )


@op
def minimum(a, b):
    """Elementwise minimum; where equal, each side receives half of the gradient, as in PyTorch."""
    return (
        xp_of(a, b).minimum(a, b),
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
    return xp.clip(x, minimum, maximum), lambda g: xp.where(x == xp.clip(x, minimum, maximum), g, 0)


@op
def to(x, dtype):
    """x converted to another floating-point dtype (as `tensor.to(dtype)`); its gradient is converted back."""
    return x.astype(dtype, copy=False), lambda g: g


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
    """|x|; derivative 0 at 0."""
    xp = xp_of(x)
    return xp.absolute(x), lambda g: g * xp.sign(x)


@op
def tanh(x):
    """Hyperbolic tangent, (e^x - e^-x) / (e^x + e^-x)."""
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


@op
def silu(x):
    """x σ(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415; "swish")."""
    s = _sigmoid(x)
    return x * s, lambda g: g * (s + x * s * (1 - s))


@op
def swiglu(gate, up):
    """silu(gate) * up: the gated activation of Llama's MLP (Shazeer 2020, arXiv:2002.05202, eq. 6)."""
    y, dgate = silu.definition(gate)
    return y * up, lambda g: dgate(g * up), lambda g: g * y


@op
def gelu(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): the tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    This is PyTorch's gelu(approximate="tanh") and Hugging Face's "gelu_new".
    """
    c = math.sqrt(2 / math.pi)
    t = xp_of(x).tanh(c * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t), lambda g: g * 0.5 * (1 + t + x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x))


@op
def dropout(x, p, rng):
    """x with each element zeroed with probability `p` and the rest scaled by 1/(1-p) (Srivastava et al. 2014).

    Args:
        rng: a `minipeft.backend.Rng`, whose mask depends on the row (first axis) and not on the call; or a generator of
            the array's library (`numpy.random.Generator`), which is drawn from. None, or p = 0, gives x.
            Departure from PyTorch: it has `training`, and a global generator.
    """
    check.probability(p)
    if rng is None or p == 0:
        return x, lambda g: g
    xp = xp_of(x)
    u = rng.uniform_rows(x.shape, xp) if isinstance(rng, Rng) else rng.random(x.shape, dtype=xp.float32)
    keep = u >= p
    del u  # before the result needs memory

    def masked(a):
        y = a * keep
        y *= 1 / (1 - p)
        return y

    return masked(x), masked


# ------------------------------------------------------------------------------------------------------- reductions


def _axes(axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    axes = tuple(range(ndim)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    return tuple(check.axis(a, ndim) for a in axes)


def _expand(g: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    """Put back the axes that a reduction removed, with size one."""
    return g if keepdims or not axes else xp_of(g).expand_dims(g, axes)


@op
def sum(x, axis=None, keepdims=False):
    """Sum over `axis` (all axes by default)."""
    xp, shape, axes = xp_of(x), x.shape, _axes(axis, x.ndim)
    return x.sum(axis=axes, keepdims=keepdims), lambda g: xp.broadcast_to(_expand(g, axes, keepdims), shape)


@op
def mean(x, axis=None, keepdims=False):
    """Mean over `axis` (all axes by default)."""
    xp, shape, axes = xp_of(x), x.shape, _axes(axis, x.ndim)
    n = math.prod(shape[a] for a in axes)
    return x.mean(axis=axes, keepdims=keepdims), lambda g: xp.broadcast_to(_expand(g / n, axes, keepdims), shape)


@op
def var(x, axis=None, keepdims=False, correction=1):
    """Σ (x - mean)² / (n - correction) over the n elements along `axis` (all axes by default).

    Pullback: 2 g (x - mean) / (n - correction). Departure from PyTorch: n <= correction raises ValueError, where
    it gives NaN.
    """
    axes = _axes(axis, x.ndim)
    n = math.prod(x.shape[a] for a in axes)
    check.degrees_of_freedom(n, correction)
    centered = x - x.mean(axis=axes, keepdims=True)
    y = (centered**2).sum(axis=axes, keepdims=keepdims) / (n - correction)
    return y, lambda g: centered * _expand(g * (2 / (n - correction)), axes, keepdims)


@op
def max(x, axis=None, keepdims=False):
    """Maximum over `axis` (all axes by default); equal maxima share the gradient equally, as `torch.amax` does."""
    axes = _axes(axis, x.ndim)
    y = x.max(axis=axes, keepdims=True)

    def dx(g):
        hit = (x == y).astype(g.dtype)
        hit /= hit.sum(axis=axes, keepdims=True)
        return hit * _expand(g, axes, keepdims)

    return (y if keepdims else y.reshape(tuple(n for i, n in enumerate(x.shape) if i not in axes))), dx


def argmax(x: Tensor | Array, axis: int | None = None, keepdims: bool = False) -> Array:
    """Where the maximum lies along `axis` (by default, in x flattened): [..., n] -> integers [...]; the first of equals.

    It is constant almost everywhere, so like a comparison it is no op: there is nothing to differentiate.
    """
    data = x.data if isinstance(x, Tensor) else x
    return data.argmax(axis=None if axis is None else check.axis(axis, data.ndim), keepdims=keepdims)


@op
def logsumexp(x, axis=-1, keepdims=False):
    """log(sum(exp(x))) over `axis`, shifted by the maximum so that it never overflows."""
    xp = xp_of(x)
    m = x.max(axis=axis, keepdims=True)
    m = xp.where(xp.isfinite(m), m, 0)  # inf - inf would be NaN
    e = xp.exp(x - m)
    total = e.sum(axis=axis, keepdims=True)
    y = xp.log(total) + m
    e /= total
    axes = _axes(axis, x.ndim)  # bound here: a pullback that asks x for it would keep x
    return (y if keepdims else y.squeeze(axis)), lambda g: e * _expand(g, axes, keepdims)


@op
def softmax(x, axis=-1):
    """exp(x) / sum(exp(x)) along `axis`. Pullback: d - y * sum(d), with d = g * y."""
    xp = xp_of(x)
    y = xp.exp(x - x.max(axis=axis, keepdims=True))
    y /= y.sum(axis=axis, keepdims=True)

    def dx(g):
        d = g * y
        return d - y * d.sum(axis=axis, keepdims=True)

    return y, dx


@op
def log_softmax(x, axis=-1):
    """x - logsumexp(x) along `axis`. Pullback: g - softmax(x) * sum(g)."""
    xp = xp_of(x)
    y = x - x.max(axis=axis, keepdims=True)
    y -= xp.log(xp.exp(y).sum(axis=axis, keepdims=True))
    return y, lambda g: g - xp.exp(y) * g.sum(axis=axis, keepdims=True)


# ----------------------------------------------------------------------------------------------------------- shapes


@op
def reshape(x, shape):
    """The same elements in another shape."""
    before, shape = x.shape, (shape,) if isinstance(shape, int) else shape
    try:
        return x.reshape(shape), lambda g: g.reshape(before)
    except ValueError as error:
        raise ValueError(f"reshape: a tensor of shape {before} cannot be seen as {tuple(shape)}") from error


@op
def transpose(x, axes=None):
    """The axes in another order (reversed by default), as in NumPy; a view."""
    if axes is not None and len(axes) != x.ndim:
        raise ValueError(f"transpose: a tensor of shape {x.shape} has {x.ndim} axes, not {len(axes)}; swapaxes exchanges two")
    inverse = None if axes is None else tuple(sorted(range(x.ndim), key=lambda i: axes[i] % x.ndim))
    return x.transpose(axes), lambda g: g.transpose(inverse)


@op
def swapaxes(x, axis1, axis2):
    """Two axes exchanged; a view."""
    return x.swapaxes(axis1, axis2), lambda g: g.swapaxes(axis1, axis2)


@op
def broadcast_to(x, shape):
    """x repeated along new or size-one axes; a view."""
    return xp_of(x).broadcast_to(x, shape), lambda g: g


@op
def getitem(x, index):
    """x[index], with NumPy's indexing: integers, slices, None, Ellipsis, integer or boolean arrays."""
    rows = x.shape[:1]
    return x[index], lambda g: Slice(index, g, _repeats(index, rows))


def _repeats(index: Any, rows: tuple[int, ...]) -> bool:
    """Whether an index may name an element twice."""
    if isinstance(index, np.ndarray) and index.ndim == 1 and index.dtype.kind != "b":
        return len(set((index.astype(np.int64) % rows[0]).tolist())) < index.size
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(i, (list, tuple, range, Tensor)) or (is_array(i) and i.dtype.kind != "b") for i in parts)


@op
def gather(x, indices, axis=-1):
    """x's elements at `indices` along `axis`, in the shape of indices, which has x's number of axes (torch.gather)."""
    xp, shape, ndim = xp_of(x), x.shape, x.ndim
    axis = check.axis(axis, ndim)
    check.gather(shape, indices, axis)

    def dx(g):  # the index arrays of every axis: `indices` itself along `axis`, positions along the others
        grid = [xp.arange(n).reshape((-1,) + (1,) * (ndim - 1 - i)) for i, n in enumerate(indices.shape)]
        grid[axis] = indices
        d = xp.zeros(shape, g.dtype)
        add_at(d, tuple(grid), g)
        return d

    return xp.take_along_axis(x, indices, axis=axis), dx


@op
def _cat(*arrays, axis):
    xp = xp_of(*arrays)
    axis = check.axis(axis, arrays[0].ndim)
    try:
        y = xp.concatenate(arrays, axis=axis)
    except ValueError as error:
        raise ValueError(f"cat: shapes {', '.join(str(a.shape) for a in arrays)} differ outside axis {axis}") from error
    before = (slice(None),) * axis
    ends = np.cumsum([a.shape[axis] for a in arrays]).tolist()
    return y, *[lambda g, i=(*before, slice(end - a.shape[axis], end)): g[i] for a, end in zip(arrays, ends)]


def cat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """The tensors one after the other along an axis: [..., n_i, ...] each -> [..., Σ n_i, ...] (torch.cat)."""
    if not len(tensors):
        raise ValueError("cat: there are no tensors to join")
    return _cat(*tensors, axis=axis)


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """n tensors of one shape along a new axis of size n (torch.stack)."""
    position = check.axis(axis, len(tensors[0].shape) + 1)
    return _cat(*[getitem(t, (slice(None),) * position + (None,)) for t in tensors], axis=position)


# -------------------------------------------------------------------------------------------------- matrix products


def _widen(w: Array, x: Array) -> Array:
    """float16 is a storage format: a stored weight is widened when it is used."""
    return w.astype(x.dtype) if w.dtype.itemsize == 2 and x.dtype.itemsize > 2 else w


def _t(x: Array) -> Array:
    """The transpose of each matrix: [..., n, m] -> [..., m, n]."""
    return x.swapaxes(-1, -2)


def _rows(x: Array) -> Array:
    """[..., d] -> [N, d]; unlike reshape(-1, d) also where d is 0."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@op
def matmul(a, b):
    """a @ b: [..., n, k] @ [..., k, m] -> [..., n, m]; leading axes broadcast. dA = g Bᵀ, dB = Aᵀ g.

    A vector is a row on the left, a column on the right.
    """
    check.matmul(a, b)
    row, column = a.ndim == 1, b.ndim == 1
    A = a[None] if row else a  # [..., n, k]
    B = b[:, None] if column else b  # [..., k, m]
    y = A @ B
    shape = y.shape  # [..., n, m]
    y = y[..., 0, :] if row else y
    y = y[..., 0] if column else y

    def db(g):
        return _rows(A).T @ g.reshape(-1) if column else _t(A) @ g.reshape(shape)

    return y, lambda g: g.reshape(shape) @ _t(B), db


@op
def inv(x):
    """The inverse Y of each matrix (torch.linalg.inv): [..., n, n] -> [..., n, n]. From dY = -Y dX Y: dX = -Yᵀ g Yᵀ."""
    check.square(x)
    y = xp_of(x).linalg.inv(x)
    return y, lambda g: -(_t(y) @ g @ _t(y))


@op
def linear(x, weight, bias=None, alpha=1.0):
    """y = α x Wᵀ + b with x [..., in], weight [out, in], b [out] or None. dx = α g W, dW = α gᵀ x, db = Σ g.

    Departures from PyTorch: `alpha`, as `addmm` has it there; and b may have y's shape, to be what the product is added to.
    """
    check.linear("linear", x, weight, bias)
    w = _widen(weight, x)
    w = w if alpha == 1 else alpha * w
    y = x @ w.T if bias is None else x @ w.T + bias  # [..., out]
    return y, lambda g: g @ w, lambda g: alpha * (_rows(g).T @ _rows(x)), lambda g: g  # the engine sums g to bias's shape


@op
def addmm(bias, x, weight):
    """y = b + x W with x [..., in], weight [in, out], bias [out] or None: GPT-2's `Conv1D` (torch.addmm)."""
    check.linear("addmm", x, weight, bias, inputs=0)
    w = _widen(weight, x)
    y = x @ w if bias is None else x @ w + bias  # [..., out]
    return y, lambda g: g, lambda g: g @ w.T, lambda g: _rows(x).T @ _rows(g)


@op
def embedding(ids, weight):
    """Rows of `weight` [V, d] at the integer array `ids` [...]: [..., d]. Its pullback adds each row back (scatter-add)."""
    xp, shape = xp_of(ids, weight), weight.shape
    check.ids(ids, shape[0])

    def dw(g):
        d = xp.zeros(shape, g.dtype)
        scatter_add(d, ids.reshape(-1), g.reshape(-1, shape[1]))
        return d

    rows = weight[ids]
    return rows.astype(xp.float32) if rows.dtype.itemsize == 2 else rows, None, dw


# ---------------------------------------------------------------------------------------------------- normalization


def _mean(a: Array) -> Array:
    return a.mean(axis=-1, keepdims=True)


@op
def layer_norm(x, weight, bias, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (Ba et al. 2016, arXiv:1607.06450).

    With x̂ the normalized input and h = g * weight:  dx = (h - mean(h) - x̂ mean(h x̂)) / sqrt(var + eps),
    dweight = Σ g x̂, dbias = Σ g (the engine sums). y has the dtype of x. Departure from PyTorch: no `normalized_shape`.
    """
    check.norm("layer_norm", x, weight=weight, bias=bias)
    w, b = (p.astype(x.dtype, copy=False) for p in (weight, bias))
    centered = x - _mean(x)
    rstd = 1 / xp_of(x).sqrt(_mean(centered**2) + eps)  # [..., 1]
    normed = centered * rstd  # x̂ [..., d]

    def dx(g):
        h = g * w
        return (h - _mean(h) - normed * _mean(h * normed)) * rstd

    return normed * w + b, dx, lambda g: g * normed, lambda g: g


@op
def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x²) + eps) * weight over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4).

    With x̂ the normalized input and h = g * weight:  dx = (h - x̂ mean(h x̂)) / sqrt(mean(x²) + eps), dweight = Σ g x̂.
    y has the dtype of x, as in PyTorch. Departures from it: no `normalized_shape`; the default of `eps` (there: the
    dtype's machine epsilon).
    """
    check.norm("rms_norm", x, weight=weight)
    w = weight.astype(x.dtype, copy=False)
    rstd = 1 / xp_of(x).sqrt(_mean(x * x) + eps)  # [..., 1]
    normed = x * rstd  # x̂ [..., d]

    def dx(g):
        h = g * w
        return (h - normed * _mean(h * normed)) * rstd

    return normed * w, dx, lambda g: g * normed


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
    c, s = cos[:, None], sin[:, None]  # [B or 1, 1, T, D/2]

    def rotate(x, s):
        a, b = x[..., :half], x[..., half:]  # [B, H, T, D/2] each
        return xp.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    return rotate(x, s), lambda g: rotate(g, -s)


@op
def scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=False, scale=None):
    """softmax(scale q kᵀ + mask) v [B, H, T, Dv], scale = 1/sqrt(D) unless given (Vaswani et al. 2017, eq. 1).

    Args:
        q: [B, H, T, D];  k: [B, kv, S, D];  v: [B, kv, S, Dv]. kv, the number of key heads, divides H: query head h
            reads key head h // (H/kv) (grouped-query attention).
        attn_mask: plain array broadcastable to [B, H, T, S]; boolean (True = attend) or additive.
        is_causal: query t sees the keys s <= t + S - T, so that a cache of S - T earlier positions is seen whole.

    With A = scale q kᵀ + mask, P = softmax(A), O = P v, g = dL/dO (* elementwise, else matrix products):

        dV = Pᵀ g,  dP = g vᵀ,  dA = P * (dP - Σ_s P * dP),  dQ = scale dA k,  dK = scale dAᵀ q

    With kv < H, dK and dV are summed over the query heads that read the same key head.
    A row that may attend to nothing gives 0 and no gradient, as in PyTorch since 2.5. Departures from PyTorch:
    1. is_causal aligns at the bottom right (PyTorch: top left). 2. It may be combined with a mask. 3. Grouped-query
    attention needs no `enable_gqa`. 4. There is no `dropout_p`. 5. Inputs have four axes, and a mask has no gradient.
    """
    check.attention(q, k, v, attn_mask)
    H, D, kv = q.shape[1], q.shape[3], k.shape[1]
    scale = 1 / math.sqrt(D) if scale is None else scale
    K, V = k.repeat(H // kv, axis=1), v.repeat(H // kv, axis=1)  # [B, H, S, D or Dv]: what each query head reads
    P = _masked_softmax(scale * (q @ _t(K)), attn_mask, is_causal)  # [B, H, T, S]

    def dA(g):
        dP = g @ _t(V)
        return P * (dP - (P * dP).sum(axis=-1, keepdims=True))

    def shared(d):  # [B, H, S, ...] -> [B, kv, S, ...]
        return d.reshape(d.shape[0], kv, H // kv, *d.shape[2:]).sum(axis=2)

    def dq(g):
        return scale * dA(g) @ K

    def dk(g):
        return shared(_t(scale * dA(g)) @ q)

    def dv(g):
        return shared(_t(P) @ g)

    return P @ V, dq, dk, dv


def _masked_softmax(scores: Array, mask: Array | None, is_causal: bool) -> Array:
    """softmax(scores [B, H, T, S]) over the keys that a query may see; zeros where it may see none."""
    xp, (T, S) = xp_of(scores, mask), scores.shape[-2:]
    if mask is not None:
        scores = xp.where(mask, scores, -xp.inf) if mask.dtype == bool else scores + mask.astype(scores.dtype)
    if is_causal:  # key s <= t + S - T
        scores = xp.where(xp.arange(S) <= xp.arange(S - T, S)[:, None], scores, -xp.inf)
    top = scores.max(axis=-1, keepdims=True) if S else xp.zeros((*scores.shape[:-1], 1), scores.dtype)
    e = xp.exp(scores - xp.where(xp.isfinite(top), top, 0))  # a row of only -inf gives zeros
    total = e.sum(axis=-1, keepdims=True)
    return e / xp.where(total > 0, total, 1)


@op
def packed_attention(qkv, num_heads, attn_mask=None, is_causal=True):
    """Attention that takes GPT-2's fused projection: qkv [B, T, 3d] -> [B, T, d], heads side by side in each d."""
    d, xp = qkv.shape[-1] // 3, xp_of(qkv)
    D = d // num_heads
    heads = [_heads(qkv[..., i * d : (i + 1) * d], D) for i in range(3)]
    y, *pullbacks = scaled_dot_product_attention.definition(*heads, attn_mask, is_causal)  # of q, k, v [B, H, T, D]

    def dqkv(g):
        split = _heads(g, D)
        return xp.concatenate([_merged(pullback(split)) for pullback in pullbacks], axis=-1)

    return _merged(y), dqkv


def _heads(a: Array, D: int) -> Array:
    """[B, T, H D] -> [B, H, T, D]."""
    return a.reshape(*a.shape[:2], a.shape[2] // D, D).swapaxes(1, 2)


def _merged(a: Array) -> Array:
    """[B, H, T, D] -> [B, T, H D]."""
    a = a.swapaxes(1, 2)
    return a.reshape(*a.shape[:2], a.shape[2] * a.shape[3])


@op
def rotary_attention(q, k, v, cos, sin, attn_mask=None, cache=None):
    """Causal attention that takes Llama's projections: `rope` of queries and keys, `scaled_dot_product_attention`.

    Args:
        q: [B, T, H D] gives [B, T, H D];  k, v: [B, T, kv D], heads side by side;  cos, sin: [B or 1, T, D/2].
        attn_mask: as there, for [B, H, T, S].
        cache: (keys, values, n), arrays [B, kv, room, D] with n earlier positions, which queries see, too: S = n + T. The T
            new ones are written behind them, and their gradients are not known.
    """
    check.rotary(q, k, v, cos, sin)
    D = 2 * cos.shape[-1]
    Q, K, V = (_heads(a, D) for a in (q, k, v))
    (Q, rotate, *_), (K, *_) = rope.definition(Q, cos, sin), rope.definition(K, cos, sin)
    K, V = (K, V) if cache is None else _remembered(cache, K, V)
    y, dq, dk, dv = scaled_dot_product_attention.definition(Q, K, V, attn_mask, True)
    pullbacks = [
        lambda g: _merged(rotate(dq(_heads(g, D)))),
        lambda g: _merged(rotate(dk(_heads(g, D)))),
        lambda g: _merged(dv(_heads(g, D))),
    ]
    return _merged(y), *pullbacks[: 1 if cache is not None else 3]


def _remembered(cache: tuple[Array, Array, int], K: Array, V: Array) -> list[Array]:
    """All keys and all values [B, kv, n + T, D], of which the last T are written into the cache."""
    *arrays, n = cache
    end = n + K.shape[2]
    for array, new in zip(arrays, (K, V)):
        array[:, :, n:end] = new
    return [array[:, :, :end] for array in arrays]


# ------------------------------------------------------------------------------------------------------------ losses


@op
def mse_loss(input, target):
    """Mean of (input - target)² over all elements; the shapes are equal. Pullbacks: ±2 (input - target) / n."""
    check.same_shape("mse_loss", input, target)
    d, n = input - target, input.size or math.nan
    return (d * d).sum() / n, lambda g: d * (2 * g / n), lambda g: d * (-2 * g / n)


@op
def kl_div(input, target, log_target=False):
    """KL(P || Q) = Σ_v P log(P / Q) in nats, mean over the distributions; input = log Q [..., V], target = P [..., V].

    With `log_target` the target is log P. A P of 0 adds 0. With n distributions dL/d(log Q) = -P / n,
    dL/dP = (log P + 1 - log Q) / n, or 0 where P is 0, and dL/d(log P) = P times that.
    Departure from PyTorch: the mean is over the distributions along the last axis, there reduction="batchmean" (its
    default divides by V too, and then is no KL divergence). Not symmetric: PyTorch's order of arguments, model first.
    """
    check.same_shape("kl_div", input, target)
    xp, n = xp_of(input, target), math.prod(input.shape[:-1]) or math.nan
    p = xp.exp(target) if log_target else target
    log_p = target if log_target else xp.log(xp.where(p > 0, p, 1))
    gap = xp.where(p > 0, log_p - input, 0)  # [..., V]

    def dtarget(g):
        d = (gap + (p > 0)) * (g / n)
        return d * p if log_target else d

    return (p * gap).sum() / n, lambda g: p * (-g / n), dtarget


@op
def nll_loss(log_probs, targets, ignore_index=-100):
    """Mean over the targets that count of -log_probs[target]; log_probs [..., V], targets [...]: `cross_entropy`'s.

    nll_loss(log_softmax(logits), targets) = cross_entropy(logits, targets). Pullback: -onehot / n.
    Departure from PyTorch: the class axis is the last.
    """
    onehot, _, n = _counted("nll_loss", log_probs, targets, ignore_index)
    loss = -xp_of(log_probs).where(onehot, log_probs, 0).sum() / (n or math.nan)
    return loss, lambda g: onehot * (-g / (n or 1))


def _counted(name: str, logits: Array, targets: Array, ignore_index: int) -> tuple[Array, Array, int]:
    """(onehot [..., V], which targets count [..., 1], how many do) of logits [..., V]."""
    check.targets(name, targets, logits.shape[:-1], logits.shape[-1], ignore_index)
    counts = (targets != ignore_index)[..., None]
    onehot = counts & (targets[..., None] == xp_of(logits, targets).arange(logits.shape[-1]))
    return onehot, counts, int(counts.sum().item())


@op
def cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0):
    """Mean over the targets that count of -Σ_v q_v log softmax(logits)_v, in nats; logits [..., V], targets [...].

    q = (1 - ε) onehot(target) + ε / V, with ε = `label_smoothing` (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    Targets equal to `ignore_index` do not count. When none counts the loss is NaN and its gradient 0, as in PyTorch.
    Pullback: (softmax - q) / n, in the n rows that count. Departure from PyTorch: the class axis is the last.
    """
    check.smoothing(label_smoothing)
    onehot, counts, n = _counted("cross_entropy", logits, targets, ignore_index)
    xp, classes = xp_of(logits, targets), logits.shape[-1]
    log_p, *_ = log_softmax.definition(logits)
    q = ((1 - label_smoothing) * onehot + label_smoothing / classes * counts).astype(log_p.dtype)  # [..., V]
    loss = -(q * xp.where(q > 0, log_p, 0)).sum() / (n or math.nan)
    return loss, lambda g: (xp.where(counts, xp.exp(log_p), 0) - q) * (g / (n or 1))


@op
def linear_cross_entropy(hidden, weight, targets, ignore_index=-100, label_smoothing=0.0):
    """cross_entropy(linear(hidden, weight), targets): a language model's head and its loss in one.

    hidden [..., d], weight [V, d], targets [...]. The chain rule, once: its kernel needs a fraction of the memory.
    """
    check.linear("linear_cross_entropy", hidden, weight)
    check.targets("linear_cross_entropy", targets, hidden.shape[:-1], weight.shape[0], ignore_index)
    logits, dhidden, dweight, _ = linear.definition(hidden, weight)
    loss, dlogits, *_ = cross_entropy.definition(logits, targets, ignore_index, label_smoothing)
    return loss, lambda g: dhidden(dlogits(g)), lambda g: dweight(dlogits(g))


# --------------------------------------------------------------------------------------- the operators of a Tensor


def _reversed(fn: Any) -> Any:
    return lambda self, other: fn(other, self)


def _reshape(self: Tensor, *shape: Any) -> Tensor:
    return reshape(self, tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)


def _transpose(self: Tensor, *axes: Any) -> Tensor:
    return transpose(self, (tuple(axes[0]) if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes) or None)


Tensor.__add__, Tensor.__radd__ = add, add
Tensor.__sub__, Tensor.__rsub__ = sub, _reversed(sub)
Tensor.__mul__, Tensor.__rmul__ = mul, mul
Tensor.__truediv__, Tensor.__rtruediv__ = div, _reversed(div)
Tensor.__matmul__, Tensor.__rmatmul__ = matmul, _reversed(matmul)
Tensor.__pow__, Tensor.__neg__, Tensor.__getitem__ = pow, neg, getitem
Tensor.exp, Tensor.log, Tensor.sqrt, Tensor.tanh, Tensor.abs = exp, log, sqrt, tanh, abs
Tensor.sum, Tensor.mean, Tensor.max, Tensor.var, Tensor.argmax, Tensor.to = sum, mean, max, var, argmax, to
Tensor.reshape, Tensor.transpose, Tensor.swapaxes = _reshape, _transpose, swapaxes
