"""General items for the shipped base, to measure on a task what fine-tuning forgets: which words go on with a passage?

    question   the 24 words before a place in a held-out document (fewer where it begins; at least 5)
    right      the words that follow there, TOKENS tokens of the shipped tokenizer together
    wrong      the words, of as many tokens, that follow at other places of the same corpus

The documents are those of the split "test", which the base has not been trained on, of all corpora that it was trained
on, the same number of items from each. A passage whose last EXACT words stand in the training text as well is left out:
Kings and Chronicles, and the Gospels, tell some things in the same words. The base is right in 71 % of the items (acc),
where guessing is right in 25 %. The text of the items is the same for every model.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate

import numpy as np

from ..hub.base import BASE
from ..text.corpora import general_corpora
from ..text.datasets import MultipleChoice
from ..text.tokenizer import Tokenizer

CONTEXT, LEAST, TOKENS = 24, 5, 6  # words of a question, at most and at least; tokens of a choice
EXACT = 8
PER_CORPUS, CHOICES = 160, 4

Passage = tuple[str, str]  # what stands there, and how it goes on


@cache
def general_cloze() -> list[MultipleChoice]:
    """640 items of 4 choices, the corpora in turn, so that the first of them are a fair sample too."""
    tokenizer, rng, corpora = Tokenizer.load(BASE), np.random.default_rng(0), []
    training = general_corpora("train")
    for name, documents in general_corpora("test").items():
        found = _new(_passages(documents, tokenizer), training[name])
        drawn = [found[i] for i in rng.permutation(len(found))[:PER_CORPUS]]
        corpora.append([_item(passage, drawn, rng) for passage in drawn])
    return [item for items in zip(*corpora) for item in items]


def _passages(documents: list[str], tokenizer: Tokenizer) -> list[Passage]:
    """All passages at equal distances, which do not overlap, that go on with whole words of TOKENS tokens in sum."""
    texts = [document.split() for document in documents]
    known = sorted({word for words in texts for word in words})
    length = dict(zip(known, map(len, tokenizer.encode_batch([f" {word}" for word in known]))))
    found = []
    for words in texts:
        for at in range(LEAST, len(words), CONTEXT + TOKENS):
            ends = list(accumulate(length[word] for word in words[at : at + TOKENS]))
            if TOKENS in ends:
                right = words[at : at + ends.index(TOKENS) + 1]
                found.append((" ".join(words[max(0, at - CONTEXT) : at]), " ".join(right)))
    return found


def _new(passages: list[Passage], training: list[str]) -> list[Passage]:
    """Those whose last EXACT words do not follow each other anywhere in the training text."""
    ends = [tuple(f"{question} {right}".split()[-EXACT:]) for question, right in passages]
    known, wanted = set(), set(ends)
    for words in map(str.split, training):
        known.update(wanted.intersection(zip(*(words[k:] for k in range(EXACT)))))
    return [passage for passage, end in zip(passages, ends) if end not in known]


def _item(passage: Passage, passages: list[Passage], rng: np.random.Generator) -> MultipleChoice:
    """The passage, its continuation and those of others, in a random order."""
    question, right = passage
    others = sorted({own for _, own in passages} - {right})
    choices = [right, *(others[k] for k in rng.permutation(len(others))[: CHOICES - 1])]
    order = rng.permutation(CHOICES).tolist()
    return MultipleChoice(question, tuple(choices[k] for k in order), order.index(0))
