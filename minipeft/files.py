"""Files written whole or not at all: atomic replacement, JSON, safetensors.

A crash, a full disk or a `kill -9` at any moment leaves either the old file or the new one, never a part of one:
the bytes go to a temporary file beside the target, are flushed to the disk (`fsync`), and the temporary file is then
renamed over the target, which the file system does in one step.
"""

from __future__ import annotations

import errno
import json
import lzma
import math
import mmap
import os
import sys
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

READY = ".minipeft-ready"  # in a directory that is being replaced: the new files; see directory.py


class FileError(ValueError):
    """A file cannot be read as what it should be: missing, truncated, foreign or inconsistent."""


@contextmanager
def expecting(what: str, place: object, error: type[FileError] = FileError) -> Iterator[None]:
    """Inside, what Python raises where content has not the form that is expected becomes an `error` that says so."""
    try:
        yield
    except error:
        raise
    except _OF_ANOTHER_FORM as e:
        detail = e if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        raise error(f"{place}: does not hold {what} ({detail})") from e


_OF_ANOTHER_FORM = (
    ArithmeticError, AttributeError, EOFError, LookupError, OSError, TypeError, ValueError, lzma.LZMAError, zlib.error,
)  # fmt: skip


def write_atomic(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Let `write(file)` produce the bytes of `path`; the file appears complete, or, where that raises, not at all.

    Raises FileNotFoundError, naming the directory, where it is missing; as `check_replaceable`; any OSError names a file.
    """
    path = Path(path)
    check_replaceable(path)
    if not path.parent.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such directory", str(path.parent))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file, naming(path):
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def check_replaceable(path: Path, option: str = "") -> None:
    """ValueError, naming an option, where no file is to take the place of what is there: a directory, a device, a pipe."""
    linked = os.readlink(path) if path.is_symlink() else ""
    if linked.startswith("/proc/") or (path.exists() and not path.is_file()):  # /dev/stdout is a link to /proc/self/fd/1
        what = "a directory" if path.is_dir() else "a device, a pipe or an open file"
        raise ValueError(f"{option} {path}: is {what}; name a file".lstrip())


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """An OSError inside that names no file, such as that of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def fsync_directory(path: str | os.PathLike) -> None:
    """Make a rename inside the directory durable (a no-op where directories cannot be opened, as on Windows)."""
    with suppress(OSError):  # some network file systems do not support it; the rename itself has happened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically; a lone surrogate, as of the bytes of a path that are not UTF-8, as its escape."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def rewrite(paths: Iterable[str], change: Callable[[str, str], str]) -> None:
    """Give each text file the content `change(content, name)`, where that is another one; prints the paths of those files."""
    for path in map(Path, paths):
        before = path.read_text("utf-8")
        if (after := change(before, path.name)) != before:
            write_text(path, after)
            print(path)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON (two-space indent, final newline) atomically. Raises ValueError for NaN or infinity.

    A lone surrogate is read back as it was.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads` that raises ValueError alone, also for what is nested more than 100 levels deep."""
    try:
        value = json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if sum(map(text.count, "[{" if isinstance(text, str) else (b"[", b"{"))) <= 100:
        return value  # without a walk, which a long row of numbers would make slow
    level, depth = [value], 0
    while level := [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]:
        depth += 1
        if depth > 100:
            raise ValueError("nested more than 100 levels deep")
    return value


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file; FileError names the file and what is wrong with it."""
    try:
        value = parse_json(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file{unfinished(Path(path).parent)}") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise FileError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise FileError(f"{path}: must hold an object, got {type(value).__name__}")
    return value


def unfinished(directory: Path) -> str:
    """What an error adds where a process was killed while it was replacing the directory's files; else nothing."""
    hint = f"; a replacement was interrupted: the new files are in {READY}, and what writes there next puts them in place"
    return hint if (directory / READY).is_dir() else ""


def write_safetensors(
    path: str | os.PathLike, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write host arrays as a safetensors file, atomically. Same arrays, same bytes.

    Raises TypeError for a dtype that such a file does not have.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    try:
        data = save(contiguous, metadata)
    except (KeyError, SafetensorError) as error:
        raise TypeError(f"{path}: cannot be written as safetensors ({error})") from error
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    if "__metadata__" in head:
        head["__metadata__"] = dict(sorted(head["__metadata__"].items()))  # the library writes them in any order
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = len(text).to_bytes(8, "little") + text, memoryview(data)[8 + size :]
    write_atomic(path, lambda file: [file.write(part) for part in parts])


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file: (arrays by name, metadata). bfloat16 is widened to float32, bit for bit.

    The arrays are read-only views of a memory map: the file is read as its bytes are used. Raises FileError for a file
    that is missing, truncated or not safetensors.
    """
    stored, metadata = map_safetensors(path)
    arrays = {name: tensor.read() for name, tensor in stored.items()}
    for name, tensor in stored.items():
        arrays[name].flags.writeable = not tensor.is_view
    return arrays, metadata


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: shape and dtype are known, the values are read when they are asked for.

    shape    as the array will have it
    dtype    of the array that `read` gives
    is_view  whether `read` gives a view of the file's memory map, and not an array of its own
    read     the values, an array. A view may be written to: a page that is changed becomes this process's own copy, and
             the file stays as it is.
    release  take the file's pages around this tensor out of memory again, before anything is written to the map
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    is_view: bool
    read: Callable[[], np.ndarray]
    release: Callable[[], None]


class MappedFile:
    """The bytes of a file, mapped privately: read as they are used, never written back."""

    def __init__(self, path: str | os.PathLike):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __len__(self) -> int:
        return len(self._map)

    def view(self, begin: int, end: int) -> np.ndarray:
        """The bytes from offset `begin` up to `end`: uint8 [end - begin]."""
        return np.frombuffer(self._map, np.uint8, end - begin, begin)

    def release(self, begin: int, end: int) -> None:
        """Take the pages between two byte offsets, and near them, out of memory: they are read again at their next use.

        To be called before anything is written to the map: what was written there would be as in the file again. (Pages
        near them, because the system may have mapped up to 2 MiB around every byte that was read.)
        """
        first, last = begin // _HUGE_PAGE * _HUGE_PAGE, min(-(-end // _HUGE_PAGE) * _HUGE_PAGE, len(self))
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


_HUGE_PAGE, _MOST_AXES = 1 << 21, 64  # of NumPy


def map_safetensors(path: str | os.PathLike) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """What a safetensors file holds, without reading it: (tensors by name, metadata). Raises as `read_safetensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):
            pass  # it has checked the header, and that the tensors fill the file, without holes
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        size = os.path.getsize(path)
        raise FileError(f"{path}: {size} bytes, no safetensors file, or a cut or damaged one ({error})") from error

    file = MappedFile(path)
    start = 8 + int.from_bytes(file.view(0, 8), "little")
    header = json.loads(file.view(8, start).tobytes())
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        code, shape = entry["dtype"], tuple(entry["shape"])
        if code != "BF16" and code not in _DTYPES:
            raise FileError(
                f"{path}: tensor {name!r} has the dtype {code}, which is not supported (one of {', '.join(_DTYPES)}, BF16)"
            )
        begin, end = (start + offset for offset in entry["data_offsets"])
        dtype = np.dtype(np.uint16 if code == "BF16" else _DTYPES[code])
        wide = np.dtype(np.float32) if code == "BF16" else dtype
        if len(shape) > _MOST_AXES or math.prod(n or 1 for n in shape) * wide.itemsize > sys.maxsize:
            raise FileError(f"{path}: tensor {name!r} has the shape {list(shape)}, which no array has")
        read = partial(_read, file, begin, end, dtype, shape, code == "BF16")
        tensors[name] = StoredTensor(shape, wide, code != "BF16", read, partial(file.release, begin, end))
    return tensors, metadata


def _read(
    file: MappedFile, begin: int, end: int, dtype: np.dtype, shape: tuple[int, ...], bfloat16: bool
) -> np.ndarray:
    array = file.view(begin, end).view(dtype).reshape(shape)
    if not bfloat16:
        return array
    wide = array.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
    "U16": "<u2", "U32": "<u4", "U64": "<u8",
}  # fmt: skip
