"""Does a tuned model follow the instruction, or has it learned what to do with inputs of this form?

Some inputs tell the task by their form: a sentence can only be asked for its source. Others do not: of "stone (noun)" the
meaning, a phrase with it, or a synonym may be asked, and only the instruction says which. So beside the base and the tuned
model there is one that has seen the same inputs and answers under instructions that were dealt out anew:

    base       as it is
    few-shot   the base, with SHOTS answered questions of the same task, in the same words, in its prompt
    shuffled   tuned; each record has the instruction of another record, drawn at random: the same words, which say nothing
    bare       tuned, and asked, without instructions: pairs of an input and an answer
    tuned      on the seven tasks of `text.instructions`, in four phrasings each

Every question has an answer that a program can check, and is asked of all. Three things are new in turn: the input; the
words of the instruction as well; the task as well. An answer is what a model writes up to the first line break, so that a
model that does not stop can be right too.

Source of the tasks' scheme: Wei et al. 2022 (FLAN, arXiv:2109.01652); of the question: Min et al. 2022, Rethinking the Role of
Demonstrations (arXiv:2202.12837), and Kung and Peng 2023, Do Models Really Learn to Follow Instructions? (arXiv:2305.11383),
who change instructions and answers to see what is used.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..evaluation.answers import ask
from ..experiments.rows import Row
from ..experiments.shipped import base, spaced
from ..peft.methods import METHODS
from ..text.datasets import Completion
from ..text.examples import Example, encode_examples
from ..text.instructions import HELD_OUT, TASKS, TRAINED, Pair, pairs, phrase
from ..train.evaluation import example_losses
from .comparison import Beside, told
from .mechanisms import ByItem, best_rate, curve, loss_on, train
from .protocol import SEEDS, TUNING, Report, version
from .register import UNTESTABLE, Number, Verdict

UNTUNED = "base", "few-shot"
KINDS = {  # what is new: of which tasks, in which words
    "inputs": (TRAINED, "phrasings"), "phrasings": (TRAINED, "held_out_phrasings"), "tasks": (HELD_OUT, "held_out_phrasings"),
}  # fmt: skip
SHOTS, SHORT = 3, 100  # answered questions in a prompt; characters of such a pair at most
TOKENS = 14  # of an answer at most
LEAST = 0.01  # nats per token: a rate that is better by less is not better


@dataclass(frozen=True)
class Following:
    """A cell: how the base is prepared, and how many questions of a task it is asked (of a new task, of which fewer can be
    checked, twice as many)."""

    arm: str
    tested: int = 86  # of the test split, a task has at least as many
    steps: int = 60
    batch_size: int = 24
    validation: int = 32  # records of a task
    seeds: tuple[int, ...] = SEEDS
    base: str = field(default_factory=version)


class Question(NamedTuple):
    """A pair of a task, and the words that it is asked in; {input} stands for the input, which else has a line of its own."""

    task: str
    pair: Pair
    phrasing: str

    @property
    def prompt(self) -> str:
        asked = phrase(self.pair, self.phrasing)
        return "\n".join(filter(None, (asked.instruction, asked.input, "Answer:")))

    @property
    def answer(self) -> str:
        return f" {self.pair[1]}"


def drawn(tasks: Sequence[str], split: str, n: int, seed: int, words: str = "phrasings") -> list[Question]:
    """n questions of each task, whose pairs the seed draws, and then their phrasings: the same pairs in any words."""
    found = []
    for name in tasks:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        of, known = pairs(name, split), getattr(TASKS[name], words)
        found += [Question(name, of[i], known[rng.integers(len(known))]) for i in rng.permutation(len(of))[:n]]
    return found


def put(questions: Sequence[Question], arm: str, seed: int) -> list[Question]:
    """The questions as the arm trains on them."""
    if arm == "bare":
        return [q._replace(phrasing="{input}") for q in questions]
    if arm == "shuffled":
        order = np.random.default_rng(seed).permutation(len(questions))
        return [q._replace(phrasing=questions[i].phrasing) for q, i in zip(questions, order)]
    return list(questions)


def asked(arm: str, kind: str, n: int) -> list[Question]:
    """The questions whose answers can be checked, of the test split; the same for all arms."""
    tasks, words = KINDS[kind]
    questions = drawn([name for name in tasks if TASKS[name].check], "test", n * (1 + (kind == "tasks")), 0, words)
    return put(questions, "bare", 0) if arm == "bare" else questions


def prompt(question: Question, arm: str) -> str:
    """What the model reads."""
    if arm != "few-shot":
        return question.prompt
    short = [pair for pair in pairs(question.task, "train") if sum(map(len, pair)) <= SHORT]
    shots = [question._replace(pair=pair) for pair in spaced(short, SHOTS)]
    return "".join(f"{shot.prompt}{shot.answer}\n\n" for shot in shots) + question.prompt


def encode(questions: Sequence[Question], arm: str = "") -> list[Example]:
    """As examples whose labels are the answers."""
    return encode_examples([Completion(prompt(q, arm), q.answer) for q in questions], base()[1], 512).examples


def answers(model: Any, questions: Sequence[Question], arm: str) -> list[str]:
    """What the model writes, greedily, up to the first line break."""
    written = ask(model, base()[1], [prompt(q, arm) for q in questions], max_new_tokens=TOKENS, batch_size=64)
    return [text.strip().partition("\n")[0] for text in written]


def measure(model: Any, arm: str, n: int) -> dict[str, Any]:
    """{"answers": {kind: [items] right or not}, "nll": {kind: [items] nats of the right answers}}."""
    row: dict[str, Any] = {"answers": {}, "nll": {}}
    for kind in KINDS:
        questions = asked(arm, kind, n)
        written = answers(model, questions, arm)
        row["answers"][kind] = [int(TASKS[q.task].check(*q.pair, text)) for q, text in zip(questions, written)]
        nll = example_losses(model, encode(questions, arm), 64, base()[1].pad_token_id)[0]
        row["nll"][kind] = nll.round(2).tolist()
    return row


def tune(s: Following, rate: float, seed: int) -> Any:
    """The base tuned for the steps, each a batch of records, equally many of each task; None where it diverged."""
    model, n = base()[0].copy().requires_grad_(True), s.steps * s.batch_size
    records = put(drawn(TRAINED, "train", -(-n // len(TRAINED)), seed), s.arm, seed)
    pad = base()[1].pad_token_id
    done = train(model, encode(records), rate, s.steps, s.batch_size, seed, pad_token_id=pad, packing=True)
    return None if done is None else model


def run(s: Following) -> Row:
    """The row of a cell: answers and nll [seeds, items] by what is new, tokens [items]; of an arm that is tuned the rate, and
    [[rate, loss on validation], ...]. A seed that diverged has None."""
    tokens = {kind: answer_tokens(asked(s.arm, kind, s.tested)) for kind in KINDS}
    row: Row = {"tasks": {kind: [q.task for q in asked(s.arm, kind, s.tested)] for kind in KINDS}, "tokens": tokens}
    if s.arm in UNTUNED:
        found = [measure(base()[0], s.arm, s.tested)]
    else:
        held_out, pad = encode(put(drawn(TRAINED, "validation", s.validation, 0), s.arm, 0)), base()[1].pad_token_id

        def loss(rate: float) -> float | None:
            model = tune(s, rate, TUNING)
            return None if model is None else loss_on(model, held_out, pad)

        row["rate"], tried = best_rate(loss, METHODS["full"].learning_rate, LEAST)
        row["rates"] = curve(tried)
        models = (tune(s, row["rate"], seed) for seed in s.seeds)
        found = [None if model is None else measure(model, s.arm, s.tested) for model in models]
    return row | {
        key: {kind: [None if one is None else one[key][kind] for one in found] for kind in KINDS} for key in ("answers", "nll")
    }


def answer_tokens(questions: Sequence[Question]) -> list[int]:
    """[items], the tokens of each right answer and its end."""
    return [int((example.labels >= 0).sum()) for example in encode(questions)]


def experiment(*arms: str) -> ByItem:
    """The cells of some arms; all have one file."""
    return ByItem("following", run, lambda: [Following(arm) for arm in arms], tolerance=0.1)


# ----------------------------------------------------------------------------------------------------------- statistics


def reports(rows: Sequence[Mapping[str, Any]], kind: str, key: str) -> dict[str, Report]:
    """Of each arm its values [seeds, items] of what is new. Raises ValueError where it diverged under a seed."""
    found = {}
    for row in rows:
        if None in row[key][kind]:
            raise ValueError(f"{row['arm']} diverged under one of the seeds, tuned as it is")
        weights = np.array(row["tokens"][kind], float) if key == "nll" else None
        found[row["arm"]] = Report(None, np.array(row[key][kind], float), weights)
    return found


def verdict(rows: Sequence[Mapping[str, Any]], others: Sequence[str]) -> Verdict:
    """Whether the tuned model clearly answers more questions right than the others, for each new thing. Beside it stand the
    shares of all arms, task by task, and how much lower the tuned model's loss is."""
    found, losses, shares = [], [], []
    for kind in KINDS:
        try:
            right, nll = reports(rows, kind, "answers"), reports(rows, kind, "nll")
        except ValueError as error:
            return Verdict(UNTESTABLE, f"{error}.".capitalize())
        found += [Beside(f"new {kind}", "tuned", right["tuned"], other, right[other], "answers") for other in others]
        losses += [Beside(f"new {kind}", "loss, tuned", nll["tuned"], other, nll[other], "nll") for other in others]
        tasks = np.array(rows[0]["tasks"][kind])
        for arm, one in right.items():
            shares.append(Number(f"{arm}, new {kind}", one.mean.value, "right", one.mean.low, one.mean.high))
            for task in dict.fromkeys(tasks.tolist()):
                shares.append(Number(f"{arm}, new {kind}, {task}", float(one.values[:, tasks == task].mean()), "right"))
    decided, beside = (told(each, lambda d: d.clearly_better, "tasks with instructions") for each in (found, losses))
    return replace(decided, evidence=[*decided.evidence, beside.effect, *beside.evidence, *shares])
