"""Every op's value and gradient against PyTorch's function of the same name, in float64 and in float32.

PyTorch computes in float64 in both cases, from the same inputs, so its own rounding never excuses ours.
"""

import operator
from functools import partial
from itertools import product

import numpy as np
import pytest

from minipeft.autograd import ops as F
from minipeft.autograd.tensor import REGISTRY, Tensor
from minipeft.backend import Rng

torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")
TF = torch.nn.functional

# relative to the largest value: the roundings of sums of hundreds of terms, PyTorch's among them
TOLERANCE = {"float64": 2.0**-52 * 128, "float32": 2.0**-23 * 16}


def normal(*shape, scale=1.0, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape) * scale


def close(found, expected, dtype, what):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape and found.dtype == dtype, what
    scale = np.abs(expected).max(initial=0)
    assert np.isfinite(scale), what
    if scale < TOLERANCE[dtype]:  # zero but for rounding, such as the gradient of a query that sees one key
        scale = 1.0
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype] * scale, err_msg=what)


def ids(*shape, high, seed=1):
    return np.random.default_rng(seed).integers(0, high, shape)


def some(targets, ignored=-100):
    """The targets with every third one ignored."""
    targets = targets.copy()
    targets.reshape(-1)[::3] = ignored
    return targets


def t(array):
    return torch.tensor(array)


def causal(T, S):
    """Bottom-right aligned: query i sees key j where j <= i + S - T."""
    return np.tril(np.ones((T, S), bool), S - T)


def attention_cases():
    q, k, v = normal(2, 4, 5, 6), normal(2, 4, 7, 6, seed=1), normal(2, 4, 7, 3, seed=2)
    boolean = np.random.default_rng(3).random((2, 1, 5, 7)) < 0.6
    boolean[..., 0] = True
    additive = normal(2, 4, 5, 7, seed=4)
    yield "plain", (q, k, v), {}, {}
    yield "scale", (q, k, v), dict(scale=0.3), dict(scale=0.3)
    yield "boolean mask", (q, k, v), dict(attn_mask=boolean), dict(attn_mask=t(boolean))
    yield "additive mask", (q, k, v), dict(attn_mask=additive), dict(attn_mask=additive)
    yield "key mask", (q, k, v), dict(attn_mask=boolean[:, :, :1]), dict(attn_mask=t(boolean[:, :, :1]))
    yield "causal, cache", (q, k, v), dict(is_causal=True), dict(attn_mask=t(causal(5, 7)))
    both = boolean & causal(5, 7)
    yield "causal and mask", (q, k, v), dict(is_causal=True, attn_mask=boolean), dict(attn_mask=t(both))
    for kv, name in ((2, "grouped queries"), (1, "one key head")):
        grouped = (q, k[:, :kv], v[:, :kv])
        yield name, grouped, dict(is_causal=True), dict(attn_mask=t(causal(5, 7)), enable_gqa=True)
        yield name + ", mask", grouped, dict(attn_mask=boolean), dict(attn_mask=t(boolean), enable_gqa=True)
    for T, S in ((1, 1), (1, 9), (64, 64), (130, 130), (65, 200)):
        long = normal(1, 2, T, 4, seed=T), normal(1, 2, S, 4, seed=S), normal(1, 2, S, 4, seed=S + 1)
        yield f"causal {T} x {S}", long, dict(is_causal=True), dict(attn_mask=t(causal(T, S)))
    steep = 6 * normal(1, 2, 6, 4), normal(1, 2, 6, 4, seed=5), normal(1, 2, 6, 4, seed=6)
    yield "scores far apart", steep, dict(is_causal=True), dict(is_causal=True)


def torch_attention(q, k, v, attn_mask=None, **options):
    if isinstance(attn_mask, np.ndarray):
        attn_mask = t(attn_mask).to(q.dtype)
    return TF.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)


def torch_packed(qkv, heads, mask=True):
    B, T, d3 = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
    mask = t(causal(T, T) & mask)
    return TF.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, T, d3 // 3)


def torch_rope(x, cos, sin):
    """As Hugging Face's apply_rotary_pos_emb: x * cos + rotate_half(x) * sin."""
    cos, sin = (torch.cat([part, part], -1)[:, None].to(x.dtype) for part in (t(cos), t(sin)))
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], -1) * sin


def rope_cases():
    for T, rows in ((1, 1), (7, 1), (7, 2)):
        angle = normal(rows, T, 3, scale=20)
        # the angles are not differentiated, and the op takes them in x's precision
        yield (
            f"{rows} x {T}",
            lambda x, a=angle: F.rope(x, np.cos(a).astype(x.dtype), np.sin(a).astype(x.dtype)),
            lambda x, a=angle: torch_rope(x, np.cos(a), np.sin(a)),
            (normal(2, 4, T, 6),),
        )


def torch_rotary(q, k, v, angle):
    B, T, _ = q.shape
    q, k, v = (a.reshape(B, T, -1, 2 * angle.shape[2]).transpose(1, 2) for a in (q, k, v))
    q, k, groups = torch_rope(q, np.cos(angle), np.sin(angle)), torch_rope(k, np.cos(angle), np.sin(angle)), q.shape[1] // k.shape[1]
    k, v = (a.repeat_interleave(groups, dim=1) for a in (k, v))
    return TF.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)


def rotary_cases():
    for T, rows in ((1, 1), (7, 2), (130, 1)):
        angle = normal(rows, T, 3, scale=20)
        yield (
            f"{rows} x {T}",
            lambda q, k, v, a=angle: F.rotary_attention(q, k, v, np.cos(a).astype(q.dtype), np.sin(a).astype(q.dtype)),
            lambda q, k, v, a=angle: torch_rotary(q, k, v, a),
            (normal(2, T, 24), normal(2, T, 12, seed=1), normal(2, T, 12, seed=2)),
        )


ties = np.array([[1.0, 3.0, 3.0, -2.0], [0.0, 0.0, 0.0, 0.0], [5.0, -1.0, 2.0, 5.0]])
edges = np.array([-1e4, -200.0, -88.8, -30.0, -1.0, -1e-8, 0.0, 1e-8, 1.0, 30.0, 88.8, 200.0, 1e4])
big = np.array([[1000.0, 999.0, -1000.0], [-1000.0, -1000.0, -1000.5], [0.0, 3e4, 1.0]])
sure = np.eye(4)[:3]
x34, y34, positive = normal(3, 4), normal(3, 4, seed=1), np.abs(normal(3, 4)) + 0.1
drop = Rng(7, 1)
kept = (F.dropout(Tensor(np.ones((4, 5))), 0.4, drop).data > 0).astype(float)


def table(ours, theirs, inputs, options=((),)):
    """(what, ours, theirs, inputs) for all inputs (an array, or several) with all options, which both take."""
    inputs, options = [x if isinstance(x, tuple) else (x,) for x in inputs], list(options)
    return [
        (f"{[a.shape for a in x]} {o}", lambda *x, o=o: ours(*x, *o), lambda *x, o=o: theirs(*x, *o), x)
        for x in inputs
        for o in options
    ]


def unary(name, theirs, *more):
    """An elementwise op on a small and a blocked, threaded array, and on what `more` says."""
    return table(getattr(F, name), theirs, [x34, normal(300, 700), *more])


def binary(name, theirs, *more):
    shapes = [(x34, y34 + 3), (x34, normal(4) + 3), (normal(3, 1), normal(1, 4) + 3)]
    return table(getattr(F, name), theirs, [*shapes, (normal(300, 400), normal(300, 400, seed=1) + 3), *more])


def reduction(name, theirs, *inputs, axes=((0, 1, 2), 0, -1, (0, 2))):
    return table(getattr(F, name), lambda x, a, k: theirs(x, a, keepdim=k), inputs, product(axes, (False, True)))


def norm(name, theirs, parameters):
    shapes = product(((3, 4), (2, 3, 48), (700, 128)), (1.0, 100.0))
    return table(
        getattr(F, name),
        lambda x, *p: theirs(x, p[0].shape, *p),
        [(normal(*s, scale=c), *[normal(s[-1], seed=1 + i) for i in range(parameters)]) for s, c in shapes],
    )


def our_attention(*qkv, attn_mask=None, **options):
    mask = attn_mask.astype(qkv[0].dtype) if attn_mask is not None and attn_mask.dtype != bool else attn_mask
    return F.scaled_dot_product_attention(*qkv, attn_mask=mask, **options)


def torch_cross_entropy(x, i, ignore_index=-100, smoothing=0.0, loss=TF.cross_entropy):
    options = {"label_smoothing": smoothing} if smoothing else {}
    return loss(x.reshape(-1, x.shape[-1]), t(i).reshape(-1), ignore_index=ignore_index, **options)


torch_nll_loss = partial(torch_cross_entropy, loss=TF.nll_loss)


def torch_kl_div(x, p, log_target=False):
    """Their "batchmean" is the mean over the first axis."""
    rows = (-1, x.shape[-1])
    return TF.kl_div(x.reshape(rows), p.reshape(rows), reduction="batchmean", log_target=log_target)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


# op -> (what, ours, theirs, differentiable inputs)
CASES = {
    "add": binary("add", torch.add),
    "sub": binary("sub", torch.sub),
    "mul": binary("mul", torch.mul),
    "div": binary("div", torch.div),
    "maximum": binary("maximum", torch.maximum, (ties, ties[:, ::-1].copy()), (ties, ties[0])),
    "minimum": binary("minimum", torch.minimum, (ties, ties[:, ::-1].copy()), (ties, ties[0])),
    "neg": unary("neg", torch.neg),
    "abs": unary("abs", torch.abs, ties),
    "exp": unary("exp", torch.exp),
    "log": table(F.log, torch.log, [positive]),
    "sqrt": table(F.sqrt, torch.sqrt, [positive]),
    "tanh": unary("tanh", torch.tanh, edges),
    "relu": unary("relu", torch.relu, ties),
    "sigmoid": unary("sigmoid", torch.sigmoid, edges),
    "softplus": unary("softplus", lambda x: -TF.logsigmoid(-x), edges),
    "logsigmoid": unary("logsigmoid", TF.logsigmoid, edges),
    "silu": unary("silu", TF.silu, edges),
    "gelu": unary("gelu", lambda x: TF.gelu(x, approximate="tanh"), edges),
    "swiglu": table(
        F.swiglu,
        lambda a, b: TF.silu(a) * b,
        [(x34, y34), (normal(300, 400), normal(300, 400, seed=1)), (edges, edges[::-1].copy())],
    ),
    "pow": table(F.pow, torch.pow, [positive], [(e,) for e in (0, 1, 2, -1, 0.5, -2.5)]),
    "where": [
        ("", lambda a, b: F.where(ties > 0, a, b), lambda a, b: torch.where(t(ties > 0), a, b), (ties, ties[:, :1] + 1))
    ],
    "clip": table(F.clip, torch.clamp, [ties], [(0.0, 3.0), (None, 3.0), (-2.0, None), (-1.0, 2.0)]),
    "to": table(lambda x: F.to(F.to(x, "float64") * 3, x.dtype), lambda x: x * 3, [x34]),
    "dropout": table(lambda x: F.dropout(x, 0.4, drop), lambda x: x * t(kept).to(x.dtype) / 0.6, [normal(4, 5)]),
    "sum": reduction("sum", torch.sum, normal(2, 3, 4)),
    "mean": reduction("mean", torch.mean, normal(2, 3, 4)),
    "var": [
        *reduction("var", lambda x, a, keepdim: torch.var(x, a, keepdim=keepdim), normal(2, 3, 4)),
        *table(
            lambda x, c: x.var(axis=1, correction=c),
            lambda x, c: x.var(1, correction=c),
            [normal(2, 3, 4), 10 + normal(30, 40)],
            [(0,), (1,), (2,)],
        ),
    ],
    "max": reduction("max", torch.amax, ties, x34, axes=((0, 1), 0, -1)),
    "logsumexp": table(F.logsumexp, torch.logsumexp, [x34, big, ties], [(0,), (-1,)]),
    "softmax": table(F.softmax, torch.softmax, [x34, big, normal(2, 3, 50)], [(0,), (-1,)]),
    "log_softmax": table(F.log_softmax, torch.log_softmax, [x34, big, normal(2, 3, 50)], [(0,), (-1,)]),
    "reshape": table(F.reshape, torch.reshape, [x34], [((2, -1),)]),
    "transpose": table(F.transpose, lambda x, axes=(2, 1, 0): x.permute(axes), [normal(2, 3, 4)], [(), ((1, 2, 0),)]),
    "swapaxes": table(F.swapaxes, torch.swapaxes, [normal(2, 3, 4)], [(0, -1)]),
    "broadcast_to": table(F.broadcast_to, torch.broadcast_to, [normal(3, 1)], [((2, 3, 4),)]),
    "getitem": [
        *table(
            operator.getitem,
            operator.getitem,
            [normal(4, 5, 6)],
            [(1,), (-1,), (slice(1, 3),), ((..., 2),), ((None, 0),), (np.s_[:, ::2],), ([0, 2, 2],), (([1, 1], [3, 3]),)],
        ),
        ("boolean", lambda x: x[ties > 0], lambda x: x[t(ties > 0)], (x34,)),
    ],
    "gather": table(
        lambda x, a: F.gather(x, ids(3, 4, high=3), a),
        lambda x, a: torch.gather(x, a, t(ids(3, 4, high=3))),
        [x34],
        [(0,), (1,), (-1,)],
    ),
    "_cat": [
        ("cat", lambda a, b: F.cat([a, b, a], axis=1), lambda a, b: torch.cat([a, b, a], 1), (x34, normal(3, 2))),
        ("stack", lambda a, b: F.stack([a, b], axis=-1), lambda a, b: torch.stack([a, b], -1), (x34, y34)),
    ],
    "inv": table(F.inv, torch.linalg.inv, [normal(3, 3) + 4 * np.eye(3), normal(2, 4, 4) + 4 * np.eye(4)]),
    "matmul": table(
        F.matmul,
        torch.matmul,
        [
            (normal(*a), normal(*b, seed=1))
            for a in ((4,), (3, 4), (2, 3, 4), (2, 1, 3, 4))
            for b in ((4,), (4, 5), (2, 4, 5), *([(5, 4, 6)] if len(a) == 4 else []))
        ],
    ),
    "linear": table(
        F.linear,
        TF.linear,
        [(normal(*s, 4), normal(5, 4, seed=1), *b) for s in ((), (3,), (2, 3), (0, 3)) for b in ((), (normal(5),))],
    ),
    "addmm": table(
        F.addmm,
        lambda b, x, w: torch.addmm(b, x.reshape(-1, 4), w).reshape(*x.shape[:-1], 5),
        [(normal(5), normal(*s, 4), normal(4, 5)) for s in ((3,), (2, 3))],
    ),
    "embedding": table(
        lambda w, i: F.embedding(i, w),
        lambda w, i: TF.embedding(t(i), w),
        [normal(6, 3)],
        [(ids(*s, high=6),) for s in ((5,), (2, 40), (0,))],
    ),
    "layer_norm": norm("layer_norm", TF.layer_norm, 2),
    "rms_norm": norm("rms_norm", lambda x, shape, w: TF.rms_norm(x, shape, w, eps=1e-6), 1),
    "rope": list(rope_cases()),
    "scaled_dot_product_attention": [
        (what, partial(our_attention, **ours), partial(torch_attention, **theirs), qkv)
        for what, qkv, ours, theirs in attention_cases()
    ],
    "rotary_attention": list(rotary_cases()),
    "packed_attention": [
        *table(F.packed_attention, torch_packed, [normal(2, 5, 24)], [(4,)]),
        *table(F.packed_attention, torch_packed, [normal(1, 130, 24)], [(2,)]),
        *table(F.packed_attention, torch_packed, [normal(2, 5, 24)], [(4, np.array([[[[1, 1, 0, 1, 1]]]], bool))]),
    ],
    "cross_entropy": [
        *(
            case
            for x in (normal(6, 5), normal(2, 7, 9, scale=10), big, normal(300, 400))
            for i in [ids(*x.shape[:-1], high=x.shape[-1])]
            for case in table(F.cross_entropy, torch_cross_entropy, [x], [(i,), (some(i),)])
        ),
        *table(F.cross_entropy, torch_cross_entropy, [x34], [(np.array([0, 2, 0]), 0)]),
        *table(
            F.cross_entropy,
            torch_cross_entropy,
            [x34, normal(3, 400, scale=10)],
            [(np.array([0, -100, 2]), -100, 0.1), (np.array([0, 1, 2]), 0, 1.0)],
        ),
    ],
    "nll_loss": [
        *table(F.nll_loss, torch_nll_loss, [x34], [(np.array([0, -100, 2]),), (np.array([0, 1, 2]), 0)]),
        *table(F.nll_loss, torch_nll_loss, [normal(2, 7, 9)], [(ids(2, 7, high=9),)]),
    ],
    "mse_loss": table(F.mse_loss, TF.mse_loss, [(x34, y34), (x34[0], y34[0]), (normal(90, 40), normal(90, 40) / 2)]),
    "kl_div": [
        *table(F.kl_div, torch_kl_div, [(x34, softmax(y34)), (normal(2, 3, 50), softmax(normal(2, 3, 50)))]),
        *table(F.kl_div, torch_kl_div, [(x34, y34), (normal(2, 3, 50), normal(2, 3, 50, seed=1))], [(True,)]),
        *table(lambda x: F.kl_div(x, sure.astype(x.dtype)), lambda x: torch_kl_div(x, t(sure)), [x34]),
    ],
    "linear_cross_entropy": [
        case
        for x in (normal(6, 4), normal(2, 7, 4, scale=5))
        for i in [ids(*x.shape[:-1], high=9)]
        for case in table(
            F.linear_cross_entropy,
            lambda x, w, i, *options: torch_cross_entropy(x @ w.T, i, *options),
            [(x, normal(9, 4, seed=1))],
            [(i,), (some(i),), (some(i), -100, 0.1)],
        )
    ],
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("op", CASES)
def test_value_and_gradients(op, dtype):
    for what, ours, theirs, inputs in CASES[op]:
        what = f"{op} {what}"
        arrays = [a.astype(dtype) for a in inputs]
        leaves = [Tensor(a.copy(), requires_grad=True) for a in arrays]
        twins = [torch.tensor(a.astype("float64"), requires_grad=True) for a in arrays]
        y, z = ours(*leaves), theirs(*twins)
        close(y.data, z, dtype, f"{what}: value")
        cotangent = normal(*y.shape, seed=9).astype(dtype)
        y.backward(cotangent)
        z.backward(torch.tensor(cotangent.astype("float64")))
        for i, (leaf, twin, array) in enumerate(zip(leaves, twins, arrays)):
            close(leaf.grad, twin.grad, dtype, f"{what}: gradient of input {i}")
            assert np.array_equal(leaf.data, array), f"{what}: input {i} was written into"


def test_argmax_is_theirs():
    for axis in (None, 0, -1):
        for keepdims in (False, True):
            found = Tensor(x34).argmax(axis, keepdims)
            np.testing.assert_array_equal(found, t(x34).argmax(axis, keepdims).numpy())


def test_every_op_is_compared():
    ops = {name for name, fn in REGISTRY.items() if fn.__module__ == F.__name__}
    assert ops == set(CASES)
