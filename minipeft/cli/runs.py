"""What the commands that train share: options, the model that is saved, and what is written down."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import minipeft as mp

from ..options import from_arguments
from ..train.arguments import TrainingArguments
from .arguments import Arguments, Common, Parser, add_machine
from .bars import console
from .models import save_template
from .outputs import replace_earlier


def add_output(parser: Parser) -> None:
    """--output, --resume and --overwrite, and the options of the machine."""
    parser.options(Common, "output")
    group = parser.add_argument_group("an output directory that is not empty")
    group.add_argument("--resume", action="store_true", help="go on from its last checkpoint; give the same options")
    overwrite = "replace an earlier run's files, once the new run has ended (others stay)"
    group.add_argument("--overwrite", action="store_true", help=overwrite)
    add_machine(parser)


def add_training(parser: Parser, *names: str, defaults: Mapping[str, Any], **helps: str) -> None:
    """The options of every run of a Trainer, and the TrainingArguments of these `names`."""
    parser.options(
        TrainingArguments, "num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate",
        "warmup_ratio", *names, "bf16", "fp16", "save_steps", "seed", group="training", defaults=defaults,
        save_steps="steps between checkpoints; None: 1/5", seed="seed of everything random", **helps,
    )  # fmt: skip


def training_arguments(args: Arguments, examples: int, evaluated: bool, **fixed: Any) -> TrainingArguments:
    """How to train on this number of examples; saved, and evaluated, five times where no option says how often."""
    a = from_arguments(TrainingArguments, args, output_dir=args.work, save_total_limit=1, **fixed)
    step = a.per_device_train_batch_size * a.gradient_accumulation_steps
    steps = a.max_steps or math.ceil(a.num_train_epochs * math.ceil(examples / step))
    fifth = max(1, steps // 5)
    return replace(
        a, max_steps=steps, per_device_eval_batch_size=a.per_device_train_batch_size,
        eval_steps=(a.eval_steps or fifth) if evaluated else None, save_steps=a.save_steps or fifth,
    )  # fmt: skip


def save(
    args: Arguments, model: Any, tokenizer: Any, template: str | None, results: Mapping[str, Any], *configs: Any,
    how: Sequence[str] = (), **found: Any,
) -> str:  # fmt: skip
    """Write a model or adapter directory, with the tokenizer, the template that it was trained in, and the record.

    Returns the line that says so, and how `minipeft generate` takes it. The rest as for `write_record`.
    """
    adapter = hasattr(model, "save_pretrained")
    with mp.directory.replacing(args.work) as fresh:
        if template is not None:
            save_template(fresh, template)
        if adapter:
            model.save_pretrained(fresh)
            tokenizer.save(fresh)
        else:
            mp.save_pretrained(model, fresh, tokenizer)
    write_record(args, results, *configs, template=template, **found)
    use, prompt = "--adapter" if adapter else "--model", ["--chat"] if template == "chat" else ["--prompt", "..."]
    return f"saved in {args.output}  ({args.next_command('generate', use, args.output, *how, *prompt)})"


def write_record(args: Arguments, results: Mapping[str, Any], *configs: Any, **found: Any) -> None:
    """<command>.json: all options that have a value, by their flags, and the results.

    An option's value is the one in `found`, in one of the configurations, or as given. With this file a run that
    replaces another takes its place.
    """
    values = ChainMap(found, *map(vars, configs), vars(args))
    names = [name for name in args.flags if name not in ("debug", "resume", "overwrite")]
    named = {args.flags[name]: values[name] for name in names if values.get(name) is not None}
    mp.files.write_json(args.work / f"{args.command}.json", {"options": named, **results})
    replace_earlier(args)


def note(text: str, style: str | None = None) -> None:
    """A line on standard error, as it is; none for an empty text."""
    if text:
        console(stderr=True, width=None, soft_wrap=True).print(text, style=style)


def announce(trainer: Any, what: str = "pairs", before: str = "", after: str = "") -> None:
    """What is learned from, and how."""
    a, held_out = trainer.args, len(trainer.eval_examples or ())
    size = a.per_device_train_batch_size * a.gradient_accumulation_steps
    steps = f"{a.max_steps:,} steps of {size}, learning rate {a.learning_rate:.3g}{after}"
    note(f"{before}{len(trainer.train_examples):,} {what} to learn from, {held_out:,} held out; {steps}")
