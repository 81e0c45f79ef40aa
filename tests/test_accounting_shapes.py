"""The memory rule of every op against the op itself: shapes, and the arrays that each pullback keeps alive."""

from __future__ import annotations

import functools
import types

import numpy as np
import pytest
from models import traced

from minipeft import accounting
from minipeft.accounting import shapes
from minipeft.accounting.shapes import RULES, Meter, ShapeArray
from minipeft.autograd import ops as F
from minipeft.autograd import tensor
from minipeft.autograd.cases import op_cases
from minipeft.autograd.tensor import REGISTRY, Slice, Tensor, op, unbroadcast
from minipeft.quant import cases, linear  # noqa: F401

OPS = [name for name in REGISTRY if REGISTRY[name].__module__ in (F.__name__, linear.__name__)]


def reached(thing, seen):
    """Every array that a pullback refers to, through its closure and the objects in it."""
    if id(thing) in seen:
        return
    seen[id(thing)] = thing
    if isinstance(thing, np.ndarray):
        yield thing
    elif isinstance(thing, functools.partial):
        yield from reached([thing.func, thing.args, thing.keywords], seen)
    elif isinstance(thing, types.MethodType):
        yield from reached([thing.__self__, thing.__func__], seen)
    elif isinstance(thing, types.FunctionType):
        yield from reached([c.cell_contents for c in thing.__closure__ or () if _filled(c)], seen)
        yield from reached(thing.__defaults__ or (), seen)
    elif isinstance(thing, (dict, list, tuple)):
        for item in list(thing.values() if isinstance(thing, dict) else thing):
            yield from reached(item, seen)
    elif type(thing).__module__.startswith("minipeft") and not isinstance(thing, (Meter, Tensor)):
        slots = [getattr(thing, name) for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        yield from reached([*slots, *getattr(thing, "__dict__", {}).values()], seen)


def _filled(cell):
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def kept_bytes(pullback) -> int:
    """Bytes of the arrays (more than a number) that a pullback keeps alive, a view counting as what it is a view of."""
    owners = {}
    for array in reached(pullback, {}):
        if isinstance(array, ShapeArray):
            array = array.buffer
        else:
            while isinstance(array.base, np.ndarray):
                array = array.base
        owners[id(array)] = array.nbytes
    return sum(n for n in owners.values() if n > 8)


def float32(arrays):
    return [x.astype(np.float32) if x.dtype.kind == "f" else x for x in arrays]


def on_shapes(case, meter):
    """The case's result for arrays without content."""
    shapes = [Tensor(ShapeArray.new(meter, x.shape), True) if x.dtype.kind == "f" else x for x in float32(case.inputs)]
    return case.fn(*shapes, *float32(case.constants))


@pytest.mark.parametrize("name", OPS)
def test_a_rule_keeps_what_the_pullbacks_of_its_op_keep_and_gives_gradients_of_the_inputs_shapes(name):
    for case in op_cases([name]):
        inputs = [Tensor(x, True) if x.dtype.kind == "f" else x for x in float32(case.inputs)]
        real = case.fn(*inputs, *float32(case.constants))
        with Meter() as meter:
            predicted = on_shapes(case, meter)
        assert predicted.shape == real.shape, case.label
        for edge, other in zip(real._node.edges, predicted._node.edges, strict=True):
            assert kept_bytes(other[1]) == kept_bytes(edge[1]), f"{name} ({case.label})"
        with meter:
            for _, pullback, shape, _ in predicted._node.edges:
                g = pullback(ShapeArray.new(meter, predicted.shape))
                assert isinstance(g, Slice) or unbroadcast(g, shape).shape == shape, f"{name} ({case.label})"


def test_every_op_has_a_rule():
    assert set(REGISTRY) - set(RULES) == set()


def test_memory_is_given_back_when_the_arrays_are_gone():
    with Meter() as meter:
        x = Tensor(ShapeArray.new(meter, (256, 64)), requires_grad=True)
        loss = F.mean(F.tanh(x * 2.0) * x)
        assert meter.current == 4 * (2 * 256 * 64 + 1)  # x, tanh(2x) and the mean: 2x and the product are gone
        meter.backward(loss)
        assert meter.lines["gradients"] == 4 * 256 * 64
        del loss, x
    assert meter.current == 0


@pytest.fixture
def own_op(monkeypatch):
    """Registers an op, as one's own module would, until the test is over."""
    monkeypatch.setattr(tensor, "REGISTRY", dict(REGISTRY))
    monkeypatch.setattr(shapes, "REGISTRY", tensor.REGISTRY)
    monkeypatch.setattr(shapes, "RULES", dict(RULES))
    return op


def cubed(x, scale):
    root = np.tanh(x * scale)  # made here, kept for both pullbacks
    return root**3, lambda g: g * 3 * root**2 * (1 - root**2) * scale, lambda g: g * 3 * root**2 * (1 - root**2) * x


def kept(own, x, scale):
    """(bytes that own(x, scale) is measured to keep, bytes that the ledger says), the value among them."""
    with traced() as memory:
        before = memory()[0]
        y = own(Tensor(x, True), Tensor(scale, True))
        measured = memory()[0] - before
        del y
    with Meter() as meter:
        inputs = [Tensor(ShapeArray.uncounted(meter, a.shape), True) for a in (x, scale)]
        y = own(*inputs)
        predicted = meter.current
        meter.backward(F.sum(y))
        assert meter.ops.keys() >= {"cubed"} and meter.lines["gradients"] == x.nbytes + scale.nbytes
    return measured, predicted


def test_an_op_without_a_rule_keeps_at_most_what_the_ledger_says_and_with_one_just_that(own_op):
    own = own_op(cubed)
    x, scale = np.ones((300, 200), np.float32), np.ones(200, np.float32)
    measured, predicted = kept(own, x, scale)
    assert x.nbytes * 1.9 < measured < predicted + 4096 and predicted <= 3 * x.nbytes
    with Meter() as meter:  # the inputs count too, where nobody else holds them
        y = own(Tensor(ShapeArray.new(meter, x.shape), True), Tensor(ShapeArray.new(meter, scale.shape), True))
        assert meter.current >= x.nbytes + scale.nbytes + y.data.buffer.nbytes

    @accounting.rule("cubed")
    def rule(op, x, scale):
        y, root = op.new(x.shape), op.new(x.shape)
        return y, op.pull(x.shape, root, scale), op.pull(x.shape, root, x)

    measured, predicted = kept(own, x, scale)
    assert predicted == pytest.approx(measured, rel=0.02)


def test_an_op_that_needs_values_is_refused_by_name_with_what_to_do(own_op):
    @own_op
    def picked(x):
        return x[: int(x.sum()) + np.linalg.inv(x)[0, 0].astype(int)], lambda g: g

    with Meter() as meter, pytest.raises(ValueError, match=r"'picked' does not run on shapes.*accounting.rule\(\"picked\"\)"):
        picked(Tensor(ShapeArray.new(meter, (3, 3))))
