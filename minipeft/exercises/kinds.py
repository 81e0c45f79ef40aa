"""Three kinds of exercises, by what answers them: a number (or several), a word, a function.

`exercise.complaint(answer)` is "" for a right answer, else a sentence on what is wrong with it; the sentence on a number
or a word does not give the solution away, that on a function shows a case that it fails. ValueError says that the answer
is not of the kind that is asked for.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Number:
    """`right()` computes the answer; `slips(right)` has what typical mistakes give, each under the hint that it earns."""

    title: str
    right: Callable[[], Any]
    slips: Callable[[Any], Mapping[str, Any]] = lambda right: {}
    within: float = 0.005  # of the right number; 0 for a count

    asks_for = "a number"

    def complaint(self, answer: Any) -> str:
        given, right = numbers(answer), np.ravel(np.asarray(self.right(), float))
        if given.size != right.size:
            wanted = "one number is" if right.size == 1 else f"{right.size} numbers are"
            raise ValueError(f"{wanted} asked for, not {given.size}")
        if self._near(given, right):
            return ""
        for hint, wrong in self.slips(right if right.size > 1 else right.item()).items():
            if self._near(given, np.ravel(np.asarray(wrong, float))):
                return hint
        i = np.argmax(~np.isclose(given, right, self.within or 1e-9, 0))
        which = "it" if right.size == 1 else f"number {i + 1}"
        if not np.isfinite(given[i]):
            return f"{which} is not finite"
        return f"{which} is too {'large' if given[i] > right[i] else 'small'}"

    def _near(self, given: np.ndarray, wanted: np.ndarray) -> bool:
        return bool(np.allclose(given, wanted, self.within or 1e-9, 1e-12))


@dataclass(frozen=True)
class Word:
    """One of several words; `right()` finds out which, and `hints` has a hint for wrong ones."""

    title: str
    right: Callable[[], str]
    choices: Sequence[str]
    hints: Mapping[str, str]

    @property
    def asks_for(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def complaint(self, answer: Any) -> str:
        given = answer.strip().lower() if isinstance(answer, str) else ""
        if given not in self.choices:
            raise ValueError(f"{self.asks_for} is asked for, and not {answer!r}")
        return "" if given == self.right() else self.hints[given]


@dataclass(frozen=True)
class Code:
    """A function, held against `reference` in each of `cases()`, {what is special about it: its arguments}.

    `signature` is the function as the exercise names it. `probe(function, *arguments)` gives what is compared, an array or a
    tuple of arrays: by default the function's result; or, as a text, what is wrong.
    """

    title: str
    signature: str
    reference: Callable[..., Any]
    cases: Callable[[], Mapping[str, tuple[Any, ...]]]
    probe: Callable[..., Any] = lambda function, *arguments: function(*arguments)

    @property
    def asks_for(self) -> str:
        return f"a function {self.signature}"

    @property
    def name(self) -> str:
        return self.signature.partition("(")[0]

    def complaint(self, answer: Any) -> str:
        if not callable(answer):
            raise ValueError(f"{self.asks_for} is asked for, and not {type(answer).__name__}")
        cases, results = self.cases(), []

        @functools.wraps(answer)  # an op's `definition`, too
        def function(*given: Any) -> Any:
            results.append(answer(*given))
            return results[-1]

        for i, (what, arguments) in enumerate(cases.items(), 1):
            where, own = f"case {i} of {len(cases)}, {what}", copy.deepcopy(arguments)
            try:
                with np.errstate(all="ignore"):
                    got = self.probe(function, *own)
            except Exception as error:  # whatever a learner's function may raise
                stops = f"gives {_kind(results[-1])}, on which the check stops" if len(results) == i else "stops"
                return f"{where}: it {stops} with {type(error).__name__}: {' '.join(str(error).split())}"
            if not _equal(own, arguments):
                return f"{where}: it changes its arguments"
            if problem := difference(got, self.probe(self.reference, *arguments)):
                return f"{where}: {problem}"
        return ""


def numbers(answer: Any) -> np.ndarray:
    """The numbers of an answer, [n]: of a text "65,536", "25%" or "1 2 3", a list of such, or anything with numbers."""
    if isinstance(answer, str):
        answer = answer.replace(" %", "%").split()
    try:
        if answer is None or np.iscomplexobj(answer):  # which NumPy takes for nan, or for its real part
            raise TypeError
        if isinstance(answer, list | tuple):
            return np.array([_number(word) if isinstance(word, str) else float(word) for word in answer], float)
        return np.ravel(np.asarray(answer, float))
    except OverflowError:
        raise ValueError("a number is asked for, and what is given is beyond 1.8e308, the largest of float64") from None
    except (TypeError, ValueError, RuntimeError):  # the last of a PyTorch tensor that requires gradients
        what = " ".join(map(str, answer)) if isinstance(answer, list | tuple) else type(answer).__name__
        raise ValueError(f"a number is asked for, and {what!r} is none") from None


def _number(word: str) -> float:
    bare = word.replace(",", "").replace("_", "")
    return float(bare[:-1]) / 100 if bare.endswith("%") else float(bare)


def difference(got: Any, wanted: Any, name: str = "it") -> str:
    """How a result differs from the right one, in words; "" where it does not, but for rounding."""
    if isinstance(wanted, str):
        return got
    if isinstance(wanted, tuple):
        if not isinstance(got, tuple | list) or len(got) != len(wanted):
            return f"{name} gives {_kind(got)}, and {len(wanted)} results are asked for"
        pairs = enumerate(zip(got, wanted), 1)
        return next((text for i, (g, w) in pairs if (text := difference(g, w, f"result {i}"))), "")
    try:
        array, wanted = np.asarray(got), np.asarray(wanted)
    except (TypeError, ValueError, RuntimeError):  # rows of different lengths, a PyTorch tensor that requires gradients
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        return f"{name} gives {_kind(got)}, where numbers are asked for"
    if array.shape != wanted.shape:
        return f"{name} has the shape {array.shape}, where {wanted.shape} is right"
    far = ~np.isclose(array.astype(float), wanted.astype(float), 1e-5, 1e-8)
    if not far.any():
        return ""
    place = np.unravel_index(np.argmax(far), far.shape)
    at = f" at [{', '.join(map(str, place))}]" if place else ""
    return f"{name} gives {_shown(array[place])}{at}, where {_shown(wanted[place])} is right"


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments are the same, with all that lists and tuples hold."""
    if isinstance(b, list | tuple):
        return isinstance(a, type(b)) and len(a) == len(b) and all(map(_equal, a, b))
    return np.array_equal(a, b)


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _shown(value: Any) -> str:
    return str(bool(value)) if np.asarray(value).dtype == bool else f"{value:.6g}"
