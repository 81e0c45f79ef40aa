"""Inputs to judge every op by: what `minipeft gradcheck` and the tests run.

Each op has cases that cover its options, broadcasting, empty axes and axes of size one. A layer above that defines an
op of its own gives it cases in the same way, with `@cases("its_name")`; a test fails on any op without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, Rng
from . import ops as F
from .gradcheck import GradcheckError, gradcheck
from .tensor import REGISTRY, Tensor


@dataclass(frozen=True)
class Case:
    """One call of an op: `fn(*inputs, *constants)`, differentiated by its floating-point inputs."""

    label: str
    fn: Callable[..., Tensor]
    inputs: tuple[Array, ...]  # float64, or integer and boolean
    constants: tuple[Array, ...] = ()  # arrays that have no derivative: masks, angles
    op: str = ""

    def check(self, **options: Any) -> float:
        """The worst relative deviation of `gradcheck`; raises GradcheckError."""
        name = f"{self.op} ({self.label})"
        return gradcheck(lambda *a: self.fn(*a, *self.constants), *self.inputs, name=name, **options).deviation


class Verdict(NamedTuple):
    """What became of one case."""

    case: Case
    deviation: float  # worst relative deviation; infinite where the check failed
    error: GradcheckError | None


CASES: dict[str, list[Callable[[], Iterable[Case]]]] = {}


def cases(*names: str) -> Callable[[Callable[[], Iterable[Case]]], Callable[[], Iterable[Case]]]:
    """Register a generator of cases, for an op of this name; or `generator(name)` for each of several."""

    def register(generator: Callable[..., Iterable[Case]]) -> Callable[..., Iterable[Case]]:
        for name in names:
            CASES.setdefault(name, []).append(generator if len(names) == 1 else lambda name=name: generator(name))
        return generator

    return register


def op_cases(names: Iterable[str] | None = None) -> list[Case]:
    """The cases of the ops called `names` (default: all that are registered).

    Raises KeyError naming the ops that have none.
    """
    names = list(REGISTRY if names is None else names)
    without = [name for name in names if name not in CASES]
    if without:
        raise KeyError(f"no gradient check for the op {', '.join(without)}: give it some with autograd.cases.cases")
    return [Case(c.label, c.fn, c.inputs, c.constants, name) for name in names for make in CASES[name] for c in make()]


def check_ops(cases: Iterable[Case] | None = None) -> Iterator[Verdict]:
    """Judge the cases (default: every one of every op) one by one; `len(op_cases())` is how many there are."""
    for case in op_cases() if cases is None else cases:
        try:
            yield Verdict(case, case.check(), None)
        except GradcheckError as error:
            yield Verdict(case, float("inf"), error)


# ------------------------------------------------------------------------------------------------------------ inputs


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers of this shape, moved away from zero by far more than a step of the differences."""
    x = np.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape))
    return np.asarray(x + np.sign(x) * 0.05)


def positive(*shape: int) -> np.ndarray:
    """Numbers of this shape, uniform in [0.5, 2)."""
    return np.asarray(np.random.default_rng(list(shape)).uniform(0.5, 2, shape))


def distinct(*shape: int) -> np.ndarray:
    """Shuffled numbers of this shape, 0.1 apart, none zero: no two tie."""
    n = int(np.prod(shape))
    return (np.random.default_rng(n).permutation(n).reshape(shape) - n / 2 + 0.25) / 10


def integers(high: int, *shape: int) -> np.ndarray:
    """Integers of this shape in 0..high-1, repeated ones among them."""
    return np.asarray(np.random.default_rng([high, *shape]).integers(0, high, shape))


# --------------------------------------------------------------------------------------------------------- one by one

IDS, IGNORED = np.array([0, 4, 2, 2]), np.array([[0, -100, 4], [-100, 1, 1]])  # targets of a loss
SMOOTHED = partial(F.linear_cross_entropy, label_smoothing=0.3)
ROWS = [  # op, label, function, inputs
    ("clip", "both sides", lambda x: F.clip(x, -0.5, 0.5), (normal(3, 4),)),
    ("clip", "below", lambda x: F.clip(x, minimum=0), (normal(3, 4),)),
    ("clip", "above", lambda x: F.clip(x, maximum=0), (normal(3, 4),)),
    ("clip", "empty axis", lambda x: F.clip(x, -0.5, 0.5), (normal(0, 3),)),
    ("to", "float64", lambda x: F.to(x, np.float64), (normal(3, 4),)),
    ("to", "float32", lambda x: F.to(x, np.float32), (normal(3, 4),)),
    ("to", "through float32", lambda x: F.exp(F.to(x, np.float32)), (normal(3, 4),)),
    ("dropout", "keyed stream", lambda x: F.dropout(x, 0.4, Rng(1, 2)), (normal(4, 6),)),
    ("dropout", "later rows", lambda x: F.dropout(x, 0.4, Rng(1, first_row=7)), (normal(2, 3, 4),)),
    ("dropout", "no stream", lambda x: F.dropout(x, 0.4, None), (normal(4, 6),)),
    ("dropout", "p = 0", lambda x: F.dropout(x, 0.0, Rng(1)), (normal(4, 6),)),
    ("dropout", "empty axis", lambda x: F.dropout(x, 0.4, Rng(1)), (normal(0, 3),)),
    ("reshape", "split", lambda x: F.reshape(x, (2, 3, 2)), (normal(6, 2),)),
    ("reshape", "flatten", lambda x: F.reshape(x, (-1,)), (normal(2, 3),)),
    ("reshape", "of a transposed input", lambda x: F.reshape(F.transpose(x), (2, 6)), (normal(3, 4),)),
    ("reshape", "to a scalar", lambda x: F.reshape(x, ()), (normal(1, 1),)),
    ("reshape", "empty axis", lambda x: F.reshape(x, (3, 0)), (normal(0, 3),)),
    ("transpose", "reversed", F.transpose, (normal(2, 3, 4),)),
    ("transpose", "axes", lambda x: F.transpose(x, (1, 2, 0)), (normal(2, 3, 4),)),
    ("transpose", "negative axes", lambda x: F.transpose(x, (-1, 0, 1)), (normal(2, 3, 4),)),
    ("transpose", "empty axis", F.transpose, (normal(0, 3),)),
    ("swapaxes", "ends", lambda x: F.swapaxes(x, 0, -1), (normal(2, 3, 4),)),
    ("swapaxes", "adjacent", lambda x: F.swapaxes(x, 1, 2), (normal(2, 3, 4),)),
    ("broadcast_to", "new axes", lambda x: F.broadcast_to(x, (2, 3, 4)), (normal(3, 4),)),
    ("broadcast_to", "size-one axes", lambda x: F.broadcast_to(x, (2, 3, 4)), (normal(1, 3, 1),)),
    ("broadcast_to", "scalar", lambda x: F.broadcast_to(x, (2, 3)), (normal(),)),
    ("broadcast_to", "to an empty axis", lambda x: F.broadcast_to(x, (0, 3)), (normal(3),)),
    ("gather", "last axis", F.gather, (normal(3, 5), np.array([[0, 0, 4], [1, 2, 3], [4, 4, 4]]))),
    ("gather", "first axis", lambda x, i: F.gather(x, i, axis=0), (normal(3, 5), integers(3, 4, 5))),
    ("gather", "middle axis", lambda x, i: F.gather(x, i, axis=1), (normal(2, 3, 4), integers(3, 2, 2, 4))),
    ("gather", "no rows", F.gather, (normal(0, 5), integers(5, 0, 2))),
    ("_cat", "rows", lambda a, b: F.cat([a, b]), (normal(2, 3), normal(1, 3))),
    ("_cat", "last axis", lambda a, b, c: F.cat([a, b, c], axis=-1), (normal(2, 1), normal(2, 3), normal(2, 2))),
    ("_cat", "one", lambda a: F.cat([a]), (normal(2, 3),)),
    ("_cat", "the same twice", lambda a: F.cat([a, a], axis=1), (normal(2, 3),)),
    ("_cat", "an empty part", lambda a, b: F.cat([a, b]), (normal(0, 3), normal(1, 3))),
    ("_cat", "stack", lambda a, b: F.stack([a, b]), (normal(2, 3), normal(2, 3, seed=1))),
    ("_cat", "stack last", lambda a, b: F.stack([a, b], axis=-1), (normal(2, 3), normal(2, 3, seed=1))),
    ("embedding", "repeated ids", F.embedding, (np.array([[0, 2, 2], [5, 0, 2]]), normal(6, 4))),
    ("embedding", "one id", F.embedding, (np.array(3), normal(6, 4))),
    ("embedding", "size-one axes", F.embedding, (np.array([[0]]), normal(1, 1))),
    ("embedding", "no ids", F.embedding, (np.zeros((2, 0), np.int64), normal(6, 4))),
    ("cross_entropy", "rows", F.cross_entropy, (normal(4, 5), IDS)),
    ("cross_entropy", "ignored targets", F.cross_entropy, (normal(2, 3, 5), IGNORED)),
    ("cross_entropy", "ignore_index 0", lambda x, t: F.cross_entropy(x, t, ignore_index=0), (normal(4, 5), IDS)),
    ("cross_entropy", "one row", F.cross_entropy, (normal(5), np.array(3))),
    ("cross_entropy", "one class", F.cross_entropy, (normal(3, 1), np.zeros(3, np.int64))),
    ("cross_entropy", "large logits", F.cross_entropy, (30 * normal(4, 5), IDS)),
    ("cross_entropy", "smoothed", partial(F.cross_entropy, label_smoothing=0.3), (normal(2, 3, 5), IGNORED)),
    ("cross_entropy", "even", partial(F.cross_entropy, label_smoothing=1), (normal(4, 5), IDS)),
    ("nll_loss", "rows", F.nll_loss, (normal(4, 5), IDS)),
    ("nll_loss", "ignored targets", F.nll_loss, (normal(2, 3, 5), IGNORED)),
    ("nll_loss", "ignore_index 0", partial(F.nll_loss, ignore_index=0), (normal(4, 5), IDS)),
    ("nll_loss", "one row", F.nll_loss, (normal(5), np.array(3))),
    ("nll_loss", "of log_softmax", lambda x, t: F.nll_loss(F.log_softmax(x), t), (normal(4, 5), IDS)),
    ("mse_loss", "matrices", F.mse_loss, (normal(3, 4), normal(3, 4, seed=1))),
    ("mse_loss", "numbers", F.mse_loss, (normal(), positive())),
    ("mse_loss", "the same input", lambda x: F.mse_loss(x, x * 2.0), (normal(2, 3),)),
    ("kl_div", "rows", F.kl_div, (normal(2, 3, 5), positive(2, 3, 5))),
    ("kl_div", "log target", partial(F.kl_div, log_target=True), (normal(2, 3, 5), normal(2, 3, 5, seed=1))),
    ("kl_div", "of logits", lambda x, y: F.kl_div(F.log_softmax(x), F.softmax(y)), (normal(3, 5), positive(3, 5))),
    ("kl_div", "one distribution", F.kl_div, (normal(5), positive(5))),
    ("linear_cross_entropy", "every target", F.linear_cross_entropy, (normal(4, 3), normal(5, 3), IDS)),
    ("linear_cross_entropy", "ignored targets", F.linear_cross_entropy, (normal(2, 3, 4), normal(5, 4), IGNORED)),
    ("linear_cross_entropy", "smoothed", SMOOTHED, (normal(2, 3, 4), normal(5, 4), IGNORED)),
    ("linear_cross_entropy", "one row", F.linear_cross_entropy, (normal(1, 3), normal(5, 3), np.array([3]))),
    ("linear_cross_entropy", "size-one axes", F.linear_cross_entropy, (normal(1, 1), normal(1, 1), np.array([0]))),
]


@cases(*dict.fromkeys(op for op, *_ in ROWS))
def _rows(name):
    return [Case(label, fn, inputs) for op, label, fn, inputs in ROWS if op == name]


# -------------------------------------------------------------------------------------------------------- arithmetic

PAIRS = [
    ("equal shapes", (3, 4), (3, 4)),
    ("broadcast both ways", (3, 1, 4), (2, 1)),
    ("row", (2, 3, 4), (4,)),
    ("column", (3, 4), (3, 1)),
    ("scalar", (2, 3), ()),
    ("size-one axes", (1, 1), (1,)),
    ("empty axis", (0, 3), (3,)),
    ("empty axis from one", (1, 3), (0, 1)),
]


@cases("add", "sub", "mul", "div")
def _arithmetic(name):
    fn = REGISTRY[name]
    for label, a, b in PAIRS:
        yield Case(label, fn, (normal(*a), positive(*b)))
    yield Case("number on the right", lambda x: fn(x, 3), (normal(2, 3),))
    yield Case("number on the left", lambda x: fn(3, x), (positive(2, 3),))
    yield Case("the same input twice", lambda x: fn(x, x), (normal(2, 3),))


@cases("maximum", "minimum")
def _extremum(name):
    fn = REGISTRY[name]
    for label, a, b in PAIRS:
        n = math.prod(a)
        both = distinct(n + math.prod(b))
        yield Case(label, fn, (both[:n].reshape(a), both[n:].reshape(b)))
    yield Case("number on the right", lambda x: fn(x, 0.0), (normal(2, 3),))


@cases("pow")
def _pow():
    for exponent in (2, 3, 0, 1, -1, 0.5, -1.5):
        yield Case(f"exponent {exponent}", lambda x, n=exponent: F.pow(x, n), (positive(2, 3),))
    yield Case("negative base", lambda x: F.pow(x, 3), (normal(2, 3),))
    yield Case("empty axis", lambda x: F.pow(x, 2), (normal(0, 3),))


@cases("where")
def _where():
    for label, a, b in PAIRS:
        condition = integers(2, *np.broadcast_shapes(a, b)) == 1
        yield Case(label, lambda a, b, c: F.where(c, a, b), (normal(*a), normal(*b)), (condition,))
    both = normal(3, 4), normal(4)
    yield Case("broadcast condition", lambda a, b, c: F.where(c, a, b), both, (integers(2, 3, 1) == 1,))
    yield Case("number", lambda a, c: F.where(c, a, 0.0), (normal(3, 4),), (integers(2, 4) == 1,))


# ------------------------------------------------------------------------------------------------- elementwise, unary


@cases("neg", "exp", "abs", "tanh", "relu", "sigmoid", "softplus", "logsigmoid", "silu", "gelu", "log", "sqrt")
def _elementwise(name):
    draw = positive if name in ("log", "sqrt") else normal
    yield Case("large values", REGISTRY[name], (3 * draw(2, 3, 2),))
    for label, shape in [("matrix", (3, 4)), ("size-one axes", (1, 1)), ("scalar", ()), ("empty axis", (2, 0))]:
        yield Case(label, REGISTRY[name], (draw(*shape),))


@cases("swiglu")
def _swiglu():
    for shape in [(3, 4), (1, 1), (2, 3, 4), (2, 0)]:
        yield Case(f"shape {shape}", F.swiglu, (normal(*shape), normal(*shape, seed=1)))


# -------------------------------------------------------------------------------------------------------- reductions

AXES = [None, 0, -1, 1, (0, 2), (-1, 0), (0, 1, 2)]


@cases("sum", "mean", "max", "var")
def _reduction(name):
    fn = REGISTRY[name]
    for axis in AXES:
        for keepdims in (False, True):
            label = f"axis {axis}{', keepdims' if keepdims else ''}"
            yield Case(label, lambda x, a=axis, k=keepdims: fn(x, axis=a, keepdims=k), (distinct(2, 3, 4),))
    if name == "var":
        yield Case("no correction", lambda x: fn(x, axis=1, correction=0), (normal(2, 3),))
        yield Case("correction 1.5", lambda x: fn(x, correction=1.5), (normal(2, 3),))
        fn = partial(fn, correction=0)
    yield Case("scalar", fn, (normal(),))
    yield Case("size-one axes", lambda x: fn(x, axis=1), (normal(1, 1, 2),))
    yield Case("empty axis that stays", lambda x: fn(x, axis=1), (normal(0, 3),))
    if name == "sum":
        yield Case("empty axis that goes", lambda x: F.sum(x, axis=0), (normal(0, 3),))


@cases("logsumexp", "softmax", "log_softmax")
def _normalized(name):
    fn = REGISTRY[name]
    for axis in (-1, 0, 1):
        yield Case(f"axis {axis}", lambda x, a=axis: fn(x, axis=a), (normal(2, 3, 4),))
    yield Case("large values", fn, (30 * normal(2, 3),))
    yield Case("shifted", lambda x: fn(x + 1000.0), (normal(2, 3),))
    yield Case("size-one axis", fn, (normal(3, 1),))
    yield Case("empty axis", fn, (normal(0, 3),))
    if name == "logsumexp":
        yield Case("keepdims", lambda x: F.logsumexp(x, axis=0, keepdims=True), (normal(3, 4),))


# ---------------------------------------------------------------------------------------------------------- indexing


@cases("getitem")
def _getitem():
    x = normal(4, 5)
    for label, index in [
        ("integer", 1),
        ("negative integer", (-1, 2)),
        ("element", (1, 2)),
        ("slice", slice(1, 3)),
        ("strided slice", (slice(None, None, 2), slice(None, None, -1))),
        ("new axis", (slice(None), None, 1)),
        ("ellipsis", (..., slice(0, 2))),
        ("list with repeats", [0, 2, 2, -1]),
        ("empty slice", slice(2, 2)),
    ]:
        yield Case(label, lambda x, i=index: x[i], (x,))
    yield Case("integer array with repeats", lambda x, i: x[i], (x,), (np.array([[0, 0], [3, 0]]),))
    yield Case("integer rows", lambda x, i: x[i], (x,), (np.array([3, 0, -2]),))
    yield Case("a row named from both ends", lambda x, i: x[i], (x,), (np.array([3, -1, 0]),))
    yield Case("no rows", lambda x, i: x[i], (x,), (np.array([], int),))
    yield Case("pairs of integer arrays", lambda x, i, j: x[i, j], (x,), (np.array([0, 3, 0]), np.array([1, 1, 1])))
    yield Case("integer array after a slice", lambda x, i: x[1:, i], (x,), (np.array([1, 1, -1]),))
    yield Case("boolean rows", lambda x, i: x[i], (x,), (np.array([True, False, True, True]),))
    yield Case("boolean elements", lambda x, i: x[i], (x,), (integers(2, 4, 5) == 1,))
    yield Case("overlapping slices", lambda x: x[:3] * 2.0 + x[1:], (x,))
    yield Case("slices of an interior result", lambda x: (y := x * 2.0)[0] * y[1:3] + y[2:], (x,))


# --------------------------------------------------------------------------------------------------- matrix products


@cases("inv")
def _inv():
    for shape in ((3, 3), (2, 4, 4), (0, 2, 2)):
        yield Case(str(list(shape)), F.inv, (normal(*shape) + 4 * np.eye(shape[-1]),))


@cases("matmul")
def _matmul():
    for label, a, b in [
        ("matrices", (3, 4), (4, 2)),
        ("batched", (2, 3, 4), (2, 4, 5)),
        ("batch times matrix", (2, 3, 4), (4, 5)),
        ("matrix times batch", (3, 4), (2, 4, 5)),
        ("broadcast batches", (2, 1, 3, 4), (5, 4, 2)),
        ("vector times matrix", (4,), (4, 2)),
        ("vector times batch", (4,), (2, 4, 3)),
        ("matrix times vector", (3, 4), (4,)),
        ("batch times vector", (2, 3, 4), (4,)),
        ("vectors", (4,), (4,)),
        ("size-one axes", (1, 1), (1, 1)),
        ("empty inner axis", (3, 0), (0, 2)),
        ("no rows", (0, 4), (4, 2)),
        ("empty batch", (0, 3, 4), (4, 2)),
        ("empty batch of both", (0, 3, 4), (0, 4, 2)),
        ("empty batch times vector", (0, 3, 4), (4,)),
    ]:
        yield Case(label, F.matmul, (normal(*a), normal(*b, seed=1)))


@cases("linear", "addmm")
def _linear(name):
    for label, lead, n_in, n_out in [
        ("rows", (3,), 4, 2),
        ("batch", (2, 3), 4, 5),
        ("a vector", (), 4, 2),
        ("size-one axes", (1, 1), 1, 1),
        ("no rows", (0,), 4, 2),
        ("rank zero", (3,), 0, 2),
        ("no outputs", (3,), 4, 0),
    ]:
        x, w, b = normal(*lead, n_in), normal(n_out, n_in), normal(n_out)
        if name == "linear":
            yield Case(label, F.linear, (x, w, b))
            yield Case(f"{label}, no bias", F.linear, (x, w))
            yield Case(f"{label}, added", partial(F.linear, alpha=0.3), (x, w, normal(*lead, n_out)))
        else:
            yield Case(label, F.addmm, (b, x, w.T.copy()))
            yield Case(f"{label}, no bias", lambda x, w: F.addmm(None, x, w), (x, w.T.copy()))


# ----------------------------------------------------------------------------------------------------- normalization


@cases("layer_norm", "rms_norm")
def _norm(name):
    fn = REGISTRY[name]

    def parameters(d):
        return (positive(d), normal(d, seed=1)) if name == "layer_norm" else (positive(d),)

    for label, shape in [
        ("rows", (3, 5)),
        ("batch", (2, 3, 4)),
        ("a vector", (5,)),
        ("size-one rows", (1, 5)),
        ("size-one channel", (3, 1)),
        ("no rows", (0, 5)),
    ]:
        yield Case(label, fn, (normal(*shape), *parameters(shape[-1])))
    yield Case("large eps", lambda *a: fn(*a, eps=0.5), (normal(3, 5), *parameters(5)))
    yield Case("tiny inputs", lambda *a: fn(*a, eps=1e-12), (0.02 * normal(3, 5), *parameters(5)))


# --------------------------------------------------------------------------------------------------------- attention


@cases("rope")
def _rope():
    def angles(rows, T, half):
        angle = np.random.default_rng(0).uniform(0, 6, (rows, T, half))
        return np.cos(angle), np.sin(angle)

    yield Case("shared positions", F.rope, (normal(2, 3, 4, 6),), angles(1, 4, 3))
    yield Case("positions of each row", F.rope, (normal(2, 3, 4, 6),), angles(2, 4, 3))
    yield Case("one position", F.rope, (normal(1, 1, 1, 2),), angles(1, 1, 1))
    yield Case("no positions", F.rope, (normal(2, 3, 0, 6),), angles(1, 0, 3))


ATTENTION = [  # label, B, query heads, key heads, T, S, D, Dv
    ("square", 2, 2, 2, 3, 3, 4, 4),
    ("grouped queries", 2, 4, 2, 3, 3, 4, 4),
    ("one key head", 1, 3, 1, 3, 4, 2, 2),
    ("more keys than queries", 2, 2, 1, 2, 5, 4, 4),
    ("more queries than keys", 1, 2, 2, 5, 3, 4, 4),
    ("other width of values", 1, 2, 2, 3, 3, 4, 3),
    ("size-one axes", 1, 1, 1, 1, 1, 1, 1),
    ("no queries", 1, 2, 2, 0, 3, 4, 4),
    ("empty batch", 0, 2, 2, 3, 3, 4, 4),
]


@cases("scaled_dot_product_attention")
def _attention():
    def attention(causal, scale=None):
        return lambda q, k, v, mask=None: F.scaled_dot_product_attention(q, k, v, mask, causal, scale)

    calls = []  # label, inputs, mask
    for label, B, H, kv, T, S, D, Dv in ATTENTION:
        calls.append((label, (normal(B, H, T, D), normal(B, kv, S, D, seed=1), normal(B, kv, S, Dv, seed=2)), ()))
    B, H, T, S = 2, 4, 3, 5
    qkv = (normal(B, H, T, 2), normal(B, 2, S, 2, seed=1), normal(B, 2, S, 2, seed=2))
    masks = [(S,), (T, S), (1, S), (T, 1), (H, 1, 1), (B, 1, 1, S), (B, 1, T, S), (1, H, T, S), (B, H, T, S), (1,) * 4]
    for shape in masks:
        calls.append((f"boolean mask {shape}", qkv, (integers(3, *shape) > 0,)))
        calls.append((f"additive mask {shape}", qkv, (normal(*shape, seed=3),)))
    for label, inputs, mask in calls:
        yield Case(label, attention(False), inputs, mask)
        yield Case(f"{label}, causal", attention(True), inputs, mask)
    hidden = np.ones((B, 1, T, S), bool)
    hidden[0, 0, 1] = False
    yield Case("a row that sees nothing", attention(False), qkv, (hidden,))
    yield Case("minus infinity in the mask", attention(False), qkv, (np.where(hidden, 0.0, -np.inf),))
    yield Case("scale", attention(True, scale=0.7), qkv)
    long = (normal(1, 2, 66, 2), normal(1, 1, 67, 2, seed=1), normal(1, 1, 67, 2, seed=2))
    yield Case("several blocks of queries", attention(True), long)


@cases("packed_attention")
def _packed():
    yield Case("causal", lambda x: F.packed_attention(x, 2), (normal(2, 3, 12),))
    yield Case("not causal", lambda x: F.packed_attention(x, 2, is_causal=False), (normal(2, 3, 12),))
    keep = np.array([[True, True, False], [True, False, True]])[:, None, None]
    yield Case("padding", lambda x, m: F.packed_attention(x, 2, attn_mask=m), (normal(2, 3, 12),), (keep,))
    for label, shape in [("one head", (1, 3, 6)), ("size-one axes", (1, 1, 3)), ("several blocks", (1, 66, 6))]:
        yield Case(label, lambda x: F.packed_attention(x, 1), (normal(*shape),))


@cases("rotary_attention")
def _rotary():
    for label, (B, T, H, kv, D), each in [
        ("grouped queries", (2, 3, 4, 2, 4), False),
        ("positions of each row", (2, 3, 2, 2, 2), True),
        ("one position", (2, 1, 4, 1, 4), False),
        ("no positions", (2, 0, 2, 1, 4), False),
        ("several blocks", (1, 66, 2, 1, 2), False),
    ]:
        angle = normal(B if each else 1, T, D // 2)
        inputs = normal(B, T, H * D), normal(B, T, kv * D, seed=1), normal(B, T, kv * D, seed=2)
        yield Case(label, F.rotary_attention, inputs, (np.cos(angle), np.sin(angle)))
    inputs, angle = (normal(2, 3, 8), normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)), normal(1, 3, 2)
    keep = np.array([[True, True, False], [True, False, True]])[:, None, None]
    yield Case("padding", F.rotary_attention, inputs, (np.cos(angle), np.sin(angle), keep))
