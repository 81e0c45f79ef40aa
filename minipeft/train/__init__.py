"""Training: optimizers, schedules, the loop, callbacks, checkpoints.

A public name is imported when it is first used, so the options of a command load no NumPy.
"""

from ..lazy import lazy

_HOMES = {
    "arguments": "TrainingArguments",
    "batches": "Batch collate collate_packed pack",
    "callbacks": "Callback",
    "checkpoint": "CheckpointError last_checkpoint list_checkpoints load_checkpoint save_checkpoint",
    "evaluation": "evaluate example_losses",
    "metrics": "plot_loss",
    "optim": "SGD Adam Adam8bit AdamW AdamW8bit NonFiniteGradient Optimizer clip_grad_norm",
    "rates": "usual_learning_rate",
    "run": "Run",
    "schedule": "",
    "divergence": "TrainingDiverged",
    "trainer": "Trainer TrainingResult",
}

__getattr__, __dir__, __all__ = lazy(__name__, _HOMES)
