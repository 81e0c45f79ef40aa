"""Check an answer to an exercise of a lesson.

Without an answer the exercise is printed; what is asked stands in the lesson, and without a checkout of the project only
its title is known. An answer is a number (to three digits, a count exactly), several numbers, a word, or a Python file
with the function that is asked for: it is run, and hidden tests call the function. The exit status is 1 for a wrong
answer.

examples:
  minipeft exercise               the list
  minipeft exercise 04.1          what is asked
  minipeft exercise 04.1 65536    is it right?
  minipeft exercise 04.2 mine.py  the same of the function in a file
"""

from __future__ import annotations

import re
from typing import Any

from .arguments import Arguments, Parser
from .foreign import function_in_file
from .lessons import find_lessons


def add_arguments(parser: Parser) -> None:
    parser.add_argument("exercise", nargs="?", metavar="LESSON.NUMBER", help="which one (default: list them)")
    parser.add_argument("answer", nargs="*", metavar="ANSWER", help="numbers, a word, or FILE.py")


def run(args: Arguments) -> int:
    from ..exercises import EXERCISES, check, find
    from ..exercises.kinds import Code

    if args.exercise is None:
        print(*(f"{name}  {exercise.title:32}{exercise.asks_for}" for name, exercise in EXERCISES.items()), sep="\n")
        return 0
    exercise = find(args.exercise)
    if not args.answer:
        known = f"{exercise.title}: {exercise.asks_for} (the rest is in the lesson, which comes with a checkout of the project)"
        print(question(args.exercise.zfill(4)) or known)
        return 0
    answer: Any = " ".join(args.answer)
    if isinstance(exercise, Code):
        answer = function_in_file(answer, exercise.name)
    return 0 if check(args.exercise, answer) else 1


def question(name: str) -> str:
    """An exercise as its lesson has it; "" without the lessons."""
    try:
        lesson = find_lessons()[int(name[:2])].read_text(encoding="utf-8")
    except (FileNotFoundError, KeyError):
        return ""
    text = re.sub(r"^# ?", "", lesson, flags=re.MULTILINE)
    found = re.search(rf"^\*\*{re.escape(name)} .*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    return found[0] if found else ""
