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

from collections.abc import Callable
from pathlib import Path

from .arguments import Arguments, Parser
from .lessons import add_reduced, execute


def add_arguments(parser: Parser) -> None:
    parser.add_argument("out", metavar="OUT", help="the directory that the book is written to")
    add_reduced(parser)


def run(args: Arguments) -> int:
    out = Path(args.out)

    def write(say: Callable[[str], None]) -> None:
        from ..book.site import build

        written = build(out, say)
        print(f"{out / 'index.html'}{'' if written else ': nothing has changed'}")

    return execute(args, out, "OUT", write)
