"""What the commands that train share: options, the model that is saved, and what is written down."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..options import add_options, from_arguments
from ..train.arguments import TrainingArguments
from .arguments import add_machine
from .outputs import replace_earlier


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
    from ..files import write_json

    internal = ("run", "debug", "resume", "overwrite", "command", "flags", "longest", "work", "until_end")
    given = {name: value for name, value in vars(args).items() if name not in internal}
    for config in configs:
        given |= {name: value for name, value in vars(config).items() if name in args.flags}
    named = {args.flags.get(name, name): value for name, value in {**given, **found}.items()}
    write_json(args.work / f"{args.command}.json", {"options": named, **results})
    replace_earlier(args)


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
