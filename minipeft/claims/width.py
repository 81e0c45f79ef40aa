"""Does the best learning rate fall with the width of a model, and does that reach the textbook's range at 7B?

    rate ~ width^-a         log2 rate = b - a log2 width: least squares for every seed, its interval over seeds
    at width n              2^(b - a log2 n), for every seed, its interval over seeds

Models of the Llama dialect, all 4 layers deep and with heads of 16 channels, are pretrained for the same tokens on the
shipped corpora, each by its best rate, then all weights are fine-tuned on the task "source" from there. A best rate is
found on a lattice (x 2), inside what was tried, and then between its points: the vertex of the parabola of the loss
through the best rate and its two neighbors, in log2 rate. Every seed has a model, examples and best rates of its own.

Sources: Yang et al. 2022, Tensor Programs V (arXiv:2203.03466): in the usual parametrization, Adam's best rate for
matrices falls as 1 / width, a = 1; that for embeddings and norms does not. Rates 1e-5 to 5e-5: Devlin et al. 2019, BERT
(arXiv:1810.04805, appendix A.3: 2e-5 to 5e-5), and the textbooks after it.

Departures: pretraining is short (153,600 tokens; at one width also ten times as many), so that the start is far from what a
7B model has seen; one depth; all weights have the same rate and no muP; 4096 is 16 times beyond the widest, so the prediction
is an extrapolation. At 576 it is compared with SmolLM2-135M (`large`; 30 layers), which others have pretrained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..evaluation.intervals import Estimate, mean
from ..experiments.rows import Row
from ..experiments.shipped import base
from ..nn.transformer import Transformer, TransformerConfig
from ..peft.methods import METHODS, at_width
from ..text.corpora import general_text
from ..text.examples import Example, chunk_text, encode_documents
from . import data
from .mechanisms import IF, ByItem, best_rate, curve, curves, geometric, graded, judged, loss_on, steps_of, train
from .protocol import SEEDS
from .register import UNTESTABLE, Verdict, listed

WIDTHS = 32, 64, 128, 256
BRIEF, LONG = 150, 1500  # steps of pretraining: of all widths; and, to see what a longer one changes, at width BESIDE
BESIDE = 128  # the shipped base's
SMALL, SEVEN_B, RANGE = 576, 4096, (1e-5, 5e-5)
TWICE = 2  # a rate within this factor of a predicted one was predicted
MUCH = 1 / 2  # a rate below this share of another is much smaller


@dataclass(frozen=True)
class Width:
    """A seed of a width."""

    width: int
    seed: int
    pretraining_steps: int = BRIEF  # of `blocks` blocks of `length` tokens
    blocks: int = 8
    length: int = 128
    examples: int = 500
    epochs: float = 1
    batch_size: int = 8
    validation: int = 256


def runs() -> list[Width]:
    """All cells of the widths that are pretrained here."""
    return [Width(width, seed) for width in WIDTHS for seed in SEEDS] + [Width(BESIDE, seed, LONG) for seed in SEEDS]


def shape(width: int, tokenizer: Any, layers: int = 4) -> TransformerConfig:
    """Of the models that are pretrained here."""
    return TransformerConfig.llama(
        vocab_size=tokenizer.vocab_size, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 16, num_key_value_heads=width // 32, max_position_embeddings=data.LENGTH,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


@cache
def text(split: str, n: int, length: int) -> list[Example]:
    """n blocks of general text of a split: documents in an order that is always the same, as many as it takes."""
    tokenizer, documents = base()[1], general_text(split)
    order, blocks = np.random.default_rng(0).permutation(len(documents)), []
    for start in range(0, len(documents), 200):
        ids = encode_documents([documents[i] for i in order[start : start + 200]], tokenizer)
        blocks += [Example(block, block) for block in chunk_text(ids, length) if len(block) == length]
        if len(blocks) >= n:
            break
    return blocks[:n]


def run(settings: Width) -> Row:
    """The row of a cell. Of "pretraining" and of "full" fine-tuning: the lattice's best rate, and the [[rate, loss on
    validation], ...] of those tried: {"pretraining": 2**-8, "pretraining_rates": ..., "full": ..., "full_rates": ...}."""
    s, tokenizer, models = settings, base()[1], {}
    read = text("train", s.pretraining_steps * s.blocks, s.length)
    held_out = text("validation", 64, s.length)

    def pretrain(rate: float) -> float | None:
        model = Transformer(shape(s.width, tokenizer), seed=s.seed)
        done = train(model, read, rate, s.pretraining_steps, s.blocks, s.seed, pad_token_id=tokenizer.pad_token_id)
        models[rate] = model
        return None if done is None else loss_on(model, held_out, tokenizer.pad_token_id)

    best, tried = best_rate(pretrain, 2.0**-8 * min(1.0, 128 / s.width))
    row, start = {"pretraining": best, "pretraining_rates": curve(tried)}, models[best]
    models.clear()

    steps, validation = steps_of(s.examples, s.epochs, s.batch_size), data.encode(data.asked("source", "validation", s.validation))
    drawn = data.drawn("source", s.examples, s.seed)

    def tune(rate: float) -> float | None:
        model = METHODS["full"].prepare(start, steps, s.seed)
        done = train(model, drawn, rate, steps, s.batch_size, s.seed, pad_token_id=tokenizer.pad_token_id)
        return None if done is None else loss_on(model, validation, tokenizer.pad_token_id)

    best, tried = best_rate(tune, 2.0 ** round(math.log2(at_width(METHODS["full"].learning_rate, start))))
    return row | {"full": best, "full_rates": curve(tried)}


# ----------------------------------------------------------------------------------------------------------- statistics


def vertex(tried: Mapping[float, float], best: float) -> float:
    """The best rate between those tried: where the parabola through `best` and its two neighbors (x 2), in log2 rate, is
    lowest, within them. `best` itself where a neighbor diverged (its loss is infinite), or the three are on no such parabola.

    Raises ValueError where `best` has no two neighbors."""
    if best / 2 not in tried or best * 2 not in tried:
        raise ValueError(f"the best rate {best:g} lies at the edge of what was tried")
    a, b, c = tried[best / 2], tried[best], tried[best * 2]
    curvature = a - 2 * b + c
    if not math.isfinite(curvature) or curvature <= 0:
        return best
    return float(best * 2 ** min(1.0, max(-1.0, (a - c) / (2 * curvature))))


class Law:
    """rate = 2^b width^-a, for every seed: from rates [seeds, widths]."""

    def __init__(self, widths: Sequence[int], rates: np.ndarray):
        x, y = np.log2(np.asarray(widths, float)), np.log2(np.asarray(rates, float))
        if y.ndim != 2 or y.shape[1] != len(x) or len(x) < 2:
            raise ValueError(f"a law takes rates [seeds, widths] at two widths or more, got {y.shape} and {len(x)}")
        self.slopes = ((y - y.mean(axis=1, keepdims=True)) @ (x - x.mean())) / ((x - x.mean()) ** 2).sum()
        self.offsets = y.mean(axis=1) - self.slopes * x.mean()

    @property
    def exponent(self) -> Estimate:
        """a, with its interval over the seeds."""
        return mean(-self.slopes)

    def at(self, width: int) -> Estimate:
        """The rate at a width, with its interval over the seeds: of the fit, not of what is left of it."""
        return geometric(self.offsets + self.slopes * math.log2(width))


def table(rows: Sequence[Mapping[str, Any]], of: str, steps: int = BRIEF) -> tuple[list[int], np.ndarray]:
    """(widths, best rates [seeds, widths], between the lattice's) of "pretraining" or "full" fine-tuning, after so much pretraining."""
    rows = [row for row in rows if row["pretraining_steps"] == steps]
    widths, seeds = (sorted({row[key] for row in rows}) for key in ("width", "seed"))
    found = {(row["seed"], row["width"]): vertex(curves({"rates": row[f"{of}_rates"]})[0], row[of]) for row in rows}
    return widths, np.array([[found[seed, width] for width in widths] for seed in seeds])


def _times(e: Estimate) -> str:
    return f"{e.value:.1f}{'' if e.low is None else f' [{e.low:.1f}, {e.high:.1f}]'} times"


def _between(e: Estimate) -> str:
    return "" if e.low is None else f" [{e.low:.1e}, {e.high:.1e}]"


def _overlap(a: Estimate, low: float, high: float) -> bool:
    return a.low is not None and a.low <= high and a.high >= low


EXPERIMENT = ByItem("width", run, runs, tolerance=0.1)


def verdict(rows: Sequence[Mapping[str, Any]], small: float) -> Verdict:
    """Of `full.rate_against_width`; `small` is the best rate of SmolLM2-135M."""
    (widths, tuning), (_, before) = table(rows, "full"), table(rows, "pretraining")
    laws = {"fine-tuning": Law(widths, tuning), "pretraining": Law(widths, before)}
    times, cases = {}, {}
    for i, width in enumerate(widths):
        times[f"fine-tuning over pretraining, width {width}"] = ratio = geometric(np.log2(tuning[:, i] / before[:, i]))
        cases[f"a rate much smaller than pretraining's at width {width}"] = ratio.high is not None and ratio.high < MUCH
    longer, pretrained = (table(rows, of, LONG)[1][:, 0] for of in ("full", "pretraining"))
    times[f"fine-tuning over pretraining, width {BESIDE}, {LONG // BRIEF} times as long"] = ratio = geometric(np.log2(longer / pretrained))
    cases["a rate much smaller than pretraining's after a longer one"] = ratio.high is not None and ratio.high < MUCH
    times[f"best rate at width {BESIDE}, {LONG // BRIEF} times as long over briefly"] = fell = geometric(
        np.log2(longer / tuning[:, widths.index(BESIDE)])
    )
    there, known = (laws["fine-tuning"].at(width) for width in (SEVEN_B, SMALL))
    apart = max(small / known.value, known.value / small)
    if apart <= TWICE:
        cases[f"1e-5 to 5e-5 at width {SEVEN_B}"] = _overlap(there, *RANGE)
    decision = graded(cases) if apart <= TWICE else IF if any(cases.values()) else UNTESTABLE
    ratios = [times[f"fine-tuning over pretraining, width {width}"] for width in widths]
    so = [cases[f"a rate much smaller than pretraining's at width {width}"] for width in widths]
    because = (
        f"After a brief pretraining at widths {listed([*map(str, widths)])} the best rate of fine-tuning is {listed([f'{r.value:.1f}' for r in ratios])} "
        f"times pretraining's, clearly less than half at {sum(so)} of {len(widths)}. It falls as width^-{laws['fine-tuning'].exponent.value:.2f}, "
        f"by this law to {there.value:.1e}{_between(there)} at width {SEVEN_B}. "
        f"At {BESIDE}, after {LONG // BRIEF} times the pretraining, it is {ratio.value:.1f} times pretraining's, and {_times(fell)} the briefly pretrained model's. "
        f"SmolLM2-135M's best rate, {small:.1e}, is a factor of {apart:.1f} from the law's at its width, {known.value:.1e}{_between(known)}"
        f"{'' if apart <= TWICE else f': more than {TWICE}, so this says nothing of 7B'}."
    )
    predicted = {f"at width {SMALL}": known, f"at width {SEVEN_B}": there}
    over = Estimate(*(None if x is None else small / x for x in (known.value, known.high, known.low)))
    effect = (f"predicted at width {SEVEN_B}", there, "rate") if apart <= TWICE else ("SmolLM2-135M's best rate over the law's", over, "times")
    evidence = {
        "exponent": {f"a of {name}": law.exponent for name, law in laws.items()}, "times": times,
        "rate": predicted,
    }  # fmt: skip
    return judged(decision, because, *effect, evidence, 256, "pretraining, then source; 256 validation records")
