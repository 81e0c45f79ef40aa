"""`minipeft audit`: what it prints, what it returns, and what it says of a file that is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest
from cli_helpers import output, refused

from minipeft.accounting import published
from minipeft.accounting.counted import COUNTED
from minipeft.cli import audit as command
from minipeft.cli.audit import grouped, readable

HEADING = "id,quantity,unit,published_value,tolerance,status,options,source,notes\n"
FIXED = "trainable parameters,K,{},0.05,{},\"{{\"\"model\"\": \"\"gpt2\"\", \"\"config\"\": {{\"\"peft_type\"\": \"\"LORA\"\"}}}}\""  # fmt: skip


def mine(tmp_path, *rows):
    """A CSV file with a row for each (id, published value, status, source, notes)."""
    path = tmp_path / "mine.csv"
    lines = [f"{name},{FIXED.format(value, status)},{source},{notes}\n" for name, value, status, source, notes in rows]
    path.write_text(HEADING + "".join(lines))
    return path


def test_the_shipped_figures(capsys):
    status, out, _ = output(capsys, "audit")
    lines = out.splitlines()
    assert status == 0 and max(map(len, lines)) <= 80
    for row in published.read_published():
        assert f"  {row['id']}" in out
    assert "\n297 rows: 256 reproduce, 31 differ, 10 not covered." in out
    assert " ".join(out.split()).endswith("Every row is as its status says.")
    for line in (  # both numbers, the unit and the verdict
        "  lora-gpt3-rqrv4                 18.8         18.874 M           reproduces",
        "  lester-small-20-train         10,420         10,240 params      differs",
        "  tot-t5v11-xxl         11,135,332,352 11,135,332,352 params      reproduces",
        "  adapterL-gpt2m-6                0.37         0.3688 M           reproduces *",
        "  lora-vram                        1.2              - TB          not covered",
    ):
        assert line in lines


def test_rows_that_differ_come_with_their_source_and_reason(capsys):
    status, out, _ = output(capsys, "audit", "--verdict", "differs", "--source", "Lester")
    assert status == 0
    assert "Lester et al. 2021 (arXiv:2104.08691)\n" in out
    assert "      notes: printed 10,420; 20*512 = 10,240 (digits swapped)\n" in out
    assert "reproduces" not in out and "not covered\n" not in out
    assert "73 rows" in out  # the tally is of all of the source
    _, out, _ = output(capsys, "audit", "--verdict", "not-covered", "--source", "QLoRA")
    reason = "      not computable, as its status says: the row has no options\n"
    assert f"{reason}      notes: sequence length not stated\n" in out and "differs" not in out


def test_a_source_alone(capsys):
    status, out, _ = output(capsys, "audit", "--source", "zero")
    assert status == 0
    assert "4 rows: 4 reproduce" in out
    sentence = "no row's source contains 'QLORAA'; did you mean QLoRA or LoRA? (known: LoRA, "
    assert sentence in refused(capsys, "audit", "--source", "QLORAA")


def test_json(capsys):
    status, out, _ = output(capsys, "audit", "--json", "--verdict", "differs", "--source", "Lester")
    content = json.loads(out)
    assert status == 0
    assert content["tally"]["rows"] == 73
    row = content["rows"][0]
    assert (row["id"], row["published"], row["computed"], row["verdict"]) == (
        "lester-small-20-train", 10420, 10240, "differs",
    )  # fmt: skip
    assert row["as_its_status_says"] is True and row["solved_from_the_figure"] is False
    assert row["notes"].startswith("printed 10,420") and row["reason"] == "" and row["model"] == "t5v1.1-small"
    assert len(content["rows"]) == 3


FINE = ("lora", 294.9, "", "My paper", "")


@pytest.mark.parametrize(("rows", "status", "shown"), [
    ([FINE], 0, ["My paper\n  lora ", "294.912 K "]),
    ([FINE, ("slip", 249.9, "does not reproduce", "My paper", "swapped")], 0, ["differs\n      notes: swapped\n"]),
    ([FINE, ("claim", 249.9, "", "", "")], 1, ["differs !", "1 (!) not as their status says."]),
    ([FINE, ("wrong", 294.9, "does not reproduce", "", "")], 1, ["reproduces !"]),
])
def test_a_file_of_ones_own(capsys, tmp_path, rows, status, shown):
    found, out, _ = output(capsys, "audit", mine(tmp_path, *rows))
    assert found == status
    assert [text for text in shown if text not in out] == []


def test_the_documented_example_works_verbatim(capsys, tmp_path):
    lines = command.__doc__.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith("id,quantity,unit"))
    example = [line.strip() for line in lines[start:]]
    (tmp_path / "mine.csv").write_text("\n".join(example[: example.index("") if "" in example else None]) + "\n")
    status, out, _ = output(capsys, "audit", tmp_path / "mine.csv")
    assert status == 0
    assert "reproduce" in out and "0 differ, 0 not covered" in out


def test_every_column_and_option_is_documented():
    options = [field.name for field in fields(published.Options)]
    assert [name for name in options if name not in published.Options.__doc__] == []
    words = set(re.findall(r"[\w/%]+", command.__doc__))
    assert [name for name in (*published.COLUMNS, *options, *published.UNITS, *COUNTED) if name not in words] == []


def test_the_help_has_the_number_of_figures_and_the_conventions():
    assert f"\n{len(published.read_published())} parameter counts, memory figures and code values" in command.__doc__
    for convention in ("c_attn", "enable_lora", "num_transformer_submodules", "OPT", "modules_to_save"):
        assert convention in command.__doc__


WRONG = 'x,trainable parameters,M,1,1,,"{""model"": ""lama-7b""}",,hopeful\n'


def test_a_wrong_row_is_one_line_and_names_the_nearest(capsys, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(HEADING + WRONG)
    error = refused(capsys, "audit", path, silent=False)
    assert "error: row 'x': unknown model 'lama-7b'; nearest: llama-7b" in error


@pytest.mark.parametrize("filters", [(), ("--verdict", "differs"), ("--unexpected",), ("--verdict", "reproduces", "--unexpected")])
def test_after_a_wrong_row_the_others_are_audited(capsys, tmp_path, filters):
    """All are shown that are asked for, and the wrong ones, of which there are two; the status is that of an error."""
    path = mine(tmp_path, ("fine", 294.9, "", "", ""), ("claim", 249.9, "", "", ""))
    path.write_text(path.read_text() + WRONG + ",trainable parameters,M,many,1,,,,\n")
    status, out, err = output(capsys, "audit", path, *filters)
    assert status == 2 and err.startswith("minipeft: error: row 'x': unknown model 'lama-7b'") and err.count("\n") == 1
    assert "2 rows are wrong" in err
    assert "error\n      unknown model 'lama-7b'" in out and "  (no id) " in out
    assert "4 rows: 1 reproduce, 1 differ, 0 not covered, 2 wrong. 1 (!) not as" in " ".join(out.split())
    assert ("  fine " in out, "  claim " in out) == (not filters, "reproduces" not in filters)


def test_json_is_complete_after_a_wrong_row(capsys, tmp_path):
    path = mine(tmp_path, ("fine", 294.9, "", "", ""))
    path.write_text(path.read_text() + WRONG + "y,trainable parameters,M,many,-1,,,,\nz\n")
    status, out, _ = output(capsys, "audit", path, "--json")
    rows = json.loads(out)["rows"]
    assert status == 2 and [(r["id"], r["verdict"]) for r in rows] == [
        ("fine", "reproduces"), ("x", "error"), ("y", "error"), ("z", "error"),
    ]  # fmt: skip
    assert (rows[1]["computed"], rows[2]["published"], rows[3]["tolerance"]) == (None, None, None)
    assert rows[1]["reason"].startswith("unknown model 'lama-7b'") and rows[1]["notes"] == "hopeful"
    assert json.loads(out)["tally"]["error"] == 3


def test_the_rows_that_are_not_as_their_status_says_alone(capsys, tmp_path):
    path = mine(tmp_path, FINE, ("slip", 249.9, "does not reproduce", "", ""), ("claim", 249.9, "", "", "mine"))
    status, out, _ = output(capsys, "audit", path, "--unexpected")
    assert status == 1 and "  claim " in out and "  lora " not in out and "  slip " not in out and "3 rows" in out
    status, out, _ = output(capsys, "audit", path, "--unexpected", "--json")
    assert status == 1 and [row["id"] for row in json.loads(out)["rows"]] == ["claim"]


def test_a_file_that_is_absent_or_no_table(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("just text\n")
    assert "absent.csv: cannot be read" in refused(capsys, "audit", tmp_path / "absent.csv")
    assert "notes.txt: no column id, quantity" in refused(capsys, "audit", tmp_path / "notes.txt")
    assert "did you mean differs" in refused(capsys, "audit", "--verdict", "difers")


@pytest.mark.parametrize(("value", "published_value", "shown"), [
    (18.874368, "18.8", "18.874"),
    (174604.259328, "175255.8", "174,604.259"),
    (10240.0, "10420", "10,240"),
    (0.0006652663, "0.00067", "0.0006653"),
    (7.1866e-05, "7e-05", "7.19e-05"),
    (0.0, "0", "0"),
    (-0.69619280, "-0.696192801", "-0.696192800"),
])
def test_numbers_are_shown_beside_each_other(value, published_value, shown):
    assert readable(value, published_value) == shown


def test_published_numbers_are_shown_as_printed():
    assert [grouped(v) for v in ("0.35", "174604.25", "11135332352", "-1", "7e-05")] == [
        "0.35", "174,604.25", "11,135,332,352", "-1", "7e-05",
    ]  # fmt: skip
