"""Training in 16 bits: what is rounded, where the weights are kept, and by what the loss is scaled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import minipeft as mp
from minipeft.experiments import shipped
from minipeft.experiments.seeds import SEEDS
from minipeft.experiments.shipped import Rewriting
from minipeft.peft.methods import METHODS
from minipeft.train import WeightsIn


@dataclass(frozen=True)
class Precise:
    """A run on Lesson 3's task.

    compute   what ops round to: "float32", "bfloat16" or "float16"
    weights   what the trained weights are kept in; "float32" is a master copy
    scale     of the loss, throughout; None: chosen by a GradScaler, for float16
    """

    method: str = "full"
    learning_rate: float = 1e-3
    compute: str = "float32"
    weights: str = "float32"
    scale: float | None = None
    steps: int = 40
    held_out: int = 96
    seed: int = 0


FULL, LORA, QLORA = Precise(), Precise("lora", 3e-3), Precise("qlora", 3e-3)
LOW = replace(FULL, learning_rate=3e-5)
MIXED = {"float32": {}, "bf16": {"compute": "bfloat16"}, "fp16": {"compute": "float16"}}
NO_MASTER = {"bf16, no master": {"compute": "bfloat16", "weights": "bfloat16"}}
UNSCALED = {
    "fp16, S = 1": {"compute": "float16", "scale": 1.0},
    "fp16, S = 2^-10": {"compute": "float16", "scale": 2.0**-10},
    "bf16, S = 2^-10": {"compute": "bfloat16", "scale": 2.0**-10},
}
CASES = {  # (what is trained, how) -> its settings
    (name, how): replace(start, **options)
    for name, start, several in (
        ("full", FULL, MIXED | NO_MASTER | UNSCALED), ("full, low rate", LOW, MIXED | NO_MASTER),
        ("LoRA", LORA, MIXED | NO_MASTER), ("QLoRA", QLORA, MIXED),
    )
    for how, options in several.items()
}  # fmt: skip
RUNS = sorted((replace(s, seed=seed) for s in CASES.values() for seed in SEEDS), key=lambda s: s.seed)


def trainer_of(s: Precise, **options: Any) -> tuple[mp.Trainer, list[Any]]:
    """(the trainer of a run, its callbacks)."""
    task = shipped.data(Rewriting(s.method, s.learning_rate, steps=s.steps, seed=s.seed, held_out=s.held_out))
    model = METHODS[s.method].prepare(shipped.base()[0], s.steps, s.seed)
    arguments = mp.TrainingArguments(
        learning_rate=s.learning_rate, max_steps=s.steps, per_device_train_batch_size=16, per_device_eval_batch_size=16,
        lr_scheduler_type="cosine", warmup_ratio=0.05, weight_decay=0.0, seed=s.seed, progress=False,
        bf16=s.compute == "bfloat16", fp16=s.compute == "float16", **options,
    )  # fmt: skip
    trainer = mp.Trainer(model, task.train, task.held_out, arguments, task.pad_token_id)
    if s.scale is not None:
        trainer.scaler = mp.GradScaler(init_scale=s.scale, growth_interval=2**31)
    return trainer, [WeightsIn(model, s.weights)] if s.weights != "float32" else []


def run(s: Precise) -> dict[str, Any]:
    """The row of a run: losses in nats per token, steps that were skipped, and the last scale."""
    trainer, callbacks = trainer_of(s)
    result = trainer.train(callbacks=callbacks)
    return shipped.rounded({
        "task_loss": result.losses("eval_loss")[-1][1],
        "skipped": sum("grad_norm" not in record for record in result.history if "loss" in record),
        "last_scale": trainer.scaler.get_scale() if trainer.scaler else None,
    })  # fmt: skip
