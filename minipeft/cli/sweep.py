"""Fine-tune over a grid of rates, ranks and seeds.

Every run starts from the same base. The table has the mean loss of each combination over the seeds, with its 95 %
confidence interval (Student's t), in nats per token. Validation examples are a tenth of your file, 96 at most, or the
validation split of a shipped task; records longer than 256 tokens, or than the model takes, are left out. The best
mean is biased low, because it was chosen: report the loss on a test file that you set aside before (`minipeft evaluate
--data test.jsonl`), as finetune and compare hold out the same tenth of a file.

The rows of the runs go to rows.jsonl in --output as they end. The same command goes on after an interruption; with more
values or seeds it computes what is new. Where the file, the model or a plugin's source changes, all is new; no row is
ever deleted. A picture, sweep.png, is beside it; `minipeft.experiments` has `read_rows`, `table` and `plot` for others.
The exit status is 1 where a run failed; the same command tries it again.

The other options, of the method and of training, are the same in all runs. --rank leaves lora_alpha as it is, so a
higher rank has a smaller scale, alpha / r.

examples:
  minipeft sweep --data my.jsonl --method lora --lr 1e-3 3e-3 1e-2 -r 4 8 --seeds 3 --output sweep
  minipeft sweep --task define --method full --seeds 5 --output sweep
  minipeft sweep --data my.jsonl --executor tcp://scheduler:8786 --output sweep  # a Dask cluster that sees the file
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections import defaultdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import minipeft as mp

from ..experiments.run import Settings
from ..experiments.sweep import executor_of
from ..options import configuration, from_arguments, option
from ..peft.methods import at_width
from . import outputs, runs
from .arguments import Arguments, Common, Parser, add_machine
from .data import Data, TaskOptions, longest
from .method_options import MethodOptions, add_method, given_options, method_named
from .models import load_model

LOSS = "validation_loss"
OTHERS = "warmup", "weight_decay"  # which rows name where they are given


@configuration(kw_only=True)
class GridOptions(MethodOptions):
    """The options of the method, of which the rank may have several values, and what is combined with the ranks."""

    r: list[int] | None = option(None, "ranks; adalora's at the end, oft's number of blocks", least=1, flag="-r --rank")
    lr: list[float] | None = option(None, "peak rates; None: 1/3, 1, 3 times the method's", above=0, metavar="RATE")
    seeds: int = option(3, "runs of each, seeds 0 to N - 1", least=1)


def add_arguments(parser: Parser) -> None:
    parser.options(TaskOptions, data="or your .jsonl or .txt file; a tenth, 96 at most, is for validation")
    parser.options(Common, "model")
    add_method(parser, usual="lora", cls=GridOptions)
    parser.options(Common, "output", output="where rows.jsonl and sweep.png are")
    parser.options(GridOptions, "lr", "seeds", group="the grid")
    parser.options(Settings, "steps", "batch_size", *OTHERS, group="training", defaults={"steps": 48})  # as in `compare`
    add_machine(parser)
    where = "processes, which share the threads, or a Dask scheduler (default: one process a thread)"
    parser.add_argument("--executor", type=executor_of, metavar="N|ADDRESS", help=where)


def run(args: Arguments) -> int:
    args.only_one("task", "data")
    if not args.data:
        args.refuse(("columns",), "without --data")
    output = Path(args.output)
    outputs.hold(args, output)
    task, options = from_arguments(TaskOptions, args), given_options(args)
    ranks, name = options.pop("r", [None]), args.method or (None if args.adapter_config else "lora")
    base, _ = loaded(args.model, args.backend)
    for r in ranks:
        if why := (method := chosen(name, args.adapter_config, options, r)).why_not(base):
            raise ValueError(f"{f'--method {name}' if name else f'--adapter-config {args.adapter_config}'}: {why}")
    usual = at_width(method.learning_rate, base)
    home = type(method.config()).__module__  # which registers a method of your own
    own = None if home.partition(".")[0] == "minipeft" else getattr(sys.modules[home], "__file__", None)
    settings = mp.grid(
        **{"columns": [args.columns]} if args.columns else {},  # one value, a list
        **{name: getattr(args, name) for name in OTHERS if name in args.given},
        task=None if args.data else args.task, data=args.data, model=args.model, method=name,
        adapter_config=args.adapter_config, options=options, steps=args.steps, batch_size=args.batch_size,
        r=sorted(set(ranks)),
        lr=sorted(set(args.lr or [float(f"{factor * usual:.2g}") for factor in (1 / 3, 1, 3)])), seed=range(args.seeds),
    )  # fmt: skip
    data = examples(task, args.model, args.backend, method, 0, args.steps * args.batch_size)
    sizes = f"{len(data.train):,} examples to learn from, {len(data.held_out):,} for validation"
    runs.note(f"{len(settings)} runs: {sizes}")
    runs.note(data.note)

    on_device = mp.backend.get_backend(args.backend) is not mp.backend.get_backend("numpy")
    version = version_of(args.data, args.model, args.adapter_config, own)
    train = partial(fine_tuned, backend=args.backend, home=home)
    executor = args.executor or (1 if on_device else None)
    try:
        rows = mp.sweep(train, settings, executor, output / "rows.jsonl", version, runs.note)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where it was") from None
    several = [name for name in ("lr", "r") if len({row[name] for row in rows}) > 1] or ["lr"]
    print(f"\n{mp.experiments.table(rows, [LOSS, 'general_loss'], several)}\n")
    mp.train.metrics.save_png(mp.experiments.plot(rows, LOSS, *several), output / "sweep.png")
    print(*verdict(rows, several), sep="\n")
    print(f"saved: {output / 'rows.jsonl'}, {output / 'sweep.png'}")
    return int(any(map(mp.experiments.rows.failed, rows)))


def verdict(rows: list[dict[str, Any]], axes: list[str]) -> list[str]:
    """Which combination is best, which cannot be told from it, and on which axes it is at the edge of the grid.

    Raises ValueError where no combination has a loss from every run.
    """
    import numpy as np

    losses: dict[tuple[float, ...], list[float]] = defaultdict(list)  # of each combination, by seed
    for row in sorted(rows, key=lambda row: [*(row[name] for name in axes), row["seed"]]):
        losses[tuple(row[name] for name in axes)].append(np.nan if row.get(LOSS) is None else row[LOSS])
    found = {point: np.array(values) for point, values in losses.items() if np.isfinite(values).all()}
    if not found:
        diverged = "training diverged; give lower rates with --lr"
        why = next((row["error"] for row in rows if mp.experiments.rows.failed(row)), diverged)
        raise ValueError(f"there is no setting of which all runs ended with a loss: {why}")
    best, interval = min(found, key=lambda point: found[point].mean()), mp.experiments.interval

    def named(point: tuple[float, ...]) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in zip(axes, point))

    over = f" (95 % over {len(found[best])} seeds)" if len(found[best]) > 1 else ""
    loss = mp.experiments.tables.with_interval(*interval(found[best]))
    lines = [f"best: {named(best)}: validation loss {loss}{over}"]
    differences = {point: interval(values - found[best]) for point, values in found.items() if point != best}
    alike = [named(point) for point, (difference, half) in differences.items() if not difference > half]
    if alike:
        lines.append(f"not clearly worse, seed by seed: {'; '.join(alike)}")
    for name, value, values in zip(axes, best, map(sorted, map(set, zip(*losses)))):
        if len(values) > 1 and value in (values[0], values[-1]):
            edge, near, side = (*values[:2], "least") if value == values[0] else (*values[:-3:-1], "largest")
            beyond = float(f"{edge * edge / near:.2g}") if name == "lr" else max(1, round(edge * edge / near))
            if beyond not in values:  # there is no rank below 1
                where = f"the best {name} is the {side} of the grid"
                lines.append(f"{where}: the optimum may lie beyond it; try {beyond:g}, too")
    return lines


def fine_tuned(
    task: str | None, data: str | None, model: str | None, method: str | None, adapter_config: str | None,
    options: dict[str, Any], steps: int, batch_size: int, r: int | None, lr: float, seed: int, backend: str | None,
    home: str, columns: list[str] | None = None, **others: float,
) -> dict[str, Any]:  # fmt: skip
    """A run: its losses, and the number of parameters that it trained. `home` is the module of the method."""
    importlib.import_module(home)
    (base, tokenizer), tuned = loaded(model, backend), chosen(method, adapter_config, options, r)
    learned = TaskOptions(task=task or "rewrite", data=data, columns=columns)
    found = examples(learned, model, backend, tuned, seed, steps * batch_size)
    general = mp.experiments.shipped.general_blocks(tokenizer, longest(base, tuned.virtual_tokens), 24)
    of = mp.experiments.run.TaskData(found.train, found.held_out, general, [], tokenizer.pad_token_id or 0)
    settings = Settings(learning_rate=lr, steps=steps, batch_size=batch_size, seed=seed, **others)
    row, _ = mp.experiments.fine_tune(base, of, settings, tuned, progress=False)
    names = ("trainable", "train_loss", "general_loss")
    return {LOSS: row["task_loss"], **{name: row[name] for name in names}}


@cache
def loaded(model: str | None, backend: str | None) -> tuple[Any, Any]:
    """(model, tokenizer), once in a process."""
    return load_model(Arguments(model=model, backend=backend))


def examples(task: TaskOptions, model: str | None, backend: str | None, method: Any, seed: int, n: int) -> Data:
    """What a run learns from, of a shipped task `n` examples that the seed chooses, and the validation examples."""
    base, tokenizer = loaded(model, backend)
    return task.examples(seed, tokenizer, longest(base, method.virtual_tokens), n, 96, "validation")


def chosen(method: str | None, adapter_config: str | None, options: dict[str, Any], r: int | None) -> Any:
    """The method with its options, at rank r unless it is None. Raises as `method_named`."""
    return method_named(method, adapter_config, options | ({} if r is None else {"r": r}))[1]


def version_of(*paths: str | None) -> str:
    """What the rows depend on beside their settings: this version, and the bytes of the files in use."""
    places = map(Path, filter(None, paths))
    files = (file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place]))
    digest = hashlib.sha256()
    for file in filter(Path.is_file, files):
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return f"minipeft {mp.__version__}, files {digest.hexdigest()[:12]}"
