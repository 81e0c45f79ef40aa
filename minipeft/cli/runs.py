"""What the commands that train share: options, the output directory, the run itself, and what is written down."""

from __future__ import annotations

import argparse
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..options import add_options, from_arguments
from ..train.arguments import TrainingArguments
from .arguments import add_machine

WRITTEN = re.compile(  # what the commands write into a directory, and --overwrite removes
    r"checkpoint-\d+|metrics\.jsonl|(loss|reward|dpo|ppo)\.png|(finetune|sft|reward|dpo|ppo)\.json|"
    r"reward_calibration\.json|template\.json|chat_template\.jinja|(generation_)?config\.json|"
    r"tokenizer(_config)?\.json|(adapter_)?model\.safetensors|adapter_config\.json"
)


def add_output(parser: argparse.ArgumentParser) -> None:
    """--output, --resume and --overwrite, and the options of the machine."""
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write; must be new or empty")
    group = parser.add_argument_group("an output directory that is not empty")
    group.add_argument("--resume", action="store_true", help="go on from its last checkpoint; give the same options")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier run's files (others stay)")
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
    """--output. ValueError where it cannot be written: not a directory, or not empty and no option says what to do."""
    output, hint = Path(args.output), ", or give --resume or --overwrite" * hasattr(args, "resume")
    if hint and args.resume and args.overwrite:
        raise ValueError("--resume goes on with an earlier run and --overwrite replaces it: give one of them")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; a directory is to be written")
    if output.is_dir() and any(output.iterdir()) and not (hint and (args.resume or args.overwrite)):
        raise ValueError(f"--output {output} is not empty; choose another{hint}")
    return output


def refuse(args: argparse.Namespace, names: Iterable[str], where: str) -> None:
    """ValueError, by its flag, for the first of these options that is given: there it does nothing."""
    for name in names:
        if hasattr(args, name):
            raise ValueError(f"--{args.flags[name].replace('_', '-')} does nothing {where}; leave it out")


def training_arguments(args: argparse.Namespace, examples: int, evaluated: bool, **fixed: Any) -> TrainingArguments:
    """How to train on this number of examples; saved, and evaluated, five times where no option says how often."""
    a = from_arguments(TrainingArguments, args, output_dir=Path(args.output), save_total_limit=1, **fixed)
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
    """What `trainer.train` gives. --overwrite removes an earlier run first; a KeyboardInterrupt says how to go on."""
    from ..train import last_checkpoint

    output = Path(args.output)
    if args.overwrite and output.is_dir():
        for path in filter(lambda path: WRITTEN.fullmatch(path.name), sorted(output.iterdir())):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    try:
        return trainer.train(resume_from_checkpoint=args.resume)
    except KeyboardInterrupt:
        if last_checkpoint(output) is None:
            raise
        raise KeyboardInterrupt("the same command with --resume goes on from the last checkpoint") from None


def save_model(model: Any, tokenizer: Any, output: Path, template: str | None) -> str:
    """Write a model or adapter directory, with the tokenizer, and the template that the model was trained in.

    Returns the option by which `minipeft generate` takes it.
    """
    from ..hub.pretrained import save_pretrained
    from .prompts import save_template

    if template is not None:
        save_template(output, template)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(output)
        tokenizer.save(output)
        return f"--adapter {output}"
    save_pretrained(model, output, tokenizer)
    return f"--model {output}"


def write_record(args: argparse.Namespace, results: Mapping[str, Any], *configs: Any, **found: Any) -> None:
    """<command>.json in the output directory: all options by their flags, and the results.

    An option's value is the one in `found`, in one of the configurations, or as given.
    """
    from ..files import write_json

    internal = ("run", "debug", "resume", "overwrite", "command", "flags", "longest")
    given = {name: value for name, value in vars(args).items() if name not in internal}
    for config in configs:
        given |= {name: value for name, value in vars(config).items() if name in args.flags}
    named = {args.flags.get(name, name): value for name, value in {**given, **found}.items()}
    write_json(Path(args.output) / f"{args.command}.json", {"options": named, **results})


def note(text: str, style: str | None = None) -> None:
    """A line on standard error, as it is."""
    from .report import console

    console(stderr=True, width=None, soft_wrap=True).print(text, style=style)


def announce(
    train: Any, held_out: Any, a: TrainingArguments, what: str = "pairs", before: str = "", after: str = ""
) -> None:
    """What is learned from, and how."""
    size = a.per_device_train_batch_size * a.gradient_accumulation_steps
    note(
        f"{before}{len(train):,} {what} to learn from, {len(held_out):,} held out; {a.max_steps:,} steps of {size}, "
        f"learning rate {a.learning_rate:.3g}{after}"
    )
