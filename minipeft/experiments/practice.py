"""Advice about fine-tuning, as experiments: what to run for each piece of it, and what the rows say of it.

Every setting is run with three seeds, which choose the data and its order. A difference counts where it has the same
sign under each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..autograd.tensor import no_grad
from ..nn.heads import SequenceClassifier
from ..text.corpora import wordnet
from ..train import Batch, Trainer, TrainingArguments
from . import shipped
from .shipped import Rewriting

SEEDS = (0, 1, 2)
RATES = {
    "full": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "bottleneck": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
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
    """Each method over a grid of rates."""
    return [Rewriting(method, rate, seed=seed) for method in RATES for rate in RATES[method] for seed in seeds]


def batch_size(seeds: tuple[int, ...] = SEEDS) -> list[Any]:
    """The same 640 examples in few large steps or many small ones, at three rates; and large steps in parts."""
    sizes = {4: 160, 16: 40, 64: 10}
    whole = [
        Rewriting(learning_rate=rate, steps=steps, batch_size=size, seed=seed)
        for size, steps in sizes.items() for rate in (3e-4, 1e-3, 3e-3) for seed in seeds
    ]  # fmt: skip
    return whole + [replace(s, accumulation=4) for s in whole if s.batch_size > 4 and s.learning_rate == 1e-3]


def epochs(seeds: tuple[int, ...] = SEEDS) -> list[Any]:
    """96 examples, sixteen times over."""
    common = Rewriting(steps=96, examples=96, evaluations=16)
    return [
        replace(common, method=method, learning_rate=rate, seed=seed)
        for method, rate in (("full", 1e-3), ("lora", 3e-3)) for seed in seeds
    ]  # fmt: skip


def warm_up(seeds: tuple[int, ...] = SEEDS) -> list[Any]:
    """No warm-up, 5 and 10 % of the steps, at a usual rate and at one that is too high."""
    rates = (("full", 1e-3), ("full", 1e-2), ("lora", 3e-3), ("lora", 3e-2))
    return [
        Rewriting(method, rate, warmup=share, seed=seed)
        for method, rate in rates for share in (0.0, 0.05, 0.1) for seed in seeds
    ]  # fmt: skip


def data_quality(seeds: tuple[int, ...] = SEEDS) -> list[Any]:
    """Few examples or four times as many, of which a share is wrong, for the same number of steps."""
    return [
        Rewriting(learning_rate=1e-3, examples=examples, noise=noise, seed=seed)
        for examples in (160, 640) for noise in (0.0, 0.25, 0.5) for seed in seeds
    ]  # fmt: skip


def class_balance(seeds: tuple[int, ...] = SEEDS) -> list[Any]:
    """Training sets of one size, more and more out of balance, as they are and oversampled."""
    cases = ((0.5, False), (0.9, False), (0.9, True), (0.97, False), (0.97, True))
    return [Classification(majority, oversampled, seed=seed) for majority, oversampled in cases for seed in seeds]


EXPERIMENTS = (learning_rate, batch_size, epochs, warm_up, data_quality, class_balance)
RUNS = sorted((s for runs in EXPERIMENTS for s in runs()), key=lambda s: s.seed)


def run(settings: Any) -> dict[str, Any]:
    """The row of one of RUNS."""
    return classify(settings) if isinstance(settings, Classification) else shipped.run(settings)


def glosses(split: str, part_of_speech: str) -> list[list[int]]:
    """WordNet's definitions of a part of speech as token ids."""
    texts = [synset.definition for synset in wordnet(split) if synset.part_of_speech == part_of_speech]
    return shipped.base()[1].encode_batch(texts)


def classify(s: Classification) -> dict[str, Any]:
    """Accuracy on as many held-out glosses of nouns as of verbs, and the recall of each."""
    generator = np.random.default_rng(s.seed)
    nouns = round(s.majority * s.examples)
    train = []
    for label, (part_of_speech, n) in enumerate((("noun", nouns), ("verb", s.examples - nouns))):
        found = glosses("train", part_of_speech)
        chosen = generator.permutation(len(found))[:n]
        if s.oversampled and label == 1:
            chosen = np.resize(chosen, nouns)
        train += [(found[i], label) for i in chosen]
    tests = [(shipped.spaced(glosses("validation", p), 200), label) for label, p in enumerate(("noun", "verb"))]

    def collate(rows: list[tuple[list[int], int]]) -> Batch:
        ids, mask = shipped.base()[1].pad([ids for ids, _ in rows])
        labels = np.array([label for _, label in rows])
        return Batch({"input_ids": ids, "attention_mask": mask, "labels": labels}, len(rows), int(mask.sum()))

    model = SequenceClassifier(shipped.base()[0], 2, seed=s.seed)
    arguments = TrainingArguments(
        learning_rate=s.learning_rate, max_steps=s.steps, per_device_train_batch_size=s.batch_size,
        lr_scheduler_type="cosine", warmup_ratio=0.05, seed=s.seed, progress=False,
    )  # fmt: skip
    Trainer(model, train, args=arguments, collate=collate).train()
    recalls = []
    for texts, label in tests:
        predicted = [predict(model, collate([(text, label) for text in texts[i : i + 50]])) for i in range(0, 200, 50)]
        recalls.append(float(np.mean(np.concatenate(predicted) == label)))
    return {"accuracy": sum(recalls) / 2, "recall_nouns": recalls[0], "recall_verbs": recalls[1]}


def predict(model: SequenceClassifier, batch: Batch) -> np.ndarray:
    """The most probable class of each row."""
    ids, mask = batch.arguments["input_ids"], batch.arguments["attention_mask"]
    with no_grad():
        return model(ids, mask).data.argmax(axis=-1)
