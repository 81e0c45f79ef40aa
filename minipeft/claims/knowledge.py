"""Does tuning on instructions teach facts, or only how to give those that the base knows?

A fact is what a word means, or how a verse goes on. A model knows it where, of four words (or beginnings of verses), the right
one makes what follows likeliest:

    known = log p(meaning | right word) > log p(meaning | each of three other words)           a guess is right in 1 of 4

What is scored is the same text each time, so how likely it is by itself plays no part (the usual four answers to one question
measure mostly that: Holtzman et al. 2021, Surface Form Competition, arXiv:2104.08315). Each fact is asked for in two ways:

    text     as the base's own text has it         "stone (noun):", the beginning of the verse
    asked    as an instruction                     "Define the word." ...

and is of one of two kinds: `present` in the text that the base was trained on, or `absent` from it (of the split "test"). The
latter tell knowledge from what can be guessed: from the parts of a word, or from how verses are built. Three models:

    base     as it is; also asked after three answered questions (of the split "validation")
    others   tuned on instructions: other facts of both kinds of task, each in four phrasings, and records of the other tasks
    these    the same, with these very facts in the place of the others: as many tokens

If tuning only aligns, "others" finds by instruction what the base finds in its own text, and no more; and "these", which was
told facts that are in no text of the base's, knows them no better than "others". If tuning teaches, it knows them.

Source of the thesis: Zhou et al. 2023, LIMA (arXiv:2305.11206), its superficial alignment hypothesis; of doubts about new facts
in tuning: Gekhman et al. 2024 (arXiv:2405.05904).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from ..evaluation.intervals import Estimate, student_t
from ..experiments.rows import Row
from ..experiments.shipped import base, spaced
from ..peft.methods import METHODS
from ..text.datasets import Completion
from ..text.examples import encode_examples
from ..text.instructions import TASKS, TRAINED, Pair, pairs
from ..train.evaluation import example_losses
from .following import LEAST, SHORT, SHOTS, Question, drawn, encode
from .mechanisms import ByItem, best_rate, curve, judged, loss_on, train
from .protocol import SEEDS, TUNING, version
from .register import HOLDS, IF, NOT, UNTESTABLE, Verdict, claim, itemized, listed
from .statistics import crossed, right

KINDS = {"define": "{}:", "continue": "{}"}  # a task whose records are facts, and how the base's own text asks
FACTS = {"define": "the meanings", "continue": "the verse ends"}
SPLITS = {"present": "train", "absent": "test"}
WAYS = "text", "asked"  # and "shown": asked after SHOTS answered questions
CHOICES = 4
READ = 320  # facts of a kind, present and absent, that the base alone is asked for in its own text
SAID = {True: "so", False: "not so", None: "not told apart"}
TAUGHT = "told facts that were in none of its texts, it does not learn them"
SMALL = 0.05  # of the facts: what nobody would call knowledge gained


@dataclass(frozen=True)
class Knowledge:
    """A cell: how the base is tuned, and how many facts of a kind, present and absent, are tested."""

    arm: str
    facts: int = 256
    batch_size: int = 24
    validation: int = 32  # records of a task
    seeds: tuple[int, ...] = SEEDS
    base: str = field(default_factory=version)


def facts_of(kind: str, where: str, n: int) -> list[Pair]:
    """The facts that all models are asked for."""
    return [q.pair for q in drawn([kind], SPLITS[where], n, 0)]


def keys(facts: Sequence[Pair], seed: int = 0) -> list[list[str]]:
    """For each fact its word, or beginning, and those of three others, of the same part of speech as far as there are. All are
    tested: that a model has met a word does not give it away."""
    rng, found = np.random.default_rng(seed), []
    for input, output in facts:
        sort = input.rpartition(" (")[2]
        others = [(given.rpartition(" (")[2] != sort, rng.random(), given) for given, other in facts if other != output]
        found.append([input, *(given for *_, given in sorted(others)[: CHOICES - 1])])
    return found


def known(model: Any, kind: str, facts: Sequence[Pair], way: str) -> list[int]:
    """[facts], whether each is known."""
    records, before = [], shown(kind) if way == "shown" else ""
    for (_, output), given in zip(facts, keys(facts)):
        asked = [Question(kind, (key, output), TASKS[kind].phrasings[0]).prompt for key in given]
        asked = [*map(KINDS[kind].format, given)] if way == "text" else [f"{before}{prompt}" for prompt in asked]
        records += [Completion(prompt, f" {output}") for prompt in asked]
    examples, pad = encode_examples(records, base()[1], 512).examples, base()[1].pad_token_id
    nll = example_losses(model, examples, 64, pad)[0].reshape(len(facts), CHOICES)
    return (nll[:, 0] < nll[:, 1:].min(axis=1)).astype(int).tolist()


def shown(kind: str) -> str:
    """SHOTS answered questions, none of which is tested."""
    short = [pair for pair in pairs(kind, "validation") if sum(map(len, pair)) <= SHORT]
    questions = [Question(kind, pair, TASKS[kind].phrasings[0]) for pair in spaced(short, SHOTS)]
    return "".join(f"{q.prompt}{q.answer}\n\n" for q in questions)


def measure(model: Any, n: int) -> dict[str, list[int]]:
    """{"kind, where, way": [facts]}."""
    cells = product(KINDS, SPLITS, WAYS)
    return {", ".join((kind, where, way)): known(model, kind, facts_of(kind, where, n), way) for kind, where, way in cells}


def lessons(s: Knowledge, seed: int) -> list[Question]:
    """What the arm is tuned on: facts in all their phrasings, and as many records of each other task."""
    found = drawn([task for task in TRAINED if task not in KINDS], "train", s.facts, seed)
    for kind in KINDS:
        these = [fact for where in SPLITS for fact in facts_of(kind, where, s.facts)]
        if s.arm == "others":
            rest = [fact for fact in pairs(kind, "train") if fact not in {*these}]
            these = [rest[i] for i in np.random.default_rng(seed).permutation(len(rest))[: len(these)]]
        found += [Question(kind, fact, phrasing) for fact in these for phrasing in TASKS[kind].phrasings]
    return found


def tune(s: Knowledge, rate: float, seed: int) -> Any:
    """The base tuned for one pass over its lessons; None where it diverged."""
    model, examples = base()[0].copy().requires_grad_(True), encode(lessons(s, seed))
    steps, pad = math.ceil(len(examples) / s.batch_size), base()[1].pad_token_id
    done = train(model, examples, rate, steps, s.batch_size, seed, pad_token_id=pad, packing=True)
    return None if done is None else model


def run(s: Knowledge) -> Row:
    """The row of a cell: what is known, {"kind, where, way": [seeds, facts]}; of the base also what it knows after answered
    questions, shown, and more facts asked for in its own text, read, {"kind, where": [facts]}; of an arm that is tuned the rate,
    and [[rate, loss on validation records of all tasks], ...]. A seed that diverged has None."""
    if s.arm == "base":
        of = {f"{kind}, {where}": (kind, where) for kind, where in product(KINDS, SPLITS)}
        read = {name: known(base()[0], kind, facts_of(kind, where, READ), "text") for name, (kind, where) in of.items()}
        after = {name: known(base()[0], kind, facts_of(kind, where, s.facts), "shown") for name, (kind, where) in of.items()}
        return {"read": read, "shown": after, "known": {key: [one] for key, one in measure(base()[0], s.facts).items()}}
    held_out, pad = encode(drawn(TRAINED, "validation", s.validation, 0)), base()[1].pad_token_id

    def loss(rate: float) -> float | None:
        model = tune(s, rate, TUNING)
        return None if model is None else loss_on(model, held_out, pad)

    rate, tried = best_rate(loss, METHODS["full"].learning_rate, LEAST)
    models = (tune(s, rate, seed) for seed in s.seeds)
    found = [None if model is None else measure(model, s.facts) for model in models]
    names = map(", ".join, product(KINDS, SPLITS, WAYS))
    facts = {name: [None if one is None else one[name] for one in found] for name in names}
    return {"rate": rate, "rates": curve(tried), "known": facts}


EXPERIMENT = ByItem("knowledge", run, lambda: [Knowledge(arm) for arm in ("base", "others", "these")], tolerance=0.1)


# ----------------------------------------------------------------------------------------------------------- statistics


def apart(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of a less that of b, of two independent samples of facts, with its interval of that level."""
    value = float(np.mean(a) - np.mean(b))
    error = student_t(level, len(a) + len(b) - 2) * math.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))
    return Estimate(value, value - error, value + error)


@claim("inst-4", lesson="08_instruction_tuning.py", section="4 · Train: one task, three, seven", experiment=EXPERIMENT)
def verdict(rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """Holds if all five parts are so: in its own text, the base knows clearly more facts that it was trained on than facts that it was
    not, of words and of verses; tuned on other facts, it knows clearly more of them when asked; by less than 5 in 100 more than the base in
    its own text; and being told facts that it never read makes it know these by less than 5 in 100 better than being told others. Holds
    if some are so; does not hold here if none is. A model that tuning teaches new facts refutes the last, and one that knows more when
    asked than the base ever showed refutes the fourth.
    """
    # facts of both kinds count together, but in the first part; "some parts" takes intervals that are clear among as many
    of = {row["arm"]: row["known"] for row in rows}
    read = next(row["read"] for row in rows if row["arm"] == "base")
    if any(None in values for found in of.values() for values in found.values()):
        return Verdict(UNTESTABLE, "A model diverged under one of the seeds, tuned as it is.")

    def less(one: str, other: str, where: str, way: str = "asked", of_other: str = "asked", level: float = 0.95) -> Estimate:
        """What one arm knows less what the other does, of both kinds."""
        values = [
            np.concatenate([np.array(of[arm][f"{kind}, {where}, {how}"], float) for kind in KINDS], axis=1)
            for arm, how in ((one, way), (other, of_other))
        ]
        return crossed(values[0] - values[1], level=level)

    def parts(level: float) -> dict[str, tuple[Estimate, bool | None]]:
        read_of = {kind: (read[f"{kind}, present"], read[f"{kind}, absent"]) for kind in KINDS}
        had = {f"the base knows facts of its own text better than others ({kind})": apart(*values, level) for kind, values in read_of.items()}
        aligned = less("others", "base", "present", level=level)
        beyond = less("others", "base", "present", of_other="text", level=level)
        taught = less("these", "others", "absent", level=level)
        more = had | {"tuned on other facts, it knows more of those in the base's text than the base, both asked": aligned}
        return {name: (e, _more(e)) for name, e in more.items()} | {
            "asked, it knows no more of them than the base in its own text": (beyond, _within(beyond)),
            TAUGHT: (taught, _within(taught)),
        }

    found = parts(0.95)
    surely = parts(1 - 0.05 / len(found))
    verdict = HOLDS if all(x for _, x in found.values()) else IF if any(x for _, x in surely.values()) else NOT
    if verdict == NOT and any(x is not False for _, x in found.values()):
        verdict = UNTESTABLE
    taught, own = found[TAUGHT][0], less("these", "others", "absent", "text", "text")
    base_shown = next(row["shown"] for row in rows if row["arm"] == "base")
    after = np.concatenate([np.array(base_shown[f"{kind}, present"], float) for kind in KINDS])
    told_others = np.concatenate([np.array(of["others"][f"{kind}, present, asked"], float) for kind in KINDS], axis=1)
    beside = crossed(told_others - after)
    evidence = {name: e for name, (e, _) in found.items()} | {
        "present facts: told others and asked, less the base after answered questions": beside,
        "asked, present facts: told these, less told others": less("these", "others", "present"),
        "own text, absent facts: told these, less told others": own,
        "own text, present facts: told others, less the base": less("others", "base", "present", "text", "text"),
    }
    for arm, values in of.items():
        evidence |= {f"{arm}: {key}": right(np.array(one, float)) for key, one in values.items()}
    guessed = listed([f"{100 * float(np.mean(read[f'{kind}, absent'])):.0f} % of {what}" for kind, what in FACTS.items()])
    because = (
        f"{sum(x is True for _, x in found.values())} of {len(found)} parts are so: "
        f"{itemized([f'{name}: {SAID[x]} ({points(e)} points)' for name, (e, x) in found.items()])}"
        f'"Better" and "more" are so where the interval lies above 0, not so where below {100 * SMALL:g} points; "no more" and "does not" '
        f"the other way round. The last part compares a model told these facts with one told others, both asked; in the base's own text "
        f"the difference is {points(own)}. "
        f"After {SHOTS} answered questions the base knows {100 * after.mean():.0f} % of the facts in its texts; who was told "
        f"others knows, asked, {points(beside)} points more. "
        f"Of facts in none of its texts the base knows, in its own text, {guessed}; a guess {100 / CHOICES:g} %."
    )
    effect = "asked for facts in no text of the base's: known by being told them", taught, "of the facts"
    return judged(verdict, because, *effect, {"of the facts": evidence}, 2 * Knowledge.facts, "facts")


def points(e: Estimate) -> str:
    """A difference of shares, with its interval, in percentage points."""
    return f"{100 * e.value:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]"


def _more(found: Estimate) -> bool | None:
    """Whether it is clearly above 0; None where that is not told."""
    return True if found.low > 0 else False if found.high < SMALL else None


def _within(found: Estimate) -> bool | None:
    """Whether it is below SMALL; False where it is clearly above 0 and may be above SMALL; None where that is not told."""
    return True if found.high < SMALL else False if found.low > 0 else None
