"""Every op's value and gradient against PyTorch's function of the same name, in float64 and in float32.

PyTorch computes in float64 in both cases, from the same inputs, so its own rounding never excuses ours.
"""

import math

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
    scale = np.abs(expected).max(initial=0) or 1.0
    assert np.isfinite(scale), what
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


def torch_packed(qkv, heads, mask=None):
    B, T, d3 = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
    mask = t(causal(T, T)) if mask is None else t(causal(T, T) & mask)
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


ties = np.array([[1.0, 3.0, 3.0, -2.0], [0.0, 0.0, 0.0, 0.0], [5.0, -1.0, 2.0, 5.0]])
edges = np.array([-1e4, -200.0, -88.8, -30.0, -1.0, -1e-8, 0.0, 1e-8, 1.0, 30.0, 88.8, 200.0, 1e4])
big = np.array([[1000.0, 999.0, -1000.0], [-1000.0, -1000.0, -1000.5], [0.0, 3e4, 1.0]])
x34, y34, positive = normal(3, 4), normal(3, 4, seed=1), np.abs(normal(3, 4)) + 0.1
drop = Rng(7, 1)
kept = (F.dropout(Tensor(np.ones((4, 5))), 0.4, drop).data > 0).astype(float)


def unary(name, theirs, *more):
    """An elementwise op on a small and a blocked, threaded array, and on what `more` says."""
    return [(f"{a.shape}", getattr(F, name), theirs, (a,)) for a in (x34, normal(300, 700), *more)]


def binary(name, theirs, *more):
    shapes = (
        (x34, y34 + 3),
        (x34, normal(4) + 3),
        (normal(3, 1), normal(1, 4) + 3),
        (normal(300, 400), normal(300, 400, seed=1) + 3),
    )
    return [(f"{a.shape} {b.shape}", getattr(F, name), theirs, (a, b)) for a, b in (*shapes, *more)]


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
    "log": [("", F.log, torch.log, (positive,))],
    "sqrt": [("", F.sqrt, torch.sqrt, (positive,))],
    "tanh": unary("tanh", torch.tanh, edges),
    "relu": unary("relu", torch.relu, ties),
    "sigmoid": unary("sigmoid", torch.sigmoid, edges),
    "softplus": unary("softplus", lambda x: -TF.logsigmoid(-x), edges),
    "logsigmoid": unary("logsigmoid", TF.logsigmoid, edges),
    "silu": unary("silu", TF.silu, edges),
    "gelu": unary("gelu", lambda x: TF.gelu(x, approximate="tanh"), edges),
    "swiglu": [
        (f"{a.shape}", F.swiglu, lambda a, b: TF.silu(a) * b, (a, b))
        for a, b in ((x34, y34), (normal(300, 400), normal(300, 400, seed=1)), (edges, edges[::-1].copy()))
    ],
    "pow": [(f"{e}", lambda x, e=e: F.pow(x, e), lambda x, e=e: x**e, (positive,)) for e in (0, 1, 2, -1, 0.5, -2.5)],
    "where": [
        ("", lambda a, b: F.where(ties > 0, a, b), lambda a, b: torch.where(t(ties > 0), a, b), (ties, ties[:, :1] + 1))
    ],
    "clip": [
        (
            f"{low} {high}",
            lambda x, a=low, b=high: F.clip(x, a, b),
            lambda x, a=low, b=high: torch.clamp(x, a, b),
            (ties,),
        )
        for low, high in ((0.0, 3.0), (None, 3.0), (-2.0, None), (-1.0, 2.0))
    ],
    "to": [("", lambda x: F.to(F.to(x, "float64") * 3, x.dtype), lambda x: x * 3, (x34,))],
    "dropout": [("", lambda x: F.dropout(x, 0.4, drop), lambda x: x * t(kept).to(x.dtype) / 0.6, (normal(4, 5),))],
    "sum": [
        (
            f"{a} {k}",
            lambda x, a=a, k=k: F.sum(x, a, k),
            lambda x, a=a, k=k: torch.sum(x, a, keepdim=k),
            (normal(2, 3, 4),),
        )
        for a in ((0, 1, 2), 0, -1, (0, 2))
        for k in (False, True)
    ],
    "mean": [
        (
            f"{a} {k}",
            lambda x, a=a, k=k: F.mean(x, a, k),
            lambda x, a=a, k=k: torch.mean(x, a, keepdim=k),
            (normal(2, 3, 4),),
        )
        for a in ((0, 1, 2), 0, -1, (0, 2))
        for k in (False, True)
    ],
    "max": [
        (f"{a} {k}", lambda x, a=a, k=k: F.max(x, a, k), lambda x, a=a, k=k: torch.amax(x, a, keepdim=k), (x,))
        for x in (ties, x34)
        for a in ((0, 1), 0, -1)
        for k in (False, True)
    ],
    "logsumexp": [
        (f"{x.shape} {a}", lambda x, a=a: F.logsumexp(x, a), lambda x, a=a: torch.logsumexp(x, a), (x,))
        for x in (x34, big, ties)
        for a in (0, -1)
    ],
    "softmax": [
        (f"{x.shape} {a}", lambda x, a=a: F.softmax(x, a), lambda x, a=a: torch.softmax(x, a), (x,))
        for x in (x34, big, normal(2, 3, 50))
        for a in (0, -1)
    ],
    "log_softmax": [
        (f"{x.shape} {a}", lambda x, a=a: F.log_softmax(x, a), lambda x, a=a: torch.log_softmax(x, a), (x,))
        for x in (x34, big, normal(2, 3, 50))
        for a in (0, -1)
    ],
    "reshape": [("", lambda x: F.reshape(x, (2, -1)), lambda x: x.reshape(2, -1), (x34,))],
    "transpose": [
        ("reversed", F.transpose, lambda x: x.permute(2, 1, 0), (normal(2, 3, 4),)),
        ("rotated", lambda x: F.transpose(x, (1, 2, 0)), lambda x: x.permute(1, 2, 0), (normal(2, 3, 4),)),
    ],
    "swapaxes": [("", lambda x: F.swapaxes(x, 0, -1), lambda x: x.swapaxes(0, -1), (normal(2, 3, 4),))],
    "broadcast_to": [("", lambda x: F.broadcast_to(x, (2, 3, 4)), lambda x: x.broadcast_to(2, 3, 4), (normal(3, 1),))],
    "getitem": [
        (f"{i}", lambda x, i=i: x[i], lambda x, i=i: x[i], (normal(4, 5, 6),))
        for i in (
            1,
            -1,
            slice(1, 3),
            (Ellipsis, 2),
            (None, 0),
            (slice(None), slice(None, None, 2)),
            [0, 2, 2],
            ([1, 1], [3, 3]),
        )
    ]
    + [("boolean", lambda x: x[ties > 0], lambda x: x[t(ties > 0)], (x34,))],
    "gather": [
        (
            f"{a}",
            lambda x, a=a: F.gather(x, ids(3, 4, high=3), a),
            lambda x, a=a: torch.gather(x, a, t(ids(3, 4, high=3))),
            (x34,),
        )
        for a in (0, 1, -1)
    ],
    "_cat": [
        ("cat", lambda a, b: F.cat([a, b, a], axis=1), lambda a, b: torch.cat([a, b, a], 1), (x34, normal(3, 2))),
        ("stack", lambda a, b: F.stack([a, b], axis=-1), lambda a, b: torch.stack([a, b], -1), (x34, y34)),
    ],
    "matmul": [
        (f"{a} {b}", F.matmul, torch.matmul, (normal(*a), normal(*b, seed=1)))
        for a, b in (
            ((3, 4), (4, 5)),
            ((4,), (4, 5)),
            ((3, 4), (4,)),
            ((4,), (4,)),
            ((2, 3, 4), (4, 5)),
            ((3, 4), (2, 4, 5)),
            ((2, 1, 3, 4), (5, 4, 6)),
            ((2, 3, 4), (4,)),
            ((4,), (2, 4, 5)),
            ((2, 3, 4), (2, 4, 5)),
        )
    ],
    "linear": [
        (f"{s}", F.linear, TF.linear, (normal(*s, 4), normal(5, 4, seed=1), *bias))
        for s in ((), (3,), (2, 3), (0, 3))
        for bias in ((), (normal(5),))
    ],
    "addmm": [
        (
            f"{s}",
            F.addmm,
            lambda b, x, w: torch.addmm(b, x.reshape(-1, 4), w).reshape(*x.shape[:-1], 5),
            (normal(5), normal(*s, 4), normal(4, 5)),
        )
        for s in ((3,), (2, 3))
    ],
    "embedding": [
        (f"{s}", lambda w, i=i: F.embedding(i, w), lambda w, i=i: TF.embedding(t(i), w), (normal(6, 3),))
        for s in ((5,), (2, 40), (0,))
        for i in (ids(*s, high=6),)
    ],
    "layer_norm": [
        (
            f"{s} {scale}",
            F.layer_norm,
            lambda x, w, b: TF.layer_norm(x, w.shape, w, b),
            (normal(*s, scale=scale), normal(s[-1], seed=1), normal(s[-1], seed=2)),
        )
        for s in ((3, 4), (2, 3, 48), (700, 128))
        for scale in (1.0, 100.0)
    ],
    "rms_norm": [
        (
            f"{s} {scale}",
            F.rms_norm,
            lambda x, w: TF.rms_norm(x, w.shape, w, eps=1e-6),
            (normal(*s, scale=scale), normal(s[-1], seed=1)),
        )
        for s in ((3, 4), (2, 3, 48), (700, 128))
        for scale in (1.0, 100.0)
    ],
    "rope": list(rope_cases()),
    "scaled_dot_product_attention": [
        (
            what,
            lambda *qkv, o=ours: F.scaled_dot_product_attention(
                *qkv, **{k: v.astype(qkv[0].dtype) if k == "attn_mask" and v.dtype != bool else v for k, v in o.items()}
            ),
            lambda *qkv, o=theirs: torch_attention(*qkv, **o),
            qkv,
        )
        for what, qkv, ours, theirs in attention_cases()
    ],
    "packed_attention": [
        ("causal", lambda x: F.packed_attention(x, 4), lambda x: torch_packed(x, 4), (normal(2, 5, 24),)),
        ("causal, 130", lambda x: F.packed_attention(x, 2), lambda x: torch_packed(x, 2), (normal(1, 130, 24),)),
        (
            "mask",
            lambda x: F.packed_attention(x, 4, attn_mask=np.array([[[[1, 1, 0, 1, 1]]]], bool)),
            lambda x: torch_packed(x, 4, np.array([1, 1, 0, 1, 1], bool)),
            (normal(2, 5, 24),),
        ),
    ],
    "cross_entropy": [
        (
            f"{x.shape}",
            lambda x, i=i: F.cross_entropy(x, i),
            lambda x, i=i: TF.cross_entropy(x.reshape(-1, x.shape[-1]), t(i).reshape(-1)),
            (x,),
        )
        for x in (normal(6, 5), normal(2, 7, 9, scale=10), big, normal(300, 400))
        for i in (ids(*x.shape[:-1], high=x.shape[-1]), some(ids(*x.shape[:-1], high=x.shape[-1])))
    ]
    + [
        (
            "ignore_index=0",
            lambda x: F.cross_entropy(x, np.array([0, 2, 0]), ignore_index=0),
            lambda x: TF.cross_entropy(x, t([0, 2, 0]), ignore_index=0),
            (x34,),
        )
    ],
    "linear_cross_entropy": [
        (
            f"{x.shape}",
            lambda x, w, i=i: F.linear_cross_entropy(x, w, i),
            lambda x, w, i=i: TF.cross_entropy((x @ w.T).reshape(-1, 9), t(i).reshape(-1)),
            (x, normal(9, 4, seed=1)),
        )
        for x in (normal(6, 4), normal(2, 7, 4, scale=5))
        for i in (ids(*x.shape[:-1], high=9), some(ids(*x.shape[:-1], high=9)))
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


def test_every_op_is_compared():
    ops = {name for name, fn in REGISTRY.items() if fn.__module__ == F.__name__}
    assert ops == set(CASES)


def test_no_target_counts():
    loss = F.cross_entropy(Tensor(x34), np.full(3, -100))
    assert math.isnan(loss.item()) and torch.isnan(TF.cross_entropy(t(x34), t([-100] * 3)))
