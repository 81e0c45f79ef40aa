"""The standard streams, whatever a command is given: closed, of a narrow encoding, a full disk, a terminal."""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STDOUT = "standard output"  # the file name of its errors
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal obeys, but for tab and line break


def escaped(text: str) -> str:
    """Text in ASCII, as in JSON: é as \\u00e9."""
    import json  # only where there is something to escape: it would take a tenth of the time of --help

    return json.dumps(text)[1:-1].replace("\x7f", "\\u007f")


def printable(text: str) -> str:
    """Text whose control characters are shown, ESC as \\u001b, where a terminal would obey them."""
    return CONTROL.sub(lambda found: escaped(found[0]), text)


class _Output:
    """Standard output that says its name where it cannot be written."""

    def __init__(self, file: Any):
        self._file = file

    def write(self, text: str) -> int:
        return self._named(self._file.write, text)

    def flush(self) -> None:
        self._named(self._file.flush)

    def _named(self, write: Callable[..., Any], *text: str) -> Any:
        try:
            return write(*text)
        except OSError as error:
            error.filename = STDOUT
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # or Python would try again at its end, and complain
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Terminal(_Output):
    """Standard output that shows control characters, where a terminal would obey them. Those of Rich it obeys."""

    def __init__(self, terminal: Any):
        super().__init__(terminal)
        self.rich_proxied_file = terminal  # Rich's name for where its own output goes

    def write(self, text: str) -> int:
        return super().write(printable(text))


def open_closed_streams() -> None:
    """Where a standard stream is closed, nothing is read from it, and what is written goes nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # in this order, so that each gets its own number: no file of ours does
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    codecs.register_error("minipeft", lambda error: (escaped(error.object[error.start : error.end]), error.end))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is escaped, by which JSON stays JSON
            stream.reconfigure(errors="minipeft")


@contextmanager
def safe_output() -> Iterator[None]:
    """Inside, standard output says where it cannot be written, and no text of a model or file controls the terminal."""
    before = sys.stdout
    sys.stdout = (_Terminal if before.isatty() else _Output)(before)
    try:
        try:
            yield
        except SystemExit:  # argparse's way to end after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    finally:
        sys.stdout = before
