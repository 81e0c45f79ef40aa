"""Fine-tune the shipped base with every method on the same task, and compare what each costs, learns and forgets.

Every method starts from the same base, sees the same examples in the same order, and is tested on the same held-out
text. The table says, per method:
    trainable, share    parameters that are trained, and their share of all
    memory              peak of a training step, weights included: what the ledger predicts, and what is measured
    s/step              median seconds of a step
    task loss           on held-out examples of the task, nats per token; lower is better
    general loss        on held-out text of the base's own domain, and how much it rose: what was forgotten
    storage             bytes to keep per task

compare.png and compare.json are written to --output; those of an earlier comparison there are replaced.

examples:
  minipeft compare
  minipeft compare --task define --steps 300 --methods full
  minipeft compare --data my.jsonl --output my-comparison
  minipeft compare --reduced
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from ..experiments.methods import METHODS, Method
from .arguments import add_machine, add_seed, positive, positive_int, use_machine

SUMMARY = "fine-tune the shipped base with every method and compare them"

REDUCED = "MINIPEFT_REDUCED"
STEPS, REDUCED_STEPS = 80, 12
HELD_OUT, REDUCED_HELD_OUT = 120, 24  # examples of the task
BLOCKS, REDUCED_BLOCKS = 24, 4  # blocks of general text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=("rewrite", "define", "use"), help="the shipped task (default: rewrite)")
    parser.add_argument("--data", metavar="FILE", help="your own .jsonl or .txt file; a tenth of it is held out")
    parser.add_argument("--model", metavar="PATH", help="a Hugging Face model directory (default: the shipped base)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="NAME",
        help=f"any of {', '.join(METHODS)} (default: all that the model can take); the frozen base is always shown",
    )  # fmt: skip
    parser.add_argument("--output", default="minipeft-compare", metavar="DIR", help="default: ./%(default)s")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=positive_int, metavar="N", help=f"steps of each method (default: {STEPS})")
    group.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help="examples a step (default: 16)")
    group.add_argument("--lr", type=positive, metavar="RATE", help="one learning rate for all (default: each its own)")
    add_seed(group, "the choice and order of the data")
    group.add_argument(
        "--reduced",
        action="store_true",
        help=f"{REDUCED_STEPS} steps and less held-out text, to try it out; also by {REDUCED}=1 in the environment",
    )
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    if args.task and args.data:
        raise ValueError("give either --task or --data, not both")
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; a directory is to be written")
    use_machine(args)
    from rich.console import Console

    from ..files import write_json
    from .data import samples
    from .models import load_model
    from .report import ANSWER, answer, console, show_samples

    reduced = args.reduced or os.environ.get(REDUCED) == "1"
    steps = args.steps or (REDUCED_STEPS if reduced else STEPS)
    err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    base, tokenizer = load_model(args.model, args.backend)
    methods, left_out = applicable(args.methods or list(METHODS), base)
    if args.methods and left_out:
        raise ValueError("; ".join(f"--methods {key}: {why}" for key, why in left_out.items()))
    virtual = max(METHODS[key].virtual_tokens for key in methods)  # all methods see the same examples
    max_length = min(256, base.config.max_position_embeddings - virtual)
    if max_length < 1:
        raise ValueError(f"{virtual} virtual tokens take all of the model's {max_length + virtual} positions")
    data = load_data(args, tokenizer, max_length, steps, REDUCED_HELD_OUT if reduced else HELD_OUT)
    general = general_blocks(tokenizer, max_length, REDUCED_BLOCKS if reduced else BLOCKS)
    name = args.data or f"the task {args.task or 'rewrite'}"
    err.print(
        f"{name}: {len(data.train):,} examples to learn from, {len(data.held_out):,} held out; "
        f"{steps} steps of {args.batch_size}; {len(general)} held-out blocks of general text"
    )
    if data.note:
        err.print(data.note)

    output.mkdir(parents=True, exist_ok=True)  # before the work: it may not be allowed
    rows = [frozen(base, tokenizer, data, general, args.batch_size)]
    tuned, best = base, rows[0]  # the model that does the task best, and its row
    for key in methods:
        err.print(METHODS[key].title, style="bold")
        row, model = train(key, METHODS[key], base, tokenizer, data, general, steps, args, rows[0]["general_loss"])
        rows.append(row)
        if len(rows) == 2 or row["task_loss"] < best["task_loss"]:
            tuned, best = model, row

    settings = {
        "data": name, "model": args.model or "the shipped base", "steps": steps, "batch_size": args.batch_size,
        "seed": args.seed, "reduced": reduced, "held_out_examples": len(data.held_out), "max_length": max_length,
        "left_out": left_out,
    }  # fmt: skip
    write_json(output / "compare.json", {"settings": settings, "methods": rows})
    from .plots import plot_comparison

    plot_comparison(rows, output / "compare.png")

    out = console()
    show_table(out, rows)
    for key, why in left_out.items():
        out.print(f"left out: {METHODS[key].title}: {why}\n")
    shown = samples(data, tokenizer, 2, base.config.max_position_embeddings - virtual - ANSWER)
    models = {rows[0]["title"]: base, best["title"]: tuned}
    show_samples(out, [(s, {title: answer(model, tokenizer, s.ids) for title, model in models.items()}) for s in shown])
    out.print(f"saved: {output / 'compare.png'}, {output / 'compare.json'}")
    return 0


def applicable(keys: list[str], base: Any) -> tuple[list[str], dict[str, str]]:
    """(the methods of these names that can be put on the model, {name: why not} of the others)."""
    reasons = {key: METHODS[key].why_not(base) for key in keys}
    return [key for key, why in reasons.items() if why is None], {key: why for key, why in reasons.items() if why}


def load_data(args: argparse.Namespace, tokenizer: Any, max_length: int, steps: int, held_out: int) -> Any:
    """The examples: of the user's file, or of a shipped task, as many as the steps need, chosen by the seed.

    The held-out ones do not depend on the seed: the test split's, evenly spaced. Too long ones are left out.
    """
    import numpy as np

    from ..text.tasks import task
    from .data import encode, read_records

    if args.data:
        data = encode(read_records(args.data), 0.1, tokenizer, max_length, on_overflow="drop")
        return data._replace(held_out=data.held_out[:held_out])
    name = args.task or "rewrite"
    records, test = task(name, "train"), task(name, "test")
    chosen = np.random.default_rng(args.seed).permutation(len(records))[: steps * args.batch_size]
    spaced = np.linspace(0, len(test) - 1, min(held_out, len(test))).astype(int)
    return encode([records[i] for i in chosen], [test[i] for i in spaced], tokenizer, max_length, on_overflow="drop")


def general_blocks(tokenizer: Any, length: int, n: int) -> list[Any]:
    """`n` blocks of the validation split of the base's own training text, evenly spaced through it."""
    import numpy as np

    from ..text.corpora import general_text
    from ..text.examples import Example, chunk_text, encode_documents

    blocks = chunk_text(encode_documents(general_text("validation"), tokenizer), length)
    spaced = np.linspace(0, len(blocks) - 1, min(n, len(blocks))).astype(int)
    return [Example(blocks[i], blocks[i]) for i in spaced]


def frozen(base: Any, tokenizer: Any, data: Any, general: Any, batch_size: int) -> dict[str, Any]:
    """The row of the base as it is."""
    from ..train import Trainer, TrainingArguments
    from .report import count

    pad = tokenizer.pad_token_id or 0
    predicted, measured = memory(None, base, data, batch_size, pad)
    trainer = Trainer(base, data.train, args=TrainingArguments(per_device_eval_batch_size=batch_size), pad_token_id=pad)
    task_loss, general_loss = trainer.evaluate(data.held_out), trainer.evaluate(general)
    return {
        "method": "frozen", "title": "frozen", "learning_rate": None, "trainable": 0, "parameters": count(base)[1],
        "memory_predicted": predicted, "memory_measured": measured, "seconds_per_step": None, "storage": 0,
        "task_loss": task_loss, "general_loss": general_loss, "forgotten": 0.0, "curve": [], "held_out_curve": [],
    }  # fmt: skip


def train(
    key: str, method: Method, base: Any, tokenizer: Any, data: Any, general: Any, steps: int, args: argparse.Namespace,
    start: float,
) -> tuple[dict[str, Any], Any]:
    """The row of one method, and the model that it trained; `start` is the base's loss on general text."""
    from ..train import Trainer, TrainingArguments
    from .report import count

    arguments = TrainingArguments(
        learning_rate=args.lr or method.learning_rate,
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        lr_scheduler_type="cosine",
        warmup_ratio=0.05,
        eval_steps=max(1, steps // 4),
        seed=args.seed,
    )
    pad = tokenizer.pad_token_id or 0
    predicted, measured = memory(method, base, data, args.batch_size, pad)
    model = method.prepare(base, steps)
    trainer = Trainer(model, data.train, data.held_out, arguments, pad)
    result = trainer.train()
    held_out_curve, general_loss = result.losses("eval_loss"), trainer.evaluate(general)
    trainable, total = count(model)
    seconds = [r["tokens"] / r["tokens_per_second"] for r in result.history if "tokens_per_second" in r]
    row = {
        "method": key, "title": method.title, "learning_rate": arguments.learning_rate, "trainable": trainable,
        "parameters": total, "memory_predicted": predicted, "memory_measured": measured,
        "seconds_per_step": statistics.median(seconds),
        "storage": storage(model),
        "task_loss": held_out_curve[-1][1], "general_loss": general_loss, "forgotten": general_loss - start,
        "curve": result.losses("loss"), "held_out_curve": held_out_curve,
    }  # fmt: skip
    return row, model


def storage(model: Any) -> int:
    """Bytes to keep for the task: what is trained; of an adapter, the arrays of its file."""
    from ..peft.directory import state
    from ..peft.model import PeftModel

    if isinstance(model, PeftModel):
        return sum(p.data.nbytes for name in model.active_adapters for p in state(model, name).values())
    return sum(p.data.nbytes for p in model.parameters() if p.requires_grad)


def memory(method: Method | None, base: Any, data: Any, batch_size: int, pad: int) -> tuple[int, int | None]:
    """(predicted, measured) peak bytes of a step on the longest examples, everything included: weights, gradients,
    optimizer states, activations. For the frozen base (None), of an evaluation. Only host memory can be measured.
    """
    import numpy as np

    from ..accounting import architecture, measure_peak, memory_ledger
    from ..backend import xp_of
    from ..train import Trainer, TrainingArguments, collate

    longest = sorted(data.train, key=lambda example: -len(example.input_ids))[:batch_size]
    labels = collate(longest, pad).arguments["labels"]
    if method and method.quantized:
        ledger = memory_ledger(method.prepare(base, steps=2), None, *labels.shape, labels=labels)
    else:
        config, mode = (method.config(), "train") if method else ("frozen", "evaluate")
        ledger = memory_ledger(architecture(base.config), config, *labels.shape, labels=labels, mode=mode)
    if xp_of(base.parameters()[0].data) is not np:
        return ledger.total, None
    arguments = TrainingArguments(
        max_steps=2, per_device_train_batch_size=batch_size, per_device_eval_batch_size=batch_size, progress=False
    )

    def step() -> None:
        model = base.copy()  # so that the weights are counted too
        if method:
            model = method.prepare(model, steps=2)  # where it quantizes, this lets go of the float weights
            Trainer(model, longest, args=arguments, pad_token_id=pad).train()
        else:
            Trainer(model, longest, longest, arguments, pad).evaluate()

    return ledger.total, measure_peak(step)


def show_table(out: Any, rows: list[dict[str, Any]]) -> None:
    """One line a method; the best loss on the task is bold. Fits into 80 columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\nmethod")
    for heading in (
        "\ntrainable", "share\n%", "memory MB\npredicted", "\nmeasured", "\ns/step",
        "task\nloss", "general\nloss", "\nchange", "storage\nMB",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    best = min(row["task_loss"] for row in rows)
    for row in rows:
        trained = row["method"] != "frozen"
        table.add_row(
            row["title"],
            f"{row['trainable']:,}",
            f"{100 * row['trainable'] / row['parameters']:.2f}",
            megabytes(row["memory_predicted"]),
            megabytes(row["memory_measured"]),
            f"{row['seconds_per_step']:.3f}" if trained else "-",
            Text(f"{row['task_loss']:.3f}", "bold" if row["task_loss"] == best else ""),
            f"{row['general_loss']:.3f}",
            f"{row['forgotten']:+.3f}" if trained else "-",
            megabytes(row["storage"]) if trained else "-",
        )
    out.print()
    out.print(table)
    out.print()


def megabytes(n: int | None) -> str:
    """Bytes in MB (10^6), to three figures, or - where there are none."""
    return "-" if n is None else f"{n / 1e6:,.{2 if n < 1e7 else 1 if n < 1e8 else 0}f}"
