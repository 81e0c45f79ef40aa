"""Output directories: one process at a time, no input is ever written to, and old files go when the new ones stand."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from cli_helpers import jsonl, output, refused, run, same_bytes, tiny, weights

import minipeft as mp
from minipeft.directory import LOCK, READY, DirectoryInUse, keep_apart, locked, publish, replacing
from minipeft.files import FileError
from minipeft.peft.targets import PeftError

QUICK = ("--steps", 2, "--batch-size", 2, "--save-steps", 1)
HEX = "0123456789abcdef" * 2


def content(directory):
    """{path: bytes} of all files below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a directory `model`, links to it and to its file, and a directory `o` with two files."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("weights")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(tmp_path / "model" / "model.safetensors")
    (tmp_path / "o").mkdir()
    for name in ("data.jsonl", "metrics.jsonl"):
        (tmp_path / "o" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "written, read, how",
    [
        ("model", "model", "is"),
        ("link", "model", "is"),
        ("model", "link", "is"),
        ("o/../model/.", "model", "is"),
        ("model/new", "model", "lies in"),
        ("link/deep/new", "model", "lies in"),
        (".", "model", "holds"),
        ("model", "linked", "holds"),  # the file that the link points to
        ("o", "o/metrics.jsonl", "holds"),
        ("o/data.jsonl", "o/data.jsonl", "is"),
        ("model/scores.json", "model", "lies in"),
    ],
)
def test_what_is_read_is_not_written_to(place, written, read, how):
    message = f"--output {written} {how} --model {read}, which is read: choose another path"
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        keep_apart(written, [("--model", read)], "--output")


def test_other_files_may_be_in_an_output_directory(place):
    keep_apart("o", [("--data", "o/data.jsonl"), ("--model", "nowhere"), ("--validation", "0.1"), ("", "")], "--output")
    keep_apart("new/deep", [("--model", "model"), ("--data", "o/data.jsonl")], "--output")


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A model, an adapter of it, a reward model, and data."""
    root = tmp_path_factory.mktemp("given")
    tiny(root / "M", num_hidden_layers=1)
    jsonl(root / "d.jsonl", ({"prompt": f"Q: {i}\nA:", "completion": f" {i}"} for i in range(8)))
    jsonl(root / "p.jsonl", ({"prompt": f"Q: {i}\nA:", "chosen": f" {i}", "rejected": " no"} for i in range(8)))
    (root / "mine.py").write_text("def metric(answer, expected):\n    return 1\n")
    options = ("--model", root / "M", *QUICK)
    assert run("finetune", *options, "--data", root / "d.jsonl", "--method", "lora", "--output", root / "A") == 0
    assert run("reward", *options, "--data", root / "p.jsonl", "--output", root / "J") == 0
    shutil.copy(root / "d.jsonl", root / "rows.jsonl")
    return root


@pytest.fixture
def given(ready, tmp_path, monkeypatch, methods_as_before):
    """A copy of that, the working directory."""
    shutil.copytree(ready, tmp_path / "given")
    monkeypatch.chdir(tmp_path / "given")
    config = json.loads((tmp_path / "given" / "A" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "given" / "M")
    (tmp_path / "given" / "A" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "given"


@pytest.mark.parametrize(
    "command",
    [
        "finetune --data d.jsonl --model M --output M --overwrite",
        "finetune --data d.jsonl --model M --output ./A/../M --overwrite",
        "finetune --data d.jsonl --model M --output M/tuned",
        "finetune --data d.jsonl --model M --output . --overwrite",
        "finetune --data d.jsonl --model M --adapter-config A --output A --overwrite",
        "finetune --data A/metrics.jsonl --model M --output A --overwrite",
        "finetune --data d.jsonl --validation A/metrics.jsonl --model M --output A --resume",
        "sft --data d.jsonl --model M --output M --overwrite",
        "reward --data p.jsonl --model M --output M --overwrite",
        "reward --data p.jsonl --adapter A --output A --overwrite",
        "dpo --data p.jsonl --model M --output M --overwrite",
        "dpo --data p.jsonl --adapter A --output A --overwrite",
        "dpo --data p.jsonl --adapter A --output A --resume",
        "dpo --data p.jsonl --adapter A --output M --overwrite",  # its base
        "ppo --model M --reward J --output J --overwrite",
        "ppo --model M --prompts A/metrics.jsonl --output A --overwrite",
        "merge --adapter A --output A",
        "merge --adapter A --output M/merged",
        "sweep --data d.jsonl --model M --output M",
        "sweep --data rows.jsonl --model M --output .",
        "compare --data d.jsonl --model M --output M",
        "compare --data d.jsonl --model M --report M",
        "evaluate --data d.jsonl --model M --json d.jsonl",
        "evaluate --data d.jsonl --model M --json M/config.json",
        "evaluate --data d.jsonl --adapter A --json M/config.json",
        "evaluate --data d.jsonl --model M --metric mine:metric --json mine.py",
    ],
)
def test_no_command_writes_to_what_it_reads(command, given, capsys):
    before = content(given)
    assert "which is read: choose another path" in refused(capsys, *command.split())
    assert content(given) == before


def test_the_shipped_base_is_read_where_no_model_is_given(given, capsys, monkeypatch):
    monkeypatch.setattr("minipeft.hub.base.BASE", given / "M")
    assert "is the shipped base" in refused(capsys, *"finetune --data d.jsonl --output M --overwrite".split())


# --------------------------------------------------------------------------------------------------------- overwrite

TUNE = ("finetune", "--data", "d.jsonl", "--model", "M", "--output", "O", *QUICK)


def interrupt(monkeypatch, at):
    """A KeyboardInterrupt in step number `at` of a trainer."""
    step = mp.Trainer._step

    def interrupted(self, number):
        if number == at:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(mp.Trainer, "_step", interrupted)


@pytest.mark.parametrize("at", [1, 2])
def test_an_earlier_run_stands_until_the_one_that_replaces_it_has_ended(at, given, capsys, monkeypatch):
    assert run(*TUNE) == 0
    (given / "O" / "notes.txt").write_text("mine")
    before, again = content(given / "O"), (*TUNE, "--seed", 3)
    with monkeypatch.context() as patch:
        interrupt(patch, at)
        assert run(*again, "--overwrite") == 130
    err = capsys.readouterr().err.splitlines()
    hint = "the same command with --resume in place of --overwrite goes on from the last checkpoint"
    assert err[-1] == f"minipeft: interrupted{f'; {hint}' if at == 2 else ''}"
    found = content(given / "O")
    assert {name: data for name, data in found.items() if not name.startswith(".minipeft-new/")} == before
    assert (found == before) == (at == 1), "nothing stays of a run that has no checkpoint"
    assert run(*again, "--resume" if at == 2 else "--overwrite") == 0
    assert run(*(given / "fresh" if word == "O" else word for word in again)) == 0
    assert same_bytes("model.safetensors", given / "O", given / "fresh")
    assert content(given / "O").keys() == content(given / "fresh").keys() | {"notes.txt"}


def test_a_run_that_diverges_replaces_nothing(given, capsys):
    assert run(*TUNE) == 0
    before = content(given / "O")
    options = ("--optimizer", "sgd", "--lr", "1e30", "--max-grad-norm", 0, "--steps", 6, "--save-steps", 6)
    status, _, err = output(capsys, *TUNE, *options, "--overwrite")
    assert status == 2 and "diverged" in err and content(given / "O") == before


def test_what_is_no_checkpoint_of_ours_is_not_deleted(given, capsys):
    for foreign in ("checkpoint-1", "checkpoint-2"):
        (given / "O" / foreign).mkdir(parents=True)
        (given / "O" / foreign / "state.json").write_text('{"epoch": 3}')
    assert "O/checkpoint-1 is in the way: it is no checkpoint of an earlier run" in refused(capsys, *TUNE, "--overwrite")
    shutil.move(given / "O" / "checkpoint-2", given / "O" / "kept")
    shutil.move(given / "O" / "checkpoint-1", given / "elsewhere")
    assert run(*TUNE, "--overwrite") == 0 and (given / "O" / "kept").is_dir()


# -------------------------------------------------------------------------------------------------------------- locks


def holding(directory, code="input()"):
    """A process that holds a directory."""
    code = f"import os, time\nfrom minipeft.directory import locked\nwith locked({str(directory)!r}):\n    {code}"
    code = code.replace("input()", "print(0, flush=True); input()")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return process, int(process.stdout.readline())


def ended(process):
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_by_name_and_a_kill_opens_the_directory(given, capsys):
    assert run(*TUNE) == 0
    process, _ = holding(given / "O")
    before = content(given / "O")
    message = f"O: the process {process.pid} writes there; wait for its end, or choose another directory"
    for command in (
        (*TUNE, "--overwrite"), (*TUNE, "--resume"), (*TUNE, "--output", "O/checkpoint-3/new"),
        ("sweep", "--data", "d.jsonl", "--model", "M", "--output", "O"),
        ("evaluate", "--data", "d.jsonl", "--model", "M", "--json", "O/metrics.jsonl"),
        ("memory", "M", "--seq", 8, "--timeline", "O/finetune.json"), ("claims", "soft-7", "--picture", "O/loss.png"),
    ):  # fmt: skip
        assert message in refused(capsys, *command)
    for save in (mp.load_base()[1].save, lambda path: mp.save_pretrained(mp.load_base()[0], path)):
        with pytest.raises(DirectoryInUse, match=str(process.pid)):
            save(given / "O")
    assert content(given / "O") == before
    ended(process)
    assert (given / "O" / LOCK).exists(), "nobody has removed it, and it is in nobody's way"
    assert run(*TUNE, "--overwrite") == 0 and not (given / "O" / LOCK).exists()


def test_of_two_processes_at_once_one_works_and_one_is_told(given):
    argv = [sys.executable, "-m", "minipeft", *map(str, TUNE)]
    environment = {**os.environ, "MINIPEFT_THREADS": "1"}
    both = [subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment) for _ in range(2)]
    errors = [process.communicate()[1].decode() for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    (error,) = (text for process, text in zip(both, errors) if process.returncode)
    assert error.count("minipeft: error: ") == 1 and ("writes there" in error or "is not empty" in error)
    lines = (given / "O" / "metrics.jsonl").read_text().splitlines()
    assert [record["step"] for record in map(json.loads, lines) if "loss" in record] == [1, 2]


def test_a_fork_does_not_keep_the_lock_of_its_parent(tmp_path):
    fork = "os.fork() or print(os.getpid(), flush=True); time.sleep(60)"  # the child says that it is there
    process, child = holding(tmp_path, fork)
    with pytest.raises(DirectoryInUse), locked(tmp_path):
        pass
    ended_by = [process.kill(), process.wait()]
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()
    assert ended_by[1] == -signal.SIGKILL


def test_a_thread_may_hold_a_directory_twice_and_two_threads_may_not(tmp_path):
    refusals = []

    def other():
        try:
            with locked(tmp_path / "new" / "deep"):
                pass
        except DirectoryInUse as error:
            refusals.append(error)

    with locked(tmp_path / "new" / "deep"):
        with locked(tmp_path / "new" / ".." / "new" / "deep"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert str(os.getpid()) in str(refusals[0])
    assert not (tmp_path / "new").exists(), "it was made, and nothing was written"


def test_a_place_that_takes_no_file_is_said_and_not_tried_forever(tmp_path, monkeypatch):
    """As /proc, which answers that there is no such file."""
    answers = iter([FileNotFoundError(2, "No such file or directory")] * 1000)

    def refuse(*_, **__):
        raise next(answers)

    monkeypatch.setattr(mp.directory, "open", refuse, raising=False)
    with pytest.raises(OSError, match=f"^{tmp_path}: no file can be made in this directory; choose another$"), locked(tmp_path):
        pass


# --------------------------------------------------------------------------------------------------------- leftovers


def test_the_next_run_removes_what_a_killed_one_left_and_nothing_else(given):
    (given / "O").mkdir()
    for name in (f".model.safetensors.{HEX}.tmp", f".01_a.ipynb.{HEX}.tmp", f".checkpoint-3.{HEX}.tmp/optimizer.safetensors", f".replacing.{HEX}.tmp/x",
                 f".finetune.json.{HEX}.tmp", LOCK):  # fmt: skip
        (given / "O" / name).parent.mkdir(exist_ok=True)
        (given / "O" / name).write_text("half")
    foreign = (f".mine.{HEX}.tmp", ".model.safetensors.tmp", f"model.safetensors.{HEX}.tmp", ".checkpoint-mine.tmp")
    for name in foreign:
        (given / "O" / name).write_text("mine")
    assert run(*TUNE, "--overwrite") == 0
    assert {name for name in os.listdir(given / "O") if name.startswith(".") or name.endswith("tmp")} == {*foreign}


@pytest.mark.parametrize(
    "command",
    [
        "evaluate --data d.jsonl --model M --limit 1 --loss-only --json scores.json",
        "memory M --seq 8 --timeline step.json",
        "claims soft-7 --picture soft.png",
    ],
)
def test_a_single_file_has_no_leftovers_either(command, given):
    *argv, file = command.split()
    (given / f".{file}.{HEX}.tmp").write_text("half")
    (given / f".others.json.{HEX}.tmp").write_text("mine")
    names = {*os.listdir(given), file} - {f".{file}.{HEX}.tmp"}
    assert run(*argv, file) == 0 and {*os.listdir(given)} == names


# ------------------------------------------------------------------------------------------------------- replacement


def test_a_block_that_raises_has_changed_nothing(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path) as fresh:
        (fresh / "a.json").write_text("new")
        1 / 0  # noqa: B018
    assert content(tmp_path) == {"a.json": b"old"}


def test_a_foreign_directory_is_not_replaced(tmp_path):
    for place in ("d", "fresh/d"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "file").write_text(place)
    with pytest.raises(OSError), locked(tmp_path):
        publish(tmp_path / "fresh", tmp_path)
    assert (tmp_path / "d" / "file").read_text() == "d"
    shutil.move(tmp_path / "d", tmp_path / "moved")
    with locked(tmp_path):
        pass
    assert content(tmp_path) == {"d/file": b"fresh/d", "moved/file": b"d"}


def test_a_directory_of_somebody_else_reaches_nothing_outside(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "theirs" / READY).mkdir(parents=True)
    for name in ("../mine", str(tmp_path / "mine"), "..", ""):
        (tmp_path / "theirs" / READY / ".plan.json").write_text(json.dumps({"old": [name], "new": []}))
        with pytest.raises(FileError, match="is not the name of a file in"), locked(tmp_path / "theirs"):
            pass
    shutil.rmtree(tmp_path / "theirs" / READY)
    (tmp_path / "theirs" / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError), locked(tmp_path / "theirs"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_a_replacement_that_is_interrupted_is_finished(given, monkeypatch, interruption):
    replace, calls = os.replace, []

    def failing(source, target):
        if os.path.dirname(source) == str(given / "M" / READY):
            calls.append(target)
            if len(calls) == 2:
                raise interruption
        return replace(source, target)

    tuned, tokenizer = mp.from_pretrained(given / "M")
    tuned.model.norm.weight.data = tuned.model.norm.weight.data + 1
    with monkeypatch.context() as patch, pytest.raises(interruption):
        patch.setattr(os, "replace", failing)
        mp.save_pretrained(tuned, given / "M", tokenizer)
    if interruption is OSError:  # as a kill
        with pytest.raises(ValueError, match=rf"a replacement was interrupted: the new files are in {READY}"):
            mp.from_pretrained(given / "M")
        with locked(given / "M"):
            pass
    assert not (given / "M" / READY).exists()
    assert (weights(given / "M")["model.norm.weight"] == tuned.model.norm.weight.numpy()).all()


def test_options_that_a_file_cannot_hold_are_said_before_anything_is_written(given):
    base, _ = mp.from_pretrained("M")
    adapted = mp.get_peft_model(base, mp.LoraConfig(r=2, target_modules="all-linear"))
    before = content(given)
    adapted.peft_config["default"].lora_alpha = math.nan
    for directory in ("A", "new"):
        with pytest.raises(PeftError, match="lora_alpha is nan, which a file cannot hold"):
            adapted.save_pretrained(directory)
    assert content(given) == before and not (given / "new").exists()


def test_an_adapter_of_a_base_whose_path_is_not_utf8_is_saved_and_read(given):
    shutil.move("M", name := os.fsdecode(b"M\xff"))
    base, _ = mp.from_pretrained(name)
    mp.get_peft_model(base, mp.LoraConfig(r=2, target_modules="all-linear")).save_pretrained("new")
    (given / "new" / "adapter_config.json").read_text(encoding="utf-8")
    assert mp.PeftModel.from_pretrained(base, "new").peft_config["default"].base_model_name_or_path == name
    assert run("evaluate", "--data", "d.jsonl", "--adapter", "new", "--limit", 1, "--loss-only") == 0


def test_killed_at_any_operation_nothing_is_lost():
    """The short form of `python tests/kills.py`, which kills every command at each of its operations."""
    options = ("finetune-again", "PeftModel.save_pretrained", "--every", "37", "--first", "5")
    kills = os.path.join(os.path.dirname(__file__), "kills.py")
    done = subprocess.run([sys.executable, kills, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("all ok") == 2, done.stdout + done.stderr


def test_a_directory_that_is_refused_is_said_to_be_half_replaced(tmp_path):
    (tmp_path / READY).mkdir()
    with pytest.raises(FileError, match="no such file; a replacement was interrupted"):
        mp.PeftModel.from_pretrained(mp.load_base()[0], tmp_path)
