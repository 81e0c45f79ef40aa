"""What may take part in a run beside the loop itself: callbacks around the optimizer's step.

    backward ─► before_step ─► clip ─► optimizer.step ─► after_step ─► zero_grad

`Trainer.train(callbacks=[...])` and the online trainers' `train(callbacks=[...])` take them. A model may bring its own:
`model.training_callbacks()`, as a PeftModel does for AdaLoRA.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..backend import Array


class Callback:
    """Does nothing at every occasion; a subclass overrides what it needs."""

    def before_step(self, model: Any, step: int) -> None:
        """The gradients of optimizer step number `step` (from 1) are complete and not yet clipped: may add to them."""

    def after_step(self, model: Any, step: int, record: dict[str, Any]) -> bool | None:
        """The optimizer has stepped, the gradients are still there; `record` holds the step's metrics.

        True ends the run after this step.
        """

    def state_dict(self) -> dict[str, Array]:
        """Arrays by name that must survive an interruption; saved with every checkpoint."""
        return {}

    def load_state_dict(self, arrays: dict[str, Array]) -> None:
        """Take up what `state_dict` gave; the arrays are the callback's own, on the model's device."""


class Callbacks:
    """All callbacks of a run: those that the models bring, each called with its own model, then `more`, with the first.

    `stopped`: one of them has asked for the run's end.
    """

    def __init__(self, *models: Any, more: Iterable[Callback] = ()):
        own = [(model, callback) for model in models for callback in getattr(model, "training_callbacks", list)()]
        self.members = [*own, *((models[0], callback) for callback in more)]
        self.stopped = False

    def names(self) -> list[str]:
        """The classes of the callbacks: a run is resumed with the same, in the same order."""
        return [type(callback).__qualname__ for _, callback in self.members]

    def before_step(self, step: int) -> None:
        """Call `before_step` of each."""
        for model, callback in self.members:
            callback.before_step(model, step)

    def after_step(self, step: int, record: dict[str, Any]) -> None:
        """Call `after_step` of each, also after one that stops the run."""
        for model, callback in self.members:
            self.stopped |= bool(callback.after_step(model, step, record))

    def state_dict(self) -> dict[str, Array]:
        """The arrays of all, by "number.name"."""
        return {f"{i}.{n}": array for i, (_, c) in enumerate(self.members) for n, array in c.state_dict().items()}

    def load_state_dict(self, arrays: dict[str, Array]) -> None:
        """Take up what `state_dict` gave."""
        for i, (_, callback) in enumerate(self.members):
            own = f"{i}."
            callback.load_state_dict({n.removeprefix(own): a for n, a in arrays.items() if n.startswith(own)})
