"""Every kernel of a device below its equation: CUDA for what the CPU's definitions say in NumPy. `cuda` makes them callable.

    elementwise   an expression for each element of arrays that broadcast
    rows          a block of threads for each `row`, which EACH, SUM and LARGEST share; T is float or double, W a weight's type
    updates       an expression for each element of many arrays

Nothing depends on the order in which threads run: each number has one writer, and sums are trees of one shape. CuPy compiles
with -ftz=true: float arithmetic takes subnormal numbers for zero. Where they count, integers or float64 compute.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from . import cuda
from .cuda import elementwise, pointwise

FLOAT16 = "#include <cupy/float16.cuh>\n"
ROWS = r"""
typedef long long int64;
typedef unsigned long long word;
#define INFINITE T(__int_as_float(0x7f800000))
#define NOT_A_NUMBER T(__int_as_float(0x7fffffff))
#define row ((int64)blockIdx.x)
#define EACH(j, n) for (int64 j = threadIdx.x; j < n; j += blockDim.x)  // 0 ... n - 1, among the threads of a block
#define SUM(j, n, f) sum(n, [&](int64 j) { return f; })
#define LARGEST(j, n, f) largest(n, [&](int64 j) { return f; })

template <class N, class F, class G> __device__ N fold(N v, int64 n, F f, G g) {  // g over all f(j), in one order, from v on
    __shared__ N warps[32];
    const N nothing = v;
    EACH(j, n) v = g(v, f(j));
    for (int k = 16; k; k /= 2) v = g(v, __shfl_xor_sync(~0u, v, k));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : nothing;
    for (int k = 16; k; k /= 2) v = g(v, __shfl_xor_sync(~0u, v, k));
    __syncthreads();
    return v;
}
template <class F> __device__ auto sum(int64 n, F f) {
    return fold(decltype(f(0) + 0)(0), n, f, [](auto a, auto b) { return a + b; });
}
template <class F> __device__ T largest(int64 n, F f) { return fold(-INFINITE, n, f, [](T a, T b) { return max(a, b); }); }
"""
rows = functools.partial(cuda.rows, FLOAT16, ROWS)

# ----------------------------------------------------------------------------------------------- activations, roundings

# silu: y = x s(x);  swiglu: y = gate s(gate) up;  s(x) = 1 / (1 + exp(-x)), s' = s (1 - s)
silu = pointwise("silu", "x", "x / (1 + exp(-x))", "T s = 1 / (1 + exp(-x)); dx = g * (s + x * s * (1 - s))")
swiglu = pointwise("swiglu", "gate up", "gate / (1 + exp(-gate)) * up",
                   "T s = 1 / (1 + exp(-gate)), y = gate * s; dgate = g * up * (s + y * (1 - s)); dup = g * y")

# y = x (1 + t) / 2,  t = tanh(c (x + k x^3))
gelu = pointwise("gelu", "x", "x * (1 + t) / 2", "dx = g * (1 + t + x * (1 - t * t) * c * (1 + 3 * k * x * x)) / 2",
                 f"T c = {math.sqrt(2 / math.pi)}, k = 0.044715, t = tanh(c * (x + k * x * x * x));")

# y = x rounded to 11 or to 8 significant bits, ties to even
to_float16 = elementwise("to_float16", "float32 x", "float32 y", "y = float(float16(x))", FLOAT16)
to_bfloat16 = elementwise("to_bfloat16", "uint32 x", "uint32 y",
                          "y = (x & 0x7fffffffu) > 0x7f800000u ? x : (x + 0x7fffu + (x >> 16 & 1u)) & 0xffff0000u")

# ------------------------------------------------------------------------------------------------------- normalization

# y = (x - m) r w + b,  r = 1 / sqrt(mean((x - m)^2) + eps):  x and y [n, d], w and b [d], m and r [n];  m = mean(x), or 0
# where there is no b.  With a branch [n, d], x is total = x + branch.
normalize = rows("normalize", """const T* x, const T* branch, T* total, const W* w, const W* b, double eps, int64 d,
    T* y, T* mean, T* rstd""", """
    x += row * d, y += row * d;
    if (branch) EACH(j, d) total[row * d + j] = x[j] + branch[row * d + j];
    if (branch) x = total + row * d;
    T m = b ? SUM(j, d, x[j]) / d : T(0), r = 1 / sqrt(SUM(j, d, (x[j] - m) * (x[j] - m)) / d + T(eps));
    EACH(j, d) y[j] = (x[j] - m) * r * T(w[j]) + (b ? T(b[j]) : T(0));
    if (threadIdx.x == 0) mean[row] = m, rstd[row] = r;""")

# dx = total + (h - mean(h) - n mean(h n)) r,  h = g w,  n = (x - m) r;  without mean(h) where x was not centered
normalize_gradient = rows("normalize_gradient", """const T* x, const W* w, const T* g, const T* mean, const T* rstd,
    bool centered, int64 d, const T* total, T* dx""", """
    x += row * d, g += row * d, dx += row * d;
    T m = mean[row], r = rstd[row], h = centered ? SUM(j, d, g[j] * T(w[j])) / d : T(0);
    T hn = SUM(j, d, g[j] * T(w[j]) * (x[j] - m) * r) / d;
    EACH(j, d) dx[j] = (total ? total[row * d + j] : T(0)) + (g[j] * T(w[j]) - h - (x[j] - m) * r * hn) * r;""")

# dw = sum(g n) over the rows: g and x [n, d], m and r [n, 1]
norm_weight_gradient = cuda.total("norm_weight_gradient", "T g, T x, T m, T r", "T dw", "g * (x - m) * r")

# ----------------------------------------------------------------------------------------------------------- attention

# x = a c - b s,  y = b c + a s: a pair turned by the angle of cosine c and sine s, which is a position times a frequency
rope = elementwise("rope", "T a, T b, T c, T s", "T x, T y", "x = a * c - b * s; y = b * c + a * s")
angles = elementwise("angles", "int64 position, float64 frequency", "T c, T s",
                     "double angle = position * frequency; c = cos(angle), s = sin(angle)")

# Projections q [B, T, H D], k and v [B, T, n D] <-> heads [B, H, T, D] and twice [B, n, room, D] from position `first` on, of
# which q and k are turned: (x cos - y sin, y cos + x sin), and back by the opposite angle. cosine and sine [1 or B, T, D/2];
# each thread moves a pair x and y, which are D/2 = half apart.
rotate_heads = rows("rotate_heads", """const T* q, const T* k, const T* v, T* out_q, T* out_k, T* out_v, const T* cosine,
    const T* sine, bool each, bool back, int64 size, int64 queries, int64 H, int64 n, int64 half, int64 room, int64 first""", """
    int64 i = row * blockDim.x + threadIdx.x, heads = H + 2 * n;
    if (i >= size) return;
    int64 c = i % half, h = i / half % heads, t = i / half / heads % queries, b = i / half / heads / queries;
    int64 angle = ((each ? b : 0) * queries + t) * half + c, all = h < H ? H : n;
    T turn = h < H + n ? cosine[angle] : T(1), side = h < H + n ? sine[angle] : T(0);
    const T* in = h < H ? q : h < H + n ? k : v;
    T* out = h < H ? out_q : h < H + n ? out_k : out_v;
    if (h < H) room = queries, first = 0;
    h -= h < H ? 0 : h < H + n ? H : H + n;
    int64 beside = ((b * queries + t) * all + h) * 2 * half + c, below = ((b * all + h) * room + first + t) * 2 * half + c;
    in += back ? below : beside, out += back ? beside : below;
    T x = in[0], y = in[half];
    if (back) side = -side;
    out[0] = x * turn - y * side, out[half] = y * turn + x * side;""")

# p = softmax(scale a + mask) in the place of a row a [S]: exp(a) / sum(exp(a)) over the keys that its query sees, 0 elsewhere.
# Rows are [B, H, T]. The mask has strides of b, h, t and s, 0 where it is broadcast; true in a boolean one is to be seen.
SOFTMAX = r"""
#define SEEN double scale, const W *mask, int64 mb, int64 mh, int64 mt, int64 ms, bool causal, int64 H, int64 queries, int64 S
#define SOFTMAX(a) softmax_row(a, scale, mask, mb, mh, mt, ms, causal, H, queries, S)
__device__ void softmax_row(T* a, SEEN) {
    int64 t = row % queries, h = row / queries % H, b = row / queries / H;
    int64 seen = causal ? max(0LL, min(S, t + S - queries + 1)) : S;
    if (mask) mask += b * mb + h * mh + t * mt;
    T top = LARGEST(j, seen, a[j] = !mask ? a[j] * T(scale) : sizeof(W) > 1 ? a[j] * T(scale) + T(mask[j * ms])
                                  : T(mask[j * ms]) ? a[j] * T(scale) : -INFINITE);
    if (top == -INFINITE) top = 0;  // a query that sees nothing: exp(-inf - 0) = 0
    T total = SUM(j, seen, a[j] = exp(a[j] - top));
    EACH(j, S) a[j] = j < seen && total != 0 ? a[j] / total : T(0);
}
"""
softmax = rows("softmax", "T* a, SEEN", "SOFTMAX(a + row * S);", SOFTMAX)

# da = scale p (dp - sum(p dp)), of p and its gradient dp, takes the place of a, and p that of dp
softmax_gradient = rows("softmax_gradient", "T* a, T* dp, SEEN", """
    a += row * S, dp += row * S;
    SOFTMAX(a);
    T delta = SUM(j, S, a[j] * dp[j]);
    EACH(j, S) {
        T p = a[j];
        a[j] = T(scale) * p * (dp[j] - delta), dp[j] = p;
    }""", SOFTMAX)

# y = softmax(scale q k^T + mask) v of one query a head: q and y [B, H, D], k and v [B, n, S, D] with these distances between
# rows and heads. Scores a [S] are kept in the block's memory, and so are the sums of groups of D threads over some keys.
answer = rows("answer", """const T* q, const T* k, int64 row_k, int64 head_k, const T* v, int64 row_v, int64 head_v, int64 D,
    int64 n, T* y, SEEN""", """
    extern __shared__ T a[];
    int64 head = row / H * n + row % H / (H / n), groups = blockDim.x / D, c = threadIdx.x % D;
    q += row * D, k += head * head_k, v += head * head_v;
    EACH(j, S) {
        T s = 0;
        for (int64 i = 0; i < D; i++) s += q[i] * k[j * row_k + i];
        a[j] = s;
    }
    SOFTMAX(a);
    __syncthreads();
    T s = 0, *part = a + S;
    for (int64 j = threadIdx.x / D; j < S && threadIdx.x / D < groups; j += groups) s += a[j] * v[j * row_v + c];
    part[threadIdx.x] = s;
    __syncthreads();
    if (threadIdx.x >= D) return;
    for (int64 g = 1; g < groups; g++) s += part[g * D + c];
    y[row * D + c] = s;""", SOFTMAX)

# ---------------------------------------------------------------------------------------------- embeddings and losses

# y = weight[id]: ids [n, 1], weight [rows, d], y [n, d];  NaN where the id is out of range
embedding = elementwise("embedding", "raw W weight, I id, int64 rows, int64 d", "T y",
                        'y = id < 0 || id >= rows ? T(nan("")) : T(weight[id * d + i % d])')

# out[id] += g[i] for each i with that id, in order: ids [n], g [n, d];  the block of the first of them adds them all
add_rows = rows("add_rows", "const int64* ids, int64 n, const T* g, int64 d, int64 rows, T* out", """
    int64 i = row, id = ids[i];
    if (SUM(j, i, ids[j] == id) > 0 || id < 0 || id >= rows) return;
    for (int64 first = i; first < n; first += 32) {  // each warp looks at 32 ids at a time
        unsigned lane = threadIdx.x % 32, hits = first + lane < n && ids[first + lane] == id ? 1u << lane : 0;
        for (int k = 16; k; k /= 2) hits |= __shfl_xor_sync(~0u, hits, k);
        for (; hits; hits &= hits - 1) EACH(c, d) out[id * d + c] += g[(first + __ffs(hits) - 1) * d + c];
    }""")


@functools.cache
def places(n: int) -> Callable:
    """place = (i0 n1 + i1) n2 + i2 ..., where [n0, n1, ...] has element (i0, i1, ...), of i0, n0, i1, ...; an i < 0 is i + n."""
    inputs = ", ".join(f"{chr(65 + a)} i{a}, int64 n{a}" for a in range(n))
    steps = (f"place = place * n{a} + ((long long)i{a} % n{a} + n{a}) % n{a};" for a in range(n))
    return elementwise("places", inputs, "int64 place", "place = 0;" + "".join(steps))


# out[place] += values[k] for each k with that place, in order: `order` sorts the places [n]; values [n, width].
# Thread (k, c) adds column c of them all, if the k-th in order is the first of its place.
sum_runs = elementwise("sum_runs", "raw int64 places, raw int64 order, raw V values, int64 n, int64 width", "raw T out", """
    long long k = i / width, c = i % width, place = places[order[k]];
    if (k == 0 || places[order[k - 1]] != place) {
        T total = out[place * width + c];
        for (; k < n && places[order[k]] == place; k++) total += T(values[order[k] * width + c]);
        out[place * width + c] = total;
    }""")

# loss = log(total) + top - (1 - smoothing) x[t] - smoothing mean(x),  top = max(x), total = sum(exp(x - top)):  x [n, d], the
# others [n];  0 where the target t does not count, NaN where it is out of range
nll = rows("nll", """const T* x, const int64* targets, int64 ignored, double smoothing, int64 d, T* top, T* total, T* loss,
    T* counts""", """
    x += row * d;
    T most = LARGEST(j, d, x[j]), e = SUM(j, d, T(exp(x[j] - most))), mean = smoothing ? SUM(j, d, x[j]) / d : T(0);
    if (threadIdx.x) return;
    int64 t = targets[row];
    T picked = t < 0 || t >= d ? NOT_A_NUMBER : smoothing ? T(1 - smoothing) * x[t] + T(smoothing) * mean : x[t];
    top[row] = most, total[row] = e;
    loss[row] = t == ignored ? T(0) : log(e) + (most - picked), counts[row] = t != ignored;""")

# loss = sum(losses) / count,  count = sum(counts):  losses and counts [n]
mean_loss = rows("mean_loss", "const T* losses, const T* counts, int64 n, T* loss, T* count", """
    T c = SUM(j, n, counts[j]), s = SUM(j, n, losses[j]);
    if (threadIdx.x == 0) loss[0] = s / c, count[0] = c;""")

# dx = (softmax(x) - q) g / n of the rows that count,  q = (1 - smoothing) onehot(t) + smoothing / d;  dx may be x
nll_gradient = rows("nll_gradient", """const T* x, const int64* targets, int64 ignored, double smoothing, int64 d,
    const T* top, const T* total, const T* g, const T* n, T* dx""", """
    x += row * d, dx += row * d;
    int64 t = targets[row];
    T w = t < 0 || t >= d ? NOT_A_NUMBER : g[0] / n[0], shift = top[row];
    T scale = w / total[row], q = w * T(smoothing) / d, hit = w * T(1 - smoothing);
    EACH(j, d) dx[j] = t == ignored ? T(0) : exp(x[j] - shift) * scale - q - (j == t ? hit : T(0));""")

# -------------------------------------------------------------------------------------------- random numbers, sampling

PHILOX = r"""
__device__ void philox(word k0, word k1, word x[4]) {  // ten rounds: the module `philox` has their equations
    for (int round = 0; round < 10; round++) {
        word h0 = __umul64hi(0xD2E7470EE14C6C93, x[0]), l0 = 0xD2E7470EE14C6C93 * x[0];
        word h1 = __umul64hi(0xCA5A826395121157, x[2]), l1 = 0xCA5A826395121157 * x[2];
        x[0] = h1 ^ x[1] ^ k0, x[1] = l1, x[2] = h0 ^ x[3] ^ k1, x[3] = l0;
        k0 += 0x9E3779B97F4A7C15, k1 += 0xBB67AE8584CAA73B;
    }
}
"""
# out = u, uniform in [0, 1), or with x dropout: 0 where u < p, scale x elsewhere.  x and out [n, size], eight numbers a thread
draw = rows("draw", """word k0, word k1, const int64* rows, const T* x, int64 first_row, int64 n, int64 size, int64 blocks,
    float p, T scale, T* out""", """
    int64 thread = row * blockDim.x + threadIdx.x, i = thread / blocks, b = thread % blocks;
    if (i >= n) return;
    int64 id = rows ? rows[2 * i] : first_row + i, start = 8 * b + (rows ? rows[2 * i + 1] : 0);
    word bits[4] = {word(b + 1), word(id), 0, 0};
    philox(k0, k1, bits);
    #pragma unroll
    for (int j = 0; j < 8; j++) {
        if (start + j >= size) return;
        float u = ((unsigned)(bits[j / 2] >> 32 * (j % 2)) >> 8) * 0x1p-24f;
        int64 at = i * size + start + j;
        out[at] = !x ? T(u) : u < p ? T(0) : x[at] * scale;
    }""", PHILOX)

# token = the first at which the sum of mass passes u times their total: x and mass [B, V], u and token [B].
# mass = exp((x - max(x)) / temperature) of the k largest x and their equals, and of these the fewest that have p of the total,
# the largest and of equal ones the first ids; 0 of others. Each bound is the largest integer c at which a sum over the row, of
# weights that depend on c, is still enough. It is found bit by bit.
SEARCH = r"""
__device__ word key(T x) {  // an integer, ordered as the numbers are
    union { T number; word bits; } u = {};
    u.bits = 0, u.number = x == 0 ? T(0) : x;
    const word sign = 1ull << (8 * sizeof(T) - 1);
    return u.bits & sign ? ~u.bits & (2 * sign - 1) : u.bits | sign;
}
template <class F> __device__ word search(word most, double enough, int64 V, F weight) {
    word c = 0;
    for (word bit = 1ull << 63; bit; bit /= 2) if (bit <= most && SUM(i, V, weight(i, c | bit)) >= enough) c |= bit;
    return c;
}
"""
pick = rows("pick", """const T* x, const double* u, double* mass, int64* token, int64 V, double temperature, int64 k,
    double p""", """
    x += row * V, mass += row * V, token += row;
    T top = LARGEST(i, V, x[i]);
    int64 first = fold(V, V, [&](int64 i) { return x[i] == top ? i : V; }, [](int64 a, int64 b) { return min(a, b); });
    bool bad = SUM(i, V, isnan(x[i])) || isinf(top);
    if (threadIdx.x == 0) *token = bad ? -1 : first;  // the most probable one, where temperature is 0
    if (bad || temperature == 0) return;
    word keys = ~0ull >> (64 - 8 * sizeof(T)), least = 0, cut = 0;
    if (k < V) least = search(keys, k, V, [&](int64 i, word c) { return key(x[i]) >= c; });
    double all = SUM(i, V, mass[i] = key(x[i]) >= least ? exp(x[i] / temperature - top / temperature) : 0);
    if (p < 1) {
        auto kept = [&](int64 i, word least, word cut) {  // all above `least`, and its equals but those of the last `cut` ids
            return key(x[i]) > least || (key(x[i]) == least && i + cut < V) ? mass[i] : 0;
        };
        all *= p, least = search(keys, all, V, [&](int64 i, word c) { return kept(i, c, 0); });
        if (SUM(i, V, key(x[i]) == least) > 1) cut = search(V, all, V, [&](int64 i, word c) { return kept(i, least, c); });
        all = SUM(i, V, mass[i] = kept(i, least, cut));
    }
    first = search(V - 1, -u[row] * all, V, [&](int64 i, word c) { return i < c ? -mass[i] : 0; });
    if (threadIdx.x == 0) *token = first;""", SEARCH)

# -------------------------------------------------------------------------------------------------- four and eight bits

# A product or a quotient of two floats, computed in float64 and rounded to a float, is the float that one rounding gives.
SUBNORMAL = """
__device__ double wide(float x) {
    const unsigned m = __float_as_uint(x) & 0x7fffffff;
    return m == 0 || m >= 0x00800000 ? (double)x : (__float_as_uint(x) >> 31 ? -1.0 : 1.0) * m * 1.401298464324817e-45;  // 2^-149
}
__device__ float narrow(double x) {
    if (!(fabs(x) < 1.1754943508222875e-38)) return (float)x;  // 2^-126
    return __uint_as_float((unsigned)rint(fabs(x) * 7.1362384635298e44) | (x < 0 ? 0x80000000u : 0));
}
__device__ float product(float a, float b) {
    const float p = a * b;
    return a == 0 || fabsf(p) >= 1.17549435e-38f ? p : narrow(wide(a) * wide(b));
}
"""

# absmax = max |x| of each block of x [size];  code = order[how many midpoints [15] are below x / absmax], two to a byte. A last
# block that is shorter divides, where others multiply by 1 / absmax.
quantize_4bit = elementwise("quantize_4bit", """raw T x, raw float32 midpoints, raw uint8 order, int64 size, int64 blocksize,
    uint8 zero, float32 smallest""", "raw float32 absmax, raw uint8 packed", """
    const long long first = i * blocksize, end = min(first + blocksize, size);
    const bool whole = end - first == blocksize;
    unsigned top = 0, byte = 0;  // magnitudes, as integers, are ordered as the floats are
    for (long long j = first; j < end; ++j) top = max(top, __float_as_uint((float)x[j]) & 0x7fffffff);
    const double c = wide(__uint_as_float(max(top, __float_as_uint(smallest)))), reciprocal = wide(narrow(1 / c));
    absmax[i] = whole ? __uint_as_float(top) : narrow(c);
    for (long long j = first; j < end; ++j) {
        const double scaled = wide(narrow(whole ? wide((float)x[j]) * reciprocal : wide((float)x[j]) / c));
        int rank = 0;
        for (int m = 0; m < 15; ++m) rank += scaled > midpoints[m];
        byte = j % 2 ? byte << 4 | order[rank] : order[rank];
        if (j % 2 || j + 1 == end) packed[j / 2] = j % 2 ? byte : byte << 4 | zero;
    }""", SUBNORMAL)

# out = code[bits] absmax: packed [(size + 1) // 2] -> out [size] in blocks of 2^shift;  an absmax of one byte is a code, too, of
# code2[absmax] absmax2 + offset
dequantize_4bit = elementwise("dequantize_4bit", """raw uint8 packed, raw float32 code, raw S absmax, raw float32 code2,
    raw float32 absmax2, int64 size, int32 shift, uint32 blocksize2, float32 offset""", "raw T out", """
    const unsigned block = 2 * i >> shift;
    float c = absmax[block];
    if (sizeof(S) == 1) c = narrow(wide(narrow(code2[(int)c] * wide(absmax2[block / blocksize2]))) + wide(offset));
    out[2 * i] = (T)product(code[packed[i] >> 4], c);
    if (2 * i + 1 < size) out[2 * i + 1] = (T)product(code[packed[i] & 15], c);""", SUBNORMAL)

# code = steps[round(32767.5 (x / c + 1))]: x [m, blocksize], of which each row has the largest magnitude c [m]
quantize_8bit = elementwise("quantize_8bit", "float32 x, raw float32 c, raw uint8 steps, int64 blocksize", "uint8 code", """
    const double top = wide(c[i / blocksize]), value = wide(x);
    if (top > 2.938735877055719e-39) {  // 2^-128
        const float scaled = fminf(fmaxf((float)(value * wide(narrow(1 / top))), -1), 1) + 1;
        code = steps[(int)((float)(scaled * 32767.5) + 0.5f)];  // a product in float64 is not fused with the sum
    } else code = value > 0 ? 255 : 0;""", SUBNORMAL)

# ----------------------------------------------------------------------------------------------- updates of many arrays

CHUNK = 1 << 14  # elements that a block of threads works on
TABLE = f"""
#define CHUNK {CHUNK}LL
#define FIND int a = find(table, arrays); int64 first = (row - table[a]) * CHUNK, size = min(table[arrays + a] - first, CHUNK);
#define COLUMN(c) ((T*)table[(2 + c) * arrays + a] + first)
__device__ int find(const int64* table, int arrays) {{  // the array this block works on: the last that begins here or before
    int a = 0, end = arrays;
    while (end - a > 1) (table[(a + end) / 2] <= row ? a : end) = (a + end) / 2;
    return a;
}}
"""
updates = functools.partial(cuda.updates, rows, TABLE)

# Adam: m and v are running means of d = g + decay p and of d^2;  `numbers` of `optim.Adam` has a step's bias corrections
adam = updates("adam", "p g m v", "keep decay beta1 rest1 beta2 rest2 rate eps", """
    p *= keep;
    const T d = g + decay * p;
    m = beta1 * m + rest1 * d;
    v = beta2 * v + rest2 * (d * d);
    p -= rate * (m / (sqrt(v) + eps));""")

# stochastic gradient descent, without and with momentum b
descend = updates("descend", "p g", "lr decay", "p -= lr * (g + decay * p);")
sgd = updates("sgd", "p g b", "lr decay kept rest ahead", """
    const T d = g + decay * p;
    b = kept * b + rest * d;
    p -= lr * (ahead != 0 ? d + ahead * b : b);""")

# g = factor g;  g = g limit / (norm + 1e-6) where that is less, norm^2 the first number looked at
scale = updates("scale", "g", "factor", "g *= factor;")
clip = updates("clip", "g", "limit", "const double reach = sqrt(looked[0]) + 1e-6; if (reach > limit) g *= T(limit / reach);")

# partial = sum(x^2) of each chunk, in float64
sum_of_squares = rows("sum_of_squares", "const int64* table, int arrays, double* partial", """
    FIND
    const T* x = COLUMN(0);
    double s = SUM(i, size, (double)x[i] * x[i]);
    if (threadIdx.x == 0) partial[row] = s;""", TABLE)
