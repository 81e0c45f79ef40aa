"""An output directory: one process writes there at a time, what is read is never written to, and old files go last.

    keep_apart(output, inputs)            refused where it could replace what is read
    with locked(output):                  refused while another process holds it, as long as that lives
        with replacing(output) as fresh:  an empty directory
            ...                           is filled; now its files are in `output`, or, where the block raises, none is

A kill at any moment leaves the old files or the new ones. `replacing` writes the new ones into a directory inside of
`output`, makes them durable, renames that directory to READY, in one step, and moves them into their places. Where a kill
interrupts the moves, the next process that holds the directory goes on with them. Meanwhile there is no configuration,
which is moved last, so that nobody loads one model's weights under another's configuration.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .files import READY, FileError, fsync_directory, read_json, write_json

LOCK = ".minipeft-lock"
OF_A_RUN = re.compile(  # what a run that trains writes into its directory
    r"checkpoint-\d+|metrics\.jsonl|(loss|reward|dpo|ppo)\.png|(finetune|sft|reward|dpo|ppo)\.json|"
    r"reward_calibration\.json|template\.json|chat_template\.jinja|(generation_)?config\.json|"
    r"tokenizer(_config)?\.json|(adapter_)?model\.safetensors|adapter_config\.json"
)
WRITTEN = re.compile(rf"{OF_A_RUN.pattern}|rows\.jsonl|(sweep|compare)\.png|compare\.json|index\.html")  # by any command
_CONFIGURATIONS = ("adapter_config.json", "config.json")  # without which nothing is loaded
_PLAN = ".plan.json"  # in READY: the names of the old files, and of the new
_TEMPORARY = rf"replacing|{re.escape(_PLAN)}|{WRITTEN.pattern}|\d+_\w+\.ipynb"


class DirectoryInUse(RuntimeError):
    """Another process writes into the directory."""


def keep_apart(output: str | os.PathLike, inputs: Iterable[tuple[str, str | os.PathLike]], option: str) -> None:
    """ValueError where writing `output`, a file or a directory, could replace or delete one of the inputs.

    `inputs` are (option, path); what is no path is skipped. `output` may neither be one, nor lie in one, nor hold a
    directory, or a file under a name that is written there; through links, too.
    """
    target = Path(os.path.realpath(output))
    for name, path in inputs:
        if not os.path.exists(path):
            continue
        links = [p for p in Path(path).iterdir() if p.is_symlink()] if os.path.isdir(path) else []
        for source in {Path(os.path.realpath(p)) for p in (path, *links)} | {Path(os.path.abspath(path))}:
            inside = next((child.name for child in (source, *source.parents) if _same(child.parent, target)), "")
            if any(_same(p, source) for p in (target, *target.parents)):
                how = "is" if _same(source, target) else "lies in"
            elif inside and (source.is_dir() or WRITTEN.fullmatch(inside)):
                how = "holds"
            else:
                continue
            raise ValueError(f"{option} {output} {how} {name} {path}, which is read: choose another path")


def _same(a: Path, b: Path) -> bool:
    return a == b or (a.exists() and b.exists() and os.path.samefile(a, b))


# -------------------------------------------------------------------------------------------------------------- locks

_held: dict[Path, tuple[int, BinaryIO]] = {}  # by the path of the lock: the thread that holds it, the open file


def take(file: BinaryIO) -> bool:
    """Lock an open file until it is closed or its process ends, however it ends; False where another has locked it.

    True, without a lock, where the file system has none, as some on a network.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # which hides nothing of the content from others
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, PermissionError if sys.platform == "win32" else BlockingIOError)
    return True


@contextmanager
def locked(directory: str | os.PathLike, file: str = "") -> Iterator[None]:
    """Hold a directory, made where it is missing, and first finish or clear away what a killed process has left there.

    With `file` only that file in it is held, and waited for. A directory that was made is removed again at the end
    where it is still empty. A thread may hold one several times. Raises DirectoryInUse, naming the other process.
    """
    directory = Path(directory)
    lock = Path(os.path.realpath(directory)) / (f".{file}.lock" if file else LOCK)
    if _held.get(lock, (None,))[0] == threading.get_ident():
        yield
        return
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    opened = _open_lock(lock, directory, wait=bool(file))
    _held[lock] = threading.get_ident(), opened
    try:
        _clear(directory, re.escape(file) or _TEMPORARY)
        if not file:
            _settle(directory)
        yield
    finally:
        if _held.pop(lock, None):  # else this is a fork of the process that holds it
            with opened, suppress(OSError):
                lock.unlink()  # before another can take it; on Windows, which removes no open file, it stays
                for path in made:
                    path.rmdir()


def _open_lock(lock: Path, directory: Path, wait: bool) -> BinaryIO:
    gone = 0
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            file = open(lock, "a+b", opener=_no_link)
        except FileNotFoundError:  # an empty directory has just been removed; or, as in /proc, none takes a file
            if (gone := gone + 1) == 100:
                raise OSError(f"{directory}: no file can be made in this directory; choose another") from None
            continue
        taken, current = take(file), False
        with suppress(FileNotFoundError):  # its last holder has just removed it
            current = os.path.samestat(os.fstat(file.fileno()), lock.stat())
        if taken and current:
            file.truncate(0)
            file.write(f"{os.getpid()} {platform.node()}".encode())
            file.flush()
            return file
        file.seek(0)
        number, _, host = file.read().decode(errors="replace").partition(" ")
        file.close()
        if current and not wait:
            who = f"the process {number}{f' on {host}' * (host != platform.node())}" if number else "another process"
            raise DirectoryInUse(f"{directory}: {who} writes there; wait for its end, or choose another directory")
        time.sleep(0.005)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _forget() -> None:
    """In a process that was forked: the locks are its parent's, and are not to outlive that."""
    for _, file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# -------------------------------------------------------------------------------------------------------- replacement


@contextmanager
def replacing(directory: str | os.PathLike, old: Iterable[str] = ()) -> Iterator[Path]:
    """An empty directory: when the block ends, what is in it is in `directory`, in place of the files of the same names.

    The files called `old` are gone then, too: they would say something else of the new ones.
    Where the block raises, nothing has changed. Raises DirectoryInUse.
    """
    directory = Path(directory)
    with locked(directory):
        fresh = _temporary(directory)
        fresh.mkdir()
        try:
            yield fresh
            publish(fresh, directory, old)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise


def publish(fresh: Path, directory: Path, old: Iterable[str] = ()) -> None:
    """Move all that is in `fresh`, a directory inside `directory`, which is held, into it, and remove the `old` names.

    A directory is replaced only where it is an `old` one. Raises OSError where another has the name of a new one.
    """
    new = sorted(path.name for path in fresh.iterdir() if path.name != _PLAN)
    indices = (f"{name}.index.json" for name in new if name.endswith(".safetensors"))  # of weights in several files
    write_json(fresh / _PLAN, {"old": sorted({*old, *indices}), "new": new})
    fsync_directory(fresh)
    os.rename(fresh, directory / READY)
    fsync_directory(directory)
    try:
        _settle(directory)
    except KeyboardInterrupt:
        _settle(directory)
        raise


def _settle(directory: Path) -> None:
    """Move what is in READY into its place; begun again, it goes on where it was interrupted."""
    ready = directory / READY
    if (ready / _PLAN).exists():
        plan = read_json(ready / _PLAN)
        old, gone = plan["old"], {*plan["old"]} - {*plan["new"]}
        if strange := [name for name in (*old, *plan["new"]) if name != Path(name).name or name in ("", "..")]:
            raise FileError(f"{ready / _PLAN}: {strange[0]!r} is not the name of a file in {directory}")
        for name in _CONFIGURATIONS:
            if name in gone or (ready / name).exists():
                (directory / name).unlink(missing_ok=True)
        fsync_directory(directory)
        for name in gone:
            discard(directory / name)
        for name in sorted(plan["new"], key=_CONFIGURATIONS.__contains__):
            if (ready / name).is_dir() and name in old:
                discard(directory / name)
            if (ready / name).exists():
                os.replace(ready / name, directory / name)
        fsync_directory(directory)
        (ready / _PLAN).unlink()
    with suppress(OSError):
        ready.rmdir()


def discard(path: Path) -> None:
    """Remove a file, or a directory in one step, so that nobody sees a half of it; nothing where there is neither."""
    if path.is_dir() and not path.is_symlink():
        path = path.rename(_temporary(path.parent))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _clear(directory: Path, names: str) -> None:
    """Remove the temporary files and directories that were to become one of these names."""
    temporary = re.compile(rf"\.({names})\.[0-9a-f]{{32}}\.tmp")
    for path in [path for path in directory.iterdir() if temporary.fullmatch(path.name)]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _temporary(directory: Path) -> Path:
    return directory / f".replacing.{uuid.uuid4().hex}.tmp"
