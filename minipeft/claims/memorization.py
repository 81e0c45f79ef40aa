"""How many bits can a method make a model remember? Random answers, which nothing but memory can give.

    memorized = Σ_examples (T log2 V + log2 p(answer | prompt))          bits; an answer has T tokens, each one of V

The answers are drawn uniformly from all V tokens: a model that knows nothing gives each of them 1/V and has memorized 0
bits, one that knows all has T log2 V of every example; the base, which expects English, is below 0. Prompts are the first
tokens of different sentences of the task "source".

Sources: Zhang et al. 2017, Understanding Deep Learning Requires Rethinking Generalization (arXiv:1611.03530), for random
labels; Morris et al. 2025, How Much Do Language Models Memorize? (arXiv:2505.24832), for the bits of uniformly random
tokens.

Departures: (1) What counts are the bits after a number of passes over the examples, at the rate that is best for them, in
batches of 8, and not what a method would hold at last: who is slow has fewer. So 64 examples are also passed four times as
often; and as these leave room, there are also eight times as many. (2) A model is fine-tuned, not trained from the start.
(3) Only answers count, prompts are given. There is nothing held out, and nothing is to be: the rate is tuned on the bits
under one seed, and reported under others, which have other prompts and other answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.intervals import Estimate, mean
from ..experiments.rows import Row
from ..experiments.shipped import base, rounded
from ..text.examples import IGNORE, Example
from ..train.evaluation import example_losses
from . import data
from .mechanisms import ByItem, best_rate, curve, graded, judged, steps_of, those, train
from .protocol import SEEDS, TABLE, TUNING
from .register import UNTESTABLE, Verdict, claim, itemized, listed

Rows = Sequence[Mapping[str, Any]]

METHODS = ("ia3", "prompt", "bottleneck", "lora-r1", "lora", "lora-r64", "full")
LOADS = (64, 32), (64, 128), (512, 32)  # examples, passes over them
LEAST = 0.01  # of all bits: a rate that is better by less is not better, and a method that remembers less by less is not behind


@dataclass(frozen=True)
class Memory:
    """A cell: a method, a number of random examples, and of passes over them."""

    method: str
    examples: int
    epochs: int = 32
    batch_size: int = 8
    prompt: int = 8  # tokens
    answer: int = 16
    seeds: tuple[int, ...] = SEEDS


def runs() -> list[Memory]:
    """All cells."""
    return [Memory(method, n, epochs) for n, epochs in LOADS for method in METHODS]


def random_answers(n: int, seed: int, prompt: int = 8, answer: int = 4) -> list[Example]:
    """n examples whose prompts are all different, each the first tokens of a sentence; only the answers are learned.

    Raises ValueError where there are fewer than n prompts."""
    tokenizer, rng = base()[1], np.random.default_rng(seed)
    sentences = [q.prompt.removeprefix("Sentence: ").removesuffix("\nBook:") for q in data.questions("source", "train")]
    prompts: dict[tuple[int, ...], None] = {}
    for i in rng.permutation(len(sentences)):
        ids = tuple(tokenizer.encode(sentences[i])[:prompt])
        if len(ids) == prompt:
            prompts[ids] = None
        if len(prompts) == n:
            break
    if len(prompts) < n:
        raise ValueError(f"there are {len(prompts)} different prompts of {prompt} tokens, not {n}")
    answers = rng.integers(0, tokenizer.vocab_size, (n, answer))
    return [
        Example(np.append(ids, drawn), np.append(np.full(prompt, IGNORE), drawn)) for ids, drawn in zip(prompts, answers)
    ]


def memorized(nll: Sequence[float], tokens: Sequence[int], choices: int) -> float:
    """Bits, from the nats of each answer [n] and the numbers of its tokens [n], each one of `choices`."""
    return float(np.sum(tokens) * math.log2(choices) - np.sum(nll) / math.log(2))


def run(settings: Memory) -> Row:
    """The row of a cell: the parameters that are trained, the bits there are, those of the untrained base and those
    memorized by seed (None where training diverged), the rate, and [[rate, minus the memorized share], ...]."""
    s, (model, tokenizer) = settings, base()
    method, steps = TABLE[s.method], steps_of(s.examples, s.epochs, s.batch_size)
    bits = s.examples * s.answer * math.log2(tokenizer.vocab_size)

    def of(trained: Any, examples: list[Example]) -> float | None:
        try:
            return memorized(*example_losses(trained, examples, 64, tokenizer.pad_token_id), tokenizer.vocab_size)
        except FloatingPointError:
            return None

    def fitted(rate: float, seed: int) -> tuple[float | None, Any]:
        examples, trained = random_answers(s.examples, seed, s.prompt, s.answer), method.prepare(model, steps, seed)
        done = train(trained, examples, rate, steps, s.batch_size, seed, pad_token_id=tokenizer.pad_token_id)
        return (None if done is None else of(trained, examples)), trained

    def loss(rate: float) -> float | None:
        found = fitted(rate, TUNING)[0]
        return None if found is None else -found / bits

    rate, tried = best_rate(loss, method.learning_rate, LEAST)
    last = method.prepare(model, steps)
    return {
        "trainable": sum(p.size for p in last.parameters() if p.requires_grad), "bits": bits, "rate": rate, "rates": curve(tried),
        "before": rounded([of(model, random_answers(s.examples, seed, s.prompt, s.answer)) for seed in s.seeds]),
        "memorized": rounded([fitted(rate, seed)[0] for seed in s.seeds]),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- statistics


def of_method(rows: Rows, method: str) -> tuple[Mapping[str, Any], np.ndarray] | None:
    """(its row, its bits by seed); None where a run diverged."""
    row = next(row for row in rows if row["method"] == method)
    return None if None in row["memorized"] else (row, np.array(row["memorized"], float))


EXPERIMENT = ByItem("memorization", run, runs)


@claim("full-7", lesson="06_soft_prompts.py", section="7 · How much can be remembered", experiment=EXPERIMENT)
def verdict(rows: Rows) -> Verdict:
    """Holds if full fine-tuning memorizes clearly more bits of random answers (by more than a hundredth of all) than every method that
    trains fewer parameters, of 64 examples in 32 passes and in 128, and of 512 in 32; holds if than some of these; does not hold here if
    than none. A method that remembers 99 % of all bits might remember more, were there more: where full fine-tuning is ahead of
    nobody, and some method has reached this limit, it cannot be tested here. (More passes over 512 examples were not tried, and no more examples.)"""
    cases: dict[str, bool | None] = {}
    margins: dict[str, Estimate] = {}
    shares, each, told = {}, {}, []
    loads = dict.fromkeys((row["examples"], row["epochs"]) for row in rows)
    for n, epochs in loads:
        here = [row for row in rows if (row["examples"], row["epochs"]) == (n, epochs)]
        if (found := of_method(here, "full")) is None:
            raise ValueError(f"a run of full fine-tuning on {n} examples diverged")
        full, most = found
        load, ahead = f"{n} in {epochs} passes", {}
        shares[f"full, {load}"] = mean(most / full["bits"])
        for row in here:
            if row["trainable"] >= full["trainable"] or (found := of_method(here, row["method"])) is None:
                continue
            method, bits = row["method"], found[1]
            margins[f"{method}, {load}"] = margin = mean((most - bits) / full["bits"])
            clearly = margin.low is not None and margin.low > LEAST
            ahead[method] = True if clearly else None if bits.mean() >= (1 - LEAST) * full["bits"] else False
            shares[f"{method}, {load}"] = mean(bits / full["bits"])
            each[f"{method}, {load}: a trainable parameter"] = mean(bits / row["trainable"])
        cases |= {f"{method}, {load}": value for method, value in ahead.items()}
        remembers = f"full fine-tuning remembers {most.mean() / full['bits']:.1%} of {full['bits']:,.0f} bits"
        parts = [f"{n} examples in {epochs} passes: {remembers}, clearly more than {those(ahead)}"]
        between = {m: margins[f"{m}, {load}"] for m, clearly in ahead.items() if clearly is False}
        unclear = [f"{m} (by {e.value:.2f}{'' if e.low is None else f' [{e.low:.2f}, {e.high:.2f}]'})" for m, e in between.items()]
        parts += [f"and not clearly more than {listed(unclear)}"] * bool(unclear)
        parts += [f"the data are too few to compare {those(ahead, None)}"] * (None in ahead.values())
        told.append(", ".join(parts))
    nearest = min(margins, key=lambda name: margins[name].value)
    found = UNTESTABLE if None in cases.values() and True not in cases.values() else graded(cases)
    effect = f"full, more than {nearest}", margins[nearest], "of all bits"
    evidence = {"of all bits": shares, "bits": each}
    return judged(found, f"Of random answers:{itemized(told)}", *effect, evidence, None, "random answers")
