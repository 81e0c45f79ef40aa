"""`minipeft claims`: the table, one statement in full, its picture, JSON, and rows that are computed again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cli_helpers import general_blocks, output, refused

import minipeft as mp
from minipeft import claims
from minipeft.claims import soft_prompts
from minipeft.claims.register import ROWS, RULES, UNTRIED, VERDICTS, Experiment, Rule, judge


@pytest.fixture(autouse=True)
def ruleless(monkeypatch):
    """As if nobody had written the rule of rlhf-9."""
    claims.rule_of("rlhf-9")
    monkeypatch.delitem(RULES, "rlhf-9")


def test_the_table_has_a_line_for_each_statement_and_counts_the_verdicts(capsys, monkeypatch):
    from minipeft.cli import claims as command

    some = {id: claims.judge(id) for id in ("lora-6", "lora-1", "lora-4", "soft-7", "full-3")}  # one of each verdict
    monkeypatch.setattr(command, "judge", lambda id: some.get(id) or claims.Verdict(UNTRIED, "No rule judges it."))
    status, out, err = output(capsys, "claims")
    assert (status, err) == (0, "")
    heading, *lines = out.splitlines()
    assert heading.split()[:3] == ["id", "verdict", "effect"] and max(map(len, lines)) <= 140
    body = {line.split()[0]: line for line in lines if line and line.split()[0] in claims.statements()}
    assert [*body] == [*claims.statements()]
    assert "holds" in body["lora-6"] and "256 times" in body["lora-6"] and "d = k = 4096" in body["lora-6"]
    assert "not tried yet" in body["rlhf-9"]
    below = {id: lines[lines.index(line) + 1].strip() for id, line in body.items()}
    assert below["soft-7"].startswith(some["soft-7"].because[:60]), "on what condition it holds, and why another does not"
    assert below["lora-4"].startswith(some["lora-4"].because[:60]) and below["lora-6"].startswith("12_counting.py")
    total, counts = lines[-2].split(" statements: ")
    counted = {name: int(n) for n, name in (part.split(" ", 1) for part in counts.split(", "))}
    assert sum(counted.values()) == int(total) == 86
    assert [*counted] == [*VERDICTS]
    assert counted == {name: n for name in VERDICTS if (n := sum(f" {name}  " in line for line in body.values()))}


def test_one_statement_in_full(capsys):
    status, out, err = output(capsys, "claims", "lora-6", "rlhf-9")
    assert (status, err) == (0, "")
    text = " ".join(out.split())
    assert "lora-6 (lora, count) statement d = k = 4096" in text and "rule Holds if the built layers" in text
    assert "effect numbers of the matrix over LoRA's: 256 times" in text and "lesson 12_counting.py, 1 · Parameters" in text
    assert "d k 16,777,216" in text and "rlhf-9 (rlhf, procedure)" in text and "verdict not tried yet" in text
    text = " ".join(output(capsys, "claims", "soft-7")[1].split())
    assert "rows lost_context.jsonl, 5 rows" in text and "95 % interval [" in text


def test_json_is_a_list_of_objects(capsys):
    status, out, err = output(capsys, "claims", "lora-6", "soft-7", "rlhf-9", "qlora-6", "--json")
    assert (status, err) == (0, "")
    count, rows, untried, traps = json.loads(out, parse_constant=pytest.fail)  # no NaN, no Infinity
    assert {"id", "verdict", "effect", "interval", "seeds", "test_size", "evidence"} <= count.keys()
    assert (count["verdict"], count["effect"], count["unit"], count["interval"]) == ("holds", 256, "times", None)
    assert {"name": "d k", "value": 16777216, "unit": "", "interval": None} in count["evidence"]
    assert (rows["rows"], rows["number_of_rows"], rows["test_size"]) == ("lost_context.jsonl", 5, 512)
    assert rows["interval"][0] < rows["effect"] < rows["interval"][1]
    assert (untried["verdict"], untried["effect"], untried["rule"]) == ("not tried yet", None, None)
    assert any(n["value"] is None for n in traps["evidence"]), "not a number"


def test_the_picture_has_the_intervals_or_where_there_are_none_all_numbers(capsys, tmp_path, rendered):
    path = tmp_path / "soft.png"
    status, out, _ = output(capsys, "claims", "soft-7", "--picture", path)
    assert (status, out) == (0, f"{path}: 4 numbers with their intervals\n")
    assert path.read_bytes().startswith(b"\x89PNG")
    status, out, _ = output(capsys, "claims", "lora-6", "--picture", tmp_path / "counted.png")
    assert (status, out) == (0, f"{tmp_path / 'counted.png'}: 3 numbers\n") and (tmp_path / "counted.png").exists()
    status, out, _ = output(capsys, "claims", "qlora-6", "--picture", tmp_path / "traps.png")
    assert status == 0 and out.endswith("10 numbers\nnot drawn, for they are not finite: zero blocks: of the shortcut\n")
    assert output(capsys, "claims", "rlhf-9", "--picture", tmp_path / "none.png")[1] == "rlhf-9: nothing to draw, for there is no number\n"
    assert not (tmp_path / "none.png").exists()


def test_the_picture_has_all_numbers_with_intervals_those_of_a_unit_together(capsys, tmp_path, monkeypatch):
    from minipeft.train import metrics

    figures = []
    monkeypatch.setattr(metrics, "save_png", lambda figure, path: figures.append(figure))
    assert output(capsys, "claims", "full-3", "--picture", tmp_path / "rate.png")[0] == 0
    verdict, axes = judge("full-3"), {one.get_xlabel().removesuffix(", with 95 % intervals"): one for one in figures[0].axes}
    with_intervals = [n for n in (verdict.effect, *verdict.evidence) if n.low is not None]
    assert {*axes} == {"rate", "exponent", "times"} == {n.unit for n in with_intervals}
    for unit, one in axes.items():
        assert [label.get_text() for label in one.get_yticklabels()] == [n.name for n in with_intervals if n.unit == unit]
    assert axes["times"].get_xscale() == "log" and axes["exponent"].get_xscale() == "linear"


def test_all_rows_are_computed_again_and_compared(capsys, monkeypatch, tmp_path):
    from minipeft.cli import claims as command

    some = {id: claims.statements()[id] for id in ("lora-6", "soft-7")}
    monkeypatch.setattr(command, "statements", lambda: some)
    monkeypatch.setattr(soft_prompts, "LENGTHS", (0, 200))
    monkeypatch.setattr(soft_prompts, "BLOCKS", 32)
    monkeypatch.setattr("minipeft.experiments.shipped.general_blocks", general_blocks)
    soft_prompts.LOST.compute(tmp_path / "shipped")
    monkeypatch.setattr(Experiment.rows, "__defaults__", (tmp_path / "shipped",))
    told = Experiment("told", lambda seed: {"loss": 1.0 + seed}, lambda: mp.grid(seed=range(2)))
    monkeypatch.setattr(command, "beside", lambda: [told])
    monkeypatch.setattr(command, "of_checkout", lambda: [replace(told, name="lesson")])
    status, out, err = output(capsys, "claims", "--run", "all", "--store", tmp_path)
    assert status == 0 and out.startswith("soft-7: ") and "lora-6" not in out
    assert "all 2 rows agree with the shipped ones within 2%" in out and "the verdict is the same" in out
    assert "2 of 2 runs" in err and (tmp_path / "lost_context.jsonl").exists()
    for name in ("told", "lesson"):
        assert f"{name}\nrows: {tmp_path / name}.jsonl\nthere are 0 of these 2 rows already" in out
    status, out, err = output(capsys, "claims", "--run", "soft-7", "--store", tmp_path)
    assert status == 0 and "all 2 rows agree with the shipped ones within 2%" in out and "the verdict is the same" in out
    assert "2 of 2 rows are in the store" in err
    rows = [json.loads(line) for line in (tmp_path / "lost_context.jsonl").read_text().splitlines()]
    for row in rows:
        row["losses"] = [1.0] * len(row["losses"])
    (tmp_path / "lost_context.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = output(capsys, "claims", "--run", "soft-7", "--store", tmp_path)  # goes on from what is there
    assert status == 1 and "soft-7: does not hold here." in out and "the verdict is another" in out
    assert "2 numbers differ by more than 2% from the shipped rows" in out and "2 of 2 rows are in the store" in err


def test_where_a_run_fails_nothing_is_compared(capsys, monkeypatch, tmp_path):
    from minipeft.cli import claims as command

    def run(seed):
        if seed:
            raise FileNotFoundError("the teacher is not on this machine")
        return {"loss": 1.0}

    told = Experiment("told", run, lambda: mp.grid(seed=range(2)))
    monkeypatch.setattr(command, "rule_of", lambda id: Rule(id, "", "", lambda rows: None, told))
    status, out, err = output(capsys, "claims", "--run", "soft-7", "--store", tmp_path)
    assert (status, out) == (1, f"soft-7: 1 of 2 runs failed, so nothing is compared\nrows: {tmp_path / 'told'}.jsonl\n")
    assert "the teacher is not on this machine" in err and "Traceback" not in err


def test_the_user_s_directory_is_the_default_store(monkeypatch, tmp_path):
    from minipeft.cli.claims import user_directory

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert user_directory() == tmp_path / "minipeft" / "claims"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_directory() == tmp_path / ".local" / "share" / "minipeft" / "claims"


def test_the_league_table(capsys, monkeypatch):
    from minipeft.claims import searches

    status, out, err = output(capsys, "claims", "--league", "source", "--examples", 50)
    head, *lines, _, measured = out.splitlines()
    assert measured.startswith("seconds: ") and "threads" in measured
    assert (status, err) == (0, "") and head.split()[-2:] == ["cloze,", "%"] and {"full", "lora"} < {line.split()[0] for line in lines}
    found = json.loads(output(capsys, "claims", "--league", "source", "--examples", 50, "--json")[1])
    assert [one["method"] for one in found] == [line.split()[0] for line in lines]
    assert found[0]["right"]["low"] < found[0]["right"]["value"] and found[0]["trial"]["examples"] == 50
    assert "--league maths: the tasks are rewrite and source" in refused(capsys, "claims", "--league", "maths")
    assert "--league shows methods" in refused(capsys, "claims", "lora-6", "--league", "source")
    assert "--examples must be one of 50, 500, 5000" in refused(capsys, "claims", "--league", "source", "--examples", 7)
    monkeypatch.setattr(searches, "_of_today", lambda *_: [])
    for more in ((), ("--pairs",)):
        assert "no method has all of its rows of rewrite with 500 examples" in refused(capsys, "claims", "--league", "rewrite", *more)


def test_the_pairs_of_the_league(capsys):
    """The row's method beside the column's, as signs; with --json each with its interval, of which the signs follow."""
    status, out, err = output(capsys, "claims", "--league", "rewrite", "--examples", 50, "--pairs")
    assert (status, err) == (0, "")
    table, legend = out.split("\n\n")
    head, *lines = [line.split() for line in table.splitlines()]
    names = [line[1] for line in lines]
    assert head == [line[0] for line in lines] == [str(i + 1) for i in range(len(names))]
    signs = {(a, b): sign for _, a, *row in lines for b, sign in zip(names, row, strict=True) if a != b}
    assert f"{len(signs) // 2} comparisons" in legend and "each by its own 95 % interval" in legend and "0.02 nats per token" in legend
    found = json.loads(output(capsys, "claims", "--league", "rewrite", "--examples", 50, "--pairs", "--json")[1])
    assert [*signs] == [(one["method"], one["beside"]) for one in found]
    for one in found:
        low, high = one["interval"]
        assert low < one["difference"] < high and one["unit"] == "nats per token"
        sign, other = signs[one["method"], one["beside"]], signs[one["beside"], one["method"]]
        assert ("+" in sign, "-" in sign, "=" in sign) == (low > 0, high < 0, -0.02 < low and high < 0.02) == ("-" in other, "+" in other, "=" in other)
        assert (sign == "?") == (one["word"] == "undecided")


@pytest.mark.parametrize(("argv", "message"), [
    (["lora6"], "there is no statement 'lora6'; did you mean lora-6"),
    (["lora-6", "xyz"], "there is no statement 'xyz'; `minipeft claims` lists all"),
    (["--run", "lora-6"], "lora-6 has no rows to compute again: its rule computes its numbers each time that it is asked"),
    (["--run", "rlhf-9"], "rlhf-9 has no rows to compute again: no rule judges it"),
    (["--run", "soft-7", "--store", ROWS], "holds the shipped rows; choose another"),
    (["lora-6", "--run", "soft-7"], "--run has its own statement: leave lora-6 out"),
    (["--run", "lora-6", "--executor", "0"], "--executor: must be an integer of at least 1, not '0'"),
    (["--run", "soft-7", "--json"], "--json does nothing with --run"),
    (["--recompute", "0"], "--recompute must be at least 1, got 0"),
    (["--recompute", "2", "lora-6"], "--recompute draws from all statements: leave lora-6 out"),
    (["--recompute", "2", "--run", "soft-7"], "--run does nothing with --recompute"),
    (["--seed", "2"], "--seed does nothing without --recompute"),
    (["--pairs"], "--pairs does nothing without --league"),
    (["lora-6", "--store", "x"], "--store does nothing without --run"),
    (["--picture", "a.png"], "--picture draws one statement: give its ID"),
    (["lora-6", "--picture", "a.pdf"], "--picture writes a PNG file: a.pdf must end in .png"),
    (["lora-6", "--picture", "nowhere/a.png"], "--picture nowhere/a.png: there is no directory nowhere"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_status_2(capsys, argv, message):
    assert message in refused(capsys, "claims", *argv)


@pytest.mark.parametrize(("differing", "status"), [([], 0), (["run 0, loss: 2, and 1 in the package"], 1)])
def test_rows_drawn_at_random_are_computed_again(differing, status, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("minipeft.cli.claims.recomputed", lambda among, n, seed: (asked.append((n, seed)), [("loop", []), ("08", differing)])[1])
    found, out, _ = output(capsys, "claims", "--recompute", 3, "--seed", 7)
    assert (found, asked) == (status, [(3, 7)])
    assert f"2 rows were computed again (loop, 08), {len(differing) or 'none'} of their numbers differ" in out
    assert all(line in out for line in differing)
