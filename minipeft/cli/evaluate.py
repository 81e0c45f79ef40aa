"""Score a model: its loss, its answers, multiple choice.

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

import math
from pathlib import Path
from typing import Any

import minipeft as mp

from ..evaluation.config import GenerationConfig
from ..options import REQUIRED, configuration, from_arguments, option
from . import outputs, runs
from .arguments import Arguments, Common, Parser, add_machine
from .bars import print_json
from .data import columns_of
from .foreign import load_function
from .models import base_of, load_model, usual_template

GENERAL = "general-cloze"


@configuration(kw_only=True)
class EvaluationOptions:
    """What is scored, and by which measure."""

    metric: str | None = option(None, "a function (answer, expected) -> number", metavar="MODULE:NAME")
    limit: int | None = option(None, "use the first N records (of running text, blocks)", least=1)
    max_length: int | None = option(None, "tokens of a record or block at most; None: as the model takes", least=2)
    loss_only: bool = option(False, "generate no answers")
    json: bool | str = option(False, "print one JSON object, with all answers and scores; or write it", metavar="FILE")


def add_arguments(parser: Parser) -> None:
    data = {"data": f"a .jsonl or .txt file; or {GENERAL}: 640 shipped items", "defaults": {"data": REQUIRED}}
    parser.options(Common, "data", "columns", "model", "adapter", "load_in_4bit", "template", **data)
    parser.options(EvaluationOptions)
    parser.options(GenerationConfig, group="generation")
    add_machine(parser)


def run(args: Arguments) -> None:
    config = from_arguments(GenerationConfig, args)
    metric = None if args.metric is None else load_function(args.metric, "--metric")
    if isinstance(args.json, str):
        outputs.check_file(args, Path(args.json), "--json")
    datasets = mp.text.datasets
    if args.data == GENERAL:
        args.refuse(("columns",), f"with {GENERAL}")
        records = mp.evaluation.general_cloze()
    else:
        records = datasets.read_dataset(args.data, columns_of(args.columns))
    if isinstance(records[0], (datasets.Preference, datasets.UnpairedPreference)):
        judges = "minipeft reward and dpo tell how many held-out pairs a model judges right"
        raise datasets.DatasetError(args.data, None, f"preferences have no single right answer to score; {judges}")
    unasked = {datasets.Document: "running text", datasets.MultipleChoice: "multiple choice"}.get(type(records[0]))
    if unasked:
        args.refuse(("loss_only",), f"with {unasked}, for which no answers are generated")
    model, tokenizer = load_model(args)
    template = usual_template(args) if args.template or not unasked else None
    given = {name: value for name, value in vars(config).items() if name in args.given}
    found = mp.evaluation.evaluate(
        model, tokenizer, records, template, metric=metric, answers=not args.loss_only, limit=args.limit,
        max_length=args.max_length, **{"batch_size": config.batch_size, **given},
    )  # fmt: skip
    record = {
        "data": args.data, "columns": args.columns, "model": base_of(args) or mp.hub.base.NAME, "adapter": args.adapter,
        "template": template, "records": len(found.details), "tokens": found.tokens, "chance": found.chance,
        "scores": {name: score._asdict() for name, score in found.scores.items()}, "details": found.details,
    }  # fmt: skip
    runs.note(found.note)
    if args.json is True:
        return print_json(record)
    show(found, args.metric, "blocks" if isinstance(records[0], datasets.Document) else "records")
    if args.json is not False:
        with mp.directory.locked(Path(args.json).parent, Path(args.json).name):
            mp.files.write_json(args.json, record)
        print(f"saved: {args.json}")


def show(found: Any, metric: str | None, units: str) -> None:
    """A line a score: its value, its interval, and what else is to be known of it."""
    loss = found.scores.get("loss")
    perplexity = "" if loss is None else f", perplexity {math.exp(loss.value):.2f}" if loss.value < 700 else ""
    beside = {"loss": f"nats per token, of {found.tokens:,} tokens{perplexity}"}
    print(f"{len(found.details):,} {units}")
    for name, (value, low, high) in found.scores.items():
        interval = "" if low is None else f"[{low:.4f}, {high:.4f}]"
        print(f"{metric if name == 'metric' else name:16} {value:9.4f}  {interval:18}  {beside.get(name, '')}".rstrip())
    if found.chance is not None:
        print(f"{'chance':16} {found.chance:9.4f}")
