"""List the lessons, run one or all.

A lesson is a Python file that also opens as a notebook: prose, equations, and claims that it asserts as it runs. They
live in the folder lessons/ of a checkout of the project and are not part of the installed package.

examples:
  minipeft lessons                  the list
  minipeft lessons 3                run lesson 3
  minipeft lessons all --reduced    run every lesson with fewer steps, as the tests do
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from .arguments import Arguments, Parser

REDUCED = "MINIPEFT_REDUCED"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("lesson", nargs="?", metavar="NUMBER|all", help="which lesson to run (default: list them)")
    parser.add_argument("--reduced", action="store_true", help=f"fewer steps, and fewer claims (sets {REDUCED}=1)")


def run(args: Arguments) -> int:
    lessons, failed = find_lessons(), []
    if args.lesson is None:
        listed = (f"{number:>3}  {title(path)}  ({path.name})" for number, path in lessons.items())
        print(*listed, "\nRun one with: minipeft lessons NUMBER", sep="\n")
        return 0
    chosen = {n: path for n, path in lessons.items() if args.lesson in ("all", str(n), f"{n:02}")}
    if not chosen:
        raise ValueError(f"no lesson {args.lesson!r}; there are {', '.join(map(str, lessons))}, and 'all'")
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


def find_lessons() -> dict[int, Path]:
    """number -> file, of lessons/ in the working directory, else beside the package. FileNotFoundError for none."""
    places = [Path.cwd() / "lessons", Path(__file__).resolve().parents[2] / "lessons"]
    for place in places:
        if found := {int(n[1]): path for path in place.glob("*.py") if (n := re.match(r"(\d+)_", path.name))}:
            return dict(sorted(found.items()))
    where = "they come with a checkout of the project, not with the installed package; run this from its top level"
    raise FileNotFoundError(f"no lessons in {' or '.join(map(str, dict.fromkeys(places)))}: {where}")


def title(path: Path) -> str:
    """The first Markdown heading of a lesson, or its file name's words."""
    heading = re.search(r"^#[ \t]+#+[ \t]+(.+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return heading[1].strip() if heading else path.stem.replace("_", " ")
