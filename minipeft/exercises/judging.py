"""The exercises of lessons 13 to 16: a real model, fair comparisons, forgetting, choosing a method."""

from __future__ import annotations

import math

import numpy as np

import minipeft as mp

from ..accounting import architecture, count_parameters, memory_ledger
from ..experiments.seeds import interval
from .foundations import normal
from .kinds import Code, Number, Word

# ----------------------------------------------------------------------------------------------------------- lesson 13

another_format = Number(
    "Another format",
    lambda: (256 * 6 + 16 * 8 + 16) / 256,
    lambda right: {
        "that is without the sixteen scales of 8 bits": 6 + 16 / 256,
        "that is without the scale of the scales": 6 + 8 / 16,
        "a scale of 8 bits serves 16 weights": 6 + 8 + 16 / 256,
        "that is only the code; scales take room, too": 6,
    },
)
read_block = Code(
    "Read a block",
    "read_block(d, m, data)",
    lambda d, m, data: d * np.concatenate([data % 16, data // 16]).astype(float) + m,
    lambda: {
        "one byte is not 0": (0.5, -3.0, np.eye(1, 16, 3, dtype=np.uint8)[0] * np.uint8(0x2F)),
        "bytes 0 to 15": (0.25, 1.0, np.arange(16, dtype=np.uint8)),
        "random bytes": (0.05, -0.4, np.random.default_rng(0).integers(0, 256, 16).astype(np.uint8)),
    },
)
reorder = Code(
    "Put the rows in order",
    "reorder(w, heads)",
    lambda w, heads: np.concatenate([part[i::2] for part in np.split(w, heads) for i in (0, 1)]),
    lambda: {
        "one head of width 4": (np.arange(8.0).reshape(4, 2), 1),
        "three heads of width 8": (normal(24, 5), 3),
        "two heads of width 2, which stay": (normal(4, 3), 2),
    },
)
smaller_embedding = Number(
    "The embedding, too",
    lambda: (106_168_320 * 4.127 / 8 + 28_346_688 * 2) / 1e6,
    lambda right: {
        "that is with the others in float32": (106_168_320 * 4.127 / 8 + 28_346_688 * 4) / 1e6,
        "a byte has eight bits": (106_168_320 * 4.127 + 28_346_688 * 16) / 1e6,
        "that is what the others take alone": 28_346_688 * 2 / 1e6,
        "a MB is 10^6 bytes here": (106_168_320 * 4.127 / 8 + 28_346_688 * 2) / 2**20,
    },
)

# ----------------------------------------------------------------------------------------------------------- lesson 14

DIFFERENCES = (0.03, 0.01, 0.05)
half_width = Number(
    "Three differences",
    lambda: interval(np.array(DIFFERENCES))[1],
    lambda right: {
        "divide by the root of the number of seeds: a mean scatters less than one value": right * math.sqrt(3),
        "a sum of squares over n - 1 = 2, not over 3": right * math.sqrt(2 / 3),
        "1.96 is for a deviation that is known; for three values Student's t is 4.303": right * 1.96 / 4.303,
        "that is the standard error; times t": right / 4.303,
    },
)
agree_by_chance = Number(
    "Five seeds agree",
    lambda: 2 * 0.5**5,
    lambda right: {
        "they can agree on either sign": right / 2,
        "that is for three seeds": 0.25,
        "that is the chance that they do not agree": 1 - right,
    },
)
paired = Code(
    "Seed by seed",
    "clear(a, b)",
    lambda a, b: bool(interval(a - b)[0] + interval(a - b)[1] < 0),
    lambda: {
        "every seed gains": (np.array([2.0, 2.5, 3.0]) - [0.1, 0.08, 0.06], np.array([2.0, 2.5, 3.0])),
        "the seeds disagree": (np.array([2.0, 2.5, 3.0]), np.array([2.1, 2.4, 3.3])),
        "the signs agree, by chance": (np.array([2.0, 2.5, 3.0]) - [0.05, 0.02, 0.035], np.array([2.0, 2.5, 3.0])),
        "a is clearly higher": (np.array([2.1, 2.6, 3.1]), np.array([2.0, 2.51, 2.99])),
        "ten seeds": (normal(10) + np.linspace(-0.45, 0.05, 10), normal(10)),
    },
)
parts = Number(
    "Parts of a batch",
    lambda: (10 * 1.0 + 30 * 3.0) / 40,
    lambda right: {
        "that is the mean of the means: each token of the short part would count three times as much": 2.0,
        "that is their sum": 4.0,
        "divide by the number of tokens": 100,
    },
)

# ----------------------------------------------------------------------------------------------------------- lesson 15

decayed = Number(
    "How strong is 0.1?",
    lambda: 1 - (1 - 1e-3 * 0.1) ** 40,
    lambda right: {
        "that is the share that is left; how much is gone?": 1 - right,
        "that is of one step": 1e-4,
        "the rate belongs to it: a step multiplies by 1 - rate x decay": 1 - 0.9**40,
        "a share is asked for: divide by 100": 100 * right,
    },
    within=0.01,
)
halfway = Number(
    "A quarter of the way",
    lambda: 0.25**2 * 0.8,
    lambda right: {
        "that is a straight line's; a parabola has the square of the way": 0.2,
        "a factor of 1/2 stands in the last value, too": right / 2,
    },
)
frontier = Code(
    "The frontier",
    "frontier(points)",
    lambda points: np.array([not any((q <= p).all() and (q < p).any() for q in points) for p in points]),
    lambda: {
        "one beats another at both": (np.array([[2.0, 0.2], [2.1, 0.3], [2.2, 0.1]]),),
        "equal at one": (np.array([[2.0, 0.3], [2.0, 0.2], [2.5, 0.2]]),),
        "two are the same": (np.array([[1.0, 1.0], [1.0, 1.0], [2.0, 0.5]]),),
        "thirty points": (normal(30, 2),),
    },
)
leash = Code(
    "A leash",
    "leashed(g, w, start, alpha)",
    lambda g, w, start, alpha: g + alpha * (w - start),
    lambda: {
        "no gradient of the task": (np.zeros(3), np.array([1.0, 2.0, -4.0]), np.array([1.0, 1.0, 1.0]), 2.0),
        "at the start": (normal(4), normal(4, seed=1), normal(4, seed=1), 10.0),
        "a matrix": (normal(2, 3), normal(2, 3, seed=1), normal(2, 3, seed=2), 0.3),
    },
)

# ----------------------------------------------------------------------------------------------------------- lesson 16


def disk(tasks: int) -> float:
    """GB of `tasks` models: LLaMA-7B in 16 bits once, and an adapter of LoRA, r = 8 on all linear layers, for each."""
    stored = count_parameters("llama-7b", mp.LoraConfig(r=8, target_modules="all-linear")).stored
    return 2 * (architecture("llama-7b").size + tasks * stored) / 1e9


hundred_tasks = Number(
    "A hundred tasks",
    lambda: disk(100),
    lambda right: {
        "that is a hundred whole models, as full fine-tuning stores": 200 * architecture("llama-7b").size / 1e9,
        "that is with numbers of four bytes": 2 * right,
        "the base is stored, too, once": right - disk(0),
        "that is with a single adapter": disk(1),
    },
)


def what_doubles() -> str:
    """The largest of what a step holds that is twice as large with a batch twice as large."""
    small, large = (memory_ledger("llama-7b", None, batch, 128).held for batch in (1, 2))
    return max((line for line in small if large[line] > 1.9 * small[line]), key=large.__getitem__)


which_scarce = Word(
    "What grows with the batch?",
    what_doubles,
    ("weights", "states", "activations", "disk"),
    {
        "weights": "the weights are there once, whatever the batch",
        "states": "the optimizer has its moments a parameter, whatever the batch",
        "disk": "nothing of a batch is saved",
    },
)


lora_flops = Number(
    "LoRA's step",
    lambda: 4 / 6,
    lambda right: {
        "forward alone is that; the gradients of the inputs remain, too": 1 / 3,
        "the gradients of the frozen weights are left out": 1.0,
        "that is with checkpointing, forward once more in both": 6 / 8,
    },
    within=0.02,
)
decide = Code(
    "Let the table decide",
    "decide(cost, learned, least)",
    lambda cost, learned, least: int(min((c, i) for i, (c, share) in enumerate(zip(cost, learned)) if share >= least)[1]),
    lambda: {
        "the cheapest learns enough": (np.array([3.0, 1.0, 2.0]), np.array([1.0, 0.95, 0.97]), 0.9),
        "the cheapest learns too little": (np.array([3.0, 1.0, 2.0]), np.array([1.0, 0.5, 0.97]), 0.9),
        "one as cheap learns too little": (np.array([1.0, 1.0]), np.array([0.5, 1.0]), 0.9),
        "only the dearest will do": (np.array([3.0, 1.0, 2.0]), np.array([1.0, 0.5, 0.6]), 0.9),
        "exactly enough is enough": (np.array([5.0, 4.0]), np.array([1.0, 0.75]), 0.75),
    },
)

EXERCISES = {
    13: [another_format, read_block, reorder, smaller_embedding],
    14: [half_width, agree_by_chance, paired, parts],
    15: [decayed, halfway, leash, frontier],
    16: [hundred_tasks, which_scarce, lora_flops, decide],
}
