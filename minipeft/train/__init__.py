"""Training: optimizers, schedules, the loop, callbacks, checkpoints.

A public name is imported when it is first used, so the options of a command load no NumPy.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:  # the public names; each is imported when it is first used
    from . import schedule as schedule
    from .arguments import TrainingArguments as TrainingArguments
    from .batches import Batch as Batch, collate as collate, collate_packed as collate_packed, pack as pack
    from .callbacks import (
        Callback as Callback, EarlyStopping as EarlyStopping, EMA as EMA, Log as Log, WeightsIn as WeightsIn,
    )  # fmt: skip
    from .checkpoint import (
        CheckpointError as CheckpointError, last_checkpoint as last_checkpoint,
        list_checkpoints as list_checkpoints, load_checkpoint as load_checkpoint, save_checkpoint as save_checkpoint,
    )  # fmt: skip
    from .evaluation import evaluate as evaluate, example_losses as example_losses
    from .grad_scaler import GradScaler as GradScaler
    from .metrics import plot_loss as plot_loss
    from .optim import (
        SGD as SGD, Adam as Adam, AdamW as AdamW, AdamW8bit as AdamW8bit,
        NonFiniteGradient as NonFiniteGradient, Optimizer as Optimizer, clip_grad_norm as clip_grad_norm,
    )  # fmt: skip
    from .rates import usual_learning_rate as usual_learning_rate
    from .run import Run as Run
    from .divergence import TrainingDiverged as TrainingDiverged
    from .trainer import Trainer as Trainer, TrainingResult as TrainingResult
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
