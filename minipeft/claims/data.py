"""The two tasks of the protocol, and the kinds of training examples that are put on trial.

    rewrite   a verse of the King James Bible -> the same verse in Basic English
    source    a sentence -> which of three books it is from, as many from each

Of either, training examples are drawn from the split "train" by a seed, and of what kind they are has a name:

    drawn                as they come
    random:S             a share S of them has the answer of another one
    systematic:S         ... the same wrong answer always: the verse as it is; the book that follows in the alphabet
    off-topic:S          ... is a record of the dictionary instead
    easy, hard, mixed    of three times as many, the third whose loss on the base is lowest; highest; half of each. Of a
                         task with choices, a third of each right answer's: the base likes some answers better
    skewed:S             "source" with a share S from one book, the rest from the others
    oversampled:S        the same examples, those of the others repeated until each book has as many
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..experiments.shipped import base, spaced
from ..text.corpora import general_corpora
from ..text.datasets import Completion
from ..text.examples import Example, chunk_text, encode_documents, encode_examples
from ..text.tasks import CHOICES
from ..text.tasks import task as records_of
from ..train.evaluation import example_losses

TASKS = ("rewrite", "source")
CHARACTERS = 260  # of a record of "rewrite"
LENGTH = 512  # tokens of an example at most


class Question(NamedTuple):
    """A record of a task; of a checked task, with the answers to choose from."""

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()


@cache
def questions(task: str, split: str) -> list[Question]:
    """All records of a task in a split, in the order of the corpora. Raises ValueError for another task."""
    if task not in TASKS:
        raise ValueError(f"the tasks are {' and '.join(TASKS)}, got {task!r}")
    found = [Question(*record, CHOICES.get(task, ())) for record in records_of(task, split)]
    return [q for q in found if q.choices or len(q.prompt + q.completion) <= CHARACTERS]


def encode(asked: Iterable[Question], tokenizer: Any = None) -> list[Example]:
    """As examples whose labels are the completions; of the base's tokens, or another tokenizer's."""
    return encode_examples([Completion(q.prompt, q.completion) for q in asked], tokenizer or base()[1], LENGTH).examples


def asked(task: str, split: str, n: int, shots: int = 0) -> list[Question]:
    """`n` records of a split, evenly spaced; each with the same `shots` training records and their answers before it."""
    shown = "".join(f"{q.prompt}{q.completion}\n\n" for q in spaced(questions(task, "train"), shots)) if shots else ""
    return [q._replace(prompt=shown + q.prompt) for q in spaced(questions(task, split), n)]


def drawn(task: str, n: int, seed: int, kind: str = "drawn", tokenizer: Any = None) -> list[Example]:
    """`n` examples to learn from, which the seed draws. Raises ValueError for another kind."""
    rng, pool = np.random.default_rng(seed), questions(task, "train")
    order, (kind, _, share) = rng.permutation(len(pool)), kind.partition(":")
    chosen = [pool[i] for i in order[:n]]
    if kind in ("easy", "hard", "mixed"):
        return encode(_by_difficulty([pool[i] for i in order[: 3 * n]], n, kind))
    if kind in ("skewed", "oversampled"):
        chosen = _skewed([pool[i] for i in order], n, float(share), kind == "oversampled")
    elif kind in ("random", "systematic", "off-topic"):
        wrong = range(n - round(float(share) * n), n)  # the last, so that a smaller number of clean ones is the clean part
        chosen = _wrong(task, chosen, wrong, kind)
    elif kind != "drawn":
        raise ValueError(f"there are no {kind!r} examples; see minipeft.claims.data")
    return encode(chosen, tokenizer)


def _wrong(task: str, chosen: list[Question], wrong: Sequence[int], kind: str) -> list[Question]:
    """The records with those of the numbers `wrong` spoiled."""
    answers = [q.completion for q in chosen]
    words = spaced(records_of("define", "train"), len(wrong))
    for k, i in enumerate(wrong):
        q = chosen[i]
        if kind == "off-topic":
            chosen[i] = Question(*words[k])
        elif kind == "random":
            others = (answers[j] for j in (*wrong[k + 1 :], *wrong[:k]) if answers[j] != q.completion)
            chosen[i] = q._replace(completion=next(others, q.completion))
        elif q.choices:
            chosen[i] = q._replace(completion=q.choices[(q.choices.index(q.completion) + 1) % len(q.choices)])
        else:
            chosen[i] = q._replace(completion=q.prompt.removeprefix("King James:").removesuffix("\nPlain English:"))
    return chosen


def _by_difficulty(pool: list[Question], n: int, kind: str) -> list[Question]:
    """Of a pool, the n records that are easiest for the base, the n hardest, or every second of both; of each answer's
    own records where there are choices."""
    model, tokenizer = base()
    nll, tokens = example_losses(model, encode(pool), 32, tokenizer.pad_token_id)
    order, chosen = np.argsort(nll / tokens, kind="stable"), []
    answers = sorted({q.completion for q in pool}) if pool[0].choices else [None]
    for answer in answers:
        own = [pool[i] for i in order if answer in (None, pool[i].completion)]
        k = round(n / len(pool) * len(own))
        easy, hard = own[:k], own[-k:]
        chosen += {"easy": easy, "hard": hard, "mixed": (easy[::2] + hard[::2])[:k]}[kind]
    return chosen


def _skewed(pool: list[Question], n: int, share: float, level: bool) -> list[Question]:
    """n records, round(share n) of them of the first book, the rest of the others in equal parts; `level` repeats those
    of the others until there are as many of each as of the first."""
    books = pool[0].choices
    counts = [round(share * n), *[round((1 - share) * n / (len(books) - 1))] * (len(books) - 1)]
    of = [[q for q in pool if q.completion == book][:count] for book, count in zip(books, counts)]
    if level:
        of = [(own * -(-counts[0] // len(own)))[: counts[0]] for own in of]
    return [q for own in of for q in own]


@cache
def general(n: int, length: int, tokenizer: Any = None) -> dict[str, list[Example]]:
    """`n` whole held-out blocks of each of the base's own corpora."""
    tokenizer = tokenizer or base()[1]
    streams = {name: encode_documents(texts, tokenizer) for name, texts in general_corpora("validation").items()}
    return {name: [Example(b, b) for b in spaced(chunk_text(ids, length)[:-1], n)] for name, ids in streams.items()}
