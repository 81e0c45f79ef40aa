"""The judge: is a pullback the derivative of its op? The witness is the value, which knows of no pullback.

For f: R^n -> R^m with Jacobian J, a direction u in R^n and a cotangent w in R^m, both random,

    <w, J u>  =  <w, (f(x + h u) - f(x - h u)) / 2h>            from values alone
    <u, Jᵀ w> =  <u, pullback(w)>                               from the pullback

are the same number. One pair (u, w) sees every element of the Jacobian at once: a wrong factor, a lost sum over a
broadcast axis, one wrong element. The customary cotangent of ones (`f(x).sum()`) does not: the Jacobian of softmax
maps it to zero, so a softmax whose pullback returns zeros would pass.

**Step.** A central difference errs by h² f'''/6 + O(h⁴) from truncation and by about eps |f| / h from rounding. The
combination (4 D(h) - D(2h)) / 3 of two steps (Richardson 1911) removes the h² term and leaves h⁴ f⁽⁵⁾/30; the two
errors then balance at h = eps^(1/5), 7e-4 in float64, where both are near eps^(4/5) = 3e-13. The step of an input is
h times its root mean square, as a normalized or tiny input bends on its own scale.

**Tolerance.** The two numbers may differ by rtol * scale + 10 eps Σ|w f| / step, where scale is the larger of
Σ|u_j g_j| and Σ|w_k (J u)_k|: the size that the two sums have before their terms cancel. For the ops of this package
the largest deviation is 1e-10 of the scale, or 1e-8 where a case saturates an exponential on purpose; rtol = 1e-7
leaves room for functions that bend as much, and none for a mistake.

Inputs must lie away from kinks (relu at 0, a tie of `max`) by more than the step: there is no derivative to compare
with.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, asarray, is_array, to_numpy, xp_of
from .tensor import Node, Tensor, no_grad, together


class GradcheckError(AssertionError):
    """A pullback disagrees with the difference of its function's values.

    Attributes: `name` of the function, `input` (index or name), `index` of the worst element within it, and there
    `pullback` (its value), `difference` (the central difference) and `tolerance`. They are None where the failure is
    not about one element (a gradient of the wrong shape, say).
    """

    input: int | str | None
    index: tuple[int, ...] | None

    def __init__(
        self, message: str, name: str = "", input=None, index=None, pullback=None, difference=None, tolerance=None
    ):
        super().__init__(message)
        self.name, self.input, self.index = name, input, index
        self.pullback, self.difference, self.tolerance = pullback, difference, tolerance


class Agreement(NamedTuple):
    """What a passed check measured (always true in a condition, so `assert gradcheck(...)` reads well)."""

    deviation: float  # the worst |<u, pullback(w)> - <w, J u>|, relative to scale + rounding / rtol
    comparisons: int  # how many pairs of numbers were compared
    derivative: str = "the library's own"  # the one that was checked; or "yours", given as backward=


def gradcheck(
    fn: Callable[..., Any],
    *arrays: Any,
    backward: Callable[..., Any] | None = None,
    name: str | None = None,
    seed: int = 0,
    directions: int = 2,
    rtol: float = 1e-7,
) -> Agreement:
    """Compare the pullbacks of `fn(*arrays) -> Tensor`, or a `backward` of one's own, with central differences.

        mp.gradcheck(lambda x: F.softmax(x) * x, x)                     functions of Tensors

        def forward(x, w):                                              a derivative written by hand: plain arrays
            return np.tanh(x @ w)

        def backward(g, x, w):                                          dL/dx and dL/dw, from g = dL/d(forward's value)
            h = g * (1 - np.tanh(x @ w) ** 2)
            return h @ w.T, x.T @ h

        mp.gradcheck(forward, x, w, backward=backward)
        mp.gradcheck(layer.forward, x, backward=layer.backward)         a layer that remembers x: backward(g)

    Only what `backward` returns is judged: of the last line dL/dx, and not a weight's gradient that the layer leaves in
    `self.dw`. To have that judged, pass w as an argument and return its gradient, as above.

    Every floating-point array is checked as an input, converted to float64, under every subset of inputs that require
    gradients (with more than four inputs: all, each alone, all but each). Integer and boolean arrays and anything that
    is no array are passed on as they are.

    Args:
        backward: the derivative of an `fn` of plain arrays, called after it with g and the arrays, or g alone where it
            takes no more. It gives the gradient of each input, in the input's shape: one array, or a tuple (with
            None for what is not floating-point).
        name: what messages call the function (default: its own name).
        seed: names the random directions and cotangents.
        directions: how many random pairs (u, w) each input is judged by.
        rtol: see the module's docstring.

    Raises GradcheckError naming the input, the worst element and both values when they disagree; also when a gradient
    has the wrong shape, when a value or gradient is not finite, when `fn` gives two values for one input, and when
    computing gradients writes into an input, the result or the cotangent. Raises ValueError when there is nothing to
    check, TypeError when `fn` returns no Tensor (with `backward`: no array), or belongs to an object whose own backward
    was not given, or computes with one (through a lambda or a partial, too): only the library's derivative of `fn` would
    be looked at. `derivative` of the result says which one was.
    """
    call = list(map(_float64, arrays))
    inputs: dict[int | str, Tensor] = {i: a for i, a in enumerate(call) if isinstance(a, Tensor)}
    name = name or getattr(fn, "__name__", "fn")
    if not inputs:
        raise ValueError(f"gradcheck: {name} was given no floating-point array, so there is no derivative to check")

    if backward is not None:
        fn = _by_hand(fn, backward, name)
    elif (owner := next(_with_backward(fn), None)) is not None:
        kind = owner if isinstance(owner, type) else type(owner)
        raise TypeError(
            f"gradcheck: {kind.__name__} has a backward of its own, which is not looked at unless it is given: "
            "gradcheck(layer.forward, x, backward=layer.backward)"
        )

    def evaluate() -> Tensor:
        return fn(*call)

    worst, count = 0.0, 0
    before = {i: to_numpy(x.data).copy() for i, x in inputs.items()}
    try:
        y = _value(evaluate, name)
    except TypeError as error:  # of a NumPy function that was given a Tensor, or the result is an array
        if backward is None and ("__array_ufunc__" in str(error) or "not ndarray" in str(error)):
            hint = "of a function of plain arrays the derivative is given too: gradcheck(fn, x, backward=...)"
            raise TypeError(f"{error}; {hint}") from error
        raise
    if not np.array_equal(y, _value(evaluate, name)):
        raise GradcheckError(f"{name} gives two different values for the same inputs: fix its random stream", name)
    for k in range(directions):
        w = _random(y.shape, seed, k, 0)
        us = {i: _random(x.shape, seed, k, n + 1) for n, (i, x) in enumerate(inputs.items())}
        found = {i: _differences(evaluate, x, us[i], w) for i, x in inputs.items()}
        for subset in _subsets(list(inputs)):
            for i, x in inputs.items():
                x.requires_grad = i in subset
            gradients = _pull_back(evaluate, {i: inputs[i] for i in subset}, w, name)
            for i in subset:
                worst = max(worst, _compare(evaluate, inputs, i, us[i], w, gradients[i], found[i], name, rtol, subset))
                count += 1
            for i, x in inputs.items():
                if x.grad is not None:
                    raise GradcheckError(f"{name}: input {i} requires no gradient and was given one", name, i)
                if not np.array_equal(before[i], to_numpy(x.data)):
                    raise GradcheckError(f"{name} writes into its input {i}", name, i)
    return Agreement(worst, count, "the library's own" if backward is None else "yours")


def check_parameters(
    fn: Callable[[], Tensor], parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, float, GradcheckError | None]]:
    """Judge a whole model: yields (name, worst relative deviation, error or None) for each of `parameters`, one by one.

    `fn()` computes from the parameters, which it holds already: `lambda: model(ids)`. While the iterator runs their
    values are float64 and all of them require gradients; afterwards values, dtypes, `requires_grad` and `.grad` are as
    before. Raises as `gradcheck` for a result that is no Tensor, and a value or gradient that is not finite.
    """
    before = {name: (p.data, p.requires_grad, p.grad) for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.data, p.requires_grad = p.data.astype(xp_of(p.data).float64), True
        inputs: dict[int | str, Tensor] = dict(parameters)
        shape = _value(fn, "model").shape
        cotangents = [_random(shape, 0, k, 0) for k in range(2)]
        gradients = [_pull_back(fn, inputs, w, "model") for w in cotangents]
        for n, (name, p) in enumerate(parameters.items()):
            worst, error = 0.0, None
            try:
                for k, (w, g) in enumerate(zip(cotangents, gradients)):
                    u = _random(p.shape, 0, k, n + 1)
                    found = _differences(fn, p, u, w)
                    worst = max(worst, _compare(fn, inputs, name, u, w, g[name], found, "model", 1e-7))
            except GradcheckError as e:
                worst, error = np.inf, e
            yield name, worst, error
    finally:
        for name, p in parameters.items():
            p.data, p.requires_grad, p.grad = before[name]


# -------------------------------------------------------------------------------------------------------- its parts


def _with_backward(fn: Callable[..., Any]) -> Iterator[Any]:
    """The objects with a `backward` of their own, no Tensors, that a function is, is a method of, or computes with."""
    if isinstance(fn, functools.partial):
        yield from _with_backward(fn.func)
        objects = [*fn.args, *fn.keywords.values()]
    elif inspect.isfunction(fn):
        globals_ = (i.argval for i in dis.get_instructions(fn) if i.opname == "LOAD_GLOBAL")
        objects = [fn.__globals__.get(name) for name in globals_] + list(fn.__defaults__ or ())
        objects += [cell.cell_contents for cell in fn.__closure__ or ()]
    else:
        objects = [getattr(fn, "__self__", fn)]
    for x in objects:
        library = issubclass(x if isinstance(x, type) else type(x), Tensor) or inspect.ismodule(x)
        if not library and callable(getattr(x, "backward", None)):
            yield x


def _by_hand(forward: Callable[..., Any], backward: Callable[..., Any], name: str) -> Callable[..., Tensor]:
    """A function of Tensors that computes `forward` on their arrays, and whose pullbacks are what `backward` gives."""
    parameters = inspect.signature(backward).parameters.values()
    needed = [p.kind for p in parameters if p.default is p.empty and p.kind < p.KEYWORD_ONLY]
    alone = len(needed) == 1 and needed[0] != inspect.Parameter.VAR_POSITIONAL

    def fn(*args: Any) -> Tensor:
        arrays = [a.data if isinstance(a, Tensor) else a for a in args]
        y = forward(*arrays)
        if not (is_array(y) or isinstance(y, (int, float, np.generic))):
            raise TypeError(f"gradcheck: with backward=, {name} must return a plain array, not a {type(y).__name__}")
        result = Tensor(y if is_array(y) else np.asarray(y))
        inputs = {i: a for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad}

        def compute(g: Array) -> list[Array]:
            found = backward(g) if alone else backward(g, *arrays)
            found = list(found) if isinstance(found, (tuple, list)) else [found]
            if len(found) > len(args):
                raise GradcheckError(f"{name}: backward gives {len(found)} gradients for {len(args)} inputs", name)
            found += [None] * (len(args) - len(found))
            for i, x in inputs.items():
                if found[i] is None:
                    raise GradcheckError(f"{name}: backward gives no gradient for input {i}", name, i)
                found[i] = found[i] if is_array(found[i]) else np.asarray(found[i])
                if found[i].shape != x.shape:  # the engine would sum over a broadcast axis
                    what = f"a gradient of shape {found[i].shape}; the input has {x.shape}"
                    raise GradcheckError(f"{name}: backward gives input {i} {what}", name, i)
            return [found[i] for i in inputs]

        if inputs:
            pairs = zip(inputs.values(), together(len(inputs), compute))
            result._node = Node(name, [(x, pullback, x.shape, x.dtype) for x, pullback in pairs])
            result.requires_grad = True
        return result

    return fn


class _Difference(NamedTuple):
    value: float  # <w, J u>
    scale: float  # Σ |w_k (J u)_k|
    rounding: float  # the error that rounding alone may cause
    bend: float  # how far the slopes to either side differ: O(step) where the function is smooth


def _subsets(inputs: list) -> list[tuple]:
    """The sets of inputs that require gradients: every one, or for many inputs all, each alone, and all but each."""
    n = len(inputs)
    sizes = range(1, n + 1) if n <= 4 else (1, n - 1, n)
    return [subset for size in sizes for subset in itertools.combinations(inputs, size)]


def _random(shape: tuple[int, ...], *path: int) -> np.ndarray:
    """Random signs times uniform [0.5, 1.5): no element is near zero, so each one weighs in."""
    generator = np.random.default_rng(np.random.SeedSequence(path))
    return generator.uniform(0.5, 1.5, shape) * generator.choice([-1.0, 1.0], shape)


def _value(evaluate: Callable[[], Tensor], name: str) -> np.ndarray:
    y = evaluate()
    if not isinstance(y, Tensor):
        raise TypeError(f"gradcheck: {name} must return a Tensor, not {type(y).__name__}")
    value = to_numpy(y.data)
    if (index := _not_finite(value)) is not None:
        raise GradcheckError(f"{name}: the result of shape {value.shape} is {value[index]} at {index}", name)
    return value


def _pull_back(
    evaluate: Callable[[], Tensor], inputs: dict[int | str, Tensor], w: np.ndarray, name: str
) -> dict[int | str, np.ndarray]:
    """pullback(w) for each input, in the input's shape."""
    for x in inputs.values():
        x.grad = None
    y = evaluate()
    gradients: dict[int | str, np.ndarray] = {}
    if y.requires_grad:  # otherwise the result does not depend on these inputs, or fn has cut the graph
        value = to_numpy(y.data).copy()
        cotangent = asarray(w.astype(value.dtype), xp_of(y.data))
        y.backward(cotangent)
        if not np.array_equal(to_numpy(cotangent), w.astype(value.dtype)):
            raise GradcheckError(f"{name}: a pullback writes into the gradient it is given", name)
        if not np.array_equal(to_numpy(y.data), value):
            raise GradcheckError(f"{name}: a pullback writes into the result", name)
    for i, x in inputs.items():
        g = np.zeros(x.shape) if x.grad is None else to_numpy(x.grad)
        x.grad = None
        if g.shape != x.shape or g.dtype != x.dtype:
            found = f"the gradient of input {i} is {g.dtype} of shape {g.shape}"
            raise GradcheckError(f"{name}: {found}, the input is {x.dtype} of shape {x.shape}", name, i)
        if (index := _not_finite(g)) is not None:
            message = f"{name}: the gradient of input {i} is {g[index]} at {index}"
            raise GradcheckError(message, name, i, index, float(g[index]))
        gradients[i] = g
    return gradients


def _differences(evaluate: Callable[[], Tensor], x: Tensor, u: np.ndarray, w: np.ndarray) -> _Difference:
    """<w, J u> from the values at x ± step u and x ± 2 step u."""
    original, host = x.data, to_numpy(x.data)
    xp = xp_of(original)
    size = float(np.sqrt(np.mean(host * host))) if host.size else 0.0

    def at(t: float) -> np.ndarray:
        x.data = asarray(host + t * u, xp)
        with no_grad():
            return to_numpy(evaluate().data)

    try:
        here = at(0.0)
        dtype = here.dtype
        step = float(np.finfo(dtype).eps) ** 0.2 * (size or 1.0)
        plus, minus, plus2, minus2 = (at(t).astype(np.float64) for t in (step, -step, 2 * step, -2 * step))
    finally:
        x.data = original
    near, far = w * ((plus - minus) / (2 * step)), w * ((plus2 - minus2) / (4 * step))
    terms = (4 * near - far) / 3
    rounding = 10 * float(np.finfo(dtype).eps) * float(np.sum(np.abs(w * plus))) / step
    bend = float(np.abs(w * (plus - 2 * here + minus)).sum()) / step
    return _Difference(float(terms.sum()), float(np.abs(terms).sum()), rounding, bend)


def _compare(
    evaluate: Callable[[], Tensor], inputs: dict[int | str, Tensor], i: int | str, u: np.ndarray, w: np.ndarray,
    g: np.ndarray, found: _Difference, name: str, rtol: float, subset: tuple = (),
) -> float:  # fmt: skip
    """The deviation relative to scale + rounding / rtol; GradcheckError, naming the worst element, above rtol."""
    terms = u * g
    scale = max(float(np.abs(terms).sum()), found.scale)
    deviation = abs(float(terms.sum()) - found.value)
    tolerance = rtol * scale + found.rounding
    if deviation <= tolerance:
        return rtol * deviation / tolerance if tolerance else 0.0
    index, difference = _worst_element(evaluate, inputs[i], g, w)
    where = f"input {i}" if isinstance(i, int) else str(i)
    message = (
        f"{name}: the pullback of {where} (shape {g.shape}) disagrees with the central difference; worst at element "
        f"{index}: pullback {g[index]:.9g}, difference {difference:.9g}; along a random direction "
        f"{float(terms.sum()):.9g} and {found.value:.9g} (tolerance {tolerance:.2g})"
    )
    if len(inputs) > 1 and subset:
        message += f"; inputs requiring gradients: {', '.join(map(str, subset))}"
    if found.bend > 0.1 * scale:
        message += "; the slopes to either side differ: the function may have a kink near this point"
    raise GradcheckError(message, name, i, index, float(g[index]), difference, tolerance)


def _worst_element(evaluate: Callable, x: Tensor, g: np.ndarray, w: np.ndarray) -> tuple[tuple[int, ...], float]:
    """(index, central difference) of the element whose difference deviates most from `g`.

    Of an input with more than 1,024 elements, first the half whose sum deviates more is kept, again and again.
    """

    def along(elements: np.ndarray) -> float:
        e = np.zeros(g.size)
        e[elements] = signs[elements]
        return _differences(evaluate, x, e.reshape(g.shape), w).value

    signs = np.sign(_random((g.size,), 0))
    elements = np.arange(g.size)
    while elements.size > 1024:
        halves = np.array_split(elements, 2)
        off = [abs(along(half) - float((signs * g.reshape(-1))[half].sum())) for half in halves]
        elements = halves[int(off[1] > off[0])]
    values = np.array([along(elements[k : k + 1]) for k in range(elements.size)]) * signs[elements]
    k = int(np.argmax(np.abs(values - g.reshape(-1)[elements])))
    return tuple(int(n) for n in np.unravel_index(elements[k], g.shape)), float(values[k])


def _float64(a: Any) -> Any:
    """A floating-point array (or Tensor, or NumPy scalar) as a float64 Tensor; anything else as it is."""
    a = a.data if isinstance(a, Tensor) else np.asarray(a) if isinstance(a, np.floating) else a
    return Tensor(a.astype(xp_of(a).float64)) if is_array(a) and a.dtype.kind == "f" else a


def _not_finite(a: np.ndarray) -> tuple[int, ...] | None:
    """The index of the first element that is not finite; None where all are."""
    return next((tuple(map(int, index)) for index in np.argwhere(~np.isfinite(a))), None)
