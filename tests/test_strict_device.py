"""The stand-in device is strict where it claims to be, computes what NumPy computes, and offers nothing CuPy lacks."""

from __future__ import annotations

import copy
import inspect
import re

import numpy as np
import pytest
import strict_device as device

from minipeft.backend import to_numpy, xp_of

HOST = np.arange(6.0, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def a():
    return device.asarray(HOST)


# -------------------------------------------------------------------------------------------------- the refusals


@pytest.mark.parametrize(
    "mix",
    [
        lambda a: np.asarray(a),
        lambda a: np.array([a, a]),
        lambda a: np.exp(a),
        lambda a: np.add(HOST, a),
        lambda a: np.sum(a),
        lambda a: np.concatenate([HOST, a]),
        lambda a: np.testing.assert_array_equal(a, HOST),
        lambda a: HOST * a,
        lambda a: a * HOST,
        lambda a: HOST @ a.T,
        lambda a: a == HOST,
        lambda a: a + np.array(1.0),
        lambda a: device.exp(HOST),
        lambda a: device.add(a, HOST),
        lambda a: device.sum(HOST),
        lambda a: device.where(a > 0, a, HOST),
        lambda a: device.concatenate([a, HOST]),
        lambda a: device.einsum("ij,ij->i", a, HOST),
        lambda a: device.add(a, a, out=np.empty_like(HOST)),
        lambda a: device.sum(a, axis=0, out=np.empty(3, np.float32)),
        lambda a: a.sum(axis=0, out=np.empty(3, np.float32)),
        lambda a: device.take(a, np.array([0, 1]), axis=0),
        lambda a: device.linalg.norm(HOST),
        lambda a: device.add.at(a, np.array([0]), 1.0),
        lambda a: a[np.array([0, 1])],
        lambda a: a[[np.array([0, 1])]],
        lambda a: HOST[a > 2],
        lambda a: device.zeros(np.array([2, 3])),
    ],
)
def test_host_and_device_arrays_never_meet_silently(a, mix):
    with pytest.raises(TypeError):
        mix(a)
    np.testing.assert_array_equal(a.get(), HOST)


def test_assignments_between_host_and_device_are_refused(a):
    with pytest.raises(TypeError, match="move it to the device first"):
        a[0] = HOST[0]
    with pytest.raises(TypeError, match="move it to the device first"):
        a += HOST
    host = HOST.copy()
    with pytest.raises(TypeError):
        host[0] = a[0]
    with pytest.raises(TypeError):
        host += a
    np.testing.assert_array_equal(a.get(), HOST)
    np.testing.assert_array_equal(host, HOST)


@pytest.mark.parametrize(
    "wait", [float, int, bool, range, lambda x: [10, 20][x], lambda x: f"{x:.2f}", lambda x: 1 if x else 0, np.float32]
)
def test_nothing_waits_for_the_device_unless_asked(wait):
    with pytest.raises(TypeError, match=r"\.item\(\)|\.get\(\)"):
        wait(device.asarray(1))
    assert device.asarray(1).item() == 1


@pytest.mark.parametrize(
    "sequence",
    [
        lambda a: device.sum([1, 2]),
        lambda a: device.exp([1.0]),
        lambda a: a - [1, 2, 3],
        lambda a: device.stack([1.0, 2.0]),
        lambda a: device.matmul(a, [1, 2, 3]),
        lambda a: device.atleast_1d([1]),
        lambda a: device.sum(1.0),
    ],
)
def test_lists_and_scalars_are_no_arrays(a, sequence):
    with pytest.raises(TypeError, match="Unsupported type"):
        sequence(a)


@pytest.mark.parametrize(
    "call, missing",
    [
        (lambda a: device.add(a, a, where=a > 0), "where"),
        (lambda a: device.sum(a, where=a > 0), "where"),
        (lambda a: device.max(a, initial=0), "initial"),
        (lambda a: a.max(initial=0), "initial"),
        (lambda a: device.argmax(a, stable=True), "stable"),
        (lambda a: device.pad(a, 1, stat_length=1), "stat_length"),
    ],
)
def test_keywords_that_cupy_lacks_are_refused(a, call, missing):
    with pytest.raises(TypeError, match=missing):
        call(a)


@pytest.mark.parametrize("name", ["block", "vecdot", "nditer", "float128", "errstate", "insert", "testing", "object_"])
def test_names_that_cupy_lacks_are_absent(name):
    with pytest.raises(AttributeError, match=f"cupy has no '{name}'"):
        getattr(device, name)


def test_ufunc_methods_are_only_those_cupy_has(a):
    for call in (lambda: device.maximum.reduce(a), lambda: device.multiply.at(a, 0, 1.0)):
        with pytest.raises(NotImplementedError):
            call()
    assert not hasattr(device.add, "reduceat")
    with pytest.raises(TypeError, match="int64"):
        device.add.at(device.zeros(3, device.int64), device.asarray([0]), 1)
    assert not hasattr(device.random.default_rng(0), "normal")


@pytest.mark.parametrize("host", [np.array([None]), np.array(["a"]), np.array([1j])])
def test_unsupported_element_types_are_refused(host):
    with pytest.raises(ValueError, match="Unsupported dtype"):
        device.asarray(host)


def test_what_a_device_leaves_undefined_fails(a):
    assert device.isnan(device.empty((2, 2))).all().item()
    assert (device.empty(3, device.int8) == 127).all().item()
    with pytest.raises(IndexError):
        a[device.asarray([0, 2])]
    with pytest.raises(ValueError, match="repeated"):
        a[device.asarray([0, 0])] = device.asarray([[1.0, 1, 1], [2, 2, 2]])
    a[device.asarray([0, 0])] = device.asarray([[7.0, 7, 7]])  # the same value twice is well defined
    assert a[0].tolist() == [7, 7, 7]


# --------------------------------------------------------------------------------------------- what it does instead


def test_it_is_found_as_an_array_library_of_its_own(a):
    assert xp_of(a) is device
    assert not isinstance(a, np.ndarray)
    assert isinstance(a, device.ndarray)
    np.testing.assert_array_equal(to_numpy(a), HOST)
    np.testing.assert_array_equal(device.asnumpy(a), HOST)


def test_moves_are_copies(a):
    host = HOST.copy()
    moved = device.asarray(host)
    host[:] = 0
    np.testing.assert_array_equal(moved.get(), HOST)
    moved.get()[:] = 0
    np.testing.assert_array_equal(moved.get(), HOST)
    assert device.asarray(a) is a
    assert device.asarray(a, np.float64).dtype == np.float64
    assert not device.shares_memory(device.array(a), a)
    assert device.array([1, 2], ndmin=2).shape == (1, 2)
    assert device.asarray([a[0, 0], a[0, 1]]).tolist() == [0, 1]


def test_views_share_memory_and_in_place_operations_write(a):
    for view in (a[0], a[:, 1:], a.T, a.reshape(3, 2), a.reshape(-1), a.swapaxes(0, 1), a[None], a[0, 1], a[..., 0]):
        assert device.shares_memory(view, a)
        assert view.base is not None
    assert a.base is None
    row, same = a[0], a
    row += 1
    a *= np.float32(2)
    assert same is a
    assert a.tolist() == [[2, 4, 6], [6, 8, 10]]
    a[0, 0] = 5
    a[a > 7] = 0
    a[:, [1]] = a[:, :1]
    assert a.tolist() == [[5, 5, 6], [6, 6, 0]]
    assert not device.shares_memory(a[device.asarray(0)], a)
    assert not device.shares_memory(copy.deepcopy(a), a)
    with pytest.raises(TypeError):
        device.asarray([1, 2]).__iadd__(0.5)


def test_every_result_is_a_device_array(a):
    zero_dimensional = [
        a.sum(), a.max(), a.mean(), a[0, 0], a[0][1], device.sum(a), device.argmax(a), a.argmin(), device.any(a > 0),
        device.allclose(a, a), device.array_equal(a, a), device.count_nonzero(a), device.add(1, 2), device.exp(1.0),
        a[0] @ a[0], device.dot(a[0], a[0]), device.linalg.norm(a), next(iter(a[0])), -a[0, 0], a[0, 0] + 1,
    ]  # fmt: skip
    for value in zero_dimensional:
        assert type(value) is device.ndarray and value.shape == ()
    parts = device.split(a, 3, axis=1), device.nonzero(a), device.linalg.svd(a), device.unique(a, return_counts=True)
    assert all(type(part) is device.ndarray for several in parts for part in several)
    with pytest.raises(TypeError, match="unsized"):
        len(a[0, 0])
    with pytest.raises(TypeError, match="0-d"):
        iter(a[0, 0])


@pytest.mark.parametrize("scalar", [2, 2.0, True, np.float16(2), np.float32(2), np.float64(2), np.int64(2)])
def test_scalars_mix_from_either_side_with_numpys_types(a, scalar):
    for got, expected in [(a * scalar, HOST * scalar), (scalar * a, scalar * HOST), (scalar < a, scalar < HOST)]:
        assert type(got) is device.ndarray and got.dtype == expected.dtype
        np.testing.assert_array_equal(got.get(), expected)
    np.testing.assert_array_equal((scalar - a).get(), scalar - HOST)


def test_out_is_written_and_returned(a):
    out = device.empty((2, 3), device.float32)
    assert device.add(a, 1, out=out) is out
    assert device.add(a, 1, out) is out
    np.testing.assert_array_equal(out.get(), HOST + 1)
    total = device.empty(3, device.float32)
    assert device.sum(a, 0, None, total) is total and a.sum(axis=0, out=total) is total
    np.testing.assert_array_equal(total.get(), HOST.sum(0))
    assert device.matmul(a, a.T, out=device.empty((2, 2), device.float32)).tolist() == [[5, 14], [14, 50]]


def test_add_at_accumulates_repeated_rows(a):
    device.add.at(a, device.asarray([0, 0, 1]), device.ones((3, 3), device.float32))
    np.testing.assert_array_equal(a.get(), HOST + np.array([[2], [1]]))


def test_a_type_that_wraps_arrays_answers_for_itself(a):
    class Tensor:
        __array_ufunc__ = None

        def __rmul__(self, other):
            return "Tensor"

    assert a * Tensor() == "Tensor"


def test_functions_agree_with_numpy(a):
    index = np.array([[0, 2], [1, 1]])
    for f in [
        lambda xp, a, i: xp.concatenate([a, a], axis=1),
        lambda xp, a, i: xp.take_along_axis(a, i, axis=1),
        lambda xp, a, i: a[:, i[0]],
        lambda xp, a, i: a[i[1], [0, 1]],
        lambda xp, a, i: xp.where(a > 2, a, 0),
        lambda xp, a, i: xp.einsum("ij,kj->ik", a, a),
        lambda xp, a, i: xp.argsort(-a, axis=-1),
        lambda xp, a, i: xp.argmax(a, axis=1, keepdims=True),
        lambda xp, a, i: xp.pad(a, ((0, 0), (1, 2)), constant_values=3),
        lambda xp, a, i: xp.clip(a, 1, 4),
        lambda xp, a, i: xp.searchsorted(a[0], a[1]),
        lambda xp, a, i: xp.logaddexp(a, 1.0).astype(xp.float16),
        lambda xp, a, i: xp.arange(2, 8, 2) + xp.arange(3),
        lambda xp, a, i: xp.broadcast_to(a.mean(axis=1, keepdims=True), a.shape),
        lambda xp, a, i: xp.lib.stride_tricks.sliding_window_view(a, 2, axis=1),
    ]:
        expected, got = f(np, HOST, index), f(device, a, device.asarray(index))
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got.get(), expected)


def test_sort_and_partition_act_in_place(a):
    descending = device.asarray(HOST[:, ::-1])
    descending.sort(axis=1)
    np.testing.assert_array_equal(descending.get(), HOST)
    with pytest.raises(ValueError, match="quicksort"):
        device.sort(a, kind="quicksort")


def test_random_streams_are_seeded():
    draw = device.random.default_rng(3).random((2, 2), dtype=device.float32)
    assert draw.dtype == np.float32
    assert draw.tolist() == device.random.default_rng(3).random((2, 2), dtype=device.float32).tolist()
    assert device.random.default_rng(0).integers(0, 5, size=4).dtype == np.int64


def test_floating_point_warnings_are_silent(a):
    assert device.isinf(1 / a[0, 0]).item()
    assert device.isnan(device.log(-a[1])).all().item()


def test_the_fixture_gives_the_library_of_its_arrays(xp, rng):
    host = rng.standard_normal(3)
    array = xp.asarray(host)
    assert xp_of(array) is xp
    np.testing.assert_allclose(to_numpy(xp.exp(array)), np.exp(host), rtol=1e-12)


# ----------------------------------------------------------------------------------- nothing that CuPy does not have


@pytest.fixture(scope="module")
def cupy():
    return pytest.importorskip(
        "cupy", reason="CuPy is not installed (extra 'gpu'; a GPU is not needed to compare names)"
    )


def _parameters(function) -> tuple[list[str], set[str], bool]:
    """Names by position, all names, and whether further keywords are taken, of a Python or a Cython function."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # Cython functions give their signature in the first line of their docstring
        line = re.search(r"\w+\((.*?)\)(?: ->.*)?$", function.__doc__.strip().splitlines()[0]).group(1)
        words = [p.split("=")[0].split()[-1] for p in line.split(", ")]
        names = [w.lstrip("*\\") for w in words]
        return names[: words.index("*") if "*" in words else None], set(names), any(w.startswith("**") for w in words)
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return by_position, {p.name for p in parameters}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _assert_takes(real, line: str, self_first: bool = False):
    """`real` takes every parameter of the table line, and its positional ones in the same order."""
    by_position, names, any_keyword = _parameters(real)
    parameters = [p for p in line.rstrip(")").partition("(")[2].split(", ") if p]
    cut = parameters.index("*") if "*" in parameters else len(parameters)
    positional = [p.rstrip("=") for p in parameters[:cut]]
    if any(p.startswith("*") for p in positional):  # variadic here; there too, or the rest is by keyword
        positional = []
    if self_first and by_position[:1] != ["self"]:
        positional = positional[1:]
    if by_position:
        assert by_position[: len(positional)] == positional, f"{line}: CuPy's order is {by_position}"
    optional = {p.rstrip("=") for p in parameters if p.endswith("=")}
    assert any_keyword or optional <= names, f"{line}: CuPy has no {optional - names}"


@pytest.mark.parametrize(
    "table, where",
    [("FUNCTIONS", ""), ("HOST_VALUED", ""), ("LINALG", "linalg"), ("STRIDE_TRICKS", "lib.stride_tricks")],
)
def test_cupy_has_every_function_with_its_parameters(cupy, table, where):
    module = cupy
    for part in where.split(".") if where else []:
        module = getattr(module, part)
    for line in getattr(device, table).strip().splitlines():
        name = line.partition("(")[0]
        if name in ("broadcast", "matmul"):  # a class without parameters to read; a gufunc, whose signature is (*args)
            assert callable(getattr(module, name))
        else:
            _assert_takes(getattr(module, name), line)
    _, matmul, _ = _parameters(cupy.matmul)
    assert {"out", "dtype", "casting"} <= matmul


def test_cupy_has_every_method_with_its_parameters(cupy):
    for line in device.METHODS.replace("(", "(self, ").replace(", )", ")").strip().splitlines():
        _assert_takes(getattr(cupy.ndarray, line.partition("(")[0]), line, self_first=True)
    stand_ins = {"__weakref__", "_host", "__slots__", "__index__"}  # __index__ exists only to explain its refusal
    assert {n for n in vars(device.ndarray) if n not in stand_ins and not hasattr(cupy.ndarray, n)} == set()
    for name in ("get", "item", "tolist"):
        ours = [p for p in inspect.signature(getattr(device.ndarray, name)).parameters if p != "self"]
        assert set(ours) <= _parameters(getattr(cupy.ndarray, name))[1]


def test_cupy_has_every_ufunc_and_its_methods(cupy):
    for name in device.UFUNCS:
        real, ours = getattr(cupy, name), getattr(device, name)
        assert isinstance(real, cupy.ufunc), name
        assert (real.nin, real.nout) == (ours.nin, ours.nout), name
        assert "casting=" in real.__doc__ and "dtype=" in real.__doc__ and "out=" in real.__doc__, name
    for name in ("at", "reduce", "accumulate", "outer"):
        ours = [p for p in inspect.signature(getattr(device.ufunc, name)).parameters if p != "self"]
        real, _, _ = _parameters(getattr(cupy.add, name))
        assert [p for p in ours if p != "kwargs"] == [p for p in real if p not in ("self", "kwargs")], name


def test_cupy_has_every_remaining_name(cupy):
    offered = dir(device)
    assert [name for name in offered if not hasattr(cupy, name)] == []
    for name in ("asarray", "array", "asnumpy"):
        ours = inspect.signature(getattr(device, name)).parameters
        assert list(ours) == list(inspect.signature(getattr(cupy, name)).parameters)[: len(ours)], name
    for name, function in vars(device.Generator).items():
        if not name.startswith("_"):
            ours = list(inspect.signature(function).parameters)
            assert ours == _parameters(getattr(cupy.random.Generator, name))[0], name


def test_cupy_itself_gives_the_reasons_for_the_refusals(cupy):
    """The messages and exception types that can be seen without a GPU."""
    assert not hasattr(cupy.ndarray, "__index__") and not hasattr(cupy.ndarray, "__imatmul__")
    assert not hasattr(cupy, "errstate") and not hasattr(cupy.random.Generator, "normal")
    with pytest.raises(TypeError, match="Wrong arguments"):
        cupy.add(1, 2, where=True)
    with pytest.raises(NotImplementedError):
        cupy.maximum.reduce(None)
