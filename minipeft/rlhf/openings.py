"""Prompts for a model to continue: how sentences of the shipped novels begin."""

from __future__ import annotations

import re
from functools import cache

from ..text.corpora import austen

_SENTENCE = re.compile(
    r"(?:(?<=[.!?] )|^)(?<!\bMr\. )(?<!\bMrs\. )(?<!\bDr\. )[A-Z][^.!?\n\"()]{40,200}[.!?](?=\s|$)", re.MULTILINE
)


def sentence_openings(split: str, words: int = 5) -> list[str]:
    """The first `words` words of every plain sentence of Jane Austen's novels, each opening once, in the novels' order.

    Plain: 40 to 200 characters without quotation marks or parentheses. The splits are those of the corpora.
    """
    return [*_openings(split, words)]


@cache
def _openings(split: str, words: int) -> tuple[str, ...]:
    sentences = (sentence.split() for chapter in austen(split) for sentence in _SENTENCE.findall(chapter.text))
    return tuple(dict.fromkeys(" ".join(sentence[:words]) for sentence in sentences if len(sentence) > words))
