"""The one protocol by which methods are compared: equal tuning on validation, then a report on test under other seeds.

    a trial     a method learns a task from `examples` records that the seed draws, at a rate, for some epochs, in batches
    tuning      on a lattice: rate x 2, epochs x 2, batch x 2. From the method's usual rate the search goes to a better
                neighbor, on one axis after the other, until none is better by LEAST (`climb`): every method is tuned by
                the same rule, and the best rate lies inside what was tried. Batches have 1 to 64 examples. Epochs are
                half of one at least, and have an upper end, PASSES, what may be computed (`search` has the exceptions);
                where a search ends there, one trial with twice as many tells whether it would go on (`beyond`).
                Judged by the loss on validation under one seed, TUNING, the same for all neighbors; the loss also
                where choices are counted later, as 256 records tell losses better apart.
    report      the chosen trial under the five SEEDS, each with examples, start and order of its own, on ITEMS of the
                test split, item by item. Nothing was chosen by them.
    difference  of two methods: over seeds and items together (`statistics.crossed`)

Two tasks: "rewrite", verses of the King James Bible into Basic English, judged by the loss in nats per token; and
"source", which of three books a sentence is from, judged by the share of sentences, as many of each book, whose right book
has the highest log-probability. Everything is shipped, so that each row can be computed again anywhere.

Limit: a search stops where no neighbor is better; a setting farther off may be. (On 500 examples of "rewrite" LoRA
would be better by 0.015 nats, [0.010, 0.019] on test, at half its rate in batches of 1. From there its search goes on,
by validation, to a quarter, where it is better by 0.007 on test. The searches of QLoRA, DoRA and AdaLoRA, begun there,
too, and that of full fine-tuning from half of its own rate find 0.003 (undecided), 0.009, 0.008 and 0.010 more on test;
who leads whom stays as it was, by up to 0.008 more or less. Three other settings are worse on validation than a trial
that another search made: full fine-tuning's by 0.007, "rewrite", 50 examples; on "source", 500, a prefix's by 0.005 and
that of a prompt from random numbers by 0.012. Where more epochs than allowed would be better, `beyond` says so.)
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..evaluation import evaluate
from ..evaluation.cloze import general_cloze
from ..evaluation.intervals import Estimate
from ..experiments.rows import Row, failed, read_rows
from ..experiments.run import Settings, TaskData, fine_tune
from ..experiments.shipped import REPLAY, base, general_blocks, rounded
from ..experiments.sweep import sweep
from ..hub.base import BASE
from ..nn.transformer import Transformer
from ..peft.loftq import get_loftq_model
from ..peft.methods import METHODS, Method
from ..text.datasets import MultipleChoice
from ..text.examples import Example
from ..train.evaluation import example_losses
from . import data
from .statistics import crossed

TUNING, SEEDS = 0, (1, 2, 3, 4, 5)
VALIDATION, ITEMS = 256, {"rewrite": 512, "source": 768}  # records of validation; and of test, all that "source" has
LEAST = 0.002  # nats per token: a neighbor that is better by less is not better
ROOM = 0.02  # nats per token: what counts as equal quality of the task
ALIKE = 0.02, 2.0  # nats per token, and times: equal training losses differ by less than either
NONE = 1e-5  # nats per token: a training loss of less, as rows are rounded
TRIES = 10  # numbers of epochs, in search of an equal training loss
AXES = ("rate", "epochs", "batch_size")
SHOTS = 1, 2, 4  # examples in a prompt
PASSES = {100: (16.0, 64.0), 1000: (2.0, 16.0), 10000: (0.5, 4.0)}  # examples at most: epochs to begin with, and at most
BATCHES = 1, 64  # examples of a batch, least and most
BLOCKS, LENGTH = 16, 128  # of held-out general text, of each corpus


@dataclass(frozen=True)
class Trial:
    """What a row is the result of. `rate` None: nothing is trained, "base", or "few-shot" with the examples in the prompt.

    data         which examples, see `data.drawn`
    the rest     as in `experiments.Settings`
    """

    task: str
    method: str
    examples: int
    rate: float | None = None
    epochs: float = 0
    batch_size: int = 0
    seed: int = 0
    split: str = "validation"
    data: str = "drawn"
    warmup: float = 0.05
    weight_decay: float = 0.0
    dropout: float = 0.0
    replay: float = 0.0
    l2_start: float = 0.0

    @property
    def steps(self) -> int:
        return max(1, round(self.epochs * self.examples / self.batch_size))

    @property
    def start(self) -> Trial:
        """Itself: every `Choice` has a start."""
        return self


Find = Callable[[Trial], Row | None]


def trial_of(row: Mapping[str, Any]) -> Trial:
    """What a row is the result of."""
    return Trial(**{name: row[name] for name in Trial.__dataclass_fields__})


def finder(rows: Iterable[Row]) -> Find:
    """From a trial to its first row that did not fail, None where there is none."""
    return {trial_of(row): row for row in reversed([*rows]) if not failed(row)}.get


class Search(NamedTuple):
    """Where the tuning of something begins, what is tuned, and the epochs at most. Two searches that differ in one thing
    are a comparison."""

    start: Trial
    axes: tuple[str, ...]
    most: float


def epochs_of(examples: int) -> tuple[float, float]:
    """(epochs to begin with, epochs at most), of PASSES. Raises ValueError for more examples than it has."""
    for most, epochs in PASSES.items():
        if examples <= most:
            return epochs
    raise ValueError(f"searches have at most {max(PASSES):,} examples, got {examples:,}")


class Gentle(NamedTuple):
    """Methods are compared in what they forget at equal quality of the task: of the trials that a search saw whose loss on
    validation is at most ROOM above that of the worse of two tuned methods, the one with the lowest loss on general text.
    Nothing more is searched for."""

    of: Search
    beside: Search

    @property
    def start(self) -> Trial:
        return self.of.start


class Fits(NamedTuple):
    """Chosen by the training loss (its mean over the last quarter of the steps), under TUNING; validation has no say. Of the trials
    that a search saw, the one with the lowest; with `like`, the one whose training loss is nearest that of another choice (in its
    logarithm), for as many epochs as make the two equal: halved or doubled until they lie on both sides, then the geometric mean,
    at most TRIES in all. (Where epochs are no axis of the search, as it is.)"""

    of: Search
    like: Choice | None = None

    @property
    def start(self) -> Trial:
        return self.of.start


class Seen(NamedTuple):
    """Of the trials that searches saw, the best on validation among those of `least` to `most` epochs."""

    of: tuple[Search, ...]
    least: float = 0
    most: float = math.inf

    @property
    def start(self) -> Trial:
        return self.of[0].start


class At(NamedTuple):
    """Another method at the setting that a search ended at: where two differ there, it is not in what their searches found."""

    method: str
    of: Search

    @property
    def start(self) -> Trial:
        return replace(self.of.start, method=self.method)


def search(
    task: str, method: str, examples: int, *, axes: tuple[str, ...] = AXES, longer: float = 1, **fixed: Any
) -> Search:
    """From the method's usual rate, and batches of 8. The epochs are `longer` times PASSES; from random weights four times
    that, as nothing is known yet."""
    rate = TABLE[method].learning_rate if method in TABLE else METHODS["full"].learning_rate
    first, most = (epochs * longer * (4 if method == "scratch" else 1) for epochs in epochs_of(examples))
    begin = {"rate": rate, "epochs": first, "batch_size": 8, "seed": TUNING}
    return Search(Trial(task, method, examples, **begin | fixed), axes, most)


def untrained(task: str, shots: int = 0) -> Trial:
    """The base as it is, or with some examples in its prompt."""
    return Trial(task, "few-shot" if shots else "base", shots, split="test")


# ----------------------------------------------------------------------------------------------------------- the methods


def lora_on(*modules: str, r: int = 8, **options: Any) -> Method:
    """LoRA of one rank on some of the layers, scaled by α / r = 2 as METHODS has it."""
    return METHODS["lora"].with_options(r=r, lora_alpha=2 * r, target_modules=list(modules) or "all-linear", **options)


Q, K, V, O, GATE, UP, DOWN = (f"{name}_proj" for name in "q k v o gate up down".split())


@dataclass(frozen=True)
class LoftQ(Method):
    """QLoRA whose 4-bit weights and first A and B are computed together (`peft.loftq`)."""

    def prepare(self, base: Any, steps: int, seed: int = 0) -> Any:
        return get_loftq_model(base, self.config(steps), seed=seed)


@dataclass(frozen=True)
class SmallPrompt(Method):
    """A prompt that starts at random, cut to the size of the base's embeddings: PEFT's RANDOM has elements of deviation 1."""

    def prepare(self, base: Any, steps: int, seed: int = 0) -> Any:
        model = super().prepare(base, steps, seed)
        embeddings = base.model.embed_tokens.weight.data
        model.prompts["default"].prompt_embeddings.data *= (embeddings**2).mean() ** 0.5  # their root mean square
        return model


_bottleneck, _prompt, _prefix = METHODS["bottleneck"], METHODS["prompt"], METHODS["prefix"]
TABLE: dict[str, Method] = {
    **{name: method for name, method in METHODS.items() if name != "bitfit"},  # the base has no bias to train
    "rslora": lora_on(use_rslora=True),
    "olora": lora_on(init_lora_weights="olora"),
    "loftq": LoftQ(METHODS["qlora"].label, "LORA", METHODS["qlora"].options, quantized=True),
    "pfeiffer": _bottleneck.with_options(placement="pfeiffer", bottleneck_size=32),
    # without He et al.'s factor of 4, so that it differs from "pfeiffer" in its place alone
    "parallel": _bottleneck.with_options(placement="parallel", bottleneck_size=32, scaling=1.0),
    "prompt-random": _prompt.with_options(prompt_tuning_init="RANDOM"),
    "prompt-small": SmallPrompt(_prompt.label, _prompt.kind, _prompt.options | {"prompt_tuning_init": "RANDOM"}),
    "prefix-direct": _prefix.with_options(prefix_projection=False),
    **{f"lora-r{r}": lora_on(r=r) for r in (1, 2, 4, 16, 32, 64)},
    **{f"lora-alpha{alpha}": lora_on().with_options(lora_alpha=alpha) for alpha in (4, 64)},
    "lora-q": lora_on(Q), "lora-v": lora_on(V), "lora-qv": lora_on(Q, V), "lora-qkvo": lora_on(Q, K, V, O),
    "lora-mlp": lora_on(GATE, UP, DOWN),
    # as many parameters as rank 8 on all layers, and as rank 1: `test_claims_protocol` counts
    "lora-qv-r43": lora_on(Q, V, r=43), "bottleneck-m37": _bottleneck.with_options(bottleneck_size=37),
    "bottleneck-m4": _bottleneck.with_options(bottleneck_size=4),
    **{f"bottleneck-{f}": _bottleneck.with_options(non_linearity=f) for f in ("gelu", "silu")},
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- a trial


@np.errstate(over="ignore", invalid="ignore")  # of what diverges
def run(trial: Trial) -> Row:
    """The row of a trial, flat and rounded; what diverged has None in the place of losses.

    loss, accuracy     on VALIDATION records: nats per token; the share of right choices (checked tasks)
    train_loss         mean over the last quarter of the steps
    trainable          parameters
    storage            bytes on the disk
    general            loss on the held-out text of each corpus

    and of the split "test", item by item:

    nll, right         [ITEMS] nats of an answer in sum over its tokens; whether the right choice is the likeliest
    cloze              [640] whether the general items (`evaluation.cloze`) are answered right
    tokens             [ITEMS] the number of an answer's tokens, in the base's row alone: it is the same for all
    """
    row, model = trained(trial)
    try:
        row |= scores(model, trial) if row.get("train_loss", 0) is not None else {"loss": None}
    except FloatingPointError:  # it diverged in the last step
        row["loss"] = None
    return rounded(row)


def trained(trial: Trial) -> tuple[Row, Any]:
    """(what training alone measures, the model); of a trial without training, nothing and the base."""
    model, tokenizer = base()
    if trial.rate is None:
        return {}, model
    examples = data.drawn(trial.task, trial.examples, trial.seed, trial.data)
    replay = general_blocks(tokenizer, REPLAY, 600, "train") if trial.replay else []
    task = TaskData(examples, examples[:1], examples[:1], replay, tokenizer.pad_token_id)
    method = METHODS["full"] if trial.method == "scratch" else TABLE[trial.method]
    if trial.method == "scratch":
        model = Transformer(model.config, seed=trial.seed)
    settings = Settings(
        learning_rate=trial.rate, steps=trial.steps, batch_size=trial.batch_size, warmup=trial.warmup,
        weight_decay=trial.weight_decay, dropout=trial.dropout, replay=trial.replay, l2_start=trial.l2_start,
        seed=trial.seed,
    )  # fmt: skip
    measured, model = fine_tune(model, task, settings, method, progress=False)
    return {name: measured[name] for name in ("train_loss", "trainable", "storage")}, model


def scores(model: Any, trial: Trial) -> Row:
    """What a row says of the model that a trial has trained, or of another in its place; see `run`."""
    row, shots = _on(model, trial, "validation", VALIDATION), trial.rate is None and trial.examples
    row["loss"] = float(np.sum(row.pop("nll")) / np.sum(row.pop("tokens")))
    if "right" in row:
        row["accuracy"] = float(np.mean(row.pop("right")))
    if not shots:
        row["general"] = {name: _loss(model, blocks) for name, blocks in data.general(BLOCKS, LENGTH).items()}
    if trial.split == "test":
        row |= _on(model, trial, "test", ITEMS[trial.task])
        if trial.method != "base":
            del row["tokens"]
        if not shots:
            row["cloze"] = _right(model, general_cloze())
    return row


def _on(model: Any, trial: Trial, split: str, n: int) -> Row:
    """nll, tokens and right, item by item."""
    asked = data.asked(trial.task, split, n, trial.examples if trial.rate is None else 0)
    nll, tokens = example_losses(model, data.encode(asked), 32, base()[1].pad_token_id)
    row: Row = {"nll": nll.round(3).tolist(), "tokens": tokens.tolist()}
    if asked[0].choices:
        items = [MultipleChoice(q.prompt, list(q.choices), q.choices.index(q.completion)) for q in asked]
        row["right"] = _right(model, items)
    return row


def _right(model: Any, items: Sequence[MultipleChoice]) -> list[int]:
    found = evaluate(model, base()[1], items, batch_size=64).details
    return [int(np.argmax(one["logprobs"]) == one["answer"]) for one in found]


def _loss(model: Any, examples: list[Example]) -> float:
    nll, tokens = example_losses(model, examples, 16, base()[1].pad_token_id)
    return float(nll.sum() / tokens.sum())


# ------------------------------------------------------------------------------------------------------------ the tuning


def climb(
    score: Callable[[Any], float | None], start: Hashable, neighbors: Callable[[Any], list[list[Any]]], least: float = 0.0
) -> tuple[Any, list[Any]]:
    """(where the search stands, the points it has to know next): from `start` to the best neighbor on the first axis that
    has one whose score is lower by `least`, until no axis has. Where the list is empty, the search has ended.

    neighbors    of a point, axis by axis
    score        None for what is not known
    """
    at = start
    if score(at) is None:
        return at, [at]
    while True:
        for points in neighbors(at):
            if unknown := [point for point in points if score(point) is None]:
                return at, unknown
            best = min(points, key=score, default=at)
            if score(best) < score(at) - least:
                at = best
                break
        else:
            return at, []


def neighbors(trial: Trial, axes: tuple[str, ...], most: float) -> list[list[Trial]]:
    """Axis by axis, the trials a factor of 2 away, as far as they are allowed; another batch size has the same epochs."""
    allowed = {
        "rate": lambda rate: True,
        "epochs": lambda epochs: 0.5 <= epochs <= most,
        "batch_size": lambda size: BATCHES[0] <= size <= min(BATCHES[1], trial.examples),
    }
    values = {axis: [type(getattr(trial, axis))(getattr(trial, axis) * f) for f in (0.5, 2)] for axis in axes}
    return [[replace(trial, **{axis: value}) for value in values[axis] if allowed[axis](value)] for axis in axes]


def tuned(find: Find, of: Search, seen: dict[Trial, float] | None = None) -> tuple[Trial, list[Trial]]:
    """(the best trial so far, the trials still to be run to find the best). `seen` receives the losses of all."""
    seen = {} if seen is None else seen

    def score(trial: Trial) -> float | None:
        row = find(trial)
        if row is None:
            return None
        seen[trial] = math.inf if row["loss"] is None else row["loss"]
        return seen[trial]

    return climb(score, of.start, lambda trial: neighbors(trial, of.axes, of.most), LEAST)


Choice = Search | Gentle | Fits | Seen | At | Trial  # how a trial is chosen; one without training, as it is


def chosen(find: Find, of: Choice) -> tuple[Trial, list[Trial]]:
    """(the trial that is reported, the trials still to be run to choose it)."""
    if isinstance(of, Trial):
        return of, []
    if isinstance(of, Search):
        return tuned(find, of)
    if isinstance(of, At):
        best, unknown = tuned(find, of.of)
        return replace(best, method=of.method), unknown
    if isinstance(of, Seen):
        seen: dict[Trial, float] = {}
        unknown = [trial for one in of.of for trial in tuned(find, one, seen)[1]]
        allowed = [trial for trial in seen if of.least <= trial.epochs <= of.most]
        return (of.start if unknown else min(allowed, key=lambda trial: seen[trial])), unknown
    return _fitted(find, of) if isinstance(of, Fits) else _gentlest(find, of)


def _gentlest(find: Find, of: Gentle) -> tuple[Trial, list[Trial]]:
    seen: dict[Trial, float] = {}
    (mine, unknown), (other, more) = tuned(find, of.of, seen), tuned(find, of.beside)
    if unknown or more:
        return mine, unknown + more
    losses = [find(trial)["loss"] for trial in (mine, other)]
    enough = max(math.inf if loss is None else loss for loss in losses) + ROOM
    equal = [trial for trial, loss in seen.items() if loss <= enough]
    kept = [trial for trial in equal if find(trial)["loss"] is not None] or [mine]
    return min(kept, key=lambda trial: (sum(find(trial).get("general", {}).values()), seen[trial])), []


def _fitted(find: Find, of: Fits) -> tuple[Trial, list[Trial]]:
    seen: dict[Trial, float] = {}
    unknown = tuned(find, of.of, seen)[1]
    other, more = (None, []) if of.like is None else chosen(find, of.like)
    if unknown or more:
        return of.start, unknown + more
    fits = {trial: max(fit, NONE) for trial in seen if (fit := find(trial)["train_loss"]) is not None}
    aim = NONE if other is None else find(other)["train_loss"]
    if aim is None:
        return of.start, []
    nearest = min(fits, key=lambda trial: abs(math.log(fits[trial] / max(aim, NONE))), default=of.start)
    as_it_is = other is None or "epochs" not in of.of.axes
    return (nearest, []) if as_it_is else _as_long(find, nearest, max(aim, NONE), of.of.most)


def alike(a: float, b: float, parts: int = 1) -> bool:
    """Whether two training losses are equal: apart by less than both limits of ALIKE, or than these in `parts`."""
    nats, times = ALIKE
    return abs(a - b) < nats / parts and max(a, b) < times ** (1 / parts) * min(a, b)


def _as_long(find: Find, at: Trial, aim: float, most: float) -> tuple[Trial, list[Trial]]:
    """A trial for as many epochs as give this training loss, to a quarter of ALIKE, and the trials that must be known first."""
    losses: dict[float, float] = {}
    shorter, longer, epochs = 0.0, math.inf, at.epochs  # the nearest with a higher training loss, and with a lower
    while 0.5 <= epochs <= most and epochs not in losses and len(losses) < TRIES:
        row = find(replace(at, epochs=epochs))
        if row is None:
            return at, [replace(at, epochs=epochs)]
        if row["train_loss"] is None:  # it diverged
            break
        losses[epochs] = max(row["train_loss"], NONE)
        if alike(losses[epochs], aim, 4):
            break
        shorter, longer = (epochs, longer) if losses[epochs] > aim else (shorter, epochs)
        epochs = 2 * shorter if longer == math.inf else longer / 2 if not shorter else round(math.sqrt(shorter * longer), 2)
    return replace(at, epochs=min(losses, key=lambda epochs: abs(math.log(losses[epochs] / aim)), default=at.epochs)), []


def beyond(of: Choice, best: Trial) -> list[Trial]:
    """Where a search ended at the most epochs allowed, the trial with twice as many at its rate and batch; else nothing."""
    ended = isinstance(of, Search) and "epochs" in of.axes and best.epochs == of.most
    return [replace(best, epochs=2 * best.epochs)] if ended else []


def reported(best: Trial) -> list[Trial]:
    """A trial as it is reported: under SEEDS on test, or, without training, as it is."""
    return [best] if best.rate is None else [replace(best, seed=seed, split="test") for seed in SEEDS]


def wanted(find: Find, searches: Iterable[Choice]) -> list[Trial]:
    """The trials that are needed next: of the tuning, and where it has ended, of the report."""
    trials = []
    for of in searches:
        best, unknown = chosen(find, of)
        trials += unknown or reported(best) + beyond(of, best)
        trials.append(untrained(of.start.task))
    return [trial for trial in dict.fromkeys(trials) if find(trial) is None]


@cache
def version() -> str:
    """Of the rows: another base makes other rows."""
    return hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()[:8]


def compute(searches: Sequence[Choice], store: str | os.PathLike, executor: Any = None, **options: Any) -> list[Row]:
    """All rows of the searches: those in the store, and those that are missing, computed and added, round by round.
    `executor` and the options are those of `experiments.sweep`.

    Raises RuntimeError where a trial fails: its row in the store has the traceback.
    """
    while True:
        rows = [row for row in read_rows(store) if row.get("version") == version()]
        if not (trials := wanted(finder(rows), searches)):
            return rows
        if any(map(failed, sweep(run, trials, executor, store, version(), **options))):
            raise RuntimeError(f"a trial failed; its row in {os.fspath(store)} has the traceback")


# ------------------------------------------------------------------------------------------------------------ the report


class Report(NamedTuple):
    """A tuned method on the test items: values [seeds, items], with the weights [items] of their mean."""

    trial: Trial
    values: np.ndarray
    weights: np.ndarray | None

    @property
    def mean(self) -> Estimate:
        return crossed(self.values, self.weights)


def report(find: Find, of: Choice, key: str = "nll") -> Report | None:
    """What is chosen on every test item under every seed; None where rows are missing.

    key   nll: nats per token; right, cloze: shares
    """
    best, unknown = chosen(find, of)
    before, found = find(untrained(best.task)), [find(trial) for trial in reported(best)]
    if before is None or unknown or None in found or any(row["loss"] is None for row in found):
        return None
    weights = np.array(before["tokens"], float) if key == "nll" else None
    return Report(best, np.array([row[key] for row in found], float), weights)


def difference(a: Report, b: Report, level: float = 0.95) -> Estimate:
    """a - b on the same items, seed by seed; a report without seeds is the same under all: crossed intervals."""
    return crossed(a.values - b.values, a.weights, level)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the rows of a league: `python -m minipeft.claims.protocol STORE --task rewrite --examples 500`."""
    parser = argparse.ArgumentParser(prog="python -m minipeft.claims.protocol", description=main.__doc__)
    parser.add_argument("store", type=Path, help="the JSONL file of rows; what is in it is not computed again")
    parser.add_argument("--task", choices=data.TASKS, default="rewrite")
    parser.add_argument("--examples", type=int, default=500, help="default: %(default)s")
    methods = [*TABLE, "scratch", "few-shot"]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD")
    parser.add_argument("--executor", type=int, help="processes (default: one for each thread)")
    args = parser.parse_args(argv)
    shots: list[Choice] = [untrained(args.task, n) for n in SHOTS if "few-shot" in args.methods]
    compute(shots + [search(args.task, m, args.examples) for m in args.methods if m != "few-shot"], args.store, args.executor)


if __name__ == "__main__":
    main()
