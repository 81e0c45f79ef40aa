"""The rows of a sweep: one object a line in a JSONL file, the settings of a run and what it measured.

    {"run": "run", "settings": ["r", "seed"], "r": 4, "seed": 0, "qualname": "my_sweep.run", "loss": 2.31}
    {"run": "run", "settings": ["r", "seed"], "r": 8, "seed": 0, ..., "error": "...", "traceback": "..."}
    {"run": "Precise", "method": "full", ..., "seed": 0, "qualname": "precision.run", "task_loss": 2.34}

The second run failed. The third's settings are a dataclass, whose name stands in "run". "qualname" is the function that
measured; "minipeft", not shown here, the version of the package, and "source_digest" what the function's source was.
Older rows have none of these. JSON has no number that is not finite: in the file it is the text "NaN", "Infinity" or
"-Infinity", which is read as a float.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import inspect
import json
import math
import operator
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..directory import take
from ..files import FileError, fsync_directory, parse_json
from ..options import fits

Row = dict[str, Any]
# that no setting and no measurement can be called
FIELDS = ("run", "settings", "qualname", "minipeft", "source_digest", "version", "traceback")
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
SPECIAL = b"NaN", b"Infinity", b"\\u"  # a line without them is read as JSON has it


def described(settings: Any, run: Callable[..., Any] | None = None) -> Row:
    """Settings as the part of a row that identifies it: of a dataclass, its name and all its fields; of a dictionary,
    the name of the function `run`, the names of the settings, and the settings.

    Raises ValueError for a setting with the name of another field, TypeError for a value that is not one of JSON.
    """
    given = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings
    if not isinstance(given, Mapping):
        raise TypeError(f"settings must be a dictionary or a dataclass, not {settings!r}")
    for name, value in given.items():
        if name in (*FIELDS, "error"):
            raise ValueError(f"a setting cannot be called {name!r}: a row has that field already")
        if getattr(value, "ndim", 0):
            raise TypeError(f"the setting {name!r} is an array {list(value.shape)}: give a number, a text or a list")
    if given is not settings:
        return plain({"run": type(settings).__name__, **given})
    function = run.func if isinstance(run, partial) else run
    name = getattr(function, "__name__", type(function).__name__)
    return plain({"run": name, "settings": sorted(settings), **settings})


def qualname(run: Callable[..., Any]) -> str:
    """The file and the qualified name of a function, "my_sweep.run", or of a callable object's class.

    The file is the module's last name, the same whether the module is imported or is the script that runs; a notebook
    has none. A partial goes by its function.
    """
    function = _defined(run)
    module = function.__module__ or ""
    if module == "__main__":
        module = Path(getattr(sys.modules["__main__"], "__file__", None) or "").stem
    return ".".join(filter(None, (module.rpartition(".")[2], function.__qualname__)))


def source_digest(run: Callable[..., Any]) -> str | None:
    """Twelve digits of the SHA-256 of a function's source, not of what it calls; None where no source can be read."""
    try:
        return hashlib.sha256(inspect.getsource(_defined(run)).encode()).hexdigest()[:12]
    except (OSError, TypeError):  # typed at a prompt; written in C
        return None


def _defined(run: Callable[..., Any]) -> Any:
    """What def or class made: a partial's function, a callable object's class."""
    function = run.func if isinstance(run, partial) else run
    return function if hasattr(function, "__qualname__") else type(function)


def plain(value: Any, name: str = "") -> Any:
    """A value of JSON's types, as it is read back: NumPy's scalars and arrays become Python's, paths become texts.

    Raises TypeError, with the name, for what is none.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(v, f"{name}.{key}" if name else str(key)) for key, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain(v, name) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(value) and hasattr(value, "__self__"):
        raise TypeError(f"a row holds what a method returns, and {name} is the method {value.__name__} itself: call it")
    if hasattr(value, "item") and hasattr(value, "shape"):
        made = f"a {type(value).__name__} {list(value.shape)}"
        raise TypeError(f"a row holds numbers, and {name} is {made}: .item() has one")
    raise TypeError(f"a row holds numbers, texts, None, and lists and dictionaries of them; {name} is {value!r}")


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A plain value with leaf(x) in the place of every x that is no list and no dictionary."""
    if isinstance(value, dict):
        return {key: mapped(v, leaf) for key, v in value.items()}
    return [mapped(v, leaf) for v in value] if isinstance(value, list) else leaf(value)


def _json(value: Any) -> Any:
    """A number as JSON has it: one that is not finite becomes a text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def key(value: Any) -> Any:
    """A plain value as a key of dictionaries; NaN is equal to NaN, and True is not 1."""
    if isinstance(value, dict):
        return dict, *sorted((name, key(v)) for name, v in value.items())
    if isinstance(value, list):
        numbers = {*map(type, value)} <= {int, float} and all(map(operator.eq, value, value))  # fast, for one an item
        return tuple(value) if numbers else tuple(map(key, value))
    return "NaN" if value != value else (bool, value) if isinstance(value, bool) else value


def failed(row: Row) -> bool:
    """Whether the run failed: its row has "error" and "traceback"."""
    return "traceback" in row


def finder(rows: Iterable[Row]) -> Callable[[Row], Row | None]:
    """A function from what identifies a row (`described`) to the first such row of a run that did not fail, or None."""
    rows = [row for row in rows if not failed(row)]
    tables: dict[tuple[str, ...], dict[Any, Row]] = {}  # by the names that identify

    def find(wanted: Row) -> Row | None:
        names = tuple(wanted)
        if names not in tables:
            having = [row for row in reversed(rows) if all(name in row for name in names)]
            tables[names] = {key({name: row[name] for name in names}): row for row in having}
        return tables[names].get(key(wanted))

    return find


def complete(rows: Sequence[Row], runs: Sequence[Any]) -> tuple[list[Row], list[int]]:
    """(rows, seeds) of those seeds of which every run is there, so that means are over the same seeds everywhere."""
    find = finder(rows)
    missing = {s.seed for s in runs if find(described(s)) is None}
    whole = sorted({s.seed for s in runs} - missing)
    return [row for row in rows if row.get("seed") in whole], whole


def read_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of a file, the first of each run; of one that failed every time, the last. None where there is no file.

    Rows of all versions are among them: `[row for row in read_rows(path) if row.get("version") == "2"]`.

    A last line that a kill cut off is no row. Raises FileError, naming the line, for what else is none.
    """
    path, rows = Path(path), []
    if not path.exists():
        return rows
    *lines, last = path.read_bytes().split(b"\n")
    if last and not _is_cut(last):
        lines.append(last)
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise FileError(f"{path}, line {number}: not valid JSON: {getattr(error, 'msg', error)}") from error
        names = row.get("settings", []) if isinstance(row, dict) and "run" in row else None
        if not fits(names, list[str]) or not {*names} <= row.keys():
            raise FileError(f"{path}, line {number}: not a row of a sweep: an object with 'run', and all that 'settings' names")
        rows.append(plain(row) if any(text in line for text in SPECIAL) else row)
    find, found = finder(rows), {}
    for row in rows:
        known = {*FIELDS, *row["settings"]} if "settings" in row else {*row}  # which are a dataclass's, no row says
        known -= {"minipeft", "source_digest"} | ({"error", "traceback"} if failed(row) else set())
        run = {name: value for name, value in row.items() if name in known}
        if not failed(row):
            found.setdefault(key(run), row)
        elif find(run) is None:
            found[key(run)] = row
    return list(found.values())


def add_row(path: str | os.PathLike, row: Row) -> None:
    """Append a line, on the disk when this returns. Several processes may add rows to one file.

    A line that a kill cut off is taken out first. Raises OSError, with the file as it was, where the disk is full.
    """
    path, new = Path(path), not os.path.exists(path)
    line = f"{json.dumps(mapped(row, _json), allow_nan=False)}\n".encode()
    with open(path, "a+b", buffering=0) as file:
        while not take(file):
            time.sleep(0.005)
        end = file.seek(0, os.SEEK_END)
        tail = _last_line(file, end)
        if _is_cut(tail):
            end -= len(tail)
            file.truncate(end)
        elif tail:
            line = b"\n" + line
        if file.write(line) < len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(file.fileno())
    if new:
        fsync_directory(path.parent)


def _last_line(file: Any, end: int) -> bytes:
    """What stands after the last newline of a file of `end` bytes."""
    tail, block = b"", 1 << 16
    while end and b"\n" not in tail:
        start = max(0, end - block)
        file.seek(start)
        tail, end = file.read(end - start) + tail, start
    return tail.rpartition(b"\n")[2]


def _is_cut(line: bytes) -> bool:
    """Whether a last line without a newline is the beginning of one that `add_row` was writing when it was killed."""
    begin = b'{"run": '
    if not line or not begin.startswith(line[: len(begin)]):
        return False
    try:
        parse_json(line)
    except ValueError as error:  # others are of what `add_row` does not write
        return isinstance(error, json.JSONDecodeError)
    return False
