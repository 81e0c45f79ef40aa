"""Fine-tune with every combination of learning rates, ranks and seeds, and find the best on validation examples.

Every run starts from the same base. The table has the mean loss of each combination over the seeds, with its 95 %
confidence interval (Student's t), in nats per token. Validation examples are a tenth of your file, 96 at most, or the
validation split of a shipped task. The best mean is biased low, because it was chosen: report the loss on a test file that
you set aside before (`minipeft evaluate --data test.jsonl`), as finetune and compare hold out the same tenth of a file.

The rows of the runs go to rows.jsonl in --output as they end. The same command goes on after an interruption; with more
values or seeds it computes what is new. Where the file, the model or a plugin's source changes, all is new; no row is
ever deleted. A picture, sweep.png, is beside it; `minipeft.experiments` has `read_rows`, `table` and `plot` for others.
The exit status is 1 where a run failed; the same command tries it again.

The other options of the method are the same in all runs. --rank leaves lora_alpha as it is, so a higher rank has a
smaller scale, alpha / r.

examples:
  minipeft sweep --data my.jsonl --method lora --lr 1e-3 3e-3 1e-2 -r 4 8 --seeds 3 --output sweep
  minipeft sweep --task define --method full --seeds 5 --output sweep
  minipeft sweep --data my.jsonl --executor tcp://scheduler:8786 --output sweep  # a Dask cluster that sees the file
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

from .. import __version__
from ..experiments.run import Settings
from ..experiments.sweep import executor_of, grid, sweep
from ..options import add_options
from ..peft.methods import METHODS, Method, at_width
from . import outputs, runs
from .arguments import add_machine, add_model, positive, positive_int
from .method_options import add_method_options, given_options, method_of

STEPS, HELD_OUT, BLOCKS = 48, 96, 24  # as in `compare`
LOSS = "validation_loss"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=("rewrite", "define", "use"), help="the shipped task (default: rewrite)")
    parser.add_argument("--data", metavar="FILE", help="your own .jsonl or .txt file; a tenth of it is for validation")
    add_model(parser)
    parser.add_argument("--method", choices=METHODS, help="default: lora")
    add_method_options(parser, several=("rank",))
    parser.add_argument("--output", required=True, metavar="DIR", help="where rows.jsonl and sweep.png are")
    group = parser.add_argument_group("the grid")
    group.add_argument(
        "--lr", type=positive, nargs="+", metavar="RATE",
        help="peak learning rates (default: 1/3, 1 and 3 times the method's)",
    )  # fmt: skip
    group.add_argument(
        "--seeds", type=positive_int, default=3, metavar="N", help="runs of each, seeds 0 to N - 1 (default: 3)"
    )
    group = parser.add_argument_group("training")
    add_options(group, Settings, "steps", "batch_size", defaults={"steps": STEPS, "batch_size": 16})
    add_machine(parser)
    parser.add_argument(
        "--executor", type=executor_of, metavar="N|ADDRESS",
        help="number of processes, which share the threads, or a Dask scheduler (default: one process a thread)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.task and args.data:
        raise ValueError("give either --task or --data, not both")
    output = Path(args.output)
    outputs.check_directory(args, output)

    from .. import backend
    from ..directory import locked
    from ..experiments import plot, table
    from ..experiments.rows import failed
    from ..train.metrics import save_png

    options = given_options(args)
    ranks, name = options.pop("rank", [None]), args.method or (None if args.adapter_config else "lora")
    base, _ = loaded(args.model, args.backend)
    for r in ranks:
        if why := (method := chosen(name, args.adapter_config, options, r)).why_not(base):
            raise ValueError(f"{f'--method {name}' if name else f'--adapter-config {args.adapter_config}'}: {why}")
    usual, home = at_width(method.learning_rate, base), type(method.config()).__module__  # which registers a method of your own
    own = None if home.partition(".")[0] == "minipeft" else getattr(sys.modules[home], "__file__", None)
    settings = grid(
        task=None if args.data else args.task or "rewrite", data=args.data, model=args.model, method=name,
        adapter_config=args.adapter_config, options=options, steps=args.steps, batch_size=args.batch_size,
        r=sorted(set(ranks)),
        lr=sorted(set(args.lr or [float(f"{factor * usual:.2g}") for factor in (1 / 3, 1, 3)])), seed=range(args.seeds),
    )  # fmt: skip
    data = examples(args.task, args.data, loaded(args.model, args.backend), method, 0, args.steps * args.batch_size)
    sizes = f"{len(data.train):,} examples to learn from, {len(data.held_out):,} for validation"
    runs.note(f"{len(settings)} runs: {sizes}")
    if data.note:
        runs.note(data.note)

    output.mkdir(parents=True, exist_ok=True)
    on_device = backend.get_backend(args.backend) is not backend.get_backend("numpy")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            rows = sweep(
                partial(fine_tuned, backend=args.backend, home=home), settings,
                args.executor or (1 if on_device else None),
                output / "rows.jsonl", version_of(args.data, args.model, args.adapter_config, own), runs.note,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where it was") from None
    for warning in said:
        runs.note(str(warning.message))
    several = [name for name in ("lr", "r") if len({row[name] for row in rows}) > 1] or ["lr"]
    print(f"\n{table(rows, [LOSS, 'general_loss'], several)}\n")
    with locked(output, "sweep.png"):
        save_png(plot(rows, LOSS, *several), output / "sweep.png")
    for line in verdict(rows, several):
        print(line)
    print(f"saved: {output / 'rows.jsonl'}, {output / 'sweep.png'}")
    return int(any(map(failed, rows)))


def verdict(rows: list[dict[str, Any]], axes: list[str]) -> list[str]:
    """Which combination is best, which cannot be told from it, and on which axes it is at the edge of the grid.

    Raises ValueError where no combination has a loss from every run.
    """
    import numpy as np

    from ..experiments.rows import failed
    from ..experiments.seeds import interval
    from ..experiments.tables import means, with_interval

    found = [mean for mean in means(rows, LOSS, axes) if not mean["failed"] and np.isfinite(mean[LOSS])]
    if not found:
        why = next((row["error"] for row in rows if failed(row)), "training diverged; give lower rates with --lr")
        raise ValueError(f"there is no setting of which all runs ended with a loss: {why}")
    best = min(found, key=lambda mean: mean[LOSS])

    def losses(mean: dict[str, Any]) -> np.ndarray:
        there = [row for row in rows if all(row[name] == mean[name] for name in axes)]
        return np.array([row[LOSS] for row in sorted(there, key=lambda row: row["seed"])])

    def named(mean: dict[str, Any]) -> str:
        return ", ".join(f"{name} {mean[name]:g}" for name in axes)

    over = f" (95 % over {best['n']} seeds)" if best["n"] > 1 else ""
    lines = [f"best: {named(best)}: validation loss {with_interval(best[LOSS], best[f'{LOSS} ±'])}{over}"]
    more = [(mean, *interval(losses(mean) - losses(best))) for mean in found if mean is not best]
    alike = [named(mean) for mean, difference, half in more if not difference > half]
    if alike:
        lines.append(f"not clearly worse, seed by seed: {'; '.join(alike)}")
    for name in axes:
        values = sorted({row[name] for row in rows})
        if len(values) > 1 and best[name] in (values[0], values[-1]):
            edge, near, side = (*values[:2], "least") if best[name] == values[0] else (*values[:-3:-1], "largest")
            beyond = float(f"{edge * edge / near:.2g}") if name == "lr" else max(1, round(edge * edge / near))
            if beyond in values:  # there is no rank below 1
                continue
            lines.append(f"the best {name} is the {side} of the grid: the optimum may lie beyond it; try {beyond:g}, too")
    return lines


def fine_tuned(
    task: str | None, data: str | None, model: str | None, method: str | None, adapter_config: str | None,
    options: dict[str, Any], steps: int, batch_size: int, r: int | None, lr: float, seed: int, backend: str | None,
    home: str,
) -> dict[str, Any]:  # fmt: skip
    """A run: its losses, and the number of parameters that it trained. `home` is the module of the method."""
    from ..experiments.run import TaskData, fine_tune
    from ..experiments.shipped import general_blocks

    importlib.import_module(home)
    (base, tokenizer), tuned = loaded(model, backend), chosen(method, adapter_config, options, r)
    found = examples(task, data, loaded(model, backend), tuned, seed, steps * batch_size)
    general = general_blocks(tokenizer, longest(base, tuned), BLOCKS)
    of = TaskData(found.train, found.held_out, general, [], tokenizer.pad_token_id or 0)
    settings = Settings(learning_rate=lr, steps=steps, batch_size=batch_size, seed=seed)
    row, _ = fine_tune(base, of, settings, tuned, progress=False)
    names = ("trainable", "train_loss", "general_loss")
    return {LOSS: row["task_loss"], **{name: row[name] for name in names}}


@cache
def loaded(model: str | None, backend: str | None) -> tuple[Any, Any]:
    """(model, tokenizer), once in a process."""
    from .models import load_model

    return load_model(model, backend)


def examples(task: str | None, data: str | None, loaded: tuple[Any, Any], method: Method, seed: int, n: int) -> Any:
    """What a run learns from, of a shipped task `n` examples that the seed chooses, and the validation examples."""
    from .compare import load_data

    base, tokenizer = loaded
    what = argparse.Namespace(task=task, data=data)
    return load_data(what, seed, tokenizer, longest(base, method), n, HELD_OUT, "validation")


def longest(base: Any, method: Method) -> int:
    """Tokens of an example. Raises ValueError where the method takes all positions of the model."""
    length = min(256, base.config.max_position_embeddings - method.virtual_tokens)
    if length < 1:
        raise ValueError(f"the method takes all of the model's {base.config.max_position_embeddings} positions")
    return length


def chosen(method: str | None, adapter_config: str | None, options: dict[str, Any], r: int | None) -> Method:
    """The method with its options, at rank r unless it is None. Raises as `method_of`."""
    options = options | ({} if r is None else {"rank": r})
    given = {f"method_{name}": value for name, value in options.items()}
    return method_of(argparse.Namespace(method=method, adapter_config=adapter_config, **given))[1]


def version_of(*paths: str | None) -> str:
    """What the rows depend on beside their settings: this version, and the bytes of the files in use."""
    digest = hashlib.sha256()
    for path in map(Path, filter(None, paths)):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with open(file, "rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
    return f"minipeft {__version__}, files {digest.hexdigest()[:12]}"
