"""`minipeft sweep` on a tiny model: it goes on, computes what is new, and says which setting is best and how surely."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cli_helpers import jsonl, output, refused, run, tiny

from minipeft.cli.sweep import LOSS, verdict
from minipeft.experiments import read_rows
from minipeft.peft.methods import METHODS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


@pytest.fixture
def data(tmp_path):
    return jsonl(tmp_path / "my.jsonl", [{"prompt": f"{i} ", "completion": f"{i + 1}"} for i in range(30)])


def test_the_same_command_goes_on_and_computes_what_is_new(model, data, tmp_path, capsys, rendered):
    where = tmp_path / "sweep"
    options = ["--data", data, "--model", model, "--steps", 2, "--lr", 1e-3, 1e-1, "--executor", 1, "--output", where]
    status, out, err = output(capsys, "sweep", *options, "-r", 2, "--seeds", 2)
    rows = read_rows(where / "rows.jsonl")
    assert status == 0 and len(rows) == 4 and "4 of 4 runs" in err and "27 examples to learn from, 3 for" in err
    assert {row["trainable"] for row in rows} == {rows[0]["trainable"]} and all(row["r"] == 2 for row in rows)
    means = {lr: sum(row[LOSS] for row in rows if row["lr"] == lr) / 2 for lr in (1e-3, 1e-1)}
    best = min(means, key=means.get)
    assert f"best: lr {best:g}: validation loss {means[best]:.1f}"[:-2] in out and "(95 % over 2 seeds)" in out
    assert out.startswith("\nlr     validation_loss") and (where / "sweep.png").read_bytes().startswith(b"\x89PNG")

    before, picture = (where / "rows.jsonl").read_bytes(), (where / "sweep.png").read_bytes()
    again = output(capsys, "sweep", *options, "-r", 2, "--seeds", 2)
    assert again[:2] == (0, out) and (where / "rows.jsonl").read_bytes() == before, "nothing is computed twice"
    assert (where / "sweep.png").read_bytes() == picture
    assert "2 of 2 runs" in output(capsys, "sweep", *options, "-r", 2, "--seeds", 3)[2]
    data.write_text(data.read_text() + '{"prompt": "a", "completion": "b"}\n')
    assert "4 of 4 runs" in output(capsys, "sweep", *options, "-r", 2, "--seeds", 2)[2], "of other data all is new"
    assert (where / "rows.jsonl").read_bytes().startswith(before), "and nothing is deleted"


def test_a_sweep_of_a_file_whose_fields_are_called_otherwise(model, tmp_path, capsys):
    own = jsonl(tmp_path / "own.jsonl", [{"q": f"{i} ", "a": f"{i + 1}", "id": i} for i in range(30)])
    options = ["--data", own, "--model", model, "--steps", 1, "--lr", 1e-3, "--seeds", 1, "--executor", 1, "--layers", 0]
    columns = ["prompt=q", "completion=a"]
    assert output(capsys, "sweep", *options, "--output", tmp_path / "s", "--columns", *columns)[0] == 0
    (row,) = read_rows(tmp_path / "s" / "rows.jsonl")
    assert row["columns"] == columns and row[LOSS] > 0


def test_options_of_training_are_in_the_rows_where_they_are_given(model, data, tmp_path, capsys):
    options = ["--data", data, "--model", model, "--steps", 4, "--lr", 1e-2, "--seeds", 1, "--executor", 1, "--method", "full"]
    for more in ((), ("--warmup-ratio", 1.0), ("--weight-decay", 0.5)):
        assert output(capsys, "sweep", *options, *more, "--output", tmp_path / "s")[0] == 0
    usual, warm, decayed = read_rows(tmp_path / "s" / "rows.jsonl")
    assert "warmup" not in usual and warm["warmup"] == 1.0 and decayed["weight_decay"] == 0.5
    assert len({row[LOSS] for row in (usual, warm, decayed)}) == 3


def test_the_exit_status_says_that_a_run_failed(model, data, tmp_path, capsys, monkeypatch):
    def fine_tuned(lr, **settings):
        if lr > 0.01:
            raise MemoryError
        return {LOSS: 2.0, "general_loss": 3.0}

    monkeypatch.setattr("minipeft.cli.sweep.fine_tuned", fine_tuned)
    options = ["--data", data, "--model", model, "--lr", 1e-3, 1e-1, "--executor", 1, "--output", tmp_path / "s"]
    status, out, err = output(capsys, "sweep", *options, "--seeds", 1)
    assert status == 1 and "best: lr 0.001" in out and "1 of 2 runs failed, the first with MemoryError" in err


def test_the_default_grid_is_around_the_usual_rate_and_in_other_processes(model, data, tmp_path):
    options = ["--data", data, "--model", model, "--steps", 1, "--seeds", 1, "--executor", 2]
    assert run("sweep", *options, "--output", tmp_path / "s") == 0
    rows = read_rows(tmp_path / "s" / "rows.jsonl")
    usual = METHODS["lora"].learning_rate
    assert sorted(row["lr"] for row in rows) == pytest.approx([usual / 3, usual, usual * 3], rel=0.05)


def test_the_options_of_the_method_are_those_of_the_other_commands(model, data, tmp_path):
    options = ["--data", data, "--model", model, "--steps", 1, "--lr", 1e-3, "--seeds", 1, "--executor", 1]
    where = tmp_path / "sweep"
    assert run("sweep", *options, "-r", 4, 2, "--target", "q_proj", "--alpha", 4, "--output", where) == 0
    rows = read_rows(where / "rows.jsonl")
    assert [(row["r"], row["trainable"]) for row in rows] == [(2, 2 * 32), (4, 4 * 32)]
    assert rows[0]["options"] == {"lora_alpha": 4, "target_modules": ["q_proj"]}


def test_what_cannot_be_swept_is_refused(model, data, tmp_path, capsys):
    there = tmp_path / "file"
    there.write_text("mine")
    new = ("--model", model, "--output", tmp_path / "s")
    for arguments, message in (
        (("--data", data, "--task", "use", "--output", tmp_path / "s"), "--task and --data exclude each other"),
        (("--data", data, "--output", there), "is a file"),
        ((*new, "--method", "full", "-r", 4), "--method full has no options, so --rank"),
        ((*new, "-r", 4, 0), "must be an integer of at least 1, not '0'"),
        ((*new, "--method", "bitfit"), "BitFit trains biases"),
        ((*new, "--executor", "host"), "--executor: must be an integer of at least 1"),
    ):
        assert message in refused(capsys, "sweep", *arguments)
    assert there.read_text() == "mine"


def rows_of(losses):
    """{(lr, r): losses by seed} as rows."""
    return [
        {"run": "fine_tuned", "settings": ["lr", "r", "seed"], "lr": lr, "r": r, "seed": seed, LOSS: loss}
        for (lr, r), of_seeds in losses.items() for seed, loss in enumerate(of_seeds)
    ]  # fmt: skip


def test_the_verdict_names_the_best_what_is_like_it_and_the_edges_of_the_grid():
    losses = {(0.001, 4): [2.50, 2.52, 2.54], (0.003, 4): [2.2, 2.21, 2.22], (0.003, 8): [2.19, 2.22, 2.2]}
    losses[0.01, 8] = [9, 9, None]
    best, alike, edge = verdict(rows_of(losses), ["lr", "r"])
    assert best == "best: lr 0.003, r 8: validation loss 2.203 ± 0.038 (95 % over 3 seeds)"
    assert alike == "not clearly worse, seed by seed: lr 0.003, r 4"
    assert edge == "the best r is the largest of the grid: the optimum may lie beyond it; try 16, too"
    best, alike, edge = verdict(rows_of({(1e-3, 4): [2.0], (1e-2, 4): [3.0]}), ["lr"])
    assert best == "best: lr 0.001: validation loss 2"
    assert alike == "not clearly worse, seed by seed: lr 0.01", "one seed tells nothing"
    assert edge == "the best lr is the least of the grid: the optimum may lie beyond it; try 0.0001, too"


def test_more_seeds_make_a_verdict_sharper_and_no_rank_lies_below_one():
    rng = np.random.default_rng(0)
    losses = {(1e-3, 1): list(2 + 0.3 * rng.standard_normal(20)), (1e-3, 2): list(2.5 + 0.3 * rng.standard_normal(20))}
    (best,) = verdict(rows_of(losses), ["r"])
    assert best.startswith("best: r 1: ")


def test_a_sweep_without_a_loss_says_why():
    with pytest.raises(ValueError, match="training diverged; give lower rates"):
        verdict(rows_of({(1.0, 4): [None, math.nan]}), ["lr"])
    (failure,) = rows_of({(1.0, 4): [None]})
    failure |= {"error": "OSError: full", "traceback": None}
    with pytest.raises(ValueError, match="OSError: full"):
        verdict([failure], ["lr"])
