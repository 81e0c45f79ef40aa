"""Score a model on a file of records: the loss, its answers beside the expected ones, or its choice among given answers.

The data is a .jsonl file, one JSON object a line, all of one form, or a .txt file of running text:
    {"prompt": ..., "completion": ...}               the loss of the answers, in nats per token; and of the answers that
    {"instruction": ..., "input": ..., "output": ...}    the model itself writes: the share of exact matches, chrF
    {"messages": [...]}                                  (extra 'hub'), and a metric of your own
    {"text": ...}                                    the loss alone
    {"question": ..., "choices": [...], "answer": ...}   acc, the share of questions whose right choice is the most
                                                     probable one, and acc_norm, by log-probability per character, as
                                                     in lm-evaluation-harness; "answer" is an index from 0, or a text

Every score but chrF has its 95 % confidence interval over the records; that of running text is too narrow, because its
blocks depend on each other. A model or adapter that finetune or sft wrote is asked in
the template that it was trained with; multiple choice is asked as it is, with a space before the choice, unless
--template says otherwise.

general-cloze is multiple choice that ships with the package: which continuation is right, in held-out text like the
base's training text? Before and after fine-tuning, it says what was forgotten.

A metric is a Python function, metric(answer, expected) -> number, in a module of the current directory or an installed
one; its mean is reported.

examples:
  minipeft evaluate --data test.jsonl --adapter tuned
  minipeft evaluate --data test.jsonl --model tuned --metric my_metrics:same_date --max-new-tokens 20
  minipeft evaluate --data arc.jsonl --model SmolLM2-135M-Instruct.Q4_1.gguf --template "Question: {prompt}\\nAnswer: "
  minipeft evaluate --data general-cloze --adapter tuned
  minipeft evaluate --data book.txt --max-length 256 --json book-loss.json
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..evaluation.config import GenerationConfig
from ..options import add_options, configuration, from_arguments, option
from . import outputs, runs
from .arguments import add_machine, add_model
from .functions import load_function
from .models import load_model

GENERAL = "general-cloze"
LABELS = {"exact_match": "exact match", "chrf": "chrF"}


@configuration(kw_only=True)
class EvaluationOptions:
    """What is scored, and by which measure."""

    template: str | None = option(
        None, "plain, alpaca, chatml, chat or a text with {prompt} (default: as in training)", metavar="NAME|TEXT"
    )
    metric: str | None = option(None, "a function (answer, expected) -> number", metavar="MODULE:NAME")
    limit: int | None = option(None, "use the first N records (of running text, blocks)", least=1)
    max_length: int | None = option(
        None, "tokens of a record at most, of running text those of a block (default: what the model takes)", least=2
    )
    loss_only: bool = option(False, "generate no answers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="FILE", help=f"a .jsonl or .txt file; or {GENERAL}: 640 shipped items"
    )
    add_model(parser, adapter=" to put on the model")
    parser.add_argument(
        "--load-in-4bit", action="store_true",
        help="hold the linear layers in 4 bits, as in --method qlora (an adapter that was trained so needs no flag)",
    )  # fmt: skip
    add_options(parser.add_argument_group("scores"), EvaluationOptions)
    add_options(parser.add_argument_group("generation"), GenerationConfig)
    parser.add_argument_group("output").add_argument(
        "--json", nargs="?", const="", metavar="FILE",
        help="print one JSON object, with every record's answer and scores; or write it to FILE, and print as usual",
    )  # fmt: skip
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    options = from_arguments(EvaluationOptions, args)
    config = from_arguments(GenerationConfig, args)
    metric = None if options.metric is None else load_function(options.metric, "--metric")
    if args.json and not Path(args.json).parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no directory {Path(args.json).parent}")
    from ..directory import keep_apart, locked

    if args.json:
        keep_apart(args.json, outputs.inputs(args, Path(args.json)), "--json")

    from ..evaluation import evaluate
    from ..files import write_json
    from ..text.datasets import Document, MultipleChoice
    from .prompts import usual_template

    records = read_items(args.data)
    args.template = options.template
    answered = not isinstance(records[0], (Document, MultipleChoice))
    if options.loss_only and not answered:
        what = "multiple choice" if isinstance(records[0], MultipleChoice) else "running text"
        raise ValueError(f"--loss-only: no answers are generated for {what} in any case; leave it out")
    template = usual_template(args) if options.template or answered else None
    model, tokenizer = load_model(args.model, args.backend, args.load_in_4bit or None, args.adapter)
    given = {f.name: getattr(args, f.name) for f in fields(GenerationConfig) if hasattr(args, f.name)}
    found = evaluate(
        model, tokenizer, records, template, metric=metric, answers=not options.loss_only, limit=options.limit,
        max_length=options.max_length, **{"batch_size": config.batch_size, **given},
    )  # fmt: skip
    record = {
        "data": args.data, "model": args.model, "adapter": args.adapter, "template": template,
        "records": len(found.details), "tokens": found.tokens, "chance": found.chance,
        "scores": {name: score._asdict() for name, score in found.scores.items()}, "details": found.details,
    }  # fmt: skip
    if found.note:
        runs.note(found.note)
    if args.json == "":
        print(json.dumps(record, indent=1, ensure_ascii=False))
        return 0
    show(found, options.metric, "blocks" if isinstance(records[0], Document) else "records")
    if args.json is not None:
        with locked(Path(args.json).parent, Path(args.json).name):
            write_json(args.json, record)
        print(f"saved: {args.json}")
    return 0


def show(found: Any, metric: str | None, units: str) -> None:
    """A line a score: its value, its interval, and what else is to be known of it."""
    loss = found.scores.get("loss")
    perplexity = "" if loss is None else f", perplexity {math.exp(loss.value):.2f}" if loss.value < 700 else ""
    beside = {"loss": f"nats per token, of {found.tokens:,} tokens{perplexity}"}
    print(f"{len(found.details):,} {units}")
    for name, (value, low, high) in found.scores.items():
        label = metric if name == "metric" else LABELS.get(name, name)
        interval = "" if low is None else f"[{low:.4f}, {high:.4f}]"
        print(f"{label:16} {value:9.4f}  {interval:18}  {beside.get(name, '')}".rstrip())
    if found.chance is not None:
        print(f"{'chance':16} {found.chance:9.4f}")


def read_items(data: str) -> list[Any]:
    """The records of a file, or the shipped items of that name. Raises DatasetError."""
    from ..text.datasets import read_dataset

    if data == GENERAL:
        from ..evaluation import general_cloze

        return general_cloze()
    return read_dataset(data)
