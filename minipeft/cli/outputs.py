"""Where a command writes: apart from what it reads, held by it alone, and an old run there until the new one has ended.

    output/                what an earlier run has left, if there was one
           .minipeft-new/  a run with --overwrite, which then takes its place
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import minipeft as mp

from .arguments import Arguments

NEW = ".minipeft-new"  # in an output directory: the run that is to replace the one there, until it has ended
READ = ("data", "validation", "prompts", "human", "model", "adapter", "adapter_config", "reward")


def check_output(args: Arguments) -> Path:
    """Where the command writes, and no other process until it ends: --output, or NEW in it while that holds an old run.

    Raises ValueError where --output is not empty and no option says what to do, or --overwrite would replace what is no
    earlier run's; and as `check_directory`, DirectoryInUse.
    """
    args.only_one("resume", "overwrite")
    args.only_one("num_train_epochs", "max_steps")
    args.only_one("bf16", "fp16")
    output, hint = Path(args.output), ", or give --resume or --overwrite" if "resume" in args else ""
    hold(args, output)
    empty = not any(path.name != mp.directory.LOCK for path in output.iterdir())
    if not (empty or (hint and (args.resume or args.overwrite))):
        raise ValueError(f"--output {output} is not empty; choose another{hint}")
    args.work = output
    if hint:
        replaced = bool(earlier(output)) if args.overwrite else args.resume and mp.train.last_checkpoint(output / NEW)
        args.work = output / NEW if replaced else output
    return args.work


def hold(args: Arguments, path: Path, option: str = "--output") -> None:
    """Keep a directory from other processes until the command ends. Raises as `check_directory`, and DirectoryInUse."""
    check_directory(args, path, option)
    args.until_end.enter_context(mp.directory.locked(path))


def check_directory(args: Arguments, path: Path, option: str = "--output") -> None:
    """ValueError where a directory that is to be written is a file, or could replace what the command reads.

    DirectoryInUse where it is, or lies in, a checkpoint-N or the like of a directory in which another process writes.
    """
    check_no_file(path, option)
    mp.directory.keep_apart(path, inputs(args, path), option)
    place = Path(os.path.realpath(path))
    for above in (place, *place.parents):
        if mp.directory.OF_A_RUN.fullmatch(above.name) and (above.parent / mp.directory.LOCK).exists():
            with mp.directory.locked(above.parent):
                pass


def check_file(args: Arguments, path: Path, option: str) -> None:
    """ValueError where no file can be written at a path, or it could replace what the command reads.

    A file of a run's names keeps its directory from other processes until the command ends, DirectoryInUse.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no directory {path.parent}")
    mp.files.check_replaceable(path, option)
    mp.directory.keep_apart(path, inputs(args, path), option)
    if mp.directory.WRITTEN.fullmatch(path.name):
        args.until_end.enter_context(mp.directory.locked(path.parent))


def check_no_file(path: Path, option: str) -> None:
    """ValueError where a directory that is to be written is a file."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} {path} is a file; a directory is to be written")


def inputs(args: Arguments, output: Path) -> Iterator[tuple[str, str]]:
    """(option, path) of all that the command reads, with the bases of adapters, and a module called like `output`."""
    from ..peft.provenance import recorded_base

    given = {name: value for name in READ if isinstance(value := getattr(args, name, None), (str, list))}
    for name, value in given.items():
        for path in [value] if isinstance(value, str) else value:
            yield args.flag(name) if name in args.flags else name.upper(), path
            if name == "adapter":
                with suppress(mp.files.FileError, OSError):  # which is said when it is loaded
                    yield f"the base of --adapter {path},", recorded_base(path)[0] or ""
    if "model" not in given:
        yield "the shipped base", str(mp.hub.base.BASE)
    for name, module in list(sys.modules.items()):
        if os.path.basename(file := getattr(module, "__file__", None) or "") == output.name:
            yield f"the module {name},", file


def earlier(output: Path) -> list[str]:
    """The names of what an earlier run has left in a directory. ValueError for a checkpoint-N that is no run's."""
    names = sorted(path.name for path in output.iterdir() if mp.directory.OF_A_RUN.fullmatch(path.name))
    for path in (output / name for name in names):
        if path.is_dir() and not mp.train.checkpoint.is_checkpoint(path):
            why = "it is no checkpoint of an earlier run; move it, or choose another --output"
            raise ValueError(f"{path} is in the way: {why}")
    return names


def run_training(args: Arguments, trainer: Any) -> Any:
    """What `trainer.train` gives. A KeyboardInterrupt says how to go on."""
    new = Path(args.output) / NEW
    if args.overwrite or args.work != new:  # another run, which was to replace this one, has been given up
        mp.directory.discard(new)
    try:
        return trainer.train(resume_from_checkpoint=args.resume)
    except BaseException as error:
        if mp.train.last_checkpoint(args.work) is None:
            mp.directory.discard(new)
        elif isinstance(error, KeyboardInterrupt):
            resume = f"--resume{' in place of --overwrite' * args.overwrite}"
            raise KeyboardInterrupt(f"the same command with {resume} goes on from the last checkpoint") from None
        raise


def replace_earlier(args: Arguments) -> None:
    """Put a run that is written down in the place of the one that it replaces, if it does."""
    if args.work != (output := Path(args.output)):
        mp.directory.publish(args.work, output, earlier(output))
