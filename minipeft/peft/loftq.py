"""Between an adapter and a quantized base: LoftQ's start, and what quantizing a merge again loses.

**LoftQ** (Li et al. 2023, arXiv:2310.08659, algorithm 1). A quantized base starts with an error, W - Q, that LoRA's
zero start leaves in place. LoftQ lets the adapter begin with the best rank-r correction of it, in turns:

    Q <- quantize(W - s B A)        s B A <- the r largest singular directions of W - Q        (A, B = 0 at first)

so that Q + s B A is nearer to W than Q alone. The base of the result is not the plainly quantized one, so it is saved
with the adapter.

**Merging.** s B A merged into a dequantized weight is exact, and dense. Quantizing the sum again rounds each weight to
its nearest code: an update much smaller than the gaps between the codes is largely rounded away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..autograd.tensor import Tensor, no_grad
from ..backend import Array, asarray, one_blas_thread, to_numpy, xp_of
from ..nn.module import Module
from ..quant import Linear4bit, quantize_model
from .config import PeftError
from .layer import AdaptedLayer
from .lora import LoraConfig
from .model import PeftModel, get_peft_model, independent
from .pissa import PissaLinear
from .variants import check_alpha
from .weights import dense_weight, fill, out_in


def get_loftq_model(
    model: Module, config: LoraConfig, iterations: int = 1, adapter_name: str = "default", seed: int = 0, **options: Any
) -> PeftModel:
    """A LoRA model over a quantized base, both started by LoftQ; `model` stays as it is.

    Args:
        model: the model in floats.
        config: LoRA for linear layers, with its usual start, which is replaced.
        iterations: how many turns; the paper uses 1 to 10 and finds most of the gain in the first.
        options: of `quantize_model`.

    Raises PeftError for another method or start, for a lora_alpha that is not above 0, and for an adapted layer that is
    not quantized (other than those of modules_to_save and trainable_token_indices, which are trained themselves).
    """
    plain = isinstance(config, LoraConfig) and config.init_lora_weights is True
    if not plain or config.use_dora or config.enable_lora:
        raise PeftError("LoftQ starts a plain LoRA: init_lora_weights=True, without use_dora and enable_lora")
    if not isinstance(iterations, int) or iterations < 1:
        raise PeftError(f"iterations must be a positive integer, not {iterations!r}")
    check_alpha(config, "LoftQ starts from (W - Q) / s")
    peft = get_peft_model(quantize_model(model, **options), config, adapter_name, seed)
    for path, layer in peft.layers.items():
        base, adapter = layer.base_layer, layer.adapters[adapter_name]
        if not hasattr(adapter, "factors"):  # of modules_to_save or trainable_token_indices
            continue
        if not isinstance(base, Linear4bit):
            raise PeftError(f"{path}: LoftQ is for quantized layers; this one is a {type(base).__name__}")
        dense = model.get_submodule(path)
        W = to_numpy(out_in(dense, dense_weight(dense))).astype(np.float32)
        r, s = adapter.lora_A.shape[0], np.float32(adapter.scaling)
        update = np.zeros_like(W)
        for _ in range(iterations):
            base = base.quantize(asarray(W - update, xp_of(base.weight.data)))
            error = W - to_numpy(base.dequantize()).astype(np.float32)
            with one_blas_thread():
                A, B = PissaLinear.decompose(error, r, s)
            update = s * (B @ A)
        layer.base_layer = base
        fill(adapter.lora_A, A)
        fill(adapter.lora_B, B)
    peft.mark_start(adapter_name)
    return peft


@dataclass(frozen=True)
class MergeError:
    """How far a merged layer is from the layer with its adapters, over normal inputs x (Frobenius norms).

    dense        ||dense(x) - adapted(x)|| / ||adapted(x)||: float32 rounding
    requantized  ||requantized(x) - adapted(x)|| / ||adapted(x)||
    of_update    ||requantized(x) - adapted(x)|| / ||adapted(x) - base(x)||: above 1, more is lost than was learned
    codes        the share of the packed bytes that the update changed
    """

    dense: float
    requantized: float
    of_update: float
    codes: float


def merge_and_requantize(model: PeftModel, adapter_names: list[str] | None = None) -> tuple[Any, dict[str, MergeError]]:
    """(a plain model whose quantized layers have the adapters merged and are quantized again, {path: error}).

    Each layer is quantized as it was; layers that were not quantized are merged as `merge_and_unload` does. One layer's
    dense weight exists at a time. The error of a dense merge is reported beside that of the one that is made. Raises
    PeftError as `merge_and_unload`.
    """
    names, errors = model._mergeable(adapter_names), {}

    def made(path: str, layer: AdaptedLayer) -> Module:
        merged, base, layer.merged_names = layer.merge(names), layer.base_layer, []
        if not isinstance(base, Linear4bit) or merged is base:
            return merged
        again = base.quantize(out_in(merged, merged.weight.data))
        again.bias = merged.bias
        probe = np.random.default_rng(0).standard_normal((64, base.in_features)).astype(np.float32)
        x = Tensor(asarray(probe, xp_of(base.weight.data)))
        with no_grad():
            adapted = layer.compute(names, x, ()).data
            dense, requantized, plain = (_norm(m(x).data - adapted) for m in (merged, again, base))
        size = _norm(adapted) or 1.0  # an output of zeros is met exactly
        errors[path] = MergeError(
            dense / size,
            requantized / size,
            requantized / plain if plain else math.inf,
            float((again.weight.data != base.weight.data).mean().item()),
        )
        return again

    plain_model = independent(model.replaced(made))
    return plain_model, {path: errors[path] for path in model.layers if path in errors}


def _norm(x: Array) -> float:
    return float(xp_of(x).sqrt((x * x).sum()).item())
