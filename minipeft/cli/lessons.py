"""List the lessons, run one or all.

A lesson is a Python file that also opens as a notebook: prose, equations, and claims that it asserts as it runs. They
live in the folder lessons/ of a checkout of the project and are not part of the installed package.

examples:
  minipeft lessons                  the list
  minipeft lessons 3                run lesson 3
  minipeft lessons all --reduced    run every lesson with fewer steps, as the tests do
  minipeft lessons --notebooks DIR  every lesson as an executed notebook (extra: pip install 'minipeft[book]')
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..book.lessons import REDUCED, LessonError, find_lessons, require_extra, title, write_notebooks
from .arguments import Arguments, Parser
from .outputs import check_no_file


def add_arguments(parser: Parser) -> None:
    parser.add_argument("lesson", nargs="?", metavar="NUMBER|all", help="which lesson to run (default: list them)")
    notebooks = "write them as executed notebooks, all unless one is named; one is left as it is while nothing changes"
    parser.add_argument("--notebooks", metavar="DIR", help=notebooks)
    add_reduced(parser)


def add_reduced(parser: Parser) -> None:
    parser.add_argument("--reduced", action="store_true", help=f"fewer steps, and fewer claims (sets {REDUCED}=1)")


def run(args: Arguments) -> int:
    lessons, failed = find_lessons(), []
    if args.lesson is None and args.notebooks is None:
        args.refuse(("reduced",), "without the NUMBER of a lesson, or all")
        listed = (f"{number:>3}  {title(path)}  ({path.name})" for number, path in lessons.items())
        print(*listed, "\nRun one with: minipeft lessons NUMBER", sep="\n")
        return 0
    chosen = {n: path for n, path in lessons.items() if args.lesson in ("all", None, str(n), f"{n:02}")}
    if not chosen:
        raise ValueError(f"no lesson {args.lesson!r}; there are {', '.join(map(str, lessons))}, and 'all'")
    if args.notebooks is not None:
        folder = Path(args.notebooks)

        def write(say: Callable[[str], None]) -> None:
            write_notebooks(chosen, folder, say)

        return execute(args, folder, "--notebooks", write)
    for number, path in chosen.items():
        print(f"── lesson {number}: {title(path)}", flush=True)
        started = time.perf_counter()
        environment = os.environ | ({REDUCED: "1"} if args.reduced else {})
        status = subprocess.run([sys.executable, str(path)], env=environment, check=False).returncode
        failed += [str(number)] if status else []
        seconds = time.perf_counter() - started
        print(f"── lesson {number}: {'FAILED' if status else 'done'} in {seconds:.0f} s", flush=True)
    if failed:
        print(f"minipeft: lessons that failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def execute(args: Arguments, folder: Path, option: str, write: Callable[[Callable[[str], None]], None]) -> int:
    """`write(say)`, which executes lessons, as notebooks, into the folder of an option, with --reduced; 1 where a cell fails."""
    require_extra()
    check_no_file(folder, option)
    if args.reduced:
        os.environ[REDUCED] = "1"
    try:
        write(lambda line: print(f"── {line}", flush=True))
    except LessonError as error:
        print(f"minipeft: {error}", file=sys.stderr)
        return 1
    return 0
