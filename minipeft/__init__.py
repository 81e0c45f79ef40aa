"""minipeft: fine-tuning large language models from scratch, in NumPy/CuPy, to read, run and trust.

Every public name is imported when it is first used, so `import minipeft as mp` costs little more than NumPy.

The words of the course are explained in minipeft/book/glossary.txt.
"""

from typing import TYPE_CHECKING

from .lazy import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:  # the public names; each is imported when it is first used
    from . import (
        backend as backend, files as files, directory as directory, autograd as autograd, nn as nn, quant as quant, peft as peft,
        train as train, text as text, hub as hub, evaluation as evaluation, rlhf as rlhf,
        accounting as accounting, diagrams as diagrams, experiments as experiments, claims as claims,
    )  # fmt: skip
    from .autograd import ops as functional
    from .train import optim as optim
    from .autograd.tensor import Tensor as Tensor, no_grad as no_grad, AutogradError as AutogradError
    from .autograd.autocast import autocast as autocast
    from .autograd.gradcheck import gradcheck as gradcheck, GradcheckError as GradcheckError
    from .nn.transformer import Transformer as Transformer, TransformerConfig as TransformerConfig, KVCache as KVCache
    from .nn.heads import SequenceClassifier as SequenceClassifier, ValueModel as ValueModel, head_only as head_only
    from .nn.precision_report import PrecisionReport as PrecisionReport
    from .nn.why import why_unmoved as why_unmoved
    from .train.grad_scaler import GradScaler as GradScaler
    from .train.trainer import Trainer as Trainer, TrainingArguments as TrainingArguments
    from .hub.pretrained import from_pretrained as from_pretrained, save_pretrained as save_pretrained
    from .hub.base import load_base as load_base
    from .evaluation.answers import ask as ask
    from .experiments.sweep import grid as grid, sweep as sweep
    from .peft import (
        get_peft_model as get_peft_model, PeftModel as PeftModel, assert_learning as assert_learning,
        LoraConfig as LoraConfig, AdaLoraConfig as AdaLoraConfig, VeraConfig as VeraConfig, IA3Config as IA3Config,
        LoHaConfig as LoHaConfig, LoKrConfig as LoKrConfig, OFTConfig as OFTConfig, LNTuningConfig as LNTuningConfig,
        BitFitConfig as BitFitConfig, BottleneckConfig as BottleneckConfig,
        PromptTuningConfig as PromptTuningConfig, PrefixTuningConfig as PrefixTuningConfig,
        PromptEncoderConfig as PromptEncoderConfig, TrainableTokensConfig as TrainableTokensConfig,
    )  # fmt: skip

    __all__ = ["functional"]  # to type checkers, a name that is not the module's own is private unless listed
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
