"""minipeft: fine-tuning large language models from scratch, in NumPy/CuPy, to read, run and trust.

Every public name is imported when it is first used, so `import minipeft as mp` costs little more than NumPy.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "autograd.tensor": "Tensor no_grad AutogradError",
    "autograd.gradcheck": "gradcheck GradcheckError",
    "nn.transformer": "Transformer TransformerConfig KVCache",
    "nn.heads": "SequenceClassifier ValueModel head_only",
    "train.trainer": "Trainer TrainingArguments",
    "hub.pretrained": "from_pretrained save_pretrained",
    "hub.base": "load_base",
    "peft": "get_peft_model PeftModel assert_learning LoraConfig AdaLoraConfig VeraConfig IA3Config LNTuningConfig "
    "BitFitConfig BottleneckConfig PromptTuningConfig PrefixTuningConfig PromptEncoderConfig",
}
_OBJECTS = {name: module for module, names in _HOMES.items() for name in names.split()}
_MODULES = {
    "functional": "autograd.ops",
    "optim": "train.optim",
    "backend": "backend",
    "files": "files",
    "nn": "nn",
    "quant": "quant",
    "peft": "peft",
    "train": "train",
    "text": "text",
    "hub": "hub",
    "rlhf": "rlhf",
    "accounting": "accounting",
}

__all__ = ["__version__", *_OBJECTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _OBJECTS:
        value = getattr(importlib.import_module(f"{__name__}.{_OBJECTS[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    else:
        raise AttributeError(f"module 'minipeft' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
