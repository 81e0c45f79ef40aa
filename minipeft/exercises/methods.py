"""The exercises of lessons 4 to 7: LoRA, adapters, soft prompts, QLoRA."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np

import minipeft as mp

from ..accounting import count_parameters
from ..quant.codebooks import nf4_code
from .foundations import normal
from .kinds import Code, Number

# ------------------------------------------------------------------------------------------------------------ lesson 4

count_lora = Number(
    "Count it",
    lambda: count_parameters("llama-7b", mp.LoraConfig(r=16, target_modules=["q_proj", "v_proj"])).trainable,
    lambda right: {
        "that is half of the right number: did you count A and B, of query and of value?": right / 2,
        "that is for one layer": right / 32,
        "that is all four matrices of attention": 2 * right,
        "that is what full fine-tuning of these matrices trains": 32 * 2 * 4096 * 4096,
    },
    within=0,
)
layer = Code(
    "The layer",
    "lora(x, W, A, B, alpha)",
    lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * (x @ A.T) @ B.T,
    lambda: {
        "r = 2, alpha = 2": (normal(3, 6), normal(5, 6), normal(2, 6), normal(5, 2), 2),
        "r = 4, alpha = 2": (normal(3, 6), normal(5, 6), normal(4, 6), normal(5, 4), 2),
        "r = 1, alpha = 16": (normal(1, 8), normal(8, 8), normal(1, 8), normal(8, 1), 16),
        "B of zeros": (normal(3, 6), normal(5, 6), normal(2, 6), np.zeros((5, 2)), 16),
    },
)


def lora_gradients(G: np.ndarray, A: np.ndarray, B: np.ndarray, alpha: float) -> tuple[Any, Any]:
    """By the engine: the gradients of A and B of a loss whose gradient by W is G."""
    A, B = (mp.Tensor(part, requires_grad=True) for part in (A, B))
    (B @ A * (alpha / len(A.data))).backward(G)
    return A.grad, B.grad


two_gradients = Code(
    "Two gradients",
    "lora_gradients(G, A, B, alpha)",
    lora_gradients,
    lambda: {
        "r = 2, alpha = 2": (normal(5, 6), normal(2, 6), normal(5, 2), 2),
        "r = 4, alpha = 2": (normal(5, 6), normal(4, 6), normal(5, 4), 2),
        "a square matrix, r = alpha = 3": (normal(3, 3, seed=1), normal(3, 3, seed=2), normal(3, 3, seed=3), 3),
    },
)
alpha_for_64 = Number(
    "The same first step",
    lambda: 16,
    lambda right: {
        "that keeps alpha / r, and the first step grows with r": 128,
        "that is alpha / r": 2,
    },
    within=0,
)

# ------------------------------------------------------------------------------------------------------------ lesson 5


def matching_bottleneck() -> float:
    config = mp.load_base()[0].config
    lora = count_parameters(config, mp.LoraConfig(r=8, target_modules="all-linear")).trainable
    return lora / config.num_hidden_layers / (2 * 2 * config.hidden_size)


bottleneck = Number(
    "Which costs the same?",
    matching_bottleneck,
    lambda right: {
        "a Houlsby pair is two adapters a layer": 2 * right,
        "an adapter has two matrices, and a pair has four": 4 * right,
        "that is for all six layers together": 6 * right,
    },
    within=0,
)
adapter = Code(
    "Down, bend, up",
    "adapter(h, down, b_down, up, b_up)",
    lambda h, down, b_down, up, b_up: h + np.maximum(h @ down.T + b_down, 0) @ up.T + b_up,
    lambda: {
        "a start as nothing": (normal(3, 6), normal(2, 6), normal(2), np.zeros((6, 2)), np.zeros(6)),
        "random matrices": (normal(3, 6), normal(2, 6), normal(2), normal(6, 2), normal(6)),
        "everything negative before the bend": (normal(1, 4), normal(2, 4), np.full(2, -99.0), normal(4, 2), normal(4)),
    },
)


def outputs_of_merged(function: Any, W: Any, b: Any, down: Any, b_down: Any, up: Any, b_up: Any) -> Any:
    """What a layer with the merged weight and bias computes of some inputs."""
    weight, bias = function(W, b, down, b_down, up, b_up)
    return normal(4, W.shape[1], seed=9) @ np.asarray(weight).T + bias


def merge(W: Any, b: Any, down: Any, b_down: Any, up: Any, b_up: Any) -> tuple[Any, Any]:
    around = np.eye(len(W)) + up @ down
    return around @ W, around @ b + up @ b_down + b_up


straight = Code(
    "Without the bend",
    "merge(W, b, down, b_down, up, b_up)",
    merge,
    lambda: {
        "a start as nothing": (normal(6, 5), normal(6), normal(2, 6), normal(2), np.zeros((6, 2)), np.zeros(6)),
        "no biases": (normal(6, 5), np.zeros(6), normal(2, 6), np.zeros(2), normal(6, 2), np.zeros(6)),
        "with all biases": (normal(6, 5), normal(6), normal(2, 6), normal(2), normal(6, 2), normal(6, seed=1)),
    },
    outputs_of_merged,
)

# ------------------------------------------------------------------------------------------------------------ lesson 6

prefix = Number(
    "A prefix of a larger model",
    lambda: count_parameters("llama3-8b", mp.PrefixTuningConfig(num_virtual_tokens=20)).trainable,
    lambda right: {
        "only as many heads as have keys: 8 of 32": 4 * right,
        "a virtual token has a key and a value": right / 2,
        "that is for one layer": right / 32,
        "that is a prompt, not a prefix": 20 * 4096,
    },
    within=0,
)
positions = Code(
    "Positions",
    "position_ids(mask, p)",
    lambda mask, p: np.where(mask, p + np.cumsum(mask, axis=1) - 1, 0),
    lambda: {
        "no padding": (np.ones((1, 4), int), 3),
        "two rows, one padded on the left": (np.array([[1, 1, 1, 1], [0, 0, 1, 1]]), 20),
        "no virtual token": (np.array([[0, 1, 1], [1, 1, 1]]), 0),
    },
    lambda function, mask, p: np.where(mask, function(mask, p), 0),  # padding may have any
)
zeros = Number(
    "A prefix of zeros",
    lambda: 60 / 80,
    lambda right: {
        "that is the share that the prefix takes": 20 / 80,
        "the weights are spread over 80 positions": 1 - 20 / 60,
        "the virtual tokens take weight away: it shrinks": 80 / 60,
        "their values are zero, but not their weights": 1,
    },
)

# ------------------------------------------------------------------------------------------------------------ lesson 7


def bits_of_small_blocks() -> float:
    weights = normal(2 * 32 * 256)
    _, state = mp.quant.quantize_4bit(weights.astype(np.float32), blocksize=32, compress_statistics=True)
    return 4 + (8 * state.absmax.size + 32 * state.state2.absmax.size) / weights.size


bits = Number(
    "Bits of small blocks",
    bits_of_small_blocks,
    lambda right: {
        "that is without double quantization": 4 + 32 / 32,
        "the scales of the scales take bits, too": 4 + 8 / 32,
        "that is for blocks of 64": 4 + 8 / 64 + 32 / (64 * 256),
        "that is what the scales take; the codes take four bits": right - 4,
    },
    within=2e-4,
)


def round_trip(w: np.ndarray, points: np.ndarray, blocksize: int) -> np.ndarray:
    blocks = w.reshape(-1, blocksize)
    m = np.abs(blocks).max(axis=1, keepdims=True)
    scaled = blocks / np.where(m == 0, 1, m)
    return (m * points[np.abs(scaled[:, :, None] - points).argmin(axis=2)]).reshape(w.shape)


there_and_back = Code(
    "There and back",
    "round_trip(w, points, blocksize)",
    round_trip,
    lambda: {
        "one block": (normal(64), nf4_code(), 64),
        "blocks of different sizes of weights": (normal(4, 32) * [[1], [10], [0.1], [3]], nf4_code(), 32),
        "points that are evenly spaced": (normal(96), np.linspace(-1, 1, 15), 32),
        "a block of zeros": (np.concatenate([normal(16), np.zeros(16)]), nf4_code(), 16),
    },
)


def normal_float(bits: int) -> np.ndarray:
    p, quantile, half = 0.9677083, NormalDist().inv_cdf, 2 ** (bits - 1)
    up = [quantile(0.5 + (p - 0.5) * i / half) for i in range(1, half + 1)]
    down = [-quantile(0.5 + (p - 0.5) * i / (half - 1)) for i in range(half)]
    return np.sort([*down, *up]) / max(up)


fewer_bits = Code(
    "Three bits",
    "normal_float(bits)",
    normal_float,
    lambda: {"four bits": (4,), "three bits": (3,), "two bits": (2,)},
    lambda function, bits: np.sort(np.ravel(function(bits))),
)

EXERCISES = {
    4: [count_lora, layer, two_gradients, alpha_for_64],
    5: [bottleneck, adapter, straight],
    6: [prefix, positions, zeros],
    7: [bits, there_and_back, fewer_bits],
}
