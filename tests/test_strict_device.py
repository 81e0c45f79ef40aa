"""The stand-in device refuses what its docstring promises to refuse, and computes as NumPy does."""

import copy

import numpy as np
import pytest
import strict_device as device

from minipeft.backend import to_numpy, xp_of

HOST = np.arange(6.0, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def a():
    return device.asarray(HOST)


MIXES = [
    lambda a: np.asarray(a), lambda a: np.array([a, a]), lambda a: np.exp(a), lambda a: np.add(HOST, a),
    lambda a: np.sum(a), lambda a: np.concatenate([HOST, a]), lambda a: np.testing.assert_array_equal(a, HOST),
    lambda a: HOST * a, lambda a: a * HOST, lambda a: HOST @ a.T, lambda a: a == HOST, lambda a: a + np.array(1.0),
    lambda a: device.exp(HOST), lambda a: device.add(a, HOST), lambda a: device.sum(HOST), lambda a: HOST[a > 2],
    lambda a: device.where(a > 0, a, HOST), lambda a: device.concatenate([a, HOST]), lambda a: device.linalg.norm(HOST),
    lambda a: device.einsum("ij,ij->i", a, HOST), lambda a: device.add(a, a, out=np.empty_like(HOST)),
    lambda a: device.sum(a, axis=0, out=np.empty(3, np.float32)), lambda a: a.sum(axis=0, out=np.empty(3, np.float32)),
    lambda a: device.take(a, np.array([0, 1]), axis=0), lambda a: device.add.at(a, np.array([0]), 1.0),
    lambda a: a[np.array([0, 1])], lambda a: a[[np.array([0, 1])]], lambda a: device.zeros(np.array([2, 3])),
    lambda a: a.__setitem__(0, HOST[0]), lambda a: a.__iadd__(HOST), lambda a: HOST.copy().__setitem__(0, a[0]),
    lambda a: np.ndarray.__iadd__(HOST.copy(), a),
]  # fmt: skip
WAITS = [float, int, bool, range, lambda x: [10, 20][x], lambda x: f"{x:.2f}", lambda x: 1 if x else 0, np.float32]


@pytest.mark.parametrize("mix", MIXES)
def test_host_and_device_arrays_never_meet_silently(a, mix):
    with pytest.raises(TypeError):
        mix(a)
    np.testing.assert_array_equal(a.get(), HOST)


@pytest.mark.parametrize("wait", WAITS)
def test_nothing_waits_for_the_device_unless_asked(wait):
    with pytest.raises(TypeError, match=r"\.item\(\)|\.get\(\)"):
        wait(device.asarray(1))
    assert device.asarray(1).item() == 1


def test_what_a_device_leaves_undefined_fails(a):
    assert device.isnan(device.empty((2, 2))).all().item() and device.isnan(device.empty_like(a)).all().item()
    assert (device.empty(3, device.int8) == 127).all().item()
    with pytest.raises(IndexError):
        a[device.asarray([0, 2])]
    with pytest.raises(ValueError, match="repeated"):
        a[device.asarray([0, 0])] = device.asarray([[1.0, 1, 1], [2, 2, 2]])
    a[device.asarray([0, 0])] = device.asarray([[7.0, 7, 7]])  # the same value twice is well defined
    assert a[0].tolist() == [7, 7, 7]


def test_it_is_a_library_of_its_own_and_moves_are_copies(a):
    assert xp_of(a) is device and type(a) is device.ndarray and not isinstance(a, np.ndarray)
    for host in (to_numpy(a), device.asnumpy(a), a.get()):
        np.testing.assert_array_equal(host, HOST)
    host = HOST.copy()
    moved = device.asarray(host)
    host[:] = 0
    moved.get()[:] = 0
    np.testing.assert_array_equal(moved.get(), HOST)
    assert device.asarray(a) is a and device.asarray(a, np.float64).dtype == np.float64
    assert not device.shares_memory(device.array(a), a) and not device.shares_memory(copy.deepcopy(a), a)
    assert device.asarray([a[0, 0], a[0, 1]]).tolist() == [0, 1]


def test_views_share_memory_and_in_place_operations_write(a):
    for view in (a[0], a[:, 1:], a.T, a.reshape(3, 2), a.reshape(-1), a.swapaxes(0, 1), a[None], a[0, 1], a[..., 0]):
        assert device.shares_memory(view, a) and view.base is not None
    assert a.base is None
    row, same = a[0], a
    row += 1
    a *= np.float32(2)
    assert same is a and a.tolist() == [[2, 4, 6], [6, 8, 10]]
    a[0, 0] = 5
    a[a > 7] = 0
    a[:, [1]] = a[:, :1]
    assert a.tolist() == [[5, 5, 6], [6, 6, 0]]
    a.sort(axis=1)
    assert a.tolist() == [[5, 5, 6], [0, 6, 6]]
    with pytest.raises(TypeError):
        device.asarray([1, 2]).__iadd__(0.5)


def test_every_result_is_a_device_array(a):
    zero_dimensional = [
        a.sum(), a.max(), a.mean(), a[0, 0], a[0][1], device.sum(a), device.argmax(a), a.argmin(), device.any(a > 0),
        device.add(1, 2), device.exp(1.0),
        a[0] @ a[0], device.dot(a[0], a[0]), device.linalg.norm(a), next(iter(a[0])), -a[0, 0], a[0, 0] + 1,
    ]  # fmt: skip
    for value in zero_dimensional:
        assert type(value) is device.ndarray and value.shape == ()
    parts = device.split(a, 3, axis=1), device.nonzero(a), device.linalg.svd(a), device.unique(a, return_counts=True)
    assert all(type(part) is device.ndarray for several in parts for part in several)
    for measure in (len, list):
        with pytest.raises(TypeError, match="unsized"):
            measure(a[0, 0])


class Wrapper:
    __array_ufunc__ = None

    def __rmul__(self, other):
        return "the wrapper answers for itself"


@pytest.mark.parametrize("scalar", [2, 2.0, True, np.float16(2), np.float32(2), np.float64(2), np.int64(2)])
def test_scalars_mix_from_either_side_with_numpys_types(a, scalar):
    assert a * Wrapper() == "the wrapper answers for itself"
    assert device.isnan(device.log(-1 - a)).all().item()  # a device warns of nothing
    for got, expected in [(a * scalar, HOST * scalar), (scalar - a, scalar - HOST), (scalar < a, scalar < HOST)]:
        assert type(got) is device.ndarray and got.dtype == expected.dtype
        np.testing.assert_array_equal(got.get(), expected)


def test_out_is_written_and_returned(a):
    out, total = device.empty((2, 3), device.float32), device.empty(3, device.float32)
    assert device.add(a, 1, out=out) is out and device.add(a, 1, out) is out
    np.testing.assert_array_equal(out.get(), HOST + 1)
    assert device.sum(a, axis=0, out=total) is total and a.sum(axis=0, out=total) is total
    np.testing.assert_array_equal(total.get(), HOST.sum(0))
    assert device.matmul(a, a.T, out=device.empty((2, 2), device.float32)).tolist() == [[5, 14], [14, 50]]
    device.add.at(a, device.asarray([0, 0, 1]), device.ones((3, 3), device.float32))
    np.testing.assert_array_equal(a.get(), HOST + np.array([[2], [1]]))
