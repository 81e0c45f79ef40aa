"""The lessons' exercises check themselves:

    from minipeft.exercises import check
    check("04.1", 65_536)      # a number, several, a word, or a function, which hidden tests run

prints whether the answer is right, and of a wrong one a hint, or the case that the function fails. What is asked stands in
the lesson, under "Exercises"; `minipeft exercise 04.1` prints it. Numbers are asked for to three digits, unless it says
otherwise, and counts exactly. Right numbers are computed here by the library.
"""

from __future__ import annotations

import difflib
from typing import Any

from . import alignment, costs, foundations, judging, merging, methods, variants
from .kinds import Code, Number, Word

PARTS = foundations, methods, variants, alignment, costs, judging, merging
LESSONS = {lesson: exercises for part in PARTS for lesson, exercises in part.EXERCISES.items()}
EXERCISES: dict[str, Number | Word | Code] = {
    f"{lesson:02}.{i}": exercise for lesson in sorted(LESSONS) for i, exercise in enumerate(LESSONS[lesson], 1)
}


def check(name: str, answer: Any) -> bool:
    """Print whether an answer is right, and return it. Raises ValueError as `judge` does."""
    complaint = judge(name, answer)
    print(f"{name}: not yet; {complaint}" if complaint else f"{name}: right")
    return not complaint


def judge(name: str, answer: Any) -> str:
    """What is wrong with an answer, "" of a right one.

    Raises ValueError for an unknown exercise, with the nearest, and for an answer that is not of the kind asked for.
    """
    exercise = find(name)
    try:
        return exercise.complaint(answer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def find(name: str) -> Number | Word | Code:
    """The exercise of this name, "04.1" or "4.1"; ValueError, with the nearest, where there is none."""
    padded = str(name).zfill(4)
    if padded not in EXERCISES:
        near = difflib.get_close_matches(padded, EXERCISES, n=3, cutoff=0)
        raise ValueError(f"no exercise {name!r}; nearest: {', '.join(near)}")
    return EXERCISES[padded]
