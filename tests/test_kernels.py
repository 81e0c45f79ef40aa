"""Every kernel against the plain definition that it computes in the place of: value, gradients, dtypes, refusals."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from test_ops import by_definition, cases_of, close, every_case, run

from minipeft import functional as F
from minipeft.autograd import cases as C
from minipeft.autograd.tensor import REGISTRY, AutogradError, Tensor, evaluated_by, kernel, no_grad, op
from minipeft.backend import to_numpy

KERNELS = [name for name, fn in REGISTRY.items() if fn.__module__ == F.__name__ and "numpy" in fn.forms]


def attention(**options):
    return lambda q, k, v, mask=None: F.scaled_dot_product_attention(q, k, v, mask, **options)


def qkv(B, H, kv, T, S, D=4, Dv=3):
    return C.normal(B, H, T, D), C.normal(B, kv, S, D, seed=1), C.normal(B, kv, S, Dv, seed=2)


far_apart = np.array([[1000.0, 999.0, -1000.0], [-1000.0, -1000.0, -1000.5], [0.0, 3e4, 1.0]])
targets = C.integers(300, 700)
some = np.where(targets % 3 == 0, -100, targets)
turn = C.normal(1, 130, 8)
angle, hidden, rows = C.normal(8, 32, 16), np.zeros((2, 1, 3, 5), bool), C.integers(2, 3, 1, 70, 70) == 1
hidden[1, 0, 1] = True
EDGES = {  # beside the cases that every op has: several blocks, several tiles, and what only kernels take apart
    "add": [C.Case("large", F.add, (C.normal(800, 700), C.normal(800, 700, seed=1)))],
    "mul": [C.Case("large", F.mul, (C.normal(800, 700), C.normal(800, 700, seed=1)))],
    "silu": [C.Case("blocks", F.silu, (200 * C.normal(700, 300),))],
    "swiglu": [C.Case("blocks", F.swiglu, (200 * C.normal(700, 300), C.normal(700, 300, seed=1)))],
    "gelu": [C.Case("blocks", F.gelu, (9 * C.normal(700, 300),))],
    "layer_norm": [C.Case("blocks", F.layer_norm, (C.normal(700, 300) + 50, C.positive(300), C.normal(300)))],
    "rms_norm": [C.Case("blocks", F.rms_norm, (C.normal(700, 300), C.positive(300)))],
    "rope": [C.Case("blocks", F.rope, (C.normal(8, 32, 32, 32),), (np.cos(angle), np.sin(angle)))],
    "matmul": [C.Case("threads", F.matmul, (C.normal(2, 300, 200), C.normal(200, 250)))],
    "linear": [C.Case("threads", F.linear, (C.normal(3, 400, 200), C.normal(250, 200), C.normal(250)))],
    "addmm": [C.Case("threads", F.addmm, (C.normal(250), C.normal(3, 400, 200), C.normal(200, 250)))],
    "scaled_dot_product_attention": [
        C.Case("threads", attention(is_causal=True), qkv(5, 4, 2, 130, 130, 16, 16)),
        C.Case("a cache longer than the queries", attention(is_causal=True), qkv(2, 4, 2, 70, 150)),
        C.Case("more queries than keys", attention(is_causal=True), qkv(1, 4, 1, 130, 65)),
        C.Case("no keys", attention(), qkv(1, 2, 1, 3, 0)),
        C.Case("no keys, causal", attention(is_causal=True), qkv(1, 2, 1, 3, 0)),
        C.Case("rows that see nothing", attention(is_causal=True), qkv(2, 4, 2, 3, 5), (~hidden,)),
        C.Case("masks of every row", attention(is_causal=True), qkv(3, 2, 2, 70, 70), (rows,)),
        C.Case("masks of every head", attention(), qkv(3, 2, 2, 70, 70), (C.normal(1, 2, 70, 70),)),
        *[
            C.Case(f"{T} x {S}, {H} / {kv} heads{', causal' * causal}", attention(is_causal=causal), qkv(1, H, kv, T, S))
            for T, S in [(1, 4), (63, 63), (64, 64), (65, 65), (130, 130), (65, 130), (130, 65)]
            for H, kv in [(2, 2), (4, 2), (2, 1)]
            for causal in (False, True)
        ],
        C.Case("scores far apart", attention(is_causal=True), tuple(9 * a for a in qkv(1, 2, 2, 6, 6))),
    ],
    "rotary_attention": [
        C.Case(
            "threads",
            F.rotary_attention,
            (C.normal(5, 130, 64), C.normal(5, 130, 32), C.normal(5, 130, 32, seed=1)),
            (np.cos(turn), np.sin(turn)),
        )
    ],
    "packed_attention": [
        C.Case("threads", lambda x: F.packed_attention(x, 4), (C.normal(5, 130, 192),)),
        *[
            C.Case(f"{T} positions", lambda x, m: F.packed_attention(x, 2, attn_mask=m), (C.normal(2, T, 24),), (mask,))
            for T in (1, 5, 64, 65, 130)
            for mask in (np.ones((1, 1, 1, T), bool), (np.arange(T) >= np.array([[0], [T // 2]]))[:, None, None])
        ],
    ],
    "cross_entropy": [
        C.Case("blocks", F.cross_entropy, (C.normal(700, 300), some)),
        C.Case("blocks, smoothed", partial(F.cross_entropy, label_smoothing=0.1), (C.normal(700, 300), some)),
        C.Case("far apart", F.cross_entropy, (far_apart, np.array([1, 2, 1]))),
        C.Case("ignored class 0", lambda x, t: F.cross_entropy(x, t, ignore_index=0), (C.normal(700, 3), targets % 3)),
    ],
    "linear_cross_entropy": [
        C.Case("blocks", F.linear_cross_entropy, (C.normal(700, 64), C.normal(300, 64), targets)),
        C.Case(
            "blocks, smoothed",
            partial(F.linear_cross_entropy, label_smoothing=0.1),
            (C.normal(700, 64), C.normal(300, 64), some),
        ),
        C.Case("blocks, ignored", F.linear_cross_entropy, (C.normal(700, 64), C.normal(300, 64), some)),
    ],
}  # fmt: skip


def with_edges(name):
    return [*cases_of(name), *(replace(c, op=name) for c in EDGES[name])]


def both(case, **options):
    found = run(case, **options)
    with by_definition():
        expected = run(case, **options)
    return zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True)


def test_every_kernel_has_its_edges():
    assert set(EDGES) == set(KERNELS)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@every_case(KERNELS, with_edges)
def test_a_kernel_equals_its_definition_in_value_and_gradients(case, dtype):
    tolerance = 1e-13 * math.sqrt(max(1, *(i.size for i in case.inputs)))
    if dtype == np.float32:
        tolerance = 3e-5 if case.label not in ("far apart", "scores far apart") else 1e-3
    for a, b in both(case, dtype=dtype):
        assert a.dtype == b.dtype == dtype
        close(a, b, tolerance)


@pytest.mark.parametrize("dtype, stored", [("f4", "f8"), ("f8", "f4"), ("f4", "f2"), ("f2", "f4")])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_a_norm_has_its_inputs_dtype_whatever_that_of_its_weight(name, dtype, stored, xp):
    arrays = [C.normal(3, 8).astype(dtype), *(C.positive(8).astype(stored) for _ in range(2 if name[0] == "l" else 1))]
    found = []
    for context in (contextlib.nullcontext(), by_definition()):
        inputs = [Tensor(xp.asarray(a), requires_grad=True) for a in arrays]
        with context:
            y = REGISTRY[name](*inputs)
        y.sum().backward()
        assert y.dtype == dtype and [i.grad.dtype for i in inputs] == [a.dtype for a in arrays]
        found.append([to_numpy(a) for a in (y.data, *(i.grad for i in inputs))])
    for a, b in zip(*found, strict=True):
        close(a, b, 2e-2 if "f2" in (dtype, stored) else 1e-5)


@every_case(KERNELS, lambda name: [c for c in with_edges(name) if c.label.startswith(("large", "blocks", "threads"))])
def test_the_number_of_threads_changes_nothing_but_rounding_and_runs_repeat_bit_for_bit(case, threads):
    results = {}
    for n in (1, 2, 3):
        threads(n)
        results[n], again = ([y, *gradients] for y, gradients in (run(case, dtype=np.float32) for _ in range(2)))
        for a, b in zip(again, results[n], strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in [pair for n in (2, 3) for pair in zip(results[n], results[1], strict=True)]:
        if case.op in ("add", "mul", "silu", "swiglu", "gelu", "rope"):  # elementwise or row by row
            np.testing.assert_array_equal(a, b)
        else:  # sums over rows, and matrix products
            close(a, b, 2e-6)


@every_case(KERNELS)
def test_definitions_compute_on_every_device(case, xp):
    expected = run(case)
    with by_definition():
        found = run(case, xp=xp)
    for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("name", ["gelu", "silu", "swiglu", "cross_entropy", "linear_cross_entropy"])
def test_where_no_graph_is_recorded_the_value_is_the_same(name):
    for case in with_edges(name):
        with no_grad():
            alone = case.fn(*map(Tensor, case.inputs), *case.constants).data
        np.testing.assert_array_equal(alone, run(case)[0], "what a checkpoint computes again is what it was")


@pytest.mark.parametrize("heads, kv", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_a_new_token_attends_to_the_cache_as_the_definition_says(heads, kv, rows, masked):
    n, D = 5, 8
    q, k, v = (C.normal(rows, 1, h * D, seed=i) for i, h in enumerate((heads, kv, kv)))
    turn = C.normal(rows, 1, D // 2)
    mask = (C.normal(rows, 1, 1, n + 1) > 0) if masked else None  # a row of it may see nothing
    if masked:
        mask[0] = False
    found = []
    for context in (contextlib.nullcontext(), by_definition()):
        cache = C.normal(rows, kv, 9, D, seed=3), C.normal(rows, kv, 9, D, seed=4), n
        with context, no_grad():
            y = F.rotary_attention(*map(Tensor, (q, k, v)), np.cos(turn), np.sin(turn), attn_mask=mask, cache=cache)
        found.append((y.data, *cache[:2]))
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_when_no_target_counts_both_are_nan(name):
    arrays = [C.normal(2, 3), *([C.normal(4, 3)] if name.startswith("linear") else [])]
    for context in (evaluated_by(None), by_definition()):
        with context:
            assert math.isnan(REGISTRY[name](*map(Tensor, arrays), np.array([-100, -100])).item())


# ---------------------------------------------------------------------------------------------------- registration


@pytest.fixture
def twice():
    @op
    def twice_for_the_test(x, option=None):
        return 2 * x, lambda g: 2 * g

    yield twice_for_the_test
    del REGISTRY["twice_for_the_test"]


def test_an_input_without_a_pullback_has_no_derivative(twice):
    assert twice(Tensor(np.ones(2)), Tensor(np.ones(2))).shape == (2,)
    with pytest.raises(AutogradError, match=r"twice_for_the_test: the input of shape .* has no derivative"):
        twice(Tensor(np.ones(2)), Tensor(np.ones(3), requires_grad=True))


def test_a_kernel_for_one_library_goes_before_the_one_for_all(twice, xp):
    x = Tensor(xp.asarray(np.ones(2)), requires_grad=True)
    for library, value in [(None, 2), ("", 3), ("another", 3), (xp.__name__, 5)]:
        if library is not None:  # "another" is wrong on purpose: no array here is of that library
            kernel(twice, library)(lambda x, n=7 if library == "another" else value: (n * x, lambda g: n * g))
        y = twice(x)
        assert to_numpy(y.data).tolist() == [value] * 2 and y._node.op == "twice_for_the_test"
        assert twice.definition(np.ones(1))[0] == 2
