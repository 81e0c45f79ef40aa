"""Kernels: faster forms of definitions in `ops`, in cache-sized blocks, on several threads, or in less memory.

Each takes its definition's arguments, checks them as it does, and equals it in value and gradients to rounding:
tests/test_kernels.py compares them. They work on arrays of every library; on a device a "block" is the whole.

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
from ..backend import SPLIT, Array, elementwise, get_num_threads, one_blas_thread, parallel_rows, split_rows, xp_of
from . import checks as check
from . import ops
from .ops import _rows, _widen
from .tensor import kernel, together

# ------------------------------------------------------------------------------------------------------ elementwise


@kernel(ops.add, "numpy")
def _add(a, b):
    return _large("add", a, b), lambda g: g, lambda g: g


@kernel(ops.mul, "numpy")
def _mul(a, b):
    return _large("multiply", a, b), lambda g: g * b, lambda g: g * a


def _large(name: str, a: Array, b: Array) -> Array:
    """fn(a, b), on several threads where both are large: fewer elements are done before another thread is awake."""
    fn, arrays = getattr(xp_of(a, b), name), type(a) is type(b) is np.ndarray
    if arrays and a.shape == b.shape and a.size >= 4 * SPLIT and a.dtype.kind == b.dtype.kind == "f":
        return elementwise(lambda out, x, y: fn(x, y, out=out), a, b)
    return fn(a, b)


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


@kernel(ops.silu, "numpy")
def _silu(x):
    def dx_into(out, g, x):
        _silu_and_slope_into(xp_of(x).empty_like(x), out, x)
        out *= g

    return elementwise(_silu_into, x), lambda g: elementwise(dx_into, g, x)


@kernel(ops.swiglu, "numpy")
def _swiglu(gate, up):
    """Keeps its two inputs, where `silu` and `mul` would keep three arrays. One exponential serves both gradients."""

    def into(out, gate, up):
        _silu_into(out, gate)
        out *= up

    def both_into(dgate, dup, g, gate, up):
        _silu_and_slope_into(dup, dgate, gate)
        dup *= g
        dgate *= g
        dgate *= up

    return elementwise(into, gate, up), *together(2, lambda g: elementwise(both_into, g, gate, up, outputs=2))


_C = math.sqrt(2 / math.pi)


@kernel(ops.gelu, "numpy")
def _gelu(x):
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


# -------------------------------------------------------------------------------------------------- matrix products


@kernel(ops.matmul, "numpy")
def _matmul(a, b):
    """Products with a matrix are one product of all rows; products of a batch run in this thread."""
    xp = xp_of(a, b)
    check.matmul(a, b)

    def product(a, b):
        if b.ndim == 2 and a.ndim > 1:
            return backend.matmul(_rows(a), b).reshape(*a.shape[:-1], b.shape[1])
        with one_blas_thread():
            return xp.matmul(a, b)

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

    return y, dx, dw, lambda g: _rows(g).sum(axis=0) if vector else g


# ---------------------------------------------------------------------------------------------------- normalization


@kernel(ops.layer_norm, "numpy")
def _layer_norm(x, weight, bias, eps=1e-5):
    return _norm("layer_norm", x, eps, weight, bias)


@kernel(ops.rms_norm, "numpy")
def _rms_norm(x, weight, eps=1e-6):
    return _norm("rms_norm", x, eps, weight, None)[:3]


def _norm(name: str, x: Array, eps: float, weight: Array, bias: Array | None) -> tuple:
    """Both norms: layer norm subtracts means (of x, and of h in dx) and adds a bias, RMS norm does neither."""
    xp, shape, d, centered = xp_of(x, weight, bias), x.shape, x.shape[-1], bias is not None
    check.norm(name, x, weight=weight, **({"bias": bias} if centered else {}))
    weight, bias = _widen(weight, x), _widen(bias, x) if centered else None
    x2 = x.reshape(-1, d)
    normed, y, rstd = xp.empty_like(x2), xp.empty_like(x2), xp.empty((x2.shape[0], 1), x.dtype)

    def forward(s):
        xs, n, r = x2[s], normed[s], rstd[s]
        if centered:
            xs = xp.subtract(xs, _row_means(xs), out=n)
        r[...] = 1 / xp.sqrt(_row_means(xs, xs) + eps)
        xp.multiply(xs, r, out=n)
        xp.multiply(n, weight, out=y[s])
        if centered:
            y[s] += bias

    parallel_rows(xp, forward, x2.shape[0], d)

    def dx(g):
        out, g2 = xp.empty(shape, g.dtype), g.reshape(-1, d)
        out2 = out.reshape(-1, d)

        def block(s):
            h, n, o = g2[s] * weight, normed[s], out2[s]
            xp.multiply(n, _row_means(h, n), out=o)
            if centered:
                h -= _row_means(h)
            xp.subtract(h, o, out=o)
            o *= rstd[s]

        parallel_rows(xp, block, g2.shape[0], d)
        return out

    def dweight(g):  # without a full-size product
        return xp.einsum("nd,nd->d", g.reshape(-1, d), normed)

    return y.reshape(shape), dx, dweight, lambda g: g.reshape(-1, d).sum(axis=0)


def _row_means(a: Array, b: Array | None = None) -> Array:
    """Mean over the last axis of a [N, d], or of a * b: [N, 1]. einsum takes a third of the time of `mean`."""
    xp = xp_of(a)
    total = xp.einsum("nd->n", a) if b is None else xp.einsum("nd,nd->n", a, b)
    return total[:, None] / a.shape[1]


# -------------------------------------------------------------------------------------------------------- attention


@kernel(ops.rope, "numpy")
def _rope(x, cos, sin):
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

    return rotate(x, sin), lambda g: rotate(g, -sin)


QUERY_BLOCK = 64  # queries that are answered together; keys that causality hides from all of them are never touched
TILE = 1 << 19  # scores computed together, at most: several heads and batch rows in one call of each NumPy function


class _Attention:
    """Softmax attention over tiles of (a few batch rows) x (a block of queries); see `scaled_dot_product_attention`.

    A tile keeps its unnormalized weights E = exp(S - max S) and the reciprocal row sums 1/l. With dO' = dO / l:
        O = (E V) / l        dV = Eᵀ dO'       dS = E * (dO' Vᵀ - rowsum(dO' * O))       dQ = dS K       dK = dSᵀ Q
    which needs no normalized copy of the weights.

    Arrays: q and dq [B, H, T, D]; k and dk [B, kv, S, D]; v and dv [B, kv, S, Dv]; out and its gradient [B, H, T, Dv].
    In a tile of b rows and t queries, which together see n keys, the H/kv query heads of a key head stand one below the
    other: queries [b, kv, H/kv * t, D], weights E [b, kv, H/kv * t, n].
    """

    def __init__(self, q: Array, k: Array, v: Array, mask: Array | None, causal: bool, scale: float | None):
        check.attention(q, k, v, mask)
        self.xp, (B, H, T, D), (_, self.kv, S, Dv) = xp_of(q, k, v, mask), q.shape, v.shape
        self.q, self.k, self.v, self.causal, self.scale = q, k, v, causal, 1 / math.sqrt(D) if scale is None else scale
        self.out = self.xp.empty((B, T, H, Dv), q.dtype).transpose(0, 2, 1, 3)  # merging the heads is then a free view
        self.block = QUERY_BLOCK if causal else max(1, T)
        self.starts = list(range(0, T, self.block))[::-1]  # the last block, which sees every key, is done first
        tile = TILE // max(1, H * min(T, QUERY_BLOCK) * S)
        self.rows = max(1, min(tile, -(-B // get_num_threads()))) if self.xp is np else B
        self.saved: dict[tuple[int, int], tuple[Array, Array]] = {}  # (first row, first query) -> E, 1/l
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        self._tiles(lambda b, i: self._forward(b, i, mask))

    def _tiles(self, work: Callable[[slice, int], None]) -> None:
        """work(batch rows, first query) for every tile; the tiles of one batch row run in order, in one thread."""
        B, rows = self.q.shape[0], self.rows

        def run(s):
            for b in range(s.start, s.stop):
                for i in self.starts:
                    work(slice(b * rows, min((b + 1) * rows, B)), i)

        if self.xp is np:
            with one_blas_thread():
                split_rows(run, -(-B // rows), self.q.size * self.k.shape[2] // 8)  # a score is worth 5 to 10 elements
        else:
            run(slice(0, 1 if B else 0))

    def _ends(self, i: int) -> tuple[int, int]:
        """Of the tile whose first query is i: the query after its last one, and how many keys that last one may see."""
        T, S = self.q.shape[2], self.k.shape[2]
        j = min(i + self.block, T)
        return j, max(0, S - T + j) if self.causal else S

    def _queries(self, array: Array, b: slice, i: int) -> Array:
        """A tile's part of an array shaped like q or out: [b, kv, H/kv * t, D or Dv]."""
        part = array[b, :, i : i + self.block]
        return part.reshape(part.shape[0], self.kv, -1, part.shape[3])

    def _forward(self, b: slice, i: int, mask: Array | None) -> None:
        xp, (_, H, T, _), S, (j, n) = self.xp, self.q.shape, self.k.shape[2], self._ends(i)
        e = xp.matmul(self._queries(self.q, b, i) * self.scale, self.k[b, :, :n].swapaxes(-1, -2))
        rows = e.shape[0]
        scores = e.reshape(rows, H, j - i, n)  # the same memory, one head after the other
        if self.causal and n:
            first = max(0, S - T + i + 1)  # keys from here on are hidden from some query of the block
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
        """From the gradient g of `out`, write the three gradients into the given arrays (dk and dv hold zeros)."""
        xp, (_, H, _, D) = self.xp, self.q.shape

        def work(b, i):
            j, n = self._ends(i)
            e, inverse = self.saved.pop((b.start, i))
            qs = self._queries(self.q, b, i) * self.scale
            do = self._queries(g, b, i) * inverse
            delta = xp.einsum("bhtd,bhtd->bht", do, self._queries(self.out, b, i))[..., None]
            self._add_product(dv[b, :, :n], e, do, i)
            ds = xp.matmul(do, self.v[b, :, :n].swapaxes(-1, -2))
            ds -= delta
            ds *= e
            dqs = xp.matmul(ds, self.k[b, :, :n])
            dqs *= self.scale
            dq[b, :, i:j] = dqs.reshape(-1, H, j - i, D)
            self._add_product(dk[b, :, :n], ds, qs, i)

        self._tiles(work)

    def _add_product(self, total: Array, a: Array, b: Array, i: int) -> None:
        """total += aᵀ b, over the tiles of one batch row: the first of them writes."""
        if i == self.starts[0]:
            self.xp.matmul(a.swapaxes(-1, -2), b, out=total)
        else:
            total += self.xp.matmul(a.swapaxes(-1, -2), b)


@kernel(ops.scaled_dot_product_attention, "numpy")
def _attention(q, k, v, attn_mask=None, is_causal=False, scale=None):
    a = _Attention(q, k, v, attn_mask, is_causal, scale)

    def compute(g):
        found = a.xp.empty_like(q), a.xp.zeros_like(k), a.xp.zeros_like(v)
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
        d = a.xp.zeros(qkv.shape, qkv.dtype)
        parts = d.reshape(B, T, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
        a.backward(g.reshape(B, T, num_heads, -1).transpose(0, 2, 1, 3), parts[0], parts[1], parts[2])
        return d

    return a.out.transpose(0, 2, 1, 3).reshape(B, T, d3 // 3), dqkv


# ------------------------------------------------------------------------------------------------------------ losses


def _nll(logits: Array, targets: Array, counts: Array, smoothing: float) -> tuple[Array, tuple[Array, Array]]:
    """(Σ over counted rows of logsumexp(logits) - Σ_v q_v logits_v, what softmax divides by), in row blocks.

    logits are [N, V], targets and counts (0 or 1) [N]; q = (1 - smoothing) onehot(target) + smoothing / V.
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
        if smoothing:
            picked[s] += smoothing * (_row_means(x) - picked[s])

    parallel_rows(xp, block, rows, classes)
    return ((xp.log(total) + (top - picked))[:, 0] * counts).sum(), (top, total)


def _nll_gradient(
    logits: Array, targets: Array, counts: Array, smoothing: float, divisor: tuple[Array, Array], g: Array, out: Array
) -> None:
    """out [N, V] = (softmax(logits) - q) * counts * g, in row blocks, q as in `_nll`; `out` may be `logits` itself."""
    xp, (rows, classes) = xp_of(logits), logits.shape
    weight = (counts * g).reshape(-1, 1).astype(logits.dtype)  # [N, 1]
    top, scale = divisor[0], weight / divisor[1]

    def block(s):
        o = out[s]
        xp.subtract(logits[s], top[s], out=o)
        xp.exp(o, out=o)
        o *= scale[s]
        if smoothing:
            o -= weight[s] * (smoothing / classes)
        o[xp.arange(o.shape[0]), targets[s]] -= weight[s, 0] * (1 - smoothing)

    parallel_rows(xp, block, rows, classes)


@kernel(ops.cross_entropy, "numpy")
def _cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0):
    """The pullback is computed from the logits again: no second array of their size is kept."""
    check.smoothing(label_smoothing)
    xp, shape, classes = xp_of(logits, targets), logits.shape, logits.shape[-1]
    check.targets("cross_entropy", targets, logits.shape[:-1], classes, ignore_index)
    flat, t = logits.reshape(-1, classes), targets.reshape(-1)
    counts = (t != ignore_index).astype(logits.dtype)
    t = xp.where(t == ignore_index, 0, t)
    n = counts.sum()
    total, divisor = _nll(flat, t, counts, label_smoothing)
    loss = total / n if n.item() else total * xp.nan

    def dlogits(g):
        d = xp.empty(shape, flat.dtype)
        _nll_gradient(flat, t, counts, label_smoothing, divisor, g / n, d.reshape(-1, classes))
        return d

    return loss, dlogits


@kernel(ops.linear_cross_entropy, "numpy")
def _linear_cross_entropy(hidden, weight, targets, ignore_index=-100, label_smoothing=0.0):
    """Logits are computed only for the rows that count, and held once: in backward their memory becomes their gradient.

    A 49k-word head so costs one array of [rows that count, V] instead of two of [all rows, V].
    """
    xp, (classes, width) = xp_of(hidden, weight, targets), weight.shape
    check.linear("linear_cross_entropy", hidden, weight)
    check.targets("linear_cross_entropy", targets, hidden.shape[:-1], classes, ignore_index)
    check.smoothing(label_smoothing)
    flat, t = hidden.reshape(-1, width), targets.reshape(-1)
    rows = xp.nonzero(t != ignore_index)[0]
    everything = rows.size == t.size
    h, t = (flat, t) if everything else (flat[rows], t[rows])
    n = rows.size
    logits = backend.matmul(h, _widen(weight, h).T)  # [n, V]
    counts = xp.ones(n, h.dtype)
    total, divisor = _nll(logits, t, counts, label_smoothing)
    loss = total / n if n else total * xp.nan
    memo = {"logits": logits}
    del logits

    def dlogits(g):
        if "logits" in memo:
            logits = memo.pop("logits")
            _nll_gradient(logits, t, counts, label_smoothing, divisor, g / n if n else g, out=logits)
            memo["dlogits"] = logits
        return memo["dlogits"]

    def dhidden(g):
        d = (xp.empty if everything else xp.zeros)(hidden.shape, h.dtype)
        if everything:
            backend.matmul(dlogits(g), _widen(weight, h), out=d.reshape(-1, width))
        else:
            d.reshape(-1, width)[rows] = backend.matmul(dlogits(g), _widen(weight, h))
        return d

    return loss, dhidden, lambda g: backend.matmul(dlogits(g).T, h)
