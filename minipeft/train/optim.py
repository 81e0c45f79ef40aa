"""Optimizers, with PyTorch's names, defaults, parameter groups and results to float32 rounding.

    SGD    b ← momentum · b + g,   θ ← θ - lr · b
    Adam   m ← β1 m + (1 - β1) g,   v ← β2 v + (1 - β2) g²,   θ ← θ - lr · m̂ / (sqrt(v̂) + eps)
           m̂ = m / (1 - β1^t),      v̂ = v / (1 - β2^t)         in step t, from 1

`Optimizer.step` (optimizer.py) calls `update` for every parameter that requires gradients and has one, in flat pieces
(of at most `ELEMENTS` on the CPU), so plain array expressions need little memory: at most three pieces a thread.
Eight-bit Adam has a file of its own (adam8bit.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..backend import Array, xp_of
from ..nn.module import Parameter
from . import device
from .adam8bit import AdamW8bit
from .finite import Finite
from .kernels import ELEMENTS, clip, sum_of_squares
from .loraplus import loraplus_groups
from .optimizer import Named, Optimizer, Params, Slots, with_names
from .schedule import SCHEDULES, constant, cosine, linear

__all__ = [
    "ELEMENTS", "SCHEDULES", "SGD", "Adam", "AdamW", "AdamW8bit", "NonFiniteGradient", "Optimizer",
    "clip_grad_norm", "constant", "cosine", "linear", "loraplus_groups",
]  # fmt: skip

Betas = tuple[float, float]


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1); `weight_decay` adds weight_decay · θ to the gradient.

    State per parameter: `exp_avg` (m), `exp_avg_sq` (v) and `step` (t). Raises ValueError for options out of range.
    """

    decoupled = False

    def __init__(
        self, params: Params, lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def slots(self, group: dict[str, Any], p: Parameter) -> Slots:
        """exp_avg and exp_avg_sq, like the parameter."""
        return {"exp_avg": (p.shape, p.dtype), "exp_avg_sq": (p.shape, p.dtype)}

    flat = staticmethod(device.adam)

    def numbers(self, group: dict, step: int) -> dict[str, float]:
        """m̂ / (sqrt(v̂) + eps) = (sqrt(c2) / c1) · m / (sqrt(v) + eps sqrt(c2)), where c1 = 1 - β1^t, c2 = 1 - β2^t."""
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        root = math.sqrt(1 - beta2**step)
        return {
            "keep": 1 - lr * decay if self.decoupled else 1.0, "decay": 0.0 if self.decoupled else decay,
            "beta1": beta1, "rest1": 1 - beta1, "beta2": beta2, "rest2": 1 - beta2,
            "rate": lr * root / (1 - beta1**step), "eps": group["eps"] * root,
        }  # fmt: skip

    def update(self, group: dict, step: int, p: Array, g: Array, m: Array, v: Array) -> None:
        """One flat piece p of θ, in place; g is its gradient, m and v are the same piece of the `slots`, step is t."""
        n = self.numbers(group, step)
        if n["keep"] != 1:
            p *= n["keep"]
        if n["decay"]:
            g = g + n["decay"] * p
        m *= n["beta1"]
        m += n["rest1"] * g
        v *= n["beta2"]
        v += n["rest2"] * (g * g)
        p -= n["rate"] * (m / (xp_of(v).sqrt(v) + n["eps"]))


class AdamW(Adam):
    """Adam with decoupled weight decay, θ ← (1 - lr · weight_decay) θ (Loshchilov & Hutter 2019, arXiv:1711.05101).

    Every parameter is decayed; put norms and biases into a group with `weight_decay=0` to exempt them, as the Trainer
    does.
    """

    decoupled = True

    def __init__(
        self, params: Params, lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay)


class SGD(Optimizer):
    """Stochastic gradient descent (Sutskever et al. 2013, with PyTorch's convention of the momentum).

        g ← g + weight_decay · θ
        b ← g at the first step, then momentum · b + (1 - dampening) · g;   g ← g + momentum · b (nesterov), or b
        θ ← θ - lr · g

    Raises ValueError for negative options, and for nesterov without momentum or with dampening.
    """

    def __init__(
        self, params: Params, lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
        weight_decay: float = 0.0, nesterov: bool = False,
    ):  # fmt: skip
        options = {"lr": lr, "momentum": momentum, "dampening": dampening}
        super().__init__(params, {**options, "weight_decay": weight_decay, "nesterov": nesterov})

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("SGD: nesterov needs a momentum above 0 and a dampening of 0")

    def slots(self, group: dict[str, Any], p: Parameter) -> Slots:
        """momentum_buffer, where there is momentum."""
        return {"momentum_buffer": (p.shape, p.dtype)} if group["momentum"] else {}

    flat = staticmethod(device.sgd)

    def numbers(self, group: dict, step: int) -> dict[str, float]:
        """b ← kept · b + rest · g; nesterov: g ← g + momentum · b."""
        momentum, rest = (group["momentum"], 1 - group["dampening"]) if step > 1 else (0.0, 1.0)
        ahead = group["momentum"] * group["nesterov"]
        return {"lr": group["lr"], "decay": group["weight_decay"], "kept": momentum, "rest": rest, "ahead": ahead}

    def update(self, group: dict, step: int, p: Array, g: Array, buffer: Array | None = None) -> None:
        """One flat piece p of θ, in place; g is its gradient, `buffer` the same piece of b, step counts from 1."""
        n = self.numbers(group, step)
        if n["decay"]:
            g = g + n["decay"] * p
        if buffer is not None:
            buffer *= n["kept"]
            buffer += n["rest"] * g
            g = g + n["ahead"] * buffer if n["ahead"] else buffer
        p -= n["lr"] * g


class NonFiniteGradient(ValueError):
    """A gradient holds NaN or infinity; `.name` says which."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


def non_finite(array: Array) -> int:
    """How many elements are NaN or infinite."""
    return array.size - int(xp_of(array).isfinite(array).sum().item())


Gradients = list[tuple[str | None, Array]]


def gradients_of(parameters: Named) -> Gradients:
    """(name, gradient) of the parameters that have one."""
    return [(name, p.grad) for name, p in with_names(parameters) if p.grad is not None]


def clip_grad_norm(parameters: Named, max_norm: float) -> float:
    """Scale all gradients by max_norm / (norm + 1e-6) where their common 2-norm exceeds `max_norm`; returns the norm.

    The norm is that of all gradients as one vector, summed in a fixed order. `max_norm=math.inf` only measures. Pascanu
    et al. 2013 (arXiv:1211.5063); the same as PyTorch's `clip_grad_norm_`, except that a NaN or infinite gradient
    raises NonFiniteGradient naming the parameter, and nothing is scaled then. ValueError for a negative max_norm.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must not be negative, got {max_norm}")
    named = gradients_of(parameters)
    return read_norm(named, clipped(named, max_norm))


def clipped(named: Gradients, max_norm: float, losses: Sequence[Array] = (), more: Iterable[Array] = ()) -> Finite:
    """Clip, where the gradients and the losses are finite; (Σ g², losses, more), which are not read yet."""
    gradients = [g for _, g in named]
    finite = Finite([sum_of_squares(gradients), *losses], more)
    if max_norm < math.inf:
        clip(gradients, finite, float(max_norm))
    return finite


def read_norm(named: Gradients, finite: Finite) -> float:
    """The norm that `clipped` has measured. Raises NonFiniteGradient."""
    norm = math.sqrt(finite.numbers[0])
    if not math.isfinite(norm):
        for i, (name, g) in enumerate(named):
            if bad := non_finite(g):
                name = name or f"parameter {i}"
                message = f"the gradient of {name} has {bad} of {g.size} elements that are NaN or infinite"
                raise NonFiniteGradient(name, message)
    return norm
