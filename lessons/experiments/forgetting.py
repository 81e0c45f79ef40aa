"""What Lesson 15 computes beside the league, and draws: remedies against forgetting, and the way back from a tuned model to its base.

By the league's protocol, as `practice` says. A remedy is compared at equal quality of the task (`protocol.Gentle`): it and full
fine-tuning without it each at the rate, of those tried, that keeps the lowest loss on general text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft.backend import to_numpy
from minipeft.claims import data, protocol
from minipeft.claims.comparison import Pair
from minipeft.claims.forgetting import REPLAY
from minipeft.claims.league import EQUAL, MAIN, league
from minipeft.claims.protocol import BLOCKS, ITEMS, LENGTH, SEEDS, Choice, Gentle, Trial
from minipeft.claims.statistics import crossed
from minipeft.evaluation import evaluate
from minipeft.evaluation.cloze import general_cloze
from minipeft.evaluation.intervals import Estimate
from minipeft.experiments.rows import Row, read_rows
from minipeft.experiments.shipped import base, rounded
from minipeft.peft.methods import METHODS
from minipeft.train.evaluation import example_losses

from . import practice, sweep
from .practice import CASE, near

NONE = near()
REMEDIES = {"L2-SP, α = 0.3": near(l2_start=0.3), "replay, 0.25": near(replay=0.25), "weight decay, 1": near(weight_decay=1.0)}
STRENGTHS = {"L2-SP, α = 0.1": near(l2_start=0.1), "L2-SP, α = 1": near(l2_start=1.0), "weight decay, 10": near(weight_decay=10.0)}
PAIRS, OTHERS = (
    [Pair(CASE, name, Gentle(with_it, NONE), "none", Gentle(NONE, with_it)) for name, with_it in several.items()]
    for several in (REMEDIES, STRENGTHS)
)
SEARCHES: list[Choice] = [NONE, *(way for pair in PAIRS + OTHERS for way in (pair.one, pair.other))]


@dataclass(frozen=True)
class Read(Trial):
    """A trial whose model reads the general text again, block by block: its own row has the mean of each kind of text alone."""


def read_again(find: protocol.Find) -> list[Read]:
    """What the lesson reports of general text: the tuned methods and remedies, their controls, and the gentlest settings."""
    tuned = [protocol.search(task, method, 500) for task in ("rewrite", "source") for method in ("full", "lora", "qlora", "bottleneck")]
    gentle = [way for pair in EQUAL if pair.a == "lora" for way in (pair.one, pair.other)]
    trials = [protocol.chosen(find, choice)[0] for choice in (*tuned, *gentle, *SEARCHES)]
    trials += [replace(NONE.start, rate=NONE.start.rate / 2), replace(NONE.start, rate=NONE.start.rate / 2, batch_size=8)]
    return [Read(**vars(replace(trial, seed=seed, split="test"))) for seed in SEEDS for trial in dict.fromkeys(trials)]


def read(trial: Read) -> Row:
    """The loss on each block of general text, in nats."""
    model, tokenizer = far(trial), base()[1]
    text = [block for blocks in data.general(BLOCKS, LENGTH).values() for block in blocks]
    return rounded({"general": example_losses(model, text, 32, tokenizer.pad_token_id)[0].tolist()})


def blocks(store: str | os.PathLike) -> dict[Trial, np.ndarray]:
    """The nats of each block of general text, of all trials that `read_again` names."""
    rows = [row for row in read_rows(store) if row["run"] == "Read" and row.get("version") == protocol.version()]
    return {protocol.trial_of(row): np.array(row["general"]) for row in rows}


@dataclass(frozen=True)
class Way:
    """A share of the way from the base to the tuned model of a seed."""

    share: float
    seed: int

    @property
    def to(self) -> Trial:
        """The trial that the way leads to: NONE begins where the league's search ended."""
        return replace(NONE.start, seed=self.seed, split="test")


WAYS = [Way(0.0, SEEDS[0]), *(Way(share, seed) for seed in SEEDS for share in (0.25, 0.5, 0.75, 1.0))]


def of_items(rows: list[Row], base_row: Row) -> dict[str, np.ndarray]:
    """The change of which general items are right, of each kind of text, which take turns: {kind: [seeds, items]}."""
    right, before = (np.array([row["cloze"] for row in some], float) for some in (rows, [base_row]))
    kinds = base_row["general"]
    return {kind: right[:, i :: len(kinds)] - before[:, i :: len(kinds)] for i, kind in enumerate(kinds)}


def replayed(find: protocol.Find) -> dict[str, Estimate]:
    """How many more of the items of each kind LoRA has right on `rewrite` with replay than without, at equal quality (forget-3): over
    both strengths, seeds and items; printed."""
    kept: dict[str, list[np.ndarray]] = {kind: [] for kind in data.general(BLOCKS, LENGTH)}
    for pair in REPLAY:
        if (pair.task, pair.one.start.method) == ("rewrite", "lora"):
            trials = [protocol.chosen(find, way)[0] for way in (pair.one, pair.other)]
            with_it, without = (np.array([find(replace(t, seed=seed, split="test"))["cloze"] for seed in SEEDS], float) for t in trials)
            for i, several in enumerate(kept.values()):
                several.append((with_it - without)[:, i :: len(kept)])
    found = {kind: crossed(np.mean(several, axis=0)) for kind, several in kept.items()}
    print("LoRA with replay, less without, items:", ", ".join(f"{k} {e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]" for k, e in found.items()))
    return found


@lru_cache(1)
def far(trial: Trial) -> Any:
    """The model of a trial."""
    return protocol.trained(trial)[1]


def between(share: float, model: Any) -> Any:
    """The base with its weights moved by a share of the way to those of `model`."""
    moved = base()[0].copy()
    for p, q in zip(moved.parameters(), model.parameters()):
        p.data += share * (q.data - p.data)
    return moved


def run(way: Way) -> Row:
    """The model at this place of the way: the loss on each of 512 test verses, and on each block of general text, in nats."""
    model, tokenizer = base()
    if way.share:
        model = between(way.share, far(way.to))
    verses = data.encode(data.asked("rewrite", "test", ITEMS["rewrite"]))
    text = [block for blocks in data.general(BLOCKS, LENGTH).values() for block in blocks]
    task, general = (example_losses(model, examples, 32, tokenizer.pad_token_id)[0].tolist() for examples in (verses, text))
    return rounded({"task": task, "general": general})


@dataclass(frozen=True)
class Fresh:
    """A method before its first step, as a seed starts it."""

    method: str
    seed: int


FRESH = [Fresh(method, seed) for method in ("prompt", "prefix") for seed in SEEDS]


def answered(fresh: Fresh) -> Row:
    """Which of the general items it answers right."""
    model, tokenizer = base()
    found = evaluate(METHODS[fresh.method].prepare(model, 1, fresh.seed), tokenizer, general_cloze(), batch_size=64).details
    return {"cloze": [int(np.argmax(one["logprobs"]) == one["answer"]) for one in found]}


CHANGES = {"full": NONE.start, "full, half the rate": replace(NONE.start, rate=NONE.start.rate / 2)}
CHANGES["LoRA"] = replace(NONE.start, method="lora", rate=3e-3)  # as the league tuned it


@dataclass(frozen=True)
class Change:
    """What training of a seed, as in CHANGES, has added to the base, or in its place random numbers of the same norm in every matrix."""

    of: str
    random: bool
    seed: int


DRAWN = [Change(of, random, seed) for seed in SEEDS for of in CHANGES for random in (False, True)]
READ, WRITTEN = 16, 32  # tokens


def log_probabilities(model: Any, ids: np.ndarray) -> np.ndarray:
    """log p of every token at each written position: [texts, WRITTEN, vocabulary]."""
    with mp.no_grad():
        parts = [to_numpy(mp.functional.log_softmax(model(part)[:, READ - 1 : -1]).data) for part in np.array_split(ids, 16)]
    return np.concatenate(parts)


@lru_cache(1)
def written() -> tuple[np.ndarray, np.ndarray]:
    """512 texts, and the base's log-probabilities. It draws WRITTEN tokens after each first READ of held-out text, of its four corpora."""
    model, tokenizer = base()
    begun = np.array([block.input_ids for blocks in data.general(128, READ, tokenizer).values() for block in blocks])
    ids = model.generate(begun, max_new_tokens=WRITTEN, temperature=1.0, seed=0)
    return ids, log_probabilities(model, ids)


def diverged(change: Change) -> Row:
    """KL(base || changed), in nats a token, on each of the base's own texts; and the norm of the change, beside the weights'.

    At each position it is summed over the whole vocabulary: of the estimates with the same mean, that varies less than one of the
    drawn token alone.
    """
    tuned = far(replace(CHANGES[change.of], seed=change.seed, split="test"))
    tuned = tuned.merge_and_unload() if isinstance(tuned, mp.PeftModel) else tuned
    model, rng = base()[0].copy(), np.random.default_rng(change.seed)
    squares = []
    for p, q in zip(model.parameters(), tuned.parameters()):
        own, moved = to_numpy(p.data), to_numpy(q.data - p.data)
        squares.append(((own.astype(float) ** 2).sum(), (moved.astype(float) ** 2).sum()))
        noise = rng.standard_normal(own.shape)
        if change.random:
            moved = noise * np.linalg.norm(moved) / np.linalg.norm(noise)
        p.data = mp.backend.asarray((own + moved).astype(np.float32))
    ids, before = written()
    kl = (np.exp(before) * (before - log_probabilities(model, ids))).sum(axis=2).mean(axis=1)
    weights, way = np.sqrt(np.sum(squares, axis=0))
    return rounded({"kl": kl.tolist(), "way": float(way / weights)})


def divergence(store: str | os.PathLike) -> dict[tuple[str, bool], tuple[np.ndarray, np.ndarray]]:
    """{(of, random): (KL on each text [seeds, texts], norm of the change beside the weights' [seeds])}."""
    rows = [row for row in read_rows(store) if row["run"] == "Change" and row.get("version") == protocol.version()]
    found = {Change(row["of"], row["random"], row["seed"]): (row["kl"], row["way"]) for row in rows}
    kinds = [(of, random) for of in CHANGES for random in (False, True)]
    return {kind: tuple(map(np.array, zip(*(found[Change(*kind, seed)] for seed in SEEDS)))) for kind in kinds}


def compute(store: str | os.PathLike) -> None:
    """All rows that are missing, computed in this process and added to the store."""
    practice.compute(SEARCHES, store)
    find = protocol.finder(practice.known([*league(MAIN).searches, *SEARCHES], store))
    sweep(read, read_again(find), store)
    sweep(run, WAYS, store)
    sweep(answered, FRESH, store)
    sweep(diverged, DRAWN, store)


def before(store: str | os.PathLike) -> dict[str, np.ndarray]:
    """Which of the general items each method answers right before its first step: {method: [seeds, items]}."""
    rows = [row for row in read_rows(store) if row["run"] == "Fresh" and row.get("version") == protocol.version()]
    found = {Fresh(row["method"], row["seed"]): row["cloze"] for row in rows}
    return {method: np.array([found[Fresh(method, seed)] for seed in SEEDS], float) for method in ("prompt", "prefix")}


def walked(store: str | os.PathLike, key: str) -> dict[float, np.ndarray]:
    """What the rows say at each share of the way: losses [seeds, verses or blocks], in nats. The base has the same under every seed."""
    rows = [row for row in read_rows(store) if row["run"] == "Way" and row.get("version") == protocol.version()]
    found = {Way(row["share"], row["seed"]): row[key] for row in rows}
    at = {share: [found[way] for way in WAYS if way.share == share] for share in sorted({way.share for way in WAYS})}
    return {share: np.array(losses * (len(SEEDS) // len(losses))) for share, losses in at.items()}


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points beside which no other is at least as small in both coordinates and smaller in one, by the first: the Pareto frontier."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def searched(find, methods):
    """({method: {trial: (loss on the task, forgotten)}} of all that searches saw on `rewrite` with 500 examples, on validation; the
    frontier of all, which is printed)."""
    start, points = find(protocol.untrained("rewrite")), {}
    for method in methods:
        seen: dict[Trial, float] = {}
        protocol.tuned(find, protocol.search("rewrite", method, 500), seen)
        rise = {t: float(np.mean([*find(t)["general"].values()]) - np.mean([*start["general"].values()])) for t in seen if find(t)["loss"] is not None}
        points[method] = {t: (seen[t], more) for t, more in rise.items()}
    edge = frontier([(start["loss"], 0.0), *(p for several in points.values() for p in several.values())])
    names = {p: f"{METHODS[method].title} at {t.rate:g}, {t.epochs:g} epochs" for method, several in points.items() for t, p in several.items()}
    print("on the frontier of what the searches saw:", "; ".join(f"{names[p]} ({p[0]:.2f}, {p[1]:+.2f})" for p in edge if p in names))
    return points, edge


def searches_picture(points, edge):
    """Loss on the task and rise of that on general text of all that searches saw {method: {trial: (loss, rise)}}, and the frontier."""
    figure, axis = plt.subplots(figsize=(7, 5.4), layout="constrained")
    for (method, several), color in zip(points.items(), ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")):
        axis.plot(*zip(*several.values()), "o", color=color, markersize=5, alpha=0.8, label=METHODS[method].title)
    axis.step(*np.array(edge).T, where="post", color="black", linewidth=1, alpha=0.7, label="frontier")
    axis.set(xlim=(2.25, 2.68), title="All that the searches saw, one seed each")
    axis.set(xlabel="loss on the task, validation (left is better)", ylabel="forgotten: rise of the loss on general text")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return figure


def remedies_picture(points, level, forgotten):
    """Loss on the task and rise of that on general text {name: ((value, half of its interval), ...)}, beside the way from the base.

    level: {share of the way: loss on the task}; forgotten: {share: rise [seeds]}."""
    figure, axis = plt.subplots(figsize=(7, 5.4), layout="constrained")
    at = [each.mean() for each in forgotten.values()]
    axis.plot(list(level.values()), at, "o-", color="0.6", markersize=4, label="full, tuned: the way from the base")
    for (t, x), y in zip(level.items(), at):
        if 0 < t < 1:
            axis.annotate(f"{t:.0%}", (x, y), xytext=(7, 3), textcoords="offset points", fontsize=8)
    colors = {"full": "#0072B2", "half": "#56B4E9", "LoRA": "#D55E00", "L2-SP": "#009E73", "replay": "#CC79A7", "weight": "#333333"}
    for i, (name, ((x, across), (y, up))) in enumerate(points.items()):
        color = colors[name.replace(",", " ").split()[0]]
        axis.errorbar(x, y, up, across, marker="oD^sPv<>d"[i], color=color, linestyle="", markersize=7, label=name)
    axis.set(title="Remedies, and the way back: five seeds, 95 % intervals", ylabel="forgotten: rise of the loss on general text")
    axis.set(xlabel="loss on the task, test (left is better)", xlim=(2.3, 3.6))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return figure
