"""The fine-tuning methods the commands know: one entry each. The parts of the library are imported when one is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    title          what a table calls it, short
    learning_rate  the default, from a grid (3e-4, 1e-3, 3e-3, 1e-2; to 1e-1 for vectors that are trained themselves) on
                   the shipped base and the validation split of the task "rewrite": above it the task's loss falls
                   little more and what is forgotten multiplies. Larger models want less.
    prepare        from a base model to the model that is trained; the base stays as it is
    config         what `minipeft.accounting` takes for the method: None for all parameters, "head", or a configuration
    quantized      whether `prepare` stores the frozen weights in 4 bits, which shapes and `config` do not tell
    """

    title: str
    learning_rate: float
    prepare: Callable[[Any], Any]
    config: Callable[[], Any]
    quantized: bool = False

    @property
    def virtual_tokens(self) -> int:
        """Positions of the context that the method takes from every example."""
        return getattr(self.config(), "num_virtual_tokens", 0)


def _head(base: Any) -> Any:
    from ..nn.heads import head_only

    return head_only(base)


def _full(base: Any) -> Any:
    return base.copy().requires_grad_(True)


def _adapted(config: Callable[[], Any]) -> Callable[[Any], Any]:
    """What prepares a method of minipeft.peft: its configuration put on the base."""

    def prepare(base: Any) -> Any:
        from ..peft.model import get_peft_model

        return get_peft_model(base, config())

    return prepare


def _lora() -> Any:
    from ..peft.lora import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


def _qlora_model(base: Any) -> Any:
    from ..peft.model import get_peft_model
    from ..quant import quantize_model

    return get_peft_model(quantize_model(base), _lora())


def _ia3() -> Any:
    from ..peft.ia3 import IA3Config

    return IA3Config()


def _bottleneck() -> Any:
    from ..peft.bottleneck import BottleneckConfig

    return BottleneckConfig(placement="houlsby", bottleneck_size=16)


def _prompt() -> Any:
    from ..peft.prompt_tuning import PromptTuningConfig

    return PromptTuningConfig(num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB")


def _prefix() -> Any:
    from ..peft.prefix_tuning import PrefixTuningConfig

    return PrefixTuningConfig(num_virtual_tokens=20, prefix_projection=True)


def _p_tuning() -> Any:
    from ..peft.p_tuning import PromptEncoderConfig

    return PromptEncoderConfig(num_virtual_tokens=20)


METHODS: dict[str, Method] = {
    "head": Method("last layer", 3e-3, _head, lambda: "head"),
    "full": Method("full", 1e-3, _full, lambda: None),
    "lora": Method("LoRA r=8", 3e-3, _adapted(_lora), _lora),
    "qlora": Method("QLoRA r=8", 3e-3, _qlora_model, _lora, quantized=True),
    "ia3": Method("IA3", 1e-2, _adapted(_ia3), _ia3),
    "bottleneck": Method("adapter m=16", 3e-3, _adapted(_bottleneck), _bottleneck),
    "prompt": Method("prompt P=20", 3e-2, _adapted(_prompt), _prompt),
    "prefix": Method("prefix P=20", 1e-2, _adapted(_prefix), _prefix),
    "p-tuning": Method("P-tuning P=20", 1e-2, _adapted(_p_tuning), _p_tuning),
}
