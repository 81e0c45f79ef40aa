"""One run of an experiment: a base, a task and explicit settings go in, a flat row of measurements comes out.

    settings ─► method on the base ─► steps on task.train (and replay) ─► loss on task.held_out, on task.general
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import train
from ..autograd.tensor import Tensor, is_grad_enabled
from ..nn.layers import Dropout
from ..nn.module import Module
from ..options import configuration, option
from ..peft.methods import METHODS, Method
from ..text.examples import Example
from ..train import Trainer, TrainingArguments, TrainingDiverged
from .costs import count, storage


class TaskData(NamedTuple):
    """Encoded examples.

    train, held_out  of what is to be learned
    general          held-out text of the base's own domain: the loss on it says what was forgotten
    replay           training text of that domain, for runs that replay some
    """

    train: list[Example]
    held_out: list[Example]
    general: list[Example]
    replay: list[Example]
    pad_token_id: int


@configuration(frozen=True)
class Settings:
    """How to fine-tune; with the task and the base, all that decides a row. The schedule is a cosine to 0."""

    method: str = option("full", "a key of METHODS", choices=METHODS)
    learning_rate: float | None = option(None, "peak rate; None: the method's", above=0, flag="--lr", metavar="RATE")
    steps: int = option(40, "optimizer steps", least=1)
    batch_size: int = option(16, "examples of the task in a step", least=1)
    accumulation: int = option(1, "the number of parts a step is computed in; their gradients are added", least=1)
    warmup: float = option(0.05, "share of the steps over which the rate rises from 0", least=0, most=1, flag="--warmup-ratio")
    weight_decay: float = option(0.0, "decoupled, towards 0 (AdamW)", least=0)
    dropout: float = option(0.0, "in the base, on the embeddings and the residual branches", least=0, below=1)
    replay: float = option(0.0, "blocks of general text that are mixed in, per example of the task", least=0)
    l2_start: float = option(0.0, "α of the penalty α/2 · ||w - w_start||² (`l2_sp`)", least=0)
    evaluations: int = option(1, "how often, at most, the held-out loss is measured: evenly, last at the end", least=1)
    seed: int = option(0, "seed of the adapter's start, the order of the data and dropout", least=0)


def l2_sp(model: Module, alpha: float) -> Callable[..., Tensor]:
    """A model's loss, a scalar, plus α/2 · Σ (w - w_start)² over what is trained, while gradients are recorded.

    Li et al. 2018, Explicit Inductive Bias for Transfer Learning with Convolutional Networks, equation 2; the paper's
    second term, of a new head towards 0, has no object here.
    """
    start = [(p, p.data.copy()) for p in model.parameters() if p.requires_grad]

    def loss(model: Any, **arguments: Any) -> Tensor:
        value = model.loss(**arguments)
        if is_grad_enabled():
            for p, w in start:
                value = value + ((p - w) ** 2).sum() * (alpha / 2)
        return value

    return loss


def with_dropout(model: Any, p: float) -> Any:
    """The same language model, sharing its arrays, with another dropout probability."""
    twin = model.copy(share=True)
    twin.config = twin.backbone.config = twin.config.replace(dropout=p)
    for _, module in twin.named_modules():
        if isinstance(module, Dropout):
            module.p = p
    return twin


def fine_tune(
    base: Any, task: TaskData, settings: Settings, method: Method | None = None, progress: bool = True
) -> tuple[dict[str, Any], Any]:
    """(measurements, the trained model); the base stays as it is. `method` replaces what settings.method names.

    trainable, parameters      numbers of parameters, as PEFT counts them
    storage                    bytes to keep for the task
    rate                       the learning rate, also where the settings leave it to the method
    seconds_per_step           median
    train_loss                 mean over the last quarter of the steps, nats per token; a penalty is part of it
    task_loss, general_loss    after the last step, nats per token; None where training diverged
    curve, held_out_curve      [[step, loss], ...]

    Raises ValueError for settings that make no sense together, PeftError for a method that does not fit the base.
    """
    s, method = settings, method or METHODS[settings.method]
    if (rows := round(s.batch_size * (1 + s.replay))) % s.accumulation:
        raise ValueError(f"a batch of {rows} examples cannot be cut into {s.accumulation} equal parts")
    if s.replay and not task.replay:
        raise ValueError("the task has no general text to replay")
    model = method.prepare(with_dropout(base, s.dropout) if s.dropout else base, s.steps, s.seed)
    replayed = round(s.replay * len(task.train))
    examples = task.train + [task.replay[i % len(task.replay)] for i in range(replayed)]
    arguments = TrainingArguments(
        learning_rate=s.learning_rate,
        max_steps=s.steps,
        per_device_train_batch_size=rows // s.accumulation,
        gradient_accumulation_steps=s.accumulation,
        per_device_eval_batch_size=s.batch_size,
        lr_scheduler_type="cosine",
        warmup_ratio=s.warmup,
        weight_decay=s.weight_decay,
        eval_steps=math.ceil(s.steps / s.evaluations),
        seed=s.seed,
        progress=progress,
    )
    loss = l2_sp(model, s.l2_start) if s.l2_start else None
    trainer = Trainer(model, examples, task.held_out, arguments, task.pad_token_id, loss=loss)
    trainable, total = count(model)
    row: dict[str, Any] = {"rate": trainer.args.learning_rate, "trainable": trainable, "parameters": total}
    try:
        result = trainer.train()
        general_loss = trainer.evaluate(task.general)
    except TrainingDiverged:
        nothing = dict.fromkeys(("seconds_per_step", "train_loss", "task_loss", "general_loss"))
        return row | nothing | {"storage": storage(model), "curve": [], "held_out_curve": []}, model
    curve, held_out_curve = result.losses("loss"), result.losses("eval_loss")
    row |= {
        "storage": storage(model),  # AdaLoRA keeps what it has not pruned
        "seconds_per_step": statistics.median(seconds for _, seconds in result.losses("seconds")),
        "train_loss": statistics.mean(loss for _, loss in curve[-math.ceil(s.steps / 4) :]),
        "task_loss": held_out_curve[-1][1], "general_loss": general_loss,
        "curve": curve, "held_out_curve": held_out_curve,
    }  # fmt: skip
    return row, model


def evaluate(model: Any, task: TaskData, batch_size: int = 16) -> tuple[float, float]:
    """(loss on the held-out examples of the task, loss on general text) of a model as it is, nats per token."""
    held_out, general = (train.evaluate(model, e, batch_size, task.pad_token_id) for e in (task.held_out, task.general))
    return held_out, general
