"""The lessons as a book: a static site to read from disk, with every output, formula and figure.

Executes the lessons, in full unless --reduced, and writes OUT/index.html: the lessons, the reference of
the library, the claims, the glossary, search. Nothing is loaded from a network. What is executed once stays in
OUT/notebooks until the lesson, the library or the rows that it reads change; interrupted, it goes on there.

Needs the extra: pip install 'minipeft[book]'

examples:
  minipeft book site                then open site/index.html
  minipeft book site --reduced      with fewer steps, in minutes
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..book.lessons import REDUCED, LessonError, require_extra
from .arguments import Arguments, Parser


def add_arguments(parser: Parser) -> None:
    parser.add_argument("out", metavar="OUT", help="the directory that the book is written to")
    parser.add_argument("--reduced", action="store_true", help=f"fewer steps, and fewer claims (sets {REDUCED}=1)")


def run(args: Arguments) -> int:
    require_extra()
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT {out} is a file; a directory is to be written")
    if args.reduced:
        os.environ[REDUCED] = "1"
    from ..book.site import build

    try:
        written = build(out, lambda line: print(f"── {line}", flush=True))
    except LessonError as error:
        print(f"minipeft: {error}", file=sys.stderr)
        return 1
    print(f"{out / 'index.html'}{'' if written else ': nothing has changed'}")
    return 0
