"""LoftQ: a quantized base and a LoRA that starts by correcting its error (Li et al. 2023, arXiv:2310.08659, algorithm 1).

    Q <- quantize(W - s B A)        s B A <- the r largest singular directions of W - Q        (A, B = 0 at first)

in turns, so that Q + s B A is nearer to W than Q alone, the quantized base with LoRA's zero start. The base of the result
is not the plainly quantized one, so it is saved with the adapter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import asarray, one_blas_thread, to_numpy, xp_of
from ..nn.module import Module
from ..quant import Linear4bit, quantize_model
from .config import PeftError
from .lora import LoraConfig
from .model import PeftModel, get_peft_model
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
