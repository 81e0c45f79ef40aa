"""The memory rule of every op against the op itself: shapes, and the arrays that each pullback keeps alive."""

from __future__ import annotations

import functools
import types

import numpy as np
import pytest

from minipeft.accounting.shapes import RULES, Meter, ShapeArray
from minipeft.autograd import ops as F
from minipeft.autograd.cases import op_cases
from minipeft.autograd.tensor import REGISTRY, Slice, Tensor, unbroadcast
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
