"""Why a parameter does not move: its gradient is followed back, from the parameter towards the loss, to where it ends.

why_unmoved(model, lambda: model.loss(ids, labels), optimizer)

{"....q_proj.default.lora_A": "its gradient is exactly 0, lost in linear, where ....q_proj.default.lora_B is all
                               zeros: linear > linear > lora_A"}
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..autograd.tensor import Node, Tensor, Term, gradients, nodes_below
from ..backend import Array, xp_of
from .module import Module
from .watch import watch

Edge = tuple[Node, int]  # a node, and which of its inputs


def why_unmoved(model: Module, loss: Callable[[], Tensor], optimizer: Any = None) -> dict[str, str]:
    """{path of a parameter: why its gradient does not move it} of all that have such a reason. Nothing is changed.

    Args:
        model: the parameters, and the modules through which the gradients go.
        loss: computes the loss of one step from the model; it is called once.
        optimizer: also names what it does not hold, and learning rates of 0.

    The reasons are looked for in this order, and one is given: frozen; not in the optimizer; not reached from the loss;
    a gradient of exactly 0; a learning rate of 0. With gradient checkpointing a block is one op, so leave it off here.

    Raises TypeError for a loss that is no function, or that returns no Tensor; ValueError for one that is not finite.
    """
    if not callable(loss):
        raise TypeError(
            f"why_unmoved calls the loss: give a function, lambda: model.loss(...), not a {type(loss).__name__}"
        )
    with watch(model) as seen:
        value = loss()
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the loss must be a Tensor, whose graph is followed back, not a {type(value).__name__}: {value!r}"
        )
    if not xp_of(value.data).isfinite(value.data).all().item():
        raise ValueError(
            f"the loss is {value.data}: no gradient is to be trusted; find where it arises with model.watch()"
        )
    names = {id(p): path for path, p in model.named_parameters()}
    groups = {id(p): group for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    found = _Gradients(value, trained, names, {id(x._node): path for path, x in seen.items() if isinstance(x, Tensor)})
    reasons = {}
    for path, p in model.named_parameters():
        if not p.requires_grad:
            reason = "frozen: requires_grad is False"
        elif optimizer is not None and id(p) not in groups:
            reason = "not in the optimizer"
        elif not found.reaches(p):
            reason = f"not reached from the loss: {_where_cut(path.rpartition('.')[0], seen, found)}"
        elif not found.moves(p):
            reason = found.way_to(p)
        else:
            reason = "its learning rate is 0" if groups.get(id(p), {}).get("lr") == 0 else ""
        if reason:
            reasons[path] = reason
    return reasons


def _where_cut(owner: str, seen: dict[str, Any], found: _Gradients) -> str:
    """Between which modules the way from the loss to a module ends."""
    if not found.edges:
        return "the loss has no graph; it was computed in no_grad(), or from detached or frozen tensors alone"
    parts = owner.split(".") if owner else []
    above = [path for path in (".".join(parts[:i]) for i in range(len(parts) + 1)) if path in seen]  # outermost first
    if owner not in seen:
        last = (
            f"the last module called on the way to it is {above[-1] or 'the model'}"
            if above
            else "nor was any around it"
        )
        return f"{owner or 'the model'} was not called, {last}"
    reached = [path for path in above if found.reaches(seen[path])]
    if reached and reached[-1] == owner:
        return f"the result of {owner} is, but was computed without the parameter, or from a detached copy"
    first = above[above.index(reached[-1]) + 1] if reached else above[0]
    inside = f", inside {reached[-1]}" if reached and reached[-1] else ""
    return f"the result of {first or 'the model'} was detached, or is not used{inside}"


class _Gradients:
    """One backward pass that notes, for each input of each op, whether a gradient came and whether one went on."""

    def __init__(self, value: Tensor, leaves: list[Tensor], names: dict[int, str], modules: dict[int, str]):
        self.names, self.modules = names, modules
        self.readers: dict[int, list[Edge]] = {}  # a node or leaf -> where it is an input
        self.edges: dict[
            Edge, tuple[bool, bool]
        ] = {}  # (whether the op's gradient is not 0, whether the input's is not)
        self.zeros: dict[Node, list[Tensor]] = {}  # parameters of an op that are all zeros
        for node in nodes_below(value._node) if value._node else ():
            self.zeros[node] = [x for x, *_ in node.edges if id(x) in names and not _any(x.data)]
            for i, (x, pullback, *shape) in enumerate(node.edges):
                self.readers.setdefault(id(x), []).append((node, i))
                node.edges[i] = (x, self._noting((node, i), pullback, *shape), *shape)
                self.edges[node, i] = False, False
        self.root = value._node
        one = xp_of(value.data).ones_like(value.data)
        self.found = {id(p): g for p, g in zip(leaves, gradients(value, one, leaves))}

    def _noting(self, edge: Edge, pullback: Callable, shape: tuple[int, ...], dtype: Any) -> Callable:
        def noted(g: Array) -> Any:
            d = pullback(g)
            self.edges[edge] = _any(g), _any(d.alone(shape, dtype) if isinstance(d, Term) else d)
            return d

        return noted

    def reaches(self, x: Any) -> bool:
        """Whether the loss was computed from this tensor, with a graph."""
        if not isinstance(x, Tensor) or self.root is None:
            return False
        return id(x) in self.readers or id(x._node) in self.readers or x._node is self.root

    def moves(self, p: Tensor) -> bool:
        """Whether the gradient of a leaf has an element that is not 0."""
        return self.found[id(p)] is not None and _any(self.found[id(p)])

    def way_to(self, p: Tensor) -> str:
        """Where the gradient of a leaf becomes 0, and the ops from there to it."""
        way, x, last = [self.names[id(p)].rpartition(".")[2]], p, ""
        while True:
            lost = [(node, i) for node, i in self.readers[id(x)] if not self.edges[node, i][1]]
            if not lost:
                return f"its gradient is exactly 0: the terms from {len(self.readers[id(x)])} ops cancel"
            node, i = lost[0]
            way += [] if node.op == "retain_grad" else [node.op]
            if self.edges[node, i][0]:
                break
            x, last = node, self.modules.get(id(node), last)
        factor = max(self.zeros[node], key=lambda x: x.ndim, default=None)  # a weight, and not its bias, is a factor
        zeros = f", where {self.names[id(factor)]} is all zeros" if self.zeros[node] else ""
        place = f" after {last}" if last and not zeros else ""
        return f"its gradient is exactly 0, lost in {node.op}{place}{zeros}: {' > '.join(reversed(way))}"


def _any(array: Array) -> bool:
    return bool((array != 0).any().item())
