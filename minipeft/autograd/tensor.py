"""The engine: tensors, the graph that an expression leaves behind, and the walk back through it.

An op is a plain function on arrays that returns its value and, for each positional input, one *pullback*: a function
from dL/dy to dL/dx_i (None, or at the end nothing, for an input that has no derivative).

    @op
    def mul(a, b):
        return a * b, lambda g: g * b, lambda g: g * a

`@op` lets it be called with Tensors. When an input requires a gradient the result gets a Node holding the pullbacks of
just those inputs; the other pullbacks are dropped at once, and with them every array that only they had captured. A
frozen weight therefore costs no gradient *and* no saved activation. `@kernel` gives an op a faster form of the same.

    x ──┐                       Tensor.data   an array
        ├─ Node(mul) ─ y        Tensor._node  how it was made (None for a leaf)
    w ──┘                       Node.edges    (parent, pullback, shape, dtype) of each input that needs a gradient

Parents are Nodes, or leaf Tensors; nodes never point to the tensors they made, so there is no reference cycle and the
graph is freed by reference counting alone. `backward` drops each node as soon as its pullbacks have run; so a node's
pullbacks may share work through a memo in their closure, and even overwrite what the node alone owns.

What changes a tensor's array (an optimizer's step, `load_state_dict`) counts its `_version` up; backward refuses a graph
whose pullbacks have captured the array of such a leaf, for they would take its new values.

The contract of a pullback: it is called at most once; it returns a new array, or `g` itself or a view of it, or a
`Term`; it never writes into `g`. It may return the shape the broadcasting gave: the engine sums back, once, centrally.
"""

from __future__ import annotations

import functools
import inspect
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import zip_longest
from types import FunctionType
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from ..backend import Array, add_at, is_array, to_numpy, xp_of

if TYPE_CHECKING:
    from .graph import Graph

P = ParamSpec("P")
REGISTRY: dict[str, Callable] = {}  # every op by name; the tests walk it


class _Mode(threading.local):
    """What holds on this thread: whether ops record a graph, who evaluates them (None: they themselves), who looks on."""

    enabled, evaluate, observe = True, None, None


_mode = _Mode()

_NUMPY, _SCALARS = np.ndarray, (np.generic, float, int)
_NOT_FLOAT = "only floating-point tensors can require gradients; this one is {} of shape {}"


class AutogradError(RuntimeError):
    """The graph was used in a way that has no meaning: freed, non-scalar without a gradient, no graph at all."""


def is_grad_enabled() -> bool:
    """False inside `no_grad()` on this thread."""
    return _mode.enabled


@contextmanager
def _set_mode(name: str, value: Any) -> Iterator[None]:
    before = getattr(_mode, name)
    setattr(_mode, name, value)
    try:
        yield
    finally:
        setattr(_mode, name, before)


def no_grad() -> AbstractContextManager[None]:
    """Inside `with no_grad():`, on this thread, ops record no graph (torch.no_grad)."""
    return _set_mode("enabled", False)


def evaluated_by(evaluate: Callable | None) -> AbstractContextManager[None]:
    """Inside, on this thread, an op's value and pullbacks come from `evaluate(name, form, *arrays, **options)`.

    `form` is what would have computed. The graph, and the walk back through it, are those of the real ops: so a model's
    memory is predicted from shapes, and its numbers are rounded (`autocast`).
    """
    return _set_mode("evaluate", evaluate)


# ------------------------------------------------------------------------------------------------------------ graph


class Node:
    """One application of an op: where the gradient of each input that needs one goes, and how it is computed.

    leaves   (leaf, its version, id of the array that owns its memory) of those inputs that are leaves, as they were
    """

    __slots__ = ("edges", "leaves", "op")

    def __init__(self, op: str, edges: list[tuple[Node | Tensor, Callable, tuple[int, ...], Any]]):
        self.op = op
        self.edges: list | None = edges  # None once backward has passed
        self.leaves = []
        for edge in edges:
            if type(x := edge[0]) is not Node:
                self.leaves.append((x, x._version, id(_owner(x.data))))


class Term:
    """A gradient that adds itself to the others of its array, which costs less than to make it and add it then."""

    __slots__ = ()

    def alone(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """The gradient as a new array, of the shape and dtype of what it is the gradient of."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it is alone")

    def added(self, total: Array, owned: bool) -> Array:
        """total + the gradient, which nobody else holds; where `total` is `owned` it may be written into."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is added")


class Slice(Term):
    """A gradient that is zero outside `array[index]`, where it is `value`: added in place, never expanded first.

    `repeats` says that the index may name an element twice, so that the values must be summed.
    """

    __slots__ = ("index", "repeats", "value")

    def __init__(self, index: Any, value: Array, repeats: bool = False):
        self.index, self.value, self.repeats = index, value, repeats

    def alone(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Zeros but for `value`."""
        return self.added(xp_of(self.value).zeros(shape, dtype), True)

    def added(self, total: Array, owned: bool) -> Array:
        """total[index] += value."""
        total = total if owned else total.copy()
        if self.repeats:
            add_at(total, self.index, self.value)
        else:
            total[self.index] += self.value
        return total


def op(definition: Callable[P, Any]) -> Callable[P, Tensor]:
    """Turn `definition(*arrays, **options) -> (value, *pullbacks)` into a differentiable function of Tensors.

    It is registered by its name. `op.definition` stays callable on plain arrays; `op.forms` are what computes, by array
    library: "numpy", "cupy", or "" for every other (the definition, until a `kernel` takes its place).

    Beside what the definition raises: AutogradError for an input that requires a gradient and has no derivative,
    TypeError for one not floating-point, ValueError for shapes that do not broadcast, BackendError for two libraries.
    """
    name, forms = definition.__name__, {"": definition}
    names = [p.name for p in inspect.signature(definition).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(definition)
    def apply(*args: Any, **options: Any) -> Tensor:
        for input_name in names[len(args) :] if options else ():  # inputs given by name are inputs all the same
            if input_name not in options:
                break
            args = (*args, options.pop(input_name))
        arrays = []
        for a in args:
            if isinstance(a, Tensor):
                arrays.append(a.data if type(a) is not Deferred else a.read_by(name))
            else:
                arrays.append(a.item() if isinstance(a, np.generic) else a)
        if name in PROMOTED:
            arrays = _of_one_kind(arrays)
        form = forms[""]
        if len(forms) > 1 and arrays:  # the first says which; where another is of another library, that comes out below
            numpy = type(arrays[0]) is _NUMPY
            form = forms.get("numpy" if numpy else xp_of(*arrays).__name__, form)
            if numpy and arrays[0].dtype.char == "e" and not any(a.dtype.char in "fd" for a in arrays if is_array(a)):
                form = definition  # all is float16, in which the kernels' sums would overflow
        if _mode.evaluate is not None:
            form = functools.partial(_mode.evaluate, name, form)
        try:
            value, *pullbacks = form(*arrays, **options)
        except (TypeError, ValueError) as error:
            _explain(name, arrays, error)
            raise
        if isinstance(value, _SCALARS):  # where a device gives 0-d arrays, NumPy gives scalars
            value = np.asarray(value)
        result = Tensor.__new__(Deferred if type(value) is Unsummed else Tensor)
        result.data, result.grad, result._node, result._version, result.requires_grad = value, None, None, 0, False
        if _mode.enabled:
            edges = []
            for a, pullback in zip_longest(args, pullbacks):
                if isinstance(a, Tensor) and a.requires_grad:
                    if pullback is None:
                        raise AutogradError(f"{name}: the input of shape {a.shape} has no derivative in this op")
                    if a.data.dtype.kind != "f":
                        raise TypeError(_NOT_FLOAT.format(a.data.dtype, a.data.shape))
                    edges.append((a if a._node is None else a._node, pullback, a.data.shape, a.data.dtype))
            if edges:
                result._node, result.requires_grad = Node(name, edges), True
        return result

    apply.definition, apply.forms = definition, forms
    REGISTRY[name] = apply
    return apply


def kernel(of: Callable, library: str = "") -> Callable[[Callable], Callable]:
    """Register a faster form of an op: the same arguments, values and gradients, to rounding.

        @kernel(ops.gelu, "cupy")      for the arrays of one library
        @kernel(ops.gelu)              for those of every library that has none of its own
    """

    def register(fn: Callable) -> Callable:
        of.forms[library] = fn
        return fn

    return register


def together(n: int, compute: Callable[[Array], Sequence[Array]]) -> list[Callable[[Array], Array]]:
    """The pullbacks of n inputs that share one computation: `compute(g)` gives all n gradients; each is taken once."""
    memo: dict[int, Array] = {}

    def pullback(i: int, g: Array) -> Array:
        if not memo:
            memo.update(enumerate(compute(g)))
        return memo.pop(i)

    return [functools.partial(pullback, i) for i in range(n)]


def _explain(name: str, arrays: list, error: Exception) -> None:
    """Raise what an array library's error means: BackendError for arrays of two libraries; shapes that do not match."""
    xp_of(*arrays)
    shapes = [str(a.shape) for a in arrays if is_array(a)]
    if "could not be broadcast" in str(error) and len(shapes) > 1:
        both = f"{', '.join(shapes[:-1])} and {shapes[-1]}"
        raise ValueError(f"{name}: shapes {both} cannot be broadcast together") from error


def unbroadcast(g: Array, shape: tuple[int, ...]) -> Array:
    """Sum `g` over the axes along which an array of `shape` was broadcast to `g.shape`."""
    if g.shape == shape:
        return g
    lead = g.ndim - len(shape)
    if lead > 0:
        g = g.sum(axis=tuple(range(lead)))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=axes, keepdims=True) if axes else g


def _owner(array: Array) -> Array:
    """The array whose memory this one is a view of; or itself."""
    base = getattr(array, "base", None)
    return array if base is None or not is_array(base) else base


def _check_unchanged(nodes: list[Node]) -> None:
    """Raises AutogradError where a leaf's array has been changed that a pullback has captured."""
    leaves = [leaf for node in nodes for leaf in node.leaves if leaf[0]._version != leaf[1]]
    if not leaves:
        return
    changed = {key: leaf for leaf, _, owner in leaves for key in (id(leaf), owner)}
    for node in nodes:
        for found in _captured([pullback for _, pullback, *_ in node.edges]):
            key = id(found if isinstance(found, Tensor) else _owner(found))
            if key in changed:
                raise AutogradError(
                    f"backward: {node.op!r} needs the tensor of shape {changed[key].shape} as it was, and since then an "
                    "optimizer's step or load_state_dict has changed it; call backward before, or compute the loss again"
                )


def _captured(functions: list[Callable]) -> Iterator[Tensor | Array]:
    """The tensors and arrays that functions, and functions in their closures, hold."""
    found, seen = [*functions], set()
    while found:
        x = found.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, Tensor) or is_array(x):
            yield x
        elif isinstance(x, functools.partial):
            found += [x.func, *x.args, *x.keywords.values()]
        elif isinstance(x, FunctionType):
            found += x.__defaults__ or ()
            for cell in x.__closure__ or ():
                with suppress(ValueError):  # an empty one
                    found.append(cell.cell_contents)
        elif isinstance(x, (list, tuple)):
            found += x
        elif isinstance(x, dict):
            found += x.values()


def nodes_below(root: Node) -> list[Node]:
    """The nodes below `root`, each before every node that it feeds (root last). Iterative: depth costs no stack.

    Raises AutogradError where a backward pass has freed the graph.
    """
    order: list[Node] = []
    seen: set[int] = {id(root)}
    stack: list[tuple[Node, int]] = [(root, 0)]
    while stack:
        node, i = stack.pop()
        if node.edges is None:
            raise AutogradError(
                f"backward through a freed graph: the result of {node.op!r} was already used in a backward pass; "
                "compute it again, or add the losses and call backward once"
            )
        for j in range(i, len(node.edges)):
            parent = node.edges[j][0]
            if isinstance(parent, Node) and id(parent) not in seen:
                seen.add(id(parent))
                stack += [(node, j + 1), (parent, 0)]
                break
        else:
            order.append(node)
    return order


def pull_back(root: Node, gradient: Array, deliver: Callable[[Tensor, Array | Term, bool], None]) -> None:
    """dL/dy = Σ, over the ops that read y, of pullback(dL/d(their result)), from `root` back to the leaves.

    So a node's gradient is complete once every node that it feeds has run. A leaf is handed its terms one by one, as
    `deliver(leaf, term, owned)`; `owned`: nobody else holds the array, so the next sum may write into it.
    Memory is freed on the way: a node's gradient leaves `pending` before its pullbacks run, so that it dies when the
    last of them has run; an edge leaves `edges` when its pullback runs, and with it what only that pullback kept.

    `gradient` has the shape of root's value. Raises AutogradError for a graph that an earlier walk has freed, and for one
    that needs an array that has been changed; nothing is delivered then.
    """
    order = nodes_below(root)
    _check_unchanged(order)
    pending: dict[int, tuple[Array, bool]] = {id(root): (gradient, False)}  # node -> (its gradient so far, owned)
    while order:
        node = order.pop()  # every node that it feeds has run: its gradient is complete
        g, _ = pending.pop(id(node))
        edges = node.edges[::-1]  # reversed: pop() then takes the inputs in order
        node.edges = None  # a second backward must not find half a graph
        while edges:
            parent, pullback, shape, dtype = edges.pop()
            d = pullback(g)  # the chain rule
            del pullback  # and with it the arrays that it alone kept, before a sum needs memory
            if not isinstance(d, Term):
                d = unbroadcast(d, shape)
                if isinstance(d, np.generic):
                    d = np.asarray(d)
                if d.dtype != dtype:
                    d = d.astype(dtype)
            owned = isinstance(d, Term) or (d is not g and d.base is None)
            if isinstance(parent, Tensor):
                deliver(parent, d, owned)
            else:  # the sum over the paths
                pending[id(parent)] = _added(pending.pop(id(parent), None), d, owned, shape, dtype)
            del parent, d  # before the next pullback needs memory


def _added(
    before: tuple[Array, bool] | None, d: Array | Term, owned: bool, shape: tuple[int, ...], dtype: Any
) -> tuple[Array, bool]:
    """(total + d, owned) of before = (total, owned), in place where the total is owned; None is a total of zeros."""
    if before is None:
        return (d.alone(shape, dtype), True) if isinstance(d, Term) else (d, owned)
    total, owned = before
    if isinstance(d, Term):
        total = d.added(total, owned)
    elif owned:
        total += d
    else:
        total = total + d
        if isinstance(total, np.generic):  # NumPy's sum of 0-d arrays is a scalar: it cannot be added to
            total = np.asarray(total)
    return total, True


def _accumulate(leaf: Tensor, g: Array | Term, owned: bool) -> None:
    """leaf.grad += g; `.grad` never shares memory with anything else."""
    before = None if leaf.grad is None else (leaf.grad, True)
    total, owned = _added(before, g, owned, leaf.data.shape, leaf.data.dtype)
    leaf.grad = total if owned else total.copy()


# ----------------------------------------------------------------------------------------------------------- tensor


PROMOTED = frozenset({"add", "sub", "mul", "div", "pow", "maximum", "minimum", "where"})


def _of_one_kind(arrays: list[Any]) -> list[Any]:
    """Beside an array of floats, one of integers takes its dtype, as in PyTorch; NumPy would go to float64."""
    floats = [a.dtype for a in arrays if is_array(a) and a.dtype.kind == "f"]
    if not floats:
        return arrays
    return [a.astype(floats[0]) if is_array(a) and a.dtype.kind in "iu" else a for a in arrays]


def _compared(compare: Callable) -> Callable:
    return lambda self, other: compare(self.data, other.data if isinstance(other, Tensor) else other)


class Tensor:
    """An array that remembers how it was computed.

    Args:
        data: an array (kept as it is, float64 included), or nested lists or numbers (floats become float32).
        requires_grad: whether `backward` should leave dL/d(this) in `.grad`.

    Raises TypeError for data that is not numeric, or of more than 64 bits, and for an integer or boolean tensor that is
    asked for gradients.
    """

    __slots__ = ("__weakref__", "_node", "_version", "data", "grad", "requires_grad")
    __array_ufunc__ = None  # `ndarray * Tensor` asks the Tensor, and does not loop over its elements
    __array_priority__ = 1000

    def __init__(self, data: Any, requires_grad: bool = False):
        if isinstance(data, Tensor):
            data = data.data
        if not is_array(data):
            generic = isinstance(data, np.generic)
            data = np.asarray(data)
            if data.dtype == np.float64 and not generic:
                data = data.astype(np.float32)
        if data.dtype.kind not in "fiub" or data.dtype.itemsize > 8:
            raise TypeError(f"a Tensor holds real numbers of up to 64 bits; data of dtype {data.dtype} was given")
        if requires_grad and data.dtype.kind != "f":
            raise TypeError(_NOT_FLOAT.format(data.dtype, data.shape))
        self.data: Array = data
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self._node: Node | None = None
        self._version = 0  # how often what knows of it has changed the array

    shape = property(operator.attrgetter("data.shape"))
    dtype = property(operator.attrgetter("data.dtype"))
    ndim = property(operator.attrgetter("data.ndim"))
    size = property(operator.attrgetter("data.size"))
    T = property(lambda self: self.transpose())

    def __repr__(self) -> str:
        made = f", op={self._node.op}" if self._node is not None else ", requires_grad=True" if self.requires_grad else ""
        return f"{type(self).__name__}({self.data!r}{made})"

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        if not self.ndim:
            raise TypeError("iteration over a tensor of no axes, a single number")
        return (self[i] for i in range(len(self)))

    def numpy(self) -> np.ndarray:
        """The values in host memory, in this shape (an explicit copy where they live on a device)."""
        return to_numpy(self.data)

    def item(self) -> float | int | bool:
        """The value of a tensor with one element, as a Python number. Raises ValueError for another size."""
        return self._number("item()")

    def _number(self, what: str) -> Any:
        if self.size != 1:
            raise ValueError(f"{what} needs a tensor with one element; this one has shape {self.shape}")
        return self.data.item()

    def __float__(self) -> float:
        return float(self._number("float()"))

    def __int__(self) -> int:
        return int(self._number("int()"))

    def __bool__(self) -> bool:
        return bool(self._number("a truth value"))

    def __format__(self, spec: str) -> str:
        return format(self._number(f"the format {spec!r}"), spec) if spec else str(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """For `np.asarray(tensor)`: the values of a tensor in host memory that requires no gradient, as in PyTorch."""
        if self.requires_grad:
            raise AutogradError("NumPy would lose the graph of a tensor that requires gradients: use tensor.detach()")
        if xp_of(self.data) is not np:
            raise TypeError("NumPy would move a tensor from its device to the host unasked: use tensor.numpy()")
        return np.array(self.data, dtype, copy=copy)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Set `requires_grad`; returns self. Raises TypeError for what is not in floats."""
        if requires_grad and self.dtype.kind != "f":
            raise TypeError(_NOT_FLOAT.format(self.dtype, self.shape))
        self.requires_grad = requires_grad
        return self

    def detach(self) -> Tensor:
        """The same array without the graph."""
        return Tensor(self.data)

    def graph(self, names: Any = None) -> Graph:
        """The ops below this tensor, to print or `.plot(path)`; `names` is a model, or {name: leaf}; see `autograd.graph`."""
        from .graph import Graph

        return Graph(self, names)

    def retain_grad(self) -> None:
        """Let `backward` leave dL/d(this) in `.grad`, although an op made this tensor; a leaf has it in any case.

        Departure from PyTorch: only what is computed from the tensor after this call counts.
        """
        if self._node is None or self._node.op == "retain_grad":
            return
        reference = weakref.ref(self)  # the graph must not hold what holds the graph

        def keep(g: Array) -> Array:
            if (tensor := reference()) is not None:
                _accumulate(tensor, g, False)
            return g

        self._node = Node("retain_grad", [(self._node, keep, self.shape, self.dtype)])

    def backward(self, grad: Any = None) -> None:
        """Add d(self)/d(leaf), weighted by `grad`, to `.grad` of every leaf that requires gradients; free the graph.

        `grad` has this tensor's shape; it may be left out for a tensor with one element (1 is taken).
        Raises AutogradError when there is nothing to differentiate, the graph was freed by an earlier backward, or an
        array that it needs has been changed since by an optimizer's step or `load_state_dict`;
        ValueError for a `grad` of another shape.
        """
        if not self.requires_grad:
            raise AutogradError("backward on a tensor that does not require gradients: no input of its computation did")
        xp = xp_of(self.data)
        if grad is None:
            if self.size != 1:
                raise AutogradError(f"backward without a gradient needs a scalar; this tensor has shape {self.shape}: pass grad=")
            grad = xp.ones_like(self.data)
        else:
            grad = grad.data if isinstance(grad, Tensor) else grad if is_array(grad) else xp.asarray(grad, dtype=self.dtype)
            if grad.shape != self.shape:
                raise ValueError(f"the gradient given to backward has shape {grad.shape}, the tensor {self.shape}")
            grad = grad.astype(self.dtype, copy=False)
        if self._node is None:
            _accumulate(self, grad, False)
        else:
            pull_back(self._node, grad, _accumulate)

    if TYPE_CHECKING:  # `ops` defines them

        def __add__(self, other: Any) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
        def reshape(self, *shape: Any) -> Tensor: ...
        def to(self, dtype: Any) -> Tensor: ...

        __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __add__
        __matmul__ = __rmatmul__ = __pow__ = __getitem__ = __add__
        exp = log = sqrt = tanh = abs = __neg__
        mean = max = sum
        transpose = swapaxes = reshape

    # Comparisons give plain boolean arrays: there is nothing to differentiate. Sets and dictionaries go by identity;
    # so must a search in a list (`any(x is t for x in tensors)`), where `in` would ask for the truth of an array.
    __hash__ = object.__hash__
    __eq__, __ne__, __lt__ = map(_compared, (operator.eq, operator.ne, operator.lt))
    __le__, __gt__, __ge__ = map(_compared, (operator.le, operator.gt, operator.ge))


class Unsummed:
    """x + branch, of one shape and dtype, until somebody needs it: `value()` adds, unless an op that got this has."""

    def __init__(self, x: Array, branch: Array):
        self.x, self.branch, self.shape, self.dtype = x, branch, x.shape, x.dtype
        self.sum: Array | None = None

    def value(self) -> Array:
        """The sum."""
        if self.sum is None:
            self.give(self.x + self.branch)
        return self.sum

    def give(self, sum: Array) -> None:
        """What an op has computed on its way."""
        self.sum, self.x, self.branch = sum, None, None


_HELD = Tensor.__dict__["data"]  # the slot


class Deferred(Tensor):
    """A sum that a device adds when `data` is first read, or in the norm that reads it first: one launch, not two."""

    __slots__ = ()

    @property
    def data(self) -> Array:
        held = _HELD.__get__(self)
        return held.value() if type(held) is Unsummed else held

    @data.setter
    def data(self, value: Any) -> None:
        _HELD.__set__(self, value)

    def read_by(self, op: str) -> Any:
        """What an op gets: the norms' device forms add the summands themselves."""
        held = _HELD.__get__(self)
        waits = type(held) is Unsummed and held.sum is None
        return held if waits and op in ("layer_norm", "rms_norm") and _mode.evaluate is None else self.data


def gradients(
    output: Tensor, grad: Array, leaves: Iterable[Tensor], others: Callable[[Tensor], None] | None = None
) -> list[Array | None]:
    """dL/d(leaf), in its shape, of each of `leaves`, given dL/d(output): `backward` that does not write `.grad`.

    `others` is called with each leaf that has a gradient and is none of them.
    """
    holders = {id(leaf): Tensor(leaf.data) for leaf in leaves}

    def deliver(leaf: Tensor, g: Array | Term, owned: bool) -> None:
        if id(leaf) in holders:
            _accumulate(holders[id(leaf)], g, owned)
        elif others is not None:
            others(leaf)

    if output._node is not None:
        pull_back(output._node, grad, deliver)
    elif output.requires_grad:
        deliver(output, grad, False)
    return [holders[id(leaf)].grad for leaf in leaves]


@contextmanager
def _as_leaves(tensors: list[Tensor]) -> Iterator[None]:
    """Inside, these tensors are leaves: a graph that is recorded from them ends there, however they were computed."""
    nodes = [t._node for t in tensors]
    for t in tensors:
        t._node = None
    try:
        yield
    finally:
        for t, node in zip(tensors, nodes):
            t._node = node


def checkpoint(fn: Callable[..., Tensor], *inputs: Tensor, parameters: Iterable[Tensor] = ()) -> Tensor:
    """y = fn(*inputs), keeping only the inputs: what `fn` computes inside is dropped, and computed again in backward.

    One recomputation serves all inputs. `parameters` are the tensors that `fn` uses and that are not its arguments.
    Inputs may have any shape. `fn` must compute the same thing twice: dropout does when its `Rng` is keyed. In backward,
    AutogradError is raised where a parameter has been changed meanwhile, or one that needs a gradient is not listed.
    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174).
    """
    with no_grad():
        value = fn(*inputs).data
    parameters = [*parameters]
    versions = [p._version for p in parameters]
    needed = [leaf for leaf in dict.fromkeys([*inputs, *parameters]) if leaf.requires_grad]
    result, evaluate = Tensor(value), _mode.evaluate  # in backward as now
    if not (needed and is_grad_enabled()):
        return result

    def unlisted(leaf: Tensor) -> None:
        raise AutogradError(f"checkpoint: fn uses a tensor of shape {leaf.shape} that needs a gradient: list it in parameters")

    def compute(g: Array) -> list[Array]:
        if changed := [p.shape for p, version in zip(parameters, versions) if p._version != version]:
            raise AutogradError(
                f"backward: a parameter of shape {changed[0]} was changed after the forward pass of a checkpoint, which "
                "would compute another one now; call backward before it is changed, or compute the loss again"
            )
        again = {id(x): Tensor(x.data, requires_grad=x.requires_grad) for x in inputs}
        with _set_mode("enabled", True), evaluated_by(evaluate), _as_leaves(needed):
            out = fn(*[again[id(x)] for x in inputs])
        found = gradients(out, g, [again.get(id(leaf), leaf) for leaf in needed], unlisted)
        return [xp_of(g).zeros_like(leaf.data) if d is None else d for leaf, d in zip(needed, found)]

    edges = [
        (leaf if leaf._node is None else leaf._node, pullback, leaf.shape, leaf.dtype)
        for leaf, pullback in zip(needed, together(len(needed), compute))
    ]
    result._node, result.requires_grad = Node("checkpoint", edges), True
    return result
