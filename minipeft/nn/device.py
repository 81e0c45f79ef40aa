"""What a model computes on a device beside its ops, one launch each: the angles of positions, and the next token."""

from __future__ import annotations

import numpy as np

from ..autograd.cuda import cupy, elementwise, made
from ..backend import Array

_PICK = r"""
#define EACH(i) for (long long i = threadIdx.x; i < V; i += blockDim.x)
__device__ double* shared() {
    __shared__ double seen[1025];
    return seen;
}
template <class N, class F> __device__ N reduce(N v, F f) {  // f over the block, in a fixed order; each thread gets it
    N* seen = (N*)shared();
    __syncthreads();
    seen[threadIdx.x] = v;
    for (int half = blockDim.x / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) seen[threadIdx.x] = f(seen[threadIdx.x], seen[threadIdx.x + half]);
    }
    __syncthreads();
    return seen[0];
}
template <class N> __device__ N sum(N v) { return reduce(v, [](N a, N b) { return a + b; }); }
template <class N> __device__ N before(N v, N& all) {  // the sum over the threads before this one; `all`: over the block
    N* seen = (N*)shared();
    __syncthreads();
    seen[threadIdx.x + 1] = v;
    __syncthreads();
    if (threadIdx.x == 0) {
        seen[0] = 0;
        for (int i = 1; i <= blockDim.x; ++i) seen[i] += seen[i - 1];
    }
    __syncthreads();
    all = seen[blockDim.x];
    return seen[threadIdx.x];
}
__device__ Key key(T x) {  // an integer, ordered as the numbers are
    union { T number; Key bits; } u = {x == 0 ? T(0) : x};
    const Key sign = (Key)1 << (8 * sizeof(Key) - 1);
    return u.bits & sign ? ~u.bits : u.bits | sign;
}
extern "C" __global__ void pick(const T* logits, const double* uniform, double* mass, long long* token, const long long V,
                                         const double temperature, const long long k, const double p) {
    logits += blockIdx.x * V, mass += blockIdx.x * V, token += blockIdx.x;
    int wrong = 0;
    long long first = V;
    EACH(i) {
        wrong |= isnan(logits[i]);
        if (first == V || logits[i] > logits[first]) first = i;
    }
    const T top = reduce(first < V ? logits[first] : logits[0], [](T a, T b) { return a > b ? a : b; });
    first = reduce(first < V && logits[first] == top ? first : V, [](long long a, long long b) { return a < b ? a : b; });
    wrong = sum(wrong | isinf(top));
    if (threadIdx.x == 0) *token = wrong ? -1 : first;
    if (wrong || temperature == 0) return;
    Key least = 0;  // the key of the k-th largest logit, one bit after the other
    for (Key bit = (Key)1 << (8 * sizeof(Key) - 1); bit && k < V; bit >>= 1) {
        long long n = 0;
        EACH(i) n += key(logits[i]) >= (least | bit);
        if (sum(n) >= k) least |= bit;
    }
    double all = 0, above = 0, one = 0;
    EACH(i) all += mass[i] = key(logits[i]) >= least ? exp(logits[i] / temperature - top / temperature) : 0;
    all = sum(all);
    double ties = V;  // how many tokens with the key `least`, those with the lowest ids, may be drawn
    if (p < 1) {
        least = 0;  // the largest key such that it and those above have the mass p
        for (Key bit = (Key)1 << (8 * sizeof(Key) - 1); bit; bit >>= 1) {
            double m = 0;
            EACH(i) m += key(logits[i]) >= (least | bit) ? mass[i] : 0;
            if (sum(m) >= p * all) least |= bit;
        }
        EACH(i) {
            above += key(logits[i]) > least ? mass[i] : 0;
            one = key(logits[i]) == least ? mass[i] : one;
        }
        above = sum(above), one = reduce(one, [](double a, double b) { return a > b ? a : b; });
        ties = ceil((p * all - above) / one);
    }
    const long long each = (V + blockDim.x - 1) / blockDim.x, begin = threadIdx.x * each, end = begin + each < V ? begin + each : V;
    long long n = 0, unused;
    for (long long i = begin; i < end; ++i) n += key(logits[i]) == least;
    n = before(n, unused);
    double own = 0;
    for (long long i = begin; i < end; ++i) {
        if (key(logits[i]) < least || (key(logits[i]) == least && n++ >= ties)) mass[i] = 0;
        own += mass[i];
    }
    double start = before(own, all);
    const double drawn = uniform[blockIdx.x] * all;  // the first token at which the sum of the masses is above it
    if (own > 0 && start <= drawn && drawn < start + own) {
        for (long long i = begin; i < end && start <= drawn; ++i) {
            if (mass[i] > 0) *token = i;
            start += mass[i];
        }
    }
}
"""


_angles = elementwise(
    "int64 position, float64 frequency", "T cosine, T sine",
    "double angle = position * frequency; cosine = cos(angle), sine = sin(angle)", "angles",
)  # fmt: skip


def rotation(positions: Array, frequency: np.ndarray, dtype: np.dtype) -> tuple[Array, Array]:
    """cos and sin of position * frequency: positions [B, T], frequency [D/2] on the host -> [B, T, D/2] each."""
    xp, shape = cupy(), (*positions.shape, len(frequency))
    return _angles(positions[..., None], xp.asarray(frequency), xp.empty(shape, dtype), xp.empty(shape, dtype))


def pick(logits: Array, temperature: float, top_k: int | None, top_p: float | None, uniform: Array | None) -> Array:
    """The next token of each row, int64 [B], or -1 where a logit is NaN: logits [B, V], uniform numbers float64 [B].

    As `nn.generation` has it on the host: `token_probabilities`, up to rounding, then the token at which their sum passes
    the uniform number. temperature 0 takes the most probable token, and no numbers. One launch.
    """
    xp, (B, V) = cupy(), logits.shape
    logits = xp.ascontiguousarray(logits, dtype=None if logits.dtype == np.float64 else np.float32)
    types = {"float32": ("float", "unsigned"), "float64": ("double", "unsigned long long")}[logits.dtype.name]
    code = "typedef {} T;\ntypedef {} Key;\n".format(*types) + _PICK
    token, mass = xp.empty(B, xp.int64), xp.empty(logits.shape if temperature else 0, xp.float64)
    uniform = logits if uniform is None else uniform  # not read
    arguments = logits, uniform, mass, token, np.int64(V), np.float64(temperature), np.int64(top_k or V), np.float64(top_p or 1)
    threads = min(1024, max(32, 1 << (V // 48).bit_length()))
    made("RawKernel", code, "pick", ("-std=c++17",))((B,), (threads,), arguments)
    return token
