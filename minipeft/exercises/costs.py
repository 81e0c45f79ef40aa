"""The exercises of lessons 12 and 17: counting, and precision."""

from __future__ import annotations

import math
from functools import cache
from itertools import count
from typing import Any

import numpy as np

import minipeft as mp

from ..accounting import Loop, architecture, pytorch_ledger
from ..accounting.activations import block_terms, blocks_of
from ..accounting.parameters import trained_parameters
from ..autograd.autocast import rounded
from .kinds import Code, Number, Word

ALL_LINEAR = mp.LoraConfig(r=8, target_modules="all-linear")

# ----------------------------------------------------------------------------------------------------------- lesson 12


def rank_of(parameters: float, matrices: int) -> int:
    config = architecture("gpt3").config
    return round(parameters / (2 * matrices * config.num_hidden_layers * config.hidden_size))


@cache
def most_sequences(logits: str) -> int:
    """How many sequences of 2,048 tokens fit on 24 GB under QLoRA of Llama-3-8B."""
    loop = Loop(quantization="nf4", logits=logits)
    return next(b for b in count() if pytorch_ledger("llama3-8b", ALL_LINEAR, b + 1, 2048, loop).total > 24e9)


def kept(h: int, k: int, a: int, f: int, r: int) -> float:
    """Bytes a token that a Llama block keeps in PyTorch, by the package's table of what each op keeps."""
    shape = dict(hidden_size=h, num_attention_heads=a, num_key_value_heads=a * k // h, intermediate_size=f)
    model = architecture(mp.TransformerConfig.llama(vocab_size=64, num_hidden_layers=1, **shape))
    block = blocks_of(model, trained_parameters(model, mp.LoraConfig(r=r, target_modules="all-linear")))[-1]
    return sum(term.bytes for term in block_terms(block, 128, autocast=False, adapters=2))


another_slip = Number(
    "Another slip",
    lambda: rank_of(37.7e6, 4),
    lambda right: {
        "that is what is printed, and it trains half of 37.7M": right / 2,
        "that is the rank if only two matrices a layer were adapted": 2 * right,
    },
    within=0,
)
your_gpu = Number(
    "Your GPU",
    lambda: most_sequences("float32"),
    lambda right: {
        "that many sequences do not fit": right + 1,
        "one more fits": right - 1,
        "that is without the logits": most_sequences("fused"),
    },
    within=0,
)
without_logits = Number(
    "What had decided",
    lambda: most_sequences("fused"),
    lambda right: {
        "that many sequences do not fit, by a little": right + 1,
        "one more fits": right - 1,
        "that is with the logits": most_sequences("float32"),
    },
    within=0,
)
all_linear = Code(
    "All linear layers",
    "kept(h, k, a, f, r)",
    kept,
    lambda: {
        "LLaMA-7B, r = 8": (4096, 4096, 32, 11008, 8),
        "LLaMA-7B, r = 64": (4096, 4096, 32, 11008, 64),
        "Llama-3-70B, r = 8": (8192, 1024, 64, 28672, 8),
    },
)

# ----------------------------------------------------------------------------------------------------------- lesson 17


def stochastic(x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + generator.integers(0, 1 << 16, bits.shape, np.uint32)) & 0xFFFF0000).view(np.float32)


def judged(function: Any, x: np.ndarray, holds: Any) -> str:
    """Whether something holds of the numbers x and what they are rounded to: "" where it does."""
    return "" if holds(x, np.asarray(function(x, np.random.default_rng(2)))) else "it is not so"


def within_a_step(x: np.ndarray, y: np.ndarray) -> bool:
    return bool(np.all(np.abs(y - x) < np.ldexp(1.0, np.frexp(np.abs(x))[1] - 8)))


def keeps_the_mean(x: np.ndarray, y: np.ndarray) -> bool:
    """Within five standard errors; a number between two that are 2^-7 apart deviates by half of that at most."""
    return bool(abs(float(y.mean(dtype=float)) - float(x.mean(dtype=float))) < 5 * 2.0**-8 / math.sqrt(x.size))


SAMPLE = np.random.default_rng(1).standard_normal(20_000).astype(np.float32)
random_rounding = Code(
    "Stochastic rounding",
    "stochastic(x, generator)",
    stochastic,
    lambda: {
        "it gives numbers that bfloat16 has": (SAMPLE, lambda x, y: np.array_equal(y, rounded(y, "bfloat16"))),
        "it goes no further than to the next number": (SAMPLE, within_a_step),
        "it leaves numbers that bfloat16 has": (rounded(SAMPLE, "bfloat16"), np.array_equal),
        "40,000 numbers 1.001 have the mean 1.001": (np.full(40_000, 1.001, np.float32), keeps_the_mean),
        "40,000 numbers -1.006 have the mean -1.006": (np.full(40_000, -1.006, np.float32), keeps_the_mean),
    },
    judged,
)
lost_step = Number(
    "The largest step that is lost",
    lambda: math.ldexp(0.5, math.frexp(0.02)[1] - 1 - 7),
    lambda right: {
        "that is the whole last place, or half of it above the next power of two; half of the weight's own rounds": 2 * right,
        "that is float16's": right / 8,
        "that is 2^-9 of the weight, below which every step is lost": 0.02 * 2**-9,
    },
)
highest_scale = Number(
    "How high can a scale be?",
    lambda: math.floor(math.log2(65504 / 0.013)),
    lambda right: {
        "there the largest gradient overflows": right + 1,
        "twice as much still fits": right - 1,
        "the exponent is asked for": 2.0**right,
    },
    within=0,
)


def who_moves() -> str:
    moved = [dtype for dtype in ("bfloat16", "float16") if rounded(np.float32([3 - 0.005]), dtype)[0] != 3]
    return moved[0] if len(moved) == 1 else "both" if moved else "neither"


which_format = Word(
    "Who moves?",
    who_moves,
    ("bfloat16", "float16", "both", "neither"),
    {
        "bfloat16": "bfloat16 has fewer bits of the fraction: its numbers are further apart",
        "both": "next to 3, bfloat16's numbers are 2^-6 apart",
        "neither": "next to 3, float16's numbers are 2^-9 apart",
    },
)

EXERCISES = {
    12: [another_slip, your_gpu, without_logits, all_linear],
    17: [random_rounding, lost_step, highest_scale, which_format],
}
