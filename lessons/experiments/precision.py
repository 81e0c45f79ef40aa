"""Training in 16 bits: what is rounded, where the weights are kept, and by what the loss is scaled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import matplotlib.pyplot as plt

import minipeft as mp
from minipeft.evaluation.intervals import Estimate
from minipeft.experiments import shipped
from minipeft.peft.methods import METHODS
from minipeft.train import WeightsIn
from minipeft.train.parallel import in_precision

from . import items


@dataclass(frozen=True)
class Precise:
    """A run on Lesson 3's task.

    compute   what ops round to: "float32", "bfloat16" or "float16"
    weights   what the trained weights are kept in; "float32" is a master copy
    scale     of the loss, throughout; None: chosen by a GradScaler, for float16
    test      verses that it is tested on
    """

    method: str = "full"
    learning_rate: float = 1e-3
    compute: str = "float32"
    weights: str = "float32"
    scale: float | None = None
    steps: int = 40
    test: int = items.TEST
    seed: int = 0


FULL, LORA, QLORA = Precise(), Precise("lora", 3e-3), Precise("qlora", 3e-3)
LOW = replace(FULL, learning_rate=3e-5)
MIXED = {"float32": {}, "bf16": {"compute": "bfloat16"}, "fp16": {"compute": "float16"}}
NO_MASTER = {"bf16, no master": {"compute": "bfloat16", "weights": "bfloat16"}}
AT_LOW = {how: MIXED[how] for how in ("float32", "bf16")} | NO_MASTER
UNSCALED = {
    "fp16, S = 1": {"compute": "float16", "scale": 1.0},
    "fp16, S = 2^-10": {"compute": "float16", "scale": 2.0**-10},
    "bf16, S = 2^-10": {"compute": "bfloat16", "scale": 2.0**-10},
}
CASES = {  # (what is trained, how) -> its settings
    (name, how): replace(start, **options)
    for name, start, several in (
        ("full", FULL, MIXED | NO_MASTER | UNSCALED), ("full, low rate", LOW, AT_LOW),
        ("LoRA", LORA, MIXED | NO_MASTER), ("QLoRA", QLORA, MIXED),
    )
    for how, options in several.items()
}  # fmt: skip
RUNS = sorted((replace(s, seed=seed) for s in CASES.values() for seed in range(5)), key=lambda s: s.seed)


def trainer_of(s: Precise, **options: Any) -> tuple[mp.Trainer, list[Any]]:
    """(the trainer of a run, its callbacks)."""
    task = shipped.rewriting(16 * s.steps, s.seed)
    model = METHODS[s.method].prepare(shipped.base()[0], s.steps, s.seed)
    arguments = mp.TrainingArguments(
        learning_rate=s.learning_rate, max_steps=s.steps, per_device_train_batch_size=16, lr_scheduler_type="cosine",
        warmup_ratio=0.05, weight_decay=0.0, seed=s.seed, progress=False, bf16=s.compute == "bfloat16", fp16=s.compute == "float16",
        **options,
    )  # fmt: skip
    trainer = mp.Trainer(model, task.train, args=arguments, pad_token_id=task.pad_token_id)
    if s.scale is not None:
        trainer.scaler = mp.GradScaler(init_scale=s.scale, growth_interval=2**31)
    return trainer, [WeightsIn(model, s.weights)] if s.weights != "float32" else []


def tested(trainer: mp.Trainer, n: int) -> list[float]:
    """The nats of each of `n` test verses, computed as the run computes."""
    with in_precision(trainer.precision):
        return items.nats(trainer.model, items.test("rewrite", n))


def run(s: Precise) -> dict[str, Any]:
    """The row of a run: the nats of each test verse, steps that were skipped, and the last scale."""
    trainer, callbacks = trainer_of(s)
    result = trainer.train(callbacks=callbacks)
    return shipped.rounded({
        "nats": tested(trainer, s.test),
        "skipped": sum("grad_norm" not in record for record in result.history if "loss" in record),
        "last_scale": trainer.scaler.get_scale() if trainer.scaler else None,
    })  # fmt: skip


def runs_picture(learned: dict[tuple[str, str], Estimate]) -> Any:
    """How far the loss of each case of CASES fell."""
    figure, axis = plt.subplots(figsize=(6, 4.6), layout="constrained")
    for i, ((_, how), (mean, _, high)) in enumerate(reversed(learned.items())):
        color = "#D55E00" if how in ("fp16, S = 2^-10", "bf16, no master") else "0.75" if how == "float32" else "#0072B2"
        axis.barh(i, mean, xerr=high - mean, color=color, capsize=2, height=0.7)
    axis.set_yticks(range(len(learned)), [f"{what}: {how}" for what, how in reversed(learned)], fontsize=8)
    axis.set(title="Learned in 40 steps\n(orange: no master copy, or too small a scale)", xlabel="fall of the task loss, nats a token")
    return figure
