"""Advice about fine-tuning, as experiments: what to run for each piece of it, and what the rows say of it.

Every setting is run with three seeds, which choose the data, its order and an adapter's start. A difference counts where
it is clear (`seeds.below`): the 95 % confidence interval of its mean excludes 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minipeft.autograd.tensor import no_grad
from minipeft.experiments import shipped
from minipeft.experiments.rows import Row
from minipeft.experiments.seeds import SEEDS, below, over_seeds, spread
from minipeft.experiments.shipped import Rewriting
from minipeft.nn.heads import SequenceClassifier
from minipeft.text.corpora import wordnet
from minipeft.train import Batch, Trainer, TrainingArguments

TESTS = 8 if os.environ.get("MINIPEFT_REDUCED") == "1" else 200  # held-out glosses of each class
RATES = {
    "full": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "bottleneck": (3e-3, 1e-2),
    "prefix": (3e-3, 1e-2),
    "prompt": (1e-2, 3e-2),
}


@dataclass(frozen=True)
class Classification:
    """A noun's gloss or a verb's? A classifier on the base, from a training set that may be out of balance.

    majority      share of the glosses that are nouns'
    oversampled   whether the verbs' are repeated until both classes are equally frequent
    """

    majority: float = 0.5
    oversampled: bool = False
    examples: int = 320
    steps: int = 40
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0


def learning_rate(seeds: tuple[int, ...] = SEEDS) -> list[Any]:
    """Full fine-tuning and LoRA, each over its grid of rates."""
    return [Rewriting(method, rate, seed=seed) for method in ("full", "lora") for rate in RATES[method] for seed in seeds]


def batch_size(seeds: tuple[int, ...] = SEEDS) -> list[Any]:
    """The same 640 examples in few large steps or many small ones, at three rates; and large steps in parts."""
    sizes = {4: 160, 16: 40, 64: 10}
    whole = [
        Rewriting(learning_rate=rate, steps=steps, batch_size=size, seed=seed)
        for size, steps in sizes.items() for rate in (3e-4, 1e-3, 3e-3) for seed in seeds
    ]  # fmt: skip
    return whole + [replace(s, accumulation=4) for s in whole if s.batch_size == 16 and s.learning_rate == 1e-3]


def epochs(seeds: tuple[int, ...] = SEEDS) -> list[Any]:
    """96 examples, sixteen times over."""
    common = Rewriting(steps=96, examples=96, evaluations=16)
    return [
        replace(common, method=method, learning_rate=rate, seed=seed)
        for method, rate in (("full", 1e-3), ("lora", 3e-3)) for seed in seeds
    ]  # fmt: skip


def warm_up(seeds: tuple[int, ...] = SEEDS) -> list[Any]:
    """No warm-up, 5 and 10 % of the steps, at a usual rate and at one that is too high."""
    shares = (0.0, 0.05, 0.1)
    return [Rewriting("full", rate, warmup=w, seed=seed) for rate in (1e-3, 1e-2) for w in shares for seed in seeds]


def data_quality(seeds: tuple[int, ...] = SEEDS) -> list[Any]:
    """160 examples, or four times as many, of which a share is wrong, for the same number of steps."""
    cases = ((160, 0.0), (640, 0.0), (640, 0.25), (640, 0.5))
    return [Rewriting(learning_rate=1e-3, examples=n, noise=noise, seed=seed) for n, noise in cases for seed in seeds]


def class_balance(seeds: tuple[int, ...] = SEEDS) -> list[Any]:
    """Training sets of one size: balanced, out of balance, and then oversampled."""
    cases = ((0.5, False), (0.9, False), (0.9, True))
    return [Classification(majority, oversampled, seed=seed) for majority, oversampled in cases for seed in seeds]


EXPERIMENTS = (learning_rate, batch_size, epochs, warm_up, data_quality, class_balance)
RUNS = sorted((s for runs in EXPERIMENTS for s in runs()), key=lambda s: s.seed)


def run(settings: Any) -> dict[str, Any]:
    """The row of one of RUNS."""
    return classify(settings) if isinstance(settings, Classification) else shipped.run(settings)


def glosses(split: str, part_of_speech: str) -> list[str]:
    """WordNet's definitions of a part of speech."""
    return [synset.definition for synset in wordnet(split) if synset.part_of_speech == part_of_speech]


def classify(s: Classification) -> dict[str, Any]:
    """Accuracy on as many held-out glosses of nouns as of verbs, and the recall of each."""
    generator, tokenizer = np.random.default_rng(s.seed), shipped.base()[1]
    nouns = round(s.majority * s.examples)
    train = []
    for label, (part_of_speech, n) in enumerate((("noun", nouns), ("verb", s.examples - nouns))):
        found = glosses("train", part_of_speech)
        chosen = generator.permutation(len(found))[:n]
        if s.oversampled and label == 1:
            chosen = np.resize(chosen, nouns)
        train += [(ids, label) for ids in tokenizer.encode_batch([found[i] for i in chosen])]
    tests = [tokenizer.encode_batch(shipped.spaced(glosses("validation", p), TESTS)) for p in ("noun", "verb")]

    def collate(rows: list[tuple[list[int], int]]) -> Batch:
        ids, mask = tokenizer.pad([ids for ids, _ in rows])
        labels = np.array([label for _, label in rows])
        return Batch({"input_ids": ids, "attention_mask": mask, "labels": labels}, len(rows), int(mask.sum()))

    model = SequenceClassifier(shipped.base()[0], 2, seed=s.seed)
    arguments = TrainingArguments(
        learning_rate=s.learning_rate, max_steps=s.steps, per_device_train_batch_size=s.batch_size,
        lr_scheduler_type="cosine", warmup_ratio=0.05, seed=s.seed, progress=False,
    )  # fmt: skip
    Trainer(model, train, args=arguments, collate=collate).train()
    recalls = []
    for label, texts in enumerate(tests):
        batches = [collate([(ids, label) for ids in texts[i : i + 50]]) for i in range(0, len(texts), 50)]
        recalls.append(float(np.mean(np.concatenate([predict(model, batch) for batch in batches]) == label)))
    return {"accuracy": sum(recalls) / 2, "recall_nouns": recalls[0], "recall_verbs": recalls[1]}


def predict(model: SequenceClassifier, batch: Batch) -> np.ndarray:
    """The most probable class of each row."""
    ids, mask = batch.arguments["input_ids"], batch.arguments["attention_mask"]
    with no_grad():
        return model(ids, mask).numpy().argmax(axis=-1)


# ------------------------------------------------------------------------------------------------ what the rows say


@dataclass(frozen=True)
class Advice:
    """A piece of advice beside what was measured; `agrees` is None where no difference is clear."""

    topic: str
    advice: str
    measured: str
    agrees: bool | None

    @property
    def verdict(self) -> str:
        return {True: "as advised", False: "NOT as advised", None: "undecided"}[self.agrees]


def best(rows: Sequence[Row], candidates: Sequence[Any]) -> Any:
    """The settings, of those given (seeds aside), whose mean held-out loss on the task is lowest."""
    means = [over_seeds(rows, s).mean() for s in candidates]
    return candidates[int(np.nanargmin(means))]


def lowest(losses: dict[Any, np.ndarray]) -> list[Any]:
    """Of losses [seeds] by name: the name of the one whose mean is lowest, and of those that are not clearly above it."""
    finite = {name: loss for name, loss in losses.items() if np.isfinite(loss).all()}
    least = min(finite.values(), key=np.mean)
    return [name for name, loss in finite.items() if not below(least, loss)]


def best_rates(rows: Sequence[Row], candidates: Sequence[Any]) -> list[float]:
    """The rate of the best settings, and those rates whose loss is not clearly above its."""
    return lowest({s.learning_rate: over_seeds(rows, s) for s in candidates})


def best_epochs(rows: Sequence[Row], settings: Any) -> list[int]:
    """The epoch with the lowest held-out loss, counted from 1, and those that are not clearly above it."""
    curve = over_seeds(rows, settings, "held_out_curve")  # [seeds, epochs]
    return lowest({epoch: losses for epoch, losses in enumerate(curve.T, start=1)})


def find_learning_rate(rows: Sequence[Row]) -> list[Advice]:
    grids = {method: [Rewriting(method, rate) for rate in RATES[method]] for method in ("full", "lora")}
    full, lora = (best_rates(rows, grid) for grid in grids.values())
    within = {4 < b / a < 30 for a in full for b in lora}
    best_of = [" or ".join(f"{rate:g}" for rate in rates) for rates in (full, lora)]
    times = sorted({round(b / a) for a in full for b in lora})
    losses = [over_seeds(rows, best(rows, grids[method])) for method in ("full", "lora")]
    more = below(*losses)
    return [
        Advice(
            "learning rate", "LoRA wants about ten times the rate of full fine-tuning",
            f"best of the grid: full {best_of[0]}, LoRA {best_of[1]}: {' or '.join(map(str, times))} times",
            within.pop() if len(within) == 1 else None,
        ),
        Advice(
            "learning rate", "each at its best rate, LoRA learns as much as full fine-tuning",
            f"LoRA's loss minus full's: {spread(losses[1] - losses[0])}", None if more is None else not more,
        ),
    ]  # fmt: skip


def find_batch_size(rows: Sequence[Row]) -> list[Advice]:
    runs = [s for s in batch_size((0,)) if s.accumulation == 1]
    winner = {size: best(rows, [s for s in runs if s.batch_size == size]) for size in (4, 16, 64)}
    loss = {size: over_seeds(rows, s) for size, s in winner.items()}
    rates = {size: best_rates(rows, [s for s in runs if s.batch_size == size]) for size in winner}
    parts = [s for s in batch_size((0,)) if s.accumulation > 1]
    apart = max(np.abs(over_seeds(rows, s) - over_seeds(rows, replace(s, accumulation=1))).max() for s in parts)
    return [
        Advice(
            "batch size", "a larger batch wants a larger rate",
            "best rate " + ", ".join(f"{' or '.join(f'{r:g}' for r in several)} at {n}" for n, several in rates.items()),
            True if min(rates[64]) > max(rates[4]) else False if max(rates[64]) < min(rates[4]) else None,
        ),
        Advice(
            "batch size", "of the same examples, small batches teach more",
            ", ".join(f"{spread(loss[size])} at {size}" for size in loss) + f"; {spread(loss[64] - loss[4])} more at 64 than at 4",
            below(loss[4], loss[64]),
        ),
        Advice(
            "accumulation", "a batch in four parts is the same as a whole one",
            f"the losses differ by {apart:.5f} at most", bool(apart < 0.005),
        ),
    ]  # fmt: skip


def find_epochs(rows: Sequence[Row]) -> list[Advice]:
    found = []
    for s in epochs((0,)):
        found_best = best_epochs(rows, s)
        held_out, training = (over_seeds(rows, s, f"{part}_curve") for part in ("held_out", "train"))  # [seeds, epochs]
        gap, rise = held_out[:, -1] - training[:, -1], held_out[:, -1] - held_out[:, held_out.mean(axis=0).argmin()]
        found.append(
            Advice(
                "epochs", "held-out loss is lowest after one to three epochs, then it rises",
                f"{s.method}, {s.examples} examples: lowest after epoch {' or '.join(map(str, found_best))}; after 16 it is "
                f"{spread(rise)} above the lowest, and {spread(gap)} above training",
                True if max(found_best) <= 3 else False if min(found_best) > 3 else None,
            )
        )  # fmt: skip
    return found


def find_warm_up(rows: Sequence[Row]) -> list[Advice]:
    found = []
    for s in (s for s in warm_up((0,)) if s.warmup == 0):
        loss = {share: over_seeds(rows, replace(s, warmup=share)) for share in (0.0, 0.05, 0.1)}
        change = (loss[0.05] + loss[0.1]) / 2 - loss[0.0]
        found.append(
            Advice(
                "warm-up", f"5 to 10 % of warm-up helps, at the rate {s.learning_rate:g}",
                f"{spread(loss[0.0])} without; change {spread(loss[0.05] - loss[0.0])} by 5%, "
                f"{spread(loss[0.1] - loss[0.0])} by 10%, {spread(change)} on average",
                below(change, np.zeros_like(change)),
            )
        )  # fmt: skip
    return found


def find_data_quality(rows: Sequence[Row]) -> list[Advice]:
    common = Rewriting(learning_rate=1e-3)
    few = over_seeds(rows, replace(common, examples=160))
    found = []
    for noise in (0.25, 0.5):
        many = over_seeds(rows, replace(common, examples=640, noise=noise))
        found.append(
            Advice(
                "data", f"few clean examples beat four times as many of which {noise:.0%} are wrong, in as many steps",
                f"160 clean {spread(few)}, 640 with {noise:.0%} wrong {spread(many)}: {spread(many - few)} more",
                below(few, many),
            )
        )  # fmt: skip
    return found


def find_class_balance(rows: Sequence[Row]) -> list[Advice]:
    cases = (Classification(), Classification(0.9), Classification(0.9, True))
    even, skewed, repeated = (over_seeds(rows, s, "accuracy") for s in cases)
    return [
        Advice(
            "balance", "90% of one class costs the other",
            f"balanced accuracy {spread(even)} from even classes, a change of {spread(skewed - even)}", below(skewed, even),
        ),
        Advice(
            "balance", "repeating the rare class helps",
            f"balanced accuracy {spread(skewed)} without, a change of {spread(repeated - skewed)}", below(skewed, repeated),
        ),
    ]  # fmt: skip


FINDERS: tuple[Callable[[Sequence[Row]], list[Advice]], ...] = (
    find_learning_rate, find_batch_size, find_epochs, find_warm_up, find_data_quality, find_class_balance,
)  # fmt: skip


def findings(rows: Sequence[Row]) -> list[Advice]:
    """Everything that the rows of RUNS say, each verdict computed from them."""
    return [finding for find in FINDERS for finding in find(rows)]
