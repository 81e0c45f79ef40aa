"""What may take part in a run beside the loop itself: callbacks around the optimizer's step, and at each record.

    backward ─► before_step ─► clip ─► optimizer.step ─► after_step ─► zero_grad          on_record: a line of the history

`Trainer.train(callbacks=[...])` and the online trainers' `train(callbacks=[...])` take them. A model may bring its own:
`model.training_callbacks()`, as a PeftModel does for AdaLoRA. `EarlyStopping`, `EMA`, `Log` and `WeightsIn` are such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..autograd.autocast import rounded
from ..backend import Array


class Callback:
    """Does nothing at every occasion; a subclass overrides what it needs.

    The gradients are in `.grad` of the model's parameters from `before_step` to the end of `after_step`. An object that is
    given to a second run goes on with what it keeps, as `EMA` with its averages: give a run that is another a new object.
    """

    only_looks = False  # True: it changes nothing in the run, which may be resumed without it

    def before_step(self, model: Any, step: int) -> None:
        """The gradients of optimizer step number `step` (from 1) are complete and not yet clipped: may add to them."""

    def after_step(self, model: Any, step: int, record: dict[str, Any]) -> bool | None:
        """The optimizer has stepped, the gradients are still there; `record` holds the step's metrics.

        True ends the run after this step.
        """

    def on_record(self, model: Any, record: dict[str, Any]) -> bool | None:
        """`record` is new in the history: of a step, of an evaluation, or of an update of an online trainer.

        True ends the run after this step.
        """

    def arguments(self) -> tuple[Any, ...]:
        """What it was made with, as JSON values: a run is resumed with the same."""
        return ()

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

    def _kept(self) -> list[Any]:
        """Those that a checkpoint knows of."""
        return [callback for _, callback in self.members if not getattr(callback, "only_looks", False)]

    def names(self) -> list[str]:
        """The callbacks, such as EMA(0.999): a run is resumed with the same, in the same order."""
        given = [(type(callback).__qualname__, getattr(callback, "arguments", tuple)()) for callback in self._kept()]
        return [f"{name}({', '.join(map(repr, values))})" if values else name for name, values in given]

    def before_step(self, step: int) -> None:
        """Call `before_step` of each."""
        for model, callback in self.members:
            callback.before_step(model, step)

    def after_step(self, step: int, record: dict[str, Any]) -> None:
        """Call `after_step` of each, also after one that stops the run."""
        for model, callback in self.members:
            self.stopped |= bool(callback.after_step(model, step, record))

    def on_record(self, record: dict[str, Any]) -> None:
        """Call `on_record` of each that has it, also after one that stops the run."""
        for model, callback in self.members:
            self.stopped |= hasattr(callback, "on_record") and bool(callback.on_record(model, record))

    def state_dict(self) -> dict[str, Array]:
        """The arrays of all, by "number.name"."""
        return {f"{i}.{n}": array for i, c in enumerate(self._kept()) for n, array in c.state_dict().items()}

    def load_state_dict(self, arrays: dict[str, Array]) -> None:
        """Take up what `state_dict` gave."""
        for i, callback in enumerate(self._kept()):
            own = f"{i}."
            callback.load_state_dict({n.removeprefix(own): a for n, a in arrays.items() if n.startswith(own)})


# --------------------------------------------------------------------------------------------------- ready to be used


class Log(Callback):
    """Hands every record to a function: `Log(print)`, `Log(logging.getLogger("run").info)`, `Log(wandb.log)`."""

    only_looks = True

    def __init__(self, write: Callable[[dict[str, Any]], Any] = print):
        self.write = write

    def on_record(self, model: Any, record: dict[str, Any]) -> None:
        self.write(record)


class EarlyStopping(Callback):
    """Ends the run after `patience` records in a row whose `key` is not below its lowest (or above its highest) so far.

    Args:
        patience: how many; records without the key do not count.
        key: of the record; such as "eval_loss" of a Trainer's evaluation, "objective/scores" of an online trainer.
        greater_is_better: whether the value should rise.

    The weights stay those of the last step. The option `early_stopping_patience` of TrainingArguments is this callback,
    and ends with the weights of the best evaluation. Raises ValueError for a patience that is no positive integer.
    """

    def __init__(self, patience: int, key: str = "eval_loss", greater_is_better: bool = False):
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience must be a positive integer, not {patience!r}")
        self.patience, self.key, self.sign = patience, key, -1 if greater_is_better else 1
        self.lowest, self.without_gain = float("inf"), 0

    def on_record(self, model: Any, record: dict[str, Any]) -> bool:
        if record.get(self.key) is None:
            return False
        value = self.sign * record[self.key]
        self.lowest, self.without_gain = (value, 0) if value < self.lowest else (self.lowest, self.without_gain + 1)
        return self.without_gain >= self.patience

    def arguments(self) -> tuple[Any, ...]:
        return self.patience, self.key, self.sign < 0

    def state_dict(self) -> dict[str, Array]:
        return {"lowest": np.array(self.lowest), "without_gain": np.array(self.without_gain)}

    def load_state_dict(self, arrays: dict[str, Array]) -> None:
        self.lowest, self.without_gain = float(arrays["lowest"].item()), int(arrays["without_gain"].item())


class WeightsIn(Callback):
    """Holds the trained weights in "bfloat16" or "float16", without a master copy: rounded now, and after each step.

        w ← round(w - step)        a step of less than half of w's last place is lost

    Everything else stays float32, the optimizer's moments among it. Such a run shows what master weights are for, and
    gives adapters in either dtype. Arrays stay float32, so it saves no memory here. ValueError for another dtype.
    """

    def __init__(self, model: Any, dtype: str = "bfloat16"):
        self.dtype = dtype
        self._round(model)

    def _round(self, model: Any) -> None:
        for p in model.parameters():
            if p.requires_grad:
                p.data[...] = rounded(p.data, self.dtype)
                p._version += 1

    def after_step(self, model: Any, step: int, record: dict[str, Any]) -> None:
        self._round(model)

    def arguments(self) -> tuple[Any, ...]:
        return (self.dtype,)


class EMA(Callback):
    """The exponential moving average of the trained weights, which often predicts better than the last ones.

        a ← w after the first step, then a ← decay a + (1 - decay) w after each

        ema = EMA(0.999)
        trainer.train(callbacks=[ema])
        with ema.applied(model):  # the model has the averages, to evaluate, generate or save
            model.save_pretrained("averaged")

    The same as PyTorch's `swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)`. Source: Polyak & Juditsky 1992,
    with the decaying weights of TensorFlow's ExponentialMovingAverage. Raises ValueError unless 0 <= decay < 1.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, not {decay!r}")
        self.decay, self.averages = decay, {}

    def after_step(self, model: Any, step: int, record: dict[str, Any]) -> None:
        for name, p in model.named_parameters():
            if p.requires_grad and name in self.averages:
                self.averages[name] *= self.decay
                self.averages[name] += (1 - self.decay) * p.data
            elif p.requires_grad:
                self.averages[name] = p.data.copy()

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Inside, the model's trained parameters are copies of the averages.

        Raises ValueError where there are none of this model's parameters, as before the first step.
        """
        before = {p: p.data for name, p in model.named_parameters() if name in self.averages}
        if not before:
            raise ValueError("EMA has no averages of this model's parameters: train it first, with callbacks=[ema]")
        try:
            for name, p in model.named_parameters():
                if p in before:
                    p.data = self.averages[name].copy()
            yield
        finally:
            for p, data in before.items():
                p.data = data

    def arguments(self) -> tuple[Any, ...]:
        return (self.decay,)

    def state_dict(self) -> dict[str, Array]:
        return dict(self.averages)

    def load_state_dict(self, arrays: dict[str, Array]) -> None:
        self.averages = dict(arrays)
