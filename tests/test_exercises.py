"""Each checker takes two right answers and refuses three typical wrong ones; lessons and checkers name the same exercises."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from cli_helpers import output, refused

import minipeft as mp
from minipeft.cli import exercise as command
from minipeft.exercises import EXERCISES, check, judge
from minipeft.exercises.kinds import Code, Number, Word
from minipeft.quant.codebooks import nf4_code

F = mp.functional
LESSONS = {path.name[:2]: path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parent.parent / "lessons").glob("*.py"))}
TEXTS = {number: re.sub(r"^# ?", "", text, flags=re.M) for number, text in LESSONS.items()}
CHECKED = sorted({name[:2] for name in EXERCISES})


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ------------------------------------------------------------------------------------- right and wrong functions


def swish(slope):
    """A definition with this slope from x, sigmoid(x) and the cotangent."""
    return lambda x: (x * sigmoid(x), lambda g: slope(x, sigmoid(x), g))


def attention(scores, mask=True, axis=1, shift=True, late=False, top=1):
    seen = np.where(np.tril(np.ones(scores.shape, bool)), scores, -np.inf if mask else scores)
    seen = scores if late else seen
    weights = np.exp(seen - seen.max(axis=top, keepdims=True) * shift)
    weights /= weights.sum(axis=axis, keepdims=True)
    return np.tril(weights) if late else weights


def masked_after(scores):
    e = np.tril(np.exp(scores - scores.max(axis=1, keepdims=True)))
    return e / e.sum(axis=1, keepdims=True)


def attention_by_rows(scores):
    out = np.zeros_like(scores)
    for t, row in enumerate(scores):
        e = np.exp(row[: t + 1] - row[: t + 1].max())
        out[t, : t + 1] = e / e.sum()
    return out


def ties(tau, density, of_all=False, elect=True, count=int, of_zero=1):
    tau = np.asarray(tau, float)
    kept = np.zeros_like(tau)
    for row, out in zip(tau, kept):
        largest = np.argsort(-abs(row))[: count(density * len(row))]
        out[largest] = row[largest]
    total = kept.sum(axis=0)
    agree = np.sign(kept) == np.where(total == 0, of_zero, np.sign(total)) if elect else kept != 0
    return (kept * agree).sum(axis=0) / (len(tau) if of_all else np.maximum(agree.sum(axis=0), 1))


def side_by_side(A, B, s, w, on_B=False):
    scales = [x * y for x, y in zip(s, w)]
    if on_B:
        return np.concatenate(A), np.concatenate([b * x for b, x in zip(B, scales)], axis=1)
    return np.concatenate([a * x for a, x in zip(A, scales)]), np.concatenate(B, axis=1)


def scaled_in_place(A, B, s, w):
    for a, x, y in zip(A, s, w):
        a *= x * y
    return np.concatenate(A), np.concatenate(B, axis=1)


def in_place(ids, n):
    ids[:n] = -100
    return ids


def by_engine(G, A, B, alpha):
    A, B = mp.Tensor(A, requires_grad=True), mp.Tensor(B, requires_grad=True)
    ((B @ A) * (alpha / A.shape[0]) * G).sum().backward()
    return A.grad, B.grad


def bent(h, down, b_down, up, b_up, f=lambda z: np.maximum(z, 0)):
    return f(h @ down.T + b_down) @ up.T + b_up


def merged(W, b, down, b_down, up, b_up):
    return W + up @ (down @ W), b + up @ (down @ b + b_down) + b_up


def turned(W, A, B, alpha, axis=1):
    V = W + alpha / len(A) * B @ A
    return V / np.linalg.norm(V, axis=axis, keepdims=True)


def positions_by_rows(mask, p):
    ids = np.zeros_like(mask)
    for row, own in zip(ids, mask):
        row[own != 0] = p + np.arange(own.sum())
    return ids


def coded(w, points, blocksize, largest=lambda b: np.abs(b).max(), zero=1.0, scale=True):
    out = []
    for block in w.reshape(-1, blocksize):
        m = largest(block)
        q = [points[np.abs(x / (m or zero) - points).argmin()] for x in block]
        out.append(np.array(q) * (m if scale else 1))
    return np.reshape(out, w.shape)


def zeros_divided(w, points, blocksize):
    """Right but for a block of zeros, which becomes nan."""
    blocks = w.reshape(-1, blocksize)
    m = np.abs(blocks).max(axis=1, keepdims=True)
    return coded(w, points, blocksize) + 0 * (blocks / m).reshape(w.shape)


def quantiles(bits, p=0.9677083, low=1, normal=True):
    n = 2 ** (bits - 1)
    up = np.linspace(0.5, p, n + 1)[1:]
    down = np.linspace(0.5, p, n + 1 - low)
    points = np.concatenate([[-NormalDist().inv_cdf(q) for q in down], [NormalDist().inv_cdf(q) for q in up]])
    return points / (abs(points).max() if normal else 1)


def mask_by_loops(lengths):
    record = [i for i, n in enumerate(lengths) for _ in range(n)]
    return [[record[t] == record[s] and s <= t for s in range(len(record))] for t in range(len(record))]


def block_diagonal(lengths):
    record = np.repeat(np.arange(len(lengths)), lengths)
    return record[:, None] == record


def common_start(prompt, whole):
    n = 0
    while n < len(prompt) and prompt[n] == whole[n]:
        n += 1
    return n


def advantages(rewards, values, gamma, lam, discount=True, last=0.0, forward=False):
    n, A = len(rewards), 0.0
    after = [*values[1:], last]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    out = np.zeros(n)
    for t in range(n) if forward else reversed(range(n)):
        A = out[t] = delta[t] + (gamma if discount else 1) * lam * A
    return out


def advantages_by_sum(rewards, values, gamma, lam):
    delta = rewards + gamma * np.append(values[1:], 0) - values
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]


def clipped(ratio, A, eps):
    return -np.where(A > 0, np.minimum(ratio, 1 + eps), np.maximum(ratio, 1 - eps)) * A


def direct(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    return np.logaddexp(0, -beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))).mean()


def distinct(responses):
    seen, n = set(), 0
    for r in responses:
        for i in range(len(r) - 1):
            seen.add((r[i], r[i + 1]))
            n += 1
    return len(seen) / n if n else 0


def to_bfloat16(bits):
    return (bits & 0xFFFF0000).astype(np.uint32).view(np.float32)


def stochastic(x, generator, noise=1 << 16):
    return to_bfloat16(np.asarray(x, np.float32).view(np.uint32) + generator.integers(0, noise, x.shape, np.uint32))


def between(x, generator):
    """Down to the number towards zero, and up by one place with the probability of the rest."""
    low = to_bfloat16(x.view(np.uint32))
    high = (low.view(np.uint32) + np.uint32(1 << 16)).view(np.float32)
    return np.where(generator.random(x.shape) < np.abs((x - low) / (high - low)), high, low)


def kept(h, k, a, f, r, **changed):
    n = {"h": 16, "k": 4, "a": 4, "f": 8, "r": 14} | changed
    return n["h"] * h + n["k"] * k + n["a"] * a + n["f"] * f + 8 + n["r"] * r


def log_softmax(z):
    return z - np.logaddexp.reduce(z, axis=-1, keepdims=True)


def naive_log_softmax(z):
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def nesterov(w, gradients, lr, mu, ahead=True, old=False):
    b = np.zeros_like(w)
    for g in gradients:
        before, b = b, mu * b + g
        w = w - lr * (g + mu * (before if old else b) if ahead else b)
    return w


def nibbles(d, m, data):
    out = np.empty(32)
    for i, byte in enumerate(data.tolist()):
        out[i], out[i + 16] = d * (byte % 16) + m, d * (byte // 16) + m
    return out


def rows_in_order(w, heads):
    D = len(w) // heads
    return w[[h * D + i for h in range(heads) for i in [*range(0, D, 2), *range(1, D, 2)]]]


def clear(a, b, three=4.303, ten=2.262, ddof=1, root=np.sqrt):
    d = a - b
    return d.mean() + {3: three, 10: ten}[len(d)] * d.std(ddof=ddof) / root(len(d)) < 0


def unpaired(a, b):
    s = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))
    return (a - b).mean() + 2.5 * s < 0


def frontier(points):
    return [not any(q[0] <= p[0] and q[1] <= p[1] and (q[0] < p[0] or q[1] < p[1]) for q in points) for p in points]


ANSWERS = {  # name: right answers, wrong ones
    "00.1": ([np.exp(2.5), "12.18"], [2**2.5, 0.0821, 2.5]),
    "00.2": ([3.2 / np.log(2) / 4, "1.154"], [0.8, 4.617, 0.5545]),
    "00.3": (
        [log_softmax, lambda z: F.log_softmax(mp.Tensor(z))],
        [naive_log_softmax, lambda z: z - z.max(axis=-1, keepdims=True), lambda z: np.exp(log_softmax(z)), lambda z: z - np.logaddexp.reduce(z.ravel()), lambda z: naive_log_softmax(z - z.max())],
    ),
    "00.4": (
        [nesterov, lambda w, g, lr, mu: nesterov(np.array(w), np.array(g), lr, mu)],
        [lambda *a: nesterov(*a, ahead=False), lambda *a: nesterov(*a, old=True), lambda w, g, lr, mu: w - lr * g.sum(axis=0)],
    ),
    "01.1": (
        [
            swish(lambda x, s, g: g * (s + x * s * (1 - s))), F.silu, F.silu.definition,
            lambda x: (x / (1 + np.exp(-x)), lambda g: g * sigmoid(x) * (1 + x * sigmoid(-x))),
        ],
        [
            swish(lambda x, s, g: s + x * s * (1 - s)), swish(lambda x, s, g: g * s), swish(lambda x, s, g: g * s * (1 - s)),
            lambda x: x * sigmoid(x),
        ],
    ),
    "01.2": (
        [lambda g: np.cumsum(g[::-1])[::-1], lambda g: np.tril(np.ones((len(g), len(g)))).T @ g, lambda g: g.sum() - g.cumsum() + g],
        [np.cumsum, lambda g: np.cumsum(g[::-1]), lambda g: g, lambda g: g.sum() - g.cumsum()],
    ),
    "01.3": ([3.5, "3.52"], [4, 7.5, 0, 28]),
    "01.4": ([0.5, 1 / 2, "0.50"], [1 / 3, 2, -0.5]),
    "02.1": (
        [0.228, "22.8%", "22.8 %", (12 * 4 * 768 * 769) / 124_439_808],
        [0.4554, 0.31, 22.8, 1 / 3],
    ),
    "02.2": ([1, 1.0, "1.00"], [0.5, 4, 1.0737, 2]),
    "02.3": (
        [attention, attention_by_rows],
        [lambda s: attention(s, mask=False), lambda s: attention(s, axis=0), lambda s: attention(s, late=True), lambda s: attention(s, shift=False), lambda s: attention(s, top=None), masked_after],
    ),
    "03.1": ([1.614, "1.61", 12 * 134_515_008 / 1e9], [2.152, 0.538, 1.076, 1.5]),
    "03.2": (
        [lambda g, n: n @ g / n.sum(), lambda g, n: np.average(g, axis=0, weights=n), lambda g, n: sum(a * b for a, b in zip(g, n / n.sum()))],
        [lambda g, n: g.mean(axis=0), lambda g, n: n @ g, lambda g, n: g.sum(axis=0) / n.sum(), lambda g, n: n @ g / n.sum() / len(n)],
    ),
    "03.3": (
        [lambda ids, n: np.concatenate([np.full(n, -100), ids[n:]]), lambda ids, n: [-100] * n + list(ids[n:])],
        [in_place, lambda ids, n: np.append(ids[1:], -100), lambda ids, n: ids[n:], lambda ids, n: np.where(np.arange(len(ids)) <= n, -100, ids)],
    ),
    "03.4": ([np.log(2048), 7.62, "7.625"], [11, 3.31, 1 / 2048, -7.62]),
    "04.1": ([8_388_608, "8,388,608", 2.0**23], [4_194_304, 262_144, 16_777_216, 8_388_607]),
    "04.2": (
        [lambda x, W, A, B, a: x @ W.T + a / A.shape[0] * x @ A.T @ B.T, lambda x, W, A, B, a: x @ (W + a / B.shape[1] * B @ A).T],
        [
            lambda x, W, A, B, a: x @ W.T + x @ A.T @ B.T, lambda x, W, A, B, a: x @ W.T + a * x @ A.T @ B.T,
            lambda x, W, A, B, a: a / len(A) * x @ A.T @ B.T, lambda x, W, A, B, a: x @ W + x @ A @ B,
            lambda x, W, A, B, a: x @ W.T + a // len(A) * x @ A.T @ B.T,
        ],
    ),
    "04.3": (
        [lambda G, A, B, a: (a / len(A) * B.T @ G, a / len(A) * G @ A.T), by_engine],
        [
            lambda G, A, B, a: (B.T @ G, G @ A.T), lambda G, A, B, a: (a / len(A) * G @ A.T, a / len(A) * B.T @ G),
            lambda G, A, B, a: a / len(A) * B.T @ G, lambda G, A, B, a: (a / len(A) * B.T @ G.T, a / len(A) * G.T @ A.T),
            lambda G, A, B, a: (a // len(A) * B.T @ G, a // len(A) * G @ A.T),
        ],
    ),
    "04.4": ([16, "16", 16.0], [128, 2, 32]),
    "05.1": ([38, "38", 19_456 / 512], [76, 152, 8]),
    "05.2": (
        [lambda h, *rest: h + bent(h, *rest), lambda h, d, bd, u, bu: h + (h @ d.T + bd).clip(0) @ u.T + bu],
        [bent, lambda h, *rest: h + bent(h, *rest, f=lambda z: z), lambda h, d, bd, u, bu: h + np.maximum((h @ d.T + bd) @ u.T + bu, 0)],
    ),
    "05.3": (
        [merged, lambda W, b, d, bd, u, bu: ((np.eye(len(W)) + u @ d) @ W, (np.eye(len(W)) + u @ d) @ b + u @ bd + bu)],
        [
            lambda W, b, d, bd, u, bu: (u @ d @ W, u @ d @ b + u @ bd + bu), lambda W, b, d, bd, u, bu: (merged(W, b, d, bd, u, bu)[0], b),
            lambda W, b, d, bd, u, bu: (merged(W, b, d, bd, u, bu)[0], b + u @ bd + bu), lambda W, b, d, bd, u, bu: W + u @ d,
        ],
    ),
    "06.1": ([1_310_720, "1,310,720", 2 * 32 * 20 * 1024], [5_242_880, 655_360, 81_920]),
    "06.2": (
        [lambda m, p: p + m.cumsum(axis=1) - 1, positions_by_rows],
        [lambda m, p: p + np.arange(m.shape[1])[None], lambda m, p: m.cumsum(axis=1) - 1, lambda m, p: p + m.cumsum(axis=1)],
    ),
    "06.3": ([0.75, "75%", 60 / 80], [0.25, 2 / 3, 1, 4 / 3]),
    "07.1": ([4.25390625, "4.2539", 4 + 8 / 32 + 1 / 256], [5, 4.25, 4.127, 0.2539]),
    "07.2": (
        [coded, lambda w, points, n: coded(w, np.asarray(points), n, zero=7.0)],
        [
            lambda w, points, n: coded(w, points, w.size), lambda w, points, n: coded(w, points, n, largest=np.max),
            lambda w, points, n: coded(w, points, n, scale=False), zeros_divided,
        ],
    ),
    "07.3": (
        [quantiles, lambda bits: np.sort(quantiles(bits))[::-1]],
        [lambda bits: quantiles(bits, low=0), lambda bits: quantiles(bits, normal=False), lambda bits: np.linspace(-1, 1, 2**bits), lambda bits: nf4_code()],
    ),
    "08.1": (
        [mask_by_loops, lambda n: np.tril(block_diagonal(n)), lambda n: F.softmax.definition(np.where(np.tril(block_diagonal(n)), 0.0, -np.inf))[0] > 0],
        [block_diagonal, lambda n: np.tril(np.ones((sum(n), sum(n)), bool)), lambda n: np.tril(block_diagonal(n), -1), lambda n: np.triu(block_diagonal(n))],
    ),
    "08.2": ([1.4375, "1.44", 23 / 16], [2, 23, 23 / 3, 1]),
    "08.3": (
        [common_start, lambda p, w: next((i for i, (a, b) in enumerate(zip([*p, None], w)) if a != b))],
        [
            lambda p, w: len(p), lambda p, w: next(i for i, (a, b) in enumerate(zip(p, w)) if a != b), lambda p, w: len(set(p) & set(w)),
            lambda p, w: common_start(p, w) + 1, lambda p, w: next(i for i, token in enumerate(w) if token not in p),
            lambda p, w: (common_start(p, w), p.clear())[0],
        ],
    ),
    "09.1": ([8, "8", 72 / 9], [4, 36, 72, 9]),
    "09.2": (
        [lambda c, r: np.logaddexp(0, r - c).mean(), lambda c, r: mp.functional.softplus(mp.Tensor(r - c)).mean(), lambda c, r: np.mean(np.maximum(r - c, 0) + np.log1p(np.exp(-abs(r - c))))],
        [lambda c, r: np.logaddexp(0, c - r).mean(), lambda c, r: np.logaddexp(0, r - c).sum(), lambda c, r: -np.log(sigmoid(c - r)).mean(), lambda c, r: sigmoid(c - r).mean()],
    ),
    "09.3": ([0.6155, "61.6%", 0.75 * sigmoid(1) + 0.25 * sigmoid(-1)], [0.731, 0.548, 0.3845, 0.75]),
    "09.4": (
        [lambda p, o, n: (n * abs(p - o)).sum() / n.sum(), lambda p, o, n: np.abs(p - o) @ n / sum(n)],
        [lambda p, o, n: abs(p - o).mean(), lambda p, o, n: abs((n * (p - o)).sum()) / n.sum(), lambda p, o, n: (n * abs(p - o)).sum(), lambda p, o, n: np.sqrt((n * (p - o) ** 2).sum() / n.sum())],
    ),
    "10.1": ([[0.125, 0.25, 0.5], "0.125 0.25 0.5", np.array([1, 2, 4]) / 8], [[0.5, 0.5, 0.5], [0, 0, 0.5], [0.625, 0.75, 1], [0.5, 0.25, 0.125]]),
    "10.2": (
        [advantages, advantages_by_sum],
        [
            lambda r, v, g, lam: advantages(r, v, g, 1.0), lambda r, v, g, lam: advantages(r, v, g, lam, last=v[-1]),
            lambda r, v, g, lam: advantages(r, v, g, lam, forward=True), lambda r, v, g, lam: advantages(r, v, g, lam, discount=False),
            lambda r, v, g, lam: advantages(r, v, g, lam) + v,
        ],
    ),
    "10.3": (
        [clipped, lambda ratio, A, eps: np.maximum(-A * ratio, -A * ratio.clip(1 - eps, 1 + eps))],
        [
            lambda ratio, A, eps: -A * ratio.clip(1 - eps, 1 + eps), lambda ratio, A, eps: np.minimum(-A * ratio, -A * ratio.clip(1 - eps, 1 + eps)),
            lambda ratio, A, eps: -A * ratio, lambda ratio, A, eps: -clipped(ratio, A, eps), lambda ratio, A, eps: clipped(ratio, A, 0.2),
        ],
    ),
    "10.4": ([-1 / 3, "-0.333", -0.3334], [-0.25, 1 / 3, -0.5]),
    "10.5": ([0.16, "0.16", 0.8 - 0.8**2], [0.8, 0.2, -0.16]),
    "11.1": ([54.6, np.exp(4), "54.598"], [7.389, 2.718, 403.4, 20]),
    "11.2": (
        [distinct, lambda responses: mp.rlhf.distinct_n(responses)],
        [
            lambda responses: mp.rlhf.distinct_n(responses, 1), lambda responses: np.mean([distinct([r]) for r in responses]),
            lambda responses: distinct([[token for r in responses for token in r]]), lambda responses: len({p for r in responses for p in pairwise(r)}),
            lambda responses: len({p for r in responses for p in pairwise(r)}) / sum(len(r) - 1 for r in responses if r),
        ],
    ),
    "11.3": ([13.2, "13.2", 0.2 * 66], [1.6248, 330, 3.3, -13.2]),
    "12.1": ([4, "4", 4.0], [2, 8, 3]),
    "12.2": ([4, "4"], [5, 3, 13, 24]),
    "12.3": ([13, "13"], [14, 12, 4]),
    "12.4": (
        [kept, lambda h, k, a, f, r: 14 * h + 4 * k + 4 * a + 6 * f + 8 + 2 * (h + f) + 14 * r],
        [lambda *n: kept(*n, h=14, f=6, r=4), lambda *n: kept(*n, r=4), lambda *n: kept(*n, h=20, r=0), lambda *n: kept(*n) - 8],
    ),
    "13.1": ([6.5625, "6.5625", 6 + 8 / 16 + 16 / 256], [6.0625, 6.5, 6, 7]),
    "13.2": (
        [nibbles, lambda d, m, data: np.float64(d) * np.append(data & 15, data >> 4) + m],
        [
            lambda d, m, data: d * np.append(data >> 4, data & 15) + m, lambda d, m, data: d * np.stack([data & 15, data >> 4], 1).ravel() + m,
            lambda d, m, data: d * (np.append(data & 15, data >> 4) + m), lambda d, m, data: d * np.append(data & 15, data >> 4),
        ],
    ),
    "13.3": (
        [rows_in_order, lambda w, n: w.reshape(n, -1, 2, w.shape[1]).transpose(0, 2, 1, 3).reshape(w.shape)],
        [
            lambda w, n: w.reshape(n, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape), lambda w, n: np.concatenate([w[::2], w[1::2]]),
            lambda w, n: w, lambda w, n: rows_in_order(w, n)[::-1],
        ],
    ),
    "13.4": ([111.46, "111.5", (106_168_320 * 4.127 / 8 + 28_346_688 * 2) / 1e6], [168.2, 56.7, 106.3]),
    "14.1": ([0.0497, "0.0497", 4.3027 * 0.02 / np.sqrt(3)], [0.086, 0.0226, 0.01155, 0.03]),
    "14.2": ([1 / 16, "6.25%", 0.0625], [1 / 32, 0.25, 0.9375]),
    "14.3": (
        [clear, lambda a, b: -(a - b).mean() > mp.experiments.seeds.interval(a - b)[1]],
        [
            unpaired, lambda a, b: (a < b).all(), lambda a, b: a.mean() < b.mean(), lambda a, b: not clear(b, a),
            lambda a, b: clear(a, b, ddof=0), lambda a, b: clear(a, b, root=lambda n: 1), lambda a, b: clear(a, b, ten=4.303),
            lambda a, b: clear(a, b, 3, 3), lambda a, b: (a - b < -0.05).all(),
        ],
    ),
    "14.4": ([2.5, "2.5", 100 / 40], [2, 4, 100, 1.5]),
    "15.1": ([0.00399, "0.4%", 1 - 0.9999**40], [0.996, 1e-4, 0.985, 0.4]),
    "15.2": ([0.05, "0.05", 0.8 / 16], [0.2, 0.025, 0.4]),
    "15.3": (
        [lambda g, w, start, a: g + a * (w - start), lambda g, w, start, a: g + a * w - a * start],
        [lambda g, w, start, a: g + a * w, lambda g, w, start, a: g - a * (w - start), lambda g, w, start, a: g + a / 2 * (w - start), lambda g, w, start, a: a * (w - start)],
    ),
    "15.4": (
        [frontier, lambda p: [not ((p <= x).all(axis=1) & (p < x).any(axis=1)).any() for x in p]],
        [
            lambda p: [not (p < x).all(axis=1).any() for x in p], lambda p: [(p[:, 0] >= x[0]).all() for x in p],
            lambda p: [bool(((p < x).any(axis=1)).any()) for x in p], lambda p: [not any((q <= x).all() for q in p) for x in p],
        ],
    ),
    "16.1": ([17.47, "17.47", 2 * (6_738_415_616 + 100 * 19_988_480) / 1e9], [1347.7, 34.95, 4.0, 13.5]),
    "16.2": (["activations", " Activations "], ["weights", "states", "disk"]),
    "16.3": ([2 / 3, "66.7%", 4 / 6], [1 / 3, 1, 0.75, 0.003]),
    "16.4": (
        [lambda c, s, least: int(np.where(s >= least, c, np.inf).argmin()), lambda c, s, least: next(i for i in c.argsort() if s[i] >= least)],
        [lambda c, s, least: int(c.argmin()), lambda c, s, least: int(s.argmax()), lambda c, s, least: int(np.where(s > least, c, np.inf).argmin()), lambda c, s, least: int((c / s).argmin()), lambda c, s, least: list(c).index(min(c[s >= least]))],
    ),
    "17.1": (
        [stochastic, between],
        [
            lambda x, generator: x, lambda x, generator: to_bfloat16(x.view(np.uint32)), lambda x, generator: stochastic(x, generator, 1 << 15),
            lambda x, generator: stochastic(x, generator, 1 << 18), lambda x, generator: mp.autograd.autocast.rounded(x, "bfloat16"),
        ],
    ),
    "17.2": ([2.0**-14, "6.1e-5", 0.000061035], [2.0**-13, 2.0**-17, 0.02 / 512]),
    "17.3": ([22, "22", 22.0], [23, 21, 2.0**22, 16]),
    "17.4": (["float16", " Float16 "], ["bfloat16", "both", "neither"]),
    "18.1": ([16, "16", 2 * 8], [8, 32, 4]),
    "18.2": (
        [lambda W, A, B, m, a: turned(W, A, B, a) * m[:, None], lambda W, A, B, m, a: np.diag(m) @ turned(W, A, B, a)],
        [
            lambda W, A, B, m, a: turned(W, A, B, a), lambda W, A, B, m, a: turned(W, A, B, len(A)) * m[:, None],
            lambda W, A, B, m, a: turned(W, A, B, a, axis=0) * m[:, None], lambda W, A, B, m, a: W + a / len(A) * B @ A,
            lambda W, A, B, m, a: turned(W, A, B, a // len(A) * len(A)) * m[:, None],
        ],
    ),
    "18.3": (
        [lambda A, B, A0, B0: (np.vstack([A, A0]), np.hstack([B, -B0])), lambda A, B, A0, B0: (np.vstack([-A0, A]), np.hstack([B0, B]))],
        [
            lambda A, B, A0, B0: (np.vstack([A, A0]), np.hstack([B, B0])), lambda A, B, A0, B0: (A - A0, B - B0),
            lambda A, B, A0, B0: (A, B), lambda A, B, A0, B0: (np.vstack([A, -A0]), np.hstack([B, -B0])),
        ],
    ),
    "18.4": ([128, "128", 16 * 8], [2, 16, 1024]),
    "20.1": ([0.7112, np.e**2 / (3 + np.e**2), "0.711"], [1.847, 0.2888, 0.8808, 0.35466]),
    "20.2": ([0.5544, np.log(1 + np.exp(-0.3)), "0.554"], [0.3, 0.3711, 0.8544, 0.0486]),
    "20.3": (
        [direct, lambda w, l, rw, rl, b: -np.mean(np.log(sigmoid(b * (w - rw - l + rl)))) if max(abs(w)) < 1e3 else direct(w, l, rw, rl, b)],
        [
            lambda w, l, rw, rl, b: direct(w, l, 0, 0, b), lambda w, l, rw, rl, b: direct(l, w, rl, rw, b),
            lambda w, l, rw, rl, b: direct(w, l, rw, rl, 0.1), lambda w, l, rw, rl, b: np.log1p(np.exp(-b * (w - rw - l + rl))).mean(),
        ],
    ),
    "20.4": ([0.6, "0.6", 3 / 5], [0.4, -1 / 3, 1.2]),
    "19.1": (
        [ties, lambda tau, density: ties(tau.tolist(), density)],
        [
            lambda tau, density: tau.mean(axis=0), lambda tau, density: ties(tau, 1.0), lambda tau, density: ties(tau, density, of_all=True),
            lambda tau, density: ties(tau, density, elect=False), lambda tau, density: ties(tau, density, count=round),
            lambda tau, density: ties(tau, density, of_zero=-1), lambda tau, density: ties(tau, density, of_zero=0),
        ],
    ),
    "19.2": ([6, "6.0", 2 * 9**0.5], [3, 36, 40**0.5, 2 / 3]),
    "19.3": (
        [side_by_side, lambda A, B, s, w: side_by_side(A, B, s, w, on_B=True)],
        [
            lambda A, B, s, w: (sum(A), sum(B)), lambda A, B, s, w: (np.concatenate(A), np.concatenate(B, axis=1)),
            lambda A, B, s, w: side_by_side(A, B, s, [x * y for x, y in zip(s, w)]), lambda A, B, s, w: side_by_side(A, B, s, [1] * len(w)),
            scaled_in_place,
        ],
    ),
    "19.4": ([[0.1, 0], "10% 0", "0.1 0"], [[0.1, 0.1], [0, 0.1], [0, 0]]),
}  # fmt: skip
each = pytest.mark.parametrize("name", EXERCISES)


def test_every_checker_has_answers_here():
    assert ANSWERS.keys() == EXERCISES.keys()
    assert all(len(right) >= 2 and len(wrong) >= 3 for right, wrong in ANSWERS.values())


@each
def test_a_checker_accepts_what_is_right_and_rejects_what_is_wrong(name):
    exercise, (right, wrong) = EXERCISES[name], ANSWERS[name]
    assert [judge(name, answer) for answer in right] == [""] * len(right)
    for answer in wrong:
        complaint = judge(name, answer)
        assert complaint and "\n" not in complaint and gives_nothing_away(exercise, complaint), (answer, complaint)


def gives_nothing_away(exercise, complaint) -> bool:
    """Whether the answer does not stand in a complaint; of a function, whether a case is named."""
    if isinstance(exercise, Code):
        return re.match(r"case \d of \d, .*: (it|result \d) ", complaint) is not None
    if isinstance(exercise, Word):
        return not re.search(rf"\b{exercise.right()} (is|moves)", complaint)
    named = [float(word.replace(",", "")) for word in re.findall(r"-?\d[\d,]*(?:\.\d+)?", complaint)]
    return not any(np.isclose(x, right, 0.01, 0) for x in named for right in np.ravel(exercise.right()))


@pytest.mark.parametrize("name", [name for name, exercise in EXERCISES.items() if isinstance(exercise, Number)])
def test_a_typical_mistake_earns_its_own_hint(name):
    exercise = EXERCISES[name]
    right = exercise.right()
    slips = exercise.slips(right)
    assert slips
    for hint, value in slips.items():
        assert judge(name, value) == hint and gives_nothing_away(exercise, hint)


@pytest.mark.parametrize(("name", "answer", "complaint"), [
    ("12.2", 5, "that many sequences do not fit"),  # 26.26 GB of 24: not by a little
    ("17.2", 2.0**-12, "it is too large"),  # half of the place above the next power of two is 2^-13
])  # fmt: skip
def test_a_hint_says_no_more_than_what_is_so(name, answer, complaint):
    assert judge(name, answer) == complaint


@pytest.mark.parametrize("name", [name for name, exercise in EXERCISES.items() if isinstance(exercise, Number) and exercise.within >= 0.005])
def test_three_digits_of_a_number_will_do(name):
    assert judge(name, [f"{x:.3g}" for x in np.ravel(EXERCISES[name].right())]) == ""


# ---------------------------------------------------------------------------------------------------------- lessons


def section(text, title):
    return re.search(rf"^## {title}$(.*?)(?=^%% |\Z)", text, re.M | re.S)[1]


def test_lessons_name_no_other_exercise():
    assert [name for text in TEXTS.values() for name in re.findall(r"^\*\*(\d\d\.\d) ", text, re.M)] == [*EXERCISES]


@pytest.mark.parametrize("number", CHECKED)
def test_a_lesson_names_the_exercises_that_have_checkers(number):
    text = section(TEXTS[number], "Exercises")
    own = {name: e for name, e in EXERCISES.items() if name.startswith(number)}
    titles = {name: title.removesuffix(".") for name, title in re.findall(r"^\*\*(\d\d\.\d) (.*?)\*\*", text, re.M)}
    assert titles == {name: exercise.title for name, exercise in own.items()}
    assert 3 <= len(own) <= 5 and {Code, Number} <= {type(e) for e in own.values()}
    for name, exercise in own.items():
        question = re.search(rf"^\*\*{name} .*?\n\n", text, re.M | re.S)[0]
        assert not isinstance(exercise, Code) or f"`{exercise.signature}`" in question, "it says how the function is called"
    assert re.findall(r"<details><summary>Solution of (.*)</summary>", text) == [*own]


@pytest.mark.parametrize("number", CHECKED)
def test_the_solutions_of_a_lesson_are_right(number, capsys):
    space = {"np": np, "mp": mp, "F": F, "check": check}
    for block in re.findall(r"^```python\n(.*?)^```", section(TEXTS[number], "Exercises"), re.M | re.S):
        exec(block, space)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{name}: right" for name in EXERCISES if name.startswith(number)]


@pytest.mark.parametrize("number", CHECKED)
def test_a_lesson_has_a_quiz_of_five_before_its_exercises(number):
    text = TEXTS[number]
    assert re.findall(r"^## .*", text, re.M)[-2:] == ["## Quiz", "## Exercises"]
    found = re.findall(
        r"^\*\*(\d)\.\*\* [A-Z\"$][^<]*\n\n<details><summary>Answer</summary>\n\n[^<]+\n\n</details>$", section(text, "Quiz"), re.M
    )
    assert found == [*"12345"]


# ------------------------------------------------------------------------------------------------ check, and its messages


class AsPyTorchs:
    """Refuses to become an array, as PyTorch's tensors that require gradients do."""

    def __array__(self, *how, **options):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


def test_check_says_whether_an_answer_is_right(capsys):
    assert check("04.1", 8_388_608) and check("4.1", mp.Tensor(np.array(8_388_608.0)))
    assert not check("04.1", 4_194_304)
    assert capsys.readouterr().out.splitlines() == [
        "04.1: right", "4.1: right", "04.1: not yet; that is half of the right number: did you count A and B, of query and of value?"
    ]  # fmt: skip


@pytest.mark.parametrize(("answer", "complaint"), [
    (lambda x, W, A, B, alpha: x @ W.T, "case 1 of 4, r = 2, alpha = 2: it gives .* at \\[0, 0\\], where .* is right"),
    (lambda x, W, A, B, alpha: W, "case 1 of 4, .*: it has the shape \\(5, 6\\), where \\(3, 5\\) is right"),
    (lambda x, W, A, B, alpha: None, "case 1 of 4, .*: it gives None, where numbers are asked for"),
    (lambda x: x, "case 1 of 4, .*: it stops with TypeError: .*positional argument"),
    (lambda x, W, A, B, alpha: x.fill(0), "case 1 of 4, .*: it changes its arguments"),
    (lambda x, W, A, B, alpha: AsPyTorchs(), "case 1 of 4, .*: it gives AsPyTorchs, where numbers are asked for"),
])  # fmt: skip
def test_a_function_is_told_the_case_that_it_fails(answer, complaint):
    assert re.match(complaint, judge("04.2", answer))


@pytest.mark.parametrize(("name", "answer", "complaint"), [
    ("18.3", lambda A, B, A0, B0: (B, A), "case 1 of 3, r = 2: it gives tuple, on which the check stops with ValueError: matmul"),
    ("18.3", lambda A, B, A0, B0: np.eye(4), "case 1 of 3, r = 2: it gives ndarray, on which the check stops with ValueError: too many"),
    ("18.3", lambda A, B, A0, B0: A @ B @ A0 @ A0, "case 1 of 3, r = 2: it stops with ValueError: matmul"),
    ("18.3", lambda A, B: (A, B), "case 1 of 3, r = 2: it stops with TypeError: .*positional arguments"),
    ("17.1", lambda x, generator: x, "case 1 of 5, it gives numbers that bfloat16 has: it is not so$"),
])  # fmt: skip
def test_a_function_is_not_blamed_for_what_the_check_does(name, answer, complaint):
    assert re.match(complaint, judge(name, answer))


@pytest.mark.parametrize(("name", "answer", "message"), [
    ("04.9", 1, "no exercise '04.9'; nearest: 04."),
    ("lora", 1, "no exercise 'lora'; nearest: "),
    ("04.1", "many", "04.1: a number is asked for, and 'many' is none"),
    ("04.1", len, "04.1: a number is asked for"),
    ("04.1", None, "04.1: a number is asked for"),
    ("04.1", [1, 2], "04.1: one number is asked for, not 2"),
    ("10.1", 0.5, "10.1: 3 numbers are asked for, not 1"),
    ("04.1", 10**400, "04.1: a number is asked for, and what is given is beyond 1.8e308"),
    ("04.1", np.complex128(8_388_608 + 1j), "04.1: a number is asked for, and 'complex128' is none"),
    ("04.1", AsPyTorchs(), "04.1: a number is asked for, and 'AsPyTorchs' is none"),
    ("04.2", 3, r"04.2: a function lora\(x, W, A, B, alpha\) is asked for, and not int"),
    ("17.4", "int8", "17.4: one of bfloat16, float16, both, neither is asked for, and not 'int8'"),
    ("16.2", np.array([1, 2]), r"16.2: one of .* is asked for, and not array\(\[1, 2\]\)"),
])  # fmt: skip
def test_an_answer_of_another_kind_is_refused_in_one_sentence(name, answer, message):
    with pytest.raises(ValueError, match=message):
        judge(name, answer)


@pytest.mark.parametrize("answer", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_wrong(answer):
    assert judge("04.1", answer) == "it is not finite"


# ----------------------------------------------------------------------------------------------------- the command line


def test_the_command_lists_and_prints_exercises(capsys):
    status, out, _ = output(capsys, "exercise")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == [*EXERCISES]
    assert "three digits" in output(capsys, "exercise", "--help")[1]
    status, out, _ = output(capsys, "exercise", "4.1")
    assert status == 0 and out.startswith("**04.1 Count it.** LoRA with $r = 16$") and "Solution" not in out


def test_without_the_lessons_it_prints_what_is_known(capsys, monkeypatch):
    def nowhere():
        raise FileNotFoundError("no lessons")

    monkeypatch.setattr(command, "find_lessons", nowhere)
    assert output(capsys, "exercise", "04.2")[:2] == (
        0, "The layer: a function lora(x, W, A, B, alpha) (the rest is in the lesson, which comes with a checkout of the project)\n"
    )  # fmt: skip


def test_the_command_checks_numbers_words_and_functions(capsys, tmp_path):
    right, wrong, broken = (tmp_path / f"{name}.py" for name in ("right", "wrong", "broken"))
    body = "import numpy as np\ndef distinct_2(responses):\n    grams = [p for r in responses for p in zip(r, r[1:])]\n"
    right.write_text(body + "    return len(set(grams)) / max(len(grams), 1)\nif __name__ == '__main__':\n    raise SystemExit\n")
    wrong.write_text(body + "    return len(set(grams))\n")
    broken.write_text("import nothing_of_this_name\n")
    for argv, answer in (
        (("04.1", "8,388,608"), (0, "04.1: right\n")), (("10.4", "-0.333"), (0, "10.4: right\n")),
        (("10.1", "0.125", ".25", "0.5"), (0, "10.1: right\n")), (("17.4", "float16"), (0, "17.4: right\n")),
        (("11.2", right), (0, "11.2: right\n")), (("04.1", "7"), (1, "04.1: not yet; it is too small\n")),
        (("11.2", wrong), (1, "11.2: not yet; case 1 of 5, one answer without repetition: it gives 3, where 1 is right\n")),
    ):  # fmt: skip
        assert output(capsys, "exercise", *argv) == (*answer, "")
    assert "broken.py stops (ModuleNotFoundError" in refused(capsys, "exercise", "11.2", broken)
    assert "right.py has no function 'gae'" in refused(capsys, "exercise", "10.2", right)
    (text := tmp_path / "answer.txt").write_text("7")
    assert "answer.txt: must be a Python file" in refused(capsys, "exercise", "10.2", text)
    assert {path.name for path in tmp_path.iterdir()} == {"right.py", "wrong.py", "broken.py", "answer.txt"}, "no bytecode"
    assert "missing.py: No such file" in refused(capsys, "exercise", "10.2", tmp_path / "missing.py")
    assert "04.1: a number is asked for, and 'many' is none" in refused(capsys, "exercise", "04.1", "many")
    assert "no exercise '04.9'; nearest: 04." in refused(capsys, "exercise", "04.9", "1")
