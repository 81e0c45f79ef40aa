"""LoRA+: two learning rates for the two factors of LoRA's update B A (Hayou et al. 2024, arXiv:2402.12354).

    θ_A ← θ_A - η · Adam(g_A),        θ_B ← θ_B - λ η · Adam(g_B)        λ = `loraplus_lr_ratio`, 16 in the paper

A step of Adam moves every number by about its rate. A layer's output sums the numbers of A [r, n] over the width n of
the layer, and those of B [n, r] over the rank r alone: for both to change the output by as much, B's rate must be the
larger one, by the order of n. With λ = 1 a wide layer learns with one of the two.
"""

from __future__ import annotations

from typing import Any

from ..nn.module import Module, Parameter


def loraplus_groups(
    model: Module, lr: float, loraplus_lr_ratio: float, *, loraplus_lr_embedding: float = 1e-6, weight_decay: float = 0
) -> list[dict[str, Any]]:
    """An optimizer's groups of the model's trainable parameters, each with its "lr" and "weight_decay".

        optimizer = mp.optim.AdamW(mp.optim.loraplus_groups(model, lr=1e-3, loraplus_lr_ratio=16))

    lora_B and parameters with one axis (biases, norms, magnitudes) learn at lr * loraplus_lr_ratio, the factors of an
    embedding at `loraplus_lr_embedding`, the rest (lora_A, whole layers that are trained beside it) at lr. A schedule
    multiplies the rate of every group. As PEFT's `create_loraplus_optimizer`, with two departures: 1. All parameters
    with one axis are exempt from weight decay; there Llama's norms and DoRA's magnitudes are not. 2. There is no group
    without parameters.

    Raises ValueError for a model that trains no lora_B.
    """
    fast = lr * loraplus_lr_ratio
    rates = {"A": lr, "embedding": loraplus_lr_embedding, "B": fast, "one axis": fast}
    groups: dict[str, list[tuple[str, Parameter]]] = {kind: [] for kind in rates}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "embedding" if "lora_embedding_" in name else "one axis" if p.ndim == 1 else "A"
            groups["B" if kind == "A" and "lora_B" in name else kind].append((name, p))
    if not groups["B"]:
        raise ValueError("loraplus_lr_ratio is a rate for lora_B, and no lora_B of this model is trained: leave it out")
    return [
        {"params": pairs, "lr": rates[kind], "weight_decay": 0.0 if kind == "one axis" else weight_decay}
        for kind, pairs in groups.items()
        if pairs
    ]
