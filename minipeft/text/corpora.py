"""The corpora that ship with the package, one list per split: aligned Bible verses, Jane Austen's novels, WordNet.

A corpus is loaded at its first use and kept; an unknown split raises ValueError, a damaged file FileError. `build_corpora` says where they come
from and how the splits are kept apart.
"""

import gc
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import NamedTuple, TypeVar

from ..files import expecting
from .splits import check_split

T = TypeVar("T")
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


class Verse(NamedTuple):
    """One verse in two translations, aligned."""

    book: str
    chapter: int
    verse: int
    king_james: str
    basic_english: str


class Chapter(NamedTuple):
    """One chapter of a novel; its paragraphs are the lines of `text`."""

    novel: str
    chapter: int
    text: str


class Headword(NamedTuple):
    """A word that a synset defines, in one of its senses.

    `sense` 1 is the word's most usual one; `count` is how often WordNet's hand-tagged texts use the word in this sense.
    """

    lemma: str
    sense: int
    count: int


class Synset(NamedTuple):
    """A WordNet gloss: the words it defines (of this split), their part of speech, the definition, example phrases."""

    headwords: tuple[Headword, ...]
    part_of_speech: str
    definition: str
    examples: tuple[str, ...]


@cache
def bible(split: str) -> list[Verse]:
    """Verses of `split` ("train", "validation" or "test"), in the Bible's order."""
    return _rows("bible", split, lambda book, chapter, verse, *texts: Verse(book, int(chapter), int(verse), *texts))


@cache
def austen(split: str) -> list[Chapter]:
    """Chapters of Jane Austen's six novels; chapters are counted from 1 through all volumes of a novel."""
    return _rows("austen", split, lambda novel, chapter, text: Chapter(novel, int(chapter), text.replace("\\n", "\n")))


@cache
def wordnet(split: str) -> list[Synset]:
    """WordNet's synsets: nouns, then verbs, adjectives and adverbs."""
    synsets = []
    for short, part_of_speech in PARTS_OF_SPEECH.items():

        def synset(words: str, definition: str, examples: str, part_of_speech: str = part_of_speech) -> Synset:
            triples = (word.rsplit("#", 2) for word in words.split("|"))
            headwords = tuple(Headword(lemma, int(sense), int(count)) for lemma, sense, count in triples)
            return Synset(headwords, part_of_speech, definition, tuple(filter(None, examples.split("|"))))

        synsets += _rows(f"wordnet-{short}", split, synset)
    return synsets


def general_text(split: str) -> list[str]:
    """Documents of general English, on which the base model is pretrained: every corpus once, in a fixed order.

    A document is a chapter of the King James Bible, a chapter of the Basic English Bible, a chapter of a novel, or one
    synset as `word, other word (noun): definition; "an example"`. They are not shuffled: a trainer does that.
    """
    return [document for documents in general_corpora(split).values() for document in documents]


def general_corpora(split: str) -> dict[str, list[str]]:
    """The documents of `general_text` by their corpus: "king-james", "basic-english", "austen" and "wordnet"."""
    chapters = [list(verses) for _, verses in groupby(bible(split), key=lambda verse: (verse.book, verse.chapter))]
    synsets = []
    for synset in wordnet(split):
        words = ", ".join(headword.lemma for headword in synset.headwords)
        examples = "".join(f'; "{example}"' for example in synset.examples)
        synsets.append(f"{words} ({synset.part_of_speech}): {synset.definition}{examples}")
    return {
        "king-james": [" ".join(verse.king_james for verse in chapter) for chapter in chapters],
        "basic-english": [" ".join(verse.basic_english for verse in chapter) for chapter in chapters],
        "austen": [chapter.text for chapter in austen(split)],
        "wordnet": synsets,
    }


@contextmanager
def _without_collector() -> Iterator[None]:
    """For the making of many objects that stay: each look for garbage would go through all of them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _rows(name: str, split: str, make: Callable[..., T]) -> list[T]:
    """What `make` makes of the columns of each line of a split. Raises FileError for a damaged file."""
    check_split(split)
    place, prefix = files("minipeft.text").joinpath("data", f"{name}.tsv.xz"), split + "\t"
    with expecting("the corpus, compressed text", place), _without_collector():
        lines = lzma.decompress(place.read_bytes()).decode("utf-8").split("\n")[:-1]
        return [make(*line[len(prefix) :].split("\t")) for line in lines if line.startswith(prefix)]
