"""What the commands that train share: options, the output directory, the run itself, and what is written down."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..options import add_options, from_arguments
from ..train.arguments import TrainingArguments
from .arguments import add_machine

NEW = ".minipeft-new"  # in an output directory: the run that is to replace the one there, until it has ended
READ = ("data", "validation", "prompts", "human", "model", "adapter", "adapter_config", "reward")


def add_output(parser: argparse.ArgumentParser) -> None:
    """--output, --resume and --overwrite, and the options of the machine."""
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write; must be new or empty")
    group = parser.add_argument_group("an output directory that is not empty")
    group.add_argument("--resume", action="store_true", help="go on from its last checkpoint; give the same options")
    group.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run's files, once the new run has ended (others stay)"
    )
    add_machine(parser)


def add_training(group: Any, *names: str, defaults: Mapping[str, Any], **helps: str) -> None:
    """The options of every run of a Trainer, and the TrainingArguments of these `names`."""
    helps = {"save_steps": "steps between checkpoints (default: 1/5)", **helps}
    defaults = {"seed": TrainingArguments.seed, **defaults}
    length = group.add_mutually_exclusive_group()
    add_options(length, TrainingArguments, "num_train_epochs", "max_steps", defaults=defaults)
    names = ("per_device_train_batch_size", "learning_rate", "warmup_ratio", *names, "save_steps", "seed")
    add_options(group, TrainingArguments, *names, defaults=defaults, **helps)


def check_output(args: argparse.Namespace) -> Path:
    """Where the command writes, and no other process until it ends: --output, or NEW in it while that holds an old run.

    Raises ValueError where --output is not empty and no option says what to do, or --overwrite would replace what is no
    earlier run's; and as `check_directory`, DirectoryInUse.
    """
    from ..directory import LOCK

    if "work" in args:
        return args.work
    output, hint = Path(args.output), ", or give --resume or --overwrite" * hasattr(args, "resume")
    if hint and args.resume and args.overwrite:
        raise ValueError("--resume goes on with an earlier run and --overwrite replaces it: give one of them")
    hold(args, output)
    if any(path.name != LOCK for path in output.iterdir()) and not (hint and (args.resume or args.overwrite)):
        raise ValueError(f"--output {output} is not empty; choose another{hint}")
    args.work = output
    if hint:
        from ..train import last_checkpoint

        replaced = bool(earlier(output)) if args.overwrite else args.resume and last_checkpoint(output / NEW)
        args.work = output / NEW if replaced else output
    return args.work


def hold(args: argparse.Namespace, path: Path, option: str = "--output") -> None:
    """Keep a directory from other processes until the command ends. Raises as `check_directory`, and DirectoryInUse."""
    from ..directory import locked

    check_directory(args, path, option)
    args.until_end.enter_context(locked(path))


def check_directory(args: argparse.Namespace, path: Path, option: str = "--output") -> None:
    """ValueError where a directory that is to be written is a file, or could replace what the command reads."""
    from ..directory import keep_apart

    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} {path} is a file; a directory is to be written")
    keep_apart(path, inputs(args, path), option)


def inputs(args: argparse.Namespace, output: Path) -> Iterator[tuple[str, str]]:
    """(option, path) of all that the command reads, with the bases of adapters, and of a module called like `output`."""
    from ..files import FileError
    from ..hub.base import BASE
    from ..peft.provenance import recorded_base

    given = {name: value for name in READ if (value := getattr(args, name, None)) is not None}
    for name, value in given.items():
        for path in [value] if isinstance(value, str) else value:
            yield f"--{name.replace('_', '-')}", path
            if name == "adapter":
                with suppress(FileError, OSError):  # which is said when it is loaded
                    yield f"the base of --adapter {path},", recorded_base(path)[0] or ""
    if "model" not in given:
        yield "the shipped base", str(BASE)
    for name, module in list(sys.modules.items()):
        if os.path.basename(file := getattr(module, "__file__", None) or "") == output.name:
            yield f"the module {name},", file


def earlier(output: Path) -> list[str]:
    """The names of what an earlier run has left in a directory. ValueError for a checkpoint-N that is no run's."""
    from ..directory import OF_A_RUN
    from ..train.checkpoint import is_checkpoint

    names = sorted(path.name for path in output.iterdir() if OF_A_RUN.fullmatch(path.name))
    for path in (output / name for name in names):
        if path.is_dir() and not is_checkpoint(path):
            raise ValueError(f"{path} is in the way: it is no checkpoint of an earlier run; move it, or choose another --output")
    return names


def refuse(args: argparse.Namespace, names: Iterable[str], where: str) -> None:
    """ValueError, by its flag, for the first of these options that is given: there it does nothing."""
    for name in names:
        if hasattr(args, name):
            raise ValueError(f"--{args.flags[name].replace('_', '-')} does nothing {where}; leave it out")


def training_arguments(args: argparse.Namespace, examples: int, evaluated: bool, **fixed: Any) -> TrainingArguments:
    """How to train on this number of examples; saved, and evaluated, five times where no option says how often."""
    a = from_arguments(TrainingArguments, args, output_dir=args.work, save_total_limit=1, **fixed)
    step = a.per_device_train_batch_size * a.gradient_accumulation_steps
    steps = a.max_steps or math.ceil(a.num_train_epochs * math.ceil(examples / step))
    fifth = max(1, steps // 5)
    return replace(
        a,
        max_steps=steps,
        per_device_eval_batch_size=a.per_device_train_batch_size,
        eval_steps=(a.eval_steps or fifth) if evaluated else None,
        save_steps=a.save_steps or fifth,
    )


def run_training(args: argparse.Namespace, trainer: Any) -> Any:
    """What `trainer.train` gives. A KeyboardInterrupt says how to go on."""
    from ..directory import discard
    from ..train import last_checkpoint

    new = Path(args.output) / NEW
    if args.overwrite or args.work != new:  # another run, which was to replace this one, has been given up
        discard(new)
    try:
        return trainer.train(resume_from_checkpoint=args.resume)
    except BaseException as error:
        if last_checkpoint(args.work) is None:
            discard(new)
        elif isinstance(error, KeyboardInterrupt):
            instead = " in place of --overwrite" * args.overwrite
            raise KeyboardInterrupt(f"the same command with --resume{instead} goes on from the last checkpoint") from None
        raise


def save_model(args: argparse.Namespace, model: Any, tokenizer: Any, template: str | None) -> str:
    """Write a model or adapter directory, with the tokenizer, and the template that the model was trained in.

    Returns the option by which `minipeft generate` takes it.
    """
    from ..directory import replacing
    from ..hub.pretrained import save_pretrained
    from .prompts import save_template

    with replacing(args.work) as fresh:
        if template is not None:
            save_template(fresh, template)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(fresh)
            tokenizer.save(fresh)
            return f"--adapter {args.output}"
        save_pretrained(model, fresh, tokenizer)
        return f"--model {args.output}"


def write_record(args: argparse.Namespace, results: Mapping[str, Any], *configs: Any, **found: Any) -> None:
    """Write <command>.json, all options by their flags, and the results; with it, a run that replaces another takes its place.

    An option's value is the one in `found`, in one of the configurations, or as given.
    """
    from ..directory import publish
    from ..files import write_json

    internal = ("run", "debug", "resume", "overwrite", "command", "flags", "longest", "work", "until_end")
    given = {name: value for name, value in vars(args).items() if name not in internal}
    for config in configs:
        given |= {name: value for name, value in vars(config).items() if name in args.flags}
    named = {args.flags.get(name, name): value for name, value in {**given, **found}.items()}
    write_json(args.work / f"{args.command}.json", {"options": named, **results})
    if args.work != (output := Path(args.output)):
        publish(args.work, output, earlier(output))


def note(text: str, style: str | None = None) -> None:
    """A line on standard error, as it is."""
    from rich.console import Console

    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text, style=style)


def announce(
    train: Any, held_out: Any, a: TrainingArguments, what: str = "pairs", before: str = "", after: str = ""
) -> None:
    """What is learned from, and how."""
    size = a.per_device_train_batch_size * a.gradient_accumulation_steps
    note(
        f"{before}{len(train):,} {what} to learn from, {len(held_out):,} held out; {a.max_steps:,} steps of {size}, "
        f"learning rate {a.learning_rate:.3g}{after}"
    )
