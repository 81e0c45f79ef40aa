"""Optimizers, with PyTorch's names, defaults, parameter groups and results to float32 rounding.

An update is a dozen elementwise passes, and what costs is memory traffic and, for many small parameters, the calls
themselves. So the parameters of a group are cut into *blocks* of at most `ELEMENTS` elements: a large parameter gives
several blocks, many small ones share one (they are gathered, updated and written back together). All passes over a
block run while it is in the cache, and the blocks are spread over threads, in a fixed division. The state (moments) of
the parameters that are updated together lies in one flat buffer per kind, in the order of the blocks.

    weight ──┬─ block 0: weight[0:65536]          state:  exp_avg     block 0 | block 1 | block 2
             └─ block 1: weight[65536:90000]               exp_avg_sq  block 0 | block 1 | block 2
    bias, norm, ... ── block 2

Optimizers write in place, and only into parameters that require gradients and have one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..backend import Array, asarray, is_array, split_rows, xp_of
from ..nn.module import Parameter
from .schedule import SCHEDULES, constant, cosine, linear

__all__ = [
    "SCHEDULES", "SGD", "Adam", "AdamW", "NonFiniteGradient", "Optimizer", "clip_grad_norm", "constant", "cosine", "linear",
]  # fmt: skip

ELEMENTS = 1 << 16  # 256 KiB of float32: smaller ones wait for the interpreter lock, larger ones leave the cache
DEVICE_ELEMENTS = 1 << 22  # on a device what costs is the launch of a kernel

Named = Iterable[Parameter] | Iterable[tuple[str, Parameter]]
Piece = tuple[int, int, int]  # (index of the array, start, stop): elements of a flattened array


class NonFiniteGradient(ValueError):
    """A gradient holds NaN or infinity; `.name` says which."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


def pack(sizes: Iterable[int], limit: int) -> list[list[Piece]]:
    """Cut arrays of these sizes, in order, into blocks of at most `limit` elements; small arrays share a block."""
    blocks: list[list[Piece]] = []
    room = 0
    for i, size in enumerate(sizes):
        if size <= room:
            blocks[-1].append((i, 0, size))
            room -= size
        else:
            for start in range(0, size, limit):
                stop = min(start + limit, size)
                blocks.append([(i, start, stop)])
                room = limit - (stop - start)
    return blocks


def gathered(arrays: list[Array], block: list[Piece], scratch: Array) -> Array:
    """The elements of a block as one flat array: a view if it is a piece of one array, else gathered in `scratch`."""
    if len(block) == 1:
        i, start, stop = block[0]
        return arrays[i][start:stop]
    pieces = [arrays[i][start:stop] for i, start, stop in block]
    return xp_of(scratch).concatenate(pieces, out=scratch[: sum(stop - start for _, start, stop in block)])


def over_blocks(xp: Any, run: Callable[[slice], None], blocks: int, elements: int) -> None:
    """Call `run(slice of range(blocks))`: spread over threads on the CPU where it pays, once on a device."""
    if xp is np:
        split_rows(run, blocks, 4 * elements)  # a block is passed over several times
    elif blocks:
        run(slice(0, blocks))


def with_names(parameters: Named) -> list[tuple[str | None, Parameter]]:
    """(name or None, parameter) of parameters given alone or with their names. Raises TypeError for anything else."""
    pairs = [p if isinstance(p, tuple) else (None, p) for p in parameters]
    for name, p in pairs:
        if not isinstance(p, Parameter):
            raise TypeError(f"an optimizer works on Parameters; {name or 'it'} was given a {type(p).__name__}")
    return pairs


class _Bucket:
    """Parameters with the same options, dtype and step count: one flat buffer per kind of state, and their blocks."""

    def __init__(self, group: dict, step: int, parameters: list[Parameter]):
        self.group, self.step, self.parameters = group, step, parameters
        self.buffers: list[Array] = []
        self.values: list[Array] = []  # of this step: flat parameters and gradients
        self.gradients: list[Array] = []


class Optimizer:
    """What optimizers share: parameter groups, state, and the blocked, threaded walk over the parameters.

    Args:
        params: Parameters, or `(name, Parameter)` pairs (as `model.named_parameters()` gives; names make errors
            readable), or dictionaries `{"params": ..., option: value, ...}`: groups with options of their own.
        defaults: the options of groups that do not set them.

    A subclass says which arrays it keeps per parameter (`slots`) and updates one block (`update`).

    float16 parameters are refused: near 1, neighbouring float16 numbers lie 0.001 apart, so most steps would round
    to nothing. Store what is trained in float32 (a frozen base may stay in float16).
    """

    def __init__(self, params: Named | Iterable[dict], defaults: dict[str, Any]):
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[Parameter, dict[str, Any]] = {}
        self._plan_of: Any = None
        self._buckets: list[_Bucket] = []
        self._work: list[tuple[_Bucket, list[Piece], int, int]] = []  # block, and where its state lies in the buffers
        if isinstance(params, Parameter):
            raise TypeError("params must be an iterable of Parameters, not a single one: write [parameter]")
        params = list(params)
        if not params:
            raise ValueError("the optimizer got no parameters; give model.parameters(), or a list of groups")
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        for group in groups:
            self.add_param_group(group)

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add `{"params": ..., option: value, ...}`; options that are left out take the defaults."""
        unknown = sorted(set(group) - set(self.defaults) - {"params", "param_names"})
        if unknown:
            raise ValueError(f"{type(self).__name__} has no option {unknown[0]!r}; it has {', '.join(self.defaults)}")
        pairs = with_names([group["params"]] if isinstance(group["params"], Parameter) else group["params"])
        parameters = [p for _, p in pairs]
        known = {id(p) for g in self.param_groups for p in g["params"]}
        if len({id(p) for p in parameters}) < len(parameters) or any(id(p) in known for p in parameters):
            raise ValueError("a parameter appears more than once in the optimizer's parameters")
        new = {**self.defaults, **group, "params": parameters}
        if any(name is not None for name, _ in pairs):
            new["param_names"] = [name for name, _ in pairs]
        self._check(new)
        self.param_groups.append(new)
        for p in parameters:
            if p.requires_grad:
                self._check_parameter(p)

    def _check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for options out of range."""
        for name in ("lr", "weight_decay", "eps", "momentum"):
            if not group.get(name, 0.0) >= 0:
                raise ValueError(f"{type(self).__name__}: {name} must not be negative, got {group[name]}")
        for beta in group.get("betas", ()):
            if not 0 <= beta < 1:
                raise ValueError(f"{type(self).__name__}: betas must lie in [0, 1), got {group['betas']}")

    def _label(self, parameter: Parameter) -> str:
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p is parameter:
                    name = group.get("param_names", [None] * (j + 1))[j]
                    return name or f"parameter {j} of group {i}"
        return "a parameter"

    def _check_parameter(self, p: Parameter) -> None:
        if p.dtype.kind != "f":
            raise TypeError(
                f"{type(self).__name__}: {self._label(p)} of shape {p.shape} is {p.dtype}; only floating-point parameters "
                "are trained: set requires_grad=False, as for a quantized weight"
            )
        if p.dtype.itemsize < 4:
            raise TypeError(
                f"{type(self).__name__}: {self._label(p)} of shape {p.shape} is {p.dtype}, in which most steps would "
                "round to nothing; store what is trained in float32"
            )
        if isinstance(p.data, np.ndarray) and not p.data.flags.writeable:
            raise ValueError(
                f"{type(self).__name__}: {self._label(p)} of shape {p.shape} cannot be written: it is not allocated "
                "yet, or is a view of a file; load or copy the weights first"
            )

    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of the arrays kept for each parameter of a group."""
        raise TypeError(f"{type(self).__name__} defines no slots")

    def update(self, group: dict, step: int, p: Array, g: Array, slots: list[Array], s: Array) -> None:
        """Update a block in place: flat arrays of one length; `g` is only read, `s` is scratch, `step` is from 1."""
        raise TypeError(f"{type(self).__name__} defines no update")

    # ------------------------------------------------------------------------------------------------------ steps

    def step(self) -> None:
        """Update every parameter that requires a gradient and has one."""
        active = [[p for p in g["params"] if p.requires_grad and p.grad is not None] for g in self.param_groups]
        plan = (active, [self.slots(g) for g in self.param_groups])
        if plan != self._plan_of:
            self._plan(active)
            self._plan_of = plan
        if not self._work:
            return
        for bucket in self._buckets:
            bucket.step += 1
            bucket.values = [p.data.reshape(-1) for p in bucket.parameters]
            bucket.gradients = [p.grad.reshape(-1) for p in bucket.parameters]
            for p in bucket.parameters:
                if p.grad.shape != p.data.shape:
                    raise ValueError(f"{self._label(p)} has the shape {p.data.shape}, its gradient {p.grad.shape}")
        xp = xp_of(self._work[0][0].values[0])
        over_blocks(xp, lambda part: self._run(xp, self._work[part]), len(self._work), self._elements)
        for bucket in self._buckets:
            for p, flat in zip(bucket.parameters, bucket.values):
                self.state[p]["step"] = bucket.step
                if not p.data.flags.c_contiguous:  # `flat` is a copy then
                    p.data[...] = flat.reshape(p.data.shape)
            bucket.values, bucket.gradients = [], []

    def _run(self, xp: Any, work: list[tuple[_Bucket, list[Piece], int, int]]) -> None:
        scratch: dict[Any, list[Array]] = {}
        longest = max(stop - start for _, _, start, stop in work)
        for bucket, block, start, stop in work:
            dtype = bucket.values[0].dtype
            if dtype not in scratch:
                scratch[dtype] = [xp.empty(longest, dtype) for _ in range(3)]
            s, own_p, own_g = scratch[dtype]
            p, g = gathered(bucket.values, block, own_p), gathered(bucket.gradients, block, own_g)
            slots = [buffer[start:stop] for buffer in bucket.buffers]
            self.update(bucket.group, bucket.step, p, g, slots, s[: stop - start])
            if len(block) > 1:
                offset = 0
                for i, a, b in block:
                    bucket.values[i][a:b] = p[offset : offset + b - a]
                    offset += b - a

    def _plan(self, active: list[list[Parameter]]) -> None:
        """Sort the parameters into buckets, move their state into the buckets' buffers, cut the work into blocks."""
        buckets: dict[Any, _Bucket] = {}
        xp = xp_of(*[p.data for parameters in active for p in parameters])
        for i, (group, parameters) in enumerate(zip(self.param_groups, active)):
            slots = self.slots(group)
            for p in parameters:
                self._check_parameter(p)
                state = self.state.get(p)
                if state is None or set(state) != {"step", *slots}:
                    state = self.state[p] = {"step": 0, **dict.fromkeys(slots)}
                key = (i, str(p.dtype), state["step"])
                if key not in buckets:
                    buckets[key] = _Bucket(group, state["step"], [])
                buckets[key].parameters.append(p)
        self._buckets, self._work, self._elements = list(buckets.values()), [], 0
        for bucket in self._buckets:
            sizes = [p.size for p in bucket.parameters]
            for slot in self.slots(bucket.group):
                buffer = xp.zeros(sum(sizes), bucket.parameters[0].dtype)
                bucket.buffers.append(buffer)
                start = 0
                for p, size in zip(bucket.parameters, sizes):
                    view = buffer[start : start + size].reshape(p.shape)
                    if self.state[p][slot] is not None:
                        view[...] = self.state[p][slot]
                    self.state[p][slot] = view
                    start += size
            start = 0
            for block in pack(sizes, ELEMENTS if xp is np else DEVICE_ELEMENTS):
                stop = start + sum(b - a for _, a, b in block)
                self._work.append((bucket, block, start, stop))
                start = stop
            self._elements += start

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
        name, groups = type(self).__name__, state["param_groups"]
        here, there = [len(g["params"]) for g in self.param_groups], [len(g["params"]) for g in groups]
        if here != there:
            raise ValueError(f"{name}: the state is of groups with {there} parameters, this optimizer has {here}")
        parameters = [p for group in self.param_groups for p in group["params"]]
        options = [
            {**{k: tuple(v) if isinstance(v, list) else v for k, v in new.items()}, "params": old["params"]}
            for old, new in zip(self.param_groups, groups)
        ]
        for i, (group, old) in enumerate(zip(options, self.param_groups)):
            if set(group) - {"param_names"} != set(old) - {"param_names"}:
                raise ValueError(f"{name}: group {i} of the state has the options {sorted(group)}, here {sorted(old)}")
            self._check(group)
            if "param_names" in group:
                group["param_names"] = list(group["param_names"])
        slots = {p: self.slots(group) for group in options for p in group["params"]}
        loaded: dict[Parameter, dict[str, Any]] = {}
        for i, entry in state["state"].items():
            if not 0 <= int(i) < len(parameters):
                raise ValueError(f"{name}: the state names parameter {i}; there are {len(parameters)}")
            p = parameters[int(i)]
            if set(entry) != {"step", *slots[p]}:
                raise ValueError(
                    f"{name}: the state of parameter {i} holds {sorted(entry)}, not step, {', '.join(slots[p])}"
                )
            for slot in slots[p]:
                if entry[slot].shape != p.shape:
                    raise ValueError(
                        f"{name}: {slot} of parameter {i} has shape {entry[slot].shape}, the parameter {p.shape}"
                    )
            loaded[p] = {
                k: asarray(v, xp_of(p.data)).astype(p.dtype, copy=True) if is_array(v) else int(v)
                for k, v in entry.items()
            }
        self.state, self._plan_of = loaded, None
        for old, new in zip(self.param_groups, options):
            old.update(new)


class SGD(Optimizer):
    """Stochastic gradient descent (Sutskever et al. 2013, with PyTorch's convention of the momentum).

        g ← g + weight_decay · theta
        b ← g at the first step, then momentum · b + (1 - dampening) · g;   g ← g + momentum · b (nesterov), or b
        theta ← theta - lr · g

    Raises ValueError for negative options, and for nesterov without momentum or with dampening.
    """

    def __init__(
        self,
        params: Named | Iterable[dict],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, options)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("SGD: nesterov needs a momentum above 0 and a dampening of 0")

    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        """momentum_buffer, where there is momentum."""
        return ("momentum_buffer",) if group["momentum"] else ()

    def update(self, group: dict, step: int, p: Array, g: Array, slots: list[Array], s: Array) -> None:
        """One block, in place."""
        xp, momentum = xp_of(p), group["momentum"]
        if group["weight_decay"]:
            xp.multiply(p, group["weight_decay"], out=s)
            s += g
        else:
            s[...] = g
        if momentum:
            buffer = slots[0]
            if step == 1:
                buffer[...] = s
            else:
                if group["dampening"]:
                    s *= 1 - group["dampening"]
                buffer *= momentum
                buffer += s
            if group["nesterov"]:
                s += momentum * buffer
            else:
                s[...] = buffer
        s *= group["lr"]
        p -= s


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015, algorithm 1); `weight_decay` adds weight_decay · theta to the gradient.

        m ← β1 m + (1 - β1) g,   v ← β2 v + (1 - β2) g²
        theta ← theta - lr · (m / (1 - β1^t)) / (sqrt(v / (1 - β2^t)) + eps)

    State per parameter: `exp_avg` (m), `exp_avg_sq` (v) and `step` (t). Raises ValueError for options out of range.
    """

    decoupled = False

    def __init__(
        self,
        params: Named | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        """exp_avg and exp_avg_sq."""
        return ("exp_avg", "exp_avg_sq")

    def update(self, group: dict, step: int, p: Array, g: Array, slots: list[Array], s: Array) -> None:
        """One block, in place."""
        xp, (m, v), (beta1, beta2) = xp_of(p), slots, group["betas"]
        lr, decay = group["lr"], group["weight_decay"]
        if decay and self.decoupled:
            p *= 1 - lr * decay
        elif decay:
            g = g + decay * p
        xp.multiply(g, 1 - beta1, out=s)
        m *= beta1
        m += s
        xp.multiply(g, g, out=s)
        s *= 1 - beta2
        v *= beta2
        v += s
        # m / (1 - β1^t) / (sqrt(v / (1 - β2^t)) + eps), with the corrections drawn out into two scalars
        root = math.sqrt(1 - beta2**step)
        xp.sqrt(v, out=s)
        s += group["eps"] * root
        xp.divide(m, s, out=s)
        s *= lr * root / (1 - beta1**step)
        p -= s


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): theta ← (1 - lr · weight_decay) theta, then Adam.

    Every parameter is decayed; put norms and biases into a group with `weight_decay=0` to exempt them, as the Trainer
    does.
    """

    decoupled = True

    def __init__(
        self,
        params: Named | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, lr, betas, eps, weight_decay)


# ---------------------------------------------------------------------------------------------------------- clipping


def clip_grad_norm(parameters: Named, max_norm: float) -> float:
    """Scale all gradients by max_norm / (norm + 1e-6) where their common 2-norm exceeds `max_norm`; returns the norm.

    The norm is that of all gradients as one vector, summed in a fixed order (it does not depend on the number of
    threads). `max_norm=math.inf` only measures. Pascanu et al. 2013; the same as PyTorch's `clip_grad_norm_`, except
    that a NaN or infinite gradient raises NonFiniteGradient naming the parameter, and nothing is scaled then.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must not be negative, got {max_norm}")
    pairs = [(name, p) for name, p in with_names(parameters) if p.grad is not None]
    if not pairs:
        return 0.0
    gradients = [p.grad.reshape(-1) for _, p in pairs]
    xp = xp_of(*gradients)
    limit = ELEMENTS if xp is np else DEVICE_ELEMENTS
    blocks = pack([g.size for g in gradients], limit)
    partial = xp.zeros(len(blocks), xp.float64)
    widest = max((g.dtype for g in gradients), key=lambda dtype: dtype.itemsize)
    elements = sum(g.size for g in gradients)

    def measure(part: slice) -> None:
        own, s = [xp.empty(min(elements, limit), widest) for _ in range(2)]
        with np.errstate(over="ignore", invalid="ignore"):
            for k in range(part.start, part.stop):
                g = gathered(gradients, blocks[k], own)
                partial[k] = xp.multiply(g, g, out=s[: g.size]).sum()

    over_blocks(xp, measure, len(blocks), elements)
    norm = math.sqrt(float(partial.sum().item()))
    if not math.isfinite(norm):
        for i, (name, p) in enumerate(pairs):
            if not bool(xp.isfinite(p.grad).all().item()):
                bad = int((~xp.isfinite(p.grad)).sum().item())
                name = name or f"parameter {i}"
                raise NonFiniteGradient(
                    name, f"the gradient of {name} has {bad} of {p.size} elements that are NaN or infinite"
                )
        norm = math.sqrt(
            sum(float(xp.square(g.astype(xp.float64)).sum().item()) for g in gradients)
        )  # float32 overflowed
    if norm + 1e-6 > max_norm:
        factor = max_norm / (norm + 1e-6)

        def scale(part: slice) -> None:
            for block in blocks[part]:
                for i, start, stop in block:
                    gradients[i][start:stop] *= factor

        over_blocks(xp, scale, len(blocks), elements)
        for (_, p), flat in zip(pairs, gradients):
            if not p.grad.flags.c_contiguous:  # `flat` is a copy then
                p.grad[...] = flat.reshape(p.grad.shape)
    return norm
