"""The exercises of lesson 18: LoRA questioned."""

from __future__ import annotations

from typing import Any

import numpy as np

import minipeft as mp

from ..accounting import count_parameters
from .foundations import normal
from .kinds import Code, Number


def trained(r: int, *targets: str) -> int:
    """Parameters of LoRA on these matrices of LLaMA-7B."""
    return count_parameters("llama-7b", mp.LoraConfig(r=r, target_modules=list(targets))).trainable


budget = Number(
    "A budget",
    lambda: 8 * trained(8, "q_proj", "v_proj") / trained(8, "q_proj"),
    lambda right: {
        "that has half as many parameters": 8,
        "the rank of one matrix is asked for, not of four": 32,
        "fewer matrices leave room for a higher rank": 4,
    },
    within=0,
)


def dora(W: Any, A: Any, B: Any, m: Any, alpha: float) -> Any:
    V = W + alpha / len(A) * B @ A
    return m[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)


magnitudes = Code(
    "DoRA's weight",
    "dora(W, A, B, m, alpha)",
    dora,
    lambda: {
        "a start with B of zeros": (normal(5, 6), normal(2, 6), np.zeros((5, 2)), normal(5) ** 2, 16),
        "r = 2, alpha = 1": (normal(5, 6), normal(2, 6), normal(5, 2), normal(5) ** 2, 1),
        "a square matrix, r = 1": (normal(4, 4), normal(1, 4), normal(4, 1), normal(4) ** 2, 1),
    },
)


def update(function: Any, A: Any, B: Any, A0: Any, B0: Any) -> Any:
    """The product of the factors that a function gives."""
    plain_A, plain_B = function(A, B, A0, B0)
    return np.asarray(plain_B) @ np.asarray(plain_A)


side_by_side = Code(
    "As plain LoRA",
    "as_lora(A, B, A0, B0)",
    lambda A, B, A0, B0: (np.concatenate([A, A0]), np.concatenate([B, -B0], axis=1)),
    lambda: {
        "r = 2": (normal(2, 6), normal(5, 2), normal(2, 6, seed=1), normal(5, 2, seed=1)),
        "r = 1": (normal(1, 4), normal(3, 1), normal(1, 4, seed=1), normal(3, 1, seed=1)),
        "nothing trained yet": (normal(2, 6), normal(5, 2), normal(2, 6), normal(5, 2)),
    },
    update,
)
carried = Number(
    "Carried over",
    lambda: 64 * mp.LoraConfig(r=64, lora_alpha=16, use_rslora=True).scaling(""),
    lambda right: {
        "that is the factor alpha / sqrt(r), which LoRA has to reach by alpha / r": 2,
        "that is the alpha of rsLoRA": 16,
        "that multiplies by r, and not by its root": 16 * 64,
    },
)

EXERCISES = {18: [budget, magnitudes, side_by_side, carried]}
