"""Which method when: each of eight ways to fine-tune, what it costs, what it learns and what it forgets.

Six methods imitate the answers of one task (`Rewriting`). `Instructions` imitates the answers of seven tasks, each asked
for in words. `Feedback` first imitates the task's answers, and then goes on by PPO on its own answers and a score.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from minipeft.accounting import architecture, measure_peak, ppo_ledger
from minipeft.experiments import shipped
from minipeft.experiments.costs import latency, memory, merged
from minipeft.experiments.run import Settings, TaskData, evaluate, fine_tune
from minipeft.experiments.seeds import SEEDS
from minipeft.experiments.shipped import HELD_OUT_VERSES, LENGTH, Rewriting, rounded, spaced
from minipeft.peft.methods import METHODS
from minipeft.rlhf import PPOConfig, PPOTrainer, Rollout
from minipeft.text.datasets import Instruction
from minipeft.text.examples import IGNORE, Example, encode_examples
from minipeft.text.instructions import TASKS, TRAINED, instructions, phrase

IMITATING = ("full", "lora", "bottleneck", "prompt", "prefix", "qlora")  # each at the rate of METHODS
TITLES = {
    "full": "full", "lora": "LoRA r=8", "bottleneck": "adapters m=16", "prompt": "prompt tuning P=20",
    "prefix": "prefix tuning P=20", "qlora": "QLoRA r=8", "instructions": "instruction tuning", "feedback": "RLHF (PPO)",
}  # fmt: skip


@dataclass(frozen=True)
class Instructions:
    """Full fine-tuning on the shipped mix of instruction tasks, as many examples as a `Rewriting` run sees; few are verses,
    most of which do not fit into 128 tokens."""

    learning_rate: float = 1e-3
    steps: int = 40
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Feedback:
    """Full fine-tuning on the task, then PPO; the score of an answer is how many words it shares with the reference.

    updates   PPO's, each on `responses` answers of at most 32 tokens to training prompts, in two epochs
    kl_coef   β, towards the fine-tuned model that PPO starts from
    """

    updates: int = 12
    responses: int = 16
    learning_rate: float = 1e-4
    kl_coef: float = 0.02
    steps: int = 40
    seed: int = 0


@dataclass(frozen=True)
class Costs:
    """What a method costs on the machine that measures: step time is of `steps` steps; the seed numbers the measurement."""

    method: str = "full"
    steps: int = 8
    seed: int = 0


QUALITY = [
    *(Rewriting(method, METHODS[method].learning_rate, seed=seed) for seed in SEEDS for method in IMITATING),
    *(kind(seed=seed) for seed in SEEDS for kind in (Instructions, Feedback)),
]
COSTS = [Costs(method, seed=seed) for seed in SEEDS for method in TITLES]
RUNS = [*COSTS, *QUALITY]


def run(settings: Any) -> dict[str, Any]:
    """The row of one of RUNS."""
    if isinstance(settings, Costs):
        return rounded(costs(settings))
    if isinstance(settings, Instructions):
        return rounded(instruct(settings))
    return rounded(reward(settings)) if isinstance(settings, Feedback) else shipped.run(settings)


# ------------------------------------------------------------------------------------------------ instruction tuning


@cache
def asked(held_out: int = HELD_OUT_VERSES) -> list[Example]:
    """The held-out verses of the task, asked for by an instruction."""
    words = [r.prompt.removeprefix("King James: ").removesuffix("\nPlain English:") for r in shipped.verses("validation")]
    pairs = [(word, r.completion.strip()) for word, r in zip(words, shipped.verses("validation"))]
    records = [phrase(pair, TASKS["rewrite"].phrasings[0]) for pair in spaced(pairs, held_out)]
    return encode_examples(records, shipped.base()[1], 4 * LENGTH).examples


def mixed(examples: int, seed: int) -> list[Example]:
    """That many training examples of the instruction tasks, those that fit into 128 tokens."""
    records: list[Instruction] = instructions(TRAINED, "train", cap=-(-2 * examples // len(TRAINED)), seed=seed)
    return encode_examples(records, shipped.base()[1], LENGTH, on_overflow="drop").examples[:examples]


def instruct(s: Instructions) -> dict[str, Any]:
    """The task's loss is on the same held-out answers as everywhere, only asked for by an instruction."""
    base, task = shipped.base()[0], shipped.rewriting(1, s.seed)
    task = TaskData(mixed(s.steps * s.batch_size, s.seed), asked(), task.general, [], task.pad_token_id)
    row, _ = fine_tune(base, task, Settings("full", s.learning_rate, s.steps, s.batch_size, seed=s.seed))
    kept = {key: row[key] for key in ("trainable", "parameters", "storage", "task_loss", "general_loss")}
    task_before, general_before = evaluate(base, task)
    return kept | {"forgotten": row["general_loss"] - general_before, "task_before": task_before}


# ------------------------------------------------------------------------------------------------------------- RLHF


def overlap(answer: str, reference: str) -> float:
    """The share of words in common, 2 |a ∩ r| / (|a| + |r|) with repetitions: ROUGE-1's F (Lin 2004)."""
    a, r = Counter(answer.lower().split()), Counter(reference.lower().split())
    return 2 * sum((a & r).values()) / max(1, sum(a.values()) + sum(r.values()))


def ppo(policy: Any, task: TaskData, s: Feedback) -> PPOTrainer:
    """PPO on the task's training prompts, scored by the overlap with their references."""
    tokenizer, references = shipped.base()[1], {}
    for ids, labels in task.train:
        prompt = tuple(ids[labels == IGNORE].tolist())
        references[prompt] = tokenizer.decode(ids[labels != IGNORE], skip_special_tokens=True)

    def score(roll: Rollout) -> np.ndarray:
        answers = [tokenizer.decode(ids, skip_special_tokens=True) for ids in roll.responses()]
        return np.array([overlap(a, references[tuple(prompt)]) for a, prompt in zip(answers, roll.prompts())])

    config = PPOConfig(
        steps=s.updates, batch_size=s.responses, mini_batch_size=16, num_epochs=2, response_length=32,
        learning_rate=s.learning_rate, kl_coef=s.kl_coef, missing_eos_score=None, seed=s.seed, progress=False,
    )  # fmt: skip
    return PPOTrainer(policy, score, list(references), config)


def reward(s: Feedback) -> dict[str, Any]:
    """Beside the losses, the mean score of sampled answers in the first and in the last quarter of the updates."""
    first = Rewriting(learning_rate=METHODS["full"].learning_rate, steps=s.steps, seed=s.seed)
    task = shipped.data(first)
    row, policy = fine_tune(shipped.base()[0], task, first)
    trainer = ppo(policy, task, s)
    scores = [record["objective/raw_scores"] for record in trainer.train()]
    quarter = max(1, len(scores) // 4)
    task_loss, general_loss = evaluate(policy, task)
    return {
        **{key: row[key] for key in ("trainable", "parameters", "storage")},
        "task_loss": task_loss, "general_loss": general_loss, "forgotten": general_loss - shipped.before()[1],
        "score_before": statistics.mean(scores[:quarter]), "score": statistics.mean(scores[-quarter:]),
        "kl": trainer.history[-1]["objective/kl"],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- costs


def costs(s: Costs) -> dict[str, Any]:
    """Peak memory of a step, predicted and measured; median seconds of a step; seconds a token, and after merging."""
    base, tokenizer = shipped.base()
    task = shipped.rewriting(16 * s.steps, s.seed)
    if s.method == "feedback":
        return ppo_costs(s, task)
    key = "full" if s.method == "instructions" else s.method
    if s.method == "instructions":
        task = task._replace(train=mixed(16 * s.steps, s.seed))
    predicted, measured = memory(METHODS[key], base, task.train, 16, tokenizer.pad_token_id)
    row, model = fine_tune(base, task, Settings(key, METHODS[key].learning_rate, s.steps, seed=s.seed))
    plain = merged(model)
    return {
        "memory_predicted": predicted, "memory_measured": measured, "seconds_per_step": row["seconds_per_step"],
        "latency": latency(model), "latency_merged": None if plain is None else latency(plain),
    }  # fmt: skip


def ppo_costs(s: Costs, task: TaskData) -> dict[str, Any]:
    """The same of an update of PPO."""
    base, settings = shipped.base()[0], Feedback(updates=2, seed=s.seed)
    longest = max(int((labels == IGNORE).sum()) for _, labels in task.train)
    ledger = ppo_ledger(
        architecture(base.config), None, settings.responses, longest, 32, mini_batch=16, reward_model=False
    )  # fmt: skip
    seconds: list[float] = []

    def updates() -> None:
        ppo(METHODS["full"].prepare(base.copy(), 1), task, settings).train()

    peak = measure_peak(updates)
    trainer = ppo(METHODS["full"].prepare(base, 1), task, settings)
    for _ in range(settings.updates):
        start = time.perf_counter()
        trainer.step()
        seconds.append(time.perf_counter() - start)
    once = latency(trainer.policy)
    return {
        "memory_predicted": ledger.total, "memory_measured": peak, "seconds_per_step": statistics.median(seconds),
        "latency": once, "latency_merged": once,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the table


def cells(rows: Sequence[dict[str, Any]], method: str) -> dict[str, np.ndarray | None]:
    """Every measured quantity of a method, an array over the seeds (None where there is none, as of a merge)."""
    kind = {"instructions": "Instructions", "feedback": "Feedback"}.get(method, "Rewriting")
    found: dict[str, np.ndarray | None] = {}
    for row_kind in (kind, "Costs"):
        own = [r for r in rows if r["run"] == row_kind and r.get("method", method) == method]
        if not own:
            raise ValueError(f"there is no row of {method} ({row_kind})")
        own.sort(key=lambda row: row["seed"])
        for key in own[0]:
            values = [row[key] for row in own]
            if isinstance(values[0], int | float) and not isinstance(values[0], bool):
                found[key] = np.array(values, float)
            elif values[0] is None:
                found[key] = None
    return found
