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


class Callbacks(Callback):
    """Several callbacks as one: the model's own, then `more`. `stopped`: one of them has asked for the run's end."""

    def __init__(self, model: Any, more: Iterable[Any] = ()):
        own = model.training_callbacks() if hasattr(model, "training_callbacks") else []
        self.members = [*own, *more]
        self.stopped = False

    def names(self) -> list[str]:
        """The classes of the callbacks: a run is resumed with the same, in the same order."""
        return [type(member).__qualname__ for member in self.members]

    def before_step(self, model: Any, step: int) -> None:
        for member in self.members:
            member.before_step(model, step)

    def after_step(self, model: Any, step: int, record: dict[str, Any]) -> bool:
        for member in self.members:  # every one is called, also after one that stops the run
            self.stopped |= bool(member.after_step(model, step, record))
        return self.stopped

    def state_dict(self) -> dict[str, Array]:
        return {f"{i}.{name}": array for i, m in enumerate(self.members) for name, array in m.state_dict().items()}

    def load_state_dict(self, arrays: dict[str, Array]) -> None:
        for i, member in enumerate(self.members):
            own = {name.partition(".")[2]: array for name, array in arrays.items() if name.partition(".")[0] == str(i)}
            member.load_state_dict(own)
