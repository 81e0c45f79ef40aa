"""Fine-tune the base with every method and compare them.

Every method starts from the same base, sees the same examples in the same order, and is tested on the same held-out
text. Records longer than 256 tokens, or than the model takes, are left out. The table says what each costs, learns and
forgets:
    trainable           parameters that are trained
    memory              peak of a training step, weights included: what the ledger predicts, and what is measured
    s/step              median seconds of a step (on how many threads: see below)
    task loss           on held-out examples of the task, nats per token; lower is better
    general loss        on held-out text of the base's own domain, and how much it rose: what was forgotten
    answers             to the held-out questions: of a choice (source) the share that is right, %; of other tasks chrF, 0 to 100
    storage             bytes to keep per task

A small model on the CPU is fine-tuned by as many methods at a time as there are threads, each in a process of its own with
one thread: s/step is the time on one core, and the losses do not depend on the number of cores. A larger one, and any on a
device, is fine-tuned by one method after the other, with all threads.

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

import importlib
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import minipeft as mp

from ..executors import LocalProcesses
from ..experiments.run import Settings
from ..options import configuration, from_arguments, option
from ..peft.methods import METHODS, Method
from . import outputs, runs
from .arguments import Arguments, Common, Parser, add_machine
from .bars import console, grid
from .cells import cells
from .data import Data, TaskOptions, longest
from .method_options import add_method_options, given_options, method_named, methods_of
from .models import load_model
from .report import fitting, sampled, show_samples

REDUCED = "MINIPEFT_REDUCED"
OUTPUT = "minipeft-compare"
# (steps, held-out examples of the task, blocks of general text), usual and reduced
SIZES = {False: (48, 96, 24), True: (12, 24, 4)}
TOKENS = {"tokens": 16, "passes": 3}  # of which the time is taken, of every method, before and after merging
SMALL = 20_000_000  # parameters of a model whose products are too small for several threads, and of which copies are cheap
ANSWERED = {False: 24, True: 4}  # questions that a model answers in full; of a choice, which is short, all that are held out
VARYING = ("task_loss", "general_loss", "score", "seconds_per_step")  # what differs from seed to seed


@configuration(kw_only=True)
class ComparisonOptions:
    """What is compared, and where it is written."""

    methods: list[str] | None = option(None, "beside the frozen base", choices=METHODS, metavar="NAME")
    output: str | None = option(None, f"default: ./{OUTPUT}, or where the report is", metavar="DIR")
    report: str | None = option(None, "write DIR/index.html, one page with the table and its plots", metavar="DIR")
    seeds: int | None = option(None, "runs of each method, from --seed on (default: 1; a report: 3)", least=1)
    reduced: bool = option(False, f"{SIZES[True][0]} steps, less held-out text; also by {REDUCED}=1 in the environment")


class Questions(NamedTuple):
    """Held-out questions that every model answers, greedily; `exact` says how the answers are judged.

    exact   the share of answers that are the expected ones, in %; else their similarity, chrF, 0 to 100
    """

    records: list[Any]
    tokenizer: Any
    tokens: int
    exact: bool

    @classmethod
    def of(cls, task: TaskOptions, data: Data, tokenizer: Any, n: int, room: int) -> Questions | None:
        """Those of a task or a file that fit into `room` tokens with an answer.

        None where none does, of running text, and, which is noted, of what takes chrF where sacreBLEU is not installed.
        """
        records, exact = data.held_out_records, not task.data and task.task in mp.text.tasks.CHOICES
        if not records or isinstance(records[0], mp.text.datasets.Document):
            return None
        if not (exact or find_spec("sacrebleu")):
            runs.note("no answers are scored: chrF needs sacreBLEU (pip install 'minipeft[hub]')")
            return None
        tokens = min(max(int((example.labels >= 0).sum()) for example in data.held_out), 64)
        records = [sample.record for sample in fitting(data, tokenizer, room - tokens, None)]
        return cls(records if exact else records[:n], tokenizer, tokens, exact) if records else None

    @property
    def name(self) -> str:
        return "right, %" if self.exact else "chrF"

    def score(self, answers: Sequence[str]) -> float:
        """Of answers in the order of the records."""
        if self.exact:
            return 100 * statistics.mean(answer.strip() == right for answer, right in zip(answers, self.expected))
        return mp.train.metrics.chrf([answer.strip() for answer in answers], self.expected)

    @property
    def expected(self) -> list[str]:
        """The right answers."""
        return [mp.text.templates.question_and_answer(record)[1].strip() for record in self.records]

    def asked_of(self, model: Any) -> float:
        """The score of a model."""
        return self.score(mp.ask(model, self.tokenizer, self.records, None, batch_size=32, max_new_tokens=self.tokens))

    def baseline(self) -> str:
        """What no learning scores: of choices the answer that is right most often, else the question given back, without the
        words around it, as "King James:"."""
        if self.exact:
            common = statistics.mode(self.expected)
            return f"to answer {common!r} always is right in {self.score([common] * len(self.records)):.0f} %"
        asked = [mp.text.templates.question_and_answer(record)[0] for record in self.records]
        copied = self.score([text.partition(": ")[2].rpartition("\n")[0] or text for text in asked])
        return f"to copy the question has chrF {copied:.1f}"


def add_arguments(parser: Parser) -> None:
    parser.options(TaskOptions, defaults={"task": "source"})
    parser.options(Common, "model")
    parser.options(ComparisonOptions, methods=f"any of {', '.join(METHODS)}; None: all that the model can take")
    add_method_options(parser)
    parser.options(
        Settings, "steps", "batch_size", "learning_rate", "seed", group="training",
        defaults={"steps": None}, steps=f"optimizer steps; None: {SIZES[False][0]}",
    )  # fmt: skip
    add_machine(parser)


def run(args: Arguments) -> None:
    args.only_one("task", "data")
    if not args.data:
        args.refuse(("columns",), "without --data")
    task, options = from_arguments(TaskOptions, args), given_options(args)
    wanted = methods_of(args.methods or METHODS, options)
    if args.adapter_config:
        wanted |= [method_named(None, args.adapter_config, {})]
    report, output = args.report and Path(args.report), Path(args.output or args.report or OUTPUT)
    if report:
        outputs.hold(args, report, "--report")
    outputs.hold(args, output)

    reduced = args.reduced or os.environ.get(REDUCED) == "1"
    steps, tested, blocks = SIZES[reduced]
    settings = from_arguments(Settings, args, steps=args.steps or steps, evaluations=4)
    base, tokenizer = load_model(args)
    left_out = {key: why for key, method in wanted.items() if (why := method.why_not(base))}
    methods = {key: method for key, method in wanted.items() if key not in left_out}
    if args.methods and left_out:
        raise ValueError("; ".join(f"--methods {key}: {why}" for key, why in left_out.items()))
    virtual = max((method.virtual_tokens for method in methods.values()), default=0)  # all see the same examples
    max_length = longest(base, virtual)
    general = mp.experiments.shipped.general_blocks(tokenizer, max_length, blocks)
    seeds = range(settings.seed, settings.seed + (args.seeds or (3 if report and not reduced else 1)))
    n = settings.steps * settings.batch_size
    found = [task.examples(seed, tokenizer, max_length, n, tested, "test") for seed in seeds]
    data, pad = found[0], tokenizer.pad_token_id or 0
    TaskData = mp.experiments.run.TaskData
    held_out = sorted(data.held_out, key=lambda example: len(example.input_ids))  # a batch pads to its longest
    tasks = {seed: TaskData(of.train, held_out, general, [], pad) for seed, of in zip(seeds, found)}
    name = args.data or f"the task {args.task}"
    runs.note(
        f"{name}: {len(data.train):,} examples to learn from, {len(data.held_out):,} held out; "
        f"{settings.steps} steps of {settings.batch_size}; {len(general)} held-out blocks of general text"
    )
    runs.note(data.note)

    room = base.config.max_position_embeddings - virtual
    questions = Questions.of(task, data, tokenizer, ANSWERED[reduced], room)
    if questions:
        runs.note(f"{len(questions.records)} answers are compared with the expected ones; {questions.baseline()}")
    processes = at_a_time(base, 1 + len(methods))
    if processes:
        runs.note(f"{processes} methods at a time, each on one thread")
    rows: list[dict[str, Any]] = []
    tuned, best = base, {}  # the model that does the task best, and its row
    for row, model in computed({"frozen": None, **methods}, settings, base, tasks, questions, processes):
        rows.append(row)
        start = rows[0]["general_loss"]
        for of in (row, *row["seeds"]):
            of["forgotten"] = of["general_loss"] - start
        if len(rows) == 2 or (best and row["task_loss"] < best["task_loss"]):
            tuned, best = model, row

    record = {
        "data": name, "columns": args.columns, "model": args.model or "the shipped base", "steps": settings.steps,
        "batch_size": settings.batch_size, "seed": settings.seed, "seeds": len(seeds), "reduced": reduced,
        "held_out_examples": len(data.held_out), "max_length": max_length, "left_out": left_out,
        "answers": len(questions.records) if questions else 0,
        "methods_at_a_time": processes or 1, "threads_of_each": 1 if processes else mp.backend.get_num_threads(),
        "method_options": options, "adapter_config": args.adapter_config,
    }  # fmt: skip
    from .plots import plot_comparison

    mp.files.write_json(output / "compare.json", {"settings": record, "methods": rows})
    out = console()
    show_table(out, rows)
    plot_comparison(rows, output / "compare.png")
    for key, why in left_out.items():
        out.print(f"left out: {wanted[key].title}: {why}\n")
    samples = sampled({rows[0]["title"]: base, best["title"]: tuned}, tokenizer, data, 2, room, None)
    show_samples(samples)
    saved = [output / "compare.png", output / "compare.json"]
    if report:
        from .page import write_page

        saved.append(report / "index.html")
        write_page(saved[-1], record, rows, samples)
    out.print(f"saved: {', '.join(map(str, saved))}")


def at_a_time(base: Any, rows: int) -> int:
    """In how many processes, of one thread each, the rows are computed; 0: in this one, with all threads."""
    parameters, threads = base.parameters(), mp.backend.get_num_threads()
    small = sum(p.size for p in parameters) <= SMALL and mp.backend.xp_of(parameters[0].data) is mp.backend.np
    return min(threads, rows) if small and threads > 1 else 0


def computed(
    methods: dict[str, Method | None],
    settings: Settings,
    base: Any,
    tasks: dict[int, Any],
    questions: Questions | None,
    processes: int,
) -> Iterator[tuple[dict[str, Any], Any]]:
    """(row, trained model) of each method, in order; None is the base as it is. Raises as `train`."""
    common = settings, base, tasks, questions
    if not processes:
        for key, method in methods.items():
            if method:
                runs.note(method.title, style="bold")
            yield train(key, method, *common) if method else frozen(*common)
        return
    with LocalProcesses(processes) as pool:
        homes = [type(method.config()).__module__ if method else __name__ for method in methods.values()]
        futures = [pool.submit(on_one_thread, home, *of, *common) for home, of in zip(homes, methods.items())]
        while futures:
            row, model = futures.pop(0).result()
            runs.note(f"{row['title']}: task loss {row['task_loss']:.3f}")
            yield row, model


def on_one_thread(
    home: str,
    key: str,
    method: Method | None,
    settings: Settings,
    base: Any,
    tasks: dict[int, Any],
    questions: Questions | None,
) -> tuple[dict[str, Any], Any]:
    """`computed` for one method, in a process of its own; `home` is the module that registers the method."""
    importlib.import_module(home)
    mp.backend.set_num_threads(1)
    common = settings, base, tasks, questions
    return train(key, method, *common, progress=False) if method else frozen(*common)


def frozen(settings: Settings, base: Any, tasks: dict[int, Any], questions: Questions | None) -> tuple[dict[str, Any], None]:
    """The row of the base as it is, and no trained model."""
    task = tasks[settings.seed]
    task_loss, general_loss = mp.experiments.run.evaluate(base, task, settings.batch_size)
    row = {
        "method": "frozen", "title": "frozen", "learning_rate": None, "trainable": 0, "storage": 0,
        "parameters": mp.experiments.costs.count(base)[1], **measured(None, base, base, task, settings.batch_size),
        "task_loss": task_loss, "general_loss": general_loss, "seconds_per_step": None,
        "scored": questions and questions.name, "score": questions and questions.asked_of(base),
        "curve": [], "held_out_curve": [], "seeds": [],
    }  # fmt: skip
    return row, None


def train(
    key: str,
    method: Method,
    settings: Settings,
    base: Any,
    tasks: dict[int, Any],
    questions: Questions | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], Any]:
    """The row of one method, called `key`, and the model of the first seed; `tasks` are by seed.

    What the seeds measured stands under "seeds", its means in the row itself; the curves are the first seed's.
    Raises ValueError where training diverges.
    """
    found: list[dict[str, Any]] = []
    models: list[Any] = []
    for seed, task in tasks.items():
        run, trained = mp.experiments.fine_tune(base, task, replace(settings, seed=seed), method, progress)
        if run["task_loss"] is None:
            raise ValueError(f"{method.title} diverged at learning rate {run['rate']:g}; give a lower one with --lr")
        models = models or [trained]
        found.append(run | {"seed": seed, "score": questions and questions.asked_of(trained)})
    row = {
        "method": key, "title": method.title, "learning_rate": run["rate"], "scored": questions and questions.name,
        **{name: found[0][name] for name in ("trainable", "parameters", "storage", "curve", "held_out_curve")},
        **measured(method, base, models[0], tasks[settings.seed], settings.batch_size),
        **{name: None if found[0][name] is None else statistics.mean(run[name] for run in found) for name in VARYING},
        "seeds": [{name: run[name] for name in ("seed", *VARYING)} for run in found],
    }  # fmt: skip
    return row, models[0]


def measured(method: Method | None, base: Any, model: Any, task: Any, batch_size: int) -> dict[str, Any]:
    """What a step of the method on the base takes of memory, and a token of the trained model of time."""
    costs = mp.experiments.costs
    predicted, peak = costs.memory(method, base, task.train, batch_size, task.pad_token_id)
    plain, seconds = costs.merged(model), costs.latency(model, **TOKENS)
    merged = seconds if plain is model else None if plain is None else costs.latency(plain, **TOKENS)
    return {"memory_predicted": predicted, "memory_measured": peak, "latency": seconds, "latency_merged": merged}


COLUMNS = {
    "trainable": "\ntrainable", "predicted": "memory\npredicted", "measured": "\nmeasured",
    "step": "\ns/step", "task_loss": "task\nloss", "general_loss": "general\nloss", "forgotten": "\nchange",
    "storage": "\nstorage",
}  # fmt: skip


def show_table(out: Any, rows: list[dict[str, Any]]) -> None:
    """One line a method; the best of a column is bold. Fits into 80 columns."""
    from rich.text import Text

    scored = {"right, %": "right\n%", "chrF": "\nchrF"}.get(rows[0]["scored"])
    columns = {"score": scored} | COLUMNS if scored else COLUMNS
    table = grid("\nmethod", *columns.values(), gap=1)
    for row in rows:
        found = [cells(row, rows)[key] for key in columns]
        table.add_row(row["title"], *(Text(cell.text, "bold" if cell.best else "") for cell in found))
    out.print("", table, "", sep="\n")
