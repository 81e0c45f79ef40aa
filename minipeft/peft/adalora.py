"""AdaLoRA: adaptive budget allocation (Zhang et al. 2023, arXiv:2303.10512).

    W' = W + s P diag(λ) Q       eq. 3; P is lora_B [out, r], λ lora_E [r, 1], Q lora_A [r, in]; triplet i: P_i λ_i Q_i
    penalty       orth_reg_weight · R,    R = mean over all P and Q of ‖PᵀP - I‖_F, ‖Q Qᵀ - I‖_F                   eq. 4
    number w      I = |w dL/dw|   Ī ← β1 Ī + (1 - β1) I   Ū ← β2 Ū + (1 - β2) |I - Ī|   score = Ī Ū        eq. 8 to 11
    importance    of triplet i: score of λ_i + mean score of P_i + mean score of Q_i                              eq. 7
    budget        how many triplets of the whole model are left at a step                             eq. 12, see `budget`

    backward ─► before_step: add the penalty's gradient ─► clip ─► optimizer ─► after_step: averages, then pruning

Pruning sets the λ of the least important triplets to zero.

Departures from the paper, as in PEFT:
1. s = lora_alpha / (init_r + 1e-5). R is a mean of norms; the paper has a sum of squared norms.
2. I takes w after the step and the clipped gradient, of loss and penalty. The paper takes both before the step.

Departures from PEFT:
1. The penalty is not in the model's loss. Its gradient is added before the step, so any loss can be trained (DPO, PPO).
   Where PEFT adds the penalty, a step is the same. The loss that a run reports has no penalty.
2. init_lora_weights=False: λ has standard deviation 1 and P, Q have 0.02; PEFT gives all three 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, Rng, asarray, read, xp_of
from ..nn.module import Module, Parameter
from ..options import configuration, option
from .config import PeftConfig, PeftError, Shape
from .layer import Adapter, Inner
from .ranks import check_rank
from .targets import QUERY_AND_VALUE
from .weights import fill, with_update

TARGETS = {
    **QUERY_AND_VALUE,
    "roberta": ["query", "key", "value", "dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
MATRICES = ("lora_A", "lora_E", "lora_B")
AVERAGES = ("sensitivity", "uncertainty")


class AdaLoraLinear(Adapter):
    """P diag(λ) Q around a linear layer: lora_B [out, r], lora_E [r, 1], lora_A [r, in]."""

    kept: Array | None = None  # boolean [r]: the triplets that the last pruning kept; None: nothing was pruned

    @property
    def scaling(self) -> float:
        """s."""
        return self.config.lora_alpha / (self.config.init_r + 1e-5)

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        """Draw P and Q; λ stays zero, so training starts at the base layer. init False draws λ, too."""
        for p in (self.lora_A, self.lora_B):
            fill(p, generator.standard_normal(p.shape, np.float32) * np.float32(0.02))
        if self.config.init_lora_weights is False:
            fill(self.lora_E, generator.standard_normal(self.lora_E.shape, np.float32))

    def forward(self, x: Tensor, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """y = inner(x) + s P diag(λ) Q z, z = x, in training with dropout: x [..., in] -> y [..., out]."""
        z = F.dropout(x, self.config.lora_dropout, rng) if self.config.lora_dropout else x
        return F.linear(F.linear(z, self.lora_A * self.lora_E), self.lora_B, inner(x), alpha=self.scaling)

    def merge(self, layer: Module, base: Module) -> Module:
        """W' = W + s P diag(λ) Q."""
        delta = self.lora_B.data @ (self.lora_A.data * self.lora_E.data)
        delta *= self.scaling
        return with_update(layer, delta)

    def saved(self) -> dict[str, Parameter]:
        """The triplets that the last pruning kept; a λ that has grown again since is not saved."""
        if self.kept is None:
            return super().saved()
        kept = asarray(self.kept, xp_of(self.lora_E.data))
        A, E, B = self.lora_A.data[kept], self.lora_E.data[kept], self.lora_B.data[:, kept]
        return {"lora_A": Parameter(A), "lora_E": Parameter(E), "lora_B": Parameter(B)}


def budget(config: AdaLoraConfig, step: int, start: int, end: int) -> tuple[int, bool]:
    """(b: how many triplets may be left after step t; whether to prune now), eq. 12.

        b = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_f - t_i))³    t_i = tinit, t_f = tfinal, T = total_step

    b_0 = start, b_T = end. The paper's eq. 12 also subtracts t_f in the numerator; then b would not start at b_0.
    """
    final = config.total_step - config.tfinal
    if step <= config.tinit:
        return start, False
    if step >= final:
        return end, True
    left_over = 1 - (step - config.tinit) / (final - config.tinit)
    return int((start - end) * left_over**3 + end), step % config.deltaT == 0


class AdaLoraCallback:
    """What AdaLoRA does around every step of the optimizer for one adapter (see `minipeft.train.callbacks`).

    In a loop of one's own:

        loss.backward(); callback.before_step(model, step)  # step from 1
        clip_grad_norm_(...); optimizer.step(); callback.after_step(model, step); optimizer.zero_grad()
    """

    def __init__(self, model: Any, adapter_name: str):
        self.model, self.adapter_name = model, adapter_name
        self.averages: dict[str, Array] = {}  # "<path>.<matrix>.sensitivity" and "<path>.<matrix>.uncertainty"
        self.loaded_pattern = self.config.rank_pattern  # it holds until the first pruning
        self.pruned = self._is_pruned()  # for the last time

    @property
    def config(self) -> AdaLoraConfig:
        """The adapter's present configuration."""
        return self.model.peft_config[self.adapter_name]

    @property
    def layers(self) -> dict[str, AdaLoraLinear]:
        """{path: the adapter's part there}."""
        return {path: part for path, part in self.model.parts(self.adapter_name) if isinstance(part, AdaLoraLinear)}

    def before_step(self, model: Any, step: int) -> None:
        """Add the gradient of the penalty to those of the loss."""
        self.penalty().backward()

    def penalty(self) -> Tensor:
        """The penalty, orth_reg_weight · R (eq. 4): a scalar."""
        norms = []
        for layer in self.layers.values():
            P, Q = layer.lora_B, layer.lora_A
            for gram in (Q @ Q.transpose(), P.transpose() @ P):  # [r, r]
                d = gram - xp_of(gram.data).eye(gram.shape[0], dtype=gram.dtype)
                norms.append(((d * d).sum() + 1e-30).sqrt())  # the square root has an infinite slope at zero
        return F.stack(norms).mean() * self.config.orth_reg_weight

    def after_step(self, model: Any, step: int, record: Any = None) -> None:
        """What happens after step t (from 1), with T = total_step:

            t <= tinit           update the averages
            t <  T - tfinal      update them; every deltaT steps, prune. Until the next pruning λ may grow from zero
            t == T - tfinal      prune for the last time, by the averages of the step before; later, where a loss scale
                                 has skipped that step
            t >  T - tfinal      set the λ that the last pruning dropped to zero again
        """
        config, layers = self.config, self.layers
        final = config.total_step - config.tfinal
        if step < final or not self.averages:  # the first step may be the last pruning; it needs averages, too
            for path, layer in layers.items():
                self.update_averages(path, layer)
        if step <= final or not self.pruned:
            self.pruned, step = step >= final, min(step, final)
            start = sum(layer.lora_A.shape[0] for layer in layers.values())
            count, prune = budget(config, step, start, config.target_r * len(layers))
            if not prune or count >= start:
                return
            importance = {path: self.importance(path) for path in layers}
            xp = xp_of(*importance.values())
            threshold = xp.sort(xp.concatenate(list(importance.values())))[start - count - 1]
            for path, layer in layers.items():
                layer.kept = importance[path] > threshold  # all ties go, so that fewer than `count` may be left
            self._note_pattern()
        for layer in layers.values():
            if layer.kept is not None:
                layer.lora_E.data *= asarray(layer.kept, xp_of(layer.lora_E.data))[:, None]
                layer.lora_E._version += 1

    def update_averages(self, path: str, layer: AdaLoraLinear) -> None:
        """Update Ī, the average sensitivity (eq. 8 and 9), and Ū, its uncertainty (eq. 10), of every number.

        Raises PeftError where the gradients are gone.
        """
        c = self.config
        for name in MATRICES:
            p, keys = getattr(layer, name), [f"{path}.{name}.{what}" for what in AVERAGES]
            if p.grad is None:
                raise PeftError("AdaLoRA needs the gradients: call after_step before zero_grad")
            sensitivity = abs(p.data * p.grad)
            xp, zero = xp_of(sensitivity), xp_of(sensitivity).zeros_like(sensitivity)
            mean, uncertainty = (asarray(self.averages.get(key, zero), xp) for key in keys)
            mean = c.beta1 * mean + (1 - c.beta1) * sensitivity
            uncertainty = c.beta2 * uncertainty + (1 - c.beta2) * abs(sensitivity - mean)
            self.averages |= zip(keys, (mean, uncertainty))

    def importance(self, path: str) -> Array:
        """The importance of each triplet (eq. 7 and 11): [r]."""
        s = self.averages
        A, E, B = (s[f"{path}.{name}.sensitivity"] * s[f"{path}.{name}.uncertainty"] for name in MATRICES)
        return E[:, 0] + A.mean(axis=1) + B.mean(axis=0)

    def state_dict(self) -> dict[str, Array]:
        """The averages, and which triplets pruning has left, by path."""
        kept = {f"{path}.kept": layer.kept for path, layer in self.layers.items() if layer.kept is not None}
        return {**self.averages, **kept}

    def load_state_dict(self, arrays: dict[str, Array]) -> None:
        """Restore what `state_dict` gave. Raises ValueError for arrays of other names or shapes."""
        layers = self.layers.items()
        averaged = {f"{path}.{n}.{what}": getattr(x, n).shape for path, x in layers for n in MATRICES for what in AVERAGES}
        known = averaged | {f"{path}.kept": x.lora_E.shape[:1] for path, x in layers}
        for key, array in arrays.items():
            if array.shape != known.get(key) or (array.dtype == bool) != key.endswith(".kept"):
                raise ValueError(f"AdaLoRA keeps no {key} of shape {array.shape} and {array.dtype}")
        if len(averaged.keys() - arrays.keys()) not in (0, len(averaged)):
            raise ValueError("AdaLoRA keeps the averages of all its numbers, or before the first step of none")
        self.averages = {key: array for key, array in arrays.items() if not key.endswith(".kept")}
        for path, layer in self.layers.items():
            layer.kept = arrays.get(f"{path}.kept")
        self.pruned = self._is_pruned()
        self._note_pattern()

    def _is_pruned(self) -> bool:
        left = [int(layer.kept.sum().item()) for layer in self.layers.values() if layer.kept is not None]
        return bool(left) and sum(left) <= self.config.target_r * len(left)

    def _note_pattern(self) -> None:
        """Give the configuration the kept triplets, unread. Before the first pruning, leave the loaded pattern."""
        kept = {f"{path}.lora_E": layer.kept for path, layer in self.layers.items() if layer.kept is not None}
        config = self.model.peft_config[self.adapter_name] = self.config.replace(rank_pattern=self.loaded_pattern)
        if kept:
            del config.rank_pattern
            config._kept = kept


@configuration
class AdaLoraConfig(PeftConfig):
    """AdaLoRA's options, with PEFT's names and defaults."""

    total_step: int = option(None, "optimizer steps of the whole training; must be given", least=1)
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
    init_lora_weights: bool = option(True, "True: λ starts at zero; False: standard normal (for tests)")
    rank_pattern: dict[str, list[bool]] | None = option(None, "{path.lora_E: which triplets training has left}")

    peft_type, adapter_class = "ADALORA", AdaLoraLinear
    usual_learning_rate = 3e-2
    usual_targets = TARGETS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tinit >= self.total_step - self.tfinal:
            given = f"tinit={self.tinit} and tfinal={self.tfinal}"
            raise PeftError(f"{given} leave none of {self.total_step} steps for pruning; make them smaller")
        if self.target_r > self.init_r:
            raise PeftError(f"target_r must be at most init_r={self.init_r}, got {self.target_r}")

    def __getattr__(self, name: str) -> Any:
        """`rank_pattern` after a pruning, when it is first asked for: to read the triplets is to wait for a device."""
        kept = vars(self).get("_kept")
        if name != "rank_pattern" or kept is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.rank_pattern = {key: [bool(k) for k in array] for key, array in zip(kept, read(*kept.values()))}
        return self.rank_pattern

    def rank(self, name: str) -> int:
        """How many triplets the module at a path has."""
        kept = (self.rank_pattern or {}).get(f"{name}.lora_E")
        return self.init_r if kept is None else sum(kept)

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        r = self.rank(name)
        check_rank(self, name, r, n_out, n_in)
        return {"lora_A": (r, n_in), "lora_E": (r, 1), "lora_B": (n_out, r)}

    def training_callback(self, model: Any, adapter_name: str) -> AdaLoraCallback:
        return AdaLoraCallback(model, adapter_name)

    def training_state_shapes(self, shapes: dict[str, Shape]) -> dict[str, Shape]:
        """The two averages of every number of P, λ and Q, to count memory."""
        followed = {path: shape for path, shape in shapes.items() if path.rpartition(".")[2] in MATRICES}
        return {f"{path}.{what}": shape for path, shape in followed.items() for what in AVERAGES}


del AdaLoraConfig.rank_pattern  # the default, which would be found before `__getattr__`
