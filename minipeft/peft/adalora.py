"""AdaLoRA: adaptive budget allocation (Zhang et al. 2023, arXiv:2303.10512).

    W' = W + s P diag(λ) Q        eq. 3; here P is lora_B [out, r], λ is lora_E [r, 1], Q is lora_A [r, in]

P and Q are kept near orthogonal by a penalty on the loss (eq. 4), so that λ_i measures how much the triplet
i = (P_i, λ_i, Q_i) matters. While training, `update_and_allocate` follows how sensitive the loss is to every number,
and sets the λ of the least important triplets of the whole model to zero, following a falling budget (eq. 12).

As PEFT has it: s = lora_alpha / (init_r + 1e-5); the penalty is the mean Frobenius norm, not its square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, Rng, asarray, xp_of
from ..nn.module import Module, Parameter
from ..options import configuration, option
from .config import QUERY_AND_VALUE, PeftConfig, PeftError, Seed, Shape, kind_of, shape_of
from .layer import Adapter, dense_weight, fill, out_in, with_weight

MATRICES = ("lora_A", "lora_E", "lora_B")


@configuration
class AdaLoraConfig(PeftConfig):
    """AdaLoRA's options, with PEFT's names and defaults."""

    total_step: int = option(None, "steps of the whole training, over which the budget is spent; must be given", least=1)
    target_r: int = option(8, "average rank at the end", least=1)
    init_r: int = option(12, "every rank at the start", least=1)
    tinit: int = option(0, "steps at the start without pruning", least=0)
    tfinal: int = option(0, "steps at the end without further pruning", least=0)
    deltaT: int = option(1, "steps between two prunings", least=1)
    beta1: float = option(0.85, "decay of the average of sensitivity", above=0, below=1)
    beta2: float = option(0.85, "decay of the average of its uncertainty", above=0, below=1)
    orth_reg_weight: float = option(0.5, "weight of the orthogonality penalty", least=0)
    lora_alpha: float = option(8, "numerator of the scaling")
    lora_dropout: float = option(0.0, "probability of dropping an element of the adapter's input", least=0, below=1)
    init_lora_weights: bool = option(
        True, "True (P and Q random, λ zero), or False (λ random too: not the base at the start; for tests)"
    )
    rank_pattern: dict[str, list[bool]] | None = option(
        None, "which triplets are left, by path: the result of training"
    )

    peft_type: ClassVar[str] = "ADALORA"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    usual_targets: ClassVar[dict[str, list[str]]] = {
        **QUERY_AND_VALUE,
        "roberta": ["query", "key", "value", "dense"],
        "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
        "t5": ["q", "k", "v", "o", "wi", "wo"],
        "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    }
    ignored: ClassVar[frozenset[str]] = frozenset({"r", "fan_in_fan_out"})
    averages: ClassVar[int] = 2  # of sensitivity, and of its uncertainty

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tinit >= self.total_step - self.tfinal:
            raise PeftError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of {self.total_step} steps for pruning; "
                "make them smaller"
            )
        if self.target_r > self.init_r:
            raise PeftError(f"target_r must be at most init_r={self.init_r}, got {self.target_r}")

    def rank(self, name: str) -> int:
        """How many triplets the module at a path has."""
        kept = (self.rank_pattern or {}).get(f"{name}.lora_E")
        return self.init_r if kept is None else sum(kept)

    def parameter_shapes(self, name: str, kind: str, shape: Shape) -> dict[str, Shape]:
        if kind not in self.kinds or not self.targets(name, kind):
            return {}
        n_out, n_in = shape if kind == "linear" else shape[::-1]
        r = self.rank(name)
        if r > min(n_in, n_out):
            raise PeftError(f"{name}: a rank of {r} is larger than the matrix [{n_out}, {n_in}]")
        return {"lora_A": (r, n_in), "lora_E": (r, 1), "lora_B": (n_out, r)}

    def adapters(self, layers: dict[str, Module], seeds: dict[str, Seed]) -> dict[str, Adapter]:
        return {
            name: AdaLoraLayer(self, self.parameter_shapes(name, kind_of(layer), shape_of(layer)), layer, seeds[name])
            for name, layer in layers.items()
        }

    def penalty(self, adapters: list[Any]) -> Tensor:
        """orth_reg_weight * mean over all P and Q of ||PᵀP - I||, ||Q Qᵀ - I||."""
        norms = []
        for a in adapters:
            if not isinstance(a, AdaLoraLayer):
                continue
            for gram in (a.lora_A @ a.lora_A.transpose(), a.lora_B.transpose() @ a.lora_B):
                d = gram - xp_of(gram.data).eye(gram.shape[0], dtype=gram.dtype)
                norms.append(((d * d).sum() + 1e-30).sqrt())  # the square root has no slope at zero
        return F.stack(norms).mean() * self.orth_reg_weight

    def after_step(self, model: Any, adapter_name: str, step: int) -> None:
        """See `allocate`."""
        allocate(model, adapter_name, step)

    def training_state(self, model: Any, adapter_name: str) -> dict[str, Array]:
        """The averages, and which triplets pruning has left, by path."""
        layers = _layers(model, adapter_name)
        return {f"{path}.{key}": array for path, layer in layers for key, array in layer.averages().items()}

    def load_training_state(self, model: Any, adapter_name: str, arrays: dict[str, Array]) -> None:
        for path, layer in _layers(model, adapter_name):
            layer.importance = {
                name: (arrays[f"{path}.{name}.sensitivity"], arrays[f"{path}.{name}.uncertainty"])
                for name in MATRICES
                if f"{path}.{name}.sensitivity" in arrays
            }
            layer.kept = arrays.get(f"{path}.kept")
        _note_pattern(model, adapter_name)


class AdaLoraLayer(Adapter):
    """P diag(λ) Q around a linear layer: lora_B [out, r], lora_E [r, 1], lora_A [r, in]."""

    def __init__(self, config: AdaLoraConfig, shapes: dict[str, Shape], layer: Module, seed: Seed):
        super().__init__(shapes, layer, seed)
        self.scaling, self.dropout = config.lora_alpha / (config.init_r + 1e-5), config.lora_dropout
        self.pattern = config.rank_pattern  # of an adapter that was pruned before
        self.kept: Array | None = None  # boolean [r]: the triplets that pruning left
        self.importance: dict[str, tuple[Array, Array]] = {}  # name -> averages of sensitivity and uncertainty
        if seed is not None:
            generator = np.random.default_rng(seed)
            for p in (self.lora_A, self.lora_B):
                fill(p, generator.standard_normal(p.shape, np.float32) * np.float32(0.02))
            if config.init_lora_weights is False:
                fill(self.lora_E, generator.standard_normal(self.lora_E.shape, np.float32))

    def forward(self, x: Tensor, inner: Callable[[Any], Tensor], base: Module, rng: Rng | None) -> Tensor:
        """x [..., in] -> [..., out]."""
        z = F.dropout(x, self.dropout, rng) if rng is not None and self.dropout else x
        return inner(x) + F.linear(F.linear(z, self.lora_A * self.lora_E) * self.scaling, self.lora_B)

    def merge(self, layer: Module, base: Module) -> Module:
        """W' = W + s P diag(λ) Q."""
        delta = self.lora_B.data @ (self.lora_A.data * self.lora_E.data)
        delta *= self.scaling
        return with_weight(layer, out_in(layer, out_in(layer, dense_weight(layer)) + delta))

    def saved(self) -> dict[str, Parameter]:
        if self.kept is None:
            return super().saved()
        kept = self._beside(self.kept)
        A, E, B = self.lora_A.data[kept], self.lora_E.data[kept], self.lora_B.data[:, kept]
        return {"lora_A": Parameter(A), "lora_E": Parameter(E), "lora_B": Parameter(B)}

    def _beside(self, array: Array) -> Array:
        """An array that is kept beside the parameters, on their device: `to` moves parameters alone."""
        return asarray(array, xp_of(self.lora_E.data))

    def averages(self) -> dict[str, Array]:
        """What `follow` and pruning have left, by name."""
        found = {} if self.kept is None else {"kept": self.kept}
        for name, pair in self.importance.items():
            found |= {f"{name}.{what}": array for what, array in zip(("sensitivity", "uncertainty"), pair)}
        return found

    def follow(self, beta1: float, beta2: float) -> None:
        """Update the averages of sensitivity |w dL/dw| (eq. 8 and 9) and of its uncertainty (eq. 10)."""
        if any(getattr(self, name).grad is None for name in MATRICES):
            raise PeftError("AdaLoRA follows the gradients: call update_and_allocate after backward, before zero_grad")
        for name in MATRICES:
            p = getattr(self, name)
            sensitivity = abs(p.data * p.grad)
            zero = xp_of(sensitivity).zeros_like(sensitivity)
            mean, uncertainty = map(self._beside, self.importance.get(name, (zero, zero)))
            mean = beta1 * mean + (1 - beta1) * sensitivity
            self.importance[name] = mean, beta2 * uncertainty + (1 - beta2) * abs(sensitivity - mean)

    def scores(self) -> Array:
        """The importance of each triplet [r]: that of λ_i and the means of those of P_i and Q_i (eq. 7, 11)."""
        s = {name: mean * uncertainty for name, (mean, uncertainty) in self.importance.items()}
        return s["lora_E"][:, 0] + s["lora_A"].mean(axis=1) + s["lora_B"].mean(axis=0)


def budget(config: AdaLoraConfig, step: int, start: int, end: int) -> tuple[int, bool]:
    """(how many triplets may be left after this step, whether to prune now): eq. 12."""
    final = config.total_step - config.tfinal
    if step <= config.tinit:
        return start, False
    if step >= final:
        return end, True
    left = 1 - (step - config.tinit) / (final - config.tinit)
    return int((start - end) * left**3 + end), step % config.deltaT == 0


def allocate(model: Any, adapter_name: str, step: int) -> None:
    """After the optimizer's step number `step` (from 1), with the gradients still there: follow, and prune."""
    config, layers = model.peft_config[adapter_name], _layers(model, adapter_name)
    final = config.total_step - config.tfinal
    if step < final or step == 1:
        for _, layer in layers:
            layer.follow(config.beta1, config.beta2)
    if step <= final:
        start = sum(layer.lora_A.shape[0] for _, layer in layers)
        left, prune = budget(config, step, start, config.target_r * len(layers))
        if not prune or left >= start:
            return
        scores = [layer.scores() for _, layer in layers]
        xp = xp_of(scores[0])
        threshold = xp.sort(xp.concatenate(scores))[start - left - 1]
        for (_, layer), s in zip(layers, scores):
            layer.kept = s > threshold
        _note_pattern(model, adapter_name)
    for _, layer in layers:
        if layer.kept is not None:
            layer.lora_E.data *= layer._beside(layer.kept)[:, None]


def _layers(model: Any, adapter_name: str) -> list[tuple[str, AdaLoraLayer]]:
    return [(path, part) for path, part in model.parts(adapter_name) if isinstance(part, AdaLoraLayer)]


def _note_pattern(model: Any, adapter_name: str) -> None:
    """Write down in the configuration which triplets are left: all that there were, before the first pruning."""
    layers = _layers(model, adapter_name)
    pattern = layers[0][1].pattern
    if layers[0][1].kept is not None:
        pattern = {f"{path}.lora_E": [bool(k) for k in layer.kept.tolist()] for path, layer in layers}
    model.peft_config[adapter_name] = model.peft_config[adapter_name].replace(rank_pattern=pattern)
