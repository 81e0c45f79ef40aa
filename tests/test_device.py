"""Every device kernel against the plain definition that it computes in the place of, on CuPy: `pytest --device cupy`."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from test_kernels import EDGES
from test_ops import by_definition, close, run

from minipeft import functional as F
from minipeft.autograd import cases as C
from minipeft.autograd.tensor import REGISTRY, Tensor
from minipeft.backend import to_numpy

FORMS = [name for name, fn in REGISTRY.items() if fn.__module__ == F.__name__ and "cupy" in fn.forms]
CASES = [
    C.Case(c.label, c.fn, c.inputs, c.constants, name)
    for name in FORMS
    for c in [*C.op_cases([name]), *EDGES.get(name, [])]
]
every_case = pytest.mark.parametrize("case", CASES, ids=[f"{c.op}-{c.label}".replace(" ", "_") for c in CASES])


@pytest.fixture(scope="module")
def cupy(request):
    if "cupy" not in (request.config.getoption("device") or []):
        pytest.skip("needs a GPU and CuPy: pytest --device cupy")
    return importlib.import_module("cupy")


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@every_case
def test_a_form_equals_its_definition_in_value_and_gradients(case, dtype, cupy):
    with by_definition():
        expected = run(case, dtype=dtype)
    found = run(case, xp=cupy, dtype=dtype)
    tolerance = 1e-12 if dtype == np.float64 else 1e-3 if "far apart" in case.label else 3e-5
    for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        assert a.dtype == b.dtype == dtype
        close(a, b, tolerance)


def layouts(a):
    """The same numbers, in memory that is not contiguous: transposed, every second one of a larger array, reversed."""
    yield a.transpose().copy().transpose()
    yield a.repeat(2, axis=-1)[..., ::2]
    yield a[..., ::-1].copy()[..., ::-1]


@pytest.mark.parametrize(
    "case", C.op_cases(FORMS), ids=lambda case: f"{case.op}-{case.label}".replace(" ", "_")
)
def test_a_form_takes_arrays_of_any_layout(case, cupy):
    expected = run(case, xp=cupy)
    for layout in range(3):
        there = [cupy.asarray(a) for a in case.inputs]
        there = [list(layouts(a))[layout] if a.ndim and a.dtype.kind == "f" else a for a in there]
        there = [Tensor(a, requires_grad=True) if a.dtype.kind == "f" else a for a in there]
        found = run(case, there, xp=cupy)
        for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
            close(a, b, 1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_other_dtypes_are_left_to_the_definition(name, cupy):
    """float16, and two dtypes that meet, give what the definition gives, in its dtype."""
    case = C.op_cases([name])[0]
    tensors = [cupy.asarray(a.astype(np.float16) if a.dtype.kind == "f" else a) for a in case.inputs]
    mixed = [cupy.asarray(a.astype((np.float32, np.float64)[i % 2]) if a.dtype.kind == "f" else a) for i, a in enumerate(case.inputs)]
    for inputs in (tensors, mixed):
        constants = [cupy.asarray(a.astype(np.float32) if a.dtype.kind == "f" else a) for a in case.constants]
        inputs = [Tensor(a) if a.dtype.kind == "f" else a for a in inputs]
        found = case.fn(*inputs, *constants)
        with by_definition():
            expected = case.fn(*inputs, *constants)
        close(to_numpy(found.data).astype(np.float64), to_numpy(expected.data).astype(np.float64), 1e-2)


@pytest.mark.parametrize("norm, extra", [(F.layer_norm, 1), (F.rms_norm, 0)])
@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_weights_of_a_norm_may_be_stored_in_half_precision(norm, extra, stored, cupy):
    x, g = C.normal(5, 77).astype(np.float32), C.normal(5, 77, seed=1).astype(np.float32)
    weights = [C.positive(77).astype(stored) for _ in range(1 + extra)]
    results = []
    for place in (np.asarray, cupy.asarray):
        t = Tensor(place(x), requires_grad=True)
        y = norm(t, *map(place, weights))
        y.backward(place(g))
        results.append((to_numpy(y.data), to_numpy(t.grad)))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == np.float32
        close(a, b, 1e-5)
