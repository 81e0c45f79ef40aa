"""Loss scaling: float16 has no number between 0 and 6e-8, and many gradients are smaller; so they travel S times as large.

    scaler.scale(loss).backward()       dL/dw · S, in which fewer numbers are flushed to zero
    scaler.unscale_(optimizer)          dL/dw, in float32, which holds it: now it can be measured and clipped
    scaler.step(optimizer)              the optimizer's step, left out where a gradient is infinite or NaN: S was too large
    scaler.update()                     S ← S · backoff after such a step; S · growth after `growth_interval` good ones
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, overload
from weakref import WeakKeyDictionary

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from .finite import Finite
from .kernels import scale, sum_of_squares
from .optimizer import Optimizer

T = TypeVar("T", list[Tensor], tuple[Tensor, ...])
_OPTIONS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


class GradScaler:
    """Scales a loss, so that its gradients pass through float16; torch.amp.GradScaler's scales, step for step.

    Args:
        init_scale: S at first.
        growth_factor, growth_interval: after `growth_interval` steps in a row without an overflow, S is multiplied by
            `growth_factor`.
        backoff_factor: after a step with an overflow, S is multiplied by this.
        enabled: False makes `scale` give what it gets, and `step` the optimizer's.

    Source: Micikevicius et al. 2018 (arXiv:1710.03740), section 3.2, and PyTorch 2.13. Departures: no `device`;
    ValueError for what there is an AssertionError; `unscale_` returns whether all gradients are finite.

    Raises ValueError for a growth factor of at most 1, a backoff factor outside (0, 1), a scale or interval that is
    not positive.
    """

    def __init__(
        self, *, init_scale: float = 2.0**16, growth_factor: float = 2.0, backoff_factor: float = 0.5,
        growth_interval: int = 2000, enabled: bool = True,
    ):  # fmt: skip
        self._enabled, self._found = enabled, WeakKeyDictionary()  # optimizer -> [all gradients are finite, has stepped]
        self._take(init_scale, growth_factor, backoff_factor, growth_interval, 0)

    def _take(self, S: float, growth: float, backoff: float, interval: int, tracker: int) -> None:
        for name, value, good, what in (
            ("scale", S, 0 < S < math.inf, "positive"), ("growth_factor", growth, 1 < growth < math.inf, "above 1"),
            ("backoff_factor", backoff, 0 < backoff < 1, "between 0 and 1"),
            ("growth_interval", interval, isinstance(interval, int) and interval > 0, "a positive integer"),
            ("_growth_tracker", tracker, isinstance(tracker, int) and 0 <= tracker < interval, "below growth_interval"),
        ):  # fmt: skip
            if not good:
                raise ValueError(f"GradScaler: {name} must be {what}, got {value!r}")
        self._scale, self._growth_factor, self._backoff_factor = float(np.float32(S)), float(growth), float(backoff)
        self._growth_interval, self._growth_tracker = interval, tracker

    def __repr__(self) -> str:
        return f"{type(self).__name__}(scale={self.get_scale():g})"

    def is_enabled(self) -> bool:
        """Whether it scales."""
        return self._enabled

    def get_scale(self) -> float:
        """S; 1 where it is not enabled."""
        return self._scale if self._enabled else 1.0

    @overload
    def scale(self, outputs: Tensor) -> Tensor: ...
    @overload
    def scale(self, outputs: T) -> T: ...
    def scale(self, outputs: Any) -> Any:
        """S · loss, in float32 at least; or of each of several. Raises TypeError for what is no Tensor."""
        if not isinstance(outputs, Tensor):
            if not isinstance(outputs, (list, tuple)):
                raise TypeError(f"GradScaler scales a Tensor, or a list or tuple of them, not a {type(outputs).__name__}")
            return type(outputs)(map(self.scale, outputs))
        if not self._enabled:
            return outputs
        return (F.to(outputs, np.float32) if outputs.dtype == np.float16 else outputs) * self._scale

    def unscale_(self, optimizer: Optimizer, look: bool = True) -> bool:
        """Divide the gradients of the optimizer's parameters by S, in place; returns whether all are finite.

        `step` does it where it has not been called. look=False leaves it to `step` to say what is finite. Raises
        RuntimeError the second time since the last `update`;
        ValueError, "Attempting to unscale FP16 gradients", for gradients stored in float16: divided there, they would be
        flushed after all. Keep the trained weights in float32, and let `autocast` round them.
        """
        if not self._enabled:
            return True
        if optimizer in self._found:
            after = "is being called after step()" if self._found[optimizer][1] else "has already been called on this optimizer"
            raise RuntimeError(f"unscale_() {after} since the last update()")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            raise ValueError("GradScaler: no parameter of the optimizer has a gradient: call scaler.scale(loss).backward()")
        if any(g.dtype.itemsize < 4 for g in gradients):
            raise ValueError(
                "Attempting to unscale FP16 gradients: the trained weights are stored in float16, and so are their gradients; "
                "keep the weights in float32 (a master copy), and let autocast round them where they are used"
            )
        finite = Finite([sum_of_squares(gradients)] if look else ())
        scale(gradients, float(np.float32(1 / self._scale)) if self._scale else math.inf)
        self._found[optimizer] = [finite, False]
        return bool(finite)

    def step(self, optimizer: Optimizer, finite: Finite | None = None) -> None:
        """`optimizer.step()`, with unscaled gradients; nothing where one of them (or of the numbers of `finite`) is not finite.

        Raises RuntimeError where it has been called since the last `update`; and as `unscale_` and the step do.
        """
        if not self._enabled:
            optimizer.step(finite)
            return
        if optimizer not in self._found:
            self.unscale_(optimizer)
        found = self._found[optimizer]
        if found[1]:
            raise RuntimeError("step() has already been called since the last update()")
        found[0] = found[0] if finite is None else finite
        optimizer.step(found[0])
        found[1] = True

    def update(self) -> None:
        """Choose S for the next step, from what was found in all optimizers. Raises RuntimeError where nothing was."""
        if not self._enabled:
            return
        if not self._found:
            raise RuntimeError("update() comes after unscale_() or step(), which look for infinite gradients")
        if not all(finite for finite, _ in self._found.values()):
            self._scale, self._growth_tracker = float(np.float32(self._scale * self._backoff_factor)), 0
        else:
            self._growth_tracker += 1
            if self._growth_tracker == self._growth_interval:
                grown = np.float64(self._scale * self._growth_factor)
                self._scale = float(np.float32(grown)) if grown <= np.finfo(np.float32).max else self._scale
                self._growth_tracker = 0
        self._found.clear()

    def state_dict(self) -> dict[str, Any]:
        """S, the options, and the steps since S changed, as JSON values; {} where it is not enabled."""
        return {name: getattr(self, f"_{name.strip('_')}") for name in _OPTIONS} if self._enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave. Raises ValueError for anything else."""
        if not self._enabled:
            return
        if state.keys() != set(_OPTIONS) or not all(isinstance(value, (int, float)) for value in state.values()):
            raise ValueError(f"GradScaler: the state has {', '.join(_OPTIONS)}, numbers; got {state!r}")
        self._take(*(state[name] for name in _OPTIONS))
