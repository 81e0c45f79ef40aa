"""The experiments' base, task and general text: all shipped, so that every row can be computed again anywhere.

The task is Lesson 3's: verses of the King James Bible into Basic English, short ones, so that a run takes seconds.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from statistics import mean
from typing import Any

import numpy as np

from ..hub.base import load_base
from ..options import configuration, option
from ..text.corpora import general_text
from ..text.datasets import Completion
from ..text.examples import Example, chunk_text, encode_documents, encode_examples
from ..text.tasks import task
from .rows import mapped
from .run import Settings, TaskData, evaluate, fine_tune

CHARACTERS = 190  # of prompt and completion
HELD_OUT_VERSES = 96  # verses of the validation split
BLOCKS = 48  # blocks of held-out general text
LENGTH = 128  # tokens of such a block
REPLAY = 64  # tokens of a block of general text to be replayed: about as long as a verse with its prompt
REPLAYED = 600  # such blocks

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
    documents = general_text(split)
    if split == "train":  # 14.7 million tokens: only some are encoded
        documents = spaced(documents, 20 * n)
    return [Example(block, block) for block in spaced(chunk_text(encode_documents(documents, tokenizer), length), n)]


@cache
def _held_out(verses_: int, blocks: int) -> tuple[list[Example], list[Example]]:
    tokenizer = base()[1]
    held_out = encode_examples(spaced(verses("validation"), verses_), tokenizer, 2 * LENGTH).examples
    return held_out, general_blocks(tokenizer, LENGTH, blocks)


def rewriting(
    examples: int, seed: int, noise: float = 0.0, replay: bool = False, held_out: int = HELD_OUT_VERSES,
    blocks: int = BLOCKS,
) -> TaskData:  # fmt: skip
    """`examples` training verses, chosen by the seed; the held-out ones are always the same.

    noise: the share of them whose completion is that of another one.
    """
    tokenizer = base()[1]
    generator = np.random.default_rng(seed)
    chosen = [verses("train")[i] for i in generator.permutation(len(verses("train")))[:examples]]
    wrong = generator.permutation(len(chosen))[: round(noise * len(chosen))]
    completions = {i: chosen[j].completion for i, j in zip(wrong, np.roll(wrong, 1))}
    records = [Completion(r.prompt, completions.get(i, r.completion)) for i, r in enumerate(chosen)]
    train = encode_examples(records, tokenizer, 2 * LENGTH).examples
    general = general_blocks(tokenizer, REPLAY, REPLAYED, "train") if replay else []
    return TaskData(train, *_held_out(held_out, blocks), general, tokenizer.pad_token_id)


@configuration(frozen=True)
class Rewriting(Settings):
    """A run on the task, whose data are settings too."""

    examples: int | None = option(None, "verses, chosen by the seed (default: as many as the steps take)", least=1)
    noise: float = option(0.0, "share of them whose completion is that of another one", least=0, most=1)
    held_out: int = option(HELD_OUT_VERSES, "verses that are evaluated on", least=1)
    blocks: int = option(BLOCKS, "blocks of general text that are evaluated on", least=1)


def data(s: Rewriting) -> TaskData:
    """What a run learns from and is judged by."""
    n = s.steps * s.batch_size if s.examples is None else s.examples
    return rewriting(n, s.seed, s.noise, s.replay > 0, s.held_out, s.blocks)


@cache
def before(held_out: int = HELD_OUT_VERSES, blocks: int = BLOCKS) -> tuple[float, float]:
    """(task loss, general loss) of the base as it is, in nats per token."""
    return evaluate(base()[0], rewriting(1, 0, held_out=held_out, blocks=blocks))


def run(settings: Rewriting) -> dict[str, Any]:
    """The row of a run, flat and rounded; `forgotten` is the rise of the loss on general text, in nats per token.
    Without the seconds: they depend on the machine. Raises as `fine_tune`.

    Where the held-out loss is measured more than once, both curves are in it, as lists with one value a measurement:
    the training loss as its mean since the one before.
    """
    row, _ = fine_tune(base()[0], data(settings), settings)
    del row["seconds_per_step"]
    general, curve, held_out = row["general_loss"], dict(row.pop("curve")), row.pop("held_out_curve")
    row["forgotten"] = None if general is None else general - before(settings.held_out, settings.blocks)[1]
    if settings.evaluations > 1:
        last = [0, *(step for step, _ in held_out)]
        row["train_curve"] = [mean(curve[i] for i in range(a + 1, b + 1)) for a, b in pairwise(last)]
        row["held_out_curve"] = [loss for _, loss in held_out]
    return rounded(row)


def rounded(value: Any) -> Any:
    """Floats to five decimals, in lists and dictionaries too: more is noise of the machine."""
    return mapped(value, lambda x: round(x, 5) if isinstance(x, float) else x)
