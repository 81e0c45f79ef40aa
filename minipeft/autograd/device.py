"""Forms of ops for CuPy's arrays, each of one launch or a few: which arrays go to which of the `cuda_kernels`.

A GPU's time goes into launches and passes through memory. So an elementwise expression is one kernel; a row of a norm, of
attention's weights or of logits is the work of one block of threads; a product reads transposed factors where they lie;
and a gradient that such a kernel makes is added to the others by the kernel itself (`Sum`). Nothing waits for the device.

A form equals its definition, to rounding, where the arrays have one dtype, float32 or float64; weights may be stored in
float16. Elsewhere the definition computes. Departure: ids and targets are not read beforehand, which would be to wait;
one that is out of range gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import cuda_kernels as kernels
from ..backend import Array, Rng
from ..cuda import as_cublas_reads, contiguous, cupy, product
from . import autocast, ops
from . import checks as check
from .on_device import Sum, device, products_sum
from .ops import _rows, _t, _widen
from .tensor import Unsummed, kernel, together

# -------------------------------------------------------------------------------------------------------- elementwise


def _pointwise(of: Callable, n: int, value: Callable, gradients: Callable) -> None:
    """Register an op of n inputs, which broadcast: a kernel for its value, and one for all its gradients."""

    @device(of, n)
    def _form(*xs):
        return value(*xs), *(together(n, lambda g: gradients(g, *xs)) if n > 1 else [lambda g: gradients(g, *xs)])


_pointwise(ops.silu, 1, *kernels.silu)
_pointwise(ops.gelu, 1, *kernels.gelu)
_pointwise(ops.swiglu, 2, *kernels.swiglu)


@kernel(autocast.rounded, "cupy")
def _rounded(x, dtype):
    xp = cupy()
    return kernels.to_float16(x) if dtype == "float16" else kernels.to_bfloat16(x.view(xp.uint32)).view(xp.float32)


@device(ops.dropout)
def _dropout(x, p, rng):
    """No mask is kept: its numbers are drawn again for the gradient."""
    check.probability(p)
    if rng is None or p == 0 or not isinstance(rng, Rng):
        return ops.dropout.definition(x, p, rng)
    return rng.dropped(x, p), lambda g: rng.dropped(g, p)


@device(ops.rope, 3)
def _rope(x, cos, sin):
    half = slice(None, x.shape[-1] // 2), slice(x.shape[-1] // 2, None)

    def rotate(x, first, second):  # to exchange the halves is to rotate the other way
        y = cupy().empty(x.shape, x.dtype)
        kernels.rope(x[..., first], x[..., second], cos[:, None], sin[:, None], y[..., first], y[..., second])
        return y

    return rotate(x, *half), lambda g: rotate(g, *half[::-1])


# ------------------------------------------------------------------------------------------------------ normalization


@device(ops.add, 2)
def _add(a, b, *, later=False):
    if later and a.shape == b.shape:
        return Unsummed(contiguous(a), contiguous(b)), lambda g: g, lambda g: g
    return ops.add.definition(a, b)


@device(ops.layer_norm)
def _layer_norm(x, weight, bias, eps=1e-5):
    return _norm("layer_norm", x, eps, weight, bias)


@device(ops.rms_norm)
def _rms_norm(x, weight, eps=1e-6):
    return _norm("rms_norm", x, eps, weight, None)[:3]


def _norm(name: str, x: Array, eps: float, weight: Array, bias: Array | None) -> tuple:
    """Both norms, of three launches: forward, dx and dweight. Layer norm subtracts the mean, and adds a bias."""
    check.norm(name, x, weight=weight, **({"bias": bias} if bias is not None else {}))
    if bias is not None and bias.dtype != weight.dtype:
        weight, bias = weight.astype(x.dtype), bias.astype(x.dtype)
    xp, shape, d, dtype = cupy(), x.shape, x.shape[-1], x.dtype
    weight, n, kind, centered = contiguous(weight), math.prod(shape[:-1]), weight.dtype, bias is not None
    y, mean, rstd = xp.empty(shape, dtype), xp.empty((n, 1), dtype), xp.empty((n, 1), dtype)
    read = (x.x, x.branch, xp.empty(shape, dtype)) if type(x) is Unsummed else (contiguous(x), 0, 0)
    kernels.normalize(y, kind, n, d, *read, weight, contiguous(bias) if centered else 0, float(eps), d, y, mean, rstd)
    if type(x) is Unsummed:
        x.give(total := read[2])
    rows = _rows(total if type(x) is Unsummed else read[0])

    def dx(g):
        given = rows, weight, contiguous(g), mean, rstd, centered, d
        write = kernels.normalize_gradient
        return Sum(dtype, lambda out, total: write(rows, kind, n, d, *given, 0 if total is None else total, out))

    def dweight(g):
        return kernels.norm_weight_gradient(_rows(g), rows, mean, rstd, axis=0)

    return y, dx, dweight, lambda g: _rows(g).sum(axis=0)


# ----------------------------------------------------------------------------------------------------------- products


@device(ops.matmul, 2)
def _matmul(a, b):
    check.matmul(a, b)
    if min(a.ndim, b.ndim) < 2 or (b.ndim > 2 and a.shape[:-2] != b.shape[:-2]):
        return ops.matmul.definition(a, b)
    if b.ndim > 2:
        return product(a, b), lambda g: product(g, _t(b)), lambda g: product(_t(a), g)
    y = product(_rows(a), b).reshape(*a.shape[:-1], b.shape[1])
    return y, lambda g: products_sum(_rows(g), b.T), lambda g: products_sum(_rows(a).T, _rows(g))


@device(ops.linear)
def _linear(x, weight, bias=None, alpha=1.0):
    check.linear("linear", x, weight, bias)
    return _affine(x, weight, bias, alpha, True) or ops.linear.definition(x, weight, bias, alpha)


@kernel(ops.addmm, "cupy")
def _addmm(bias, x, weight):
    check.linear("addmm", x, weight, bias, inputs=0)
    found = _affine(x, weight, bias, 1.0, False) if x.dtype.char in "fd" else None
    if found is None:
        return ops.addmm.definition(bias, x, weight)
    y, dx, dw, db = found
    return y, db, dx, dw


def _affine(x: Array, weight: Array, bias: Array | None, alpha: float, transposed: bool) -> tuple | None:
    """y = α x Wᵀ + b (transposed), or α x W + b; None where dtypes meet, other than a weight's in float16."""

    def wide(like):  # [in, out]; widened again in backward, and not kept
        w = _widen(weight, like)
        return w.T if transposed else w

    w, b = wide(x), None if bias is None else _widen(bias, x)
    if any(a is not None and a.dtype != x.dtype for a in (w, b)):
        return None
    x, y = _rows(x), cupy().empty((*x.shape[:-1], w.shape[1]), x.dtype)
    added, vector = b is not None and b.ndim > 1, b is not None and b.ndim == 1
    if added:
        y[...] = b
    product(x, w, alpha, _rows(y), float(added))
    if vector:
        y += b

    def dw(g):
        return products_sum(_rows(g).T, x, alpha) if transposed else products_sum(x.T, _rows(g), alpha)

    return y, lambda g: products_sum(_rows(g), wide(g).T, alpha), dw, lambda g: _rows(g).sum(axis=0) if vector else g


# ---------------------------------------------------------------------------------------------------------- attention

ANSWER, SHARED = 256, 47 << 10  # threads that answer one query, and the bytes that their scores fit into


def _attend(q: Array, k: Array, v: Array, mask: Array | None, causal: bool, scale: float | None, kv: Any = None) -> tuple:
    """(softmax(scale q kᵀ) v, gradients(g, dq=, dkv=)); the weights, [T, S] a head, are not kept but made again.

    The H/n query heads of a key head stand one below the other, [B, n, H/n * T, D]: so their gradients of k and v come
    summed up. Two products of one shape are one, of pairs [2, ...]: `kv` is the pair of k and v, where there is one
    already, and `dkv` that of their gradients. The answer to one query is one kernel.
    """
    check.attention(q, k, v, mask)
    xp, (B, H, T, D), (n, S) = cupy(), q.shape, k.shape[1:3]
    kind, strides = "?", (0,) * 5
    if mask is not None:
        kind, strides = mask.dtype, (mask, *[step // mask.itemsize for step in xp.broadcast_to(mask, (B, H, T, S)).strides])
    row = 1 / math.sqrt(D) if scale is None else float(scale), *strides, causal, H, T, S
    q = contiguous(q).reshape(B, n, H // n * T, D)

    def gradients(g, dq=None, dkv=None):
        pair, qg = xp.stack((k, v)) if kv is None else kv, xp.empty((2, *q.shape), q.dtype)
        qg[0], qg[1].reshape(B, H, T, D)[...] = q, g
        ap = product(qg, _t(pair))
        kernels.softmax_gradient(q, kind, B * H * T, S, *ap, *row)
        dq = product(ap[0], k, out=None if dq is None else dq.reshape(q.shape))
        return dq.reshape(B, H, T, D), *product(_t(ap), qg, out=dkv)

    shared = (S + ANSWER) * q.itemsize
    if T == 1 and S and D <= ANSWER and shared <= SHARED:
        (k_rows, turned_k, *apart_k), (v_rows, turned_v, *apart_v) = map(as_cublas_reads, (k, v))
        if not (turned_k or turned_v):
            y = xp.empty((B, H, 1, D), q.dtype)
            given = q, k_rows, *apart_k, v_rows, *apart_v, D, n, y, *row
            kernels.answer(q, kind, B * H, 0, *given, threads=ANSWER, shared=shared)
            return y, gradients
    p = product(q, _t(k))
    kernels.softmax(q, kind, B * H * T, S, p, *row)
    return product(p, v).reshape(B, H, T, D), gradients


@device(ops.scaled_dot_product_attention, 3)
def _attention(q, k, v, attn_mask=None, is_causal=False, scale=None):
    if k.shape != v.shape:
        return ops.scaled_dot_product_attention.definition(q, k, v, attn_mask, is_causal, scale)
    y, gradients = _attend(q, k, v, attn_mask, is_causal, scale)
    return y, *together(3, gradients)


@device(ops.packed_attention)
def _packed_attention(qkv, num_heads, attn_mask=None, is_causal=True):
    (B, T, d3), D = qkv.shape, qkv.shape[2] // 3 // num_heads
    heads = qkv.reshape(B, T, 3, num_heads, D).transpose(2, 0, 3, 1, 4).copy()  # [3, B, H, T, D]
    y, gradients = _attend(*heads, attn_mask, is_causal, None, heads[1:])

    def dqkv(g):
        d = cupy().empty_like(heads)
        gradients(g.reshape(B, T, num_heads, D).swapaxes(1, 2), d[0], d[1:])
        return d.transpose(1, 3, 0, 2, 4).reshape(B, T, d3)

    return y.swapaxes(1, 2).reshape(B, T, d3 // 3), dqkv


@device(ops.rotary_attention, 5)
def _rotary_attention(q, k, v, cos, sin, attn_mask=None, cache=None):
    """One kernel rotates, and puts the heads where they are read: keys and values into the cache, where there is one."""
    check.rotary(q, k, v, cos, sin)
    if cache is not None and cache[0].dtype != q.dtype:
        return ops.rotary_attention.definition(q, k, v, cos, sin, attn_mask, cache)
    (B, T, _), half, each = q.shape, cos.shape[-1], cos.shape[0] > 1
    D, H, n, cos, sin = 2 * half, q.shape[2] // (2 * half), k.shape[2] // (2 * half), contiguous(cos), contiguous(sin)

    def rotate(ins, outs, back, room, first):
        size = B * T * (H + 2 * n) * half
        given = *map(contiguous, ins), *outs, cos, sin, each, back, size, T, H, n, half, room, first
        kernels.rotate_heads(cos, "?", -(-size // 256), 0, *given, threads=256)
        return outs

    def empty(*shape):
        return cupy().empty(shape, cos.dtype)

    kv = empty(2, B, n, T, D) if cache is None else None
    *caches, past = (*kv, 0) if cache is None else cache
    Q, K, V = rotate((q, k, v), (empty(B, H, T, D), *caches), False, caches[0].shape[2], past)
    y, gradients = _attend(Q, K[:, :, : past + T], V[:, :, : past + T], attn_mask, True, None, kv)

    def compute(g):
        dQ, dK, dV = gradients(g.reshape(B, T, H, D).swapaxes(1, 2))
        outs = empty(B, T, H * D), empty(B, T, n * D), empty(B, T, n * D)
        return rotate((dQ, dK[:, :, past:], dV[:, :, past:]), outs, True, T, 0)

    pullbacks = together(3, compute)
    return y.swapaxes(1, 2).reshape(B, T, H * D), *(pullbacks if cache is None else pullbacks[:1])


# ---------------------------------------------------------------------------------------------- embeddings and losses


@kernel(ops.embedding, "cupy")
def _embedding(ids, weight):
    check.ids(ids, weight.shape[0], values=False)
    xp, (n, d) = cupy(), weight.shape
    dtype = np.float32 if weight.dtype.itemsize == 2 else weight.dtype
    y = kernels.embedding(weight, ids[..., None], n, d, xp.empty((*ids.shape, d), dtype))

    def dw(g):
        flat, g = contiguous(ids.reshape(-1).astype(np.int64, copy=False)), contiguous(g)

        def write(out, total):
            if total is not out:
                out[...] = 0 if total is None else total
            kernels.add_rows(g, g.dtype, flat.size, d, flat, flat.size, g, d, n, out)

        return Sum(g.dtype, write)

    return y, None, dw


def _nll(x: Array, targets: Array, ignored: int, smoothing: float) -> tuple[Array, Callable[[Array, Array], Array]]:
    """(`cross_entropy` of logits [N, d], gradient(g, out)), where `out` may be the logits' memory."""
    xp, (n, d), t = cupy(), x.shape, contiguous(targets.reshape(-1).astype(np.int64, copy=False))
    (top, total, losses, counts), (loss, count) = xp.empty((4, n), x.dtype), xp.empty((2, 1), x.dtype)
    options = x, t, ignored, float(smoothing), d, top, total
    kernels.nll(x, x.dtype, n, d, *options, losses, counts)
    kernels.mean_loss(x, x.dtype, 1, n, losses, counts, n, loss, count)

    def gradient(g, out):
        kernels.nll_gradient(x, x.dtype, n, d, *options, g, count, out)
        return out

    return loss[0], gradient


@device(ops.cross_entropy)
def _cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0):
    """The pullback is computed from the logits again: no second array of their size is kept."""
    check.smoothing(label_smoothing)
    check.targets("cross_entropy", targets, logits.shape[:-1], logits.shape[-1], ignore_index, values=False)
    loss, gradient = _nll(contiguous(_rows(logits)), targets, ignore_index, label_smoothing)
    shape, dtype = logits.shape, logits.dtype
    return loss, lambda g: gradient(g, cupy().empty(shape, dtype))


@device(ops.linear_cross_entropy)
def _linear_cross_entropy(hidden, weight, targets, ignore_index=-100, label_smoothing=0.0):
    """Logits are held once: in backward their memory becomes their gradient."""
    check.linear("linear_cross_entropy", hidden, weight)
    check.targets("linear_cross_entropy", targets, hidden.shape[:-1], weight.shape[0], ignore_index, values=False)
    check.smoothing(label_smoothing)
    h = _rows(hidden)
    if _widen(weight, h).dtype != h.dtype:
        return ops.linear_cross_entropy.definition(hidden, weight, targets, ignore_index, label_smoothing)
    logits = product(h, _widen(weight, h).T)
    loss, gradient = _nll(logits, targets, ignore_index, label_smoothing)

    def compute(g):
        d = gradient(g, logits)
        return products_sum(d, _widen(weight, g)), products_sum(d.T, h)

    return loss, *together(2, compute)
