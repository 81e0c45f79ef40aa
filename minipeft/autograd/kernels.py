"""Kernels: faster forms of definitions in `ops` for NumPy, in cache-sized blocks, on several threads, or in less memory.

Each takes its definition's arguments, checks them as it does, and equals it in value and gradients to rounding:
tests/test_kernels.py compares them. Those of a GPU are in `device`.

NumPy's matrix products are as fast as any; what is left to gain is the time of passes through memory. So large work
runs in blocks that stay in a core's cache, spread over threads (`elementwise`, `parallel_rows`), with `out=` and few
temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import backend
from ..backend import SPLIT, Array, elementwise, get_num_threads, one_blas_thread, parallel_rows, split_rows
from . import autocast, ops
from . import checks as check
from .ops import _rows, _widen
from .tensor import is_grad_enabled, kernel, together

# ------------------------------------------------------------------------------------------------------ elementwise


@kernel(ops.add, "numpy")
def _add(a, b, *, later=False):
    return _large("add", a, b), lambda g: g, lambda g: g


@kernel(ops.mul, "numpy")
def _mul(a, b):
    return _large("multiply", a, b), lambda g: g * b, lambda g: g * a


def _large(name: str, a: Array, b: Array) -> Array:
    """fn(a, b), on several threads where both are large: fewer elements are done before another thread is awake."""
    fn, arrays = getattr(np, name), type(a) is type(b) is np.ndarray
    if arrays and a.shape == b.shape and a.size >= 4 * SPLIT and a.dtype.kind == b.dtype.kind == "f":
        return elementwise(lambda out, x, y: fn(x, y, out=out), a, b)
    return fn(a, b)


def _exp_limit(dtype: Any) -> float:
    return {2: 11.0, 4: 88.0, 8: 709.0}[dtype.itemsize]  # the largest x whose e^x is finite


def _needs_shift(x: Array) -> bool:
    """Whether some e^x, or a sum of them, may leave the dtype's range; else e^x is as precise as e^(x - max x)."""
    limit = 0.6 * _exp_limit(x.dtype)
    return x.dtype.itemsize == 2 or not (-limit < x.min() and x.max() < limit)


def _clip(x: Array) -> None:
    """Into the range in which e^x is finite and 1 / (1 + e^x) is not rounded to 0; twice as fast as one-sided `minimum`."""
    limit = _exp_limit(x.dtype)
    np.clip(x, -limit, limit, out=x)


def _silu_into(out: Array, x: Array) -> None:
    """out = x / (1 + e^-x)."""
    e = np.negative(x)
    _clip(e)
    np.exp(e, out=e)
    e += 1
    np.true_divide(x, e, out=out)


def _silu_and_slope_into(y: Array, slope: Array, x: Array) -> None:
    """y = x s, slope = dy/dx = s + y (1 - s), with s = 1 / (1 + e^-x)."""
    np.negative(x, out=slope)
    _clip(slope)
    np.exp(slope, out=slope)
    slope += 1
    np.true_divide(x, slope, out=y)  # to the bit as where no slope is wanted
    np.true_divide(1, slope, out=slope)  # s
    rest = np.subtract(1, slope)
    rest *= y
    slope += rest


def _times(slope: Array) -> Callable[[Array], Array]:
    """The pullback g -> g * slope, written into `slope`, which its node owns."""

    def dx(g):
        if slope.size < SPLIT:
            return np.multiply(slope, g, out=slope)
        rows = slope.reshape(slope.shape[0], -1), g.reshape(slope.shape[0], -1)
        split_rows(lambda s: np.multiply(rows[0][s], rows[1][s], out=rows[0][s]), *rows[0].shape[:1], slope.size)
        return slope

    return dx


@kernel(ops.silu, "numpy")
def _silu(x):
    if not is_grad_enabled():
        return elementwise(_silu_into, x), None
    y, slope = elementwise(_silu_and_slope_into, x, outputs=2)
    return y, _times(slope)


@kernel(ops.swiglu, "numpy")
def _swiglu(gate, up):
    """What backward multiplies by is made while its parts are in the cache; the two arrays take the place of the inputs."""
    if gate.shape != up.shape:
        return ops.swiglu.definition(gate, up)

    def into(out, gate, up):
        _silu_into(out, gate)
        out *= up

    def all_into(y, dgate, dup, gate, up):
        _silu_and_slope_into(dup, dgate, gate)
        np.multiply(dup, up, out=y)
        dgate *= up

    if not is_grad_enabled():
        return elementwise(into, gate, up), None, None
    y, dgate, dup = elementwise(all_into, gate, up, outputs=3)
    return y, _times(dgate), _times(dup)


_C = 2 * math.sqrt(2 / math.pi)


@kernel(ops.gelu, "numpy")
def _gelu(x):
    """0.5 (1 + tanh(z / 2)) = s(z) = 1 / (1 + e^-z), as e^x takes half of tanh's time. Keeps dy/dx in place of x."""

    def sigmoid_into(s, x):  # z = C (x + 0.044715 x^3)
        np.multiply(x, x, out=s)
        s *= -_C * 0.044715
        s -= _C
        s *= x
        _clip(s)
        np.exp(s, out=s)
        s += 1
        np.reciprocal(s, out=s)

    def into(out, x):
        sigmoid_into(out, x)
        out *= x

    def both_into(y, slope, x):  # slope = s + x s (1 - s) dz/dx, dz/dx = C (1 + 3 * 0.044715 x^2)
        sigmoid_into(slope, x)
        rest = np.multiply(x, x)
        rest *= 3 * _C * 0.044715
        rest += _C
        rest *= x
        rest *= slope
        rest *= np.subtract(1, slope, out=y)
        np.multiply(x, slope, out=y)
        slope += rest

    if not is_grad_enabled():
        return elementwise(into, x), None
    y, slope = elementwise(both_into, x, outputs=2)
    return y, _times(slope)


# -------------------------------------------------------------------------------------------------------- precision


@kernel(autocast.rounded, "numpy")
def _rounded(x, dtype):
    return elementwise(_into_bfloat16 if dtype == "bfloat16" else _into_float16, x)


def _into_bfloat16(out: Array, x: Array) -> None:
    bits, kept = x.view(np.uint32), out.view(np.uint32)
    np.right_shift(bits, 16, out=kept)
    kept &= 1
    kept += 0x7FFF
    kept += bits
    kept &= 0xFFFF0000
    np.copyto(out, x, where=np.isnan(x))


def _into_float16(out: Array, x: Array) -> None:
    """|x| + c - c, where c is 2^13 times x's power of two: float32's last place near c is float16's near x.

    Its powers of two begin with 2^-14; from 2^16 on all is infinite. A third of the time of NumPy's casts.
    """
    bits, kept = x.view(np.uint32), out.view(np.uint32)
    sign, c = bits & 0x80000000, bits & 0x7F800000
    np.clip(c, (127 - 14) << 23, (127 + 16) << 23, out=c)
    c += 13 << 23
    c = c.view(np.float32)
    np.bitwise_xor(bits, sign, out=kept)
    with np.errstate(invalid="ignore"):  # NaNs
        out += c
        out -= c
        large = out > 65504
    if large.any():
        np.copyto(out, np.inf, where=large)
    kept |= sign


# -------------------------------------------------------------------------------------------------- matrix products


@kernel(ops.matmul, "numpy")
def _matmul(a, b):
    """Products with a matrix are one product of all rows; products of a batch run in this thread."""
    check.matmul(a, b)

    def product(a, b):
        if b.ndim == 2 and a.ndim > 1:
            return backend.matmul(_rows(a), b).reshape(*a.shape[:-1], b.shape[1])
        with one_blas_thread():
            return np.matmul(a, b)

    y = product(a, b)
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


@kernel(ops.linear, "numpy")
def _linear(x, weight, bias=None, alpha=1.0):
    check.linear("linear", x, weight, bias)
    return _affine(x, weight, bias, alpha, True)


@kernel(ops.addmm, "numpy")
def _addmm(bias, x, weight):
    check.linear("addmm", x, weight, bias, inputs=0)
    y, dx, dw, db = _affine(x, weight, bias, 1, False)
    return y, db, dx, dw


def _affine(x: Array, weight: Array, bias: Array | None, alpha: float, transposed: bool) -> tuple:
    """y = α x Wᵀ + b (transposed), or α x W + b, through `backend.matmul`.

    What the weight is multiplied as, widened from float16 or times α, is made again in backward, and not kept.
    """
    x2, shape, vector = _rows(x), x.shape, bias is not None and bias.ndim == 1  # [N, in]

    def w(like):  # [in, out]
        wide = _widen(weight, like)
        wide = wide if alpha == 1 else wide * alpha
        return wide.T if transposed else wide

    y = backend.matmul(x2, w(x))  # [N, out]
    y = y.reshape(*shape[:-1], y.shape[1])
    if bias is not None:
        y += bias

    def dx(g):
        d = np.empty(shape, g.dtype)
        backend.matmul(_rows(g), w(g).T, out=_rows(d))
        return d

    def dw(g):
        d = backend.matmul(_rows(g).T, x2) if transposed else backend.matmul(x2.T, _rows(g))
        return d if alpha == 1 else np.multiply(d, alpha, out=d)

    return y, dx, dw, lambda g: _column_sums(_rows(g)) if vector else g


# ---------------------------------------------------------------------------------------------------- normalization


@kernel(ops.layer_norm, "numpy")
def _layer_norm(x, weight, bias, eps=1e-5):
    half = x.dtype.char == "e"  # in which the sum of squares overflows, beside weights of float32, too
    return ops.layer_norm.definition(x, weight, bias, eps) if half else _norm("layer_norm", x, eps, weight, bias)


@kernel(ops.rms_norm, "numpy")
def _rms_norm(x, weight, eps=1e-6):
    half = x.dtype.char == "e"
    return ops.rms_norm.definition(x, weight, eps) if half else _norm("rms_norm", x, eps, weight, None)[:3]


def _norm(name: str, x: Array, eps: float, weight: Array, bias: Array | None) -> tuple:
    """Both norms: layer norm subtracts means (of x, and of h in dx) and adds a bias, RMS norm does neither."""
    shape, d, centered = x.shape, x.shape[-1], bias is not None
    check.norm(name, x, weight=weight, **({"bias": bias} if centered else {}))
    weight, bias = _widen(weight, x), _widen(bias, x) if centered else None
    x2 = x.reshape(-1, d)
    normed, y, rstd = np.empty_like(x2), np.empty_like(x2), np.empty((x2.shape[0], 1), x.dtype)

    def forward(s):
        xs, n, r = x2[s], normed[s], rstd[s]
        if centered:
            xs = np.subtract(xs, _row_means(xs), out=n)
        r[:, 0] = 1 / np.sqrt(np.vecdot(xs, xs) / d + eps)
        np.multiply(xs, r, out=n)
        np.multiply(n, weight, out=y[s])
        if centered:
            y[s] += bias

    parallel_rows(np, forward, x2.shape[0], d)

    def dx(g):
        out, g2 = np.empty(shape, g.dtype), g.reshape(-1, d)
        out2 = out.reshape(-1, d)

        def block(s):
            h, n, o = g2[s] * weight, normed[s], out2[s]
            np.multiply(n, (np.vecdot(h, n) / d)[:, None], out=o)
            if centered:
                h -= _row_means(h)
            np.subtract(h, o, out=o)
            o *= rstd[s]

        parallel_rows(np, block, g2.shape[0], d)
        return out

    def dweight(g):  # without a full-size product
        return np.einsum("nd,nd->d", g.reshape(-1, d), normed)

    return y.reshape(shape), dx, dweight, lambda g: _column_sums(g.reshape(-1, d))


def _row_means(a: Array) -> Array:
    """The mean of each row of a [N, d]: [N, 1], as a product, in a third of the time of `mean`."""
    d = a.shape[1]
    return (a @ np.full(d, 1 / d if d else 0, a.dtype))[:, None]


def _column_sums(a: Array) -> Array:
    """Σ over the rows of a [N, d]: [d], in a third of the time of `sum`."""
    return np.ones(a.shape[0], a.dtype) @ a


# -------------------------------------------------------------------------------------------------------- attention


@kernel(ops.rope, "numpy")
def _rope(x, cos, sin):
    half = x.shape[-1] // 2

    def rotate(x, sin):  # (a, b) -> (a, b) (cos, cos) + (b, a) (-sin, sin): whole channels, as halves make short inner loops
        c, n = np.concatenate([cos, cos], -1)[:, None], np.concatenate([-sin, sin], -1)[:, None]  # [B or 1, 1, T, D]
        y = np.empty_like(x)  # keeps the memory layout of x, so that transposing it back stays free

        def block(s):
            one = slice(None) if c.shape[0] == 1 else s
            part = x[s]
            swapped = np.empty_like(part)
            swapped[..., :half], swapped[..., half:] = part[..., half:], part[..., :half]
            swapped *= n[one]
            np.multiply(part, c[one], out=y[s])
            y[s] += swapped

        parallel_rows(np, block, x.shape[0], x[:1].size)
        return y

    return rotate(x, sin), lambda g: rotate(g, -sin)


QUERY_BLOCK = 64  # queries that are answered together; keys that causality hides from all of them are never touched
TILE = 1 << 18  # scores computed together, at most: several heads and batch rows in one call of each NumPy function


class _Attention:
    """Softmax attention over tiles of (a few batch rows) x (a block of queries); see `scaled_dot_product_attention`.

    A tile keeps its unnormalized weights E = exp(S - max S) and the reciprocal row sums 1/l. With dO' = dO / l:
        O = (E V) / l        dV = Eᵀ dO'       dS = E * (dO' Vᵀ - rowsum(dO' * O))       dQ = dS K       dK = dSᵀ Q
    which needs no normalized copy of the weights. Rowsums are subtracted within the product: [dO', -rowsum] [V, 1]ᵀ. BLAS
    reads K, V and Q where the projection has put them: to copy them first costs more than it saves.

    In a tile where no exp(S) leaves the dtype's range, E = exp(S): shifted or not, its relative error is that of S, and to
    subtract each row's maximum costs more than exp.

    Arrays: q and dq [B, H, T, D]; k and dk [B, kv, S, D]; v and dv [B, kv, S, Dv]; out and its gradient [B, H, T, Dv].
    In a tile of b rows and t queries, which together see n keys, the H/kv query heads of a key head stand one below the
    other: queries [b, kv, H/kv * t, D], weights E [b, kv, H/kv * t, n].
    """

    def __init__(self, q: Array, k: Array, v: Array, mask: Array | None, causal: bool, scale: float | None):
        check.attention(q, k, v, mask)
        (B, H, T, D), (_, self.kv, S, Dv) = q.shape, v.shape
        self.q, self.k, self.v, self.causal, self.scale = q, k, v, causal, 1 / math.sqrt(D) if scale is None else scale
        self.out = np.empty((B, T, H, Dv), q.dtype).transpose(0, 2, 1, 3)  # merging the heads is then a free view
        self.block = QUERY_BLOCK if causal else max(1, T)
        self.starts = list(range(0, T, self.block))[::-1]  # the last block, which sees every key, is done first
        tile = TILE // max(1, H * min(T, QUERY_BLOCK) * S)
        self.rows = max(1, min(tile, -(-B // get_num_threads())))
        self.saved: dict[tuple[int, int], tuple[Array, Array]] = {}  # (first row, first query) -> E, 1/l
        self.keep = is_grad_enabled()  # here: another thread has a mode of its own
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        self._rows(lambda b: self._forward(b, mask))

    def _rows(self, work: Callable[[slice], None]) -> None:
        """work(batch rows) for the batch rows of each tile: all blocks of queries of theirs, in order, in one thread."""
        B, rows = self.q.shape[0], self.rows

        def run(s):
            for b in range(s.start, s.stop):
                work(slice(b * rows, min((b + 1) * rows, B)))

        with one_blas_thread():
            split_rows(run, -(-B // rows), self.q.size * self.k.shape[2] // 8)  # a score is worth 5 to 10 elements

    def _ends(self, i: int) -> tuple[int, int]:
        """Of the tile whose first query is i: the query after its last one, and how many keys that last one may see."""
        T, S = self.q.shape[2], self.k.shape[2]
        j = min(i + self.block, T)
        return j, max(0, S - T + j) if self.causal else S

    def _queries(self, array: Array, b: slice, i: int) -> Array:
        """A tile's part of an array shaped like q or out: [b, kv, H/kv * t, D or Dv]."""
        part = array[b, :, i : i + self.block]
        return part.reshape(part.shape[0], self.kv, -1, part.shape[3])

    def _forward(self, b: slice, mask: Array | None) -> None:
        for i in self.starts:
            self._answer(b, i, mask)

    def _answer(self, b: slice, i: int, mask: Array | None) -> None:
        """The outputs of a tile's queries."""
        (_, H, T, _), S, (j, n) = self.q.shape, self.k.shape[2], self._ends(i)
        e = np.matmul(self._queries(self.q, b, i) * self.scale, self.k[b, :, :n].swapaxes(-1, -2))
        rows = e.shape[0]
        scores = e.reshape(rows, H, j - i, n)  # the same memory, one head after the other
        shift = n and ((mask is not None and mask.dtype != bool) or _needs_shift(e))
        if mask is not None:
            m = mask[(b if mask.shape[0] > 1 else slice(None))]
            m = m[:, :, (slice(i, j) if m.shape[2] > 1 else slice(None)), : n if m.shape[3] > 1 else None]
            if m.dtype == bool:
                np.copyto(scores, -np.inf, where=~m)
            else:
                scores += m
        first = max(0, S - T + i + 1) if self.causal else n  # keys from here on are hidden from some query of the block
        if first < n:
            visible = np.arange(first, n) <= np.arange(S - T + i, S - T + j)[:, None]
        if shift:
            if first < n:
                np.copyto(scores[..., first:], -np.inf, where=~visible)
            top = e.max(axis=-1, keepdims=True)
            e -= np.where(np.isfinite(top), top, 0)  # a fully masked row: exp(-inf - 0) = 0
        np.exp(e, out=e)
        if first < n and not shift:
            scores[..., first:] *= visible.astype(e.dtype)  # in a third of the time of copyto
        total = np.matmul(e, np.ones((n, 1), e.dtype))  # row sums, three times as fast as sum(axis=-1)
        if mask is None and S >= T:  # every query sees a key
            inverse = np.reciprocal(total, out=total)
        else:
            inverse = np.where(total > 0, 1 / np.where(total > 0, total, 1), 0).astype(e.dtype, copy=False)
        o = np.matmul(e, self.v[b, :, :n])
        o *= inverse
        self.out[b, :, i:j] = o.reshape(rows, H, j - i, -1)
        if self.keep:
            self.saved[b.start, i] = e, inverse

    def backward(self, g: Array, dq: Array, dk: Array, dv: Array) -> None:
        """From the gradient g of `out`, write the three gradients into the given arrays (dk and dv hold zeros)."""
        _, H, _, D = self.q.shape

        def work(b):
            k, v = self.k[b], self.v[b]
            v1 = np.full((*v.shape[:3], v.shape[3] + 1), self.scale, g.dtype)  # scale [V, 1], so that dS comes scaled
            np.multiply(v, self.scale, out=v1[..., :-1])
            for i in self.starts:
                j, n = self._ends(i)
                e, inverse = self.saved.pop((b.start, i))
                q, out = np.ascontiguousarray(self._queries(self.q, b, i)), self._queries(self.out, b, i)
                do1 = np.empty((*out.shape[:3], v1.shape[3]), g.dtype)  # [dO', -rowsum(dO' * O)]
                do = np.multiply(self._queries(g, b, i), inverse, out=do1[..., :-1])
                np.negative(np.vecdot(do, out), out=do1[..., -1])
                self._add_product(dv[b, :, :n], e, do, i)
                ds = np.matmul(do1, v1[:, :, :n].swapaxes(-1, -2))
                ds *= e
                dq[b, :, i:j] = np.matmul(ds, k[:, :, :n]).reshape(-1, H, j - i, D)
                self._add_product(dk[b, :, :n], ds, q, i)

        self._rows(work)

    def _add_product(self, total: Array, a: Array, b: Array, i: int) -> None:
        """total += aᵀ b, over the tiles of one batch row: the first of them writes."""
        if i == self.starts[0]:
            np.matmul(a.swapaxes(-1, -2), b, out=total)
        else:
            total += np.matmul(a.swapaxes(-1, -2), b)


@kernel(ops.scaled_dot_product_attention, "numpy")
def _attention(q, k, v, attn_mask=None, is_causal=False, scale=None):
    a = _Attention(q, k, v, attn_mask, is_causal, scale)

    def compute(g):
        found = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
        a.backward(g, *found)
        return found

    return a.out, *together(3, compute)


@kernel(ops.packed_attention, "numpy")
def _packed_attention(qkv, num_heads, attn_mask=None, is_causal=True):
    """The three gradients are written straight into one array of qkv's shape; slices would each be added to zeros."""
    B, T, d3 = qkv.shape
    heads = qkv.reshape(B, T, 3, num_heads, d3 // 3 // num_heads).transpose(2, 0, 3, 1, 4)  # [3, B, H, T, D]
    a = _Attention(heads[0], heads[1], heads[2], attn_mask, is_causal, None)

    def dqkv(g):
        d = np.zeros(qkv.shape, qkv.dtype)
        parts = d.reshape(B, T, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
        a.backward(g.reshape(B, T, num_heads, -1).transpose(0, 2, 1, 3), parts[0], parts[1], parts[2])
        return d

    return a.out.transpose(0, 2, 1, 3).reshape(B, T, d3 // 3), dqkv


@kernel(ops.rotary_attention, "numpy")
def _rotary_attention(q, k, v, cos, sin, attn_mask=None, cache=None):
    """Queries, keys and their gradients keep the order of the projections in memory, so that heads merge without a copy."""
    check.rotary(q, k, v, cos, sin)
    D = 2 * cos.shape[-1]
    if q.shape[1] == 1 and cache is not None and not is_grad_enabled():
        if attn_mask is None or (attn_mask.ndim == 4 and attn_mask.shape[1] == 1):
            return _next_token(q, k, v, cos, sin, attn_mask, cache), None
    Q, K, V = (ops._heads(a, D) for a in (q, k, v))
    (Q, rotate), (K, _) = _rope(Q, cos, sin), _rope(K, cos, sin)
    K, V = (K, V) if cache is None else ops._remembered(cache, K, V)
    a = _Attention(Q, K, V, attn_mask, True, None)

    def compute(g):
        found = np.empty_like(Q), np.zeros_like(K), np.zeros_like(V)
        a.backward(ops._heads(g, D), *found)
        dq, dk, dv = found
        mine = (rotate(dq),) if cache is not None else (rotate(dq), rotate(dk), dv)
        return [ops._merged(d) for d in mine]

    return ops._merged(a.out), *together(1 if cache is not None else 3, compute)


def _next_token(q: Array, k: Array, v: Array, cos: Array, sin: Array, mask: Array | None, cache: Any) -> Array:
    """`rotary_attention` [B, 1, H D] of one new position, which sees all keys, in few calls: they are what costs here."""
    B, D = q.shape[0], 2 * cos.shape[-1]
    H, kv = q.shape[2] // D, k.shape[2] // D
    x = np.concatenate([q, k], -1).reshape(B, H + kv, D)
    swapped = np.concatenate([x[..., D // 2 :], x[..., : D // 2]], -1)
    x = x * np.concatenate([cos, cos], -1) + swapped * np.concatenate([-sin, sin], -1)
    K, V = ops._remembered(cache, x[:, H:, None], v.reshape(B, kv, 1, D))
    scores = np.matmul((x[:, :H] / math.sqrt(D)).reshape(B, kv, H // kv, D), K.swapaxes(-1, -2))
    return np.matmul(ops._masked_softmax(scores, mask, False), V).reshape(B, 1, H * D)


# ------------------------------------------------------------------------------------------------------------ losses


def _nll(logits: Array, targets: Array, counts: Array, smoothing: float, e: Array | None) -> tuple[Array, Array]:
    """(Σ over counted rows of logsumexp(logits) - Σ_v q_v logits_v, Σ_v e_v [N, 1]), in row blocks.

    logits are [N, V], targets and counts (0 or 1) [N]; q = (1 - smoothing) onehot(target) + smoothing / V. `e` [N, V]
    takes exp(logits - max logits), and may be `logits` itself; None: nobody wants it.
    """
    (rows, classes), ones = logits.shape, np.ones((logits.shape[1], 1), logits.dtype)
    top, total, picked = (np.empty((rows, 1), logits.dtype) for _ in range(3))

    def block(s):
        x = logits[s]
        picked[s, 0] = x[np.arange(x.shape[0]), targets[s]]
        if smoothing:
            picked[s] = (1 - smoothing) * picked[s] + smoothing / classes * np.einsum("nv->n", x)[:, None]
        top[s] = x.max(axis=1, keepdims=True)
        exp = np.subtract(x, top[s], out=None if e is None else e[s])
        np.exp(exp, out=exp)
        total[s] = exp @ ones

    parallel_rows(np, block, rows, classes)
    losses = (np.log(total) + (top - picked))[:, 0]
    return np.where(counts, losses, 0).sum(), total  # what does not count may be infinite


def _nll_gradient(e: Array, targets: Array, counts: Array, smoothing: float, total: Array, g: Array) -> None:
    """e ← (e / total - q) * counts * g = (softmax(logits) - q) * counts * g, in row blocks, q as in `_nll`.

    Not exp(logits - (max logits + log total)): that sum would be rounded to the precision of the largest logit, and that absolute
    error in an exponent is a relative one in every probability.
    """
    rows, classes = e.shape
    weight = (counts * g).reshape(-1, 1).astype(e.dtype)  # [N, 1]
    scale = weight / total

    def block(s):
        o = e[s]
        o *= scale[s]
        if smoothing:
            o -= weight[s] * (smoothing / classes)
        o[np.arange(o.shape[0]), targets[s]] -= weight[s, 0] * (1 - smoothing)

    parallel_rows(np, block, rows, classes)


@kernel(ops.cross_entropy, "numpy")
def _cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0):
    """Keeps exponentials in place of the logits; in backward their memory becomes the gradient."""
    check.smoothing(label_smoothing)
    shape, classes = logits.shape, logits.shape[-1]
    check.targets("cross_entropy", targets, logits.shape[:-1], classes, ignore_index)
    flat, t = logits.reshape(-1, classes), targets.reshape(-1)
    counts = (t != ignore_index).astype(logits.dtype)
    t = np.where(t == ignore_index, 0, t)
    n = counts.sum()
    e = np.empty_like(flat) if is_grad_enabled() else None
    total, divisor = _nll(flat, t, counts, label_smoothing, e)
    loss = total / n if n else total * np.nan
    if e is not None and n < t.size:  # a product with 0 would keep a NaN
        e[counts == 0], divisor[counts == 0] = 0, 1

    def dlogits(g):
        _nll_gradient(e, t, counts, label_smoothing, divisor, g / n if n else g)
        return e.reshape(shape)

    return loss, dlogits


@kernel(ops.linear_cross_entropy, "numpy")
def _linear_cross_entropy(hidden, weight, targets, ignore_index=-100, label_smoothing=0.0):
    """Logits are computed only for the rows that count, and held once: their memory becomes exponentials, then the gradient.

    A 49k-word head so costs one array of [rows that count, V] instead of two of [all rows, V].
    """
    classes, width = weight.shape
    check.linear("linear_cross_entropy", hidden, weight)
    check.targets("linear_cross_entropy", targets, hidden.shape[:-1], classes, ignore_index)
    check.smoothing(label_smoothing)
    flat, t = hidden.reshape(-1, width), targets.reshape(-1)
    rows = np.nonzero(t != ignore_index)[0]
    everything = rows.size == t.size
    h, t = (flat, t) if everything else (flat[rows], t[rows])
    n = rows.size
    logits = backend.matmul(h, _widen(weight, h).T)  # [n, V]
    counts = np.ones(n, h.dtype)
    total, divisor = _nll(logits, t, counts, label_smoothing, logits)
    loss = total / n if n else total * np.nan
    memo = {"e": logits}
    del logits

    def dlogits(g):
        if "e" in memo:
            memo["dlogits"] = memo.pop("e")
            _nll_gradient(memo["dlogits"], t, counts, label_smoothing, divisor, g / n if n else g)
        return memo["dlogits"]

    def dhidden(g):
        d = (np.empty if everything else np.zeros)(hidden.shape, h.dtype)
        if everything:
            backend.matmul(dlogits(g), _widen(weight, h), out=d.reshape(-1, width))
        else:
            d.reshape(-1, width)[rows] = backend.matmul(dlogits(g), _widen(weight, h))
        return d

    return loss, dhidden, lambda g: backend.matmul(dlogits(g).T, h)
