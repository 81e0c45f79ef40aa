"""Policies that learn a rater's taste, each by one method, as experiments: PPO, RLOO, GRPO and DPO from one base.

    rater    follows VADER, with noise, and orders four answers of the base to each of a number of openings of sentences
    judge    a reward model that learned from these orders; PPO, RLOO and GRPO optimize it
    pairs    the best and the worst of each four: what DPO learns from
    gold     VADER itself, which trains nothing

A method's learning rate is the one at which the gold of answers to prompts that are kept for this is highest, under the seed
TUNING. (`claims.chain_tuning` says why the gold: the judge's word, alone or less the price of KL, cannot tell whether the judge
is exploited.) What is reported is the rest: SEEDS, and other prompts. `Run`'s default rate is where each search begins.
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
from minipeft.claims.chain_rules import shown
from minipeft.claims.mechanisms import best_rate
from minipeft.claims.protocol import SEEDS, TUNING
from minipeft.claims.statistics import crossed
from minipeft.evaluation.intervals import Estimate, mean
from minipeft.experiments.rows import Row
from minipeft.experiments.shipped import base

LENGTH, K = 20, 4  # tokens of an answer, at most; answers that are ordered
SAMPLING = {
    "PPO": (rlhf.PPOTrainer, rlhf.PPOConfig), "RLOO": (rlhf.RLOOTrainer, rlhf.GroupConfig),
    "GRPO": (rlhf.GRPOTrainer, rlhf.GroupConfig),
}  # fmt: skip
METHODS = (*SAMPLING, "DPO")
HELD_OUT, SHOWN = 512, 4  # prompts of a report, and as many that select; answers that a row keeps
MEASURED = ("reward", "gold", "kl")  # of every answer
LEAST = 0.02  # of the gold: a setting that is better by less is not better. Two such means differ by it by luck alone


@cache
def stops() -> tuple[int, ...]:
    """An answer ends with its sentence."""
    return (base()[1].eos_token_id, *(base()[1].token_to_id(mark) for mark in ".!?"))


@cache
def openings(split: str) -> list[list[int]]:
    """Prompts: the first four words of sentences of Jane Austen's, as token ids."""
    return [ids for ids in map(base()[1].encode, rlhf.sentence_openings(split, 4)) if len(ids) <= 8]


@cache
def unseen() -> list[list[int]]:
    """Prompts of held-out chapters with which no training sentence begins, in an order that is drawn once: the first HELD_OUT are
    asked in reports, the next HELD_OUT select."""
    every = dict.fromkeys(map(tuple, openings("validation") + openings("test")))
    own = [list(prompt) for prompt in every if prompt not in set(map(tuple, openings("train")))]
    return [own[i] for i in np.random.default_rng(0).permutation(len(own))]


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
    """One way to make the base happier, from a number of the rater's rankings: one of METHODS, or "base", as it is."""

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


def judged(policy: Any, reward: rlhf.RewardModel | None, prompts: list[list[int]], seed: int = 0) -> tuple[Row, list[rlhf.Rollout]]:
    """(what a policy has become, its answers to n prompts): [n] of each, the gold, the judge's reward, and
    log π(y) - log π_ref(y), nats an answer; and the shares of distinct bigrams, and of answers that end."""
    parts, rolls = [], []
    with no_grad():
        for i in range(0, len(prompts), 128):
            stream = rlhf.rollouts.Rng(10_000 + seed, first_row=i)
            roll = rlhf.rollout(policy, prompts[i : i + 128], LENGTH, 1.0, stops(), stream)
            given = roll.input_ids, roll.attention_mask
            ratio = np.subtract(*(rlhf.response_logprobs(m, *given, LENGTH).numpy() for m in (policy, base()[0])))
            kl = (ratio * mp.backend.to_numpy(roll.mask)).sum(axis=1)
            proxy = np.zeros(len(kl)) if reward is None else reward.rewards(*given).numpy()
            parts.append([rlhf.gold_reward(base()[1])(roll), proxy, kl])
            rolls.append(roll)
    gold, proxy, kl = np.concatenate(parts, axis=1, dtype=float).round(3).tolist()
    return {
        "gold": gold, "reward": proxy, "kl": kl,
        "distinct_2": round(rlhf.distinct_n([answer for roll in rolls for answer in roll.responses()]), 4),
        "ended": round(float(np.mean([share for roll in rolls for share in mp.backend.to_numpy(roll.ended)])), 4),
    }, rolls  # fmt: skip


def samples(rolls: list[rlhf.Rollout]) -> list[str]:
    """The first SHOWN prompts and their answers, as text."""
    both = [(p, a) for roll in rolls for p, a in zip(roll.prompts(), roll.responses())]
    return [f"{show(prompt)} |{' '.join(show(answer).split())}" for prompt, answer in both[:SHOWN]]


def show_updates(history: list[dict[str, Any]]) -> None:
    """Print seven of the updates, or as many as there are, and the last."""
    print("\nupdate  reward    gold      KL  clipped  distinct-2  ended")
    for r in history[: -1 : max(1, len(history) // 6)] + history[-1:]:
        print(
            f"{r['step']:6d}  {r['objective/scores']:+.3f}  {r['watch/gold']:+.3f}  {r['objective/kl']:6.2f}"
            f"  {r['policy/clipfrac']:7.2f}  {r['text/distinct_2']:10.2f}  {r['num_eos']:5d}"
        )


def measure(run: Run) -> Row:
    """What the sweep writes down: what it has become, answer by answer, the first answers, and what learning has cost: answers that
    were drawn, and seconds of this machine, without what the methods share or the judge. Under the seed TUNING the means, of the
    prompts that select, and the reward of the first update."""
    reward = judge(run.rankings, run.seed)
    ordered(run.rankings, run.seed)
    began = time.process_time()
    policy, history = learn(run)
    seconds = time.process_time() - began
    if run.seed == TUNING:
        row = judged(policy, reward, unseen()[HELD_OUT : 2 * HELD_OUT], run.seed)[0]
        first = {"first": round(history[0]["objective/scores"], 4)} if run.method in SAMPLING else {}
        return {name: round(float(np.mean(row[name])), 4) for name in (*MEASURED, "ended")} | first
    row, rolls = judged(policy, reward, unseen()[:HELD_OUT], run.seed)
    drawn = 32 * run.updates if run.method in SAMPLING else 0
    return {**row, "samples": samples(rolls), "drawn": drawn, "cpu_seconds": round(seconds, 1)}


@dataclass(frozen=True)
class Half(Run):
    """A run once more. (RL on another processor soon draws other words, so its row may be of other answers.)"""


def measure_half(run: Half) -> Row:
    """The gold of each answer, and of its first half of LENGTH tokens alone: longer answers have more room for kind words."""
    policy = learn(Run(**vars(run)))[0]
    row, rolls = judged(policy, None, unseen()[:HELD_OUT], run.seed)
    half = rlhf.vader([show(answer[: LENGTH // 2]) for roll in rolls for answer in roll.responses()])
    return {"gold": row["gold"], "gold_of_half": half.astype(float).round(3).tolist(), "ended": row["ended"]}


TRIED = {  # learning rates, until both neighbors of the best are there
    method: [Run.learning_rate * 2.0**k for k in range(-1, most + 1)]
    for method, most in {"PPO": 2, "RLOO": 2, "GRPO": 1, "DPO": 4}.items()
}  # fmt: skip
CHOSEN = {"base": Run.learning_rate, "PPO": 6e-4, "RLOO": 6e-4, "GRPO": 3e-4, "DPO": 2.4e-3}
OTHER = [Run("GRPO", seed, learning_rate=CHOSEN["PPO"]) for seed in SEEDS]  # the methods without DPO at one rate
RUNS = [
    *(Run(method, TUNING, learning_rate=rate) for method in METHODS for rate in TRIED[method]),
    *(Run(method, seed, learning_rate=rate) for seed in SEEDS for method, rate in CHOSEN.items()), *OTHER,
]  # fmt: skip
HALVES = [Half(method, seed, learning_rate=rate) for seed in SEEDS for method, rate in CHOSEN.items()]


# ------------------------------------------------------------------------------------------------------- what is said


def show_searches(rows: list[Row]) -> None:
    """Print the gold of each rate that was tried. Raises AssertionError where a search does not end at the rate of the reports, or
    half or twice of that was not tried."""
    print(f"\ngold on {HELD_OUT} prompts that select, seed {TUNING}, by rate (* taken)")
    for method in METHODS:
        golds = {row["learning_rate"]: row["gold"] for row in rows if (row["method"], row["seed"]) == (method, TUNING)}
        best, tried = best_rate(lambda rate, golds=golds: -golds[rate], Run.learning_rate, LEAST)
        assert {best / 2, 2 * best} <= tried.keys() == golds.keys(), f"{method}: its best rate is inside what was tried"
        assert best == CHOSEN[method] == max(golds, key=golds.get), f"{method}: the rate of the reports is the best"
        print(f"{method:5s}", ", ".join(f"{rate:g}{'*' * (rate == best)} {gold:+.2f}" for rate, gold in sorted(golds.items())))


def reports(rows: list[Row], method: str, rate: float | None = None) -> dict[str, np.ndarray]:
    """{"gold", "reward", "kl": [seeds, prompts]; "distinct_2", "ended", "drawn", "cpu_seconds": [seeds]} of a method under SEEDS, at
    the rate chosen for it or another."""
    those = [row for row in rows if row["run"] == "Run" and row["method"] == method and row["learning_rate"] == (rate or CHOSEN[method]) and row["seed"] != TUNING]
    those.sort(key=lambda row: row["seed"])
    assert [row["seed"] for row in those] == [*SEEDS], f"{method}: a row of each seed, see --full"
    return {key: np.array([row[key] for row in those], float) for key in (*MEASURED, "distinct_2", "ended", "drawn", "cpu_seconds")}


def halves(rows: list[Row]) -> dict[str, tuple[Estimate, Estimate]]:
    """{method: its gold above the base's, in the first half of answers and in all of them}, of the runs of HALVES."""
    of = {(row["method"], row["seed"]): row for row in rows if row["run"] == "Half"}
    golds = {name: [np.array([of[name, seed][key] for seed in SEEDS]) for key in ("gold_of_half", "gold")] for name in CHOSEN}
    return {name: tuple(crossed(a - b) for a, b in zip(golds[name], golds["base"])) for name in METHODS}


def show_comparison(rows: list[Row], seed_of_samples: int) -> dict[tuple[str, str], dict[str, Estimate]]:
    """Print the searches, the reports, and what each method answers under a seed. Returns {(method, other): `less` of the two}, of each
    method beside the base, and of each other one beside PPO."""
    show_searches(rows)
    of = {method: reports(rows, method) for method in CHOSEN} | {"GRPO at PPO's rate": reports(rows, "GRPO", CHOSEN["PPO"])}
    print(f"\n{len(SEEDS)} seeds, {HELD_OUT} prompts   gold    distinct-2  ended  answers drawn  seconds of CPU, without the judge's")
    for name, found in of.items():
        gold, *shares, drawn, seconds = (found[key].mean() for key in ("gold", "distinct_2", "ended", "drawn", "cpu_seconds"))
        print(f"{name:20s}   {gold:+.2f}   {shares[0]:10.2f}  {shares[1]:5.2f}  {drawn:13.0f}  {seconds:7.0f}")
    print("ended, by seed: " + "; ".join(f"{name} " + " ".join(f"{share:.2f}" for share in found["ended"]) for name, found in of.items()))
    for name, (half, whole) in halves(rows).items():
        print(f"run again, {name} less base, gold of the first {LENGTH // 2} tokens {shown(half)}, of all {shown(whole)}")
        assert half.low > 0
    print("\n* where an interval excludes 0")
    pairs = [*((name, "base") for name in METHODS), *((name, "PPO") for name in [*of][2:])]
    beside = {(one, other): less(of[one], of[other]) for one, other in pairs}
    for (one, other), found in beside.items():
        print(f"{one} less {other}:".ljust(28), said(found))
    for row in rows:
        if row["run"] == "Run" and row["seed"] == seed_of_samples and row["learning_rate"] == CHOSEN[row["method"]]:
            print(f"{row['method']}, seed {seed_of_samples}, gold {np.mean(row['gold']):.2f}", *row["samples"], sep="\n    ")
    return beside


def show_readings(rows: list[Row]) -> dict[tuple[str, str, str], list[Estimate]]:
    """{(one, other, question): of each reader, by how many of the pairs more the one was preferred, over the seeds}.

    Each reader, one large language model that began anew, saw the first answers of the chain's base, SFT model and PPO (beta
    0.05), four prompts under ten seeds, in pairs: all in one random order, the two of a pair, too, and none of their sources. Of
    each pair it answered "which is the better ending, if the wish was a kind ending: kind and peaceful, complete, says enough, does not
    repeat itself?" and "which of the two makes more sense as a sentence?": 1 the one, -1 the other, 0 no preference.
    """
    found: dict[tuple[str, str, str], list[Estimate]] = {}
    for row, what in ((row, what) for what in ("kind", "sense") for row in rows):
        answers = np.array(row[what])  # [seeds, prompts]
        net = mean(answers.mean(axis=1))
        found.setdefault((row["of"], row["beside"], what), []).append(net)
        print(f"reader {row['reader']}, {what}: {row['of']} in {(answers > 0).sum()}, {row['beside']} in {(answers < 0).sum()} of {answers.size}; net {shown(net)}")
    return found


def less(one: dict[str, np.ndarray], other: dict[str, np.ndarray], level: float = 0.95) -> dict[str, Estimate]:
    """By how much more a method has than another, of what is MEASURED."""
    return {key: crossed(one[key] - other[key], level=level) for key in MEASURED}


def clear(found: dict[str, Estimate]) -> set[str]:
    """What has an interval that excludes 0."""
    return {key for key, e in found.items() if e.low > 0 or e.high < 0}


def said(found: dict[str, Estimate]) -> str:
    """ "reward +0.12 [+0.03, +0.21]*  gold ...": the star where an interval excludes 0."""
    return "  ".join(f"{key} {shown(e)}{'*' * (key in clear(found))}".ljust(29) for key, e in found.items()).rstrip()
