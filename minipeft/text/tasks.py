"""The built-in tasks: real, checkable instructions over the shipped corpora, as {prompt, completion} records per split.

    rewrite   a verse of the King James Bible -> the same verse in Basic English
    define    a word and its part of speech -> its first meaning in WordNet
    use       a word and its part of speech -> an example phrase of WordNet's in which it stands

The splits are those of the corpora: no verse, headword or gloss of one is in another. The records are in a fixed order,
that of the corpora. A completion begins with a space, since the prompt ends with a colon.
"""

import re
from collections.abc import Callable

from minipeft.text.corpora import bible, wordnet
from minipeft.text.datasets import Completion

MAX_CHARACTERS = 240  # of a verse in either translation, about 80 tokens of the shipped tokenizer


def rewrite(split: str) -> list[Completion]:
    """Verses of at most MAX_CHARACTERS characters in both translations."""
    return [
        Completion(f"King James: {verse.king_james}\nPlain English:", f" {verse.basic_english}")
        for verse in bible(split)
        if max(len(verse.king_james), len(verse.basic_english)) <= MAX_CHARACTERS
    ]


def define(split: str) -> list[Completion]:
    """Every single, uncapitalized word that WordNet's tagged texts use in its first sense, with that sense's gloss."""
    return [
        Completion(f"Word: {word.lemma} ({synset.part_of_speech})\nMeaning:", f" {synset.definition}")
        for synset in wordnet(split)
        for word in synset.headwords
        if word.sense == 1 and word.count > 0 and re.fullmatch("[a-z]+", word.lemma)
    ]


def use(split: str) -> list[Completion]:
    """Every headword that stands, as it is, in one of its synset's examples, with the first such example."""
    records = []
    for synset in wordnet(split):
        for word in synset.headwords:
            example = next((example for example in synset.examples if _stands_in(word.lemma, example)), None)
            if example is not None:
                prompt = f"Word: {word.lemma} ({synset.part_of_speech})\nExample:"
                records.append(Completion(prompt, f" {example}"))
    return records


def _stands_in(word: str, example: str) -> bool:
    word, example = word.lower(), example.lower()
    return word in example and re.search(rf"\b{re.escape(word)}\b", example) is not None


TASKS: dict[str, Callable[[str], list[Completion]]] = {"rewrite": rewrite, "define": define, "use": use}


def task(name: str, split: str) -> list[Completion]:
    """The records of the task called `name`, of the split "train", "validation" or "test"."""
    if name not in TASKS:
        raise ValueError(f"the tasks are {', '.join(TASKS)}, got {name!r}")
    return TASKS[name](split)
