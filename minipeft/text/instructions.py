"""Multi-task instruction data: ten tasks over the shipped corpora, each in several phrasings, as Alpaca's records.

    trained     rewrite         a verse of the King James Bible -> in Basic English
                continue        the beginning of such a verse -> its end
                source          a sentence -> which of three books it is from                               (checked)
                define          a word -> its meaning
                use             a word -> a phrase with it                                                  (checked)
                part-of-speech  a word and its meaning -> noun, verb, adjective or adverb                   (checked)
                synonym         a word -> another with the same meaning                                     (checked)
    held out    archaize        a verse in Basic English -> in King James' (rewrite, reversed)
                name            a meaning -> the word (define, reversed)                                 (checked)
                fill            a phrase with a gap -> the missing word                                     (checked)

A test asks for three new things, each by itself:

    new inputs      the split "test" (or "validation"), trained tasks, trained phrasings
    new phrasings   the same inputs, in words that no training record uses
    new tasks       the held-out tasks, which no training record shows

The splits are those of the corpora (no verse, chapter, headword, gloss or example phrase is in two of them, see
`build_corpora`). Where parts of texts still coincide (two verses begin alike), the later split leaves them out: no
input of a task occurs in two splits. A held-out task asks about the test side only, so its answers were never inputs
either.

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

from .corpora import wordnet
from .datasets import Instruction
from .splits import SPLITS, check_split
from .tasks import Entry, definitions, examples, sources, stands_in, verses

Pair = tuple[str, str]  # input, output


@dataclass(frozen=True)
class InstructionTask:
    """A task: what is asked, and in which words.

    pairs      split -> its (input, output) pairs, in a fixed order
    phrasings  the instructions of training; one that contains {input} asks in one sentence, without a separate input
    held_out_phrasings    those of tests
    check      (input, output, answer) -> whether a model's answer is right; None where only the loss can judge
    """

    pairs: Callable[[str], Iterator[Pair]]
    phrasings: tuple[str, ...]
    held_out_phrasings: tuple[str, ...]
    check: Callable[[str, str, str], bool] | None = None


# ------------------------------------------------------------------------------------------- the pairs of each task


def _continue(split: str) -> Iterator[Pair]:
    """Verses of two parts, cut at the colon."""
    for verse in verses(split):
        begun, colon, rest = verse.king_james.partition(": ")
        if len(begun) >= 20 and len(rest) >= 20:
            yield begun + colon.rstrip(), rest


def _synonym(split: str) -> Iterator[Pair]:
    for synset in wordnet(split):
        words = [headword.lemma for headword in synset.headwords if _is_word(headword.lemma)]
        if len(words) > 1:
            yield f"{words[0]} ({synset.part_of_speech})", words[1]


def _fill(split: str) -> Iterator[Pair]:
    for entry in examples(split):
        if _is_word(entry.word):
            yield "".join("___" if part.lower() == entry.word else part for part in re.split(r"(\w+)", entry.text)), entry.word


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

TASKS: dict[str, InstructionTask] = {
    "rewrite": InstructionTask(
        lambda split: ((verse.king_james, verse.basic_english) for verse in verses(split)),
        ("Rewrite this verse in plain English.", "Say the same in simple words of today.",
         "Put this old text into easy English.", "In plain English, what is said here? {input}"),
        ("Make this verse easy to understand.", "Give these old words a simple form: {input}"),
    ),
    "continue": InstructionTask(
        _continue,
        ("Continue the verse.", "How does this verse of the Bible go on?",
         "Write the second part of this verse.", "Complete this verse: {input}"),
        ("Give the rest of the verse.", "What are the words after these? {input}"),
    ),
    "source": InstructionTask(
        lambda split: iter(sources(split)),
        ("From which book is this sentence?", "Name the source of this text.",
         "Who or what is quoted here?", "In which of the books does this stand? {input}"),
        ("Where was this written?", "Say from where this is taken: {input}"),
        _same,
    ),
    "define": InstructionTask(
        lambda split: ((_word(entry), entry.text) for entry in definitions(split)),
        ("Give the meaning of this word.", "Define the word.",
         "What does this word mean?", "What is the meaning of {input}?"),
        ("Explain this word.", "Tell me what {input} means."),
    ),
    "use": InstructionTask(
        lambda split: ((_word(entry), entry.text) for entry in examples(split)),
        ("Use this word in a phrase.", "Give an example of how this word is used.",
         "Write a sentence with this word.", "Show the use of {input}."),
        ("Put the word into a sentence.", "Write something in which {input} has a place."),
        _uses,
    ),
    "part-of-speech": InstructionTask(
        lambda split: ((f"{entry.word}: {entry.text}", entry.part_of_speech) for entry in definitions(split)),
        ("Which part of speech is this word?", "Is this a noun, a verb, an adjective or an adverb?",
         "Name the part of speech.", "What kind of word is {input}?"),
        ("To which class of words does it belong?", "Say what part of speech we have here: {input}"),
        _same,
    ),
    "synonym": InstructionTask(
        _synonym,
        ("Give a word with the same meaning.", "Name a synonym.",
         "Which other word means the same?", "What is another word for {input}?"),
        ("Find a word that could take its place.", "Say {input} in another word."),
        _is_synonym,
    ),
    "archaize": InstructionTask(
        lambda split: ((verse.basic_english, verse.king_james) for verse in verses(split)),
        (),
        ("Rewrite this verse in the old English of King James.", "How did the old Bible say this? {input}"),
    ),
    "name": InstructionTask(
        lambda split: ((entry.text, entry.word) for entry in definitions(split)),
        (),
        ("Which word has this meaning?", "Name the thing or act that is described: {input}"),
        _names,
    ),
    "fill": InstructionTask(_fill, (), ("Which word is missing?", "Fill the gap: {input}"), _same),
}  # fmt: skip
TRAINED = tuple(name for name, task in TASKS.items() if task.phrasings)
HELD_OUT = tuple(name for name, task in TASKS.items() if not task.phrasings)


@cache
def pairs(name: str, split: str) -> list[Pair]:
    """The (input, output) pairs of a task in a split.

    An input that recurs keeps its first output, and belongs to one split only: the first of train, validation, test
    that has it. Raises ValueError for an unknown task or split.
    """
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
    """The pair as a record that asks in these words."""
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
    "examples-proportional mixing" of T5 (Raffel et al. 2020, arXiv:1910.10683, section 3.5.2) and FLAN. What is drawn
    from a task depends on (seed, task) alone, and the pairs do not depend on the phrasings, so the same inputs can be
    asked in any words. `phrasings` is the number of phrasings to use, the first ones; None uses all.

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
    """Whether an answer to one of `instructions([name], split, ...)` is right. White space and full stops around it do
    not matter.

    Where a word is asked for, every word that the dictionary has with that meaning is right. Raises ValueError for a
    task whose answers cannot be checked (`TASKS[name].check` is None), and for a record that is not of this task and
    split.
    """
    check = TASKS[name].check
    if check is None:
        raise ValueError(f"an answer to the task {name!r} cannot be right or wrong, only more or less probable")
    if (pair := _pair(name, split, record)) is None:
        raise ValueError(f"the record is none of the task {name!r} on the split {split!r}: {record.instruction!r}")
    return check(*pair, answer)


def _pair(name: str, split: str, record: Instruction) -> Pair | None:
    """The pair that a record of a task in a split asks for, in any phrasing."""
    for phrasing in (*TASKS[name].phrasings, *TASKS[name].held_out_phrasings):
        before, within, after = phrasing.partition("{input}")
        input = record.instruction[len(before) : len(record.instruction) - len(after)] if within else record.input
        output = _outputs(name, split).get(input)
        if output is not None and record == phrase((input, output), phrasing):
            return input, output
    return None


@cache
def _outputs(name: str, split: str) -> dict[str, str]:
    """{input: output} of `pairs`."""
    return dict(pairs(name, split))
