"""Training: optimizers, schedules, the loop, checkpoints."""

from .batches import Batch, collate, collate_packed, pack
from .checkpoint import CheckpointError, last_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from .evaluation import evaluate
from .metrics import plot_loss
from .optim import SGD, Adam, AdamW, NonFiniteGradient, Optimizer, clip_grad_norm
from .trainer import Trainer, TrainingArguments, TrainingDiverged, TrainingResult

__all__ = [
    "SGD", "Adam", "AdamW", "Batch", "CheckpointError", "NonFiniteGradient", "Optimizer", "Trainer",
    "TrainingArguments", "TrainingDiverged", "TrainingResult", "clip_grad_norm", "collate", "collate_packed",
    "evaluate", "last_checkpoint", "list_checkpoints", "load_checkpoint", "pack", "plot_loss", "save_checkpoint",
]  # fmt: skip
