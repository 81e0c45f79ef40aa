"""(IA)³: infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv:2205.05638).

    y = l * (W x + b)        keys and values (section 3.3): one learned factor per output
    y = W (l * x) + b        the MLP's second layer: one per input

The factors start at 1. Merged, they scale W's rows (and b), or its columns. The usual targets are PEFT's: a layer that fuses
queries, keys and values is scaled as a whole; for Qwen, Gemma, GPT-J and Phi queries stand in for keys, for OPT for values.
"""

from __future__ import annotations

import re

import numpy as np

from ..autograd.tensor import Tensor
from ..backend import Rng
from ..nn.module import Module
from ..options import configuration, option
from .config import PeftConfig, PeftError, Shape
from .layer import Adapter, Inner
from .targets import by_family, check_patterns, family_of, matches
from .weights import dense_weight, out_in, with_weight

SCALED = by_family({  # model_type -> target_modules
    "gpt2 gpt_bigcode": ["c_attn", "mlp.c_proj"],
    "llama": ["k_proj", "v_proj", "down_proj"], "mixtral": ["k_proj", "v_proj"],  # its experts' w2 is no layer any more
    "qwen2 qwen3 gemma gemma2 gemma3_text": ["q_proj", "v_proj", "down_proj"],
    "gptj": ["q_proj", "v_proj", "fc_out"], "phi": ["q_proj", "v_proj", "fc2"], "opt": ["q_proj", "k_proj", "fc2"],
    "gpt_neox falcon": ["query_key_value", "dense_4h_to_h"], "bloom": ["query_key_value", "mlp.dense_4h_to_h"],
    "bert roberta": ["key", "value", "output.dense"], "deberta-v2": ["key_proj", "value_proj", "output.dense"],
    "t5": ["k", "v", "wo"], "mt5": ["k", "v", "wi_1"],
})  # fmt: skip
FEEDFORWARD = ("mlp.c_proj", "down_proj", "output.dense", "wo", "mlp.dense_4h_to_h", "dense_4h_to_h", "fc2", "fc_out")  # their input is scaled


class IA3Layer(Adapter):
    """One factor per output, ia3_l [out, 1], or per input, [1, in]."""

    @property
    def is_feedforward(self) -> bool:
        """Whether the input is scaled."""
        return self.config.is_feedforward(self.path)

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        self.ia3_l.data += 1

    def forward(self, x: Tensor, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """x [..., in] -> [..., out]."""
        l = self.ia3_l.reshape(-1)
        return inner(x * l) if self.is_feedforward else inner(x) * l

    def merge(self, layer: Module, base: Module) -> Module:
        """W' = diag(l) W and b' = l * b; of a feedforward module W' = W diag(l)."""
        W = out_in(layer, dense_weight(layer)) * self.ia3_l.data  # rows, or columns
        bias = getattr(layer, "bias", None)
        scaled = None if bias is None or self.is_feedforward else bias.data * self.ia3_l.data.reshape(-1)
        return with_weight(layer, out_in(layer, W), scaled)


@configuration
class IA3Config(PeftConfig):
    """(IA)³'s options, with PEFT's names: y = l * (W x + b), of feedforward_modules W (l * x) + b."""

    feedforward_modules: list[str] | str | None = option(
        None, "targets whose input is scaled: ends of paths, or a regular expression; None: the usual ones"
    )
    init_ia3_weights: bool = option(True, "must be True: the factors start at 1", choices=(True,))
    fan_in_fan_out: bool | None = option(None, "whether weights are stored [in, out]; None: each layer knows its own")

    peft_type, adapter_class = "IA3", IA3Layer
    usual_learning_rate = 3e-2
    usual_targets = SCALED

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, str):
            check_patterns("feedforward_modules", self.feedforward_modules)
        lists = isinstance(self.feedforward_modules, (list, tuple)) and isinstance(self.target_modules, list)
        if lists and not self.inference_mode:  # PEFT writes files that are otherwise
            extra = sorted(set(self.feedforward_modules) - set(self.target_modules))
            if extra:
                raise PeftError(f"feedforward_modules must be among target_modules; {', '.join(extra)} is not")

    def with_targets(self, model: Module) -> IA3Config:
        config = super().with_targets(model)
        if config.feedforward_modules is not None:
            return config
        model_type, targets = family_of(model, SCALED), config.target_modules
        if model_type not in SCALED:
            raise PeftError(f"IA3Config needs feedforward_modules (or []) for a model of type {model_type!r}")
        usual = [name for name in SCALED[model_type] if name in FEEDFORWARD]
        if isinstance(targets, str):
            return config.replace(feedforward_modules=usual)
        meant = [name for name in usual if _named(name, targets)]
        if set(meant) <= set(targets):
            return config.replace(feedforward_modules=meant)
        # the targets are called otherwise, and PEFT reads a list only of their names
        return config.replace(feedforward_modules=rf".*({'|'.join(map(re.escape, meant))})")

    def is_feedforward(self, name: str) -> bool:
        """Whether the module at a path has its input scaled."""
        if isinstance(self.feedforward_modules, str):
            return matches(self.feedforward_modules, name)
        return any(name.endswith(end) for end in self.feedforward_modules or ())

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        return {"ia3_l": (1, n_in) if self.is_feedforward(name) else (n_out, 1)}


def _named(name: str, targets: list[str]) -> bool:
    """Whether this end of a path and one of the targets can be ends of the same path."""
    return any(f".{name}".endswith(f".{target}") or f".{target}".endswith(f".{name}") for target in targets)
