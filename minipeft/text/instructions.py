"""Multi-task instruction data: ten tasks over the shipped corpora, each put in several phrasings, as Alpaca's records.

    trained     rewrite         a verse of the King James Bible -> in Basic English
                continue        the beginning of such a verse -> its end
                source          a sentence -> which of three books has it                                   (checked)
                define          a word -> its meaning
                use             a word -> a phrase with it                                                  (checked)
                part-of-speech  a word and its meaning -> noun, verb, adjective or adverb                   (checked)
                synonym         a word -> another with the same meaning                                     (checked)
    held out    archaize        a verse in Basic English -> in King James' (rewrite, turned round)
                name            a meaning -> the word (define, turned round)                             (checked)
                fill            a phrase with a gap -> the word that is missing                             (checked)

Three things are new to a model that was trained on them, and are told apart when it is tested:

    new inputs      the split "test" (or "validation"), trained tasks, trained phrasings
    new phrasings   the same inputs, but asked in words that no training record uses
    new tasks       the held-out tasks, of which there is no training record at all

The splits are the corpora's (no verse, chapter, headword, gloss or example phrase is on two sides, see
`build_corpora`). Where parts of texts could still coincide (two verses that begin alike), the test side leaves them
out: no input of a task occurs on two sides. A held-out task asks about the test side only, so its answers, too, were
never seen as inputs.

Source of the scheme: Wei et al. 2022, "Finetuned Language Models Are Zero-Shot Learners" (FLAN, arXiv:2109.01652),
which has ten phrasings a task, tests on tasks that were not trained, and mixes in proportion to size with a cap.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .corpora import austen, bible, wordnet
from .datasets import Instruction
from .splits import SPLITS, check_split
from .tasks import Entry, definitions, examples, stands_in, verses

Pair = tuple[str, str]  # input, output


@dataclass(frozen=True)
class Task:
    """What is asked, and how.

    pairs     from a split to its (input, output) pairs, in a fixed order
    phrasings, held_out_phrasings    instructions; one with {input} in it asks in one sentence, with no input apart
    check     (input, output, answer) -> whether a model's answer is right; None where only the loss can judge
    """

    pairs: Callable[[str], Iterator[Pair]]
    phrasings: tuple[str, ...]
    held_out_phrasings: tuple[str, ...]
    check: Callable[[str, str, str], bool] | None = None


# ------------------------------------------------------------------------------------------- the pairs of each task


def _rewrite(split: str) -> Iterator[Pair]:
    return ((verse.king_james, verse.basic_english) for verse in verses(split))


def _archaize(split: str) -> Iterator[Pair]:
    return ((verse.basic_english, verse.king_james) for verse in verses(split))


def _continue(split: str) -> Iterator[Pair]:
    """Verses of two parts, cut at the colon."""
    for verse in verses(split):
        begun, colon, rest = verse.king_james.partition(": ")
        if len(begun) >= 20 and len(rest) >= 20:
            yield begun + colon.rstrip(), rest


def _source(split: str) -> Iterator[Pair]:
    """As many sentences of each book as there are of the rarest, Austen's of a verse's length."""
    lines = (line for chapter in austen(split) for line in chapter.text.split("\n"))
    # A sentence ends behind a word of four small letters or more, so not behind "Mr." or "Mrs."
    sentences = dict.fromkeys(part for line in lines for part in re.split(r"(?<=[a-z]{4}[.!?]) (?=[A-Z])", line))
    short = [sentence for sentence in sentences if 60 <= len(sentence) <= 160 and '"' not in sentence]
    either = [v for v in bible(split) if 60 <= min(len(v.king_james), len(v.basic_english)) <= 160]
    for sentence, one, other in zip(short, either[::2], either[1::2]):
        yield sentence, "Jane Austen"
        yield one.king_james, "the King James Bible"
        yield other.basic_english, "the Basic English Bible"


def _define(split: str) -> Iterator[Pair]:
    return ((_word(entry), entry.text) for entry in definitions(split))


def _use(split: str) -> Iterator[Pair]:
    return ((_word(entry), entry.text) for entry in examples(split))


def _part_of_speech(split: str) -> Iterator[Pair]:
    return ((f"{entry.word}: {entry.text}", entry.part_of_speech) for entry in definitions(split))


def _synonym(split: str) -> Iterator[Pair]:
    for synset in wordnet(split):
        words = [headword.lemma for headword in synset.headwords if _is_word(headword.lemma)]
        if len(words) > 1:
            yield f"{words[0]} ({synset.part_of_speech})", words[1]


def _name(split: str) -> Iterator[Pair]:
    return ((entry.text, entry.word) for entry in definitions(split))


def _fill(split: str) -> Iterator[Pair]:
    for entry in examples(split):
        if _is_word(entry.word):
            yield re.sub(rf"\b{entry.word}\b", "___", entry.text, flags=re.IGNORECASE), entry.word


def _word(entry: Entry) -> str:
    return f"{entry.word} ({entry.part_of_speech})"


def _is_word(text: str) -> bool:
    return re.fullmatch("[a-z]+", text) is not None


# -------------------------------------------------------------------------------------------------- right or wrong?


def _same(input: str, output: str, answer: str) -> bool:
    return answer.strip(" .\n").lower() == output.lower()


def _uses(input: str, output: str, answer: str) -> bool:
    return stands_in(input.rpartition(" (")[0], answer)


def _names(input: str, output: str, answer: str) -> bool:
    return answer.strip(" .\n").lower() in _dictionary()[0][input]


def _is_synonym(input: str, output: str, answer: str) -> bool:
    word, answer = input.rpartition(" (")[0], answer.strip(" .\n").lower()
    return answer != word and any(answer in group for group in _dictionary()[1].get(input, ()))


@cache
def _dictionary() -> tuple[dict[str, set[str]], dict[str, list[set[str]]]]:
    """({definition: the words it defines}, {"word (noun)": the groups of words that share a meaning with it})."""
    defined: dict[str, set[str]] = {}
    groups: dict[str, list[set[str]]] = {}
    for split in SPLITS:
        for synset in wordnet(split):
            group = defined.setdefault(synset.definition, set())
            group.update(headword.lemma.lower() for headword in synset.headwords)
            for headword in synset.headwords:
                groups.setdefault(f"{headword.lemma} ({synset.part_of_speech})", []).append(group)
    return defined, groups


# --------------------------------------------------------------------------------------------------------- the tasks

TASKS: dict[str, Task] = {
    "rewrite": Task(
        _rewrite,
        (
            "Rewrite this verse in plain English.",
            "Say the same in simple words of today.",
            "Put this old text into easy English.",
            "In plain English, what is said here? {input}",
        ),
        ("Make this verse easy to understand.", "Give these old words a simple form: {input}"),
    ),
    "continue": Task(
        _continue,
        (
            "Continue the verse.",
            "How does this verse of the Bible go on?",
            "Write the second part of this verse.",
            "Complete this verse: {input}",
        ),
        ("Give the rest of the verse.", "What are the words after these? {input}"),
    ),
    "source": Task(
        _source,
        (
            "From which book is this sentence?",
            "Name the source of this text.",
            "Who or what is quoted here?",
            "In which of the books does this stand? {input}",
        ),
        ("Where was this written?", "Say from where this is taken: {input}"),
        _same,
    ),
    "define": Task(
        _define,
        (
            "Give the meaning of this word.",
            "Define the word.",
            "What does this word mean?",
            "What is the meaning of {input}?",
        ),
        ("Explain this word.", "Tell me what {input} means."),
    ),
    "use": Task(
        _use,
        (
            "Use this word in a phrase.",
            "Give an example of how this word is used.",
            "Write a sentence with this word.",
            "Show the use of {input}.",
        ),
        ("Put the word into a sentence.", "Write something in which {input} has a place."),
        _uses,
    ),
    "part-of-speech": Task(
        _part_of_speech,
        (
            "Which part of speech is this word?",
            "Is this a noun, a verb, an adjective or an adverb?",
            "Name the part of speech.",
            "What kind of word is {input}?",
        ),
        ("To which class of words does it belong?", "Say what part of speech we have here: {input}"),
        _same,
    ),
    "synonym": Task(
        _synonym,
        (
            "Give a word with the same meaning.",
            "Name a synonym.",
            "Which other word means the same?",
            "What is another word for {input}?",
        ),
        ("Find a word that could take its place.", "Say {input} in another word."),
        _is_synonym,
    ),
    "archaize": Task(
        _archaize,
        (),
        ("Rewrite this verse in the old English of King James.", "How did the old Bible say this? {input}"),
    ),
    "name": Task(
        _name,
        (),
        ("Which word has this meaning?", "Name the thing or act that is described: {input}"),
        _names,
    ),
    "fill": Task(
        _fill,
        (),
        ("Which word is missing?", "Fill the gap: {input}"),
        _same,
    ),
}
TRAINED = tuple(name for name, task in TASKS.items() if task.phrasings)
HELD_OUT = tuple(name for name, task in TASKS.items() if not task.phrasings)


@cache
def pairs(name: str, split: str) -> list[Pair]:
    """The (input, output) pairs of a task on a split; an input that recurs keeps its first output, and stands on one side
    only: the first of train, validation, test that has it."""
    check_split(split)
    if name not in TASKS:
        raise ValueError(f"the instruction tasks are {', '.join(TASKS)}, got {name!r}")
    earlier = {input for side in SPLITS[: SPLITS.index(split)] for input, _ in pairs(name, side)}
    found: dict[str, str] = {}
    for input, output in TASKS[name].pairs(split):
        if input not in earlier:
            found.setdefault(input, output)
    return list(found.items())


def phrase(pair: Pair, phrasing: str) -> Instruction:
    """The pair as a record, asked in these words."""
    input, output = pair
    if "{input}" in phrasing:
        return Instruction(phrasing.replace("{input}", input), "", output)
    return Instruction(phrasing, input, output)


def instructions(
    tasks: Sequence[str],
    split: str,
    held_out_phrasings: bool = False,
    cap: int | None = None,
    seed: int = 0,
    phrasings: int | None = None,
) -> list[Instruction]:
    """The records of some tasks, mixed in a random order; each record's phrasing is drawn at random.

    At most `cap` pairs of a task are taken, at random: the share of task i is min(Nᵢ, cap) / Σ min(Nⱼ, cap), the
    "examples-proportional mixing" of T5 (Raffel et al. 2020, section 3.5.2) and FLAN. What is drawn from a task depends
    on (seed, task) alone, and the pairs not on the phrasings, so that the same inputs can be asked in any. `phrasings`
    uses only the first so many.

    Raises ValueError for an unknown task or split, and for a held-out task without `held_out_phrasings`.
    """
    records = []
    for name in tasks:
        found, task = pairs(name, split), TASKS[name]
        known = (task.held_out_phrasings if held_out_phrasings else task.phrasings)[:phrasings]
        if not known:
            raise ValueError(f"the task {name!r} is held out: it has no phrasings to train on, only held-out ones")
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        chosen = rng.permutation(len(found))[:cap]
        asked = rng.integers(len(known), size=len(chosen))
        records += [phrase(found[i], known[k]) for i, k in zip(chosen, asked)]
    return [records[i] for i in np.random.default_rng(seed).permutation(len(records))]


def is_right(name: str, split: str, record: Instruction, answer: str) -> bool:
    """Whether an answer to one of `instructions([name], split, ...)` is right, white space and a last full stop aside.

    Of a word that is asked for, any is right that the dictionary has with that meaning. Raises ValueError for a task
    whose answers cannot be checked (`TASKS[name].check` is None), and for a record that is not of this task and split.
    """
    check = TASKS[name].check
    if check is None:
        raise ValueError(f"an answer to the task {name!r} cannot be right or wrong, only more or less probable")
    if record not in _asked(name, split):
        raise ValueError(f"the record is none of the task {name!r} on the split {split!r}: {record.instruction!r}")
    return check(*_asked(name, split)[record], answer)


@cache
def _asked(name: str, split: str) -> dict[Instruction, Pair]:
    """From every record of a task on a split to its pair, whatever the phrasing."""
    phrasings = (*TASKS[name].phrasings, *TASKS[name].held_out_phrasings)
    return {phrase(pair, phrasing): pair for pair in pairs(name, split) for phrasing in phrasings}
