"""What optimizers share: parameter groups, state, and the loop over the parameters, as PyTorch has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

import numpy as np

from ..backend import Array, asarray, xp_of
from ..nn.module import Parameter
from . import device
from .finite import Finite
from .kernels import in_pieces

Named = Iterable[Parameter] | Iterable[tuple[str, Parameter]]
Slots = dict[str, tuple[tuple[int, ...], Any]]
Params = Named | Iterable[dict[str, Any]]


def with_names(parameters: Named) -> list[tuple[str | None, Parameter]]:
    """(name or None, parameter) of parameters given alone or with their names. Raises TypeError for anything else."""
    pairs = [p if isinstance(p, tuple) else (None, p) for p in parameters]
    for name, p in pairs:
        if not isinstance(p, Parameter):
            raise TypeError(f"an optimizer works on Parameters; {name or 'it'} was given a {type(p).__name__}")
    return pairs


class Optimizer:
    """What optimizers share: parameter groups, state, and the loop over the parameters.

    Args:
        params: Parameters, or `(name, Parameter)` pairs (as `model.named_parameters()` gives; names make errors
            readable), or dictionaries `{"params": ..., option: value, ...}`: groups with options of their own.
        defaults: the options of groups that do not set them.

    A subclass says which arrays it keeps per parameter (`slots`) and updates a piece of one (`update`).

    float16 parameters are refused: near 1, two neighboring float16 numbers are 0.001 apart, so most steps would round
    to nothing. Store what is trained in float32 (a frozen base may stay in float16).

    Raises TypeError for what is no Parameter, or one of a refused dtype; ValueError for no parameters, for one given
    twice or not writable, and for options that are unknown or out of range. So does `add_param_group`.
    """

    def __init__(self, params: Params, defaults: dict[str, Any]):
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[Parameter, dict[str, Any]] = {}
        self._labels: dict[Parameter, str] = {}  # for error messages
        if isinstance(params, Parameter):
            raise TypeError("params must be an iterable of Parameters, not a single one: write [parameter]")
        if isinstance(params, (set, frozenset)):
            raise TypeError("params must be Parameters in an order, and a set has none: give a list")
        params = list(params)
        if not params:
            raise ValueError("the optimizer got no parameters; give model.parameters(), or a list of groups")
        for group in params if isinstance(params[0], dict) else [{"params": params}]:
            self.add_param_group(group)

    def __repr__(self) -> str:
        """AdamW(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01: 12 parameters), the groups side by side."""
        groups = []
        for group in self.param_groups:
            values = {n: f"{v:g}" if isinstance(v, float) else repr(v) for n, v in group.items() if n in self.defaults}
            options = ", ".join(f"{name}={value}" for name, value in values.items())
            groups.append(f"{options}: {len(group['params'])} parameters")
        return f"{type(self).__name__}({'; '.join(groups)})"

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add `{"params": ..., option: value, ...}`; options that are left out take the defaults."""
        if not isinstance(group, dict) or "params" not in group:
            found = f"has {', '.join(group) or 'nothing'}" if isinstance(group, dict) else f"is a {type(group).__name__}"
            raise ValueError(f"a group of parameters is a dictionary with 'params'; this one {found}")
        unknown = sorted(set(group) - set(self.defaults) - {"params", "param_names"})
        if unknown:
            raise ValueError(f"{type(self).__name__} has no option {unknown[0]!r}; it has {', '.join(self.defaults)}")
        pairs = with_names([group["params"]] if isinstance(group["params"], Parameter) else group["params"])
        new = {**group, **_options({**self.defaults, **group}), "params": [p for _, p in pairs]}
        if any(name is not None for name, _ in pairs):
            new["param_names"] = [name for name, _ in pairs]
        self._check(new)
        labels = {p: name or f"parameter {j} of group {len(self.param_groups)}" for j, (name, p) in enumerate(pairs)}
        if len(labels) < len(pairs) or labels.keys() & self._labels.keys():
            raise ValueError("a parameter appears more than once in the optimizer's parameters")
        self._labels |= labels
        self.param_groups.append(new)
        for p in labels:
            if p.requires_grad:
                self._check_parameter(p)

    def _check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for options out of range."""
        for name in ("lr", "weight_decay", "eps", "momentum", "dampening"):
            if not isinstance(group.get(name, 0.0), (int, float, np.number)):
                raise ValueError(f"{type(self).__name__}: {name} must be a number, got {group[name]!r}")
            if not group.get(name, 0.0) >= 0:
                raise ValueError(f"{type(self).__name__}: {name} must not be negative, got {group[name]}")
        betas = group.get("betas", (0, 0))
        if not isinstance(betas, (list, tuple)) or len(betas) != 2:
            raise ValueError(f"{type(self).__name__}: betas must be two numbers, got {betas}")
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"{type(self).__name__}: betas must lie in [0, 1), got {group['betas']}")

    def _check_parameter(self, p: Parameter) -> None:
        if p.dtype.kind != "f":
            what = f"is {p.dtype}; only floating-point parameters are trained: set requires_grad=False"
        elif p.dtype.itemsize < 4:
            what = f"is {p.dtype}, in which most steps would round to nothing; store what is trained in float32"
        elif isinstance(p.data, np.ndarray) and not p.data.flags.writeable:
            what = "cannot be written: it is not allocated yet, or is a view of a file; load or copy the weights first"
        else:
            return
        error = ValueError if what.startswith("cannot") else TypeError
        raise error(f"{type(self).__name__}: {self._labels[p]} of shape {p.shape} {what}")

    # ------------------------------------------------------------------------------------------------------ steps

    block = 1  # pieces hold whole blocks of this many elements
    flat: ClassVar[Callable[..., None] | None] = None  # `update` of many parameters in one launch, given their `numbers`

    def slots(self, group: dict[str, Any], p: Parameter) -> Slots:
        """The arrays kept for a parameter of a group: name -> (shape, dtype). They start at zero."""
        raise NotImplementedError

    def update(self, group: dict, step: int, p: Array, g: Array, *slots: Array) -> None:
        """Update a piece in place: flat arrays of one length (in `slots`, also one number for each block).

        `g` is only read, `step` counts from 1.
        """
        raise NotImplementedError

    def numbers(self, group: dict, step: int) -> dict[str, float]:
        """What `update` reads of a group's options in this step, where there is a `flat`."""
        raise NotImplementedError

    def step(self, finite: Finite | None = None) -> None:
        """Update every parameter that requires a gradient and has one; none where the numbers of `finite` are not.

        On a device they are asked for when the updates have been launched, which look at them themselves.
        Raises ValueError where the shapes of a parameter and its gradient differ; then nothing has changed.
        """
        groups = [(_options(g), [p for p in g["params"] if p.requires_grad and p.grad is not None]) for g in self.param_groups]
        for p in (p for _, params in groups for p in params):
            self._check_parameter(p)
            if p.grad.shape != p.shape:
                raise ValueError(f"{self._labels[p]} has the shape {p.shape}, its gradient {p.grad.shape}")
        if finite is not None and finite.looked is None and not finite:
            return
        before = dict(self.state)
        for options, params in groups:
            at_once: dict[tuple, list[list[Array]]] = {}  # those that one launch takes: of one step and dtype
            jobs = []
            for p in params:
                slots, zeros = self.slots(options, p), xp_of(p.data).zeros
                state = self.state.get(p, {})
                if set(state) != {"step", *slots}:
                    state = {"step": 0, **{slot: zeros(shape, dtype) for slot, (shape, dtype) in slots.items()}}
                self.state[p] = state = {**state, "step": state["step"] + 1}
                p._version += 1
                arrays = [p.data, p.grad, *(state[slot] for slot in slots)]
                if self.flat is not None and device.fits(arrays):
                    at_once.setdefault((state["step"], p.dtype), []).append(arrays)
                elif finite is None or finite:
                    jobs.append((partial(self.update, options, state["step"]), arrays))
            in_pieces(jobs, self.block)
            for (step, _), found in at_once.items():
                self.flat(*zip(*found), finite=finite, **self.numbers(options, step))
        if finite is not None and not finite:
            self.state = before

    def zero_grad(self) -> None:
        """Forget the gradients (`.grad` becomes None)."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    # ------------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """`{"state": {index: {"step", arrays}}, "param_groups": [{options, "params": [indices]}]}`, as PyTorch.

        Indices count the parameters through all groups. All is JSON-able but the arrays, which are the live ones.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        index = {p: i for i, p in enumerate(parameters)}
        return {
            "state": {i: dict(self.state[p]) for i, p in enumerate(parameters) if p in self.state},
            "param_groups": [{**g, "params": [index[p] for p in g["params"]]} for g in self.param_groups],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over state and options, for the same parameters in the same order; arrays are copied to their device.

        Raises ValueError, and changes nothing, where groups, counts, kinds of state or shapes differ.
        """
        name, mine, theirs = type(self).__name__, self.param_groups, state["param_groups"]
        here, there = ([len(group["params"]) for group in groups] for groups in (mine, theirs))
        if here != there:
            raise ValueError(f"{name}: the state is of groups with {there} parameters, this optimizer has {here}")
        loaded: dict[Parameter, dict[str, Any]] = {}
        parameters: list[tuple[Parameter, Slots]] = []
        for i, (old, new) in enumerate(zip(mine, theirs)):
            options = _options(new)
            if options.keys() != _options(old).keys():
                raise ValueError(f"{name}: group {i} of the state has the options {sorted(new)}, here {sorted(old)}")
            if other := [n for n, value in _options(old).items() if not _alike(options[n], value)]:
                raise ValueError(f"{name}: {other[0]} of group {i} of the state is {options[other[0]]!r}")
            self._check(options)
            parameters += [(p, self.slots(options, p)) for p in old["params"]]
        for i, entry in state["state"].items():
            if not 0 <= int(i) < len(parameters):
                raise ValueError(f"{name}: the state names parameter {i}; there are {len(parameters)}")
            p, slots = parameters[int(i)]
            if set(entry) != {"step", *slots}:
                what = f"the state of parameter {i} holds {sorted(entry)}"
                raise ValueError(f"{name}: {what}, not step, {', '.join(slots)}")
            loaded[p] = {"step": int(entry["step"])}
            if not 0 <= loaded[p]["step"] < 2**63:
                raise ValueError(f"{name}: the state of parameter {i} is of step {entry['step']}")
            for slot, (shape, dtype) in slots.items():
                if entry[slot].shape != shape:
                    what = f"{slot} of parameter {i} has shape {entry[slot].shape}, not {shape}"
                    raise ValueError(f"{name}: {what}; the parameter has {p.shape}")
                loaded[p][slot] = asarray(entry[slot], xp_of(p.data)).astype(dtype, order="C", copy=True)
        self.state = loaded
        for old, new in zip(mine, theirs):
            old.update({**new, **_options(new), "params": old["params"]})


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group as Python numbers: NumPy's would make float64 of float32 arrays, and cannot be saved."""
    return {name: _plain(value) for name, value in group.items() if name not in ("params", "param_names")}


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else getattr(value, "item", lambda: value)()


def _alike(a: Any, b: Any) -> bool:
    """Whether two options are of one kind: numbers, tuples of as many."""
    if isinstance(b, tuple):
        return isinstance(a, tuple) and len(a) == len(b) and all(map(_alike, a, b))
    return isinstance(a, (int, float)) if isinstance(b, (int, float)) else type(a) is type(b)
