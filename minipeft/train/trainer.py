"""The training loop.

    for step:   batches ─► loss (weighted by the labels that count) ─► gradients
                callbacks' before_step ─► clip ─► optimizer ─► record ─► callbacks' after_step
                every eval_steps: held-out loss;   every save_steps: checkpoint (run.py)

The examples of a step, its dropout masks and its learning rate depend on (seed, step) alone; all else that it reads, the
weights and the states of optimizer and callbacks, a checkpoint holds. So a run that is resumed from a checkpoint ends
with the same bytes as one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..backend import Rng, is_array
from ..executors import opened
from ..nn.module import Module, Parameter
from ..nn.transformer import Transformer
from ..options import configuration, option
from .arguments import TrainingArguments
from .batches import Batch, check_examples, collate_packed, epoch_order
from .batches import collate as collate_pairs
from .callbacks import Callback, Callbacks, EarlyStopping
from .checkpoint import adapter_options, arrays_in, check_shapes, fingerprint, frozen_fingerprint
from .divergence import TrainingDiverged, check_parameters, diverged
from .evaluation import Collate, Loss, arrays_of, in_order, means, measure, model_loss
from .grad_scaler import GradScaler
from .metrics import picture, plot_loss
from .optim import SGD, AdamW, AdamW8bit, Optimizer, clipped, gradients_of, loraplus_groups
from .parallel import Part, Workers, add_gradients, groups_of, in_precision
from .rates import with_learning_rate
from .run import Run
from .schedule import SCHEDULES

__all__ = ["Trainer", "TrainingArguments", "TrainingDiverged", "TrainingResult", "training_step"]


def training_step(
    model: Module, batches: Sequence[Batch], loss: Loss, parameters: dict[str, Parameter], optimizer: Optimizer,
    callbacks: Callbacks, *, step: int, seed: int, max_grad_norm: float | None, workers: Workers | None = None,
    precision: str | None = None, scaler: GradScaler | None = None, by_rows: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Step number `step` (from 1): one update that lowers the mean loss over all labels that count in the batches.

        L = Σ_b (w_b / Σ w) L_b        w_b: the labels that count in batch b, L_b: its mean loss

    Dropout draws from (seed, step - 1, place of the row in the step). With `workers` they compute the batches, else this
    process does; `by_rows` (they are `collate`'s or `collate_packed`'s, and the loss is the Transformer's own) they are cut
    into parts of their rows where that pays (`groups_of`). Returns the record of the step, with the means of the statistics
    that the loss gives; a callback's wish to stop is in `callbacks.stopped`. Raises TrainingDiverged for a loss or a
    gradient that is not finite.

    With `precision`, the losses are computed in `autocast`; with `scaler` they are scaled, and a gradient that is not
    finite leaves out the update and the callbacks after it: such a record has the step's "loss_scale", and no "grad_norm".
    """
    total, L, first_row, groups = sum(batch.weight for batch in batches), 0.0, 0, []
    scale, trained = scaler.get_scale() if scaler else 1.0, [*parameters.values()]
    for batch in batches:
        rng = Rng(seed, first_row=first_row).at(step - 1)
        for group in groups_of(model, batch, trained, precision, workers) if by_rows else [[(None, batch)]]:
            parts = [(part, rng if rows is None else rng.take(rows)) for rows, part in group if part.weight]
            groups.append([Part(part, part.weight / total, own, precision, scale) for part, own in parts])
        first_row += max((v.shape[0] for v in batch.arguments.values() if is_array(v)), default=0)  # the rows of this one
    parts = [part for group in groups for part in group]
    with np.errstate(all="ignore"):  # NaN and infinity are looked for
        if workers:  # of each part b p.grad += scale · (w_b / Σ w) · dL_b/dp (parallel.py)
            results = workers.losses(parts)
        else:
            results = [r for group in groups if group for r in add_gradients(model, loss, group, trained)]
        if scaler:
            scaler.unscale_(optimizer, look=False)
        callbacks.before_step(step)
        finite = clipped(gradients_of(parameters.items()), max_grad_norm or math.inf, *arrays_of(results))
        if scaler:
            scaler.step(optimizer, finite)
        else:
            optimizer.step(finite)
        squares, *numbers = finite.numbers  # the step's one wait
        losses, seen = in_order(results, numbers)
        for part, L_b in zip(parts, losses):
            L += part.share * L_b
            if not math.isfinite(L):
                raise diverged(step, L, parameters, optimizer, precision)
        record = {
            "step": step, "loss": L, "learning_rate": optimizer.param_groups[0]["lr"],
            "tokens": sum(batch.tokens for batch in batches), **means(seen),
        }  # fmt: skip
        if finite:
            record["grad_norm"] = math.sqrt(squares)
        elif not scaler or scale < 2**-40:  # it is not the scale's fault
            raise diverged(step, L, parameters, optimizer)
        if scaler:
            record["loss_scale"] = scale
            scaler.update()
    if finite:
        callbacks.after_step(step, record)
    optimizer.zero_grad()
    return record


@dataclass(repr=False)
class TrainingResult:
    """What a run ended with: `history` holds the records of metrics.jsonl, `best_*` are of the lowest held-out loss.

    Losses are in nats per label token, or the units of the trainer's `loss`; `seconds` are of this call, by the clock.
    """

    steps: int
    stopped_early: bool
    best_eval_loss: float | None
    best_step: int | None
    seconds: float
    history: list[dict[str, Any]]

    def __repr__(self) -> str:
        """TrainingResult(600 steps in 41.2 s, loss 2.861 -> 0.979, best held-out loss 1.034 at step 500)"""
        shown, losses = [f"{self.steps} steps in {self.seconds:.1f} s"], self.losses()
        shown += [f"loss {losses[0][1]:.3f} -> {losses[-1][1]:.3f}"] if losses else []
        if self.best_eval_loss is not None:
            shown.append(f"best held-out loss {self.best_eval_loss:.3f} at step {self.best_step}")
        return f"{type(self).__name__}({', '.join([*shown, *['stopped early'] * self.stopped_early])})"

    def losses(self, key: str = "loss") -> list[tuple[int, float]]:
        """(step, value) of every record that has `key`: "loss", "eval_loss", "grad_norm", "seconds" of the step, ..."""
        return [(r["step"], r[key]) for r in self.history if key in r]


@configuration
class _Best:
    """The best evaluation so far; the weights (and what callbacks keep) only where early stopping needs them."""

    best_eval_loss: float | None = option(None, "the lowest held-out loss")
    best_step: int | None = option(None, "after which it was measured")
    best: dict[str, Any] = option({}, "the trained parameters then")
    best_callbacks: dict[str, Any] = option({}, "what the callbacks kept then")


# What may differ between a run and the one that resumes it; everything else decides the bytes of the weights.
_FREE = {"output_dir", "save_steps", "save_total_limit", "per_device_eval_batch_size", "progress"}


class Trainer:
    """Trains the parameters of `model` that require gradients, in place, to lower a loss on examples.

    Args:
        model: a Transformer, a PeftModel, or any module; without `loss`, one with a method
            `loss(**arguments, rng=...)`.
        train_examples: (input_ids [n], labels [n]) pairs of integer arrays, labels -100 where they do not count.
        eval_examples: held-out examples, for `eval_steps`, early stopping and `evaluate()`.
        args: see TrainingArguments. `trainer.args` says the learning rate also where they left it to the method.
        pad_token_id: fills shorter examples on the right; it is masked, so its value does not matter.
        collate: for other kinds of examples: a function from a list of them to a `Batch`.
        loss: for other objectives: a function `loss(model, **batch.arguments, rng=None)` that gives a scalar Tensor,
            the mean over the batch's `weight` units; or (that, statistics), arrays [units] by name (NaN does not
            count), whose means are recorded beside it, "eval_<name>" held out; None for one that is infinite. By default
            the model's own. A run is resumed with the same one: options are compared where `functools.partial` has bound
            them.
        optimizer: over exactly the trainable parameters, in place of the one that `args` describe; the schedule
            multiplies the learning rate of each of its groups.

    The loss of a step is the mean over all labels that count in it, however it is cut into batches: accumulated
    gradients equal those of one large batch to float32 rounding. This includes dropout, whose masks follow the place of
    an example in the step; not so with `packing`, where they follow the place in a packed row, so that another cut
    draws other masks. Weights decay as `TrainingArguments` says, but not norms and biases: parameters with one axis. With
    `loraplus_lr_ratio` the groups are those of `loraplus_groups`.

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
        self, model: Module, train_examples: Sequence[Any], eval_examples: Sequence[Any] | None = None,
        args: TrainingArguments | None = None, pad_token_id: int = 0, collate: Collate | None = None,
        optimizer: Optimizer | None = None, loss: Loss | None = None,
    ):  # fmt: skip
        self.model, self.args = model, args or TrainingArguments()
        self.train_examples, self.eval_examples = train_examples, eval_examples
        for name, given in (("train_examples", train_examples), ("eval_examples", eval_examples)):
            if given is not None and not hasattr(given, "__len__"):
                raise TypeError(f"{name} must be a list of examples, not a {type(given).__name__}: list(...) makes one of it")
        if not len(train_examples):
            raise ValueError("there are no training examples")
        if eval_examples is not None and not len(eval_examples):
            raise ValueError("eval_examples is empty; leave it out to train without evaluation")
        if eval_examples is None and (self.args.early_stopping_patience or self.args.eval_steps):
            raise ValueError("eval_steps and early_stopping_patience need eval_examples")
        if self.args.early_stopping_patience and not self.args.eval_steps:
            raise ValueError("early_stopping_patience needs eval_steps: without it nothing is evaluated before the end")
        if collate is None:
            check_examples(train_examples, "training")
            check_examples(eval_examples or [], "evaluation")
        elif self.args.packing:
            raise ValueError("packing is for (input_ids, labels) examples; a collate of its own does its own packing")
        packed = partial(collate_packed, capacity=int(self.args.packing)) if self.args.packing else collate_pairs
        self.collate, self.loss = collate or partial(packed, pad_token_id=pad_token_id), loss or model_loss
        self.trainable: dict[str, Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ValueError("no parameter of the model requires gradients, so there is nothing to train")
        if optimizer is None:
            self.args = with_learning_rate(self.args, model)
        self.optimizer = optimizer or self._make_optimizer()
        self._check_optimizer()
        own = type(getattr(model, "base_model", model)) is Transformer  # whose loss is a mean over labels, row by row
        self._has_rows = collate is None and loss is None and own
        self.precision = self.args.precision
        self.scaler = GradScaler() if self.args.fp16 else None
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.rows_per_step, self.steps_per_epoch = rows, -(-len(train_examples) // rows)
        self.total_steps = self.args.max_steps or math.ceil(self.args.num_train_epochs * self.steps_per_epoch)
        share = math.ceil(self.args.warmup_ratio * self.total_steps)  # not all: the rate of the first step is 0
        self.warmup_steps = self.args.warmup_steps or min(share, self.total_steps - 1)

    def __repr__(self) -> str:
        examples = f"{len(self.train_examples):,} examples, {len(self.eval_examples or ()):,} held out"
        trained = f"{sum(p.size for p in self.trainable.values()):,} trainable parameters"
        steps = f"{self.total_steps:,} steps of {self.rows_per_step}"
        return f"{type(self).__name__}({type(self.model).__name__}, {trained}, {examples}, {steps})"

    def _make_optimizer(self) -> Optimizer:
        a = self.args
        if a.loraplus_lr_ratio is not None:
            groups = loraplus_groups(self.model, a.learning_rate, a.loraplus_lr_ratio, weight_decay=a.weight_decay)
        else:
            groups = self._groups_by_decay()
        if a.optim == "sgd":
            return SGD(groups, lr=a.learning_rate, momentum=a.momentum)
        kind = AdamW8bit if a.optim == "adamw_8bit" else AdamW
        return kind(groups, lr=a.learning_rate, betas=(a.adam_beta1, a.adam_beta2), eps=a.adam_epsilon)

    def _groups_by_decay(self) -> list[dict[str, Any]]:
        matrices, vectors = ([x for x in self.trainable.items() if (x[1].ndim > 1) is m] for m in (True, False))
        decays = ((matrices, self.args.weight_decay), (vectors, 0.0))
        return [{"params": parameters, "weight_decay": decay} for parameters, decay in decays if parameters]

    def _check_optimizer(self) -> None:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        missing = [name for name, p in self.trainable.items() if id(p) not in held]
        if missing or len(held) > len(self.trainable):
            what = f"lacks {missing[0]}" if missing else "holds parameters that are not the model's"
            raise ValueError(f"the optimizer must hold exactly the model's trainable parameters; it {what}")

    # ------------------------------------------------------------------------------------------------------- train

    def train(
        self, resume_from_checkpoint: bool | str | os.PathLike | None = None, callbacks: Iterable[Callback] = (),
        executor: Any = None,
    ) -> TrainingResult:  # fmt: skip
        """Train to the end; `resume_from_checkpoint=True` (or its path) goes on from the last checkpoint in output_dir.

        The `callbacks` (see `Callback`) come after the model's own. With an `executor`, such as a number of processes (see
        `minipeft.executors.opened`), workers compute the batches of each step, of which there are
        gradient_accumulation_steps; a record then has "bytes_moved" (see `minipeft.train.parallel`). Raises ValueError
        for a fresh run into an output_dir that holds checkpoints, and to resume from any but its last; CheckpointError
        for one that is missing, damaged, or of another base, data set, arguments or callbacks; DirectoryInUse where
        another process writes into output_dir.
        """
        began, a, self._best, self._done, self._workers = time.perf_counter(), self.args, _Best(), 0, None
        early = [EarlyStopping(a.early_stopping_patience)] if a.early_stopping_patience else []
        self._callbacks = Callbacks(self.model, more=[*callbacks, *early])
        show = {"loss": "loss {:.3f}", "tokens_per_second": "{:,.0f} tokens/s"}
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]  # as they are now
        run = Run(self, a, self.total_steps, self._callbacks, show)
        with nullcontext() if executor is None else opened(executor) as pool, run.start(resume_from_checkpoint):
            if pool is not None:
                self._workers = Workers(
                    pool, self.model, self.loss, self.trainable, a.gradient_accumulation_steps,
                    a.per_device_train_batch_size if self._has_rows else 1,
                )  # fmt: skip
            try:
                for step in run:
                    run.record(self._step(step))
                    last = step == self.total_steps or self._callbacks.stopped
                    if self.eval_examples is not None and (last or (a.eval_steps and step % a.eval_steps == 0)):
                        run.record(self._evaluate(step))
                if self._best.best:
                    for name, p in self.trainable.items():
                        p.data[...] = self._best.best[name]
                        p._version += 1
                    self._callbacks.load_state_dict(self._best.best_callbacks)
                check_parameters(run.step, self.trainable, self.optimizer)
                if run.directory:
                    with picture(run.directory / "loss.png") as path:
                        plot_loss(run.history, path)
            finally:
                self.model.zero_grad()
                for group, rate in zip(self.optimizer.param_groups, self._base_rates):
                    group["lr"] = rate  # the schedule leaves nothing in an optimizer that was given
        seconds, best = time.perf_counter() - began, self._best
        return TrainingResult(run.step, run.stopped, best.best_eval_loss, best.best_step, seconds, run.history)

    def _step(self, step: int) -> dict[str, Any]:
        """Step number `step` (from 1), and the record of it."""
        a, (epoch, place) = self.args, divmod(step - 1, self.steps_per_epoch)
        start = time.perf_counter()
        rows = epoch_order(len(self.train_examples), a.seed, epoch)[place * self.rows_per_step :][: self.rows_per_step]
        size = a.per_device_train_batch_size
        batches = [
            self.collate([self.train_examples[i] for i in rows[k : k + size]]) for k in range(0, len(rows), size)
        ]
        if not any(batch.weight for batch in batches):
            raise ValueError(f"step {step}: no label counts in any of its {len(rows)} examples")
        factor = SCHEDULES[a.lr_scheduler_type](step - 1, self.warmup_steps, self.total_steps)
        for group, rate in zip(self.optimizer.param_groups, self._base_rates):
            group["lr"] = rate * factor
        record = training_step(
            self.model, batches, self.loss, self.trainable, self.optimizer, self._callbacks, step=step, seed=a.seed,
            max_grad_norm=a.max_grad_norm, workers=self._workers, precision=self.precision, scaler=self.scaler,
            by_rows=self._has_rows,
        )  # fmt: skip
        if self._workers:
            record["bytes_moved"], self._workers.moved = self._workers.moved, 0
        seconds = time.perf_counter() - start
        speed = round(record["tokens"] / max(seconds, 1e-9), 1)
        self._done, epochs = step, round(step / self.steps_per_epoch, 4)
        return {**record, "epoch": epochs, "seconds": seconds, "tokens_per_second": speed}

    # ---------------------------------------------------------------------------------------------------- evaluate

    def evaluate(self, examples: Sequence[Any] | None = None) -> float:
        """Mean loss over all labels that count in `examples` (default: eval_examples): see `train.evaluate`."""
        return self.measure(examples)["loss"]

    def measure(self, examples: Sequence[Any] | None = None) -> dict[str, float]:
        """`evaluate` as {"loss": ...}, with the means of the statistics that the loss gives beside itself."""
        examples = self.eval_examples if examples is None else examples
        size = self.args.per_device_eval_batch_size
        with in_precision(self.precision):
            return measure(self.model, [] if examples is None else examples, size, collate=self.collate, loss=self.loss)

    def _evaluate(self, step: int) -> dict[str, Any]:
        measured, best = self.measure(), self._best
        loss = measured["loss"]
        if not math.isfinite(loss):
            raise diverged(step, loss, self.trainable, self.optimizer, self.precision)
        if best.best_eval_loss is None or loss < best.best_eval_loss:
            best.best_eval_loss, best.best_step = loss, step
            if self.args.early_stopping_patience:
                best.best = {name: p.data.copy() for name, p in self.trainable.items()}
                best.best_callbacks = {name: array.copy() for name, array in self._callbacks.state_dict().items()}
        return {"step": step, **{f"eval_{name}": value for name, value in measured.items()}}

    # ------------------------------------------------------------------------------------------- what a run resumes

    def state(self) -> dict[str, Any]:
        """What is remembered: the best evaluation, the loss scale. Raises TrainingDiverged where a parameter is not finite."""
        check_parameters(self._done, self.trainable, self.optimizer)  # a checkpoint holds nothing that is not finite
        return vars(self._best) | ({"scaler": self.scaler.state_dict()} if self.scaler else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave. Raises ValueError, or another error of Python's, for anything else."""
        scaler = state.pop("scaler") if self.scaler else None
        best = _Best(**state)
        if best.best:
            check_shapes(best.best, {name: p.shape for name, p in self.trainable.items()})
            self._callbacks.load_state_dict(best.best_callbacks)  # only to see that they can be
        if self.scaler:
            self.scaler.load_state_dict(scaler)
        self._best = best

    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed, as JSON values by the names that an error message uses."""
        identity = {k: v for k, v in dataclasses.asdict(self.args).items() if k not in _FREE}
        identity |= {"optimizer": type(self.optimizer).__name__, "learning rates": self._base_rates}
        identity |= {"loss": _named(self.loss), "collate": _named(self.collate)}
        if self.args.early_stopping_patience and self.loss is not model_loss:  # which may compare the examples of a batch
            identity["per_device_eval_batch_size"] = self.args.per_device_eval_batch_size
        identity["trainable parameters"] = {n: f"{p.dtype} {list(p.shape)}" for n, p in self.trainable.items()}
        for what, examples in (("training", self.train_examples), ("evaluation", self.eval_examples or [])):
            identity[f"number of {what} examples"] = len(examples)
            identity[f"{what} examples"] = fingerprint(arrays_in(list(examples)))
        identity["options of the adapters"] = adapter_options(self.model)
        if dataclasses.is_dataclass(config := getattr(self.model, "config", None)):
            identity |= {f"config.{name}": value for name, value in dataclasses.asdict(config).items()}
        return {**identity, "base (its frozen parameters)": frozen_fingerprint(self.model)}


def _named(function: Any) -> str:
    """A function by name, with the options that a `partial` has bound; of arrays, their hash."""
    if isinstance(function, partial):
        return f"{_named(function.func)}({', '.join(f'{name}={_value(v)}' for name, v in function.keywords.items())})"
    return getattr(function, "__qualname__", type(function).__qualname__)


def _value(value: Any) -> str:
    if is_array(value) and value.dtype.kind != "O":
        return fingerprint([("", value)])
    plain = callable(value) or type(value).__repr__ is object.__repr__  # whose repr is an address in memory
    return _named(value) if plain or is_array(value) else repr(value)
