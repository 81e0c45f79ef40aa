"""Parameter-efficient fine-tuning: one file a method, each a configuration and what it trains.

A public name is imported when it is first used.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:  # the public names; each is imported when it is first used
    from .model import get_peft_model as get_peft_model, PeftModel as PeftModel, assert_learning as assert_learning
    from .config import PeftConfig as PeftConfig, PeftError as PeftError
    from .layer import Adapter as Adapter
    from .methods import register as register
    from .lora import LoraConfig as LoraConfig
    from .adalora import AdaLoraConfig as AdaLoraConfig
    from .vera import VeraConfig as VeraConfig
    from .loha import LoHaConfig as LoHaConfig
    from .lokr import LoKrConfig as LoKrConfig
    from .oft import OFTConfig as OFTConfig
    from .ia3 import IA3Config as IA3Config
    from .ln_tuning import LNTuningConfig as LNTuningConfig
    from .bitfit import BitFitConfig as BitFitConfig
    from .bottleneck import BottleneckConfig as BottleneckConfig
    from .trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
    from .prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from .prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from .p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from .loftq import get_loftq_model as get_loftq_model
    from .requantize import merge_and_requantize as merge_and_requantize, RequantizationLoss as RequantizationLoss
    from .combine import add_weighted_adapter as add_weighted_adapter
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
