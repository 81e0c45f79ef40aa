"""Kill every command at each of its file operations: nothing that it reads is changed, no old model lost, no end missed.

    PYTHONPATH=. python tests/kills.py                     all of them, some minutes each
    PYTHONPATH=. python tests/kills.py finetune-again ppo --every 10

A case runs a command once, undisturbed, and counts what it does to files: opening one for writing, renaming, removing,
making a directory, fsync. Then it runs it once for each of these operations, in a process of its own, which kills itself
(SIGKILL) right before the operation; before an fsync, the last bytes of the file are cut off, as they may not have been
written yet. After each kill:
    1. what the command reads is, byte for byte, as it was, and so are other files in its directory;
    2. the directory loads as the old model or as the new one; or it is refused with an error of the library, and then
       there was no old one, or the new one is whole, its files that are not yet in place in the directory's READY;
    3. the same command with --resume, or, where there is no checkpoint yet, again, which is killed once more early in its
       work, then ends with the same bytes as the undisturbed run (but for times), and leaves no temporary file.
The exit status is 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"MINIPEFT_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent))

from cli_helpers import jsonl, run, tiny

import minipeft as mp
import minipeft.book.lessons
import minipeft.cli.report
import minipeft.train.metrics
from minipeft.files import READY, FileError
from minipeft.hub.pretrained import HubError
from minipeft.peft.targets import PeftError

REFUSED = (FileError, HubError, PeftError)
WORDS = [("one", "uno"), ("two", "due"), ("three", "tre"), ("four", "quattro"), ("five", "cinque"), ("six", "sei")]
NOT_YET = ("no checkpoint to resume from", "is of a run with other")  # nothing of the new run; or only the old one
TIMES = {"seconds", "tokens_per_second", "seconds_per_step", "latency", "latency_merged", "memory_measured"}
QUICK = ("--steps", 2, "--batch-size", 2, "--save-steps", 1)


# what takes most of the time and writes nothing else
minipeft.train.metrics.png = lambda figure: b"a picture"
minipeft.cli.report.ANSWER = 2
minipeft.book.lessons.execute = lambda path: a_notebook()

def a_notebook() -> Any:
    """Of one cell; it needs the extra book."""
    import nbformat

    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("text", id="a")])


# ----------------------------------------------------------------------------------------------------------- operations

REMOVALS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Counter:
    """Counts the operations inside a directory, and kills this process before number `last`."""

    def __init__(self):
        self.root, self.number, self.last, self._fsync = None, 0, None, os.fsync
        sys.addaudithook(self._see)
        os.fsync = self._see_fsync

    def start(self, root: Path | None, last: int | None = None) -> None:
        self.root, self.number, self.last = root and str(root), 0, last

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if self.root is None or not (event in REMOVALS or (event == "open" and args[2] and args[2] & WRITING)):
            return
        path = args[0] if isinstance(args[0], (str, os.PathLike)) else ""
        if self.root in (name := os.fspath(path)) or not os.path.isabs(name):  # relative: of shutil.rmtree
            self._count()

    def _see_fsync(self, descriptor: int) -> None:
        if self.root is not None:
            self._count(descriptor)
        self._fsync(descriptor)

    def _count(self, descriptor: int | None = None) -> None:
        if self.number == self.last:
            if descriptor is not None and os.path.isfile(path := os.readlink(f"/proc/self/fd/{descriptor}")):
                os.truncate(path, max(0, os.path.getsize(path) - 7))
            os.kill(os.getpid(), signal.SIGKILL)
        self.number += 1


def forked(action: Callable[[], int], counter: Counter, root: Path, last: int | None = None) -> tuple[int, str]:
    """(exit status, or minus the signal; what was printed) of an action in a process of its own."""
    log = root.parent / "log"
    child = os.fork()
    if child == 0:
        status = 99
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            counter.start(root, last)
            status = action()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log.read_text(errors="replace")


# ---------------------------------------------------------------------------------------------------------------- cases


@dataclass
class Case:
    """A command, and what it is to be checked by.

    start     the command
    again     what is tried after a kill, in this order, until one is not refused
    load      the model that a directory holds, as names and arrays; None where the command writes none
    old       makes what is in the directory before
    """

    start: Callable[[], int]
    again: list[Callable[[], int]]
    load: Callable[[Path], dict[str, Any]] | None = None
    old: Callable[[], Any] | None = None


def cases(given: Path, output: Path) -> dict[str, Callable[[], Case]]:
    """All cases by name; what they read is in `given`, and they write into `output`."""
    data, pairs = given / "data.jsonl", given / "pairs.jsonl"
    model, judge, adapter = given / "model", given / "judge", given / "adapter"

    def of_model(path: Path) -> dict[str, Any]:
        found, _ = mp.from_pretrained(path)
        return {**found.state_dict(), "config": found.config}

    def of_adapter(path: Path) -> dict[str, Any]:
        found = mp.PeftModel.from_pretrained(mp.from_pretrained(model)[0], path)
        return {name: p for name, p in found.state_dict().items() if "lora" in name}

    def of_either(path: Path) -> dict[str, Any]:
        return of_model(path) if (path / "config.json").exists() else of_adapter(path)

    def of_judge(path: Path) -> dict[str, Any]:
        found, _ = mp.rlhf.RewardModel.from_pretrained(path)
        return {**found.state_dict(), "calibration": (found.mean, found.std)}

    def command(name: str, *options: Any, load: Any = of_model, over: tuple[Any, ...] | None = None) -> Case:
        """A run that trains; `over`: with --overwrite, over a run with these options."""
        base = partial(run, name, "--model", model, "--output", output, *options)
        if over is None:
            return Case(base, [partial(base, "--resume"), partial(base, "--overwrite")], load)
        old = partial(run, name, "--model", model, "--output", output, *over)
        return Case(partial(base, "--overwrite"), [partial(base, "--resume"), partial(base, "--overwrite")], load, old)

    tune = ("--data", data, *QUICK, "--validation", "0.3")
    prefer = ("--data", pairs, *QUICK)
    ask = ("--prompts", given / "prompts.txt", "--reward", judge, "--steps", 2, "--batch-size", 2, "--mini-batch-size", 2)
    ask += ("--response-length", 4, "--save-steps", 1)

    def merging() -> Case:
        merge = partial(run, "merge", "--adapter", adapter, "--output", output)
        return Case(merge, [merge], of_model)

    def sweeping() -> Case:
        options = ("--data", data, "--model", model, "--lr", 1e-2, "--seeds", 2, "--steps", 2, "--executor", 1)
        sweep = partial(run, "sweep", *options, "--output", output)
        return Case(sweep, [sweep])

    def comparing() -> Case:
        options = ("--data", data, "--model", model, "--methods", "lora", "--steps", 2, "--batch-size", 2)
        compare = partial(run, "compare", *options, "--output", output, "--report", output)
        return Case(compare, [compare], old=compare)

    def filing(name: str, file: str, *options: Any) -> Case:
        """A command that writes one file."""
        write = partial(run, name, *options, output / file)
        return Case(write, [write], old=write)

    def executing() -> Case:
        execute = partial(run, "lessons", 1, "--notebooks", output)
        return Case(execute, [execute])

    def computing() -> Case:
        compute = partial(run, "claims", "--run", "soft-7", "--store", output)
        return Case(compute, [compute])

    def evaluating() -> Case:
        evaluate = partial(run, "evaluate", "--data", data, "--model", model, "--json", output / "scores.json")
        evaluate = partial(evaluate, "--max-new-tokens", 2)
        return Case(evaluate, [evaluate], old=partial(evaluate, "--limit", 1))

    def saving() -> Case:
        def save() -> int:
            tiny(output)
            return 0

        return Case(save, [save], of_model, partial(tiny, output, rope_theta=77.0, initializer_range=0.3))

    def saving_adapter() -> Case:
        def save(rank: int) -> int:
            config = mp.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
            mp.get_peft_model(mp.from_pretrained(model)[0], config).save_pretrained(output)
            return 0

        return Case(partial(save, 2), [partial(save, 2)], of_adapter, partial(save, 4))

    return {
        "finetune": lambda: command("finetune", *tune),
        "finetune-again": lambda: command("finetune", *tune, load=of_either, over=(*tune, "--method", "lora")),
        "finetune-full-again": lambda: command("finetune", *tune, over=(*tune, "--seed", 1)),
        "finetune-lora-again": lambda: command(
            "finetune", *tune, "--method", "lora", load=of_adapter, over=(*tune, "--method", "lora", "-r", 2)
        ),
        "sft": lambda: command("sft", *tune),
        "sft-again": lambda: command("sft", *tune, over=(*tune, "--seed", 1)),
        "reward": lambda: command("reward", *prefer, load=of_judge),
        "reward-again": lambda: command("reward", *prefer, "--seed", 1, load=of_judge, over=prefer),
        "dpo": lambda: command("dpo", *prefer, "--method", "lora", load=of_adapter),
        "dpo-again": lambda: command(
            "dpo", *prefer, "--adapter", adapter, load=of_adapter, over=(*prefer, "--method", "lora")
        ),
        "ppo": lambda: command("ppo", *ask),
        "ppo-again": lambda: command("ppo", *ask, "--algorithm", "grpo", "--generations", 2, over=ask),
        "merge": merging,
        "sweep": sweeping,
        "compare": comparing,
        "evaluate": evaluating,
        "memory": lambda: filing("memory", "step.json", model, "--seq", 8, "--timeline"),
        "claims": lambda: filing("claims", "soft.png", "soft-7", "--picture"),
        "claims-run": computing,
        "lessons": executing,
        "save_pretrained": saving,
        "PeftModel.save_pretrained": saving_adapter,
    }  # fmt: skip


def prepare(given: Path, names: list[str]) -> None:
    """What these cases read."""
    given.mkdir()
    jsonl(given / "data.jsonl", ({"prompt": f"Q: {a}\nA:", "completion": f" {b}"} for a, b in WORDS))
    jsonl(given / "pairs.jsonl", ({"prompt": f"Q: {a}\nA:", "chosen": f" {b}", "rejected": " no"} for a, b in WORDS))
    (given / "prompts.txt").write_text("one\ntwo\nthree\n")
    model = tiny(given / "model", num_hidden_layers=1, hidden_size=8, intermediate_size=16)
    options = ("--model", model, *QUICK)
    if any(name.startswith("ppo") for name in names):
        run("reward", *options, "--data", given / "pairs.jsonl", "--output", given / "judge")
    if {"merge", "dpo-again"} & {*names}:
        run("finetune", *options, "--data", given / "data.jsonl", "--method", "lora", "--output", given / "adapter")


# --------------------------------------------------------------------------------------------------------------- checks


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def timeless(value: Any) -> Any:
    """A JSON value without what is another in each run, as it was measured by the clock."""
    if isinstance(value, dict):
        return {name: timeless(v) for name, v in value.items() if name not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def ending(directory: Path) -> dict[str, Any]:
    """What must be the same at the end of two runs: every file's bytes, but for times and what is drawn of them."""
    found: dict[str, Any] = digests(directory)
    for name in found:
        path = directory / name
        if path.name == "state.json":
            found[name] = None  # it holds the lines of metrics.jsonl
        elif path.suffix in (".json", ".jsonl"):
            lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
            found[name] = [timeless(json.loads(line)) for line in lines]
        elif path.name == "index.html":
            found[name] = None
    return found


def loaded(load: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any] | None:
    """What a directory holds, arrays as their bytes; None where it is refused as it should be."""
    try:
        return {name: value.tobytes() if hasattr(value, "tobytes") else value for name, value in load(path).items()}
    except REFUSED:
        return None


def overlaid(output: Path) -> Path:
    """A copy of a directory with the files of its READY, if it has one, in place."""
    copy = output.with_name("copy")
    shutil.copytree(output, copy)
    if (copy / READY).exists():
        shutil.copytree(copy / READY, copy, dirs_exist_ok=True)
    return copy


def killed_everywhere(name: str, root: Path, counter: Counter, every: int, first: int = 0) -> tuple[int, int, list[str]]:
    """(operations, kills, what went wrong) of a case."""
    given, work, output = root / "given", root / "work", root / "work" / "output"
    case = cases(given, output)[name]()
    foreign = {"notes.txt": "mine", ".model.safetensors.tmp": "mine", "checkpoints/0": "mine"}

    def begin() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        if case.old:
            shutil.copytree(root / "old", output)
        for path, text in foreign.items() if case.old else ():
            (output / path).parent.mkdir(exist_ok=True)
            (output / path).write_text(text)

    def keep(place: str) -> None:
        shutil.rmtree(root / place, ignore_errors=True)
        shutil.move(output, root / place)

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if name in ("evaluate", "memory", "claims"):  # whose directory must be there
        output.mkdir()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # in this process, which then has imported all
        if case.old:
            case.old()
            keep("old")
        begin()
        counter.start(work)
        status = case.start()
        operations = counter.number
        counter.start(None)
    assert status == 0, f"{name}: the undisturbed run ends with status {status}"
    keep("new")
    whole, before = ending(root / "new"), digests(given)
    old = loaded(case.load, root / "old") if case.load and case.old else None
    new = loaded(case.load, root / "new") if case.load else None
    assert not case.load or (new and new != old and bool(old) == bool(case.old)), f"{name}: the models cannot be told apart"
    wrong: list[str] = []
    kills = range(first, operations, every)
    for i in kills:
        begin()

        def check(good: bool, what: str, i: int = i) -> None:
            if not good:
                wrong.append(f"{name}, operation {i}: {what}")

        status, log = forked(case.start, counter, work, i)
        check(status == -signal.SIGKILL, f"ends with {status}: {log[-300:]}")
        check(digests(given) == before, "an input was changed")
        if case.load and output.exists():
            now = loaded(case.load, output)
            if now is None:
                check(not old or loaded(case.load, overlaid(output)) == new, "neither the old nor the new model is whole")
            else:
                check(now in (old, new), "it loads as neither the old nor the new model")
        for last in (i % 12, None):
            for action in case.again:
                status, log = forked(action, counter, work, last)
                if status != 2 or not any(text in log for text in NOT_YET):
                    break
        merged = name == "merge" and status == 2 and "not empty" in log  # the first attempt has put all in its place
        check(status == 0 or merged, f"again ends with {status}: {log[-300:]}")
        found = ending(output)
        check(found == whole, f"another end: {[k for k in found.keys() | whole.keys() if found.get(k) != whole.get(k)]}")
        check(digests(given) == before, "an input was changed by the second attempt")
    return operations, len(kills), wrong


def main() -> int:
    names = list(cases(Path(), Path()))
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"any of {', '.join(names)} (default: all)")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="kill at every K-th operation only")
    parser.add_argument("--first", type=int, default=0, metavar="I", help="of which the first is I (default: 0)")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(names):
        parser.error(f"unknown case {', '.join(unknown)}; there are {', '.join(names)}")
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        root, counter = Path(directory).resolve(), Counter()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            prepare(root / "given", args.cases or names)
        print(f"{'case':28}{'operations':>11}{'kills':>7}{'seconds':>9}")
        for name in args.cases or names:
            began = time.perf_counter()
            operations, kills, wrong = killed_everywhere(name, root, counter, args.every, args.first)
            verdict = f"{len(wrong)} wrong" if wrong else "all ok"
            print(f"{name:28}{operations:11}{kills:7}{time.perf_counter() - began:9.0f}  {verdict}", flush=True)
            for line in wrong:
                print(f"    {line}", flush=True)
            failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
