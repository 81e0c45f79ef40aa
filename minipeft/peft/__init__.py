"""Parameter-efficient fine-tuning: one file a method, each a configuration and what it trains.

A public name is imported when it is first used.
"""

from ..lazy import lazy

_HOMES = {
    "model": "get_peft_model PeftModel assert_learning",
    "config": "PeftConfig PeftError",
    "layer": "Adapter",
    "methods": "register",
    "lora": "LoraConfig",
    "adalora": "AdaLoraConfig",
    "vera": "VeraConfig",
    "loha": "LoHaConfig",
    "lokr": "LoKrConfig",
    "oft": "OFTConfig",
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

__getattr__, __dir__, __all__ = lazy(__name__, _HOMES)
