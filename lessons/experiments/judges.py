"""What is measured of Lesson 9's judges: reward models that learned from a number of a rater's rankings.

All are measured on the same answers to the same held-out prompts, so that a difference between two kinds of judges has an
interval over both prompts and seeds. A seed has its own prompts, answers, labels and head to learn with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from minipeft import rlhf
from minipeft.experiments.rows import Row
from minipeft.experiments.seeds import interval
from minipeft.experiments.shipped import base

from .drawing import one_plot
from .policies import LENGTH, K, stops

I, J = np.triu_indices(K, 1)  # the pairs of K answers
BINS = np.arange(-6, 6.25, 0.25)  # of rewards


@dataclass(frozen=True)
class Run:
    """A reward model from a number of rankings, of a rater who reverses a share of them; 0 rankings: an untrained head."""

    rankings: int
    flip: float = 0.0
    seed: int = 0
    learning_rate: float = 2e-3
    batch_size: int = 8  # rankings


Kind = tuple[int, float, int]  # rankings, the share turned round, and rankings of a batch
UNTRAINED, FEWEST, FEW, CLEAN, NOISY = (0, 0.0, 8), (100, 0.0, 8), (500, 0.0, 8), (2000, 0.0, 8), (2000, 0.25, 8)
MANY_NOISY, BY_1_2F, BY_VARIANCE = (6000, 0.25, 8), (1500, 0.0, 8), (730, 0.0, 8)  # and as many clean ones as it is worth by two rules
NOISY_STEPS, VARIANCE_STEPS = (6000, 0.25, 32), (730, 0.0, 4)  # in 188 steps, as many as BY_1_2F, and in 183
KINDS = UNTRAINED, FEWEST, FEW, BY_VARIANCE, BY_1_2F, CLEAN, NOISY, MANY_NOISY, NOISY_STEPS, VARIANCE_STEPS
RUNS = [Run(n, flip, seed, batch_size=batch_size) for seed in range(5) for n, flip, batch_size in KINDS]


def in_order(rewards: np.ndarray, gold: np.ndarray, gap: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(pairs that the rewards order as the gold does, pairs) of each prompt [n]: those whose gold differs by more than `gap`."""
    better, guess = gold[:, I] - gold[:, J], rewards[:, I] - rewards[:, J]
    counted = abs(better) > gap
    return ((better * guess > 0) & counted).sum(axis=1), counted.sum(axis=1)


def accuracy(rewards: np.ndarray, gold: np.ndarray, gap: float = 0.0) -> float:
    """In how many pairs, whose gold scores differ by more than `gap`, the model prefers the better one."""
    right, pairs = in_order(rewards, gold, gap)
    return float(right.sum() / pairs.sum())


def labels_of(rewards: np.ndarray, gold: np.ndarray, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """(rewards of the preferred, of the other) for a rater's fresh labels of all pairs."""
    rng = np.random.default_rng([run.seed, 1])
    both = np.stack([gold[:, I].ravel(), gold[:, J].ravel()], axis=1)
    first = rlhf.rank(both, rng, temperature=0.1, flip=run.flip)[:, 0] == 0
    a, b = rewards[:, I].ravel(), rewards[:, J].ravel()
    return np.where(first, a, b), np.where(first, b, a)


def prefers_longer(answers: list[Any], score: np.ndarray) -> float:
    """In how many pairs of two lengths and two scores the longer answer has the higher score."""
    size = np.array([[len(a) for a in own] for own in answers])
    same_way = (size[:, I] - size[:, J]) * (score[:, I] - score[:, J])
    return float((same_way > 0).sum() / (same_way != 0).sum())


@cache
def real_and_nonsense(prompt: tuple[int, ...], seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """256 answers of the base to a prompt, and every token ten times after it: texts with the prompt."""
    model, tokenizer = base()
    real = rlhf.sample_answers(model, [list(prompt)], 256, LENGTH, stop_token_ids=stops(), seed=30_000 + seed)[0]
    nonsense = [np.array([*prompt, *[token] * 10]) for token in range(2, tokenizer.vocab_size)]
    return [np.array([*prompt, *a]) for a in real], nonsense


def measured(model: rlhf.RewardModel, rewards: np.ndarray, run: Run, prompts: list[Any], answers: list[Any], gold: np.ndarray) -> Row:
    """What the sweep writes down of a judge and its rewards of the held-out answers, as `RewardModel.loss` sees them.

    right, pairs    of each prompt, as `in_order`
    calibration     rows of `calibration_curve`, of fresh labels
    longer          `prefers_longer`

    and of the untrained heads and those of 2,000 clean rankings, of one prompt, another for each seed:

    above           how many of the tokens, ten times each, are above nine in ten real answers, whose reward is `bar`
    best, token     the highest reward [of a real answer, of a token], and which token that is
    histograms      of the rewards of both, by BINS
    """
    right, pairs = in_order(rewards, gold)
    chosen, rejected = labels_of(rewards, gold, run)
    row = {
        "accuracy": round(accuracy(rewards, gold), 4),
        "accuracy_clear": round(accuracy(rewards, gold, 0.3), 4),
        "agreement": round(rlhf.reward_accuracy(chosen, rejected), 4),
        "longer": round(prefers_longer(answers, rewards), 4),
        "calibration": [[round(float(v), 4) for v in row] for row in zip(*rlhf.calibration_curve(chosen, rejected))],
        "right": right.tolist(), "pairs": pairs.tolist(),
    }  # fmt: skip
    if (run.rankings, run.flip, run.batch_size) not in (UNTRAINED, CLEAN):
        return row
    real, nonsense = (model.score_texts(texts) for texts in real_and_nonsense(tuple(prompts[run.seed]), run.seed))
    bar = float(np.quantile(real, 0.9))
    return row | {
        "above": int((nonsense > bar).sum()), "bar": round(bar, 3),
        "best": [round(float(real.max()), 3), round(float(nonsense.max()), 3)], "token": int(nonsense.argmax()) + 2,
        "histograms": [np.histogram(np.clip(values, BINS[0], BINS[-1]), BINS)[0].tolist() for values in (real, nonsense)],
    }  # fmt: skip


def by_kind(rows: list[Row]) -> dict[Kind, list[Row]]:
    """{one of KINDS: its rows, by seed}; all must be there."""
    of = {kind: [r for r in rows if (r["rankings"], r["flip"], r["batch_size"]) == kind] for kind in KINDS}
    kinds = {kind: sorted(those, key=lambda row: row["seed"]) for kind, those in of.items()}
    seeds = {run.seed for run in RUNS}
    assert all([row["seed"] for row in of] == sorted(seeds) for of in kinds.values()), "a row of each kind and seed, see --full"
    return kinds


def right(of: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """(pairs that each judge orders as the gold does [seeds, prompts], pairs [prompts]), where a prompt has any that is not tied."""
    pairs = np.array(of[0]["pairs"])
    assert all(row["pairs"] == of[0]["pairs"] for row in of), "all judges are measured on the same answers"
    return np.array([row["right"] for row in of])[:, pairs > 0], pairs[pairs > 0]


def sureness(of: list[Row]) -> np.ndarray:
    """[seeds], how far what each judge says is from 0.5, the mean over the pairs."""
    return np.array([np.average(abs(said - 0.5), weights=n) for said, _, n in (np.array(row["calibration"]).T for row in of)])


def by_tenths(of: list[Row]) -> tuple[list[float], dict[int, Any], Any]:
    """([what judges say, in how many pairs it is so] between 0.7 and 0.8, {tenth from 0.5 on: by how much it is more often
    so than they say, over the seeds}, that over all pairs)."""
    bins = {k: np.array([bin for row in of for bin in row["calibration"] if int(10 * bin[0]) == k]) for k in range(5, 10)}
    halves = [np.array([bin for bin in row["calibration"] if bin[0] > 0.5]) for row in of]
    overall = interval([np.average(half[:, 1] - half[:, 0], weights=half[:, 2]) for half in halves])
    off = {k: interval(each[:, 1] - each[:, 0]) for k, each in bins.items()}
    return [np.average(bins[7][:, k], weights=bins[7][:, 2]) for k in (0, 1)], off, overall


def labels_picture(kinds: dict[Kind, list[Row]]) -> Any:
    """Accuracy over rankings, by the share of labels that are turned round, a dot a seed."""
    figure, axis = one_plot()
    for flip, color in ((0.0, "C0"), (0.25, "C3")):
        found = {n: [row["accuracy"] for row in kinds[n, turned, b]] for n, turned, b in KINDS if n and (turned, b) == (flip, 8)}
        means = [np.mean(values) for values in found.values()]
        axis.plot([*found], means, "o-", color=color, label=f"labels turned round: {flip:.0%}")
        for n, values in found.items():
            axis.plot([n] * len(values), values, ".", color=color, alpha=0.5)
    axis.axhline(0.5, color="grey", linestyle="--", linewidth=1)
    axis.set(
        xscale="log", xlabel=f"rankings of {K} (each {len(I)} pairs)", ylabel="held-out accuracy against the gold",
        title=f"What labels are worth ({len(kinds[CLEAN])} seeds)",
    )  # fmt: skip
    axis.set_xticks([100, 500, 2000, 6000], ["100", "500", "2000", "6000"])
    axis.minorticks_off()
    axis.legend(frameon=False)
    return figure


def calibration_picture(curves: dict[str, Any]) -> Any:
    """What judges say, and how often it is so {judge: (said, was, pairs)}."""
    figure, axis = one_plot()
    axis.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    for (name, (said, was, count)), color in zip(curves.items(), ("C0", "C2")):
        axis.scatter(said, was, s=10 + 120 * count / count.max(), color=color, label=name)
    axis.set(
        title="Is it honest? (area of a dot: pairs, each from both sides)", xlabel="predicted preference", ylabel="observed",
        xlim=(0, 1), ylim=(0, 1),
    )  # fmt: skip
    axis.legend(frameon=False)
    return figure


def nonsense_picture(row: Row) -> Any:
    """Rewards of real answers and of tokens said ten times, by a judge's row."""
    figure, axis = one_plot()
    for counts, name in zip(row["histograms"], ("the base's answers", "one token, ten times")):
        axis.stairs(np.array(counts) / sum(counts) / np.diff(BINS), BINS, fill=True, alpha=0.6, label=name)
    axis.axvline(row["bar"], color="grey", linestyle="--", linewidth=1, label="nine in ten answers")
    axis.set(title="2,000 rankings, on texts never compared", xlabel="reward (mean 0, deviation 1 in training)", xlim=(-3, 6))
    axis.legend(frameon=False)
    return figure
