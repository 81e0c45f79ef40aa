"""Does a tuned model follow the instruction, or has it learned what to do with inputs of this form?

Some inputs tell the task by their form: a sentence can only be asked for its source. Others do not: of "stone (noun)" the
meaning, a phrase with it, or a synonym may be asked, and only the instruction says which. So beside the base and the tuned
model there is one that has seen the same inputs and answers under instructions that were dealt out anew:

    base       as it is
    few-shot   the base, with SHOTS answered questions of the same task, in the same words, in its prompt
    shuffled   tuned; each record has the instruction of another record, drawn at random: the same words, which say nothing
    bare       tuned, and asked, without instructions: pairs of an input and an answer
    tuned      on the seven tasks of `text.instructions`, in four phrasings each
    taught     tuned on the same inputs and instructions, with a teacher's answers (`teacher`) in the place of people's

Three things are new in turn: the input; the words of the instruction as well; the task as well. What is measured:

    answers    of questions whose answer a program can check: whether what the model writes, up to the first line break, is
               right (so a model that does not stop can be right too)
    followed   of questions whose input does not tell the task: whether the right answer is likelier than it would be under the
               instructions of the other tasks that have such inputs; a guess is so in a half or a third
    nll        nats of the right answers

Source of the tasks' scheme: Wei et al. 2022 (FLAN, arXiv:2109.01652); of the question: Min et al. 2022, Rethinking the Role of
Demonstrations (arXiv:2202.12837), and Kung and Peng 2023, Do Models Really Learn to Follow Instructions? (arXiv:2305.11383),
who change instructions and answers to see what is used.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..evaluation.answers import ask
from ..evaluation.intervals import Estimate, mean
from ..experiments.rows import Row
from ..experiments.shipped import base, spaced
from ..peft.methods import METHODS
from ..text.datasets import Completion
from ..text.examples import Example, encode_examples
from ..text.instructions import HELD_OUT, TASKS, TRAINED, Pair, pairs, phrase
from ..train.evaluation import example_losses
from . import teacher
from .comparison import Beside, better, both, not_inferior, told
from .mechanisms import ByItem, best_rate, curve, loss_on, train
from .protocol import SEEDS, TUNING, Report, version
from .register import UNTESTABLE, Number, Verdict, as_number, itemized, listed
from .statistics import crossed, right

UNTUNED = "base", "few-shot"
KINDS = {  # what is new: of which tasks, in which words
    "inputs": (TRAINED, "phrasings"), "phrasings": (TRAINED, "held_out_phrasings"), "tasks": (HELD_OUT, "held_out_phrasings"),
}  # fmt: skip
ALIKE = ("define", "use", "synonym"), ("rewrite", "continue"), HELD_OUT  # tasks whose inputs do not tell which is asked
INSTRUCTED = "base", "shuffled", "taught", "tuned"  # who is asked by an instruction alone
SHOTS, SHORT = 3, 100  # answered questions in a prompt; characters of such a pair at most
TOKENS = 14  # of an answer at most
LEAST = 0.01  # nats per token: a rate that is better by less is not better


@dataclass(frozen=True)
class Following:
    """A cell: how the base is prepared, and how many questions of a task it is asked, as far as there are."""

    arm: str
    answered: int = 768  # whose answers are checked, of the test split; "source" has as many
    tested: int = 172  # whose instructions are to be followed, of the test split; the smallest task has 86
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
    if arm == "taught":
        return answered(tuple(questions))
    if arm == "bare":
        return [q._replace(phrasing="{input}") for q in questions]
    if arm == "shuffled":
        order = np.random.default_rng(seed).permutation(len(questions))
        return [q._replace(phrasing=questions[i].phrasing) for q, i in zip(questions, order)]
    return list(questions)


@cache
def answered(questions: tuple[Question, ...]) -> list[Question]:
    """The questions with the teacher's answers; it is shown answered questions as the base is that is not tuned."""
    order = sorted(range(len(questions)), key=lambda i: (questions[i].task, questions[i].phrasing))
    written = dict(zip(order, teacher.write([prompt(questions[i], "few-shot") for i in order])))
    return [q._replace(pair=(q.pair[0], written[i])) for i, q in enumerate(questions)]


def asked(arm: str, kind: str, n: int) -> list[Question]:
    """n questions of each task whose answers can be checked, of the test split; the same for all arms."""
    tasks, words = KINDS[kind]
    questions = drawn([name for name in tasks if TASKS[name].check], "test", n, 0, words)
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


def alternatives(kind: str, n: int) -> list[list[Question]]:
    """n questions of each task whose inputs do not tell it, each followed by the same pair under the others' instructions."""
    tasks, words = KINDS[kind]
    known = {task: getattr(TASKS[task], words) for task in tasks}
    found = []
    for group in (group for group in ALIKE if group[0] in tasks):
        for q in drawn(group, "test", n, 0, words):
            i = known[q.task].index(q.phrasing)
            found.append([q, *(q._replace(phrasing=known[task][i]) for task in group if task != q.task)])
    return found


def followed(model: Any, kind: str, n: int) -> list[int]:
    """[items], whether the right answer is likeliest under its own instruction."""
    asked = alternatives(kind, n)
    nll = example_losses(model, encode([q for own in asked for q in own]), 64, base()[1].pad_token_id)[0]
    return [int(own[0] < own[1:].min()) for own in np.split(nll, np.cumsum([len(own) for own in asked])[:-1])]


def guess(kind: str, n: int) -> float:
    """How often a guess follows: the mean over n questions of each task of 1 in as many tasks as have such inputs."""
    return float(np.mean([1 / len(own) for own in alternatives(kind, n)]))


def measure(model: Any, s: Following) -> dict[str, Any]:
    """{"answers", "nll", and of who is instructed "followed": {kind: [items]}}."""
    row: dict[str, Any] = {"answers": {}, "nll": {}}
    if s.arm in INSTRUCTED:
        row["followed"] = {kind: followed(model, kind, s.tested) for kind in KINDS}
    for kind in KINDS:
        questions = asked(s.arm, kind, s.answered)
        written = answers(model, questions, s.arm)
        row["answers"][kind] = [int(TASKS[q.task].check(*q.pair, text)) for q, text in zip(questions, written)]
        nll = example_losses(model, encode(questions, s.arm), 64, base()[1].pad_token_id)[0]
        row["nll"][kind] = nll.round(2).tolist()
    return row


def tune(s: Following, rate: float, seed: int) -> Any:
    """The base tuned for the steps, each a batch of records, equally many of each task; None where it diverged."""
    model, pad = base()[0].copy().requires_grad_(True), base()[1].pad_token_id
    done = train(model, encode(put(records(s, seed), s.arm, seed)), rate, s.steps, s.batch_size, seed, pad_token_id=pad, packing=True)
    return None if done is None else model


def records(s: Following, seed: int) -> list[Question]:
    """What is trained on, before it is put as the arm has it."""
    return drawn(TRAINED, "train", -(-s.steps * s.batch_size // len(TRAINED)), seed)


def run(s: Following) -> Row:
    """The row of a cell: answers, nll and followed [seeds, items] by what is new, tokens and tasks [items], and how often a
    guess follows; of an arm that is tuned the rate, and [[rate, loss on validation], ...]; of "taught" also written [seeds],
    the share of the teacher's answers that are right, where that can be checked, and constant [items], whether one answer to
    all questions of a task would be right. A seed that diverged has None."""
    tokens = {kind: answer_tokens(asked(s.arm, kind, s.answered)) for kind in KINDS}
    row: Row = {"tasks": {kind: [q.task for q in asked(s.arm, kind, s.answered)] for kind in KINDS}, "tokens": tokens}
    if s.arm in INSTRUCTED:
        row["guess"] = {kind: guess(kind, s.tested) for kind in KINDS}
    if s.arm in UNTUNED:
        found = [measure(base()[0], s)]
    else:
        held_out, pad = encode(put(drawn(TRAINED, "validation", s.validation, 0), s.arm, 0)), base()[1].pad_token_id

        def loss(rate: float) -> float | None:
            model = tune(s, rate, TUNING)
            return None if model is None else loss_on(model, held_out, pad)

        row["rate"], tried = best_rate(loss, METHODS["full"].learning_rate, LEAST)
        row["rates"] = curve(tried)
        models = (tune(s, row["rate"], seed) for seed in s.seeds)
        found = [None if model is None else measure(model, s) for model in models]
    if s.arm == "taught":
        row["written"] = [written_right(records(s, seed)) for seed in s.seeds]
        row["constant"] = {kind: constant(asked(s.arm, kind, s.answered)) for kind in KINDS}
    keys = ("answers", "nll", *["followed"] * (s.arm in INSTRUCTED))
    return row | {key: {kind: [None if one is None else one[key][kind] for one in found] for kind in KINDS} for key in keys}


def written_right(questions: Sequence[Question]) -> float:
    """How often the teacher's answer is right, of those that can be checked."""
    both = zip(questions, answered(tuple(questions)))
    return float(np.mean([TASKS[q.task].check(*q.pair, own.pair[1]) for q, own in both if TASKS[q.task].check]))


def constant(questions: Sequence[Question]) -> list[int]:
    """[items], whether the task's most frequent answer is right: what knowing no more than the form of answers may earn."""
    answers = Counter((q.task, q.pair[1]) for q in questions)
    usual = {task: max((a for t, a in answers if t == task), key=lambda a: answers[task, a]) for task in {q.task for q in questions}}
    return [int(TASKS[q.task].check(*q.pair, usual[q.task])) for q in questions]


def answer_tokens(questions: Sequence[Question]) -> list[int]:
    """[items], the tokens of each right answer and its end."""
    return [int((example.labels >= 0).sum()) for example in encode(questions)]


NAMES = {"answers": "right answers", "followed": "instructions followed", "nll": "loss"}


class Cells(ByItem):
    """Cells of which some take a teacher."""

    def affordable(self, row: Mapping[str, Any]) -> bool:
        """Not where the teacher is asked: that takes minutes, and SmolLM2."""
        return row["arm"] != "taught"


def experiment(*arms: str) -> Cells:
    """The cells of some arms; all have one file."""
    return Cells("following", run, lambda: [Following(arm) for arm in arms], tolerance=0.1)


# ----------------------------------------------------------------------------------------------------------- statistics


def reports(rows: Sequence[Mapping[str, Any]], kind: str, key: str) -> dict[str, Report]:
    """Of each arm its values [seeds, items] of what is new. Raises ValueError where it diverged under a seed."""
    found = {}
    for row in (row for row in rows if key in row):
        if None in row[key][kind]:
            raise ValueError(f"{row['arm']} diverged under one of the seeds, tuned as it is")
        weights = np.array(row["tokens"][kind], float) if key == "nll" else None
        found[row["arm"]] = Report(None, np.array(row[key][kind], float), weights)
    return found


def shares(rows: Sequence[Mapping[str, Any]]) -> str:
    """The shares of instructions followed behind the differences, beside those of a guess, and those of right answers."""
    words = []
    for kind in KINDS:
        arms = reports(rows, kind, "followed")
        found = [f"{arm} {_share(right(arms[arm].values))}" for arm in reversed(INSTRUCTED) if arm in arms]
        words.append(f"new {kind}: {', '.join(found)}, a guess {rows[0]['guess'][kind]:.3f}")
    known = {arm: right(one.values).value for arm, one in reports(rows, "inputs", "answers").items() if arm in INSTRUCTED}
    gave = listed([f"{arm} {known[arm]:.3f}" for arm in reversed(INSTRUCTED) if arm in known])
    return f"Shares of instructions followed:{itemized(words)}Right answers to new inputs: {gave}."


def _share(e: Estimate) -> str:
    """With its interval, where it has one."""
    return f"{e.value:.3f}" + (f" [{e.low:.3f}, {e.high:.3f}]" if e.low is not None else "")


CONTROL = "followed", "the control or a guess"  # whichever follows more


def by_teacher(rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """Whether the model that a teacher taught gives clearly more right answers than the base or one constant answer to each task,
    whichever is right more often, and not fewer than the one that is tuned on people's answers. Beside it stand the share of
    right answers that the teacher wrote, and those of all, by task. (New tasks are left out: at these nearly nothing is
    right, so all are equal.)"""
    try:
        found = {kind: reports(rows, kind, "answers") for kind in ("inputs", "phrasings")}
    except ValueError as error:
        return Verdict(UNTESTABLE, f"{error}.".capitalize())
    own, above, numbers = next(row for row in rows if "written" in row), [], []
    for kind, of in found.items():
        of["constant"] = Report(None, np.broadcast_to(np.array(own["constant"][kind], float), of["taught"].values.shape), None)
        tasks = np.array(own["tasks"][kind])
        for arm, one in of.items():
            of_tasks = {"": right(one.values)} | {f", {t}": right(one.values[:, tasks == t]) for t in dict.fromkeys(own["tasks"][kind])}
            numbers += [as_number(f"{arm}, new {kind}{task}", e, "right") for task, e in of_tasks.items()]
        gains = {t: crossed((of["taught"].values - of["constant"].values)[:, tasks == t]) for t in dict.fromkeys(own["tasks"][kind])}
        above.append(f"{listed([t for t, e in gains.items() if e.low is not None and e.low > 0])} (new {kind})")

    def beside(kind: str, other: str) -> Beside:
        return Beside(f"new {kind}", "taught", found[kind]["taught"], other, found[kind][other], "answers")

    rivals = {kind: max(("base", "constant"), key=lambda arm: of[arm].values.mean()) for kind, of in found.items()}
    helps = told([beside(kind, rival) for kind, rival in rivals.items()], better, "tasks with instructions", beside=len(found))
    equal = told([beside(kind, "tuned") for kind in found], not_inferior, "tasks with instructions", beside=len(found))
    written, shares = mean(own["written"]), {arm: right(one.values).value for arm, one in found["inputs"].items()}
    because = (
        f"The teacher, SmolLM2-135M-Instruct after {SHOTS} answered questions, wrote answers that are right in {_share(written)}, "
        f"where that can be checked. The base tuned on these (taught) is right in {shares['taught']:.3f} of new inputs, before that in "
        f"{shares['base']:.3f}, on people's (tuned) in {shares['tuned']:.3f}; each task's most frequent answer (constant) is in "
        f"{shares['constant']:.3f}, and taught is clearly above it in {listed(above)} alone."
    )
    judged, numbers = both(helps, equal), [as_number("the teacher, for training", written, "right"), *numbers]
    return replace(judged, because=f"{because} {judged.because}", evidence=[*judged.evidence, *numbers])


def verdict(rows: Sequence[Mapping[str, Any]], *compared: tuple[str, str]) -> Verdict:
    """Whether the tuned model is clearly better than others, for each new thing; `compared` are (what is measured, the other).
    Beside it stand the other differences, and the shares of all arms, task by task."""
    found, rest, numbers = [], [], []
    for kind in KINDS:
        try:
            of = {key: reports(rows, kind, key) for key in ("answers", "followed", "nll")}
        except ValueError as error:
            return Verdict(UNTESTABLE, f"{error}.".capitalize())
        blind = next(row["guess"][kind] for row in rows if "guess" in row)
        of["followed"]["guess"] = Report(None, np.full_like(of["followed"]["tuned"].values, blind), None)
        control = max((arm for arm in ("shuffled", "guess") if arm in of["followed"]), key=lambda arm: of["followed"][arm].values.mean())
        for key, arms in of.items():
            tuned = arms["tuned"]
            for other in [arm for arm in arms if arm != "tuned"]:
                beside = Beside(f"new {kind}", f"{NAMES[key]}, tuned", tuned, other, arms[other], key)
                decides = (key, other) in compared or (CONTROL in compared and (key, other) == ("followed", control))
                (found if decides else rest).append(beside)
        tasks = np.array(rows[0]["tasks"][kind])
        numbers += [Number(f"new {kind}, {NAMES[key]}", of[key]["tuned"].values.shape[1], "test items") for key in ("answers", "followed")]
        for arm, one in ((arm, one) for arm, one in of["followed"].items() if arm != "guess"):
            numbers.append(as_number(f"{arm}, new {kind}: followed", right(one.values), "followed"))
        for arm, one in of["answers"].items():
            of_tasks = {"": right(one.values)} | {f", {t}": right(one.values[:, tasks == t]) for t in dict.fromkeys(tasks.tolist())}
            numbers += [as_number(f"{arm}, new {kind}{task}", e, "right") for task, e in of_tasks.items()]
    decided, others = (told(each, better, "tasks with instructions") for each in (found, rest))
    return replace(decided, evidence=[*decided.evidence, others.effect, *others.evidence, *numbers])
