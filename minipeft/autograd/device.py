"""The kernels of a device: forms of ops for CuPy's arrays, each of one launch or a few.

A GPU's time goes into launches and passes through memory. So an elementwise expression is one kernel; a row of a norm, of
attention's weights or of logits is the work of one block of threads; a product reads transposed factors where they lie;
and a gradient that such a kernel makes is added to the others by the kernel itself (`Sum`). Nothing here depends on the
order in which threads run, and nothing waits for the device. `cuda` says how kernels and products are asked for.

A form equals its definition, to rounding, where the arrays have one dtype, float32 or float64; weights may be stored in
float16. Elsewhere the definition computes. Departure: ids and targets are not read beforehand, which would be to wait;
one that is out of range gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import Array, Rng
from . import autocast, ops
from . import checks as check
from .cuda import FLOAT16, as_cublas_reads, contiguous, cupy, elementwise, made, product, rows
from .ops import _rows, _t, _widen
from .tensor import Term, Unsummed, kernel, together


def device(of: Callable, alike: int = 1) -> Callable[[Callable], Callable]:
    """Register a form of an op for CuPy, where its first `alike` arrays have one dtype, float32 or float64."""

    def register(form: Callable) -> Callable:
        def chosen(*arrays: Any, **options: Any) -> tuple:
            kinds = {getattr(a, "dtype", None) for a in arrays[:alike]}
            return (form if kinds in FLOATS else of.definition)(*arrays, **options)

        kernel(of, "cupy")(chosen)
        return form

    return register


FLOATS = ({np.dtype(np.float32)}, {np.dtype(np.float64)})


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


# -------------------------------------------------------------------------------------------------------- elementwise


def _pointwise(of: Callable, inputs: str, y: str, gradients: str, preamble: str = "") -> None:
    """Register CUDA for y and, given g = dL/dy, for the gradient d<x> of each input <x>; inputs broadcast."""
    names = inputs.split()
    typed, several = ", ".join(f"T {x}" for x in names), ", ".join(f"T d{x}" for x in names)
    value = elementwise(typed, "T y", f"{preamble} y = {y}", of.__name__)
    derived = elementwise(f"T g, {typed}", several, f"{preamble} {gradients}", f"{of.__name__}_gradient")

    @device(of, len(names))
    def _form(*xs):
        pullbacks = together(len(xs), lambda g: derived(g, *xs)) if len(xs) > 1 else [lambda g: derived(g, *xs)]
        return value(*xs), *pullbacks


_pointwise(ops.silu, "x", "x / (1 + exp(-x))", "T s = 1 / (1 + exp(-x)); dx = g * (s + x * s * (1 - s))")
_pointwise(
    ops.swiglu, "gate up", "gate / (1 + exp(-gate)) * up",
    "T s = 1 / (1 + exp(-gate)), y = gate * s; dgate = g * up * (s + y * (1 - s)); dup = g * y",
)  # fmt: skip
_pointwise(
    ops.gelu, "x", "x * (1 + t) / 2", "dx = g * (1 + t + x * (1 - t * t) * c * (1 + 3 * k * x * x)) / 2",
    preamble=f"T c = {math.sqrt(2 / math.pi)}, k = 0.044715, t = tanh(c * (x + k * x * x * x));",
)  # fmt: skip

_to_float16 = elementwise("float32 x", "float32 y", "y = float(float16(x))", "to_float16", FLOAT16)
_to_bfloat16 = elementwise(  # in integers: arithmetic would take subnormal numbers for zeros
    "uint32 x", "uint32 y", "y = (x & 0x7fffffffu) > 0x7f800000u ? x : (x + 0x7fffu + (x >> 16 & 1u)) & 0xffff0000u",
    "to_bfloat16",
)  # fmt: skip


@kernel(autocast.rounded, "cupy")
def _rounded(x, dtype):
    xp = cupy()
    return _to_float16(x) if dtype == "float16" else _to_bfloat16(x.view(xp.uint32)).view(xp.float32)


@device(ops.dropout)
def _dropout(x, p, rng):
    """No mask is kept: its numbers are drawn again for the gradient."""
    check.probability(p)
    if rng is None or p == 0 or not isinstance(rng, Rng):
        return ops.dropout.definition(x, p, rng)
    return rng.dropped(x, p), lambda g: rng.dropped(g, p)


_rotated = elementwise("T a, T b, T c, T s", "T x, T y", "x = a * c - b * s; y = b * c + a * s", "rope")


@device(ops.rope, 3)
def _rope(x, cos, sin):
    half = slice(None, x.shape[-1] // 2), slice(x.shape[-1] // 2, None)

    def rotate(x, first, second):  # to exchange the halves is to rotate the other way
        y = cupy().empty(x.shape, x.dtype)
        _rotated(x[..., first], x[..., second], cos[:, None], sin[:, None], y[..., first], y[..., second])
        return y

    return rotate(x, *half), lambda g: rotate(g, *half[::-1])


# ------------------------------------------------------------------------------------------------------ normalization


@device(ops.add, 2)
def _add(a, b, *, later=False):
    if later and a.shape == b.shape:
        return Unsummed(contiguous(a), contiguous(b)), lambda g: g, lambda g: g
    return ops.add.definition(a, b)


# y = (x - m) r w + b,  r = 1 / sqrt(mean((x - m)^2) + eps);  m = mean(x), or 0 without b;  first x = total = x + branch
normalize = rows(
    "normalize", """const T* x, const T* branch, T* total, const W* w, const W* b, double eps, long long d, T* y, T* mean,
    T* rstd""", """
    x += blockIdx.x * d, y += blockIdx.x * d;
    if (branch) {
        branch += blockIdx.x * d, total += blockIdx.x * d;
        EACH(j, d) total[j] = x[j] + branch[j];
        x = total;
    }
    T m = 0, v = 0;
    if (b) {
        EACH(j, d) m += x[j];
        m = sum(m) / d;
    }
    EACH(j, d) v += (x[j] - m) * (x[j] - m);
    T r = 1 / sqrt(sum(v) / d + T(eps));
    EACH(j, d) y[j] = (x[j] - m) * r * T(w[j]) + (b ? T(b[j]) : T(0));
    if (threadIdx.x == 0) mean[blockIdx.x] = m, rstd[blockIdx.x] = r;""",
)  # fmt: skip

# out = total + (h - mean(h) - n mean(h n)) r,  h = g w, n = (x - m) r;  without mean(h) where x was not centered
normalize_gradient = rows(
    "normalize_gradient", """const T* x, const W* w, const T* g, const T* mean, const T* rstd, bool centered, long long d,
    const T* total, T* out""", """
    x += blockIdx.x * d, g += blockIdx.x * d, out += blockIdx.x * d;
    if (total) total += blockIdx.x * d;
    T m = mean[blockIdx.x], r = rstd[blockIdx.x], h = 0, hn = 0;
    EACH(j, d) h += g[j] * T(w[j]), hn += g[j] * T(w[j]) * (x[j] - m) * r;
    h = centered ? sum(h) / d : T(0), hn = sum(hn) / d;
    EACH(j, d) out[j] = (total ? total[j] : T(0)) + (g[j] * T(w[j]) - h - (x[j] - m) * r * hn) * r;""",
)  # fmt: skip


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
    total = xp.empty(shape, dtype) if type(x) is Unsummed else None
    read = (contiguous(x), 0, 0) if total is None else (x.x, x.branch, total)
    normalize(y, kind, n, d, *read, weight, contiguous(bias) if centered else 0, float(eps), d, y, mean, rstd)
    if total is not None:
        x.give(total)
    x = _rows(read[0] if total is None else total)

    def dx(g):
        g = contiguous(g)

        def write(out, total):
            normalize_gradient(x, kind, n, d, x, weight, g, mean, rstd, centered, d, 0 if total is None else total, out)

        return Sum(x.dtype, write)

    def dweight(g):
        definition = "T g, T x, T mean, T rstd", "T dw", "g * (x - mean) * rstd", "a + b", "dw = a", "0", "norm_weight_gradient"
        return made("ReductionKernel", *definition)(_rows(g), x, mean, rstd, axis=0)

    return y, dx, dweight, lambda g: _rows(g).sum(axis=0)


# ----------------------------------------------------------------------------------------------------------- products


def products_sum(a: Array, b: Array, alpha: float = 1.0) -> Sum:
    """alpha a [n, k] @ b [k, m] as a gradient [..., m] that cuBLAS adds to the others."""

    def write(out: Array, total: Array | None) -> None:
        if total is not None and total is not out:
            out[...] = total
        product(a, b, alpha, _rows(out), 0.0 if total is None else 1.0)

    return Sum(a.dtype, write)


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

# Rows are [B, H, T]: row a [S], of one query and each key, becomes exp(scale a) / sum(exp(scale a)) over the keys that the
# query sees, and 0 elsewhere. The mask has strides of b, h, t and s, 0 where it is broadcast.
SOFTMAX = r"""
#define ROW double scale, const W *mask, long long mb, long long mh, long long mt, long long ms, bool causal, long long H, \
    long long queries, long long S
#define SOFTMAX(a) softmax_row(a, scale, mask, mb, mh, mt, ms, causal, H, queries, S)
__device__ T masked(T a, bool m) { return m ? a : -INFINITE; }
__device__ T masked(T a, float m) { return a + T(m); }
__device__ T masked(T a, double m) { return a + T(m); }
__device__ void softmax_row(T* a, ROW) {
    long long t = blockIdx.x % queries, h = blockIdx.x / queries % H, b = blockIdx.x / queries / H;
    long long seen = causal ? max(0LL, min(S, t + S - queries + 1)) : S;
    if (mask) mask += b * mb + h * mh + t * mt;
    T top = -INFINITE, total = 0;
    EACH(j, seen) {
        a[j] *= T(scale);
        if (mask) a[j] = masked(a[j], mask[j * ms]);
        top = max(top, a[j]);
    }
    top = largest(top);
    if (top == -INFINITE) top = 0;  // a query that sees nothing: exp(-inf - 0) = 0
    EACH(j, seen) total += a[j] = exp(a[j] - top);
    total = sum(total);
    EACH(j, S) a[j] = j < seen && total != 0 ? a[j] / total : T(0);
}
"""
softmax = rows("softmax", "T* a, ROW", "SOFTMAX(a + blockIdx.x * S);", SOFTMAX)

# p = softmax(scale a) and its gradient dp:  da = scale p (dp - sum(p dp)) takes the place of a, and p that of dp
softmax_gradient = rows(
    "softmax_gradient", "T* a, T* dp, ROW", """
    a += blockIdx.x * S, dp += blockIdx.x * S;
    SOFTMAX(a);
    T delta = 0;
    EACH(j, S) delta += a[j] * dp[j];
    delta = sum(delta);
    EACH(j, S) {
        T p = a[j];
        a[j] = T(scale) * p * (dp[j] - delta), dp[j] = p;
    }""", SOFTMAX,
)  # fmt: skip

# The attention of one query of a head: y = softmax(scale q kᵀ) v, a row of [B, H, D]; k and v [B, n, S, D] have these
# distances between rows and heads. Scores stay in the block's memory.
answer = rows(
    "answer", """const T* q, const T* k, long long row_k, long long head_k, const T* v, long long row_v, long long head_v,
    long long D, long long n, T* y, ROW""", """
    extern __shared__ T a[];
    long long head = blockIdx.x / H * n + blockIdx.x % H / (H / n), groups = blockDim.x / D, c = threadIdx.x % D;
    q += blockIdx.x * D, k += head * head_k, v += head * head_v;
    EACH(j, S) {
        T s = 0;
        for (long long i = 0; i < D; i++) s += q[i] * k[j * row_k + i];
        a[j] = s;
    }
    SOFTMAX(a);
    __syncthreads();
    T s = 0, *part = a + S;  // each group of D threads adds up some of the values
    for (long long j = threadIdx.x / D; j < S && threadIdx.x / D < groups; j += groups) s += a[j] * v[j * row_v + c];
    part[threadIdx.x] = s;
    __syncthreads();
    if (threadIdx.x >= D) return;
    for (long long g = 1; g < groups; g++) s += part[g * D + c];
    y[blockIdx.x * D + c] = s;""", SOFTMAX,
)  # fmt: skip
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
        softmax_gradient(q, kind, B * H * T, S, *ap, *row)
        dq = product(ap[0], k, out=None if dq is None else dq.reshape(q.shape))
        return dq.reshape(B, H, T, D), *product(_t(ap), qg, out=dkv)

    shared = (S + ANSWER) * q.itemsize
    if T == 1 and S and D <= ANSWER and shared <= SHARED:
        (k_rows, turned_k, *apart_k), (v_rows, turned_v, *apart_v) = map(as_cublas_reads, (k, v))
        if not (turned_k or turned_v):
            y = xp.empty((B, H, 1, D), q.dtype)
            given = q, k_rows, *apart_k, v_rows, *apart_v, D, n, y, *row
            answer(q, kind, B * H, 0, *given, threads=ANSWER, shared=shared)
            return y, gradients
    p = product(q, _t(k))
    softmax(q, kind, B * H * T, S, p, *row)
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


# Projections q, k and v [B, T, h D] <-> heads [B, h, room, D] from a first position on, of which q and k are rotated
rotate_heads = rows(
    "rotate_heads", """const T* q, const T* k, const T* v, T* out_q, T* out_k, T* out_v, const T* cosine, const T* sine,
    bool each, bool back, long long size, long long queries, long long H, long long n, long long half, long long room,
    long long first""", """
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x, heads = H + 2 * n;
    if (i >= size) return;
    long long c = i % half, h = i / half % heads, t = i / half / heads % queries, b = i / half / heads / queries;
    long long angle = ((each ? b : 0) * queries + t) * half + c, all = h < H ? H : n;
    T turn = h < H + n ? cosine[angle] : T(1), side = h < H + n ? sine[angle] : T(0);
    const T* in = h < H ? q : h < H + n ? k : v;
    T* out = h < H ? out_q : h < H + n ? out_k : out_v;
    if (h < H) room = queries, first = 0;
    h -= h < H ? 0 : h < H + n ? H : H + n;
    long long beside = ((b * queries + t) * all + h) * 2 * half + c, below = ((b * all + h) * room + first + t) * 2 * half + c;
    in += back ? below : beside, out += back ? beside : below;
    T x = in[0], y = in[half];
    if (back) side = -side;
    out[0] = x * turn - y * side, out[half] = y * turn + x * side;""",
)  # fmt: skip


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
        rotate_heads(cos, "?", -(-size // 256), 0, *given, threads=256)
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

_embedding_rows = elementwise(
    "raw W weight, I id, int64 rows, int64 d", "T y",
    "y = id < 0 || id >= rows ? T(nan(\"\")) : T(weight[id * d + i % d])", "embedding",
)  # fmt: skip

# out[id] += g[i] for all i with that id, in order; the block of the first of them adds them all
add_rows = rows(
    "add_rows", "const long long* ids, long long n, const T* g, long long d, long long rows, T* out", """
    long long i = blockIdx.x, id = ids[i];
    T before = 0;
    EACH(j, i) before += ids[j] == id;
    if (sum(before) > 0 || id < 0 || id >= rows) return;
    for (long long first = i; first < n; first += 32) {  // each warp looks at 32 ids at a time
        unsigned lane = threadIdx.x % 32, hits = first + lane < n && ids[first + lane] == id ? 1u << lane : 0;
        for (int k = 16; k; k /= 2) hits |= __shfl_xor_sync(~0u, hits, k);
        for (; hits; hits &= hits - 1) EACH(c, d) out[id * d + c] += g[(first + __ffs(hits) - 1) * d + c];
    }""",
)  # fmt: skip


@kernel(ops.embedding, "cupy")
def _embedding(ids, weight):
    check.ids(ids, weight.shape[0], values=False)
    xp, (n, d) = cupy(), weight.shape
    dtype = np.float32 if weight.dtype.itemsize == 2 else weight.dtype
    y = _embedding_rows(weight, ids[..., None], n, d, xp.empty((*ids.shape, d), dtype))

    def dw(g):
        flat, g = contiguous(ids.reshape(-1).astype(np.int64, copy=False)), contiguous(g)

        def write(out, total):
            if total is not out:
                out[...] = 0 if total is None else total
            add_rows(g, g.dtype, flat.size, d, flat, flat.size, g, d, n, out)

        return Sum(g.dtype, write)

    return y, None, dw


# -log softmax(x)_t of a row of logits, smoothed; 0 where t does not count, NaN where it is out of range
nll = rows(
    "nll", """const T* x, const long long* targets, long long ignored, double smoothing, long long d, T* top, T* total, T* loss,
    T* counts""", """
    x += blockIdx.x * d;
    T most = x[0], e = 0, mean = 0;
    EACH(j, d) most = max(most, x[j]);
    most = largest(most);
    EACH(j, d) e += exp(x[j] - most), mean += x[j];
    e = sum(e), mean = smoothing ? sum(mean) / d : T(0);
    if (threadIdx.x == 0) {
        long long t = targets[blockIdx.x];
        T picked = t < 0 || t >= d ? NOT_A_NUMBER : smoothing ? T(1 - smoothing) * x[t] + T(smoothing) * mean : x[t];
        top[blockIdx.x] = most, total[blockIdx.x] = e;
        loss[blockIdx.x] = t == ignored ? T(0) : log(e) + (most - picked), counts[blockIdx.x] = t != ignored;
    }""",
)  # fmt: skip

mean_loss = rows(
    "mean_loss", "const T* losses, const T* counts, long long n, T* loss, T* count", """
    T s = 0, c = 0;
    EACH(j, n) s += losses[j], c += counts[j];
    s = sum(s), c = sum(c);
    if (threadIdx.x == 0) loss[0] = s / c, count[0] = c;""",
)  # fmt: skip

# dx = (softmax(x) - q) g / n of the rows that count, q = (1 - smoothing) onehot(t) + smoothing / d; `out` may be x
nll_gradient = rows(
    "nll_gradient", """const T* x, const long long* targets, long long ignored, double smoothing, long long d, const T* top,
    const T* total, const T* g, const T* n, T* out""", """
    x += blockIdx.x * d, out += blockIdx.x * d;
    long long t = targets[blockIdx.x];
    T w = t < 0 || t >= d ? NOT_A_NUMBER : g[0] / n[0], shift = top[blockIdx.x];
    T scale = w / total[blockIdx.x], q = w * T(smoothing) / d, hit = w * T(1 - smoothing);
    EACH(j, d) out[j] = t == ignored ? T(0) : exp(x[j] - shift) * scale - q - (j == t ? hit : T(0));""",
)  # fmt: skip


def _nll(x: Array, targets: Array, ignored: int, smoothing: float) -> tuple[Array, Callable[[Array, Array], None]]:
    """(`cross_entropy` of logits [N, d], gradient(g, out)), where `out` may be the logits' memory."""
    xp, (n, d), t = cupy(), x.shape, contiguous(targets.reshape(-1).astype(np.int64, copy=False))
    (top, total, losses, counts), (loss, count) = xp.empty((4, n), x.dtype), xp.empty((2, 1), x.dtype)
    options = x, t, ignored, float(smoothing), d, top, total
    nll(x, x.dtype, n, d, *options, losses, counts)
    mean_loss(x, x.dtype, 1, n, losses, counts, n, loss, count)
    return loss[0], lambda g, out: nll_gradient(x, x.dtype, n, d, *options, g, count, out)


@device(ops.cross_entropy)
def _cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0):
    """The pullback is computed from the logits again: no second array of their size is kept."""
    check.smoothing(label_smoothing)
    check.targets("cross_entropy", targets, logits.shape[:-1], logits.shape[-1], ignore_index, values=False)
    loss, gradient = _nll(contiguous(_rows(logits)), targets, ignore_index, label_smoothing)
    shape, dtype = logits.shape, logits.dtype

    def dlogits(g):
        d = cupy().empty(shape, dtype)
        gradient(g, d)
        return d

    return loss, dlogits


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
    made_already: list[Array] = []

    def dlogits(g):
        if not made_already:
            gradient(g, logits)
            made_already.append(logits)
        return logits

    return loss, lambda g: products_sum(dlogits(g), _widen(weight, g)), lambda g: products_sum(dlogits(g).T, h)
