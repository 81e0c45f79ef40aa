"""The fine-tuning methods the commands know: one entry each. The parts of the library are imported when one is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    title          what a table calls it, short
    learning_rate  the default, from a grid (1e-3, 3e-3, 1e-2, 3e-2, 1e-1) on the shipped base, runs of `compare`'s
                   length and the validation split of its task: the highest rate whose loss on the task is still at
                   least 0.05 nats below that of the next lower one. Above it little is learned in addition, or nothing,
                   and what is forgotten multiplies. (Those of the last layer, QLoRA, prompt and P-tuning are from an
                   earlier grid, with runs of 80 steps.) Wider models want less: `rate_for`.
    config         from the steps of a run to what `minipeft.accounting` takes for the method: None for all parameters,
                   "head", or a configuration. The counts do not depend on the steps; AdaLoRA's schedule does.
    quantized      whether the frozen weights are stored in 4 bits, which shapes and `config` do not say
    """

    title: str
    learning_rate: float
    config: Callable[..., Any]
    quantized: bool = False

    @property
    def virtual_tokens(self) -> int:
        """Positions of the context that the method takes from every example."""
        return getattr(self.config(), "num_virtual_tokens", 0)

    def rate_for(self, base: Any) -> float:
        """The default learning rate on a model: in proportion less for one wider than the shipped base.

        A step of Adam moves every weight by about the rate, and a layer's output by about the rate times its width
        (Yang et al. 2022, Tensor Programs V, arXiv:2203.03466).
        """
        return self.learning_rate * min(1.0, 128 / base.config.hidden_size)

    def prepare(self, base: Any, steps: int, seed: int = 0) -> Any:
        """The model that is trained, for a run of this number of steps; `base` stays as it is.

        The seed names the adapter's initial values, so that runs of several seeds also differ in them.

        Raises PeftError for a method that does not fit the model.
        """
        config = self.config(steps)
        if config is None:
            return base.copy().requires_grad_(True)
        if config == "head":
            from ..nn.heads import head_only

            return head_only(base)
        from ..peft.model import get_peft_model

        if self.quantized:
            from ..quant import Linear4bit, quantize_model

            if not any(isinstance(module, Linear4bit) for _, module in base.named_modules()):
                base = quantize_model(base)
        return get_peft_model(base, config, seed=seed)

    def why_not(self, base: Any) -> str | None:
        """Why the method cannot be put on a model (BitFit on one without biases), or None; nothing is built."""
        from ..peft.config import PeftConfig, PeftError

        config = self.config()
        try:
            if isinstance(config, PeftConfig):
                config.check(base)
        except PeftError as error:
            return str(error)
        return None


def _peft(peft_type: str, **options: Any) -> Callable[..., Any]:
    """What gives the configuration of a method of minipeft.peft, the same for a run of any length."""

    def config(steps: int = 1) -> Any:
        from ..peft.huggingface import config_class

        return config_class(peft_type)(**options)

    return config


def _adalora(steps: int = 1) -> Any:
    """A tenth of the run at full rank, then four tenths of pruning, then half of it at the ranks that are left."""
    from ..peft.adalora import AdaLoraConfig

    return AdaLoraConfig(
        total_step=steps, tinit=steps // 10, tfinal=steps // 2, init_r=12, target_r=8, lora_alpha=24,
        orth_reg_weight=0.1, target_modules="all-linear",
    )  # fmt: skip


_lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
_pissa = {**_lora, "lora_alpha": 8, "init_lora_weights": "pissa"}
_virtual = {"num_virtual_tokens": 20}
_houlsby = {"placement": "houlsby", "bottleneck_size": 16, "non_linearity": "relu"}

METHODS: dict[str, Method] = {
    "head": Method("last layer", 3e-3, lambda steps=1: "head"),
    "full": Method("full", 1e-3, lambda steps=1: None),
    "bitfit": Method("BitFit", 1e-2, _peft("BITFIT")),  # not from the grid: the shipped base has no biases
    "ln": Method("LN tuning", 3e-2, _peft("LN_TUNING")),
    "lora": Method("LoRA r=8", 3e-3, _peft("LORA", **_lora)),
    "dora": Method("DoRA r=8", 3e-3, _peft("LORA", **_lora, use_dora=True)),
    "pissa": Method("PiSSA r=8", 1e-3, _peft("LORA", **_pissa)),
    "adalora": Method("AdaLoRA r=8", 3e-2, _adalora),
    "vera": Method("VeRA r=64", 1e-1, _peft("VERA", r=64, target_modules="all-linear")),
    "qlora": Method("QLoRA r=8", 3e-3, _peft("LORA", **_lora), quantized=True),
    "ia3": Method("IA3", 3e-2, _peft("IA3")),
    "bottleneck": Method("adapter m=16", 3e-3, _peft("BOTTLENECK", **_houlsby)),
    "prompt": Method("prompt P=20", 3e-2, _peft("PROMPT_TUNING", **_virtual, prompt_tuning_init="SAMPLE_VOCAB")),
    "prefix": Method("prefix P=20", 1e-2, _peft("PREFIX_TUNING", **_virtual, prefix_projection=True)),
    "p-tuning": Method("P-tuning P=20", 1e-2, _peft("P_TUNING", **_virtual)),
}
