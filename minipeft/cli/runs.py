"""What the commands that train share: options, the output directory, the run itself, and what is written down."""

from __future__ import annotations

import math
import re
import shutil
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import minipeft as mp

from ..options import from_arguments
from ..train.arguments import TrainingArguments
from .arguments import Arguments, Common, Parser, add_machine
from .models import save_template

WRITTEN = re.compile(  # what the commands write into a directory, and --overwrite removes
    r"checkpoint-\d+|metrics\.jsonl|(loss|reward|dpo|ppo)\.png|(finetune|sft|reward|dpo|ppo)\.json|"
    r"reward_calibration\.json|template\.json|chat_template\.jinja|(generation_)?config\.json|"
    r"tokenizer(_config)?\.json|(adapter_)?model\.safetensors|adapter_config\.json"
)


def add_output(parser: Parser) -> None:
    """--output, --resume and --overwrite, and the options of the machine."""
    parser.options(Common, "output")
    group = parser.add_argument_group("an output directory that is not empty")
    group.add_argument("--resume", action="store_true", help="go on from its last checkpoint; give the same options")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier run's files (others stay)")
    add_machine(parser)


def add_training(parser: Parser, *names: str, defaults: Mapping[str, Any], **helps: str) -> None:
    """The options of every run of a Trainer, and the TrainingArguments of these `names`."""
    parser.options(
        TrainingArguments, "num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate",
        "warmup_ratio", *names, "save_steps", "seed", group="training", defaults=defaults,
        save_steps="steps between checkpoints; None: 1/5", seed="seed of everything random", **helps,
    )  # fmt: skip


def directory(flag: str, path: str) -> Path:
    """The path that an option names. ValueError where it is a file."""
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"{flag} {path} is a file; a directory is to be written")
    return Path(path)


def check_output(args: Arguments) -> Path:
    """--output. ValueError where it cannot be written: not a directory, or not empty and no option says what to do."""
    hint = ", or give --resume or --overwrite" if "resume" in args else ""
    args.only_one("resume", "overwrite")
    args.only_one("num_train_epochs", "max_steps")
    output = directory("--output", args.output)
    if output.is_dir() and any(output.iterdir()) and not (hint and (args.resume or args.overwrite)):
        raise ValueError(f"--output {output} is not empty; choose another{hint}")
    return output


def training_arguments(args: Arguments, examples: int, evaluated: bool, **fixed: Any) -> TrainingArguments:
    """How to train on this number of examples; saved, and evaluated, five times where no option says how often."""
    a = from_arguments(TrainingArguments, args, output_dir=Path(args.output), save_total_limit=1, **fixed)
    step = a.per_device_train_batch_size * a.gradient_accumulation_steps
    steps = a.max_steps or math.ceil(a.num_train_epochs * math.ceil(examples / step))
    fifth = max(1, steps // 5)
    return replace(
        a, max_steps=steps, per_device_eval_batch_size=a.per_device_train_batch_size,
        eval_steps=(a.eval_steps or fifth) if evaluated else None, save_steps=a.save_steps or fifth,
    )  # fmt: skip


def run_training(args: Arguments, trainer: Any) -> Any:
    """What `trainer.train` gives. --overwrite removes an earlier run first; a KeyboardInterrupt says how to go on."""
    output = Path(args.output)
    if args.overwrite and output.is_dir():
        for path in filter(lambda path: WRITTEN.fullmatch(path.name), sorted(output.iterdir())):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    try:
        return trainer.train(resume_from_checkpoint=args.resume)
    except KeyboardInterrupt:
        if mp.train.last_checkpoint(output) is None:
            raise
        raise KeyboardInterrupt("the same command with --resume goes on from the last checkpoint") from None


def save(
    args: Arguments, model: Any, tokenizer: Any, template: str | None, results: Mapping[str, Any], *configs: Any,
    how: str = "", **found: Any,
) -> str:  # fmt: skip
    """Write a model or adapter directory, with the tokenizer, the template that it was trained in, and the record.

    Returns the line that says so, and how `minipeft generate` takes it. The rest as for `write_record`.
    """
    adapter = hasattr(model, "save_pretrained")
    if template is not None:
        save_template(args.output, template)
    if adapter:
        model.save_pretrained(args.output)
        tokenizer.save(args.output)
    else:
        mp.save_pretrained(model, args.output, tokenizer)
    write_record(args, results, *configs, template=template, **found)
    use, prompt = "--adapter" if adapter else "--model", "--chat" if template == "chat" else "--prompt ..."
    return f"saved in {args.output}  (minipeft generate {use} {args.output} {how}{prompt})"


def write_record(args: Arguments, results: Mapping[str, Any], *configs: Any, **found: Any) -> None:
    """<command>.json in the output directory: all options that have a value, by their flags, and the results.

    An option's value is the one in `found`, in one of the configurations, or as given.
    """
    values = ChainMap(found, *map(vars, configs), vars(args))
    names = [name for name in args.flags if name not in ("debug", "resume", "overwrite")]
    named = {args.flags[name]: values[name] for name in names if values.get(name) is not None}
    mp.files.write_json(Path(args.output) / f"{args.command}.json", {"options": named, **results})


def note(text: str, style: str | None = None) -> None:
    """A line on standard error, as it is; none for an empty text."""
    from rich.console import Console

    if text:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text, style=style)


def announce(trainer: Any, what: str = "pairs", before: str = "", after: str = "") -> None:
    """What is learned from, and how."""
    a, held_out = trainer.args, len(trainer.eval_examples or ())
    size = a.per_device_train_batch_size * a.gradient_accumulation_steps
    steps = f"{a.max_steps:,} steps of {size}, learning rate {a.learning_rate:.3g}{after}"
    note(f"{before}{len(trainer.train_examples):,} {what} to learn from, {held_out:,} held out; {steps}")
