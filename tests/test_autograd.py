"""The engine: what a graph keeps, how gradients add up, when memory is freed, and what misuse says."""

from __future__ import annotations

import gc
import operator
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import strict_device
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from test_ops import every_case

import minipeft as mp
from minipeft import AutogradError, Tensor, nn, no_grad
from minipeft import functional as F
from minipeft.autograd.tensor import REGISTRY, Node, checkpoint, gradients, is_grad_enabled, unbroadcast
from minipeft.backend import Rng, to_numpy
from minipeft.quant import cases as quant_cases  # noqa: F401  its op and its cases enter the registry


def leaf(*shape, seed=0, dtype=np.float64):
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype(dtype), requires_grad=True)


class Watched(np.ndarray):
    """An array that can be asked whether it is still alive."""


def watched(*shape):
    array = np.ones(shape).view(Watched)
    return array, weakref.ref(array)


@pytest.fixture
def no_collector():
    """The garbage collector is off: what is freed is freed by reference counting alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# ----------------------------------------------------------------------------------------------- gradients add up


def test_each_node_of_a_ladder_of_diamonds_runs_once():
    x = leaf(1)
    y = x
    for _ in range(60):  # 2**60 paths
        y = y * 0.5 + y * 0.5
    y.backward()
    assert x.grad.tolist() == [1.0]


def test_the_same_tensor_twice_in_one_op(xp):
    x = Tensor(xp.asarray(np.array([[1.0, 2.0], [3.0, 4.0]])), requires_grad=True)
    (x @ x).sum().backward()
    v = np.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(to_numpy(x.grad), np.ones((2, 2)) @ v.T + v.T @ np.ones((2, 2)))


def test_a_scalar_used_three_times(xp):
    """NumPy's sum of two 0-d arrays is a scalar, which cannot be added to in place."""
    x = Tensor(xp.asarray(np.array(3.0)), requires_grad=True)
    loss = x * 2.0
    (loss + loss * 10.0 + loss * 100.0 + loss * 1000.0).backward()
    assert to_numpy(x.grad) == 2222.0 and x.grad.shape == ()


def test_gradients_accumulate_across_backwards_in_the_same_array():
    x = leaf(3)
    (x * 2.0).sum().backward()
    first = x.grad
    (x * 5.0).sum().backward()
    assert x.grad is first and x.grad.tolist() == [7.0, 7.0, 7.0]


def test_slices_of_a_leaf_and_of_an_interior_result_add_into_one_gradient(xp):
    for interior in (False, True):
        x = Tensor(xp.asarray(np.arange(6.0)), requires_grad=True)
        y = x * 1.0 if interior else x
        (y[:3] * 2.0 + y[1:4] + y[xp.asarray(np.array([5, 5, 0]))] * y[::2]).sum().backward()
        v = np.arange(6.0)
        expected = np.array([2, 3, 3, 1, 0, 0], float)
        expected[[0, 2, 4]] += v[[5, 5, 0]]
        np.add.at(expected, [5, 5, 0], v[[0, 2, 4]])
        np.testing.assert_array_equal(to_numpy(x.grad), expected)


@pytest.mark.parametrize("slice_first", [False, True])
def test_a_slice_does_not_add_into_a_gradient_that_others_hold(slice_first, xp):
    a, b = (Tensor(xp.asarray(np.ones(3)), requires_grad=True) for _ in range(2))
    h, k = a * 2.0, b * 3.0
    part = F.broadcast_to(h[:1], (3,))
    y = part + (h + k) if slice_first else (h + k) + part
    g = xp.asarray(np.array([1.0, 10.0, 100.0]))
    y.backward(g)
    assert to_numpy(a.grad).tolist() == [2 * 112.0, 20.0, 200.0]
    assert to_numpy(b.grad).tolist() == [3.0, 30.0, 300.0] and to_numpy(g).tolist() == [1.0, 10.0, 100.0]


def test_only_leaves_that_ask_for_a_gradient_get_one():
    x, w = leaf(2, 3), Tensor(np.ones((4, 3)))
    y = F.linear(x, w)
    (y * y).sum().backward()
    assert y.grad is None and w.grad is None and x.grad is not None


def test_gradients_function_leaves_grad_alone():
    x, w, unused = leaf(3), leaf(3, seed=1), leaf(2)
    y = x * w
    found = gradients(y, np.ones(3), [w, unused])
    np.testing.assert_array_equal(found[0], x.data)
    assert found[1] is None and x.grad is None and w.grad is None


# ------------------------------------------------------------------------------------------------------ no aliases


def test_a_sum_does_not_share_its_gradient_between_its_inputs():
    a, b = leaf(3), leaf(3)
    g = np.array([1.0, 2.0, 3.0])
    (a + b).backward(g)
    a.grad[0] = 100.0
    g[1] = 200.0
    assert b.grad.tolist() == [1.0, 2.0, 3.0] and a.grad.tolist() == [100.0, 2.0, 3.0]


def used_three_times(x):
    y = x * 2.0
    return F.softmax(y) + y + y[:, :1]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x,
        lambda x: x + 0.0,
        lambda x: x.reshape(3, 2),
        lambda x: x.transpose(),
        lambda x: F.broadcast_to(x, (2, 3)),
        lambda x: F.dropout(x, 0.0, None),
        lambda x: x[:],
        lambda x: F.to(x, np.float64),
        lambda x: F.cat([x, x]),
        lambda x: x.sum(axis=0, keepdims=True),
        used_three_times,
    ],
)
def test_grad_is_an_array_of_its_own_and_the_given_one_is_not_written_into(fn):
    x = leaf(2, 3)
    y = fn(x)
    g = np.ones(y.shape)
    y.backward(g)
    assert x.grad.shape == x.shape and x.grad.flags.writeable
    assert not np.shares_memory(x.grad, g) and not np.shares_memory(x.grad, x.data)
    x.grad += 1.0
    np.testing.assert_array_equal(g, np.ones(y.shape))


# ---------------------------------------------------------------------------------------------------------- memory


def test_a_deep_chain_forward_backward_and_freed_without_backward(no_collector):
    x = leaf(1)
    y = x
    for _ in range(100_000):
        y = y + 1.0
    y.backward()
    assert x.grad.tolist() == [1.0]
    for _ in range(100_000):
        y = y * x
    del y  # the graph is dropped unused: its destruction must not recurse either


@pytest.mark.parametrize("end", ["its result is dropped", "backward"])
def test_a_graph_frees_what_it_held(no_collector, end):
    array, alive = watched(4, 4)
    w = leaf(4, 4)
    y = F.exp(Tensor(array) @ w).sum()
    del array
    assert alive() is not None
    if end == "backward":
        y.backward()
    else:
        del y
    assert alive() is None and (w.grad is not None) == (end == "backward")


@pytest.mark.parametrize("trainable", [False, True])
def test_linear_keeps_its_input_only_for_a_trainable_weight(no_collector, trainable):
    array, alive = watched(8, 8)
    x = Tensor(array, requires_grad=True)
    w = Tensor(np.eye(8), requires_grad=trainable)
    y = F.linear(x, w)
    x.data = None  # the leaf itself no longer holds the array: only the graph may
    del array
    assert y.requires_grad
    assert (alive() is not None) == trainable


def test_the_input_of_an_op_without_a_gradient_is_freed_at_once(no_collector):
    array, alive = watched(8)
    y = F.gelu(Tensor(array))
    del array
    assert alive() is None and not y.requires_grad


def test_no_grad_records_nothing(no_collector):
    array, alive = watched(8)
    x = Tensor(array, requires_grad=True)
    with no_grad():
        y = F.exp(x * 2.0)
    assert not y.requires_grad and y._node is None
    del x, array
    assert alive() is None


# --------------------------------------------------------------------------------------------------------- no_grad


def test_no_grad_nests_and_ends_with_an_exception():
    with no_grad():
        with no_grad():
            assert not is_grad_enabled()
        assert not is_grad_enabled()
    assert is_grad_enabled()
    with pytest.raises(ValueError), no_grad():
        raise ValueError
    assert is_grad_enabled() and (leaf(1) * 2.0).requires_grad


def test_no_grad_concerns_its_own_thread_only():
    with no_grad(), ThreadPoolExecutor(1) as another:
        assert another.submit(lambda: (leaf(1) * 2.0).requires_grad).result()
        assert not (leaf(1) * 2.0).requires_grad


def test_graphs_are_built_and_walked_on_several_threads_at_once():
    w = np.random.default_rng(0).standard_normal((20, 20))

    def work(seed, out):
        x = leaf(20, 20, seed=seed)
        for _ in range(20):
            F.softmax(F.gelu(x @ w)).sum(axis=0).backward(np.arange(20.0))
        out[seed] = x.grad

    alone, together = {}, {}
    for seed in range(4):
        work(seed, alone)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda seed: work(seed, together), range(4)))
    for seed in range(4):
        np.testing.assert_allclose(together[seed], alone[seed], rtol=1e-12)


# ---------------------------------------------------------------------------------------------- tensors and dtypes


def test_an_array_keeps_its_dtype_and_lists_become_float32():
    for dtype in (np.float16, np.float32, np.float64, np.int64, bool):
        assert Tensor(np.zeros(2, dtype)).dtype == dtype
    assert Tensor([1.0, 2.0]).dtype == np.float32 and Tensor(0.5).dtype == np.float32
    assert Tensor([1, 2]).dtype.kind == "i"
    data = np.zeros(2)
    assert Tensor(data).data is data


@pytest.mark.parametrize("operate", [operator.mul, operator.add, operator.sub, operator.truediv, operator.matmul])
def test_an_ndarray_on_the_left_gives_a_tensor(operate):
    a, x = np.ones((2, 2)) * 3, leaf(2, 2)
    y = operate(a, x)
    assert isinstance(y, Tensor) and y.requires_grad and y.shape == (2, 2)
    np.testing.assert_allclose(y.data, operate(a, x.data))


@pytest.mark.parametrize("scalar", [np.float64(2.5), 2.5, 2, np.int64(2), np.float32(2.5)])
def test_scalars_do_not_widen_float32(scalar):
    x = Tensor(np.array([0.5, 1.0, 2.0], np.float32), requires_grad=True)
    for y in (x * scalar, scalar * x, x + scalar, scalar - x, x / scalar, scalar / x, x**scalar):
        assert isinstance(y, Tensor) and y.dtype == np.float32 and y.shape == (3,)
        y.backward(np.ones(3, np.float32))
    assert x.grad.dtype == np.float32


def test_mixed_precision_gives_each_leaf_a_gradient_of_its_own_dtype():
    a, b = leaf(3, dtype=np.float32), leaf(3, dtype=np.float64)
    y = a * b
    assert y.dtype == np.float64
    y.sum().backward()
    assert a.grad.dtype == np.float32 and b.grad.dtype == np.float64


def test_methods_and_operators_are_the_functions():
    x = Tensor(np.array([[1.0, 2.0], [3.0, 5.0]]))
    pairs = [
        (x.sum(axis=0), x.data.sum(0)),
        (x.mean(axis=1, keepdims=True), x.data.mean(1, keepdims=True)),
        (x.max(), x.data.max()),
        (x.exp(), np.exp(x.data)),
        (x.log(), np.log(x.data)),
        (x.sqrt(), np.sqrt(x.data)),
        (x.tanh(), np.tanh(x.data)),
        (x.abs(), x.data),
        (x.reshape(4), x.data.ravel()),
        (x.reshape((1, 4)), x.data.reshape(1, 4)),
        (x.reshape(-1, 1), x.data.reshape(-1, 1)),
        (x.transpose(), x.data.T),
        (x.T, x.data.T),
        (x.transpose(1, 0), x.data.T),
        (x.swapaxes(0, 1), x.data.T),
        (-x, -x.data),
        (x**2, x.data**2),
        (x[0], x.data[0]),
        (1.0 - x, 1 - x.data),
        (x @ x, x.data @ x.data),
        (x.to(np.float32), x.data.astype(np.float32)),
    ]
    for found, expected in pairs:
        assert isinstance(found, Tensor)
        np.testing.assert_array_equal(found.data, expected)
    assert (x > 2).tolist() == [[False, False], [True, True]] and (x <= x).all()
    assert (x.ndim, x.size, len(x), x.shape) == (2, 4, 2, (2, 2))
    assert x[1, 1].item() == 5.0 and type(x[1, 1].item()) is float
    np.testing.assert_array_equal(x.numpy(), x.data)


@pytest.mark.parametrize("compare", [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge])
def test_comparisons_are_elementwise_boolean_arrays(compare, xp):
    a, b = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0], [3.0]])
    x, y = Tensor(xp.asarray(a), requires_grad=True), Tensor(xp.asarray(b))
    for left, right, expected in [
        (x, y, compare(a, b)),
        (x, y.data, compare(a, b)),
        (x, 2.0, compare(a, 2.0)),
        (2.0, x, compare(2.0, a)),
        *([(a, x, compare(a, a))] if xp is np else []),
    ]:
        found = compare(left, right)
        assert type(found) is xp.ndarray and found.dtype == bool
        np.testing.assert_array_equal(to_numpy(found), expected)


def test_sets_and_dictionaries_of_tensors_go_by_identity():
    a, b = leaf(2), leaf(2)
    assert len({a, b, a}) == 2 and {a: 1, b: 2}[b] == 2 and hash(a) == hash(a)
    assert [name for name, p in (("a", a), ("b", b)) if any(p is q for q in [b])] == ["b"]


def test_a_tensor_with_one_element_is_a_number(xp):
    for shape in ((), (1,), (1, 1)):
        x = Tensor(xp.asarray(np.full(shape, 2.75, np.float32)), requires_grad=True)
        assert (float(x), int(x), bool(x), f"{x:.1f}", f"{x:8.3f}") == (2.75, 2, True, "2.8", "   2.750")
        assert type(float(x)) is float and type(int(x)) is int and bool(x * 0.0) is False
    assert f"{Tensor(np.array([1, 2]))}" == "Tensor(array([1, 2]))" and f"{Tensor(np.array(7)):03d}" == "007"


@pytest.mark.parametrize(
    "convert, what",
    [
        (float, r"float\(\)"),
        (int, r"int\(\)"),
        (bool, "a truth value"),
        (lambda x: f"{x:.2f}", r"the format '\.2f'"),
        (lambda x: x.item(), r"item\(\)"),
    ],
)
@pytest.mark.parametrize("shape", [(2, 3), (0,)])
def test_a_tensor_with_several_elements_is_none(convert, what, shape):
    with pytest.raises(ValueError, match=rf"^{what} needs a tensor with one element; this one has shape"):
        convert(Tensor(np.ones(shape)))


def test_numpy_takes_a_tensor_that_has_no_graph_to_lose():
    data = np.arange(3.0)
    assert np.asarray(Tensor(data)) is data and np.array(Tensor(data)) is not data
    assert np.asarray(Tensor(data), np.float32).dtype == np.float32
    np.testing.assert_array_equal(np.stack([Tensor(data), leaf(3).detach()])[0], data)
    for x in (leaf(3), leaf(3) * 2.0):
        with pytest.raises(AutogradError, match=r"requires gradients: use tensor\.detach\(\)"):
            np.asarray(x)
    with no_grad():
        assert np.asarray(leaf(3) * 2.0).shape == (3,)
    with pytest.raises(TypeError, match=r"to the host unasked: use tensor\.numpy\(\)"):
        np.asarray(Tensor(strict_device.asarray(data)))


def test_inputs_given_by_name_are_inputs_all_the_same():
    x, w, b = leaf(2, 3), leaf(4, 3, seed=1), leaf(4, seed=2)
    F.linear(x, bias=b, weight=w).sum().backward()
    assert w.grad.shape == (4, 3) and b.grad.tolist() == [2.0] * 4


def test_detach_cuts_the_graph_and_shares_the_array():
    x = leaf(3)
    y = (x * 2.0).detach()
    assert not y.requires_grad and np.shares_memory(x.detach().data, x.data)


# ------------------------------------------------------------------------------------------------------ checkpoint


def block(x, w, seed=0):
    return F.gelu(F.dropout(x @ w, 0.3, Rng(seed))) + x


def without(fn, *inputs, parameters=()):
    """Called like `checkpoint`, and calls `fn` plainly."""
    return fn(*inputs)


def of_the_leaves(h, w, run):
    return run(lambda h: block(h, w), h * 2.0, parameters=[w])


def nested(h, w, run):
    def inner(h):
        return block(h, w)

    return run(lambda h: block(run(inner, h, parameters=[w]), w, seed=1), h, parameters=[w])


def of_a_computed_parameter(h, w, run):
    prefix = w * w  # a trained prefix computed by a small network, say
    return run(lambda h: h * prefix, h, parameters=[prefix]) * prefix


@pytest.mark.parametrize("model", [of_the_leaves, nested, of_a_computed_parameter])
def test_checkpoint_gives_the_same_value_and_gradients(model):
    results = []
    for run in (checkpoint, without):
        x, w = leaf(4, 4), leaf(4, 4, seed=1)
        y = model(x, w, run)
        (y * y).sum().backward()
        results.append((y.data, x.grad, w.grad))
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)


def test_checkpoint_computes_again_once_for_all_inputs():
    calls = []
    a, b, w = leaf(3), leaf(3, seed=1), leaf(3, seed=2)

    def fn(a, b):
        calls.append(is_grad_enabled())
        return a * b * w

    y = checkpoint(fn, a, b, parameters=[w])
    assert calls == [False]
    y.sum().backward()
    assert calls == [False, True]
    np.testing.assert_allclose(w.grad, a.data * b.data)
    np.testing.assert_allclose(a.grad, b.data * w.data)


def test_checkpoint_keeps_nothing_of_the_inside(no_collector):
    kept = []

    def fn(x):
        array, alive = watched(4)
        kept.append(alive)
        return x * Tensor(array)

    x = leaf(4)
    y = checkpoint(fn, x)
    assert kept[0]() is None
    y.sum().backward()
    assert x.grad.tolist() == [1.0] * 4 and kept[1]() is None


def test_checkpoint_of_frozen_inputs_and_under_no_grad_is_a_plain_call():
    assert not checkpoint(F.exp, Tensor(np.ones(2))).requires_grad
    with no_grad():
        assert not checkpoint(F.exp, leaf(2)).requires_grad
    frozen, x = Tensor(np.ones(2)), leaf(2)
    checkpoint(lambda a, b: a * b, frozen, x).sum().backward()
    assert frozen.grad is None and x.grad.tolist() == [1.0, 1.0]


def test_a_checkpoint_refuses_what_would_be_computed_otherwise_in_backward():
    x, frozen, w = leaf(2), nn.Parameter(np.ones(2), requires_grad=False), leaf(2)
    y = checkpoint(lambda x: x * frozen, x, parameters=[frozen]).sum()
    frozen.data, frozen._version = frozen.data * 3, 1
    with pytest.raises(AutogradError, match=r"a parameter of shape \(2,\) was changed after the forward pass"):
        y.backward()
    with pytest.raises(AutogradError, match=r"a tensor of shape \(2,\) that needs a gradient: list it in parameters"):
        checkpoint(lambda x: x * w, x).sum().backward()


def test_a_parameter_that_the_checkpointed_function_does_not_use_gets_zeros():
    x, w = leaf(2), leaf(3)
    checkpoint(F.exp, x, parameters=[w]).sum().backward()
    assert w.grad.tolist() == [0.0, 0.0, 0.0]


# ---------------------------------------------------------------------------------------------------------- misuse


def test_a_number_has_nothing_to_iterate_over():
    with pytest.raises(TypeError, match="iteration over a tensor of no axes"):
        sum(leaf(2).sum())
    assert [x.shape for x in leaf(2, 3)] == [(3,), (3,)]


def test_integers_beside_floats_take_their_dtype():
    x, mask = Tensor(np.ones((2, 3), "f"), requires_grad=True), np.array([[1, 1, 0], [1, 0, 0]])
    pooled = (x * mask).sum(1) / mask.sum(1)
    assert pooled.dtype == np.float32 and F.where(mask, x, mask).dtype == np.float32
    pooled.sum().backward()
    assert x.grad.dtype == np.float32 and (Tensor(np.ones(2)) * np.arange(2)).dtype == np.float64


def test_backward_twice_through_one_graph():
    x = leaf(2)
    y = (x * 2.0).sum()
    y.backward()
    with pytest.raises(AutogradError, match="freed graph: the result of 'sum' was already used"):
        y.backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_a_freed_part_of_a_graph():
    x = leaf(2)
    h = x * 2.0
    a, b = h.sum(), (h * h).sum()
    a.backward()
    with pytest.raises(AutogradError, match=r"freed graph.*'mul'.*add the losses"):
        b.backward()


@pytest.mark.parametrize(
    "misuse, error, message",
    [
        (lambda: (leaf(2, 3) * 2.0).backward(), AutogradError, r"needs a scalar; this tensor has shape \(2, 3\)"),
        (lambda: Tensor(np.ones(1)).backward(), AutogradError, "does not require gradients"),
        (lambda: (leaf(2, 3) * 2.0).backward(np.ones((3, 2))), ValueError, r"shape \(3, 2\), the tensor \(2, 3\)"),
        (lambda: Tensor(np.array([1, 2]), requires_grad=True), TypeError, r"int64 of shape \(2,\)"),
        (lambda: Tensor(np.array([True]), requires_grad=True), TypeError, "bool"),
        (lambda: Tensor(np.array(["a"])), TypeError, "real numbers of up to 64 bits; data of dtype <U1"),
        (lambda: Tensor(np.array([1j])), TypeError, "complex128"),
        (lambda: F.pow(Tensor(np.ones(2)), leaf(2)), AutogradError, r"pow: the input of shape \(2,\) has no derivative"),
        (lambda: F.broadcast_to(leaf(2), (3,)), ValueError, r"\(2,\).*\(3,\)"),
        (lambda: F.stack([leaf(2), leaf(3)]), ValueError, r"cat: shapes"),
    ],
)
def test_misuse_is_reported(misuse, error, message):
    with pytest.raises(error, match=message):
        misuse()


def test_a_failed_op_leaves_everything_usable():
    x, w = leaf(2, 3), leaf(4, 3)
    h = x * 2.0
    with pytest.raises(ValueError, match="linear"):
        F.linear(h, leaf(4, 5))
    F.linear(h, w).sum().backward()
    assert x.grad is not None and w.grad is not None


def test_a_pullback_that_fails_leaves_no_mode_behind():
    def fail(g):
        raise FloatingPointError("inside a pullback")

    x = leaf(2)
    y = Tensor(x.data)
    y._node, y.requires_grad = Node("bad", [(x, fail, x.shape, x.dtype)]), True
    with pytest.raises(FloatingPointError):
        checkpoint(lambda x: x * y, x, parameters=[y]).sum().backward()
        (y * 2.0).sum().backward()
    assert is_grad_enabled()
    (x * 3.0).sum().backward()
    assert x.grad is not None and np.isfinite(x.grad).all()


def test_a_failed_recomputation_restores_the_tensors_it_touched():
    x, w = leaf(2), leaf(2, seed=1)
    prefix, calls = w * 2.0, []

    def fn(x):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("the second time")
        return x * prefix

    with pytest.raises(MemoryError):
        checkpoint(fn, x, parameters=[prefix]).sum().backward()
    assert is_grad_enabled()
    prefix.sum().backward()
    assert w.grad.tolist() == [2.0, 2.0]


# ------------------------------------------------------------------------------------------------------ properties

shapes = mutually_broadcastable_shapes(num_shapes=2, max_dims=4, min_side=0, max_side=4)


@given(shapes)
def test_unbroadcast_is_the_transpose_of_broadcasting(found):
    shape, result = found.input_shapes[0], found.result_shape
    x = np.random.default_rng(0).standard_normal(shape)
    g = np.random.default_rng(1).standard_normal(result)
    back = unbroadcast(np.asarray(g), shape)
    assert np.shape(back) == shape
    # <g, broadcast(x)> = <unbroadcast(g), x>
    np.testing.assert_allclose((g * np.broadcast_to(x, result)).sum(), (back * x).sum(), rtol=1e-12, atol=1e-12)


@given(shapes, st.sampled_from(["+", "-", "*", "/"]), st.integers(0, 2**32 - 1))
def test_broadcasting_arithmetic(found, sign, seed):
    generator = np.random.default_rng(seed)
    a, b = (Tensor(np.asarray(generator.uniform(0.5, 2, s)), requires_grad=True) for s in found.input_shapes)
    y = {"+": F.add, "-": F.sub, "*": F.mul, "/": F.div}[sign](a, b)
    A, B = np.broadcast_arrays(a.data, b.data)
    np.testing.assert_allclose(y.data, {"+": A + B, "-": A - B, "*": A * B, "/": A / B}[sign], rtol=1e-14)
    g = np.asarray(generator.standard_normal(y.shape))
    y.backward(g)
    da, db = {"+": (g, g), "-": (g, -g), "*": (g * B, g * A), "/": (g / B, -g * A / B**2)}[sign]
    for t, d in ((a, da), (b, db)):
        assert t.grad.shape == t.shape
        np.testing.assert_allclose(t.grad, unbroadcast(d, t.shape), rtol=1e-12, atol=1e-12)


@given(st.data())
def test_random_graphs_of_sums_and_products(data):
    """A random polynomial of one scalar: its derivative by the engine and by NumPy's polynomials."""
    x = Tensor(np.array(0.7), requires_grad=True)
    pool = [(x, np.polynomial.Polynomial([0, 1]))]
    for _ in range(data.draw(st.integers(1, 7))):
        (a, p), (b, q) = (pool[data.draw(st.integers(0, len(pool) - 1))] for _ in range(2))
        pool.append((a * b, p * q) if data.draw(st.booleans()) and (p * q).degree() < 40 else (a + b, p + q))
    y, p = pool[-1]
    y.backward()
    np.testing.assert_allclose([y.item(), x.grad], [p(0.7), p.deriv()(0.7)], rtol=1e-9)


# ------------------------------------------------------------------------------------- arrays that are changed in between


@every_case(list(REGISTRY))
def test_of_every_op_a_gradient_that_a_change_would_make_wrong_is_refused(case):
    """And no other, but where the values do not matter for these numbers."""
    for which, array in enumerate(case.inputs):
        if array.dtype.kind != "f":
            continue
        for alone in (True, False):

            def gradients_of(changed, counted, which=which, alone=alone):
                xs = [Tensor(a.copy(), a.dtype.kind == "f" and (i == which or not alone)) for i, a in enumerate(case.inputs)]
                with np.errstate(all="ignore"):
                    y = case.fn(*xs, *case.constants)
                    if changed:
                        xs[which].data *= 1.7
                        xs[which].data += 0.3
                    xs[which]._version += counted
                    y.backward(np.random.default_rng(1).standard_normal(y.shape))
                return [x.grad for x in xs if x.grad is not None]

            pairs = zip(gradients_of(False, 0), gradients_of(True, 0), strict=True)
            if not all(np.array_equal(a, b, equal_nan=True) for a, b in pairs):
                with pytest.raises(AutogradError, match="needs the tensor of shape"):
                    gradients_of(True, 1)


def parameters(*shapes):
    return [nn.Parameter(np.random.default_rng(i).standard_normal(shape).astype(np.float32)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    "loss, op",
    [
        (lambda p, q: (p * q).sum(), "mul"), (lambda p, q: (p @ q.transpose()).sum(), "matmul"),
        (lambda p, q: (p.reshape(9) * 2 * q.reshape(9)).sum(), "mul"), (lambda p, q: checkpoint(F.exp, p + q).sum(), None),
        (lambda p, q: checkpoint(lambda x: x + 1, p, parameters=[q]).sum(), "checkpoint"),
        (lambda p, q: (p + q * 2).sum(), None), (lambda p, q: p.exp().sum() + q.sum(), None),
        (lambda p, q: F.linear(Tensor(np.ones((2, 3), np.float32)), p, q[0]).sum(), None),
        (lambda p, q: F.embedding(np.array([0, 1]), p).sum() + q.sum(), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["an optimizer's step", "load_state_dict"])
def test_a_step_between_forward_and_backward_is_refused_by_the_ops_that_need_what_it_changed(loss, op, how):
    """As in PyTorch, which raises for the same ops; nothing has been added to `.grad` then."""
    p, q = parameters((3, 3), (3, 3))
    module = nn.Module()
    module.p, module.q = p, q
    loss(p, q).backward()
    late = loss(p, q)
    if how == "load_state_dict":
        module.load_state_dict(module.state_dict())
    else:
        mp.optim.SGD([p, q]).step()
    before = p.grad.copy(), q.grad.copy()
    if op is None:
        late.backward()
        np.testing.assert_allclose(p.grad, 2 * before[0], rtol=1e-6)
        return
    with pytest.raises(AutogradError, match=f"'{op}' needs the tensor of shape .3, 3. as it was, .*call backward before"):
        late.backward()
    assert np.array_equal(p.grad, before[0]) and np.array_equal(q.grad, before[1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_that_was_stepped_after_its_loss_refuses_the_gradient_and_then_trains_on(checkpointing):
    model = mp.Transformer(mp.TransformerConfig.llama(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2))
    model.gradient_checkpointing_enable(checkpointing)
    adapted = mp.get_peft_model(model, mp.LoraConfig(r=2, target_modules="all-linear"))
    optimizer = mp.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])
    ids = np.arange(8).reshape(2, 4)
    adapted.loss(ids, ids).backward()
    late = adapted.loss(ids, ids)
    optimizer.step()
    with pytest.raises(AutogradError, match="optimizer's step or load_state_dict has changed it"):
        late.backward()
    adapted.loss(ids, ids).backward()
    optimizer.step()
