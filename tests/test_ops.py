"""Every op: its value by an independent formula, its pullbacks by differences, on every layout, dtype and device.

The inputs are those of minipeft/autograd/cases.py, which `minipeft gradcheck` runs too.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import pkgutil
import statistics
from functools import cache, partial, wraps

import numpy as np
import pytest
import strict_device

import minipeft
from minipeft import functional as F
from minipeft.autograd import cases as C
from minipeft.autograd.gradcheck import GradcheckError, check_parameters, gradcheck
from minipeft.autograd.tensor import REGISTRY, AutogradError, Tensor, evaluated_by
from minipeft.backend import BackendError, Rng, to_numpy, xp_of

OPS = [name for name, fn in REGISTRY.items() if fn.__module__ == "minipeft.autograd.ops"]


@cache
def cases_of(name):
    return C.op_cases([name])


def every_case(names, cases=cases_of):
    """Makes a test of a `case` one of an op: it goes through the op's cases, and all that fail are raised, with their labels."""

    def decorate(test):
        @pytest.mark.parametrize("case", names)
        @wraps(test)
        def test_of_an_op(case, **fixtures):
            name, failures = case, []
            for case in cases(name):
                try:
                    test(case, **fixtures)
                except Exception as failure:
                    failure.add_note(f"the case: {case.label}")
                    failures.append(failure)
            if failures:
                raise ExceptionGroup(f"cases of {name}", failures)

        return test_of_an_op

    return decorate


def by_definition():
    """Inside, ops compute by their definitions, whatever kernels there are."""
    return evaluated_by(lambda name, form, *arrays, **options: REGISTRY[name].definition(*arrays, **options))


def run(case, inputs=None, xp=np, dtype=np.float64, cotangent=None):
    """(value, gradients of the floating-point inputs) as host arrays; the cotangent is random, of a fixed seed."""

    def there(a):
        return xp.asarray(a.astype(dtype) if a.dtype.kind == "f" else a)

    tensors = [
        Tensor(there(a) if inputs is None else a, requires_grad=True) if a.dtype.kind == "f" else there(a)
        for a in (case.inputs if inputs is None else inputs)
    ]
    y = case.fn(*tensors, *map(there, case.constants))
    if cotangent is None:
        cotangent = np.random.default_rng(1).standard_normal(y.shape)
    y.backward(xp.asarray(np.asarray(cotangent, to_numpy(y.data).dtype)))
    gradients = [t.grad for t in tensors if isinstance(t, Tensor)]
    return to_numpy(y.data), [None if g is None else to_numpy(g) for g in gradients]


def close(a, b, tolerance, where=""):
    """Equal to `tolerance`, relative to the largest magnitude."""
    assert a.shape == b.shape
    scale = max(1.0, float(np.abs(b).max())) if b.size else 1.0
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=where)


# ------------------------------------------------------------------------------------------------- the registry


def test_every_op_of_the_package_has_a_gradient_check():
    for module in pkgutil.walk_packages(minipeft.__path__, "minipeft."):
        if not module.name.endswith(("__main__", "book.conf")):  # which a command runs, and Sphinx
            importlib.import_module(module.name)
    ours = [name for name, fn in REGISTRY.items() if fn.__module__.startswith("minipeft.")]
    assert len(ours) >= 40
    assert [name for name in ours if name not in C.CASES] == []
    assert [name for name in C.CASES if name not in REGISTRY] == []


def test_an_op_without_a_check_is_reported_by_name():
    with pytest.raises(KeyError, match="no gradient check for the op brand_new"):
        C.op_cases(["softmax", "brand_new"])


@every_case(OPS)
def test_pullbacks_are_derivatives_for_every_subset_of_inputs(case):
    assert case.check() < 1e-7


def test_check_ops_yields_a_verdict_for_each_case_and_goes_on_after_a_failure():
    wrong = C.Case("off by half", lambda x: F.exp(x) + (x * 0.5).detach(), (C.normal(2),), op="exp")
    verdicts = list(C.check_ops([cases_of("add")[0], wrong, cases_of("add")[1]]))
    assert [v.error is None for v in verdicts] == [True, False, True]
    assert verdicts[1].error.name == "exp (off by half)" and math.isinf(verdicts[1].deviation)


# ------------------------------------------------------------------------------------ values by another formula


def each(fn):
    return lambda x: np.array([fn(v) for v in x.ravel().tolist()]).reshape(x.shape)


def naive_softmax(x, axis=-1):
    moved = np.moveaxis(x, axis, -1)
    out = np.empty_like(moved)
    for i in np.ndindex(moved.shape[:-1]):
        top = max(moved[i].tolist())
        e = [math.exp(v - top) for v in moved[i].tolist()]
        out[i] = [v / math.fsum(e) for v in e]
    return np.moveaxis(out, -1, axis)


def naive_norm(x, weight, bias, center, eps):
    out = np.empty_like(x)
    for i in np.ndindex(x.shape[:-1]):
        mean = math.fsum(x[i]) / x.shape[-1] if center else 0.0
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in x[i]) / x.shape[-1] + eps)
        out[i] = [(v - mean) / spread * w + b for v, w, b in zip(x[i], weight, bias)]
    return out


def naive_attention(q, k, v, mask=None, is_causal=False, scale=None):
    B, H, T, D = q.shape
    kv, S = k.shape[1:3]
    mask = None if mask is None else np.broadcast_to(mask, (B, H, T, S))
    out = np.zeros((B, H, T, v.shape[3]))
    for b, h, t in np.ndindex(B, H, T):
        scores = {}
        for s in range(S):
            score = math.fsum(q[b, h, t] * k[b, h * kv // H, s]) * (scale or D**-0.5)
            if mask is not None and mask.dtype != bool:
                score += mask[b, h, t, s]
            hidden = (is_causal and s > t + S - T) or (mask is not None and mask.dtype == bool and not mask[b, h, t, s])
            if not hidden and score > -math.inf:
                scores[s] = score
        if scores:
            top = max(scores.values())
            total = math.fsum(math.exp(x - top) for x in scores.values())
            out[b, h, t] = sum(math.exp(x - top) / total * v[b, h * kv // H, s] for s, x in scores.items())
    return out


def naive_packed(qkv, num_heads, attn_mask=None, is_causal=True):
    B, T, d3 = qkv.shape
    q, k, v = (part.reshape(B, T, num_heads, d3 // 3 // num_heads).swapaxes(1, 2) for part in np.split(qkv, 3, axis=-1))
    return naive_attention(q, k, v, attn_mask, is_causal).swapaxes(1, 2).reshape(B, T, d3 // 3)


def naive_cross_entropy(logits, targets, ignore_index=-100):
    rows = zip(logits.reshape(-1, logits.shape[-1]), targets.ravel().tolist())
    losses = [-math.log(naive_softmax(row)[t]) for row, t in rows if t != ignore_index]
    return np.array(math.fsum(losses) / len(losses))


def naive_kl(log_q, p):
    rows = zip(log_q.reshape(-1, log_q.shape[-1]).tolist(), p.reshape(-1, p.shape[-1]).tolist())
    sums = [math.fsum(v * (math.log(v) - u) for u, v in zip(*row)) for row in rows]
    return np.array(math.fsum(sums) / len(sums))


def naive_rope(x, cos, sin):  # each pair of channels is a complex number, multiplied by e^(i angle)
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def naive_rotary(q, k, v, cos, sin, mask=None):
    q, k, v = (np.stack(np.split(a, a.shape[2] // (2 * cos.shape[2]), axis=2), axis=1) for a in (q, k, v))  # [B, H, T, D]
    y = naive_attention(naive_rope(q, cos, sin), naive_rope(k, cos, sin), v, mask, is_causal=True)
    return np.concatenate(list(y.swapaxes(0, 1)), axis=2)


def naive_inv(a):
    """By Cramer's rule, from the products of a 3 x 3 matrix's columns."""
    c = [np.cross(a[..., (i + 1) % 3], a[..., (i + 2) % 3]) for i in range(3)]
    return np.stack(c, axis=-2) / (a[..., 0] * c[0]).sum(-1)[..., None, None]


def naive_matmul(a, b):
    return np.einsum("...ij,...jk->...ik", a, b)


def naive_gather(x, i, axis=-1):
    out = np.empty(i.shape)
    for p in np.ndindex(i.shape):
        at = list(p)
        at[axis] = i[p]
        out[p] = x[tuple(at)]
    return out


def sigmoid(v):
    return 0.5 * (1 + math.tanh(v / 2))


def gelu(v):
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def stats(reduce):
    return lambda x: np.array([[reduce(row[:, j].tolist()) for j in range(x.shape[2])] for row in x])


x, y, z = C.normal(2, 3, 4), C.normal(2, 3, 4, seed=5), C.positive(2, 3, 4)
ids, keep, angle = C.integers(6, 2, 5), C.integers(2, 2, 3, 4) == 1, C.normal(2, 3, 2)
REFERENCES = {  # op -> (call, the same by another formula, arrays)
    "add": (F.add, lambda a, b: np.array([u + v for u, v in zip(a.ravel(), b.ravel())]).reshape(a.shape), x, y),
    "sub": (F.sub, lambda a, b: a + (-1) * b, x, y),
    "mul": (F.mul, lambda a, b: np.exp(np.log(a) + np.log(b)), z, z + 1),
    "div": (F.div, lambda a, b: a * b**-1, x, z),
    "neg": (F.neg, lambda a: 0 - a, x),
    "pow": (lambda a: F.pow(a, 3), lambda a: a * a * a, x),
    "maximum": (F.maximum, lambda a, b: (a + b + np.abs(a - b)) / 2, x, y),
    "minimum": (F.minimum, lambda a, b: (a + b - np.abs(a - b)) / 2, x, y),
    "where": (lambda a, b: F.where(keep, a, b), lambda a, b: keep * a + ~keep * b, x, y),
    "clip": (lambda a: F.clip(a, -0.5, 0.7), each(lambda v: min(max(v, -0.5), 0.7)), x),
    "to": (lambda a: F.to(a, np.float32), lambda a: a.astype(np.float32), x),
    "exp": (F.exp, each(math.exp), x),
    "log": (F.log, each(math.log), z),
    "sqrt": (F.sqrt, each(math.sqrt), z),
    "abs": (F.abs, each(abs), x),
    "tanh": (F.tanh, each(math.tanh), x),
    "relu": (F.relu, each(lambda v: max(v, 0.0)), x),
    "sigmoid": (F.sigmoid, each(sigmoid), x),
    "softplus": (F.softplus, each(lambda v: math.log(1 + math.exp(v))), x),
    "logsigmoid": (F.logsigmoid, each(lambda v: math.log(sigmoid(v))), x),
    "silu": (F.silu, each(lambda v: v * sigmoid(v)), x),
    "swiglu": (F.swiglu, lambda a, b: each(lambda v: v * sigmoid(v))(a) * b, x, y),
    "gelu": (F.gelu, each(gelu), x),
    "dropout": (lambda a: F.dropout(a, 0.0, Rng(0)), lambda a: a, x),  # its masks have tests of their own below
    "sum": (lambda a: F.sum(a, axis=1), stats(math.fsum), x),
    "mean": (lambda a: F.mean(a, axis=1), stats(lambda v: math.fsum(v) / len(v)), x),
    "var": (lambda a: F.var(a, axis=1), stats(statistics.variance), x),
    "max": (lambda a: F.max(a, axis=1), stats(max), x),
    "logsumexp": (lambda a: F.logsumexp(a, axis=1), stats(lambda v: math.log(math.fsum(map(math.exp, v)))), x),
    "softmax": (lambda a: F.softmax(a, axis=1), lambda a: naive_softmax(a, 1), x),
    "log_softmax": (lambda a: F.log_softmax(a, axis=1), lambda a: np.log(naive_softmax(a, 1)), x),
    "reshape": (lambda a: F.reshape(a, (4, 6)), lambda a: np.array(a.ravel().tolist()).reshape(4, 6), x),
    "transpose": (lambda a: F.transpose(a, (2, 0, 1)), lambda a: np.einsum("ijk->kij", a), x),
    "swapaxes": (lambda a: F.swapaxes(a, 0, -1), lambda a: np.einsum("ijk->kji", a), x),
    "broadcast_to": (lambda a: F.broadcast_to(a, (2, 2, 3, 4)), lambda a: a + np.zeros((2, 1, 1, 1)), x),
    "getitem": (lambda a: a[:, [0, 2], 1:], lambda a: np.stack([a[:, 0, 1:], a[:, 2, 1:]], axis=1), x),
    "gather": (lambda a: F.gather(a, ids[:, :3, None] % 4), lambda a: naive_gather(a, ids[:, :3, None] % 4), x),
    "_cat": (
        lambda a, b: F.cat([a, b], 1),
        lambda a, b: np.einsum("ijk->jik", [*a.swapaxes(0, 1), *b.swapaxes(0, 1)]),
        x,
        y,
    ),
    "matmul": (F.matmul, naive_matmul, x, C.normal(2, 4, 5)),
    "inv": (F.inv, naive_inv, C.normal(2, 3, 3) + 4 * np.eye(3)),
    "linear": (F.linear, lambda a, w, b: naive_matmul(a, w.T) + b, x, C.normal(5, 4), C.normal(5)),
    "addmm": (F.addmm, lambda b, a, w: naive_matmul(a, w) + b, C.normal(5), x, C.normal(4, 5)),
    "embedding": (
        lambda w: F.embedding(ids, w),
        lambda w: naive_matmul(ids[..., None] == np.arange(6), w),
        C.normal(6, 3),
    ),
    "layer_norm": (F.layer_norm, lambda a, w, b: naive_norm(a, w, b, True, 1e-5), x, C.positive(4), C.normal(4)),
    "rms_norm": (F.rms_norm, lambda a, w: naive_norm(a, w, 0 * w, False, 1e-6), x, C.positive(4)),
    "rope": (
        lambda a: F.rope(a, np.cos(angle), np.sin(angle)),
        lambda a: naive_rope(a, np.cos(angle), np.sin(angle)),
        C.normal(2, 2, 3, 4),
    ),
    "scaled_dot_product_attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: naive_attention(q, k, v, is_causal=True),
        *(C.normal(2, 4, 3, 2), C.normal(2, 2, 5, 2), C.normal(2, 2, 5, 3)),
    ),
    "rotary_attention": (
        lambda q, k, v: F.rotary_attention(q, k, v, np.cos(angle), np.sin(angle)),
        lambda q, k, v: naive_rotary(q, k, v, np.cos(angle), np.sin(angle)),
        *(C.normal(2, 3, 16), C.normal(2, 3, 8), C.normal(2, 3, 8, seed=1)),
    ),
    "packed_attention": (lambda a: F.packed_attention(a, 2), lambda a: naive_packed(a, 2), C.normal(2, 5, 12)),
    "cross_entropy": (
        lambda a: F.cross_entropy(a, ids[:, :3] % 4),
        lambda a: naive_cross_entropy(a, ids[:, :3] % 4),
        x,
    ),
    "nll_loss": (
        lambda a: F.nll_loss(a, ids[:, :3] % 4),
        lambda a: -np.array(math.fsum(a[i][ids[i] % 4] for i in np.ndindex(2, 3)) / 6),
        x,
    ),
    "mse_loss": (F.mse_loss, lambda a, b: np.array(math.fsum(((a - b) ** 2).ravel()) / a.size), x, y),
    "kl_div": (F.kl_div, naive_kl, x, z),
    "linear_cross_entropy": (
        lambda a, w: F.linear_cross_entropy(a, w, ids[:, :3]),
        lambda a, w: naive_cross_entropy(naive_matmul(a, w.T), ids[:, :3]),
        *(x, C.normal(6, 4)),
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_values_equal_an_independent_formula(name):
    call, formula, *arrays = REFERENCES[name]
    found = call(*map(Tensor, arrays)).data
    np.testing.assert_allclose(found, formula(*arrays), rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------------------------- layouts, dtypes and devices


def transposed(a):
    return np.array(a, order="F")


def strided(a):
    wide = np.full(tuple(2 * n + 1 for n in a.shape), np.nan)
    wide[tuple(slice(1, None, 2) for _ in a.shape)] = a
    return wide[tuple(slice(1, None, 2) for _ in a.shape)]


def backwards(a):
    every = (slice(None, None, -1),) * a.ndim
    return a[every].copy()[every]


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


@every_case(OPS)
def test_memory_layout_does_not_matter(case):
    y, gradients = run(case)
    for layout in transposed, strided, backwards, read_only:
        y2, gradients2 = run(case, inputs=[layout(a) if a.dtype.kind == "f" else a for a in case.inputs])
        for a, b in zip([y2, *gradients2], [y, *gradients], strict=True):
            close(a, b, 1e-12, layout.__name__)


@every_case(OPS)
def test_the_incoming_gradient_may_be_a_read_only_view_of_any_layout(case):
    y, gradients = run(case)
    g = np.asarray(np.random.default_rng(1).standard_normal(y.shape))
    for cotangent, expected in [
        (np.broadcast_to(np.ones(()), y.shape), run(case, cotangent=np.ones(y.shape))[1]),  # stride 0, and read-only
        (transposed(g), gradients),
    ]:
        for a, b in zip(run(case, cotangent=cotangent)[1], expected, strict=True):
            close(a, b, 1e-12)


@every_case(OPS)
def test_float32_stays_float32_and_agrees_with_float64_to_rounding(case):
    y, gradients = run(case)
    y32, gradients32 = run(case, dtype=np.float32)
    assert y32.dtype == np.float32 or case.op == "to"
    for a, b in zip([y32, *gradients32], [y, *gradients], strict=True):
        close(a, b, 1e-4)
    assert all(g.dtype == np.float32 for g in gradients32)


@every_case(OPS)
def test_the_same_numbers_on_a_device_and_from_run_to_run(case, xp):
    y, gradients = run(case)
    y2, gradients2 = run(case, xp=xp)
    if case.op == "dropout" and xp is not np:  # another library draws other numbers; its mask must still be one mask
        assert y2.shape == y.shape and [g.shape for g in gradients2] == [g.shape for g in gradients]
        return
    for a, b in zip([y2, *gradients2], [y, *gradients], strict=True):
        if xp is np:
            np.testing.assert_array_equal(a, b)
        else:  # a GPU's float32 functions round as they do
            close(a, b, 1e-6 if xp.__name__ == "cupy" and case.label == "through float32" else 1e-12)


def big(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# ----------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(
    "shape", [(5,), (3, 5), (1, 5), (3, 1), (2, 1, 1, 5), (2, 1, 3, 5), (1, 4, 3, 5), (4, 1, 1), (2, 4, 3, 5)]
)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_of_every_broadcastable_shape(shape, kind, causal):
    q, k, v = C.normal(2, 4, 3, 2), C.normal(2, 2, 5, 2), C.normal(2, 2, 5, 2)
    mask = (
        C.integers(2, *shape) == 1
        if kind == "boolean"
        else np.where(C.integers(3, *shape) == 0, -np.inf, C.normal(*shape))
    )
    out = F.scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v), mask, causal).data
    np.testing.assert_allclose(out, naive_attention(q, k, v, mask, causal), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("context", [contextlib.nullcontext, by_definition])
def test_rotary_attention_writes_the_new_keys_and_values_into_its_cache_and_sees_the_earlier_ones(context, xp):
    """Piece by piece it gives what it gives at once, whichever room the cache has."""
    B, T, H, kv, D = 2, 7, 4, 2, 6
    q, k, v, angle = C.normal(B, T, H * D), C.normal(B, T, kv * D), C.normal(B, T, kv * D, seed=1), C.normal(B, T, D // 2)
    keep = C.integers(3, B, 1, 1, T) > 0
    keep[..., 0] = True

    def parts(a, start, stop):
        return Tensor(xp.asarray(a[:, start:stop]))

    whole = naive_rotary(q, k, v, np.cos(angle), np.sin(angle), keep)
    keys, values = (xp.asarray(np.full((B, kv, 9, D), np.nan)) for _ in range(2))
    with context():
        for start, stop in [(0, 4), (4, 5), (5, 7)]:
            rotation = [f(parts(angle, start, stop).data) for f in (xp.cos, xp.sin)]
            mask, qkv = xp.asarray(keep[..., :stop]), [parts(a, start, stop) for a in (q, k, v)]
            y = F.rotary_attention(*qkv, *rotation, attn_mask=mask, cache=(keys, values, start))
            np.testing.assert_allclose(to_numpy(y.data), whole[:, start:stop], atol=1e-12)
    assert np.isnan(to_numpy(keys)[:, :, 7:]).all() and np.isfinite(to_numpy(values)[:, :, :7]).all()
    first = Tensor(xp.asarray(q[:, :1]), requires_grad=True)
    others, rotation = [parts(a, 0, 1) for a in (k, v)], [f(parts(angle, 0, 1).data) for f in (xp.cos, xp.sin)]
    F.rotary_attention(first, *others, *rotation, cache=(keys, values, 4)).backward(xp.ones((B, 1, H * D)))
    gradient = first.grad
    alone = Tensor(first.data, requires_grad=True)
    with by_definition():
        F.rotary_attention(alone, *others, *rotation, cache=(keys, values, 4)).backward(xp.ones((B, 1, H * D)))
    np.testing.assert_allclose(to_numpy(gradient), to_numpy(alone.grad), atol=1e-12)


@pytest.mark.parametrize(
    "mask", [np.zeros((1, 1, 3, 3), bool), np.full((3, 3), -np.inf, np.float32)], ids=["boolean", "additive"]
)
def test_a_row_that_sees_nothing_gives_zero_and_no_gradient(mask, xp):
    q, k, v = (Tensor(xp.asarray(big(1, 2, 3, 4, seed=s)), requires_grad=True) for s in range(3))
    out = F.scaled_dot_product_attention(q, k, v, xp.asarray(mask))
    out.backward(xp.asarray(big(1, 2, 3, 4)))
    for a in (out.data, q.grad, k.grad, v.grad):
        np.testing.assert_array_equal(to_numpy(a), np.zeros((1, 2, 3, 4)))


def test_fewer_keys_than_queries_leaves_the_first_rows_empty():
    q, k, v = (Tensor(C.normal(1, 1, n, 2), requires_grad=True) for n in (5, 3, 3))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out.backward(np.ones(out.shape))
    assert (out.data[0, 0, :2] == 0).all() and (out.data[0, 0, 2:] != 0).all()
    assert (q.grad[0, 0, :2] == 0).all() and np.isfinite(q.grad).all() and np.isfinite(k.grad).all()


# --------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_extreme_logits_neither_overflow_nor_lose_the_gradient(magnitude):
    x = np.zeros((2, 4), np.float32)
    x[:, 1] = magnitude
    targets = np.array([1, 2])
    logits = Tensor(x, requires_grad=True)
    with np.errstate(all="raise", under="ignore"):
        loss = F.cross_entropy(logits, targets)
        loss.backward()
    expected = np.mean(np.logaddexp.reduce(x.astype(np.float64), axis=1) - x[[0, 1], targets])
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(logits.grad, (naive_softmax(x.astype(np.float64)) - np.eye(4)[targets]) / 2, atol=1e-7)


def test_label_smoothing_is_cross_entropy_with_a_softened_target():
    logits, targets, eps = C.normal(3, 4), np.array([1, -100, 3]), 0.2
    q = (1 - eps) * np.eye(4)[[1, 3]] + eps / 4
    expected = -(q * np.log(naive_softmax(logits[[0, 2]]))).sum() / 2
    assert F.cross_entropy(Tensor(logits), targets, label_smoothing=eps).item() == pytest.approx(expected, rel=1e-12)


def test_kl_div_is_a_mean_over_distributions_zero_where_they_agree_and_takes_a_probability_of_zero(xp):
    log_p = F.log_softmax(Tensor(xp.asarray(C.normal(2, 3, 5))))
    assert F.kl_div(log_p, log_p.exp()).item() == pytest.approx(0, abs=1e-15)
    log_q = Tensor(xp.log(xp.asarray([[0.25, 0.75, 1.0], [0.5, 0.5, 1.0]])), requires_grad=True)
    p = Tensor(xp.asarray([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]), requires_grad=True)
    with np.errstate(all="raise"):
        loss = F.kl_div(log_q, p)
        loss.backward()
    assert loss.item() == pytest.approx(math.log(4) / 2)
    assert to_numpy(log_q.grad).tolist() == [[-0.5, 0, 0], [-0.25, -0.25, 0]]
    assert to_numpy(p.grad)[:, 2].tolist() == [0, 0]


@pytest.mark.parametrize("loss", [F.nll_loss, F.cross_entropy])
def test_a_loss_of_no_target_is_nan_as_in_pytorch(loss):
    """And changes nothing: its gradient is zero."""
    for ways in (contextlib.nullcontext(), by_definition()):
        x = Tensor(C.normal(2, 3), requires_grad=True)
        with ways:
            y = loss(x, np.array([-100, -100]))
            y.backward()
        assert math.isnan(y.item()) and x.grad.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_what_does_not_count_adds_nothing_whatever_its_logits_are(smoothing, xp):
    counted, bad = C.normal(1, 4), np.array([[-np.inf, 1, 2, 3], [math.nan] * 4])
    for ways in (contextlib.nullcontext(), by_definition()):
        x = Tensor(xp.asarray(np.concatenate([bad, counted])), requires_grad=True)
        alone = Tensor(xp.asarray(counted), requires_grad=True)
        with ways, np.errstate(invalid="ignore"):
            y = F.cross_entropy(x, xp.asarray(np.array([-100, -100, 2])), label_smoothing=smoothing)
            F.cross_entropy(alone, xp.asarray(np.array([2])), label_smoothing=smoothing).backward()
            y.backward()
        assert math.isfinite(y.item())
        np.testing.assert_allclose(to_numpy(x.grad)[2:], to_numpy(alone.grad), rtol=1e-12)
        assert not to_numpy(x.grad)[:2].any()


def test_a_target_without_probability_costs_infinitely_much_smoothed_or_not(xp):
    x = Tensor(xp.asarray(np.array([[-np.inf, 1.0, 2.0]])))
    for smoothing in (0, 0.1):
        assert F.cross_entropy(x, xp.asarray(np.array([0])), label_smoothing=smoothing).item() == math.inf


def test_logsumexp_of_infinities_is_infinite():
    x = np.array([[-np.inf, -np.inf], [np.inf, 1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        assert F.logsumexp(Tensor(x)).data.tolist() == [-np.inf, np.inf]


def test_an_element_named_twice_gets_both_gradients():
    """In whatever form the index names it."""
    for index in [((0, 0), (1, 1)), ([0, 0], [1, 1]), (np.array([0, 0]), 1), (Tensor([0, 0]), Tensor([1, 1]))]:
        x = Tensor(np.ones((2, 2)), requires_grad=True)
        x[index].sum().backward()
        assert x.grad.tolist() == [[0, 2], [0, 0]]


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "silu", "gelu", "softmax"])
def test_float16_is_computed_by_the_definition(name):
    """As the kernels' sums of squares would overflow, and their exponentials leave its range earlier."""
    x = (10 * C.normal(2, 1024)).astype(np.float16)
    weights = {"layer_norm": 2, "rms_norm": 1}.get(name, 0)
    y = getattr(F, name)(Tensor(x), *[Tensor(np.ones(1024, np.float16))] * weights)
    with by_definition():
        expected = getattr(F, name)(Tensor(x), *[Tensor(np.ones(1024, np.float16))] * weights)
    assert y.dtype == np.float16 and np.abs(y.data).max() > 0
    np.testing.assert_array_equal(y.data, expected.data)


def test_argmax_gives_plain_integers_and_records_no_graph(xp):
    array = np.array([[1.0, 5.0, 5.0], [7.0, 0.0, 2.0]])
    x = Tensor(xp.asarray(array), requires_grad=True)
    for found, expected in (
        (x.argmax(), 3), (x.argmax(-1), [1, 0]), (F.argmax(x, axis=0), [1, 0, 0]),
        (x.argmax(axis=1, keepdims=True), [[1], [0]]), (F.argmax(x.data, 1), [1, 0]),
    ):  # fmt: skip
        assert not isinstance(found, Tensor) and found.dtype == np.int64
        assert to_numpy(xp.asarray(found)).tolist() == expected
    assert x[xp.arange(2), x.argmax(1)].data.tolist() == [5.0, 7.0]


@pytest.mark.parametrize("name", "exp sigmoid softplus logsigmoid silu gelu tanh softmax log_softmax logsumexp".split())
def test_extreme_inputs_give_the_limits_without_overflow(name):
    x = np.array([[-1e4, 0.0, 3.0], [1e4, -1e4, 1.0]], np.float32)
    if name == "exp":
        x = np.minimum(x, 80)
    t = Tensor(x, requires_grad=True)
    with np.errstate(all="raise", under="ignore"):
        y = REGISTRY[name](t)
        y.backward(np.ones(y.shape, np.float32))
    assert np.isfinite(y.data).all() and np.isfinite(t.grad).all()
    limits = {"sigmoid": [0, 1], "softplus": [0, 1e4], "logsigmoid": [-1e4, 0], "tanh": [-1, 1]}
    limits |= {"silu": [0, 1e4], "gelu": [0, 1e4]}
    if name in limits:
        np.testing.assert_allclose([y.data[0, 0], y.data[1, 0]], limits[name], atol=1e-6)


# -------------------------------------------------------------------------------------- float16, dropout, ties


HALF = {  # op -> (call, input, weight)
    "linear": (F.linear, (3, 4), (5, 4)),
    "addmm": (lambda x, w: F.addmm(None, x, w), (3, 4), (4, 5)),
    "linear_cross_entropy": (
        lambda x, w: F.linear_cross_entropy(x, w, xp_of(x.data).asarray([0, 1, 2])),
        (3, 4),
        (5, 4),
    ),
    "embedding": (lambda x, w: F.embedding(xp_of(w.data).asarray([0, 1, 1]), w), (3, 4), (5, 4)),
    "layer_norm": (lambda x, w: F.layer_norm(x, w, w.detach()), (3, 4), (4,)),
    "rms_norm": (F.rms_norm, (3, 4), (4,)),
}


def test_float16_inputs_overflow_no_sum_whatever_the_weights_are():
    x, ones = Tensor(np.full((1, 1024), 30, np.float16) * np.tile([1, -1], 512).astype(np.float16)), Tensor(np.ones(1024, "f"))
    for y in (F.rms_norm(x, ones), F.layer_norm(x, ones, ones * 0)):
        np.testing.assert_allclose(np.abs(y.data), 1, rtol=1e-3)


def test_swiglu_broadcasts():
    gate, up = (Tensor(np.ones(shape, "f"), requires_grad=True) for shape in ((3, 1), (3, 4)))
    F.swiglu(gate, up).sum().backward()
    assert gate.grad.shape == (3, 1) and up.grad.shape == (3, 4)


def test_an_index_of_few_bits_names_rows_of_many():
    x = Tensor(np.zeros((300, 2), "f"), requires_grad=True)
    x[np.array([5, 7, 5], np.uint8)].sum().backward()
    assert x.grad[[5, 7, 9], 0].tolist() == [2, 1, 0]


@pytest.mark.parametrize("context", [contextlib.nullcontext, by_definition])
@pytest.mark.parametrize("name", list(HALF))
def test_weights_stored_in_float16_are_widened_when_used(name, context, xp):
    fn, x_shape, w_shape = HALF[name]
    x, half = big(*x_shape), big(*w_shape, seed=1).astype(np.float16)
    results = []
    for weight in (half, half.astype(np.float32)):
        t = Tensor(xp.asarray(x), requires_grad=True)
        w = Tensor(xp.asarray(weight), requires_grad=True)
        with context():
            y = fn(t, w)
            y.backward(xp.asarray(big(*y.shape, seed=2)))
        assert y.dtype == np.float32
        assert w.grad.dtype == weight.dtype
        results.append([to_numpy(a) for a in (y.data, w.grad, *([t.grad] if t.grad is not None else []))])
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1].astype(np.float16))


def test_to_converts_between_float_types_and_its_gradient_back():
    x = Tensor(C.normal(3), requires_grad=True)
    y = x.to(np.float16)
    assert y.dtype == np.float16
    y.backward(np.array([1, 2, 3], np.float16))
    assert x.grad.dtype == np.float64 and x.grad.tolist() == [1, 2, 3]


def test_dropout_keeps_the_mean_and_its_mask_depends_on_the_row_alone(xp):
    x = np.ones((400, 30, 10), np.float32)

    def dropped(rng, rows=slice(None)):
        return to_numpy(F.dropout(Tensor(xp.asarray(x[rows])), 0.25, rng).data)

    y = dropped(Rng(7, 1))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / y.size)
    assert abs(np.corrcoef(y[:-1].ravel(), y[1:].ravel())[0, 1]) < 5 / np.sqrt(y.size)  # adjacent rows
    assert abs(np.corrcoef(y[:, :-1].ravel(), y[:, 1:].ravel())[0, 1]) < 5 / np.sqrt(y.size)
    np.testing.assert_array_equal(dropped(Rng(7, 1, first_row=100), slice(100, 200)), y[100:200])
    np.testing.assert_array_equal(dropped(Rng(7, 1).take([30, 2]), slice(2)), y[[30, 2]])
    np.testing.assert_array_equal(dropped(Rng(7).at(1)), y)
    assert (dropped(Rng(7, 2)) != y).any()
    behind = dropped(Rng(7, 1).behind([0, 4]), slice(2))
    np.testing.assert_array_equal(behind[0], y[0])
    np.testing.assert_array_equal(behind[1, 4:], y[1, :-4])
    assert not behind[1, :4].any()


def test_dropout_masks_value_and_gradient_alike_on_every_device(xp):
    for rng in (Rng(3), xp.random.default_rng(3)):
        x = Tensor(xp.asarray(np.full((40, 30), 2.0, np.float32)), requires_grad=True)
        y = F.dropout(x, 0.5, rng)
        y.backward(xp.asarray(np.ones((40, 30), np.float32)))
        value, gradient = to_numpy(y.data), to_numpy(x.grad)
        assert 0.4 < (value == 0).mean() < 0.6
        np.testing.assert_array_equal(value, 2 * gradient)


def test_ties_share_the_gradient():
    a, b = Tensor(np.array([1.0, 2.0]), requires_grad=True), Tensor(np.array([1.0, 1.0]), requires_grad=True)
    F.maximum(a, b).backward(np.array([1.0, 1.0]))
    assert a.grad.tolist() == [0.5, 1.0] and b.grad.tolist() == [0.5, 0.0]
    a.grad = b.grad = None
    F.minimum(a, b).backward(np.array([1.0, 1.0]))
    assert a.grad.tolist() == [0.5, 0.0] and b.grad.tolist() == [0.5, 1.0]
    x = Tensor(np.array([[3.0, 3.0, 1.0]]), requires_grad=True)
    x.max(axis=1).backward(np.array([1.0]))
    assert x.grad.tolist() == [[0.5, 0.5, 0.0]]
    c = Tensor(np.array([-1.0, 0.0, 1.0]), requires_grad=True)
    F.clip(c, -1.0, 0.5).backward(np.ones(3))
    assert c.grad.tolist() == [1.0, 1.0, 0.0]
    c.grad = None
    F.abs(c).backward(np.ones(3))
    assert c.grad.tolist() == [-1.0, 0.0, 1.0]


def test_stack_gives_numpys_values_along_every_axis_of_one_tensor_too():
    a, b = C.normal(2, 3), C.normal(2, 3, seed=1)
    for axis in range(-3, 3):
        for arrays in ([a], [a, b]):
            np.testing.assert_array_equal(F.stack(list(map(Tensor, arrays)), axis).data, np.stack(arrays, axis))
    np.testing.assert_array_equal(F.stack([Tensor(a), Tensor(b)]).data, np.stack([a, b]))


def test_softmax_and_logsumexp_run_along_the_last_axis_unless_told():
    x = Tensor(C.normal(2, 3, 4))
    for op in (F.softmax, F.log_softmax, F.logsumexp):
        np.testing.assert_array_equal(op(x).data, op(x, axis=2).data)


def test_linear_scales_the_product_alone_by_any_alpha(xp):
    x, w, b = (C.normal(*shape).astype(np.float32) for shape in ((3, 4), (5, 4), (5,)))
    for alpha in (0, 0.5, 1, 2):
        y = F.linear(*(Tensor(xp.asarray(a)) for a in (x, w, b)), alpha=alpha)
        close(to_numpy(y.data), alpha * (x @ w.T) + b, 1e-6)


def test_a_float64_weight_is_not_narrowed_to_the_input(xp):
    x, w = C.normal(3, 4).astype(np.float32), C.normal(4, 4)
    y = F.linear(Tensor(xp.asarray(x)), Tensor(xp.asarray(w)))
    np.testing.assert_allclose(to_numpy(y.data), x @ w.T, rtol=1e-12)


def test_what_has_no_probability_adds_nothing_however_improbable_the_model_finds_it(xp):
    logits = xp.asarray(np.array([[0.0, -np.inf, 0.0]]))
    loss = F.cross_entropy(Tensor(logits), xp.asarray(np.array([0])))
    assert loss.item() == pytest.approx(math.log(2))
    target = Tensor(xp.asarray(np.array([[0.5, 0.0, 0.5]])), requires_grad=True)
    for log_q in ([-1.0, -2.0, -0.5], [-1.0, -np.inf, -0.5]):
        target.grad = None
        loss = F.kl_div(Tensor(xp.asarray(np.array([log_q]))), target)
        loss.backward()
        assert loss.item() == pytest.approx(math.log(0.5) + 0.75)
        assert to_numpy(target.grad)[0, 1] == 0


def test_with_a_cache_keys_and_values_have_no_gradient_and_say_so(xp):
    angle = xp.asarray(np.zeros((1, 2, 2)))
    cache = (xp.asarray(np.ones((1, 1, 5, 4))), xp.asarray(np.ones((1, 1, 5, 4))), 3)
    for i in (1, 2):
        qkv = [Tensor(xp.asarray(C.normal(1, 2, 4)), requires_grad=i == j) for j in range(3)]
        with pytest.raises(AutogradError, match=r"rotary_attention: the input of shape .* has no derivative"):
            F.rotary_attention(*qkv, angle, angle, cache=cache)


@pytest.mark.parametrize("context", [contextlib.nullcontext, by_definition])
def test_with_a_cache_the_queries_have_a_gradient(context, xp):
    angle = xp.asarray(C.normal(1, 2, 2))
    q, k, v = (Tensor(xp.asarray(C.normal(1, 2, 4, seed=i)), requires_grad=i == 0) for i in range(3))
    earlier = [C.normal(1, 1, 5, 4, seed=i) for i in (3, 4)]
    cache = (*map(xp.asarray, earlier), 3)
    with context():
        F.rotary_attention(q, k, v, xp.cos(angle), xp.sin(angle), cache=cache).sum().backward()
    eps = 1e-6
    step = xp.zeros_like(q.data)
    step[0, 1, 2] = eps
    losses = [
        F.rotary_attention(q.detach() + sign * step, k, v, xp.cos(angle), xp.sin(angle), cache=cache).sum().item()
        for sign in (1, -1)
    ]
    assert q.grad[0, 1, 2].item() == pytest.approx((losses[0] - losses[1]) / (2 * eps), abs=1e-7)


def test_a_cache_of_float64_keeps_what_float32_gives(xp):
    q, k, v = (Tensor(xp.asarray(C.normal(1, 1, 4, seed=i).astype("f"))) for i in range(3))
    angle = xp.asarray(C.normal(1, 1, 2).astype("f"))
    found = []
    for dtype in ("f", "d"):
        cache = (*(xp.asarray(C.normal(1, 1, 5, 4, seed=i).astype("f").astype(dtype)) for i in (3, 4)), 3)
        found.append(to_numpy(F.rotary_attention(q, k, v, xp.cos(angle), xp.sin(angle), cache=cache).data))
    np.testing.assert_allclose(*found, atol=1e-5)


def test_transpose_takes_the_axes_one_by_one_as_a_tuple_or_not_at_all():
    a = C.normal(2, 3, 4)
    for axes in ((2, 0, 1), ((2, 0, 1),), ([2, 0, 1],), ()):
        np.testing.assert_array_equal(Tensor(a).transpose(*axes).data, a.transpose(*axes))


def test_dropout_of_nothing_gives_its_input_and_draws_nothing():
    x, generator = Tensor(C.normal(3, 4)), np.random.default_rng(0)
    assert np.shares_memory(F.dropout(x, 0.0, generator).data, x.data)
    assert generator.random() == np.random.default_rng(0).random()


# ---------------------------------------------------------------------------------------------------------- misuse


def ones(*shape):
    return Tensor(np.ones(shape))


def misused_attention(*heads, mask=None):
    return lambda: F.scaled_dot_product_attention(*(ones(1, h, 2, 4) for h in heads), mask)


MISUSE = [
    (lambda: ones(2, 3) + ones(2, 4), ValueError, r"^add: shapes \(2, 3\) and \(2, 4\) cannot be broadcast together"),
    (lambda: ones(3) * ones(4), ValueError, r"^mul: shapes \(3,\) and \(4,\)"),
    (lambda: ones(3) - ones(4), ValueError, r"^sub: shapes \(3,\) and \(4,\)"),
    (lambda: F.maximum(ones(3), ones(4)), ValueError, r"^maximum: shapes \(3,\) and \(4,\)"),
    (lambda: F.where(np.ones(2, bool), ones(3), ones(4)), ValueError, r"^where: shapes \(2,\), \(3,\) and \(4,\)"),
    (lambda: ones(2, 3) @ ones(2, 3), ValueError, r"^matmul: shapes \(2, 3\) and \(2, 3\)"),
    (
        lambda: ones(2, 3, 4) @ ones(5, 4, 2),
        ValueError,
        r"^matmul: shapes \(2, 3, 4\) and \(5, 4, 2\) cannot be broadcast",
    ),
    (lambda: F.linear(ones(2, 3), ones(5, 4)), ValueError, r"^linear: input \(2, 3\).*\(5, 4\).*must be 4"),
    (lambda: F.linear(ones(2, 3), ones(5, 3), ones(3)), ValueError, r"^linear: bias \(3,\).*\(5,\)"),
    (lambda: F.addmm(None, ones(2, 3), ones(4, 3)), ValueError, r"^addmm: input \(2, 3\).*\(4, 3\).*must be 4"),
    (lambda: F.addmm(ones(3), ones(2, 3), ones(3, 5)), ValueError, r"^addmm: bias \(3,\).*must be \(5,\)"),
    (lambda: F.layer_norm(ones(2, 3), ones(4), ones(3)), ValueError, r"^layer_norm: weight \(4,\).*\(2, 3\)"),
    (lambda: F.layer_norm(ones(2, 3), ones(3), ones(4)), ValueError, r"^layer_norm: bias \(4,\).*\(2, 3\)"),
    (lambda: F.rms_norm(ones(2, 3), ones(4)), ValueError, r"^rms_norm: weight \(4,\).*\(2, 3\)"),
    (
        lambda: F.rotary_attention(ones(1, 3, 8), ones(1, 3, 6), ones(1, 3, 4), np.ones((1, 3, 2)), np.ones((1, 3, 2))),
        ValueError,
        r"rotary_attention: q \(1, 3, 8\), k \(1, 3, 6\)",
    ),
    (lambda: F.embedding(np.array([0, 7]), ones(5, 2)), IndexError, r"token id 7 .*0\.\.4"),
    (lambda: F.embedding(np.array([-1]), ones(5, 2)), IndexError, r"token id -1 .*0\.\.4"),
    (lambda: F.embedding(np.array([0.0]), ones(5, 2)), TypeError, "integers, not float64"),
    (lambda: F.cross_entropy(ones(2, 3), np.array([0])), ValueError, r"^cross_entropy: .*\(1,\).*\(2,\)"),
    (lambda: F.cross_entropy(ones(2, 3), np.array([0, 3])), IndexError, r"^cross_entropy: target 3 .*0\.\.2"),
    (lambda: F.cross_entropy(ones(2, 3), np.array([0, -1])), IndexError, r"target -1 .*0\.\.2"),
    (lambda: F.cross_entropy(ones(2, 3), np.array([0.0, 1.0])), TypeError, "integer class ids, not float64"),
    (
        lambda: F.linear_cross_entropy(ones(2, 3), ones(5, 4), np.array([0, 1])),
        ValueError,
        r"^linear_cross_entropy: input \(2, 3\).*\(5, 4\)",
    ),
    (
        lambda: F.linear_cross_entropy(ones(2, 3), ones(5, 3), np.array([0, 5])),
        IndexError,
        r"^linear_cross_entropy: target 5 .*0\.\.4",
    ),
    (lambda: F.nll_loss(ones(2, 3), np.array([0, 3])), IndexError, r"^nll_loss: target 3 .*0\.\.2"),
    (lambda: F.nll_loss(ones(2, 3), np.array([0])), ValueError, r"^nll_loss: .*\(1,\).*\(2,\)"),
    (lambda: F.mse_loss(ones(3), ones(3, 1)), ValueError, r"^mse_loss: input \(3,\) and target \(3, 1\)"),
    (lambda: F.kl_div(ones(2, 3), ones(3)), ValueError, r"^kl_div: input \(2, 3\) and target \(3,\)"),
    (lambda: F.cross_entropy(ones(1, 3), np.array([0]), label_smoothing=1.5), ValueError, r"lie in \[0, 1\], not 1\.5"),
    (
        lambda: F.linear_cross_entropy(ones(1, 3), ones(5, 3), np.array([0]), label_smoothing=-1),
        ValueError,
        r"label_smoothing must lie in \[0, 1\], not -1",
    ),
    (lambda: ones(2, 1).var(axis=1), ValueError, r"^var: 1 elements .* correction=1"),
    (lambda: ones(2, 3).var(axis=2), IndexError, "axis 2 is out of range"),
    (lambda: ones(2, 3).argmax(2), IndexError, "axis 2 is out of range"),
    (lambda: ones(2, 3).reshape(4, 2), ValueError, r"\(2, 3\) cannot be seen as \(4, 2\)"),
    (lambda: F.cat([ones(2, 3), ones(2, 4)]), ValueError, r"\(2, 3\), \(2, 4\) differ outside axis 0"),
    (lambda: F.gather(ones(2, 3), np.zeros((3, 1), int)), ValueError, r"\(3, 1\).*\(2, 3\)"),
    (lambda: F.gather(ones(2, 3), np.full((2, 1), -1)), IndexError, r"^gather: index -1 .*0\.\.2"),
    (lambda: F.gather(ones(2, 3), np.full((2, 1), 3)), IndexError, r"^gather: index 3 .*0\.\.2"),
    (lambda: F.cat([ones(2, 3), ones(2, 4)], axis=2), IndexError, "axis 2 is out of range"),
    (lambda: F.cat([]), ValueError, "^cat: there are no tensors to join"),
    (lambda: F.reshape(ones(6), 5), ValueError, r"\(6,\) cannot be seen as \(5,\)"),
    (lambda: F.dropout(ones(3), 1.0, Rng(0)), ValueError, r"\[0, 1\), not 1.0"),
    (misused_attention(3, 2, 2), ValueError, r"q \(1, 3, 2, 4\), k \(1, 2, 2, 4\)"),
    (misused_attention(2, 2, 2, mask=np.ones((3, 3), bool)), ValueError, r"\(3, 3\).*\(1, 2, 2, 2\)"),
    (misused_attention(2, 2, 2, mask=np.ones((2, 2), int)), TypeError, "not int64"),
]


@pytest.mark.parametrize("call, error, message", MISUSE, ids=[m[2] for m in MISUSE])
def test_misuse_names_what_is_wrong_by_kernels_and_definitions_in_the_same_words(call, error, message):
    with pytest.raises(error, match=message) as fast:
        call()
    with by_definition(), pytest.raises(error) as plain:
        call()
    assert str(fast.value) == str(plain.value)


@pytest.mark.parametrize("fn", [F.add, F.sub, F.div, F.maximum, F.matmul, F.rms_norm])
def test_arrays_of_two_libraries_are_refused(fn):
    with pytest.raises(BackendError, match=r"\(numpy and strict_device\).*to_numpy or"):
        fn(ones(3), Tensor(strict_device.ones(3)))


# ------------------------------------------------------------------------------------------------------ gradcheck


def wrong(value, pullback):
    """A function with a pullback of one's own, without entering it into the registry."""
    from minipeft.autograd.tensor import Node

    def fn(x):
        y = Tensor(value(x.data))
        y._node, y.requires_grad = Node("wrong", [(x, lambda g: pullback(x.data, g), x.shape, x.dtype)]), True
        return y

    return fn


def spoil(g, index, factor):
    g = np.array(g)
    g[index] *= factor
    return g


WRONG = {
    "a wrong factor": (np.exp, lambda x, g: 1.00001 * g * np.exp(x)),
    "a softmax whose pullback is zero": (naive_softmax, lambda x, g: 0 * g),
    "a softmax without its sum": (naive_softmax, lambda x, g: g * naive_softmax(x)),
    "a sum over a broadcast axis forgotten": (lambda x: x * np.ones((3, 1, 1)), lambda x, g: g[0]),
    "a wrong sign": (lambda x: -x, lambda x, g: g),
    "the derivative of the mean for that of the sum": (lambda x: x.sum(0), lambda x, g: g / len(x) + 0 * x),
    "a gradient that ignores the cotangent": (np.exp, lambda x, g: np.exp(x)),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_gradcheck_catches(name):
    with pytest.raises(GradcheckError, match="pullback") as caught:
        gradcheck(wrong(*WRONG[name]), C.normal(4, 5))
    e = caught.value
    assert e.input == 0 and len(e.index) == 2 and abs(e.pullback - e.difference) > e.tolerance / 20


@pytest.mark.parametrize("shape, index", [((4, 5), (2, 3)), ((3, 5000), (1, 777)), ((), ())])
def test_gradcheck_finds_the_one_wrong_element(shape, index):
    x = C.normal(*shape)
    with pytest.raises(GradcheckError) as caught:
        gradcheck(wrong(np.exp, lambda x, g: spoil(g * np.exp(x), index, 1.3)), x, name="mine")
    e = caught.value
    assert (e.name, e.input, e.index) == ("mine", 0, index)
    assert e.pullback == pytest.approx(1.3 * e.difference, rel=1e-6)
    assert (
        "mine" in str(e) and f"{e.pullback:.9g}" in str(e) and f"{e.difference:.9g}" in str(e) and str(index) in str(e)
    )


def test_gradcheck_names_the_input_and_the_subset():
    def fn(a, b):
        return F.mul(a, b) if a.requires_grad else F.mul(a, b) * 1.0 + (b * b).detach()

    with pytest.raises(GradcheckError, match=r"input 1 .*requiring gradients: 1"):
        gradcheck(fn, C.normal(2, 3), C.normal(3))


def test_gradcheck_works_in_float64_and_passes_on_integers_options_and_scalars():
    seen = []

    def fn(x, ids, options):
        seen.append((x.dtype, ids.dtype, options))
        return x[ids] * 2.0

    result = gradcheck(fn, C.normal(4, 2).astype(np.float32), np.array([0, 3]), None)
    assert result and result.deviation < 1e-10 and result.comparisons == 2
    assert set(seen) == {(np.dtype(np.float64), np.dtype(np.int64), None)}
    assert gradcheck(F.exp, np.float64(0.3)) and gradcheck(F.exp, Tensor(C.normal(2)))


class HandWritten:
    """A layer as one writes it without an engine: tanh(x Wᵀ + b), which remembers what its backward needs."""

    def __init__(self, slip=None):
        self.W, self.b, self.slip = C.normal(5, 4), C.normal(5), slip

    def forward(self, x):
        self.x = x
        self.y = np.tanh(x @ self.W.T + self.b)
        return self.y

    def backward(self, g):
        h = g * (1 - (self.y if self.slip == "square" else self.y**2))
        self.dW, self.db = h.T @ self.x, h if self.slip == "sum" else h.sum(0)
        return spoil(h @ self.W, (1, 2), 1.001) if self.slip == "element" else h @ self.W


def with_parameters(layer):
    def forward(x, W, b):
        layer.W, layer.b = W, b
        return layer.forward(x)

    def backward(g, x, W, b):
        return layer.backward(g), layer.dW, layer.db

    return forward, backward


LAYER = HandWritten()


def through(layer):
    return lambda x: layer.forward(x)


def test_gradcheck_judges_a_backward_written_by_hand():
    layer, x = HandWritten(), C.normal(3, 4)
    assert gradcheck(layer.forward, x, backward=layer.backward).deviation < 1e-10
    assert gradcheck(through(layer), x, backward=layer.backward).derivative == "yours"
    tensor = Tensor(np.ones(4), requires_grad=True)  # whose backward is the library's
    assert gradcheck(lambda x: x * tensor, x).derivative == "the library's own"
    forward, backward = with_parameters(layer)
    assert gradcheck(forward, x, layer.W, layer.b, backward=backward).comparisons == 24  # 12 in 7 subsets, twice
    rows = np.array([[2], [0], [1]])
    assert gradcheck(lambda x, i: x[i].sum(), x, np.array([0, 0, 2]), backward=lambda g, x, i: g * rows + 0 * x)
    assert gradcheck(lambda x: float((x**2).sum()), x, backward=lambda g, x: [2 * g * x])
    with pytest.raises(GradcheckError, match=r"mine: the pullback of input 0 .*element \(1, 2\)") as caught:
        slipped = HandWritten("element")
        gradcheck(slipped.forward, x, backward=slipped.backward, name="mine")
    e = caught.value
    assert e.index == (1, 2) and e.pullback == pytest.approx(1.001 * e.difference, rel=1e-6) and e.tolerance < 1e-5


@pytest.mark.parametrize(
    "slip, message",
    [
        ("square", "the pullback of input 0 .* disagrees"),
        ("sum", r"backward gives input 2 a gradient of shape \(3, 5\); the input has \(5,\)"),
    ],
)
def test_gradcheck_finds_a_slip_in_the_backward_of_a_layer_and_its_parameters(slip, message):
    layer = HandWritten(slip)
    forward, backward = with_parameters(layer)
    with pytest.raises(GradcheckError, match=message):
        gradcheck(forward, C.normal(3, 4), layer.W, layer.b, backward=backward)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: gradcheck(HandWritten().forward, x), TypeError, "HandWritten has a backward of its own"),
        (lambda x: gradcheck(HandWritten(), x), TypeError, r"gradcheck\(layer.forward, x, backward=layer.backward\)"),
        (lambda x: gradcheck(lambda x: LAYER.forward(x), x), TypeError, "HandWritten has a backward of its own"),
        (lambda x: gradcheck(through(HandWritten()), x), TypeError, "HandWritten has a backward of its own"),
        (lambda x: gradcheck(partial(through(HandWritten())), x), TypeError, "HandWritten has a backward of its own"),
        (lambda x: gradcheck(partial(HandWritten().forward), x), TypeError, "HandWritten has a backward of its own"),
        (lambda x: gradcheck(lambda x, layer=LAYER: layer.forward(x), x), TypeError, "has a backward of its own"),
        (lambda x: gradcheck(np.tanh, x), TypeError, r"of plain arrays .* gradcheck\(fn, x, backward=...\)"),
        (lambda x: gradcheck(lambda x: np.where(x > 0, x, 0), x), TypeError, "not ndarray; of a function of plain"),
        (lambda x: gradcheck(F.exp, x, backward=lambda g, x: g), TypeError, "must return a plain array, not a Tensor"),
        (lambda x: gradcheck(lambda x: (x, x), x, backward=lambda g, x: g), TypeError, "a plain array, not a tuple"),
        (lambda x: gradcheck(np.add, x, x, backward=lambda g, a, b: g), GradcheckError, "no gradient for input 1"),
        (lambda x: gradcheck(np.exp, x, backward=lambda g, x: (g, g)), GradcheckError, "2 gradients for 1 inputs"),
        (lambda x: gradcheck(np.exp, x, backward=lambda g, x: np.multiply(g, x, out=g)), GradcheckError, "writes into"),
    ],
)
def test_gradcheck_does_not_pass_over_a_backward_in_silence(call, error, message):
    with pytest.raises(error, match=message):
        call(C.normal(3, 4))


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda x: F.log(x - 10.0), r"result of shape \(2,\) is nan at \(0,\)"),
        (lambda x: x * np.random.default_rng().random(), "two different values"),
        (wrong(np.exp, lambda x, g: g * np.nan), r"gradient of input 0 is nan at \(0,\)"),
        (wrong(np.exp, lambda x, g: np.multiply(g, np.exp(x), out=g)), "writes into the gradient"),
        (lambda x: (x * 2.0).detach(), "disagrees with the central difference"),
        (lambda x: F.relu(x - np.array([1.0, 2.0])), "kink"),
    ],
)
def test_gradcheck_reports(fn, message):
    with np.errstate(invalid="ignore"), pytest.raises(GradcheckError, match=message):
        gradcheck(fn, np.array([1.0, 2.0]))


def test_gradcheck_refuses_to_judge_nothing():
    with pytest.raises(ValueError, match="no floating-point array"):
        gradcheck(lambda i: Tensor(i), np.arange(3))
    with pytest.raises(TypeError, match="must return a Tensor, not ndarray"):
        gradcheck(lambda x: x.data, C.normal(2))


def test_gradcheck_judges_on_the_device_too(xp):
    x, weight = xp.asarray(C.normal(2, 4)), xp.asarray(C.normal(3, 4))
    assert gradcheck(F.linear, x, weight).deviation < 1e-9
    assert gradcheck(lambda x: x * x, x, backward=lambda g, x: 2 * g * x).deviation < 1e-9


# ---------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_every_parameter_of_a_whole_model(dialect):
    shape = dict(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=8)
    shape["initializer_range"] = 0.3
    if dialect == "llama":
        shape |= dict(num_key_value_heads=2, intermediate_size=12, tie_word_embeddings=False)
    model = minipeft.Transformer(getattr(minipeft.TransformerConfig, dialect)(**shape), seed=1)
    generator = np.random.default_rng(0)
    for p in model.parameters():  # biases of zero and norms of one would hide mistakes
        p.data = (p.data + 0.1 * generator.standard_normal(p.shape)).astype(np.float32)
    before = {name: a.copy() for name, a in model.state_dict().items()}
    ids = generator.integers(0, 11, (2, 6))
    mask = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    parameters = dict(model.named_parameters())
    found = list(check_parameters(lambda: model(ids, attention_mask=mask), parameters))
    assert [name for name, _, _ in found] == list(parameters)
    assert [error for _, _, error in found if error] == [] and max(d for _, d, _ in found) < 1e-7
    labels = np.where(mask == 1, ids, -100)
    losses = list(check_parameters(lambda: model.loss(ids, labels, attention_mask=mask), parameters))
    assert [error for _, _, error in losses if error] == []
    for name, p in parameters.items():
        np.testing.assert_array_equal(p.data, before[name])
        assert p.dtype == np.float32 and p.grad is None and p.requires_grad


def test_a_wrong_parameter_is_named_and_the_others_are_judged_on():
    a, b = Tensor(C.normal(2, 3), requires_grad=True), Tensor(C.normal(3), requires_grad=False)
    found = list(check_parameters(lambda: a * 2.0 + (b * 3.0).detach(), {"a": a, "b": b}))
    assert [(name, error is None) for name, _, error in found] == [("a", True), ("b", False)]
    assert found[1][2].input == "b" and not b.requires_grad
