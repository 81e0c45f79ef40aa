"""`minipeft audit --footprints`: published memory of training runs beside what is predicted."""

from __future__ import annotations

import pytest
from cli_helpers import output, refused, reported

from minipeft.cli.footprints import mark


def test_the_table_its_drawing_and_its_summary(capsys):
    status, out, err = output(capsys, "audit", "--footprints")
    assert (status, err) == (0, "")
    record = reported(capsys, "audit", "--footprints")
    runs = record["runs"]
    text = [" ".join(line.split()) for line in out.splitlines()]
    for run in (run for run in runs if run["predicted"]):
        numbers = f"{run['measured'] / 2**30:.2f} {run['predicted'] / 2**30:.2f} {run['ratio']:.2f}"
        missed = "" if run["within_15_percent"] else " !"
        assert any(line.startswith(f"{run['id']}{missed} {numbers} ") for line in text), run["id"]
        assert run["within_15_percent"] or run["reason"]
    for split, count in record["summary"].items():
        assert any(line.startswith(f"{split}: {count['within 15 %']} of {count['predicted']} within 15 %") for line in text)
    assert max(map(len, text)) <= 110


def test_runs_of_one_source(capsys):
    runs = reported(capsys, "audit", "--footprints", "--source", "torchtune")["runs"]
    assert runs and all("torchtune" in run["source"] for run in runs)
    _, out, _ = output(capsys, "audit", "--footprints", "--source", "prepare_dataset", "--json")
    assert "NaN" not in out, "that is no JSON"


def test_the_mark_of_a_ratio():
    assert mark(1.0) == "       :  ●  :       "
    assert mark(0.2)[0] == mark(9.9)[-1] == "●"


@pytest.mark.parametrize(("argv", "message"), [
    (["--source", "nowhere"], "no run's source contains 'nowhere'"),
    (["--verdict", "differs"], "--verdict does nothing with --footprints"),
    (["mine.csv"], "--footprints has its own runs: leave mine.csv out"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_status_2(capsys, argv, message):
    assert message in refused(capsys, "audit", "--footprints", *argv)
