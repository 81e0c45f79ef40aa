"""What learning from pairs does to the answers themselves, as an experiment: DPO, ORPO, and fine-tuning on the chosen ones.

The pairs are those of `policies`. Measured is log π(y) - log π_ref(y), in nats an answer, of four answers of the base to
each held-out prompt, which the rater has ordered: of the best, of the two in the middle, which are in no pair, and of the
worst. In the mean over the base's answers it is -KL(π_ref ‖ π), so below 0 for every policy that is not the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

import minipeft as mp
from minipeft import rlhf
from minipeft.experiments.rows import Row
from minipeft.experiments.shipped import base
from minipeft.rlhf.dpo import completion_logprobs

from .drawing import one_plot
from .policies import HELD_OUT, LENGTH, K, Run, ordered, show, stops, unseen
from .policies import learn as by_method


@dataclass(frozen=True)
class Learning:
    """A loss of pairs, "dpo" or "orpo"; or "chosen": the likelihood of the chosen answers alone."""

    loss: str
    seed: int = 0
    rankings: int = 1000
    beta: float = 0.05
    learning_rate: float = 3e-4
    held_out: int = HELD_OUT  # prompts, the first of `unseen`


@cache
def held_out(n: int) -> list[Any]:
    """n pairs of best and worst, then n of the two in the middle: four answers to each of n held-out prompts."""
    prompts = unseen()[:n]
    answers = rlhf.sample_answers(base()[0], prompts, K, LENGTH, stop_token_ids=stops(), seed=20_000)
    scores = np.array([rlhf.vader([show(a) for a in own]) for own in answers])
    order = rlhf.rank(scores, np.random.default_rng(20_000), temperature=0.1)
    return [pair for part in (order, order[:, 1:3]) for pair in rlhf.preference_pairs(prompts, answers, part)]


@cache
def before(n: int) -> np.ndarray:
    """log π_ref of `held_out`, [2 n, 2]."""
    return completion_logprobs(base()[0], held_out(n))


def moved(policy: Any, n: int) -> dict[str, np.ndarray]:
    """{"chosen", "middle", "rejected": log π - log π_ref [n]} of held-out answers."""
    change = completion_logprobs(policy, held_out(n)) - before(n)
    return {"chosen": change[:n, 0], "middle": change[n:].mean(axis=1), "rejected": change[:n, 1]}


def learn(run: Learning) -> tuple[Any, list[dict[str, Any]]]:
    """(policy, history) after one pass over the pairs."""
    if run.loss == "dpo":
        return by_method(Run("DPO", run.seed, rankings=run.rankings, beta=run.beta, learning_rate=run.learning_rate))
    pairs, policy = rlhf.preference_pairs(*ordered(run.rankings, run.seed)), base()[0].copy()
    args = mp.TrainingArguments(
        learning_rate=run.learning_rate, num_train_epochs=1, per_device_train_batch_size=16, warmup_ratio=0.1, seed=run.seed,
        progress=False,
    )  # fmt: skip
    if run.loss == "chosen":
        return policy, mp.Trainer(policy, [pair[0] for pair in pairs], args=args).train().history
    return policy, rlhf.dpo_trainer(policy, pairs, args=args, loss_type=run.loss, beta=run.beta).train().history


def measure(run: Learning) -> Row:
    """What the sweep writes down: `moved`, and of DPO's steps the same of their pairs, which it has not seen before."""
    policy, history = learn(run)
    steps = {}
    if run.loss == "dpo":
        steps = {f"step_{name}": [round(r[f"rewards/{name}"] / run.beta, 3) for r in history] for name in ("chosen", "rejected")}
    return steps | {name: values.round(2).tolist() for name, values in moved(policy, run.held_out).items()}


RUNS = [
    Learning(loss, seed, beta=beta) for seed in range(6) for loss, beta in (("dpo", 0.05), ("chosen", 0.0), ("orpo", 0.1))
]


# ----------------------------------------------------------------------------------------------------------- pictures

COLORS = {"rejected": "C3", "chosen": "C0", "middle": "C7", "never compared": "C7"}
SIZE = 6.4, 4.2


def answers_picture(path: np.ndarray) -> Any:
    """The probabilities of three answers over the steps, [steps, 3]."""
    figure, axis = one_plot(SIZE)
    for i, name in enumerate(("rejected", "chosen", "never compared")):
        axis.plot(path[:, i], color=COLORS[name], label=name)
    axis.set(title="Three answers, one weight", xlabel="step", ylabel="probability")
    axis.legend(frameon=False)
    return figure


def steps_picture(rows: list[Row], width: int = 8) -> Any:
    """What the pairs of DPO's steps have become before their step, means of `width` steps, a line a seed."""
    figure, axis = one_plot(SIZE)
    for name in ("rejected", "chosen"):
        for i, row in enumerate(row for row in rows if row["loss"] == "dpo"):
            mean = np.convolve(row[f"step_{name}"], np.ones(width) / width, "valid")
            axis.plot(np.arange(width, width + len(mean)), mean, color=COLORS[name], linewidth=1.3, label=None if i else name)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(title=f"DPO, pairs of its steps (a line a seed, means of {width} steps)", xlabel="step", ylabel="log π − log π_ref, nats an answer")
    axis.legend(frameon=False)
    return figure


def held_out_picture(table: dict[tuple[str, str], Any]) -> Any:
    """What held-out answers have become {(loss, answer): estimate}."""
    figure, axis = one_plot(SIZE)
    losses = {"dpo": "DPO", "chosen": "the chosen\nalone", "orpo": "ORPO"}
    for i, (name, label) in enumerate((("chosen", "best"), ("middle", "middle two"), ("rejected", "worst"))):
        e = [table[loss, name] for loss in losses]
        y = np.arange(len(losses)) + 0.2 * (i - 1)
        axis.errorbar([x.value for x in e], y, xerr=[x.high - x.value for x in e], fmt="o", color=COLORS[name], label=label)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(losses)), list(losses.values()))
    axis.invert_yaxis()
    axis.set(title="Held-out answers of the base", xlabel="log π − log π_ref, nats an answer")
    axis.legend(frameon=False)
    return figure


def push_picture(differences: np.ndarray, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> Any:
    """How hard losses push a pair, by its difference {loss: (values, pushes)}, each by its own largest push."""
    figure, axis = one_plot(SIZE)
    for (name, (_, push)), color in zip(curves.items(), ("C0", "C1")):
        axis.plot(differences, push / abs(push).max(), color=color, label=name)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.axvline(5, color="grey", linestyle="--", linewidth=0.8)
    axis.set(title="Push on a pair (β = 0.1; dashed: IPO's goal)", xlabel="Δ_w − Δ_l, nats", ylabel="push, of its largest")
    axis.legend(frameon=False)
    return figure
