"""The experiments' base, task and general text: all shipped, so that every row can be computed again anywhere.

The task is Lesson 3's: verses of the King James Bible into Basic English, short ones, so that a run takes seconds.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ..hub.base import load_base
from ..options import configuration, option
from ..text.corpora import general_text
from ..text.datasets import Completion
from ..text.examples import Example, chunk_text, encode_documents, encode_examples
from ..text.tasks import task
from .rows import mapped
from .run import Settings, TaskData, evaluate

CHARACTERS = 190  # of prompt and completion
HELD_OUT_VERSES = 96  # verses of the validation split
BLOCKS = 48  # blocks of held-out general text
LENGTH = 128  # tokens of such a block
REPLAY = 64  # tokens of a block of general text to be replayed: about as long as a verse with its prompt

base = cache(load_base)


def spaced(items: list[Any], n: int) -> list[Any]:
    """At most `n` of them, evenly spaced."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(n, len(items))).astype(int)]


@cache
def short(name: str, split: str) -> list[Completion]:
    """The records of a shipped task that are short: of "rewrite" one in four, of the others nearly all."""
    return [record for record in task(name, split) if len(record.prompt + record.completion) <= CHARACTERS]


def verses(split: str) -> list[Completion]:
    """The short records of the task "rewrite"."""
    return short("rewrite", split)


@cache
def general_blocks(tokenizer: Any, length: int, n: int, split: str = "validation") -> list[Example]:
    """`n` blocks of a split of the base's own training text, evenly spaced through it."""
    ids = _encoded(tokenizer, split, 20 * n if split == "train" else None)  # 14.7 million tokens: only some are encoded
    return [Example(block, block) for block in spaced(chunk_text(ids, length), n)]


@cache
def _encoded(tokenizer: Any, split: str, documents: int | None) -> np.ndarray:
    """The token stream of general text: of all its documents, or of a number of them, evenly spaced."""
    texts = general_text(split)
    return encode_documents(texts if documents is None else spaced(texts, documents), tokenizer)


@cache
def _held_out(verses_: int, blocks: int) -> tuple[list[Example], list[Example]]:
    tokenizer = base()[1]
    held_out = encode_examples(spaced(verses("validation"), verses_), tokenizer, 2 * LENGTH).examples
    return held_out, general_blocks(tokenizer, LENGTH, blocks)


def rewriting(examples: int, seed: int, held_out: int = HELD_OUT_VERSES, blocks: int = BLOCKS) -> TaskData:
    """`examples` training verses, chosen by the seed; the held-out ones are always the same."""
    tokenizer = base()[1]
    order = np.random.default_rng(seed).permutation(len(verses("train")))[:examples]
    train = encode_examples([verses("train")[i] for i in order], tokenizer, 2 * LENGTH).examples
    return TaskData(train, *_held_out(held_out, blocks), [], tokenizer.pad_token_id)


@configuration(frozen=True)
class Rewriting(Settings):
    """A run on the task, whose data are settings too."""

    held_out: int = option(HELD_OUT_VERSES, "verses that are evaluated on", least=1)
    blocks: int = option(BLOCKS, "blocks of general text that are evaluated on", least=1)


def data(s: Rewriting) -> TaskData:
    """What a run learns from, as many verses as its steps take, and what it is judged by."""
    return rewriting(s.steps * s.batch_size, s.seed, s.held_out, s.blocks)


@cache
def before(held_out: int = HELD_OUT_VERSES, blocks: int = BLOCKS) -> tuple[float, float]:
    """(task loss, general loss) of the base as it is, in nats per token."""
    return evaluate(base()[0], rewriting(1, 0, held_out, blocks))


def rounded(value: Any) -> Any:
    """Floats to five decimals, in lists and dictionaries too: more is noise of the machine."""
    return mapped(value, lambda x: round(x, 5) if isinstance(x, float) else x)
