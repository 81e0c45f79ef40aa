"""The audit of published figures: computed from shapes and options, and as their status says."""

from __future__ import annotations

import csv
import json

import pytest

from minipeft.accounting.published import audit, read_published, recompute, tally
from minipeft.files import FileError

ROWS = {row["id"]: row for row in read_published()}


@pytest.fixture(scope="module")
def findings():
    return {f.row["id"]: f for f in audit()}


def test_every_row_that_is_computed_comes_out_as_its_status_says(findings):
    surprises = [f for f in findings.values() if f.expected is False]
    assert [f"{f.row['id']}: {f.row['published_value']} against {f.computed}" for f in surprises] == []


def test_the_tally_adds_up(findings):
    counts = tally(findings.values())
    assert counts["rows"] == len(ROWS) == 297
    assert counts["reproduces"] + counts["differs"] + counts["not covered"] == 297
    assert counts["not covered"] == sum(f.computed is None for f in findings.values())


def test_a_row_with_options_is_computed(findings):
    assert [i for i, f in findings.items() if f.row["options"] and f.computed is None] == []


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ("lora-gpt3-rqrv4", 18.874368),  # 2 matrices x 96 layers x 2 x 12288 x 4
        ("lora-gpt2m", 0.393216),  # the paper prints 0.35
        ("tot-gpt3-ft-untied", 175_221.829632),
        ("bitfit-robbase", 0.102144),
        ("houlsby-ln", 38.4),
        ("qlora-780", 783.427928064),  # 12 bytes x 65,285,660,672
        ("peft-bert-eval-all", 108_608_260),
        ("dora-llama-7b-dora32", 100 * 56_975_360 / (6_738_415_616 + 56_975_360)),
    ],
)
def test_figures_computed_by_hand(findings, row, value):
    assert findings[row].computed == pytest.approx(value, rel=1e-4)


def test_known_slips_are_found(findings):
    for row in ("lora-debxxl-r8", "lora-gpt2m", "lora-gpt3-e4text", "vera-roblarge-16-vera-p", "tot-bert-large-readme"):
        assert (findings[row].verdict, findings[row].expected) == ("differs", True)
        assert findings[row].reason


def test_options_hold_no_figure():
    for row in ROWS.values():
        assert row["published_value"] not in [str(v) for v in _numbers(json.loads(row["options"] or "{}")) if v > 1000]


def _numbers(value):
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(item, (dict, list)):
            yield from _numbers(item)
        elif isinstance(item, (int, float)):
            yield item


def test_a_figure_that_is_altered_is_noticed():
    row = dict(ROWS["tot-llama3.2-3b"], published_value="3.3")
    (finding,) = audit([row])
    assert (finding.verdict, finding.expected) == ("differs", False)
    assert tally([finding])["not as their status says"] == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("lora-vram", "not computable: 1.2TB is 6.85 bytes/param: no standard Adam ledger"),
        ("tot-gpt3-flops", "no rule for the quantity 'compute'"),
        ("peft-whisper", "no rule for the model 'whisper-large-v2'"),
        ("mc-loha--llama-3.2-3B-rank32", "no rule for the method 'LoHa'"),
    ],
)
def test_rows_without_a_rule_are_listed_with_the_reason(findings, row, reason):
    finding = findings[row]
    assert (finding.verdict, finding.computed, finding.expected) == ("not covered", None, None)
    assert finding.reason.startswith(reason)


def write(path, **changes):
    options = {"model": "gpt2-m", "config": {"peft_type": "LORA", "target_modules": ["c_attn"], "r": 8}}
    row = {"id": "mine", "quantity": "trainable parameters", "unit": "K", "published_value": "811", "tolerance": "1"}
    row |= {"status": "", "options": json.dumps(options)} | changes
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    return path


def test_a_file_of_ones_own_is_audited(tmp_path):
    (finding,) = audit(read_published(write(tmp_path / "mine.csv", published_value="786.4")))
    assert finding.computed == 24 * 8 * (1024 + 3 * 1024) / 1e3
    assert (finding.verdict, finding.expected) == ("reproduces", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"published_value": "many"}, "row 'mine': published_value must be a number, not 'many'"),
        ({"options": "{"}, "row 'mine': the options are not JSON"),
        ({"options": '{"modle": "gpt2"}'}, "row 'mine': unknown option 'modle'; nearest: model"),
        ({"options": '{"model": "gpt5"}'}, "unknown model 'gpt5'"),
        ({"quantity": "beauty"}, "row 'mine': the options must say which quantity this is: trainable"),
    ],
)
def test_a_wrong_row_is_an_error_that_names_it(tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        audit(read_published(write(tmp_path / "mine.csv", **changes)))
    assert message in str(error.value)


def test_a_file_without_the_columns_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FileError, match="no column id, quantity, unit"):
        read_published(tmp_path / "other.csv")
    with pytest.raises(FileError, match="cannot be read"):
        read_published(tmp_path / "absent.csv")


def test_recompute_uses_the_rule_of_the_method_and_not_the_row():
    row = dict(ROWS["lora-gpt3-rqrv1"])
    options = json.loads(row["options"])
    options["config"]["r"] = 3
    assert recompute({**row, "options": json.dumps(options)}) == pytest.approx(3 * recompute(row))
