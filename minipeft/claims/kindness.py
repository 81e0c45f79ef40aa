"""A task in which a person sees an improvement: ending sentences kindly. Its prompts, and its gold reward.

    prompt    the first four words of a verse of the Bible in Basic English, where they are neutral: "And the servant came"
    gold      what a person would say: the answer ends its sentence, in English, without repeating itself, kindly

        gold = [whole] · known · ½^repeated · min(1, words / 8) · (1 + VADER) / 2            in [0, 1]

whole: the model has ended the answer, with the mark of a sentence's end. known is the share of its pairs of adjacent words
that stand in the training verses, each different pair counted once; repeated is the number of its words that were said before, in prompt or answer, and are none of the FREE ones. So
what no verse would say costs, "God is God" costs half, and so does an answer of four words, which says little. VADER
(Hutto & Gilbert 2014) is the sentiment of prompt and answer, in [-1, 1].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from ..rlhf.gold import vader
from ..text.corpora import bible

WORDS, ENOUGH = 4, 8  # of a prompt; of an answer that says enough
# words that may be said again
FREE = frozenset("""a all am and any are as at be been but by for from had has have he her him his i if in into is it let
me my no not of on one or our out said say says she so that the their them then there they this to up us was we were who
will with you your""".split())


def pairs_of_words(text: str, before: str = "") -> list[tuple[str, str]]:
    """Adjacent words and marks of a text, in small letters; the first with the last one of what stands before."""
    words = re.findall(r"[a-z'-]+|[.,:;?!]", text.lower())
    return list(zip([*re.findall(r"[a-z'-]+", before.lower())[-1:], *words], words if before else words[1:]))


@cache
def known() -> frozenset[tuple[str, str]]:
    """Every pair of the training verses."""
    return frozenset(pair for verse in bible("train") for pair in pairs_of_words(verse.basic_english))


def form(prompt: str, answer: str) -> float:
    """The part of the gold that is neither the end nor kind: known · ½^repeated · min(1, words / 8); 0 without words."""
    said, own = ([w.removesuffix("'s") for w in re.findall(r"[a-z'-]+", text.lower())] for text in (prompt, answer))
    if not own:
        return 0.0
    found = pairs_of_words(answer, prompt)
    repeated = sum(word not in FREE and word in (*said, *own[:i]) for i, word in enumerate(own))
    return len({*found} & known()) / len(found) / 2**repeated * min(1, len(own) / ENOUGH)


def gold(prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool]) -> np.ndarray:
    """The gold reward of answers: float64 [n] in [0, 1]. `ended`: whether the end-of-text token came."""
    whole = [bool(end) and answer.endswith((".", "?", "!")) for end, answer in zip(ended, answers)]
    kind = (1 + vader([prompt + answer for prompt, answer in zip(prompts, answers)])) / 2
    return np.array(whole) * kind * [form(prompt, answer) for prompt, answer in zip(prompts, answers)]


@cache
def sentences(split: str) -> dict[str, str]:
    """{neutral prompt: the first verse that begins with it}."""
    found: dict[str, str] = {}
    for verse in bible(split):
        found.setdefault(" ".join(verse.basic_english.split()[:WORDS]), verse.basic_english)
    openings = [opening for opening in found if len(found[opening].split()) > WORDS]
    return {opening: found[opening] for opening, score in zip(openings, vader(openings)) if score == 0}
