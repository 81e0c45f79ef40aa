"""LN tuning: training only the normalization layers (Zhao et al. 2023, arXiv:2312.11420, section 3).

Each LayerNorm or RMSNorm is replaced by a copy of itself that learns; merged, the copy takes the original's place.
"""

from __future__ import annotations

from ..nn.module import Module
from ..options import configuration
from .config import PeftConfig, Seed, Shape
from .layer import TrainedCopy
from .targets import by_family

NORMS = by_family({
    "gpt2": ["ln_1", "ln_2", "ln_f"], "gptj": ["ln_1", "ln_f"], "phi": ["input_layernorm", "final_layernorm"],
    "llama gemma": ["input_layernorm", "post_attention_layernorm", "norm"], "qwen2 qwen3": ["post_attention_layernorm"],
    "gemma2 gemma3_text": [
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"],
    "bert roberta deberta-v2": ["LayerNorm"], "t5 mt5": ["layer_norm", "final_layer_norm"],
    "bloom falcon": ["input_layernorm", "post_attention_layernorm", "ln_f"],
    "opt": ["self_attn_layer_norm", "final_layer_norm"],
})  # fmt: skip


@configuration
class LNTuningConfig(PeftConfig):
    """LN tuning, weight * normalized(x) + bias with both trained; target_modules says which norms (default: all)."""

    peft_type = "LN_TUNING"
    usual_learning_rate = 3e-2
    kinds = ("norm",)
    usual_targets = NORMS

    def parameter_shapes(self, name: str, kind: str, shape: Shape) -> dict[str, Shape]:
        if kind not in ("norm", "bias") or not self.targets(name, "norm"):
            return {}
        return {f"ln_tuning_layers.{'weight' if kind == 'norm' else 'bias'}": shape}

    def adapter(self, name: str, layer: Module, shapes: dict[str, Shape], seed: Seed) -> TrainedCopy:
        return TrainedCopy(layer, seed, prefix="ln_tuning_layers.")
