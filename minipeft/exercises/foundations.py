"""The exercises of lessons 0 to 3: foundations, derivatives, the transformer, full fine-tuning."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import minipeft as mp

from ..accounting import architecture
from ..accounting.memory import kv_cache_bytes
from .kinds import Code, Number

F = mp.functional


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Normally distributed numbers, the same at every call."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


# ------------------------------------------------------------------------------------------------------------ lesson 0

choices = Number(
    "Read a loss",
    lambda: math.exp(2.5),
    lambda right: {
        "that is with 2 for a base; nats take e": 2**2.5,
        "that is with 10 for a base; nats take e": 10**2.5,
        "that is the probability of the right token; how many equally likely tokens have it each?": 1 / right,
    },
)
bits_a_byte = Number(
    "Bits a byte",
    lambda: 3.2 / math.log(2) / 4,
    lambda right: {
        "that is in nats a byte": 3.2 / 4,
        "that is in bits a token": 4 * right,
        "a token of four bytes has its loss once, and not four times": 16 * right,
        "to turn nats into bits, divide by ln 2": 3.2 * math.log(2) / 4,
    },
)
stable = Code(
    "Softmax that does not overflow",
    "log_softmax(z)",
    lambda z: F.log_softmax(mp.Tensor(z)).data,
    lambda: {
        "three numbers": (np.array([1.0, 2, 3]),),
        "two rows": (normal(2, 5),),
        "logits about 1000": (np.array([1000.0, 999, 998]),),
        "rows a thousand apart": (np.array([[1000.0, 999], [0, 1]]),),
        "one is far below": (np.array([0.0, -2000]),),
    },
)


def sgd_nesterov(w: np.ndarray, gradients: np.ndarray, lr: float, mu: float) -> np.ndarray:
    weights = mp.nn.Parameter(w.copy())
    optimizer = mp.optim.SGD([weights], lr=lr, momentum=mu, nesterov=True)
    for g in gradients:
        weights.grad = g.copy()
        optimizer.step()
    return weights.data


look_ahead = Code(
    "Look ahead",
    "nesterov(w, gradients, lr, mu)",
    sgd_nesterov,
    lambda: {
        "one step": (np.ones(2), np.array([[1.0, -2.0]]), 0.1, 0.9),
        "five steps": (normal(3), normal(5, 3), 0.05, 0.9),
        "half of the momentum": (normal(3), normal(4, 3), 0.1, 0.5),
    },
)

# ------------------------------------------------------------------------------------------------------------ lesson 1


def value_and_pullback(function: Any, x: np.ndarray, g: np.ndarray) -> tuple[Any, Any]:
    """Of a definition `x -> (value, pullback)`, or of the op that is made from it."""
    value, pullback = getattr(function, "definition", function)(x)
    return value, pullback(g)


swish = Code(
    "A gate",
    "swish(x)",
    F.silu.definition,  # type: ignore[attr-defined]
    lambda: {
        "six numbers": (normal(6), normal(6, seed=1)),
        "a matrix": (normal(3, 4), normal(3, 4, seed=1)),
        "numbers far from zero": (np.array([-30.0, -5, 0, 5, 30]), np.array([1.0, 2, 3, 4, 5])),
    },
    value_and_pullback,
)
running_sum = Code(
    "A running sum",
    "cumsum_pullback(g)",
    lambda g: g[::-1].cumsum()[::-1],
    lambda: {"a cotangent of ones": (np.ones(4),), "a random cotangent": (normal(6),), "one number": (np.array([2.0]),)},
)
ROW = 256 * 512 * 4 / 2**20  # MiB of one activation in section 4
checkpointed = Number(
    "Time for memory",
    lambda: 7 * ROW,
    lambda right: {
        "the first layer's input is there anyway, and was not counted in section 4": 8 * ROW,
        "that is what is held without checkpointing": 15 * ROW,
    },
    within=0.02,  # as section 4 measures
)
one_sided = Number(
    "One side",
    lambda: 1 / 2,
    lambda right: {
        "that is of the central difference, whose Taylor term shrinks like the square of h": 1 / 3,
        "that is the power of the central difference's error": 2 / 3,
        "that is far too small a step: rounding alone would be as large as the derivative": 1,
    },
)

# ------------------------------------------------------------------------------------------------------------ lesson 2


def share_of(part: str) -> float:
    """Of GPT-2's parameters, those with this part of a name."""
    gpt2 = architecture("gpt2")
    return sum(math.prod(shape) for name, shape in gpt2.items() if part in name) / gpt2.size


attention_share = Number(
    "Where the parameters are",
    lambda: share_of(".attn."),
    lambda right: {
        "that is the share of the MLPs": share_of(".mlp."),
        "that is the share of the token table": share_of("wte"),
        "that is without the output matrix": share_of("attn.c_attn"),
        "that is without the query, key and value matrices": share_of("attn.c_proj"),
        "a share of the whole is asked for, between 0 and 1": 100 * right,
    },
)
cache_size = Number(
    "The cache of a larger model",
    lambda: kv_cache_bytes(architecture("llama3-8b").config, 1, 8192, 2) / 2**30,
    lambda right: {
        "a position leaves a key and a value": right / 2,
        "eight heads have keys, and each serves four that ask": 4 * right,
        "a number in 16 bits has two bytes": 2 * right,
        "that is in GB; a GiB has 2^30 bytes": right * 2**30 / 1e9,
        "that is for one layer": right / 32,
    },
)
causal = Code(
    "The mask",
    "attention_weights(scores)",
    lambda scores: F.softmax(mp.Tensor(np.where(np.tril(np.ones(scores.shape, bool)), scores, -np.inf))).data,
    lambda: {
        "three positions with equal scores": (np.zeros((3, 3)),),
        "six positions": (normal(6, 6),),
        "scores about 1000": (1000 + normal(4, 4),),
        "rows a thousand apart": (np.array([[0.0, 0], [1000, 1000]]),),
        "a high score that is masked": (np.array([[0.0, 1000], [0, 0]]),),
    },
)

# ------------------------------------------------------------------------------------------------------------ lesson 3

SMOLLM2 = 134_515_008  # parameters
checkpoint_file = Number(
    "A run that can go on",
    lambda: 12 * SMOLLM2 / 1e9,
    lambda right: {
        "gradients are made anew in every step, and need not be saved": 16 * SMOLLM2 / 1e9,
        "Adam's two moments belong to it": 4 * SMOLLM2 / 1e9,
        "Adam has two moments": 8 * SMOLLM2 / 1e9,
    },
)
accumulate = Code(
    "Parts of a batch",
    "accumulate(gradients, counts)",
    lambda gradients, counts: np.average(gradients, axis=0, weights=counts),
    lambda: {
        "two parts of one size": (normal(2, 3), np.array([5, 5])),
        "four parts of different sizes": (normal(4, 3), np.array([2, 9, 4, 30])),
        "a part without a label": (normal(3, 5), np.array([0, 4, 2])),
    },
)
labels = Code(
    "What is learned",
    "labels_of(ids, prompt_length)",
    lambda ids, prompt_length: np.where(np.arange(len(ids)) < prompt_length, -100, ids),
    lambda: {
        "a prompt of three tokens": (np.array([5, 9, 7, 3, 8, 1]), 3),
        "no prompt": (np.array([4, 6, 1]), 0),
        "nothing but a prompt": (np.array([4, 6]), 2),
    },
)
guessing = Number(
    "Who knows nothing",
    lambda: math.log(mp.load_base()[0].config.vocab_size),
    lambda right: {
        "that is in bits; nats take the natural logarithm": right / math.log(2),
        "that is with the logarithm to base 10": right / math.log(10),
        "a loss is minus the logarithm of a probability": -right,
        "that is a probability, and not yet a loss": math.exp(-right),
    },
)

EXERCISES = {
    0: [choices, bits_a_byte, stable, look_ahead],
    1: [swish, running_sum, checkpointed, one_sided],
    2: [attention_share, cache_size, causal],
    3: [checkpoint_file, accumulate, labels, guessing],
}
