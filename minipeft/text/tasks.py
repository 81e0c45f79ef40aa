"""The built-in tasks over the shipped corpora, as {prompt, completion} records.

    rewrite   a verse of the King James Bible -> the same verse in Basic English
    define    a word and its part of speech -> its first meaning in WordNet
    use       a word and its part of speech -> an example phrase of WordNet's that contains it
    source    a sentence -> which of three books it is from (as many from each: `BOOKS`)

The splits are those of the corpora: no verse, headword or gloss of one is in another. Records are in the order of the
corpora. A completion begins with a space, since the prompt ends with a colon. (`instructions` has more tasks, in
words.)
"""

import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from .corpora import Verse, austen, bible, wordnet
from .datasets import Completion

BOOKS = ("Jane Austen", "the Basic English Bible", "the King James Bible")
MAX_CHARACTERS = 240  # of a verse in either translation, about 80 tokens of the shipped tokenizer


class Entry(NamedTuple):
    """A word of the dictionary in one of its senses, and a text about it: the definition, or an example phrase."""

    word: str
    part_of_speech: str
    text: str


@cache
def verses(split: str) -> list[Verse]:
    """The verses of at most MAX_CHARACTERS characters in both translations."""
    return [v for v in bible(split) if max(len(v.king_james), len(v.basic_english)) <= MAX_CHARACTERS]


@cache
def definitions(split: str) -> list[Entry]:
    """Every single, uncapitalized word that WordNet's tagged texts use in its first sense, with that sense's gloss."""
    return [
        Entry(word.lemma, synset.part_of_speech, synset.definition)
        for synset in wordnet(split)
        for word in synset.headwords
        if word.sense == 1 and word.count > 0 and re.fullmatch("[a-z]+", word.lemma)
    ]


@cache
def examples(split: str) -> list[Entry]:
    """Every headword that one of its synset's examples contains as it is, with the first such example."""
    return [
        Entry(word.lemma, synset.part_of_speech, example)
        for synset in wordnet(split)
        for word in synset.headwords
        for example in [next((text for text in synset.examples if stands_in(word.lemma, text)), None)]
        if example is not None
    ]


@cache
def sources(split: str) -> list[tuple[str, str]]:
    """Pairs (sentence, its book), the same number from each of BOOKS, all about as long as a verse."""
    lines = (line for chapter in austen(split) for line in chapter.text.split("\n"))
    # a sentence ends after a word of four small letters or more, so not after "Mr." or "Mrs."
    sentences = dict.fromkeys(part for line in lines for part in re.split(r"(?<=[a-z]{4}[.!?]) (?=[A-Z])", line))
    short = [sentence for sentence in sentences if 60 <= len(sentence) <= 160 and '"' not in sentence]
    either = [v for v in bible(split) if 60 <= min(len(v.king_james), len(v.basic_english)) <= 160]
    found = []
    for sentence, one, other in zip(short, either[::2], either[1::2]):
        found += [(sentence, BOOKS[0]), (one.king_james, BOOKS[2]), (other.basic_english, BOOKS[1])]
    return found


def stands_in(word: str, text: str) -> bool:
    """Whether `word` is one of the words of `text`, in small or capital letters."""
    word, text = word.lower(), text.lower()
    at = text.find(word)
    while at >= 0:  # what re.search(rf"\b{re.escape(word)}\b", text) does, for which each word would be compiled
        if _edge(text, at) and _edge(text, at + len(word)):
            return True
        at = text.find(word, at + 1)
    return False


def _edge(text: str, i: int) -> bool:
    """Whether a word begins or ends before the character i, as \\b says."""
    before, after = text[i - 1 : i] if i else "", text[i : i + 1]
    return (before.isalnum() or before == "_") != (after.isalnum() or after == "_")


def rewrite(split: str) -> list[Completion]:
    """The verses, King James to Basic English."""
    return [Completion(f"King James: {v.king_james}\nPlain English:", f" {v.basic_english}") for v in verses(split)]


def define(split: str) -> list[Completion]:
    """The words of `definitions`."""
    return [Completion(f"Word: {e.word} ({e.part_of_speech})\nMeaning:", f" {e.text}") for e in definitions(split)]


def use(split: str) -> list[Completion]:
    """The words of `examples`."""
    return [Completion(f"Word: {e.word} ({e.part_of_speech})\nExample:", f" {e.text}") for e in examples(split)]


def source(split: str) -> list[Completion]:
    """The sentences of `sources`, and whose they are."""
    return [Completion(f"Sentence: {sentence}\nBook:", f" {book}") for sentence, book in sources(split)]


TASKS: dict[str, Callable[[str], list[Completion]]] = {"rewrite": rewrite, "define": define, "use": use, "source": source}
CHOICES = {"source": tuple(f" {book}" for book in BOOKS)}  # of a task that is a choice: its completions


def task(name: str, split: str) -> list[Completion]:
    """The records of a task, of the split "train", "validation" or "test". Raises ValueError for another of either."""
    if name not in TASKS:
        raise ValueError(f"the tasks are {', '.join(TASKS)}, got {name!r}")
    return TASKS[name](split)
