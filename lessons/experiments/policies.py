"""Policies that learn a rater's taste, each by one method, as experiments: PPO, RLOO, GRPO and DPO from one base.

    rater    follows VADER, with noise, and orders four answers of the base to each of a number of openings of sentences
    judge    a reward model that learned from these orders; PPO, RLOO and GRPO optimize it
    pairs    the best and the worst of each four: what DPO learns from
    gold     VADER itself, which is only watched
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

import minipeft as mp
from minipeft import rlhf
from minipeft.autograd.tensor import no_grad
from minipeft.experiments.rows import Row
from minipeft.experiments.shipped import base

LENGTH, K = 20, 4  # tokens of an answer, at most; answers that are ordered
SAMPLING = {
    "PPO": (rlhf.PPOTrainer, rlhf.PPOConfig), "RLOO": (rlhf.RLOOTrainer, rlhf.GroupConfig),
    "GRPO": (rlhf.GRPOTrainer, rlhf.GroupConfig),
}  # fmt: skip
METHODS = ("base", *SAMPLING, "DPO")


@cache
def stops() -> tuple[int, ...]:
    """An answer ends with its sentence."""
    return (base()[1].eos_token_id, *(base()[1].token_to_id(mark) for mark in ".!?"))


@cache
def openings(split: str) -> list[list[int]]:
    """Prompts: the first four words of sentences of Jane Austen's, as token ids."""
    return [ids for ids in map(base()[1].encode, rlhf.sentence_openings(split, 4)) if len(ids) <= 8]


def show(ids: Any) -> str:
    """Tokens as text."""
    return base()[1].decode(ids, skip_special_tokens=True)


@cache
def ordered(rankings: int, seed: int) -> tuple[list[list[int]], list[Any], np.ndarray]:
    """(prompts, K answers of the base to each, the rater's order [prompts, K])."""
    rng = np.random.default_rng(seed)
    prompts = [openings("train")[i] for i in rng.permutation(len(openings("train")))[:rankings]]
    answers = rlhf.sample_answers(base()[0], prompts, K, LENGTH, stop_token_ids=stops(), seed=seed)
    scores = np.array([rlhf.vader([show(a) for a in own]) for own in answers])
    return prompts, answers, rlhf.rank(scores, rng, temperature=0.1)


@cache
def judge(rankings: int, seed: int) -> rlhf.RewardModel:
    """A reward model of the rater, calibrated."""
    ranked = rlhf.rankings(*ordered(rankings, seed))
    texts = [text for ranking in ranked for text in ranking.texts]
    model = rlhf.RewardModel(base()[0], seed=seed)
    model.calibrate(texts[:512])
    args = mp.TrainingArguments(
        learning_rate=2e-3, num_train_epochs=1, per_device_train_batch_size=8, warmup_ratio=0.1, seed=seed,
        progress=False,
    )  # fmt: skip
    mp.Trainer(model, ranked, args=args, collate=rlhf.collate_rankings).train()
    model.calibrate(texts[:512])
    return model


@dataclass(frozen=True)
class Run:
    """One way to make the base happier, from a number of the rater's rankings: one of METHODS."""

    method: str
    seed: int = 0
    updates: int = 16
    rankings: int = 1000
    beta: float = 0.05
    learning_rate: float = 3e-4


@cache
def learn(run: Run) -> tuple[Any, list[dict[str, Any]]]:
    """(policy, history) after `updates` updates of 32 answers each; DPO takes the pairs once instead, 16 a step."""
    policy = base()[0].copy()
    if run.method == "base":
        return policy, []
    if run.method == "DPO":
        args = mp.TrainingArguments(
            learning_rate=run.learning_rate, num_train_epochs=1, per_device_train_batch_size=16, warmup_ratio=0.1,
            per_device_eval_batch_size=32, seed=run.seed, progress=False,
        )  # fmt: skip
        trainer = rlhf.dpo_trainer(policy, rlhf.preference_pairs(*ordered(run.rankings, run.seed)), args=args, beta=run.beta)
        return policy, trainer.train().history
    trainer, config = SAMPLING[run.method]
    config = config(
        steps=run.updates, batch_size=32, mini_batch_size=16, num_epochs=2, response_length=LENGTH, max_kl=1e6,
        stop_token_ids=stops(), missing_eos_score=None, kl_coef=run.beta, learning_rate=run.learning_rate,
        lr_scheduler_type="constant", seed=run.seed, progress=False,
    )  # fmt: skip
    watch = {"gold": rlhf.gold_reward(base()[1])}
    return policy, trainer(policy, judge(run.rankings, run.seed), openings("train"), config, watch=watch).train()


def judged(policy: Any, reward: rlhf.RewardModel | None, seed: int = 0, prompts: int = 128) -> tuple[Row, rlhf.Rollout]:
    """(what a policy has become on held-out prompts, its answers to them): the judge's reward, the gold, KL from the base in
    nats an answer, the share of distinct bigrams, and of answers that end."""
    roll = rlhf.rollout(policy, openings("validation")[:prompts], LENGTH, 1.0, stops(), seed=10_000 + seed)
    given = roll.input_ids, roll.attention_mask
    with no_grad():
        logp, ref = (rlhf.response_logprobs(m, *given, LENGTH).numpy() for m in (policy, base()[0]))
        proxy = None if reward is None else round(float(reward.rewards(*given).numpy().mean()), 4)
    kl = ((logp - ref) * mp.backend.to_numpy(roll.mask)).sum(axis=1).mean()
    return {
        "reward": proxy, "gold": round(float(rlhf.gold_reward(base()[1])(roll).mean()), 4), "kl": round(float(kl), 4),
        "distinct_2": round(rlhf.distinct_n(roll.responses()), 4), "ended": round(roll.ended.mean().item(), 4),
    }, roll  # fmt: skip


def show_updates(history: list[dict[str, Any]]) -> None:
    """Print seven of the updates, or as many as there are, and the last."""
    print("\nupdate  reward    gold      KL  clipped  distinct-2  ended")
    for r in history[: -1 : max(1, len(history) // 6)] + history[-1:]:
        print(
            f"{r['step']:6d}  {r['objective/scores']:+.3f}  {r['watch/gold']:+.3f}  {r['objective/kl']:6.2f}"
            f"  {r['policy/clipfrac']:7.2f}  {r['text/distinct_2']:10.2f}  {r['num_eos']:5d}"
        )


def measure(run: Run) -> Row:
    """What the sweep writes down."""
    reward = judge(run.rankings, run.seed)
    ordered(run.rankings, run.seed)
    began = time.process_time()
    policy, history = learn(run)
    seconds = time.process_time() - began
    names = {"reward": "objective/scores", "kl": "objective/kl", "gold": "watch/gold"}
    curves = {name: [round(r[key], 4) for r in history] for name, key in names.items()} if run.method in SAMPLING else None
    return {**judged(policy, reward, run.seed)[0], "history": curves, "cpu_seconds": round(seconds, 1)}


def columns(rows: list[Row], method: str, keys: tuple[str, ...], seeds: tuple[int, ...]) -> dict[str, np.ndarray]:
    """{key: [seeds]} of a method's rows, which must be one for each seed."""
    of = sorted((row for row in rows if row["method"] == method), key=lambda row: row["seed"])
    assert [row["seed"] for row in of] == [*seeds], f"{method}: a row of each seed, see --full"
    return {key: np.array([row[key] for row in of]) for key in keys}


RUNS = [Run(method, seed) for seed in range(3) for method in METHODS]
