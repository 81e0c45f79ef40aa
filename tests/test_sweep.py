"""A sweep loses nothing: kills, errors, dead processes and stale rows; and tables say what the rows say."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import minipeft as mp
from minipeft.evaluation.intervals import student_t
from minipeft.executors import ExecutorLost
from minipeft.experiments import interval, means, plot, read_rows, table
from minipeft.experiments.rows import add_row, complete, described, qualname, source_digest
from minipeft.experiments.sweep import main
from minipeft.files import FileError

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Square:
    x: int
    seed: int = 0


RUNS = [Square(x, seed) for seed in (0, 1) for x in (1, 2, 3)]
GRID = mp.grid(x=[1, 2, 3], seed=range(2))


def square(settings):
    return {"y": settings.x**2}


OF_SQUARE = {"qualname": "test_sweep.square", "minipeft": mp.__version__, "source_digest": source_digest(square)}


def where(x, seed):
    """A run that says where it was computed, and with how many threads."""
    blas = {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}
    assert blas == {mp.backend.get_num_threads()}, "products of matrices have as many"
    return {"y": x**2, "pid": os.getpid(), "threads": mp.backend.get_num_threads()}


def deadly(x, seed, directory, times):
    """A run that kills its own process at x = 2, the first `times` times."""
    counter = Path(directory) / f"{seed}"
    if x == 2 and len(tried := counter.read_text() if counter.exists() else "") < times:
        counter.write_text(tried + "x")
        os.kill(os.getpid(), signal.SIGKILL)
    return {"y": x**2}


LOCK = threading.Lock()


def quietly(*arguments, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = mp.sweep(*arguments, **{"show": lambda line: None, **options})
    return rows, [str(w.message) for w in caught]


# ---------------------------------------------------------------------------------------------------------- the store


def test_a_grid_is_a_list_of_all_combinations():
    assert mp.grid(r=[4, 8], seed=range(2)) == [{"r": r, "seed": s} for r in (4, 8) for s in (0, 1)]
    assert mp.grid(method="lora", lr=np.array([1e-3])) == [{"method": "lora", "lr": 1e-3}]
    with pytest.raises(ValueError, match="axis 'lr' of the grid has no values"):
        mp.grid(lr=[])
    with pytest.raises(ValueError, match=r"a list of settings.*mp\.grid"):
        mp.sweep(where, {"x": [1]})


def test_a_sweep_that_is_interrupted_goes_on_where_it_was(tmp_path):
    path, done = tmp_path / "rows.jsonl", []

    def run(settings):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(settings)
        return {"y": settings.x**2}

    with pytest.raises(KeyboardInterrupt):
        mp.sweep(run, RUNS, 1, path)
    assert [row["x"] for row in read_rows(path)] == [1, 2, 3, 1]
    done[:] = [0, 0]
    rows = mp.sweep(run, RUNS, 1, path)
    of = {"qualname": qualname(run), "minipeft": mp.__version__, "source_digest": source_digest(run)}
    assert rows == read_rows(path) == [{**described(s), **of, "y": s.x**2} for s in RUNS]
    done[:] = range(4)
    assert mp.sweep(run, RUNS[::-1], 1, path) == rows[::-1], "nothing is computed twice"
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_store_has_room_before_anything_is_computed(tmp_path, monkeypatch):
    rows = mp.sweep(lambda x, seed: {"y": x}, GRID, 1, tmp_path / "new" / "deep" / "rows.jsonl", "1")
    assert read_rows(tmp_path / "new" / "deep" / "rows.jsonl") == rows
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        mp.sweep(lambda x, seed: pytest.fail("computed"), GRID, 1, tmp_path / "file" / "rows.jsonl", "1")
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    with pytest.raises(PermissionError, match="it is not writable"):
        mp.sweep(lambda x, seed: pytest.fail("computed"), GRID, 1, tmp_path / "rows.jsonl", "1")


def test_what_stands_in_the_store_stays_byte_for_byte(tmp_path):
    path, old = tmp_path / "rows.jsonl", '{"run":"Square", "x": 1.0, "seed": 0, "y": 1, "name": "\u00e9"}'
    path.write_text(old, encoding="utf-8")  # without a newline at the end, too
    mp.sweep(square, RUNS[:2], 1, path)
    new = json.dumps({**described(RUNS[1]), **OF_SQUARE, "y": 4})
    assert path.read_text(encoding="utf-8").splitlines() == [old, new]


def test_rows_of_another_function_are_not_used(tmp_path):
    path, said = tmp_path / "rows.jsonl", []

    def cube(settings):
        return {"y": settings.x**3}

    for run, y in ((square, [1, 4, 9]), (cube, [1, 8, 27]), (square, [1, 4, 9])):
        assert [row["y"] for row in mp.sweep(run, RUNS[:3], 1, path, show=said.append)] == y
    assert len(read_rows(path)) == 6 and said[-1] == "3 of 3 rows are in the store"
    mp.sweep(cube, RUNS[:5], 1, path, show=said.append)
    assert said[-3] == "3 of 5 rows are in the store" and said[-1].startswith("2 of 2 runs")
    assert {row["qualname"] for row in read_rows(path)} == {"test_sweep.square", f"test_sweep.{cube.__qualname__}"}
    with pytest.raises(ValueError, match=r"a lambda has no name .* give version="):
        mp.sweep(lambda s: {"y": 0}, RUNS, 1, path)
    assert mp.sweep(lambda s: {"y": 0}, RUNS[:1], 1, path, "2")[0]["y"] == 0
    assert mp.sweep(lambda s: {"y": 1}, RUNS[:1], 1)[0]["y"] == 1, "without a store it may be"


def test_a_line_that_was_cut_off_is_no_row_and_gives_way_to_the_next(tmp_path):
    path, whole = tmp_path / "rows.jsonl", json.dumps({**described(RUNS[0]), "y": 1}) + "\n"
    for cut in (1, 9, len(whole) - 2):
        path.write_text(whole + whole[:cut])
        assert len(read_rows(path)) == 1
        mp.sweep(square, RUNS[:2], 1, path)
        new = json.dumps({**described(RUNS[1]), **OF_SQUARE, "y": 4})
        assert path.read_text().splitlines() == [whole.strip(), new]
    path.write_text(whole + "my notes")  # not the beginning of a row: it is not to be taken out
    with pytest.raises(FileError, match="line 2: not valid JSON"):
        mp.sweep(square, RUNS[:2], 1, path)
    assert path.read_text() == whole + "my notes"


def test_two_processes_that_write_to_one_store_lose_no_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    write = "import sys; from minipeft.experiments.rows import add_row\n"
    write += "for i in range(100): add_row(sys.argv[1], {'run': 'f', 'of': sys.argv[2], 'i': i, 'text': 'x' * 9000})"
    both = [subprocess.Popen([sys.executable, "-c", write, path, name], cwd=ROOT) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    rows = read_rows(path)
    for name in "ab":
        assert [row["i"] for row in rows if row["of"] == name] == list(range(100))


def test_a_run_that_fails_is_a_row_and_is_tried_again(tmp_path, monkeypatch):
    path, broken, package = tmp_path / "rows.jsonl", True, mp.__version__

    def run(x, seed):
        if broken and x == 2:
            raise ArithmeticError("no squares today")
        return {"y": x**2}

    rows, said = quietly(run, GRID, 1, path)
    assert [row.get("y") for row in rows] == [1, 1, None, None, 9, 9]
    assert rows[2]["error"] == "ArithmeticError: no squares today"
    assert 'raise ArithmeticError("no squares today")' in rows[2]["traceback"]
    assert len(said) == 1 and "2 of 6 runs failed, the first with ArithmeticError: no squares today" in said[0]
    monkeypatch.setattr(mp, "__version__", "9")  # which goes on with the rows of another
    quietly(run, GRID, 1, path)  # fails again
    assert len(read_rows(path)) == 6
    broken = False
    rows, said = quietly(run, GRID, 1, path)
    assert [row["y"] for row in rows] == [1, 1, 4, 4, 9, 9] and not said
    assert [row["minipeft"] for row in rows] == [package, package, "9", "9", package, package]
    assert sorted(read_rows(path), key=str) == sorted(rows, key=str), "failures that were made good are not read"
    assert len(path.read_text().splitlines()) == 4 + 2 + 2 + 2, "and nothing has been deleted"


def test_numpy_values_and_nan_are_accepted_and_read_back(tmp_path):
    def run(lr):
        found = {"loss": np.float32(0.5), "n": np.int64(3), "good": np.bool_(True), "curve": np.arange(2)}
        return found | {"nan": math.nan, "most": [np.inf, -np.inf], "none": None}

    grid = mp.grid(lr=np.logspace(-3, -2, 2))
    rows = mp.sweep(run, grid, 1, tmp_path / "rows.jsonl")
    (first, _) = read_rows(tmp_path / "rows.jsonl")
    assert (first["loss"], first["n"], first["good"], first["curve"]) == (0.5, 3, True, [0, 1])
    assert math.isnan(first["nan"]) and first["most"] == [math.inf, -math.inf] and first["none"] is None
    assert repr(first) == repr(rows[0]), "what is returned is what is read"
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert repr(mp.sweep(run, grid, 1, tmp_path / "rows.jsonl")) == repr(rows)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2, "nothing is computed twice"


def test_settings_are_known_by_all_their_names(tmp_path):
    """A grid without an axis is another one: its rows are not those of the larger grid."""
    path = tmp_path / "rows.jsonl"
    mp.sweep(lambda x, lr: {"y": x + lr}, mp.grid(x=[1, 2], lr=[5]), 1, path, "1")
    assert [row["y"] for row in mp.sweep(lambda x: {"y": x}, mp.grid(x=[1, 2]), 1, path, "1")] == [1, 2]
    assert mp.sweep(lambda lr, x: 1 / 0, mp.grid(lr=[5.0], x=[1]), 1, path, "1")[0]["y"] == 6, "in any order"
    nan = mp.grid(x=[math.nan, (1, 2)])
    mp.sweep(lambda x: {"y": str(x)}, nan, 1, path, "1")
    assert [row["y"] for row in mp.sweep(lambda x: 1 / 0, nan, 1, path, "1")] == ["nan", "(1, 2)"]
    kinds = mp.grid(x=[True, 1, 0, False, [], {}])
    assert [row["y"] for row in mp.sweep(lambda x: {"y": repr(x)}, kinds, 1, path, "2")] == ["True", "1", "0", "False", "[]", "{}"]


def edited(directory, text):
    """A function of a file that has just been edited."""
    (directory / "mine.py").write_text(text)
    exec(compile(text, directory / "mine.py", "exec"), space := {"__name__": "mine"})
    return space["run"]


@pytest.mark.parametrize("of", [lambda x: {"x": x}, Square])
def test_rows_from_before_the_function_was_edited_are_used_with_a_warning(tmp_path, of):
    path, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    before = "def run(*s, **k):\n    return {'y': 1}\n"
    quietly(edited(tmp_path, before), [of(1), of(2)], 1, path)
    assert quietly(edited(tmp_path, f"import os\n\n{before}"), [of(1)], 1, path)[1] == [], "what is around it may change"
    run = edited(tmp_path, before.replace("1", "2"))
    rows, said = quietly(run, [of(1), of(2), of(3)], 1, path)
    assert [row["y"] for row in rows] == [1, 1, 2]
    assert said == [f"2 of the 3 rows are of mine.run before it was edited, and are read from {path}: to compute them anew, "
                    "give another store, or version="]  # fmt: skip
    for anew, version in ((path, "2"), (other, None)):
        for _ in range(2):
            rows, said = quietly(run, [of(1)], 1, anew, version)
            assert rows[0]["y"] == 2 and not said and ("source_digest" in rows[0]) == (version is None)
    for row in read_rows(other):
        add_row(other, row | {"source_digest": "0"})
    assert len(read_rows(other)) == 1, "no part of what identifies a row"


def test_a_row_without_a_digest_or_a_function_without_a_source_gives_no_warning(tmp_path):
    path = tmp_path / "rows.jsonl"
    add_row(path, {**described(RUNS[0]), "y": 1})
    assert quietly(square, RUNS[:1], 1, path)[1] == []
    exec("def run(x):\n    return {'y': x}", space := {"__name__": "typed"})
    assert source_digest(space["run"]) is source_digest(len) is None
    add_row(path, {**described({"x": 1}, space["run"]), "source_digest": "0", "y": 1})
    rows, said = quietly(space["run"], mp.grid(x=[1, 2]), 1, path)
    assert [row["y"] for row in rows] == [1, 2] and not said and "source_digest" not in rows[1]


def test_what_a_partial_has_bound_is_in_no_row(tmp_path):
    """So its rows are not those of another: it needs a version, or settings."""
    path, grid = tmp_path / "rows.jsonl", mp.grid(x=[1])

    def run(x, times):
        return {"y": x * times}

    bound = [partial(run, times=times) for times in (1, 100)]
    with pytest.raises(ValueError, match="do not say what a partial has bound"):
        mp.sweep(bound[0], grid, 1, path)
    assert [mp.sweep(run, grid, 1, path, str(i))[0]["y"] for i, run in enumerate(bound)] == [1, 100]
    assert mp.sweep(bound[1], grid, 1)[0]["y"] == 100


def test_rows_of_another_version_are_not_used_and_not_deleted(tmp_path):
    path = tmp_path / "rows.jsonl"

    def run(x, seed):
        return {"y": version}

    for version in (None, "1", "2"):
        rows = mp.sweep(run, GRID, 1, path, version)
        assert {row["y"] for row in rows} == {version}
    assert len(read_rows(path)) == 18
    assert {row["y"] for row in mp.sweep(run, GRID, 1, path, "1")} == {"1"}


@pytest.mark.parametrize(
    "run, grid, error, message",
    [
        (where, [{"run": 1}], ValueError, "cannot be called 'run'"),
        (where, [{"error": 1}], ValueError, "cannot be called 'error'"),
        (where, [{"x": where}], TypeError, "x is <function where"),
        (where, mp.grid(x=[np.ones(2), np.zeros(2)], seed=0), TypeError, r"the setting 'x' is an array \[2\]: give"),
        (square, [Square(np.ones(3))], TypeError, r"the setting 'x' is an array \[3\]"),
        (where, [{"x": 1, "sed": 1}], TypeError, r"where\(x, seed\) cannot be called with .* argument: 'seed'"),
        (lambda x: {"y": x}, [{"x": 1}, {"x": 1, "lr": 1}], TypeError, "unexpected keyword argument 'lr'"),
        ("where", [{"x": 1}], TypeError, "must be a function of the settings, not 'where'"),
        (where, [3], TypeError, "a dictionary or a dataclass, not 3"),
        (lambda x: {"y": LOCK.locked()}, [{"x": 1}, {"x": 2}], TypeError, "cannot be sent to another process"),
    ],
)
def test_what_cannot_be_a_sweep_is_said_before_anything_is_computed(run, grid, error, message):
    with pytest.raises(error, match=message):
        mp.sweep(run, grid, 2)


@pytest.mark.parametrize(
    "found, message",
    [
        (3, "must return a dictionary of what it measured, not 3"),
        ({"x": 7}, "cannot be called 'x', which is 1, its setting: .* 7"),
        ({"run": 7}, "cannot be called 'run', which is a field of every row"),
    ],
)
@pytest.mark.parametrize("executor", [1, 2])
def test_a_run_that_can_be_no_row_stops_the_sweep_at_the_first(tmp_path, executor, found, message):
    def run(x):
        (tmp_path / str(x)).touch()
        if x > 1:
            time.sleep(60)
        return found

    with pytest.raises(TypeError, match=message):
        mp.sweep(run, mp.grid(x=range(1, 5)), executor, tmp_path / "rows.jsonl")
    assert len(list(tmp_path.iterdir())) < 4 and not (tmp_path / "rows.jsonl").exists()


def test_a_run_may_return_its_settings_again():
    (row,) = mp.sweep(lambda x: {"x": np.float64(x), "y": 2}, [{"x": 1}], 1)
    assert row["x"] == 1 and row["y"] == 2


@pytest.mark.parametrize(
    "value, message",
    [
        (mp.nn.Module, "loss is <class"),
        (LOCK.locked, "loss is the method locked itself: call it"),
        (mp.Tensor(np.ones((2, 3))), "loss is a Tensor [2, 3]: .item() has one"),
    ],
)
def test_a_value_that_is_none_of_json_is_a_failed_run(value, message):
    (row,), _ = quietly(lambda x: {"loss": value}, [{"x": 1}], 1)
    assert message in row["error"]


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"run": "Square"}\n{"run": "Squ\n', encoding="utf-8")
    with pytest.raises(FileError, match="line 2: not valid JSON"):
        read_rows(path)
    path.write_text('{"run": "Square"}\n[1]\n', encoding="utf-8")
    with pytest.raises(FileError, match="line 2: not a row"):
        read_rows(path)
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_run_that_was_measured_twice_is_read_once(tmp_path):
    """As where two sweeps that write to one store began before either had its rows."""
    path, old = tmp_path / "rows.jsonl", tmp_path / "old.jsonl"
    rows = mp.sweep(lambda x, seed: {"y": x, "error": seed}, GRID, 1, path, "1")
    for row in rows[:2]:
        add_row(path, row | {"y": 7})
    add_row(path, rows[0] | {"version": "2"})
    assert read_rows(path) == [*rows, rows[0] | {"version": "2"}]
    assert table([row for row in read_rows(path) if row["version"] == "1"], "y").splitlines()[1].split() == ["1", "1", "±", "0", "2"]
    mp.sweep(square, RUNS, 1, old)
    old.write_text(old.read_text() * 2)
    assert len(read_rows(old)) == len(RUNS)


def test_only_whole_seeds_are_complete():
    rows = [{**described(s)} for s in RUNS[:-1]]
    assert complete(rows, RUNS) == (rows[:3], [0])
    assert complete([*rows, described(RUNS[-1])], RUNS)[1] == [0, 1]


# ------------------------------------------------------------------------------------------------------- executors


def test_local_processes_divide_the_threads(threads):
    threads(4)
    for executor, each in ((2, 2), (None, 1)):
        rows = mp.sweep(where, GRID[:4], executor, show=lambda line: None)
        assert [row["y"] for row in rows] == [1, 1, 4, 4]
        assert {row["threads"] for row in rows} == {each} and os.getpid() not in {row["pid"] for row in rows}
    assert mp.backend.get_num_threads() == 4
    assert mp.sweep(where, GRID[:1])[0]["pid"] == os.getpid(), "one run needs no other process"


@pytest.mark.parametrize("times, y", [(1, 4), (9, None)])
def test_a_process_that_dies_takes_no_other_run_with_it_and_is_told_of_once(tmp_path, times, y):
    grid, lines = [{**s, "directory": tmp_path, "times": times} for s in GRID], []
    rows, said = quietly(deadly, grid, 2, tmp_path / "rows.jsonl", show=lines.append)
    assert [line for line in lines if "process died" in line] == [
        "a process died (SIGKILL): its run is tried once more; where memory ran out, use fewer processes"
    ]
    assert [row.get("y") for row in rows] == [1, 1, y, y, 9, 9]
    if y is None:
        assert all("died twice (SIGKILL)" in row["error"] for row in rows[2:4]) and "2 of 6 runs failed" in said[0]


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_any_executor_computes_the_same_rows(pool, threads):
    threads(4)
    options = {"mp_context": get_context("spawn")} if pool is ProcessPoolExecutor else {}
    with pool(2, **options) as executor:
        rows = mp.sweep(where, GRID, executor, show=lambda line: None)
    assert [row["y"] for row in rows] == [1, 1, 4, 4, 9, 9]
    here = pool is ThreadPoolExecutor
    assert {row["threads"] for row in rows} == {4 if here else 2} and (os.getpid() in {r["pid"] for r in rows}) == here


def test_a_broken_pool_is_said_and_the_sweep_can_go_on(tmp_path):
    grid = [{**s, "directory": tmp_path, "times": 1} for s in GRID]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        with pytest.raises(ExecutorLost, match=r"runs are not done.*the same call with a new executor goes on"):
            quietly(deadly, grid, executor, tmp_path / "rows.jsonl")
    assert len(kept := read_rows(tmp_path / "rows.jsonl")) < 6
    rows, _ = quietly(deadly, grid, 2, tmp_path / "rows.jsonl")
    assert [row["y"] for row in rows] == [1, 1, 4, 4, 9, 9] and read_rows(tmp_path / "rows.jsonl")[: len(kept)] == kept


SCRIPT = """
import os, signal, sys, time
import minipeft as mp
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
scale, slow = 10, "--slow" in sys.argv
def run(x):
    print("a run may print")
    if slow: open(f"{x}.pid", "w").write(str(os.getpid())); time.sleep(60)
    return {"y": scale * x}
print([row["y"] for row in mp.sweep(run, mp.grid(x=[1, 2, 3]), 2, "rows.jsonl")])
"""


def script(directory, *arguments):
    """SCRIPT as a process whose main module is no file that could be imported, as in a notebook."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MINIPEFT_THREADS": "2"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-", *arguments]
    process = subprocess.Popen(command, cwd=directory, env=environment, text=True, start_new_session=True, **pipes)
    process.stdin.write(SCRIPT)
    process.stdin.close()
    return process


def test_functions_of_the_main_module_are_sent_by_value(tmp_path):
    with script(tmp_path) as process:
        assert process.stdout.read() == "[10, 20, 30]\n", process.stderr.read()


@pytest.mark.parametrize("module, message", [("nosuch", "cannot import nosuch (Mod"), ("json", "json has no run")])
def test_a_module_that_is_no_sweep_is_refused(module, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep", module, str(tmp_path / "rows.jsonl")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_processes_end_with_their_sweep(tmp_path, how):
    with script(tmp_path, "--slow") as process:
        wait_for(lambda: all((tmp_path / f"{x}.pid").exists() and (tmp_path / f"{x}.pid").read_text() for x in (1, 2)))
        process.send_signal(how)
        process.wait(60)
        pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
        wait_for(lambda: not any(alive(pid) for pid in pids))
    assert len(pids) == 2 and not (tmp_path / "rows.jsonl").exists()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_wrong_executor_is_named():
    for executor, error, message in (
        (0, ValueError, "at least 1, not 0"),
        ("localhost", ValueError, "such as tcp://host:8786, not 'localhost'"),
        (object(), TypeError, r"or have submit\(\)"),
    ):
        with pytest.raises(error, match=message):
            mp.sweep(where, GRID, executor)


# ------------------------------------------------------------------------------------------------------------ tables


def rows_of(losses):
    settings = [dict(zip(("r", "lr", "seed"), values)) for values in losses]
    return [{**described(s, where), "loss": loss} for s, loss in zip(settings, losses.values())]


LOSSES = {(r, lr, seed): 2 + r / 10 + 100 * lr + seed / 100 for r in (8, 4) for lr in (1e-2, 1e-3) for seed in range(3)}


def test_students_t_has_the_published_quantiles():
    for degrees, t in {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216, 30: 2.04227}.items():
        assert student_t(0.95, degrees) == pytest.approx(t, abs=5e-5)
    assert student_t(0.99, 2) == pytest.approx(9.92484, abs=5e-5)
    assert student_t(0.95, 100_001) == pytest.approx(1.959988, abs=1e-6)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.30265 / math.sqrt(3)), abs=1e-5)
    assert interval([1.0])[0] == 1 and math.isnan(interval([1.0])[1]) and math.isnan(interval([1.0, math.nan])[0])


def test_an_interval_holds_the_mean_as_often_as_it_says(rng):
    half = np.array([(abs(m - 5) <= h) for m, h in (interval(5 + rng.normal(size=3)) for _ in range(2000))])
    assert abs(half.mean() - 0.95) < 0.015  # 3 standard deviations


def test_a_table_has_a_line_for_each_setting_with_its_interval():
    rows = rows_of(LOSSES)
    found = means(rows, "loss")
    assert [(m["r"], m["lr"]) for m in found] == [(4, 1e-3), (4, 1e-2), (8, 1e-3), (8, 1e-2)]
    assert found[0]["loss"] == pytest.approx(2.51) and found[0]["loss ±"] == pytest.approx(0.0248, abs=1e-4)
    assert table(rows, "loss").splitlines() == [
        "r  lr     loss           n",
        "4  0.001  2.510 ± 0.025  3",
        "4  0.01   3.410 ± 0.025  3",
        "8  0.001  2.910 ± 0.025  3",
        "8  0.01   3.810 ± 0.025  3",
    ]


def test_failed_and_diverged_runs_are_not_hidden_in_a_mean():
    rows = rows_of(LOSSES)
    rows[0] = {name: v for name, v in rows[0].items() if name != "loss"} | {"error": "ValueError: no", "traceback": ""}
    rows[3]["loss"] = None
    lines = table(rows, "loss", ["r", "lr"]).splitlines()
    assert lines[0].split() == ["r", "lr", "loss", "n", "failed"]
    assert lines[4].split() == ["8", "0.01", "3.815", "±", "0.064", "3", "1"]
    assert lines[3].split() == ["8", "0.001", "nan", "(2", "of", "3)", "3", "0"]


def test_a_mean_over_different_settings_is_refused():
    rows = rows_of(LOSSES)
    with pytest.raises(ValueError, match=r"at {'r': 4} has a seed twice: the runs differ in lr"):
        means(rows, "loss", by="r")
    with pytest.raises(ValueError, match="differ in the version"):
        means([*rows, rows[0] | {"version": "2"}], "loss")
    with pytest.raises(ValueError, match="12 of 12 rows have no 'los'; the first has run, settings, r, lr, seed, loss"):
        means(rows, "los")
    with pytest.raises(ValueError, match="a dataclass: name those"):
        means([described(RUNS[0]) | {"loss": 1}], "loss")
    assert means(rows[:3], "loss", by=())[0]["n"] == 3
    for name in ("n", "failed"):
        with pytest.raises(ValueError, match=f"have a column '{name}' of their own"):
            table([row | {name: 7} for row in rows], ["loss", name], ["r", "lr"])
    with pytest.raises(ValueError, match=r"'loss' of the row {'lr': 0.001, .*} is a list: \[\[1, 2.5\]\]"):
        table([rows[0], rows[-1] | {"loss": [[1, 2.5]]}], "loss")


def test_a_plot_has_a_line_with_a_band_for_each_value(rendered):
    figure = plot(rows_of(LOSSES), "loss", x="lr", by="r")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["r 4", "r 8"] and axes.get_xscale() == "log"
    assert axes.lines[0].get_xydata() == pytest.approx(np.array([[1e-3, 2.51], [1e-2, 3.41]]))
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(2.51 - 0.02484, abs=1e-4)
    assert band[:, 1].max() == pytest.approx(3.41 + 0.02484, abs=1e-4)
    assert figure._repr_png_().startswith(b"\x89PNG"), "what a notebook shows, without pyplot"


def test_settings_that_are_no_numbers_are_places_and_lines_too():
    names = [["q_proj"], ["q_proj", "v_proj"]]
    rows = [{**described({"to": to, "of": to[0], "seed": s}, where), "loss": 1.0 + s} for to in names for s in range(3)]
    (axes,) = plot(rows, "loss", x="to", by="of").axes
    assert {label.get_text() for label in axes.get_xticklabels()} == set(map(str, names))
    assert len(plot(rows, "loss", x="of", by="to").axes[0].lines) == 2


@pytest.mark.parametrize("low", [1e-3, 1e-4])  # 3 * 1e-4 > 3e-4
def test_ticks_are_at_the_values_and_a_lone_point_has_its_interval(low):
    rates = [low, float(f"{3 * low:g}")]
    rows = rows_of({(4, lr, seed): 2 + seed for lr in rates for seed in range(3)})
    (axes,) = plot(rows, "loss", x="lr").axes
    assert axes.get_xscale() == "log" and [label.get_text() for label in axes.get_xticklabels()] == [f"{rate:g}" for rate in rates]
    assert axes.get_xticks().tolist() == rates and not axes.get_xticks(minor=True).size
    (axes,) = plot(rows[:3], "loss", x="lr").axes
    (bar,) = axes.containers[0].lines[2][0].get_segments()
    assert bar[:, 1].tolist() == pytest.approx([3 - 2.4841, 3 + 2.4841], abs=1e-3)
    many = rows_of({(4, lr, 0): 2 for lr in range(1, 31)})
    assert len(plot(many, "loss", x="lr").axes[0].get_xticks()) < 12, "labels that do not meet"


def test_a_point_without_some_of_its_runs_is_hollow():
    rows = rows_of(LOSSES)
    rows[3]["loss"] = None  # of r 8, lr 0.001, seed 0
    (axes,) = plot(rows, "loss", x="lr", by="r").axes
    (hollow,) = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert hollow.get_xydata().tolist() == [[1e-3, pytest.approx(2.915)]], "the mean of the other two"
    assert axes.get_title() == "hollow (or missing): loss is not finite in 1 of 12"
    rows[6] = {name: v for name, v in rows[6].items() if name != "loss"} | {"error": "ValueError: no", "traceback": ""}
    (axes,) = plot(rows, "loss", x="lr", by="r").axes
    assert axes.get_title() == "hollow (or missing): 1 of 12 runs failed, loss is not finite in 1 of 12"
    assert [len(line.get_xdata()) for line in axes.lines if line.get_markerfacecolor() == "white"] == [1, 1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["r 4", "r 8"]


# ------------------------------------------------------------------------------------------------------------- cluster


@pytest.fixture(scope="module")
def cluster():
    """Two workers in processes of their own, over TCP."""
    distributed, dask = pytest.importorskip("distributed"), pytest.importorskip("dask")
    options = {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": ":0"}
    short = {"distributed.comm.timeouts.connect": "2s"}  # a result in a killed worker is asked for so long
    with dask.config.set(short), distributed.LocalCluster(processes=True, **options) as cluster:
        yield cluster


def test_a_dask_cluster_computes_the_runs_of_a_killed_worker_elsewhere(cluster, tmp_path):
    assert cluster.scheduler_address.startswith("tcp://")
    grid = [{**s, "directory": tmp_path, "times": 1} for s in GRID]
    rows, said = quietly(deadly, grid, cluster.scheduler_address, tmp_path / "rows.jsonl")
    assert [row["y"] for row in rows] == [1, 1, 4, 4, 9, 9] and not said
    assert [(tmp_path / seed).read_text() for seed in "01"] == ["x", "x"], "two workers were killed"
    assert sorted(read_rows(tmp_path / "rows.jsonl"), key=str) == sorted(rows, key=str)


def test_a_dask_client_is_an_executor_and_a_run_there_has_one_thread(cluster):
    import distributed

    with distributed.Client(cluster) as client:
        rows = mp.sweep(lambda x, seed: where(x, seed) | {"y": x}, GRID, client, show=lambda line: None)
    assert [row["y"] for row in rows] == [1, 1, 2, 2, 3, 3] and os.getpid() not in {row["pid"] for row in rows}
    assert {row["threads"] for row in rows} == {int(os.environ.get("MINIPEFT_THREADS", 1))}


def test_a_scheduler_that_is_not_there_is_said(monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(distributed, "Client", lambda *a, **k: (_ for _ in ()).throw(OSError("Timed out")))
    with pytest.raises(ExecutorLost, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1"):
        mp.sweep(where, GRID, "tcp://127.0.0.1:1")


def test_rows_of_another_form_are_refused_or_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    for line in (b'{"run": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"run": ' + b"[" * 200 + b"]" * 200 + b"}", b'{"run": "\xff"}'):
        for end in (b"\n", b""):
            path.write_bytes(b'{"run": "a"}\n' + line + end)
            with pytest.raises(FileError, match="line 2: not valid JSON"):
                read_rows(path)
    for settings in ('5', '["rr"]', '[["r"]]', '"r"'):
        path.write_text(f'{{"run": "a", "r": 4, "settings": {settings}}}\n')
        with pytest.raises(FileError, match="line 1: not a row of a sweep"):
            read_rows(path)
    rows = [{"run": "run", "settings": ["r", "seed"], "r": 4, "seed": {"a": [i]}, "loss": float("inf")} for i in (0, 1)]
    with np.errstate(invalid="ignore"):
        assert "inf" in table(rows, "loss", "r"), "a seed may be anything"
    assert complete([{"run": "Settings", "x": 1}], RUNS[:1])[0] == [], "a row without a seed is of none"
