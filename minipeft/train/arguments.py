"""How to train: the arguments of a `Trainer`."""

from __future__ import annotations

import os

from ..options import check, configuration, option
from .schedule import SCHEDULES


@configuration
class TrainingArguments:
    """How to train; names and meanings are Hugging Face's where it has them.

    A step takes `per_device_train_batch_size * gradient_accumulation_steps` examples; the last step of an epoch takes
    those that remain. Weight decay is decoupled (AdamW), or added to the gradient (SGD). The moments of "adamw" take
    eight bytes a parameter, of "adamw_8bit" two (`AdamW8bit`). With `save_steps` there is a checkpoint at the end too.
    Early stopping ends, in any case, with the weights of the best evaluation. `packing` lets the examples of a batch
    share rows instead of padding each to the longest (`collate_packed`): the same loss, sooner. With `output_dir`,
    metrics go to metrics.jsonl there and the loss curve to loss.png. `bf16` and `fp16` round in training and evaluation
    alike; the weights stay float32, and a step that overflows float16 changes none of them.

    Raises ValueError, naming the argument, for a value that makes no sense.
    """

    output_dir: str | os.PathLike | None = option(None, "for metrics and checkpoints", flag="--output", metavar="DIR")
    learning_rate: float | None = option(
        None, "peak learning rate; None: the method's, times 128 / hidden_size in wider models (`train.rates`)",
        above=0, flag="--lr", metavar="RATE",
    )  # fmt: skip
    num_train_epochs: float = option(3.0, "passes over the data", above=0, flag="--epochs", metavar="N")
    max_steps: int | None = option(None, "optimizer steps, in place of epochs", least=1, flag="--steps")
    per_device_train_batch_size: int = option(8, "examples in a forward pass", least=1, flag="--batch-size")
    per_device_eval_batch_size: int = option(8, "the same in an evaluation", least=1, flag="--eval-batch-size")
    gradient_accumulation_steps: int = option(1, "batches in a step", least=1, flag="--accumulation")
    packing: bool | int = option(False, "let examples share rows, of N tokens (without N: the longest's)", least=0)
    optim: str = option("adamw", "optimizer", choices=("adamw", "adamw_8bit", "sgd"), flag="--optimizer")
    adam_beta1: float = option(0.9, "decay of AdamW's average of gradients", least=0, below=1)
    adam_beta2: float = option(0.999, "decay of AdamW's average of squared gradients", least=0, below=1)
    adam_epsilon: float = option(1e-8, "what AdamW adds to the denominator", least=0)
    momentum: float = option(0.0, "momentum of SGD", least=0)
    weight_decay: float = option(0.0, "decay of weights, but not of norms and biases", least=0)
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: B learns at N times the rate (16 in the paper, which lowers it), factors of embeddings at 1e-6",
        least=1, metavar="N",
    )  # fmt: skip
    bf16: bool = option(False, "mixed precision in bfloat16 (see `mp.autocast`)")
    fp16: bool = option(False, "mixed precision in float16, the loss scaled (see `mp.GradScaler`)")
    max_grad_norm: float | None = option(1.0, "clip the gradient to this 2-norm; 0 does not", least=0)
    lr_scheduler_type: str = option("linear", "learning-rate schedule", choices=SCHEDULES, flag="--schedule")
    warmup_ratio: float = option(0.0, "share of steps that warm up", least=0, most=1, flag="--warmup", metavar="SHARE")
    warmup_steps: int = option(0, "steps that warm up, in place of the share", least=0)
    eval_steps: int | None = option(None, "steps between evaluations; None: at the end only", least=1)
    save_steps: int | None = option(None, "steps between checkpoints; None: no checkpoints", least=1)
    save_total_limit: int = option(2, "how many checkpoints are kept, the newest", least=1)
    early_stopping_patience: int | None = option(
        None, "stop after N evaluations in a row without a lower loss", least=1, flag="--early-stopping"
    )
    seed: int = option(0, "seed of the order of the data and of dropout", least=0)
    progress: bool = option(True, "say on stderr how far it is: a bar, or in a log file a line every 10 s")

    def __post_init__(self) -> None:
        check(self)
        sgd, defaults = self.optim == "sgd", type(self)
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon") if sgd else ("momentum",):
            if getattr(self, name) != getattr(defaults, name):
                raise ValueError(f"{name} is not an option of optim={self.optim!r}; got {getattr(self, name)}")
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are two precisions: set one of them")
        if self.save_steps is not None and self.output_dir is None:
            raise ValueError("save_steps needs an output_dir to save to")

    @property
    def precision(self) -> str | None:
        """In which the losses are computed, as `autocast` names it; None: as the weights are."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else None
