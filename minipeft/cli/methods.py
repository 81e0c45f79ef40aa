"""The fine-tuning methods the commands know: one entry each. The parts of the library are imported when one is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    title          what a table calls it, short
    learning_rate  the default, from a grid (3e-4, 1e-3, 3e-3, 1e-2) on the shipped base and the validation split of the
                   task "rewrite": above it the task's loss falls little more and what is forgotten multiplies. Larger
                   models want less.
    prepare        from a base model to the model that is trained; the base stays as it is
    config         what `minipeft.accounting` takes for the method: None for all parameters, "head", or a configuration
    """

    title: str
    learning_rate: float
    prepare: Callable[[Any], Any]
    config: Callable[[], Any]


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


METHODS: dict[str, Method] = {
    "head": Method("last layer", 3e-3, _head, lambda: "head"),
    "full": Method("full", 1e-3, _full, lambda: None),
    "lora": Method("LoRA r=8", 3e-3, _adapted(_lora), _lora),
}
