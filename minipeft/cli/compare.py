"""Fine-tune the shipped base with every method on the same task, and compare what each costs, learns and forgets.

Every method starts from the same base, sees the same examples in the same order, and is tested on the same held-out
text. The table says, per method:
    trainable, share    parameters that are trained, and their share of all
    memory              peak of a training step, weights included: what the ledger predicts, and what is measured
    s/step              median seconds of a step
    task loss           on held-out examples of the task, nats per token; lower is better
    general loss        on held-out text of the base's own domain, and how much it rose: what was forgotten
    storage             bytes to keep per task

compare.png and compare.json are written to --output; those of an earlier comparison there are replaced. --report writes
the table and its plots as one HTML page, DIR/index.html, that needs nothing else: no network, no other file. Both also
hold the time to generate a token, with the method in place and after merging it into the weights.

examples:
  minipeft compare
  minipeft compare --task define --steps 300 --methods full
  minipeft compare --data my.jsonl --report my-comparison
  minipeft compare --methods lora dora vera -r 2 --target q_proj v_proj
  minipeft compare --reduced
"""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..experiments.run import Settings
from ..options import add_options, from_arguments
from ..peft.methods import METHODS, Method
from . import outputs, runs
from .arguments import add_machine, positive_int
from .method_options import add_method_options, given_options, method_of, methods_of

REDUCED = "MINIPEFT_REDUCED"
OUTPUT = "minipeft-compare"
# (steps, held-out examples of the task, blocks of general text), usual and reduced
SIZES = {False: (48, 96, 24), True: (12, 24, 4)}
VARYING = ("task_loss", "general_loss", "forgotten", "seconds_per_step")  # what differs from seed to seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=("rewrite", "define", "use"), help="the shipped task (default: rewrite)")
    parser.add_argument("--data", metavar="FILE", help="your own .jsonl or .txt file; a tenth of it, 96 at most, is held out")
    parser.add_argument("--model", metavar="PATH", help="a Hugging Face model directory (default: the shipped base)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="NAME",
        help=f"any of {', '.join(METHODS)} (default: all that the model can take); the frozen base is always shown",
    )  # fmt: skip
    add_method_options(parser)
    parser.add_argument("--output", metavar="DIR", help=f"default: ./{OUTPUT}, or where the report is")
    parser.add_argument("--report", metavar="DIR", help="write DIR/index.html, one page with the table and its plots")
    group = parser.add_argument_group("training")
    add_options(
        group, Settings, "steps", "batch_size", "learning_rate", "seed",
        defaults={"steps": None, "learning_rate": None},
        steps=f"steps of each method (default: {SIZES[False][0]})", batch_size="examples a step",
        learning_rate="one learning rate for all (default: each its own)", seed="seed of the data and the adapters' start",
    )  # fmt: skip
    group.add_argument(
        "--seeds", type=positive_int, metavar="N", help="runs of each method, from --seed on (default: 1; a report: 3)"
    )
    group.add_argument(
        "--reduced", action="store_true",
        help=f"{SIZES[True][0]} steps and less held-out text, to try it out; also by {REDUCED}=1 in the environment",
    )  # fmt: skip
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    if args.task and args.data:
        raise ValueError("give either --task or --data, not both")
    wanted = methods_of(args, args.methods or METHODS)
    if args.adapter_config:
        wanted |= [method_of(argparse.Namespace(adapter_config=args.adapter_config, method=None))]
    output = Path(args.output or args.report or OUTPUT)
    report = Path(args.report) if args.report else None
    for option, path in (("--report", report), ("--output", output)):
        if path:
            outputs.hold(args, path, option)

    from ..experiments.run import TaskData
    from ..experiments.shipped import general_blocks
    from ..files import write_json
    from .data import samples
    from .models import load_model
    from .plots import plot_comparison
    from .report import ANSWER, answered, console, show_samples

    reduced = args.reduced or os.environ.get(REDUCED) == "1"
    steps, held_out, blocks = SIZES[reduced]
    settings = from_arguments(Settings, args, steps=args.steps or steps, evaluations=4)
    base, tokenizer = load_model(args.model, args.backend)
    left_out = {key: why for key, method in wanted.items() if (why := method.why_not(base))}
    methods = {key: method for key, method in wanted.items() if key not in left_out}
    if args.methods and left_out:
        raise ValueError("; ".join(f"--methods {key}: {why}" for key, why in left_out.items()))
    virtual = max((method.virtual_tokens for method in methods.values()), default=0)  # all methods see the same examples
    max_length = min(256, base.config.max_position_embeddings - virtual)
    if max_length < 1:
        raise ValueError(f"{virtual} virtual tokens take all of the model's {max_length + virtual} positions")
    pad = tokenizer.pad_token_id or 0
    general = general_blocks(tokenizer, max_length, blocks)
    seeds = range(settings.seed, settings.seed + (args.seeds or (3 if report and not reduced else 1)))
    examples = settings.steps * settings.batch_size
    found = [load_data(args, seed, tokenizer, max_length, examples, held_out) for seed in seeds]
    data = found[0]
    tasks = {seed: TaskData(of.train, data.held_out, general, [], pad) for seed, of in zip(seeds, found)}
    name = args.data or f"the task {args.task or 'rewrite'}"
    runs.note(
        f"{name}: {len(data.train):,} examples to learn from, {len(data.held_out):,} held out; "
        f"{settings.steps} steps of {settings.batch_size}; {len(general)} held-out blocks of general text"
    )
    if data.note:
        runs.note(data.note)

    rows = [frozen(base, tasks[settings.seed], settings.batch_size)]
    tuned, best = base, rows[0]  # the model that does the task best, and its row
    for key, method in methods.items():
        runs.note(method.title, style="bold")
        row, model = train(key, method, settings, base, tasks, rows[0]["general_loss"])
        rows.append(row)
        if len(rows) == 2 or row["task_loss"] < best["task_loss"]:
            tuned, best = model, row

    record = {
        "data": name, "model": args.model or "the shipped base", "steps": settings.steps,
        "batch_size": settings.batch_size, "seed": settings.seed, "seeds": len(seeds), "reduced": reduced,
        "held_out_examples": len(data.held_out), "max_length": max_length, "left_out": left_out,
        "method_options": given_options(args), "adapter_config": args.adapter_config,
    }  # fmt: skip
    write_json(output / "compare.json", {"settings": record, "methods": rows})
    out = console()
    show_table(out, rows)
    plot_comparison(rows, output / "compare.png")
    for key, why in left_out.items():
        out.print(f"left out: {wanted[key].title}: {why}\n")
    shown = samples(data, tokenizer, 2, base.config.max_position_embeddings - virtual - ANSWER)
    answers = answered({rows[0]["title"]: base, best["title"]: tuned}, tokenizer, shown)
    show_samples(out, answers)
    saved = [output / "compare.png", output / "compare.json"]
    if report:
        from .page import write_page

        saved.append(report / "index.html")
        write_page(saved[-1], record, rows, answers)
    out.print(f"saved: {', '.join(map(str, saved))}")
    return 0


def load_data(
    args: argparse.Namespace, seed: int, tokenizer: Any, max_length: int, examples: int, held_out: int,
    split: str = "test",
) -> Any:  # fmt: skip
    """The examples: of the user's file, or this number of a shipped task, chosen by the seed.

    The held-out ones do not depend on the seed: those of `split`, evenly spaced. Of a shipped task all are short (as in
    the lessons), so that the comparison ends soon; of a file, those too long for the model are left out.
    """
    import numpy as np

    from ..experiments.shipped import short, spaced
    from .data import encode, read_records

    if args.data:
        data = encode(read_records(args.data), 0.1, tokenizer, max_length, on_overflow="drop")
        return data._replace(held_out=spaced(data.held_out, held_out))
    name = args.task or "rewrite"
    records, test = short(name, "train"), short(name, split)
    chosen = np.random.default_rng(seed).permutation(len(records))[:examples]
    return encode([records[i] for i in chosen], spaced(test, held_out), tokenizer, max_length, on_overflow="drop")


def frozen(base: Any, task: Any, batch_size: int) -> dict[str, Any]:
    """The row of the base as it is."""
    from ..experiments.costs import count, latency, memory
    from ..experiments.run import evaluate

    predicted, measured = memory(None, base, task.train, batch_size, task.pad_token_id)
    task_loss, general_loss = evaluate(base, task, batch_size)
    seconds = latency(base)
    return {
        "method": "frozen", "title": "frozen", "learning_rate": None, "trainable": 0, "parameters": count(base)[1],
        "memory_predicted": predicted, "memory_measured": measured, "seconds_per_step": None, "storage": 0,
        "latency": seconds, "latency_merged": seconds,
        "task_loss": task_loss, "general_loss": general_loss, "forgotten": 0.0, "curve": [], "held_out_curve": [],
    }  # fmt: skip


def train(
    key: str, method: Method, settings: Any, base: Any, tasks: dict[int, Any], start: float
) -> tuple[dict[str, Any], Any]:
    """The row of one method, called `key`, and the model of the first seed; `tasks` are by seed.

    What the seeds measured stands under "seeds", its means in the row itself; the curves are the first seed's. `start`
    is the base's loss on general text. Raises ValueError where training diverges.
    """
    from ..experiments.costs import latency, memory, merged
    from ..experiments.run import fine_tune

    first = next(iter(tasks.values()))
    predicted, measured = memory(method, base, first.train, settings.batch_size, first.pad_token_id)
    found: list[dict[str, Any]] = []
    model: Any = None
    for seed, task in tasks.items():
        run, trained = fine_tune(base, task, replace(settings, seed=seed), method)
        if run["task_loss"] is None:
            raise ValueError(f"{method.title} diverged at learning rate {run['rate']:g}; give a lower one with --lr")
        model = trained if model is None else model
        found.append(run | {"seed": seed, "forgotten": run["general_loss"] - start})
    plain = merged(model)
    row = {
        "method": key, "title": method.title, "learning_rate": run["rate"],
        **{name: found[0][name] for name in ("trainable", "parameters", "storage", "curve", "held_out_curve")},
        "memory_predicted": predicted, "memory_measured": measured,
        "latency": latency(model), "latency_merged": None if plain is None else latency(plain),
        **{name: statistics.mean(run[name] for run in found) for name in VARYING},
        "seeds": [{name: run[name] for name in ("seed", *VARYING)} for run in found],
    }  # fmt: skip
    return row, model


COLUMNS = {
    "trainable": "\ntrainable", "share": "share\n%", "predicted": "memory\npredicted", "measured": "\nmeasured",
    "step": "\ns/step", "task_loss": "task\nloss", "general_loss": "general\nloss", "forgotten": "\nchange",
    "storage": "\nstorage",
}  # fmt: skip


def show_table(out: Any, rows: list[dict[str, Any]]) -> None:
    """One line a method; the best of a column is bold. Fits into 80 columns."""
    from rich.text import Text

    from .bars import grid
    from .cells import cells

    table = grid("\nmethod", *COLUMNS.values(), gap=1)
    for row in rows:
        found = [cells(row, rows)[key] for key in COLUMNS]
        table.add_row(row["title"], *(Text(cell.text, "bold" if cell.best else "") for cell in found))
    out.print()
    out.print(table)
    out.print()
