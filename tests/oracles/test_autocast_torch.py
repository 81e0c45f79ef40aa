"""Mixed precision against PyTorch: casts and elementwise ops bit for bit, products and a model within their rounding."""

from __future__ import annotations

import models
import numpy as np
import pytest
from twins import torch, twin_of

import minipeft as mp
from minipeft import functional as F
from minipeft.autograd.autocast import DTYPES, EXACT, FLOAT32, LOWER, autocast, rounded
from minipeft.autograd.tensor import REGISTRY

dtypes = pytest.mark.parametrize("dtype", DTYPES)
PLACE = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # the largest relative error of a rounding


def to_torch(x, dtype, requires_grad=False):
    return torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype)).requires_grad_(requires_grad)


def same_bits(ours, theirs):
    theirs = theirs.detach().float().numpy()
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    whole = np.ascontiguousarray(np.where(np.isnan(ours), 0, ours)), np.where(np.isnan(theirs), 0, theirs)
    different = whole[0].astype(np.float32).view(np.uint32) != whole[1].astype(np.float32).view(np.uint32)
    assert not different.any(), (ours[different][:5], theirs[different][:5])


@dtypes
def test_casts_of_all_kinds_of_numbers_have_the_same_bits(dtype):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 400_000, dtype=np.uint32)  # every exponent, subnormals, infinities, NaNs
    step = np.arange(0, 2**32, 2**12 + 2**11, dtype=np.uint64).astype(np.uint32)  # ties among them
    near = np.float32([0, -0.0, 65503.9, 65504, 65519.99, 65520, 65536, 2**-24, 2**-25, 1.5 * 2**-25, 2**-14, 2**-15, 3e38])
    for x in (bits.view(np.float32), step.view(np.float32), near, -near):
        same_bits(rounded(x, dtype), to_torch(x, dtype))


def low(x):
    """x as a tensor that autocast knows as rounded: what a product gives. (The identity loses nothing.)"""
    return F.matmul(x, np.eye(x.shape[-1], dtype=np.float32))


ELEMENTWISE = {
    "add": (F.add, torch.add), "sub": (F.sub, torch.sub), "mul": (F.mul, torch.mul), "div": (F.div, torch.div),
    "neg": (F.neg, torch.neg), "abs": (F.abs, torch.abs), "relu": (F.relu, torch.relu), "sqrt": (F.sqrt, torch.sqrt),
    "maximum": (F.maximum, torch.maximum), "minimum": (F.minimum, torch.minimum),
}  # fmt: skip
# exp, log and tanh of float32 may differ in the last place between libraries, which a rounding shows only near a tie
NEARLY = {
    "silu": (F.silu, torch.nn.functional.silu), "sigmoid": (F.sigmoid, torch.sigmoid), "tanh": (F.tanh, torch.tanh),
    "gelu": (F.gelu, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    "exp": (F.exp, torch.exp), "log": (F.log, torch.log), "softplus": (F.softplus, torch.nn.functional.softplus),
}  # fmt: skip


@dtypes
@pytest.mark.parametrize("name", [*ELEMENTWISE, *NEARLY])
def test_elementwise_ops_and_their_gradients(name, dtype):
    ours, theirs = (ELEMENTWISE | NEARLY)[name]
    rng, n = np.random.default_rng(1), ours.definition.__code__.co_argcount
    arrays = [rng.standard_normal((64, 96)).astype(np.float32) for _ in range(n)]
    arrays = [np.abs(a) + 0.01 if name in ("sqrt", "log", "div") else a for a in arrays]
    g = rounded(rng.standard_normal((64, 96)).astype(np.float32), dtype)
    leaves = [mp.Tensor(a, requires_grad=True) for a in arrays]
    with autocast(dtype, device_type="cpu"):
        y = ours(*[low(leaf) for leaf in leaves])
    y.backward(g)
    theirs_leaves = [to_torch(a, dtype, True) for a in arrays]
    z = theirs(*theirs_leaves)
    z.backward(to_torch(g, dtype))
    if name in ELEMENTWISE:
        same_bits(y.data, z)
        for leaf, other in zip(leaves, theirs_leaves) if name not in ("div", "sqrt") else ():  # there rounded in between
            same_bits(leaf.grad, other.grad)
    else:
        got, expected = y.data, z.detach().float().numpy()
        assert np.mean(got != expected) < 0.01
        np.testing.assert_allclose(got, expected, rtol=2 * PLACE[dtype], atol=2.0**-24)


@dtypes
def test_reductions_as_documented(dtype):
    x = np.random.default_rng(2).standard_normal((8, 4096)).astype(np.float32)
    for name, ours, theirs in (
        ("sum", lambda x: F.sum(x, axis=-1), lambda x: x.sum(-1)),
        ("mean", lambda x: F.mean(x, axis=-1), lambda x: x.mean(-1)),
        ("max", lambda x: F.max(x, axis=-1), lambda x: x.amax(-1)),
        ("softmax", F.softmax, lambda x: x.softmax(-1)),
        ("logsumexp", F.logsumexp, lambda x: x.logsumexp(-1)),
    ):
        with autocast(dtype, device_type="cpu"):
            got = ours(mp.Tensor(low(x).data)).data
        expected = theirs(to_torch(x, dtype)).float().numpy()
        np.testing.assert_allclose(got, expected, rtol=2 * PLACE[dtype], atol=1e-6, err_msg=name)
        assert np.array_equal(got, rounded(got, dtype)), name
        with autocast(dtype):
            inside = ours(mp.Tensor(low(x).data)).data
        assert np.array_equal(inside, rounded(inside, dtype)) == (name in ("mean", "max")), name


@dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_gradients_are_rounded_once(dtype, bias):
    """Sums are float32's in both, in some order: over k terms they differ by up to k 2^-24 Σ |x w|, before one rounding."""
    rng, k = np.random.default_rng(3), 256
    x, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, k), (64, k), (64,)))
    g = rng.standard_normal((32, 64)).astype(np.float32)
    ours = [mp.Tensor(a, requires_grad=True) for a in (x, w, b)[: 2 + bias]]
    theirs = [to_torch(a, "float32", True) for a in (x, w, b)[: 2 + bias]]
    with mp.autocast(dtype):
        y = F.linear(*ours)
    y.backward(g)
    with torch.autocast("cpu", dtype=getattr(torch, dtype)):
        z = torch.nn.functional.linear(*theirs)
    assert z.dtype == getattr(torch, dtype)
    z.backward(to_torch(g, dtype))
    lx, lw, lg = (np.abs(rounded(a, dtype)) for a in (x, w, g))
    magnitudes = [lx @ lw.T, lg @ lw, lg.T @ lx, lg.sum(axis=0)]
    for got, expected, size, terms in zip(
        [y.data, *(t.grad for t in ours)], [z, *(t.grad for t in theirs)], magnitudes, (k, 64, 32, 32)
    ):
        expected = expected.detach().float().numpy()
        assert np.array_equal(got, rounded(got, dtype))
        bound = terms * 2.0**-24 * size + 2 * PLACE[dtype] * np.abs(expected)
        assert (np.abs(got - expected) <= bound).all()
        assert np.mean(got == expected) > 0.9


class Twin(torch.nn.Module):
    """A small network that has products, a norm, an activation, a softmax and a loss."""

    def __init__(self, arrays):
        super().__init__()
        self.w = torch.nn.ParameterList([torch.nn.Parameter(torch.from_numpy(a.copy())) for a in arrays])

    def forward(self, x, targets):
        f, (w1, w2, head, norm) = torch.nn.functional, self.w
        h = f.layer_norm(x, x.shape[-1:], norm, torch.zeros_like(norm))
        h = x + f.linear(f.silu(f.linear(h, w1)), w2)
        return f.cross_entropy(f.linear(h, head), targets)


def our_loss(weights, x, targets):
    w1, w2, head, norm = weights
    h = F.layer_norm(mp.Tensor(x), norm, np.zeros_like(norm.data))
    h = x + F.linear(F.silu(F.linear(h, w1)), w2)
    return F.linear_cross_entropy(h, head, targets)


@dtypes
def test_gradients_of_a_model_differ_by_a_few_roundings(dtype):
    """On the way from the loss to a weight there are under ten roundings, of a relative error of at most PLACE each."""
    rng = np.random.default_rng(4)
    arrays = [rng.standard_normal(s).astype(np.float32) / 8 for s in ((64, 32), (32, 64), (50, 32))]
    arrays.append(np.ones(32, np.float32))
    x, targets = rng.standard_normal((40, 32)).astype(np.float32), rng.integers(0, 50, 40)
    weights = [mp.nn.Parameter(a.copy()) for a in arrays]
    with mp.autocast(dtype, device_type="cpu"):
        loss = our_loss(weights, x, targets)
    loss.backward()
    twin = Twin(arrays)
    with torch.autocast("cpu", dtype=getattr(torch, dtype)):
        other = twin(torch.from_numpy(x), torch.from_numpy(targets))
    other.backward()
    exact = [mp.nn.Parameter(a.astype(np.float64)) for a in arrays]
    our_loss(exact, x.astype(np.float64), targets).backward()
    assert abs(loss.item() - other.item()) < 4 * PLACE[dtype]
    for w, v, e in zip(weights, twin.w, exact):
        norm = np.linalg.norm(e.grad)
        assert w.grad.dtype == np.float32 and v.grad.dtype == torch.float32
        assert np.linalg.norm(w.grad - v.grad.numpy()) < 10 * PLACE[dtype] * norm
        assert 0 < np.linalg.norm(w.grad - e.grad) < 10 * PLACE[dtype] * norm
        assert np.linalg.norm(v.grad.numpy() - e.grad) < 10 * PLACE[dtype] * norm


@dtypes
def test_the_cpu_list_is_pytorchs(dtype):
    """Which results PyTorch's CPU gives in 16 bits, from inputs in 16 bits, and ours."""
    f, x, w = torch.nn.functional, np.random.default_rng(5).random((6, 6)).astype(np.float32) + 0.5, np.eye(6, dtype=np.float32)
    ids, ones = np.arange(6), np.ones(6, np.float32)
    cases = {
        "linear": (lambda x: F.linear(x, w), lambda x: f.linear(x, torch.from_numpy(w))),
        "matmul": (lambda x: F.matmul(x, w), lambda x: x @ torch.from_numpy(w)),
        "softmax": (F.softmax, lambda x: x.softmax(-1)), "exp": (F.exp, torch.exp), "log": (F.log, torch.log),
        "log_softmax": (F.log_softmax, lambda x: x.log_softmax(-1)), "pow": (lambda x: x**2, lambda x: x**2),
        "layer_norm": (lambda x: F.layer_norm(x, low(ones), low(ones)), lambda x: f.layer_norm(x, (6,))),
        "rms_norm": (lambda x: F.rms_norm(x, low(ones)), lambda x: f.rms_norm(x, (6,))),
        "sum": (lambda x: x.sum(axis=0), lambda x: x.sum(0)), "mean": (lambda x: x.mean(axis=0), lambda x: x.mean(0)),
        "softplus": (F.softplus, f.softplus), "logsumexp": (F.logsumexp, lambda x: x.logsumexp(-1)),
        "mse_loss": (lambda x: F.mse_loss(x, F.sqrt(x)), lambda x: f.mse_loss(x, x.sqrt())),
        "kl_div": (lambda x: F.kl_div(x, x), lambda x: f.kl_div(x, x, reduction="batchmean")),
        "nll_loss": (lambda x: F.nll_loss(x, ids), lambda x: f.nll_loss(x, torch.from_numpy(ids))),
        "cross_entropy": (lambda x: F.cross_entropy(x, ids), lambda x: f.cross_entropy(x, torch.from_numpy(ids))),
        "inv": (F.inv, torch.linalg.inv), "silu": (F.silu, f.silu), "sqrt": (F.sqrt, torch.sqrt),
        "add": (lambda x: x + x, lambda x: x + x), "a float32": (lambda x: x + w, lambda x: x + torch.from_numpy(w)),
        "cat": (lambda x: F.cat([x, mp.Tensor(w)]), lambda x: torch.cat([x, torch.from_numpy(w)])),
    }  # fmt: skip
    for name, (ours, theirs) in cases.items():
        with autocast(dtype, device_type="cpu"):
            y = (ours(low(mp.Tensor(x))) * 1.0009765625).data  # of what counts as rounded, this is rounded, too
        with torch.autocast("cpu", dtype=getattr(torch, dtype)):
            z = theirs(to_torch(x, dtype))
        is_low = np.array_equal(y, rounded(y, dtype))
        assert is_low == (z.dtype == getattr(torch, dtype)), name


def test_the_lists_name_ops():
    from minipeft.quant.linear import linear_4bit

    assert linear_4bit.__name__ in REGISTRY
    assert {*LOWER, *EXACT, *FLOAT32["cpu"], *FLOAT32["cuda"]} <= set(REGISTRY)
    assert FLOAT32["cpu"] < FLOAT32["cuda"] and not LOWER & FLOAT32["cuda"]


@dtypes
@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_a_transformer_differs_from_transformers_by_no_more_than_both_do_from_float32(dialect, dtype):
    """Two roundings of one computation, in other places: their errors know nothing of each other, and are as large.

    So the squared distance between ours and theirs is at most about the sum of those of both from float32.
    """
    config = models.config(dialect, initializer_range=0.1, hidden_size=32)
    model, ids = mp.Transformer(config, seed=1), np.random.default_rng(6).integers(0, 40, (2, 16))
    twin, exact = twin_of(model, "float32"), model.copy()
    exact.loss(ids, ids).backward()
    with autocast(dtype, device_type="cpu"):
        loss = model.loss(ids, ids)
    loss.backward()
    with torch.autocast("cpu", dtype=getattr(torch, dtype)):
        other = twin(torch.from_numpy(ids), labels=torch.from_numpy(ids), use_cache=False).loss
    other.backward()
    assert loss.item() == pytest.approx(other.item(), rel=4 * PLACE[dtype])
    theirs, true = dict(twin.named_parameters()), dict(exact.named_parameters())
    ratios = []
    for name, p in model.named_parameters():
        their, e = theirs[name].grad.numpy(), true[name].grad
        ours_off, theirs_off, apart = (np.linalg.norm(d) for d in (p.grad - e, their - e, p.grad - their))
        assert 0 < ours_off < 40 * PLACE[dtype] * np.linalg.norm(e), name
        assert apart < 1.5 * np.hypot(ours_off, theirs_off), name
        ratios.append(ours_off / theirs_off)
    assert 0.5 < np.median(ratios) < 2, "neither is much nearer to float32 than the other"
