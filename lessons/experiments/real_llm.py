"""Lesson 13's task on the whole test split: SmolLM2-135M-Instruct rewrites verses, before and after LoRA, item by item.

The rate is chosen on verses of the validation split, under one seed, by factors of 2 with both neighbors tried; then five
other seeds, each with training verses and a start of A of its own, are reported on verses of the test split (whose
chapters: `text/build_corpora.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

import minipeft as mp
from minipeft.claims.inputs import smollm2
from minipeft.claims.statistics import crossed
from minipeft.evaluation.intervals import Estimate, mean
from minipeft.experiments.rows import Row
from minipeft.experiments.shipped import rounded
from minipeft.nn.generation import generate
from minipeft.text.corpora import bible
from minipeft.text.datasets import Instruction
from minipeft.text.examples import Example, encode_examples
from minipeft.text.templates import chat
from minipeft.train.batches import IGNORE
from minipeft.train.evaluation import example_losses
from minipeft.train.metrics import chrf

from .drawing import one_plot

INSTRUCTION = "Rewrite this verse in plain English."
LENGTH = 192  # tokens of an example, at most
RATES, RATE = (3.5e-4, 7e-4, 1.4e-3, 2.8e-3, 5.6e-3), 2.8e-3  # tried, and the best by the rows
CONFIG = mp.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
QUESTIONS = (  # of many kinds; none has to do with the task
    "What is the capital of France?", "Write one sentence about the sea.", "Name three colors.",
    "Why do birds fly south in winter?", "How do I boil an egg?", "What is two plus two?",
    "Who wrote Hamlet?", "Explain what a prime number is.", "Give me a recipe for pancakes.",
    "Translate 'good morning' into French.", "What should I pack for a day in the mountains?", "Tell me a short joke.",
    "How does a refrigerator work?", "Write a polite letter to a neighbor about noise.", "What is the largest planet?",
    "Write a Python function that adds two numbers.", "How can I sleep better?", "Describe the taste of a lemon.",
    "What is the difference between a lake and a river?", "Suggest a name for a cat.", "When did people first land on the Moon?",
    "Write the first line of a detective story.", "How many days has a leap year?", "What does a doctor do?",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A LoRA trained at a rate, measured on a split; rate 0: the model as it is."""

    rate: float = 0.0
    seed: int = 0
    split: str = "test"
    examples: int = 256
    batch_size: int = 4
    tested: int = 512  # verses
    answered: int = 128  # of them
    base: str = "SmolLM2-135M-Instruct"


TUNING = [Run(rate, split="validation", tested=96, answered=0) for rate in RATES]
RUNS = [Run(), *TUNING, *(Run(RATE, seed) for seed in range(1, 6))]


def verses(split: str, n: int, longest: int = 200, seed: int = 0) -> list[Instruction]:
    """n pairs of a split, of medium length, as instructions."""
    fitting = [v for v in bible(split) if 40 <= min(map(len, v[3:])) and max(map(len, v[3:])) <= longest]
    chosen = np.random.default_rng(seed).permutation(len(fitting))[:n]
    return [Instruction(INSTRUCTION, fitting[i].king_james, fitting[i].basic_english) for i in chosen]


@cache
def vocabulary() -> frozenset[str]:
    """The words that the Bible in Basic English uses anywhere in its training split: the *plain* ones."""
    return frozenset(word for verse in bible("train") for word in words(verse.basic_english))


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall("[a-z]+", text.lower())


def plain(texts: Sequence[str]) -> np.ndarray:
    """[n, 2]: the plain words of each text, and all of its words."""
    known = vocabulary()
    return np.array([(sum(word in known for word in words(text)), len(words(text))) for text in texts])


def similar(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """The chrF of each text with its other, [n]."""
    return np.array([chrf([text], [other]) for text, other in zip(texts, others)])


def encoded(records: Sequence[Instruction], tokenizer: Any) -> list[Example]:
    """Records in the model's own template, of which the answer is learned."""
    return encode_examples(records, tokenizer, LENGTH, chat(tokenizer)).examples


def drawn(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], n: int) -> list[Example]:
    """The model's own answer to each prompt, drawn, of at most n tokens: these are the labels, with the end where it was drawn."""
    ids, mask = tokenizer.pad(prompts, side="left")
    examples = []
    for prompt, row in zip(prompts, generate(model, ids, mask, n, temperature=1.0, seed=0)[:, ids.shape[1] :]):
        ends = np.flatnonzero(row == tokenizer.eos_token_id)
        answer = row[: ends[0] + 1] if len(ends) else row  # behind its end a row is filled up
        examples.append(Example(np.append(prompt, answer), np.append(np.full(len(prompt), IGNORE), answer)))
    return examples


def run(s: Run) -> Row:
    """The row of a run:

    nats, tokens   [tested] of each reference: its nats in sum, its tokens
    similar, copied, plain   [answered] of each greedy answer: chrF with the reference, and with the verse; (plain words, words)
    read           some of the answers
    """
    model, tokenizer = smollm2()
    if s.rate:
        model = mp.get_peft_model(model, CONFIG, seed=s.seed)
        arguments = mp.TrainingArguments(
            learning_rate=s.rate, max_steps=s.examples // s.batch_size, per_device_train_batch_size=s.batch_size,
            warmup_ratio=0.05, seed=s.seed, progress=False,
        )  # fmt: skip
        data = encoded(verses("train", s.examples, seed=s.seed), tokenizer)
        mp.Trainer(model, data, args=arguments, pad_token_id=tokenizer.pad_token_id).train()
    records = verses(s.split, s.tested)
    nats, tokens = example_losses(model, encoded(records, tokenizer), 16, tokenizer.pad_token_id)
    row: Row = {"nats": nats.round(3).tolist(), "tokens": tokens.tolist()}
    if s.answered:
        asked = records[: s.answered]
        answers = mp.ask(model, tokenizer, asked, chat(tokenizer), max_new_tokens=64, batch_size=32)
        row |= {"similar": similar(answers, [r.output for r in asked]).round(1).tolist()}
        row |= {"copied": similar(answers, [r.input for r in asked]).round(1).tolist()}
        row |= {"plain": plain(answers).tolist(), "read": answers[:6]}
    return rounded(row)


# ----------------------------------------------------------------------------------------------------------- what is said


def best_rate(rows: Sequence[Row]) -> float:
    """The rate whose loss on validation is lowest, of those tried."""
    tried = {row["rate"]: sum(row["nats"]) / sum(row["tokens"]) for row in rows if row["split"] == "validation"}
    return min(tried, key=lambda rate: tried[rate])


def margins(rows: Sequence[Row]) -> dict[float, Estimate]:
    """{rate: how much its loss on validation is above that of the best, in nats a token, with an interval over the verses alone}."""
    tried = {row["rate"]: row for row in rows if row["split"] == "validation"}
    best = tried.pop(best_rate(rows))
    return {rate: mean(np.array(row["nats"]) - best["nats"], best["tokens"]) for rate, row in tried.items()}


def over(values: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
    """The mean of values [seeds, items], with its interval over both; of one seed, over the items."""
    return crossed(values, weights) if len(values) > 1 else mean(values[0], weights)


def found(rows: Sequence[Row]) -> dict[str, dict[str, Estimate]]:
    """{what is measured: {of whom: its mean with an interval over seeds and verses}}, of answers on the test split.

    loss      nats a token of the reference; "gained": before less after
    chrF      with the reference; "over the copy": of the answers after, less the verse's own
    copied    chrF with the verse, which a copy would have at 100
    plain     the mean share of an answer's words that are plain, in percent; "over the copy" as above
    """
    before = next(row for row in rows if not row["rate"])
    after = [row for row in rows if row["rate"] and row["split"] == "test"]
    tokens = np.array(before["tokens"], float)
    asked = verses("test", len(before["similar"]))
    verse, reference = [record.input for record in asked], [record.output for record in asked]

    def both(of: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.array([of(before)], float), np.array([of(row) for row in after], float)

    def share(pairs: Any) -> np.ndarray:
        known, all_words = np.array(pairs, float).T
        return 100 * known / np.maximum(all_words, 1)

    nats, nats_after = both(lambda row: row["nats"])
    result = {"loss": {
        "before": over(nats, tokens), "after": over(nats_after, tokens), "gained": over(nats - nats_after, tokens),
    }}  # fmt: skip
    copy = {"chrF": similar(verse, reference), "copied": np.full(len(verse), 100.0), "plain": share(plain(verse))}
    for name, of in (("chrF", lambda row: row["similar"]), ("copied", lambda row: row["copied"]), ("plain", lambda row: share(row["plain"]))):
        start, end = both(of)
        result[name] = {
            "before": over(start), "after": over(end), "the verse": over(copy[name][None]),
            "gained": over(end - start), "over the copy": over(end - copy[name]),
        }  # fmt: skip
    result["copied"]["the reference"] = over(similar(reference, verse)[None])
    result["plain"]["the reference"] = over(share(plain(reference))[None])
    return result


# --------------------------------------------------------------------------------------------------------------- pictures


def bill_picture(bills: Mapping[str, Any], allowed: float) -> Any:
    """What one step holds at its worst moment by each method, in MB, beside what is allowed."""
    figure, axis = one_plot()
    bottom = np.zeros(len(bills))
    for kind in ("frozen weights", "trained weights", "adapters", "gradients", "optimizer states", "activations", "logits", "working memory"):
        height = np.array([bill.lines.get(kind, 0) / 1e6 for bill in bills.values()])
        axis.bar(list(bills), height, bottom=bottom, label=kind)
        bottom += height
    axis.axhline(allowed / 1e6, color="0.3", linestyle="--", linewidth=1, label="what this lesson may take")
    axis.set(title="The bill of one step, 4 x 128 tokens", ylabel="MB")
    axis.legend(fontsize=9, framealpha=1)
    return figure


def curves_picture(curves: Mapping[str, Sequence[float]], ends: Mapping[str, float], before: float) -> Any:
    """Training losses by step, their means over ten steps, and the held-out losses before and after."""
    figure, axis = one_plot()
    for (name, losses), color in zip(curves.items(), ("C0", "C1")):
        smooth = [np.mean(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
        axis.plot(range(1, len(losses) + 1), losses, color=color, alpha=0.25)
        axis.plot(range(1, len(losses) + 1), smooth, color=color, label=name)
        axis.axhline(ends[name], color=color, linestyle=":")
    axis.axhline(before, color="0.5", linestyle=":", label="held out, before")
    axis.set(title="Learning the task (dotted: held out)", xlabel="step", ylabel="nats a token")
    axis.legend(fontsize=9)
    return figure


def scores_picture(of: Mapping[str, Mapping[str, Estimate]]) -> Any:
    """chrF with the reference, chrF with the verse, and the plain words, of the verse copied, before and after, with intervals."""
    figure, axis = one_plot()
    whose = ("the verse", "before", "after")
    for k, (name, label) in enumerate({"chrF": "chrF with the reference", "copied": "chrF with the verse", "plain": "plain words, %"}.items()):
        values = [of[name][one] for one in whose]
        middle = np.array([e.value for e in values])
        error = [[0 if e.low is None else e.value - e.low for e in values]] * 2
        axis.barh(np.arange(3) + 0.27 * (k - 1), middle, 0.27, xerr=error, color=f"C{(0, 1, 4)[k]}", label=label)
    axis.set(yticks=range(3), yticklabels=("the verse, copied", "before", "after LoRA"), xlim=(0, 130))
    axis.invert_yaxis()
    axis.legend(fontsize=9, loc="center right")
    return figure
