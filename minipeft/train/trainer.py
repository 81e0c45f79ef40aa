"""The training loop: what a step is, when to evaluate, save and stop, and what is said when it goes wrong.

    for step:   batches ─► loss (weighted by the labels that count) ─► gradients ─► clip ─► optimizer ─► record
                every eval_steps: held-out loss;   every save_steps: checkpoint

Everything that a step does depends on (seed, step) and the weights alone: the examples it takes, the dropout masks, the
learning rate. So a run that is resumed from a checkpoint ends with the same bytes as one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Array, Rng, asarray, is_array, to_numpy, xp_of
from ..nn.module import Module, Parameter
from .arguments import TrainingArguments
from .batches import check_examples, collate_packed, epoch_order
from .batches import collate as collate_pairs
from .checkpoint import (
    CheckpointError,
    check_identity,
    fingerprint,
    frozen_fingerprint,
    last_checkpoint,
    load_checkpoint,
    pack_optimizer,
    remove_leftovers,
    save_checkpoint,
    unpack_optimizer,
)
from .evaluation import Collate, Loss, evaluate, model_loss, on_device
from .metrics import Metrics, plot_loss
from .optim import SGD, AdamW, NonFiniteGradient, Optimizer, clip_grad_norm
from .schedule import SCHEDULES


class TrainingDiverged(RuntimeError):
    """The loss, a gradient or a parameter became NaN or infinite: `.step` (from 1), `.loss`, `.parameter` say where."""

    def __init__(self, step: int, loss: float, parameter: str, message: str):
        super().__init__(message)
        self.step, self.loss, self.parameter = step, loss, parameter


# What may differ between a run and the one that resumes it; everything else decides the bytes of the weights.
_FREE = {"output_dir", "save_steps", "save_total_limit", "per_device_eval_batch_size", "progress"}

# What a checkpoint that is resumed from must hold.
_SAVED = {"run", "position", "optimizer", "model", "metrics_bytes", "frozen_sha256", "identity"}


@dataclass
class TrainingResult:
    """What a run ended with; `history` holds the records of metrics.jsonl, `best_*` are of the lowest held-out loss."""

    steps: int
    stopped_early: bool
    best_eval_loss: float | None
    best_step: int | None
    seconds: float
    history: list[dict[str, Any]]

    def losses(self, key: str = "loss") -> list[tuple[int, float]]:
        """(step, value) of every record that has `key`: "loss", "eval_loss", "grad_norm", "learning_rate", ..."""
        return [(r["step"], r[key]) for r in self.history if key in r]


@dataclass
class _State:
    """Where a run is."""

    step: int = 0
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    stopped: bool = False


class Trainer:
    """Trains the parameters of `model` that require gradients, in place, to lower a loss on examples.

    Args:
        model: a Transformer, a PeftModel, or any module; without `loss`, one with a method
            `loss(**arguments, rng=...)`.
        train_examples: (input_ids [n], labels [n]) pairs of integer arrays, labels -100 where they do not count.
        eval_examples: held-out examples, for `eval_steps`, early stopping and `evaluate()`.
        args: see TrainingArguments.
        pad_token_id: fills shorter examples on the right; it is masked, so its value does not matter.
        collate: for other kinds of examples: a function from a list of them to a `Batch`.
        loss: for other objectives: a function `loss(model, **batch.arguments, rng=None)` that gives a scalar Tensor,
            the mean over the batch's `weight` units. By default the model's own.
        optimizer: over exactly the trainable parameters, in place of the one that `args` describe; the schedule
            multiplies the learning rate of each of its groups.

    The loss of a step is the mean over all labels that count in it, however it is cut into batches: accumulated
    gradients equal those of one large batch to float32 rounding, dropout included. Weights decay (decoupled), but not
    norms and biases: parameters with one axis.

    `collate` and `loss` are all it takes to train on something else than the next token, such as pairs of answers of
    which the first should score higher:

        def collate(pairs):                             # [(chosen ids, rejected ids), ...]
            ids, mask = pad_sequences([ids for pair in pairs for ids in pair], pad_value=0)
            return Batch({"input_ids": ids, "attention_mask": mask}, weight=len(pairs), tokens=int(mask.sum()))

        def loss(model, input_ids, attention_mask, rng=None):
            scores = model(input_ids, attention_mask, rng=rng).reshape(-1, 2)
            return -F.logsigmoid(scores[:, 0] - scores[:, 1]).mean()

        Trainer(reward_model, pairs, args=args, collate=collate, loss=loss).train()

    Raises ValueError for examples or arguments that make no sense, TrainingDiverged for a loss, gradient or parameter
    that becomes NaN or infinite.
    """

    def __init__(
        self,
        model: Module,
        train_examples: Sequence[Any],
        eval_examples: Sequence[Any] | None = None,
        args: TrainingArguments | None = None,
        pad_token_id: int = 0,
        collate: Collate | None = None,
        optimizer: Optimizer | None = None,
        loss: Loss | None = None,
    ):
        self.model, self.args = model, args or TrainingArguments()
        self.train_examples, self.eval_examples = train_examples, eval_examples
        if not len(train_examples):
            raise ValueError("there are no training examples")
        if eval_examples is not None and not len(eval_examples):
            raise ValueError("eval_examples is empty; leave it out to train without evaluation")
        if eval_examples is None and (self.args.early_stopping_patience or self.args.eval_steps):
            raise ValueError("eval_steps and early_stopping_patience need eval_examples")
        if collate is None:
            check_examples(train_examples, "training")
            check_examples(eval_examples or [], "evaluation")
        elif self.args.packing:
            raise ValueError("packing is for (input_ids, labels) examples; a collate of its own does its own packing")
        own: Collate = partial(collate_pairs, pad_token_id=pad_token_id)
        if self.args.packing:
            own = partial(collate_packed, pad_token_id=pad_token_id, capacity=int(self.args.packing))
        self.collate = collate or own
        self.loss = loss or model_loss
        self.trainable: dict[str, Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ValueError("no parameter of the model requires gradients, so there is nothing to train")
        self._xp = xp_of(*[p.data for p in self.trainable.values()])
        self.optimizer = optimizer or self._make_optimizer()
        self._check_optimizer()
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.rows_per_step, self.steps_per_epoch = rows, -(-len(train_examples) // rows)
        self.total_steps = self.args.max_steps or math.ceil(self.args.num_train_epochs * self.steps_per_epoch)
        self.warmup_steps = self.args.warmup_steps or math.ceil(self.args.warmup_ratio * self.total_steps)
        self._best: dict[str, Array] = {}

    def _make_optimizer(self) -> Optimizer:
        a = self.args
        decayed = [(n, p) for n, p in self.trainable.items() if p.ndim > 1]
        exempt = [(n, p) for n, p in self.trainable.items() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": a.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        if a.optim == "sgd":
            return SGD(groups, lr=a.learning_rate, momentum=a.momentum)
        return AdamW(groups, lr=a.learning_rate, betas=(a.adam_beta1, a.adam_beta2), eps=a.adam_epsilon)

    def _check_optimizer(self) -> None:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        missing = [name for name, p in self.trainable.items() if id(p) not in held]
        if missing or len(held) > len(self.trainable):
            what = f"lacks {missing[0]}" if missing else "holds parameters that are not the model's"
            raise ValueError(f"the optimizer must hold exactly the model's trainable parameters; it {what}")

    # ------------------------------------------------------------------------------------------------------- train

    def train(self, resume_from_checkpoint: bool | str | os.PathLike | None = None) -> TrainingResult:
        """Train to the end; `resume_from_checkpoint=True` (or its path) goes on from the last checkpoint in output_dir.

        A fresh run refuses an output_dir that holds checkpoints. Raises CheckpointError for a checkpoint that is
        missing, damaged, or of another base, data set or arguments.
        """
        began, directory = time.perf_counter(), self._directory()
        state, position = _State(), 0
        if resume_from_checkpoint:
            state, position = self._resume(resume_from_checkpoint)
        elif directory and (found := last_checkpoint(directory)):
            raise ValueError(f"{found} is of an earlier run: resume from it, or choose another output_dir")
        if directory:
            directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(directory)
        self._frozen = frozen_fingerprint(self.model) if self.args.save_steps else ""
        metrics = Metrics(directory and directory / "metrics.jsonl", position)
        try:
            with _ProgressBar(self.args.progress, state.step, self.total_steps) as show:
                self._loop(state, metrics, show)
            if self._best:
                self._put(self._best)
            self._check_parameters(state.step, math.nan)
            if directory:
                plot_loss(metrics.history, directory / "loss.png")
        finally:
            metrics.close()
            self.model.zero_grad()
        seconds = time.perf_counter() - began
        return TrainingResult(
            state.step, state.stopped, state.best_eval_loss, state.best_step, seconds, metrics.history
        )

    def _loop(self, state: _State, metrics: Metrics, show: Callable[[int, float, float], None]) -> None:
        a = self.args
        while state.step < self.total_steps and not state.stopped:
            start = time.perf_counter()
            record = self._step(state.step)
            state.step += 1
            speed = record["tokens"] / max(time.perf_counter() - start, 1e-9)
            metrics.write({**record, "tokens_per_second": round(speed, 1)})
            show(state.step, record["loss"], speed)
            last = state.step == self.total_steps
            if self.eval_examples is not None and (last or (a.eval_steps and state.step % a.eval_steps == 0)):
                self._evaluate(state, metrics)
            if a.save_steps and (last or state.stopped or state.step % a.save_steps == 0):
                self._save(state, metrics)

    def _step(self, step: int) -> dict[str, Any]:
        """One update; `step` counts from 0. Returns the record of it."""
        a, epoch, place = self.args, *divmod(step, self.steps_per_epoch)
        rows = epoch_order(len(self.train_examples), a.seed, epoch)[place * self.rows_per_step :][: self.rows_per_step]
        size = a.per_device_train_batch_size
        batches = [
            self.collate([self.train_examples[i] for i in rows[k : k + size]]) for k in range(0, len(rows), size)
        ]
        total = sum(batch.weight for batch in batches)
        if not total:
            raise ValueError(f"step {step + 1}: no label counts in any of its {len(rows)} examples")
        rate = self._set_learning_rate(step)
        loss, first_row = 0.0, 0
        with np.errstate(all="ignore"):  # NaN and infinity are looked for below
            for batch in batches:
                arguments = on_device(batch, self._xp)
                if batch.weight:
                    rng = Rng(a.seed, first_row=first_row).at(step)
                    share = self.loss(self.model, **arguments, rng=rng)
                    loss += share.item() * (batch.weight / total)
                    if not math.isfinite(loss):
                        self._diverged(step, loss)
                    share.backward(batch.weight / total)
                    del share
                first_row += max((v.shape[0] for v in arguments.values() if is_array(v)), default=0)
            try:
                norm = clip_grad_norm(self.trainable.items(), a.max_grad_norm or math.inf)
            except NonFiniteGradient:
                self._diverged(step, loss)
            self.optimizer.step()
        if hasattr(self.model, "update_and_allocate"):  # AdaLoRA moves its budget between layers, by their gradients
            self.model.update_and_allocate(step + 1)
        self.optimizer.zero_grad()
        return {
            "step": step + 1, "epoch": round((step + 1) / self.steps_per_epoch, 4), "loss": loss, "learning_rate": rate,
            "grad_norm": norm, "tokens": sum(batch.tokens for batch in batches),
        }  # fmt: skip

    def _set_learning_rate(self, step: int) -> float:
        factor = SCHEDULES[self.args.lr_scheduler_type](step, self.warmup_steps, self.total_steps)
        for group, rate in zip(self.optimizer.param_groups, self._base_rates):
            group["lr"] = rate * factor
        return self.optimizer.param_groups[0]["lr"]

    # ---------------------------------------------------------------------------------------------------- evaluate

    def evaluate(self, examples: Sequence[Any] | None = None) -> float:
        """Mean loss over all labels that count in `examples` (default: eval_examples), without dropout."""
        examples = self.eval_examples if examples is None else examples
        size = self.args.per_device_eval_batch_size
        return evaluate(self.model, [] if examples is None else examples, size, collate=self.collate, loss=self.loss)

    def _evaluate(self, state: _State, metrics: Metrics) -> None:
        loss = self.evaluate()
        if not math.isfinite(loss):
            self._diverged(state.step - 1, loss)
        metrics.write({"step": state.step, "eval_loss": loss})
        patience = self.args.early_stopping_patience
        if state.best_eval_loss is None or loss < state.best_eval_loss:
            state.best_eval_loss, state.best_step, state.evaluations_without_gain = loss, state.step, 0
            if patience:
                self._best = {name: array.copy() for name, array in self._values().items()}
        else:
            state.evaluations_without_gain += 1
            state.stopped = patience is not None and state.evaluations_without_gain >= patience

    # -------------------------------------------------------------------------------------------------- divergence

    def _check_parameters(self, step: int, loss: float) -> None:
        name = next((n for n, p in self.trainable.items() if _non_finite(p.data)), None)
        if name is not None:
            message = f"the parameter {name} became NaN or infinite in the update; {self._advice(step)}"
            raise TrainingDiverged(step, loss, name, f"training diverged at step {step}: {message}")

    def _diverged(self, step: int, loss: float) -> None:
        """Find out where the numbers went wrong, and raise TrainingDiverged. `step` counts from 0."""
        for name, p in self.trainable.items():
            if _non_finite(p.data):
                where = f"the parameter {name} became NaN or infinite in the update before"
                break
        else:
            if math.isfinite(loss):  # backward meets the last layers first, so theirs went wrong first
                found = (
                    (n, p) for n, p in reversed(self.trainable.items()) if p.grad is not None and _non_finite(p.grad)
                )
                name, p = next(found)
                where = f"in the gradient of {name} {_non_finite(p.grad)} of {p.size} elements are NaN or infinite"
            else:
                sizes = {n: float(abs(p.data).max().item()) for n, p in self.trainable.items() if p.size}
                name = max(sizes, key=sizes.__getitem__)
                where = f"every trained parameter is finite, the largest value is {sizes[name]:.3g} in {name}"
        raise TrainingDiverged(
            step + 1,
            loss,
            name,
            f"training diverged at step {step + 1}: the loss is {loss:g}; {where}; {self._advice(step + 1)}",
        )

    def _advice(self, step: int) -> str:
        if step == 1:
            return "this is the first step, so look at the weights that were loaded and at the data"
        rate = self.optimizer.param_groups[0]["lr"]
        return f"lower learning_rate (it was {rate:g} here), add warmup_steps, or set a lower max_grad_norm"

    # ------------------------------------------------------------------------------------------------- checkpoints

    def _directory(self) -> Path | None:
        return None if self.args.output_dir is None else Path(self.args.output_dir)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed, as JSON values by the names that an error message uses."""
        arguments = {k: v for k, v in dataclasses.asdict(self.args).items() if k not in _FREE}
        identity = {**arguments, "optimizer": type(self.optimizer).__name__, "learning rates": self._base_rates}
        identity["loss"] = getattr(self.loss, "__qualname__", type(self.loss).__qualname__)
        identity["trainable parameters"] = {n: f"{p.dtype} {list(p.shape)}" for n, p in self.trainable.items()}
        for what, examples in (("training", self.train_examples), ("evaluation", self.eval_examples or [])):
            identity[f"number of {what} examples"] = len(examples)
            identity[f"{what} examples"] = fingerprint(
                array for i, example in enumerate(examples) for array in _arrays(str(i), example)
            )
        return identity

    def _position(self, step: int) -> dict[str, Any]:
        """Where the data, the random streams and the schedule stand after `step` steps."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return {
            "data": {"seed": self.args.seed, "epoch": epoch, "step_in_epoch": place},
            "random": {"seed": self.args.seed, "step": step},
            "schedule": {"step": step, "warmup_steps": self.warmup_steps, "total_steps": self.total_steps},
        }

    def _save(self, state: _State, metrics: Metrics) -> None:
        self._check_parameters(state.step, math.nan)
        moments, optimizer = pack_optimizer(self.optimizer)
        arrays = {"model": {n: to_numpy(array) for n, array in self._values().items()}, "optimizer": moments}
        if self._best:
            arrays["best"] = {name: to_numpy(array) for name, array in self._best.items()}
        content = {
            "run": dataclasses.asdict(state),
            "position": self._position(state.step),
            "optimizer": optimizer,
            "metrics_bytes": metrics.position(),
            "frozen_sha256": self._frozen,
            "identity": self._identity,
        }
        save_checkpoint(self._directory(), state.step, arrays, content, self.args.save_total_limit)

    def _resume(self, source: bool | str | os.PathLike) -> tuple[_State, int]:
        """Put model and optimizer where the checkpoint was; returns (state, length of the metrics file then)."""
        directory = self._directory()
        if directory is None:
            raise ValueError("resume_from_checkpoint needs the output_dir of the run that is to be resumed")
        newest = last_checkpoint(directory)
        if source is not True and Path(source).resolve().parent != directory.resolve():
            raise ValueError(f"{source} is not in output_dir {directory}; a run is resumed in its own directory")
        if newest is None:
            raise CheckpointError(f"{directory}: holds no checkpoint to resume from")
        path = newest if source is True else Path(source)
        step, arrays, content = load_checkpoint(path)
        lacking = sorted(_SAVED - {*content, *arrays})
        if lacking:
            raise CheckpointError(f"{path}: was not written by a Trainer: it has no {', '.join(lacking)}")
        if path.resolve() != newest.resolve():
            raise ValueError(f"{newest} is later than {path.name}: resume from it, or remove it first")
        here = {**self._identity, "position": self._position(step)}
        check_identity(path, here, {**content["identity"], "position": content["position"]})
        if content["frozen_sha256"] != frozen_fingerprint(self.model):
            raise CheckpointError(
                f"{path}: was trained on another base: the frozen parameters of this model differ from its own"
            )
        unpack_optimizer(self.optimizer, arrays["optimizer"], content["optimizer"])
        self._put(arrays["model"])
        self._best = {name: asarray(array.copy(), self._xp) for name, array in arrays.get("best", {}).items()}
        return _State(**content["run"]), content["metrics_bytes"]

    def _values(self) -> dict[str, Array]:
        """What training changes: the trainable parameters, and what a method keeps beside them (AdaLoRA's averages)."""
        kept = self.model.training_state() if hasattr(self.model, "training_state") else {}
        return {**{name: p.data for name, p in self.trainable.items()}, **kept}

    def _put(self, arrays: dict[str, Array]) -> None:
        """Put back what `_values` gave."""
        for name, p in self.trainable.items():
            p.data[...] = asarray(arrays[name], self._xp)
        kept = {name: asarray(array, self._xp).copy() for name, array in arrays.items() if name not in self.trainable}
        if kept:
            self.model.load_training_state(kept)


def _non_finite(array: Array) -> int:
    """How many elements are NaN or infinite."""
    return array.size - int(xp_of(array).isfinite(array).sum().item())


def _arrays(name: str, value: Any) -> Iterator[tuple[str, Array]]:
    """The arrays, numbers and texts inside an example, by name; of other kinds of objects nothing is known."""
    if is_array(value):
        yield name, value.astype(np.int64) if value.dtype.kind in "iu" else value  # whatever integers they were read as
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _arrays(f"{name}.{i}", part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _arrays(f"{name}.{key}", part)
    elif isinstance(value, (str, int, float)):
        yield name, np.frombuffer(repr(value).encode(), np.uint8)


class _ProgressBar:
    """A rich progress bar on stderr with loss, tokens/s and time left; nothing where stderr is not a terminal."""

    def __init__(self, wanted: bool, step: int, total: int):
        self.bar: Any = None
        if wanted and sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TimeRemainingColumn

            text = "loss {task.fields[loss]}  {task.fields[speed]} tokens/s  left"
            columns = ("step {task.completed}/{task.total}", BarColumn(), text, TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("train", completed=step, total=total, loss="-", speed="-")

    def __enter__(self) -> Callable[[int, float, float], None]:
        if self.bar is None:
            return lambda step, loss, speed: None
        self.bar.start()
        return lambda step, loss, speed: self.bar.update(
            self.task, completed=step, loss=f"{loss:.3f}", speed=f"{speed:,.0f}"
        )

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
