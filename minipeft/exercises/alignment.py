"""The exercises of lessons 8 to 11 and 20: instruction tuning, reward models, PPO, reward hacking, DPO."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Any

import numpy as np

import minipeft as mp

from .. import rlhf
from ..rlhf.ppo import clipped_objective
from .foundations import normal
from .kinds import Code, Number

# ------------------------------------------------------------------------------------------------------------ lesson 8


def packed_mask(lengths: list[int]) -> np.ndarray:
    record = np.repeat(np.arange(len(lengths)), lengths)
    return np.tril(record[:, None] == record)


mask = Code(
    "A packed row",
    "packed_mask(lengths)",
    packed_mask,
    lambda: {"one record": ([3],), "two records": ([2, 3],), "three, one of a single token": ([4, 1, 2],)},
)
COUNTS, MEANS = (2, 3, 11), (3.0, 2.0, 1.0)
of_tokens = Number(
    "Which mean?",
    lambda: float(np.average(MEANS, weights=COUNTS)),
    lambda right: {
        "that is the mean of the means, in which a token of a short answer counts for more": np.mean(MEANS),
        "that is the sum over all tokens, not their mean": np.dot(MEANS, COUNTS),
        "divide by the number of tokens, not of answers": np.dot(MEANS, COUNTS) / 3,
    },
)
boundary = Code(
    "Where the answer begins",
    "answer_begins(prompt, whole)",
    lambda prompt, whole: next(i for i, (a, b) in enumerate(zip_longest(prompt, whole)) if a != b),
    lambda: {
        "the prompt's tokens stay": ([5, 6, 7], [5, 6, 7, 8, 9]),
        "the prompt's last token joins the answer": ([5, 6, 7], [5, 6, 20, 9]),
        "two of the prompt's tokens become one": ([5, 6, 7, 8], [5, 6, 21]),
        "tokens of the answer equal some of the prompt": ([5, 6, 7], [5, 6, 5, 7, 9]),
    },
)

# ------------------------------------------------------------------------------------------------------------ lesson 9

times_fewer = Number(
    "Each text once",
    lambda: 9 * 8 / 2 * 2 / 9,
    lambda right: {
        "a pair has two texts": right / 2,
        "that is how many pairs a ranking holds": 36,
        "that is how many texts the pairs of one ranking take": 72,
    },
    within=0,
)
pair_loss = Code(
    "The loss of pairs",
    "reward_loss(chosen, rejected)",
    lambda chosen, rejected: rlhf.reward_loss(chosen, rejected).item(),
    lambda: {
        "one pair": (np.array([1.0]), np.array([0.3])),
        "five pairs": (normal(5), normal(5, seed=1)),
        "rewards a thousand apart": (np.array([1000.0, 0]), np.array([0.0, 1000])),
    },
)
AGREES = 1 / (1 + math.exp(-1))  # 0.3 against 0.2 at T = 0.1
upside_down = Number(
    "A careless rater",
    lambda: 0.75 * AGREES + 0.25 * (1 - AGREES),
    lambda right: {
        "that is a rater who never holds the scale upside down": AGREES,
        "who holds it upside down still prefers one of the two, sometimes the happier": 0.75 * AGREES,
        "that is how often it prefers the other": 1 - right,
        "the noise of a rater depends on the difference of the scores, over T": 0.75,
    },
)
honesty = Code(
    "How honest?",
    "calibration_error(predicted, observed, count)",
    lambda predicted, observed, count: float(np.average(abs(predicted - observed), weights=count)),
    lambda: {
        "one group": (np.array([0.75]), np.array([0.5]), np.array([10])),
        "groups of one size": (np.array([0.2, 0.8]), np.array([0.3, 0.6]), np.array([5, 5])),
        "groups of different sizes": (np.array([0.2, 0.5, 0.8]), np.array([0.3, 0.5, 0.6]), np.array([1, 30, 5])),
    },
)

# ----------------------------------------------------------------------------------------------------------- lesson 10


def advantages(rewards: Any, values: Any, gamma: float, lam: float) -> np.ndarray:
    rewards, values = np.asarray(rewards, float)[None], np.asarray(values, float)[None]
    return rlhf.gae(rewards, values, gamma, lam, np.ones_like(rewards))[0][0]


REWARDS, GUESSES = (0, 0, 1), (0.5, 0.5, 0.5)
by_hand = Number(
    "Three tokens",
    lambda: advantages(REWARDS, GUESSES, 1, 0.5),
    lambda right: {
        "that is with lambda = 1": advantages(REWARDS, GUESSES, 1, 1),
        "that is with lambda = 0": advantages(REWARDS, GUESSES, 1, 0),
        "those are the returns": right + 0.5,
        "walk from the last token back to the first": right[::-1],
        "after the last token nothing is still to come: its V is 0": [0.25, 0.5, 1],
    },
)
gae = Code(
    "Advantages",
    "gae(rewards, values, gamma, lam)",
    advantages,
    lambda: {
        "one token": (np.array([1.0]), np.array([0.25]), 1.0, 0.95),
        "lam = 0": (normal(4), normal(4, seed=1), 1.0, 0.0),
        "lam = 1": (normal(4), normal(4, seed=1), 1.0, 1.0),
        "six tokens, gamma = 0.9, lam = 0.95": (normal(6), normal(6, seed=1), 0.9, 0.95),
    },
)
clip = Code(
    "The clip",
    "clipped_loss(ratio, A, eps)",
    lambda ratio, A, eps: clipped_objective(mp.Tensor(ratio), A, eps).data,
    lambda: {
        "near 1": (np.array([0.9, 1.0, 1.1]), np.array([1.0, -2, 3]), 0.2),
        "better than expected": (np.array([0.5, 1.5]), np.array([2.0, 2]), 0.2),
        "worse than expected": (np.array([0.5, 1.5]), np.array([-2.0, -2]), 0.2),
        "eps = 0.1": (np.array([0.85, 1.15]), np.array([-1.0, 1]), 0.1),
    },
)
others = Number(
    "One success in four",
    lambda: rlhf.rloo_advantages(np.array([0.0, 0, 0, 1]), 4)[0],
    lambda right: {
        "an answer is compared with the others, without itself": -1 / 4,
        "it did worse than the others": -right,
        "that is GRPO's advantage, in standard deviations": rlhf.grpo_advantages(np.array([0.0, 0, 0, 1]), 4)[0],
    },
)

two_answers = Number(
    "Two answers",
    lambda: 0.8 * (1 - 0.8),
    lambda right: {
        "subtract the expected reward, 0.8, from the reward of 1": 0.8,
        "that is what one draw of the first answer pushes; it is drawn in 0.8 of all": 1 - 0.8,
        "raising the logit of the better answer raises the expected reward": -right,
    },
)

# ----------------------------------------------------------------------------------------------------------- lesson 11

TURN = math.exp(1.5 / 0.5 - 1)  # the distance d at which the gold turns
turn = Number(
    "Where the gold turns",
    lambda: TURN**2,
    lambda right: {
        "that is the distance d; the KL is its square": TURN,
        "that is the root of the distance": math.sqrt(TURN),
        "differentiate d (a - b log d): there is a term - b, too": math.exp(1.5 / 0.5) ** 2,
        "that is the gold there, without what the base has": TURN * (1.5 - 0.5 * math.log(TURN)),
    },
)
bigrams = Code(
    "A witness",
    "distinct_2(responses)",
    rlhf.distinct_n,
    lambda: {
        "one answer without repetition": ([[1, 2, 3, 4]],),
        "great great great": ([[7, 7, 7, 7]],),
        "two answers that share a bigram": ([[1, 2, 3], [5, 1, 2]],),
        "answers of one token, and of none": ([[1], [], [2, 3, 2, 3]],),
        "no bigram": ([[1], []],),
    },
)
price = Number(
    "What a long way costs",
    lambda: 0.2 * 66,
    lambda right: {
        "the price is of the KL, not of its root": 0.2 * math.sqrt(66),
        "beta is a price: multiply": 66 / 0.2,
        "that is the price at beta = 0.05": 0.05 * 66,
        "what it pays, the proxy must bring: a positive number": -right,
    },
)

# ----------------------------------------------------------------------------------------------------------- lesson 20

TILTED = 0.25 * math.exp(1 / 0.5)
best_policy = Number(
    "The best policy",
    lambda: TILTED / (0.75 + TILTED),
    lambda right: {
        "divide by the sum of both weights": TILTED,
        "the exponent is r / beta": 0.25 * math.exp(0.5) / (0.75 + 0.25 * math.exp(0.5)),
        "the reference's probabilities are weights, too": math.exp(2) / (1 + math.exp(2)),
        "that is the first answer": 1 - right,
    },
)
margin = Number(
    "A margin",
    lambda: math.log1p(math.exp(-0.3)),
    lambda right: {
        "that is the margin; the loss is -log sigmoid of it": 0.3,
        "take the reference's log-probabilities off": math.log1p(math.exp(-0.8)),
        "both have fallen, the rejected answer further: the margin is above 0": math.log1p(math.exp(0.3)),
        "beta multiplies the difference": math.log1p(math.exp(-3)),
        "log is the natural logarithm": math.log10(1 + math.exp(-0.3)),
    },
)
direct = Code(
    "DPO",
    "dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)",
    lambda *given: rlhf.dpo_loss(mp.Tensor(given[0]), mp.Tensor(given[1]), *given[2:]).item(),
    lambda: {
        "one pair": (np.array([-12.0]), np.array([-20.0]), np.array([-10.0]), np.array([-15.0]), 0.1),
        "five pairs, beta = 0.5": (*(normal(5, seed=seed) for seed in range(4)), 0.5),
        "log-probabilities far apart": (np.array([-9000.0]), np.array([-10.0]), np.array([-50.0]), np.array([-50.0]), 1.0),
    },
)
who_falls = Number(
    "Who falls?",
    lambda: 1 - (0 + 1 + 0.2) / 3,
    lambda right: {
        "that is the mean feature; the chosen answer's is 1": 0.4,
        "that is with the feature 3": 1 - 4 / 3,
    },
)

EXERCISES = {
    8: [mask, of_tokens, boundary],
    9: [times_fewer, pair_loss, upside_down, honesty],
    10: [by_hand, gae, clip, others, two_answers],
    11: [turn, bigrams, price],
    20: [best_policy, margin, direct, who_falls],
}
