"""Every device form against the plain definition that it computes in the place of, on CuPy: `pytest --device cupy`.

test_ops compares the two in float64, on all cases of every op; here is what those leave out.
"""

from __future__ import annotations

import importlib
from functools import partial

import numpy as np
import pytest
from test_kernels import attention, far_apart, hidden, qkv
from test_ops import by_definition, cases_of, close, every_case, run

from minipeft import functional as F
from minipeft.autograd import cases as C
from minipeft.autograd.autocast import autocast
from minipeft.autograd.tensor import REGISTRY, Tensor, no_grad
from minipeft.backend import Rng, to_numpy

FORMS = [name for name, fn in REGISTRY.items() if fn.__module__ == F.__name__ and "cupy" in fn.forms]
targets = C.integers(5000, 7)
some = np.where(targets % 3 == 0, -100, targets)
EDGES = {  # rows longer than the threads of a block, and shorter than a warp; what only kernels take apart
    "swiglu": [
        C.Case("large values", F.swiglu, (200 * C.normal(7, 30), C.normal(7, 30, seed=1))),
        C.Case("broadcast", F.swiglu, (C.normal(7, 1), C.normal(3, 1, 5))),
    ],
    "rms_norm": [C.Case(f"{d} channels", F.rms_norm, (C.normal(5, d), C.positive(d))) for d in (1, 31, 5000)],
    "layer_norm": [
        C.Case(f"{d} channels", F.layer_norm, (C.normal(5, d) + 50, C.positive(d), C.normal(d))) for d in (1, 31, 5000)
    ],
    "dropout": [
        C.Case("many numbers", lambda x: F.dropout(x, 0.3, Rng(3, 4, first_row=5)), (C.normal(5, 13, 97),)),
        C.Case("behind padding", lambda x: F.dropout(x, 0.3, Rng(3).behind([0, 7, 2])), (C.normal(3, 7, 9),)),
    ],
    "embedding": [C.Case("repeated ids", F.embedding, (C.integers(7, 3, 100), C.normal(9, 40)))],
    "scaled_dot_product_attention": [
        C.Case("a cache longer than the queries", attention(is_causal=True), qkv(2, 4, 2, 7, 15)),
        C.Case("more queries than keys", attention(is_causal=True), qkv(1, 4, 1, 13, 6)),
        C.Case("long rows", attention(is_causal=True), qkv(1, 2, 1, 3, 5000)),
        C.Case("no keys", attention(), qkv(1, 2, 1, 3, 0)),
        C.Case("no keys, causal", attention(is_causal=True), qkv(1, 2, 1, 3, 0)),
        C.Case("rows that see nothing", attention(is_causal=True), qkv(2, 4, 2, 3, 5), (~hidden,)),
        C.Case("scores far apart", attention(is_causal=True), tuple(9 * a for a in qkv(1, 2, 2, 6, 6))),
    ],
    "cross_entropy": [
        C.Case("many classes", F.cross_entropy, (C.normal(7, 5000), some)),
        C.Case("many classes, smoothed", partial(F.cross_entropy, label_smoothing=0.1), (C.normal(7, 5000), some)),
        C.Case("far apart", F.cross_entropy, (far_apart, np.array([1, 2, 1]))),
    ],
    "linear_cross_entropy": [C.Case("many classes", F.linear_cross_entropy, (C.normal(7, 4), C.normal(5000, 4), some))],
}


@pytest.fixture(scope="module")
def cupy(request):
    if "cupy" not in (request.config.getoption("device") or []):
        pytest.skip("needs a GPU and CuPy: pytest --device cupy")
    return importlib.import_module("cupy")


def equal(found, expected, tolerance):
    for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        assert a.dtype == b.dtype
        close(a, b, tolerance)


@every_case(FORMS, lambda name: [*cases_of(name), *EDGES.get(name, [])])
def test_a_form_equals_its_definition_in_float32(case, cupy):
    with by_definition():
        expected = run(case, dtype=np.float32)
    equal(run(case, xp=cupy, dtype=np.float32), expected, 1e-3 if "far apart" in case.label else 3e-5)


@every_case(list(EDGES), EDGES.get)
def test_a_form_equals_its_definition_in_float64(case, cupy):
    with by_definition():
        expected = run(case)
    equal(run(case, xp=cupy), expected, 1e-12)


LAYOUTS = {
    "transposed": lambda a: a.transpose().copy().transpose(),
    "every second of a larger array": lambda a: a.repeat(2, axis=-1)[..., ::2],
    "reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
    "repeated by broadcasting": lambda a: a,  # a cotangent that is
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_case(FORMS, lambda name: cases_of(name)[:2])
def test_a_form_takes_arrays_of_any_layout(case, layout, cupy):
    def there(a):
        return cupy.asarray(a) if a.dtype.kind != "f" or not a.ndim else LAYOUTS[layout](cupy.asarray(a))

    def computed(inputs):
        inputs = [Tensor(a, requires_grad=True) if a.dtype.kind == "f" else a for a in inputs]
        y = case.fn(*inputs, *map(cupy.asarray, case.constants))
        weight = cupy.broadcast_to(cupy.asarray(C.normal(y.shape[-1] if y.ndim else 1)[: y.size]), y.shape) if y.ndim else cupy.ones(())
        y.backward(weight if layout.startswith("repeated") else LAYOUTS[layout](weight.copy()) if y.ndim else weight)
        return to_numpy(y.data), [to_numpy(t.grad) for t in inputs if isinstance(t, Tensor)]

    with by_definition():
        expected = computed([cupy.asarray(a) for a in case.inputs])
    equal(computed([there(a) for a in case.inputs]), expected, 1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_other_dtypes_are_left_to_the_definition(name, cupy):
    """float16, and two dtypes that meet, give what the definition gives, in its dtype."""
    case = cases_of(name)[0]
    for dtypes in ((np.float16, np.float16), (np.float32, np.float64), (np.float64, np.float32)):
        inputs = [a.astype(dtypes[i % 2]) if a.dtype.kind == "f" else a for i, a in enumerate(case.inputs)]
        inputs = [Tensor(cupy.asarray(a)) if a.dtype.kind == "f" else cupy.asarray(a) for a in inputs]
        constants = [cupy.asarray(a.astype(np.float32) if a.dtype.kind == "f" else a) for a in case.constants]
        found = case.fn(*inputs, *constants).data
        with by_definition():
            expected = case.fn(*inputs, *constants).data
        close(to_numpy(found).astype(np.float64), to_numpy(expected).astype(np.float64), 1e-2)


def test_an_id_or_a_target_out_of_range_gives_nan_and_reads_nothing_else(cupy):
    weight, ids = cupy.asarray(C.normal(5, 4)), cupy.asarray([0, 5, -1, 4])
    w = Tensor(weight, requires_grad=True)
    y = F.embedding(ids, w)
    assert to_numpy(y.data)[[0, 3]].tolist() == to_numpy(weight)[[0, 4]].tolist() and cupy.isnan(y.data[1:3]).all().item()
    y.backward(cupy.ones((4, 4)))
    assert to_numpy(w.grad).tolist() == [[1.0] * 4, *[[0.0] * 4] * 3, [1.0] * 4]
    for bad in (5, -1):
        logits = Tensor(cupy.asarray(C.normal(3, 5)), requires_grad=True)
        loss = F.cross_entropy(logits, cupy.asarray([1, bad, -100]))
        loss.backward()
        assert np.isnan(loss.item()) and cupy.isnan(logits.grad[1]).all().item() and not cupy.isnan(logits.grad[0]).any().item()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_weight_keeps_no_activation(frozen, cupy):
    """But for what a pullback needs, arrays go as soon as nobody else holds them."""
    n, pool = 1 << 16, cupy.get_default_memory_pool()
    x, w = Tensor(cupy.ones((n // 64, 64)), requires_grad=True), Tensor(cupy.eye(64), requires_grad=not frozen)
    before = pool.used_bytes()
    y = F.linear(F.linear(F.linear(x * 2, w), w), w)
    kept = (pool.used_bytes() - before) // (8 * n)
    assert kept == (1 if frozen else 4)
    assert y.requires_grad


def test_nan_goes_through_every_row_kernel(cupy):
    for at, fn in [
        ((1, 2), lambda x: F.rms_norm(x, cupy.ones(6))),
        ((1, 2), lambda x: F.layer_norm(x, cupy.ones(6), cupy.ones(6))),
        ((1, 2), lambda x: F.cross_entropy(x, cupy.asarray([0, 0, 0])).reshape(1, 1)),
        ((1, 2), lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], is_causal=True)[0, 0]),
        ((0, 2), lambda x: F.scaled_dot_product_attention(x[None, None, :1], *[x[None, None]] * 2)[0, 0]),
    ]:
        x = C.normal(3, 6)
        x[at] = np.nan
        y = fn(Tensor(cupy.asarray(x))).data
        assert cupy.isnan(y[-1 if len(y) == 1 else 1]).all().item()


def test_the_graph_adds_products_into_the_gradients_that_are_there(cupy):
    """A tied weight and an input of several products: the terms of both come from kernels that add."""
    x0, w0 = C.normal(3, 4), C.normal(4, 4)

    def gradients(xp):
        x, w = Tensor(xp.asarray(x0), requires_grad=True), Tensor(xp.asarray(w0), requires_grad=True)
        for _ in range(2):
            h = F.rms_norm(F.embedding(xp.asarray([1, 1, 3]), w) + x, xp.ones(4))
            (F.linear(h, w) + F.linear(h, w * 2) + h + h.swapaxes(0, 1)[..., :3].swapaxes(0, 1).sum()).sum().backward()
        return [to_numpy(x.grad), to_numpy(w.grad)]

    for a, b in zip(gradients(cupy), gradients(np), strict=True):
        close(a, b, 1e-12)


def test_decoding_reads_keys_and_values_where_the_cache_has_them(cupy):
    q, k, v = (cupy.asarray(C.normal(2, heads, n, 8)) for heads, n in ((4, 1), (2, 16), (2, 16)))
    with no_grad():
        found = F.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5], is_causal=True).data
        expected = F.scaled_dot_product_attention(q, k[:, :, :5].copy(), v[:, :, :5].copy(), is_causal=True).data
    np.testing.assert_array_equal(to_numpy(found), to_numpy(expected))


@pytest.mark.parametrize("read_first", [False, True])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_a_sum_added_later_is_the_sum(dtype, norm, read_first, cupy):
    """Whoever reads it first, the norm or another op, gets the bits of the sum, and so do gradients; a model's, too."""
    a0, b0 = (C.normal(5, 8, 6, seed=seed).astype(dtype) for seed in (0, 1))
    scale = [cupy.asarray(C.normal(6, seed=seed).astype(dtype)) for seed in range(2 if norm == "layer_norm" else 1)]

    def step(later):
        a, b = (Tensor(cupy.asarray(x).transpose(1, 0, 2), requires_grad=True) for x in (a0, b0))
        total = F.add(a, b, later=later)
        first = total * 2 if read_first else 0
        y = getattr(F, norm)(total, *scale)
        second = F.add(total, y, later=later)  # nobody's norm reads it
        (second * y + first).sum().backward()
        return to_numpy(total.data), [to_numpy(x) for x in (y.data, second.data, a.grad, b.grad)]

    equal(step(True), step(False), 0)


def test_a_sum_added_later_is_one_tensor_like_others(cupy):
    a, b = cupy.ones((2, 3)), cupy.ones((1, 3))
    assert to_numpy(F.add(a, b, later=True).data).tolist() == [[2] * 3] * 2  # of two shapes: added at once
    total = F.add(a, a, later=True)
    assert (total.shape, total.dtype, total.requires_grad, total.detach().sum().item()) == ((2, 3), a.dtype, False, 12)
    total.data = b
    assert total.shape == (1, 3)
    assert F.rms_norm(F.add(a[:0], a[:0], later=True), b[0]).shape == (0, 3)
    with autocast("float16"):
        y = F.rms_norm(F.add(a, a, later=True), b[0])
    close(to_numpy(y.data), np.ones((2, 3)), 1e-3)
