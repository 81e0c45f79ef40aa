"""Parameter-efficient fine-tuning: one file a method, each a configuration and what it trains.

A public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "model": "get_peft_model PeftModel assert_learning",
    "config": "PeftConfig PeftError",
    "lora": "LoraConfig",
    "adalora": "AdaLoraConfig",
    "vera": "VeraConfig",
    "ia3": "IA3Config",
    "ln_tuning": "LNTuningConfig",
    "bitfit": "BitFitConfig",
    "bottleneck": "BottleneckConfig",
    "prompt_tuning": "PromptTuningConfig",
    "prefix_tuning": "PrefixTuningConfig",
    "p_tuning": "PromptEncoderConfig",
    "loftq": "get_loftq_model merge_and_requantize MergeError",
    "combine": "add_weighted_adapter",
}
_OBJECTS = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = list(_OBJECTS)


def __getattr__(name: str) -> Any:
    if name not in _OBJECTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_OBJECTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
