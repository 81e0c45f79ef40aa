"""Where the numbers went wrong: what is said when a loss, a gradient or a parameter became NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..backend import read, xp_of
from ..nn.module import Parameter
from .optim import Optimizer, non_finite


class TrainingDiverged(RuntimeError):
    """The loss, a gradient or a parameter became NaN or infinite: `.step` (from 1), `.loss`, `.parameter` say where."""

    def __init__(self, step: int, loss: float, parameter: str, message: str):
        super().__init__(f"training diverged at step {step}: {message}")
        self.step, self.loss, self.parameter = step, loss, parameter


def diverged(
    step: int, loss: float, parameters: Mapping[str, Parameter], optimizer: Optimizer, precision: str | None = None
) -> TrainingDiverged:
    """The error for a loss or a gradient of step number `step` that is not finite: it names where that began."""
    name = _non_finite_parameter(parameters)
    if name is not None:
        where = f"the parameter {name} became NaN or infinite in the update before"
    elif math.isfinite(loss):  # backward meets the last layers first, so theirs went wrong first
        gradients = ((n, non_finite(p.grad)) for n, p in reversed(parameters.items()) if p.grad is not None)
        name, bad = next(((n, bad) for n, bad in gradients if bad), ("", 0))
        where = "the squares of the gradients have no finite sum"
        if bad:
            where = f"in the gradient of {name} {bad} of {parameters[name].size} elements are NaN or infinite"
    else:
        largest = {n: abs(p.data).max() for n, p in parameters.items() if p.size}
        sizes = {n: float(size) for n, size in zip(largest, read(*largest.values()))}
        name = max(sizes, key=sizes.__getitem__)
        where = f"every trained parameter is finite, the largest value is {sizes[name]:.3g} in {name}"
    return TrainingDiverged(step, loss, name, f"the loss is {loss:g}; {where}; {_advice(step, optimizer, precision)}")


def check_parameters(step: int, parameters: Mapping[str, Parameter], optimizer: Optimizer) -> None:
    """TrainingDiverged where the update of step number `step` left a parameter that is not finite."""
    name = _non_finite_parameter(parameters)
    if name is not None:
        message = f"the parameter {name} became NaN or infinite in the update; {_advice(step, optimizer)}"
        raise TrainingDiverged(step, math.nan, name, message)


def _advice(step: int, optimizer: Optimizer, precision: str | None = None) -> str:
    if precision == "float16":
        return "float16 has nothing above 65504: PrecisionReport names the first op to exceed it, and bf16 has float32's range"
    if step == 1:
        return "this is the first step, so look at the weights that were loaded and at the data"
    rate = optimizer.param_groups[0]["lr"]
    return f"lower learning_rate (it was {rate:g} here), add warmup_steps, or set a lower max_grad_norm"


def _non_finite_parameter(parameters: Mapping[str, Parameter]) -> str | None:
    finite = read(*(xp_of(p.data).isfinite(p.data).all() for p in parameters.values()))
    return next((name for name, good in zip(parameters, finite) if not good), None)
