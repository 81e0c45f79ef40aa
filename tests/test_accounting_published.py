"""The audit of published figures: computed from shapes and options, and as their status says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from minipeft.accounting import published
from minipeft.accounting.published import audit, read_published, recompute, tally
from minipeft.files import FileError

ROWS = {row["id"]: row for row in read_published()}


@pytest.fixture(scope="module")
def findings():
    """Computed without sight of what was published, where there is something to compute."""
    seen = ("id", "quantity", "unit", "options")
    with pytest.MonkeyPatch.context() as patch:
        blind = lambda row: recompute({key: row[key] for key in seen} if row["options"] else row)  # noqa: E731
        patch.setattr(published, "recompute", blind)
        return {f.row["id"]: f for f in audit()}


def test_every_row_is_as_its_status_says(findings):
    """Rows that are said to reproduce do, within their tolerance; those that are said not to come out different."""
    for name, f in findings.items():
        if f.computed is None:
            assert (f.verdict, f.expected, f.row["options"]) == ("not covered", None, ""), name
            continue
        near = abs(f.computed - float(f.row["published_value"])) <= float(f.row["tolerance"]) * (1 + 1e-9)
        assert near == f.row["status"].startswith("reproduces"), (name, f.row["published_value"], f.computed)
        assert (f.verdict, f.expected) == ("reproduces" if near else "differs", True)


def test_the_tally(findings):
    assert len(ROWS) == 297
    assert tally(findings.values()) == {
        "rows": 297, "reproduces": 256, "differs": 31, "not covered": 10, "error": 0, "solved from the figure": 6,
        "not as their status says": 0,
    }  # fmt: skip


def test_the_readme_has_the_tally(findings):
    readme, counts = (Path(__file__).parents[1] / "README.md").read_text("utf-8"), tally(findings.values())
    assert f"{counts['rows']} published figures" in readme
    assert (
        f"{counts['rows']} figures of the literature are recomputed, of which {counts['reproduces']} follow from shapes "
        f"and options, {counts['differs']} do not, and {counts['not covered']} are outside this package"
    ) in readme


def test_what_is_not_covered_does_not_follow_from_shapes_and_options(findings):
    """Nothing else may be left out, and the reason says no more than what is known: the status, and no options."""
    uncovered = {name: f for name, f in findings.items() if f.verdict == "not covered"}
    assert set(uncovered) == {
        "lora-vram", "houlsby-3.6pct", "adalora-adalora", "qlora-5048", "qlora-567", "qlora-18",
        "tot-gpt3-flops", "rlhf-ptx-share", "houlsby-1.3x", "houlsby-1.19x",
    }  # fmt: skip
    for f in uncovered.values():
        assert f.reason == "not computable, as its status says: the row has no options"
        assert f.row["status"].startswith("not computable") and f.row["notes"]


def test_rows_that_differ_have_notes(findings):
    assert [i for i, f in findings.items() if f.verdict == "differs" and not f.row["notes"]] == []


def test_rows_solved_from_the_figure_are_marked(findings):
    assert {i for i, f in findings.items() if f.solved and f.computed is not None} == {
        "adapterL-gpt2m-6", "adapterL-gpt2m-224", "adapterL-gpt2l-248", "adapterH-gpt2m", "adptD-robbase-0.3",
        "dora-llama-13b-prefix",
    }  # fmt: skip


@pytest.mark.parametrize(("row", "value"), [
    ("lora-gpt3-rqrv4", 18.874368),  # 2 matrices x 96 layers x 2 x 12288 x 4
    ("lora-gpt2m", 0.393216),  # the paper prints 0.35
    ("tot-gpt3-ft-untied", 175_221.829632),
    ("bitfit-robbase", 0.102144),
    ("houlsby-ln", 38.4),
    ("qlora-780", 783.427928064),  # 12 bytes x 65,285,660,672
    ("peft-bert-eval-all", 108_608_260),
    ("dora-llama-7b-dora32", 100 * 56_975_360 / (6_738_415_616 + 56_975_360)),
    ("lester-xxl-20-pct", 100 * 20 * 4096 / (11_135_332_352 + 20 * 4096)),
    ("prefix-dart", 10 * 2 * 24 * 1024 / 1e3),
    ("mc-prefixtuning--llama-3.2-3B-lr_0.001", 200 * 2 * 28 * 8 * 128),  # as many heads as keys have
    ("mc-ptuning--llama-3.2-3B-default", 20 * 3072 + 3 * (3072**2 + 3072)),
    ("mcfile-ptuning--llama-3.2-3B-default", 4 * 20 * 3072),  # the network is not in the file
    ("adapterh-gpt3-16", 2 * 96 * (2 * 12288 * 16 + 16 + 12288) / 1e6),
    ("adapterL-gpt2m-6", 24 * (2 * 1024 * 6 + 6 + 1024 + 2 * 1024) / 1e6),
    ("dora-llama-13b-par", 100 * 387_973_120 / (13_015_864_320 + 387_973_120)),
    ("houlsby-2.1pct", 100 * 48 * (2 * 1024 * 64 + 64 + 1024 + 2 * 1024) / 335_141_888),
    ("fttop2-gpt2m", 2 * (12 * 1024**2 + 13 * 1024) / 1e6),
    ("peft-ia3-nb", 24 * (3 * 1024 + 4096) + 2 * (1024**2 + 1024 + 2 * 1024 + 2)),  # the head twice
    ("peft-doc-qa", 24 * 2 * 768 * 16 + 2 * (2 * 768 + 2)),
    ("peft-qdora-all", 6_979_321_856 / 2 + 1_050_939_392 + 22_347_776),  # a byte holds two weights
    ("vera-gpt3-1-vera-p", (192 * 12289 + 2 * 12288) / 1e6),
    ("lora-vram-23", 2 / 3),
    ("zero-75b-os", 7.5 * (2 + 2 + 12 / 64)),
    ("qlora-dq", 8 / 64 + 32 / (64 * 256)),
    ("qlora-mem-llama-65b", 34.459),  # 64.76 G weights in 4.127 bits, the rest in 16
    ("ds-zero3", 18),
    ("nf4-code-08", 0.0795803),
    ("prelayer-gpt3-64-0", 96 * 12288 * 64 / 1e6),  # section 5.1: layers x width x (lp + li)
    ("lora+pl-gpt3", (96 * 2 * 2 * 12288 * 8 + 96 * 12288 * 12) / 1e6),
    ("prefix-xsum-2pct", 100 * 3 * 200 * 2 * 12 * 1024 / 406e6),
    ("peft-whisper", 96 * 2 * 2 * 1280 * 32),
    ("peft-vit-lora", 12 * 2 * 2 * 768 * 16 + 768 * 101 + 101),
    ("peft-gemma2", 26 * 16 * (2304 + 2048 + 2304 + 1024) + 2 * 2304),
    ("ah-vit-adapterplus", 12 * (2 * 768 * 8 + 8 + 768 + 768)),
    ("mc-loha--llama-3.2-3B-rank32", 28 * 2 * 32 * (3072 + 3072 + 3072 + 1024)),
    ("mc-lokr--llama-3.2-3B-rank32-factor4-lr0.003", 28 * (2 * 16 + (3 * 3072 + 1024) // 4 * 32)),
    ("mc-boft--llama-3.2-3B-default", 28 * (2 * 3072 * 4 + 3072 + 1024)),
    ("mc-c3a--llama-3.2-3B-default", 28 * (3072 * 3072 + 3072 * 1024) // 64),
    ("mc-shira--llama-3.2-3B-lr_0.0003-random_seed_42", 28 * 32 * (3 * 3072 + 1024)),
    ("gguf-Q4_0", 4 + 16 / 32),
    ("gguf-Q4_1", 4 + 32 / 32),
])
def test_figures_computed_by_hand(findings, row, value):
    assert findings[row].computed == pytest.approx(value, rel=1e-4)


def test_known_slips_are_found(findings):
    for row in ("lora-debxxl-r8", "lora-gpt2m", "lora-gpt3-e4text", "vera-roblarge-16-vera-p", "tot-bert-large-readme"):
        assert (findings[row].verdict, findings[row].expected) == ("differs", True)
        assert findings[row].row["notes"]


def test_options_hold_no_figure():
    for row in ROWS.values():
        assert row["published_value"] not in [str(v) for v in _numbers(json.loads(row["options"] or "{}")) if v > 1000]


def _numbers(value):
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(item, (dict, list)):
            yield from _numbers(item)
        elif isinstance(item, (int, float)):
            yield item


LORA = {"peft_type": "LORA", "r": 8}
MINE = {
    "id": "mine", "quantity": "trainable parameters", "unit": "K", "published_value": "811", "tolerance": "1",
    "status": "", "options": json.dumps({"model": "gpt2-m", "config": {**LORA, "target_modules": ["c_attn"]}}),
}  # fmt: skip


def write(path, **changes):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(MINE))
        writer.writeheader()
        writer.writerow(MINE | changes)
    return path


@pytest.mark.parametrize(("changes", "verdict", "expected"), [
    ({"published_value": "786.4"}, "reproduces", True),
    ({"published_value": "800"}, "differs", False),  # without a status it is expected to reproduce
    ({"status": "does not reproduce"}, "differs", True),
    ({"options": ""}, "not covered", None),
    ({"options": "", "status": "not computable (measured)"}, "not covered", None),
])
def test_a_file_of_ones_own_is_audited(tmp_path, changes, verdict, expected):
    (finding,) = audit(read_published(write(tmp_path / "mine.csv", **changes)))
    assert (finding.verdict, finding.expected) == (verdict, expected)
    if verdict == "not covered":
        assert finding.computed is None and finding.reason.endswith("the row has no options")
    else:
        assert finding.computed == 24 * 8 * (1024 + 3 * 1024) / 1e3


@pytest.mark.parametrize(("unit", "options", "value"), [
    ("params", {"model": "gpt2", "quantity": "total"}, 124_439_808),
    ("params", {"model": {"name": "gpt2", "num_hidden_layers": 24}, "quantity": "total"}, 124_439_808 + 12 * 7_087_872),
    ("params", {"model": {"name": "gpt2", "n_layer": 24}, "quantity": "total"}, 124_439_808 + 12 * 7_087_872),
    ("M", {"model": 2_000_000, "quantity": "total"}, 2),
    ("MiB", {"model": 2**20, "quantity": "total", "bytes": 2}, 2),
    ("B", {"model": "gpt2", "quantity": "total", "times": 10}, 1.24439808),
    ("params", {"model": "gpt2", "only": ".*bias"}, 101_376 + 768),
    ("params", {"model": "bert-base", "num_labels": 2, "only": "classifier.*"}, 1538),
    ("params", {"model": "gpt2", "sum": [{"config": "frozen"}, {"config": "head"}]}, 38_597_376),
    ("fraction", {"model": "gpt2", "config": "head", "of": {"quantity": "total"}}, 38_597_376 / 124_439_808),
    ("%", {"model": "gpt2", "config": "head", "quantity": "share"}, 100 * 38_597_376 / (124_439_808 + 38_597_376)),
    ("bytes/param", {"model": 7, "ledger": {"precision": "bfloat16"}, "line": "total", "of": {}}, 12),
    ("GB", {"model": 10**9, "ledger": {}, "line": ["gradients", "optimizer states"]}, 12),
    ("bits/param", {"quantize_4bit": {"quant_type": "fp4", "blocksize": 128}, "line": "codes"}, 4),
    ("x", {"model": "gpt2", "sum": [{"config": "head"}, {"quantity": "total"}], "of": {}}, 1 + 38_597_376 / 124_439_808),
    ("1", {"model": "gpt2", "sum": [{"config": "head"}, {"config": "head"}], "of": {}}, 2 * 38_597_376 / 124_439_808),
    ("K", {"model": "gpt2", "quantity": "total", "sum": [{}, {"model": "gpt2-m"}]}, (124_439_808 + 354_823_168) / 1e3),
    ("bytes", {"model": 256, "bytes": "Q4_K"}, 2 + 2 + 12 + 128),  # two scales, 8 scales and minima of 6 bits, 4-bit codes
    ("bytes", {"model": 2 * 32, "bytes": "Q8_0", "quantity": "total", "times": 2}, 2 * 2 * (2 + 32)),
])
def test_what_options_mean(unit, options, value):
    row = {"id": "x", "quantity": "trainable parameters", "unit": unit, "options": json.dumps(options)}
    assert recompute(row) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("changes", "message"), [
    ({"published_value": "many"}, "published_value must be a number, not 'many'"),
    ({"published_value": "nan"}, "published_value must be a number, not 'nan'"),
    ({"tolerance": "-1"}, "tolerance must be a number of at least 0, not '-1'"),
    ({"id": ""}, "no id; every row needs its own"),
    ({"options": "", "status": "reproduces"}, "the status 'reproduces' needs options to compute the figure from"),
    ({"options": "", "status": "does not reproduce, by far"}, "the status 'does not reproduce, by far' needs options"),
    ({"status": "not computable"}, "the status 'not computable', and options that compute the figure"),
    ({"status": "perhaps"}, "status must begin with one of reproduces, does not reproduce, not comp"),
    ({"unit": "megs"}, "unknown unit 'megs'; nearest: elements"),
    ({"options": "{"}, "the options are not JSON"),
    ({"options": "[]"}, "options must be a JSON object, not []"),
    ({"options": "{}"}, "the options name no model"),
    ({"quantity": "beauty"}, "the options must say which quantity this is: trainable"),
])
def test_a_wrong_row_is_one_with_an_error(tmp_path, changes, message):
    (finding,) = audit(read_published(write(tmp_path / "mine.csv", **changes)))
    assert (finding.verdict, finding.computed, finding.expected) == ("error", None, None)
    assert finding.reason.startswith(message)


def test_the_rows_beside_a_wrong_one_are_audited():
    fine = {**MINE, "published_value": "786.4"}
    rows = [{**fine, "id": "wrong", "unit": "megs"}, fine, {**fine, "id": "text", "tolerance": "none"}, fine]
    found = audit(rows)
    assert [f.verdict for f in found] == ["error", "reproduces", "error", "error"]
    assert found[3].reason == "used twice as an id; every row needs its own"
    counts = {"rows": 4, "reproduces": 1, "differs": 0, "not covered": 0, "error": 3}
    assert counts.items() <= tally(found).items()


def test_reasons_are_not_guessed_from_what_is_for_the_reader():
    """Neither the method and the model of a row, nor a word in its notes, decides anything."""
    notes = {"model": "a name", "method": "LoRA", "notes": "nearest of those solved for"}
    (without,) = audit([{**MINE, **notes, "options": "", "quantity": "perplexity"}])
    assert (without.verdict, without.reason, without.solved) == ("not covered", "the row has no options", False)
    (with_,) = audit([{**MINE, **notes}])
    assert (with_.verdict, with_.reason, with_.solved) == ("differs", "", False)
    (said,) = audit([{**MINE, **notes, "status": "does not reproduce (solved)"}])
    assert (said.verdict, said.solved) == ("differs", True)


@pytest.mark.parametrize(("options", "message"), [
    ({"modle": "gpt2"}, "unknown option 'modle'; nearest: model"),
    ({"model": "gpt5"}, "unknown model 'gpt5'; nearest: gpt3, gpt2"),
    ({"model": {"model_type": "bart"}}, "no rule for the family model_type='bart' (nearest:"),
    ({"config": {"peft_type": "LROA"}}, "unknown peft_type 'LROA'; nearest: ROAD, LORA"),
    ({"config": {}}, "unknown peft_type None; there are LORA, IA3"),
    ({"config": {**LORA, "rank": 8}}, "the adapter uses options that LoraConfig"),
    ({"config": {**LORA, "target_modules": ["q_prj"]}}, "target_modules: no mod"),
    ({"only": "("}, "only='(' is not a regular expression"),
    ({"times": "2"}, "times must be a finite number, got '2'"),
    ({"sum": []}, "sum must not be empty"),
    ({"of": {"config": "frozen"}}, "of is 0, and nothing can be divided by it"),
    ({"ledger": {"precison": "mixed"}}, "memory_ledger() got an unexpected keyword argument 'precison'"),
    ({"ledger": {"model": "gpt3"}}, "memory_ledger() got multiple values for argument 'model'"),
    ({"ledger": {}, "line": "weights"}, "unknown line 'weights'; nearest:"),
    ({"ledger": {"seq_len": 8}, "line": "total", "config": ["head", "frozen"]}, "of several methods together a ledger"),
    ({"ledger": {"batch": 8}, "line": "total"}, "the ledger's batch has no effect without seq_len: leave it out"),
    ({"ledger": {"double_quantization": True}, "line": "total"}, "the ledger's double_quantization has no effect without"),
    ({"config": "head", "sum": [{}, {}]}, "config has no effect beside sum: leave it out, or put it into the terms"),
    ({"only": ".*", "sum": [{}, {}]}, "only has no effect beside sum: leave it out, or put it into the terms"),
    ({"sum": [{"model": "gpt2"}, {"model": "gpt3"}]}, "model has no effect beside sum, none of whose terms takes it"),
    ({"quantity": "total", "sum": [{"quantity": "stored"}, {"ledger": {}, "line": "total"}]}, "quantity has no effect beside sum, "),
    ({"only": ".*", "ledger": {}, "line": "total"}, "only has no effect beside ledger: leave it out"),
    ({"quantity": "total", "ledger": {}, "line": "total"}, "quantity has no effect beside ledger: leave it out"),
    ({"line": "total"}, "line has no effect in a count: leave it out"),
    ({"task": "QUESTION_ANS"}, "task has no effect without num_labels"),
    ({"code": {"quant_type": "nf4", "index": 1}}, "model has no effect beside code: leave it out"),
    ({"model": {"name": "gpt2", "n_layers": 3}}, "gpt2: its shapes do not depend on 'n_layers'; nearest: n_layer"),
    ({"only": "lm_head"}, r"only='lm_head' is the whole name of none of the trainable parameters; nearest: "),
    ({"only": ".*wte.*", "config": {**LORA}}, r"only='.*wte.*' is the whole name of none of the trainable parameters; "
     r"nearest: transformer.h.\d+.attn.c_attn.lora_A.weight, transformer.h.\d+.attn.c_attn.lora_B.weight"),
    ({"only": ".*lora.*", "quantity": "total"}, "only='.*lora.*' is the whole name of none of the total parameters"),
    ({"quantity": "share", "of": {"quantity": "total"}}, "of divides a share, which is trainable / total already"),
    ({"quantity": "share", "of": {}}, "of divides a share, which is trainable / total already"),
    ({"quantity": "share"}, "the unit 'K' is one of parameters, and the options compute a ratio; units of that: %, fraction"),
    ({"bytes": 4}, "the unit 'K' is one of parameters, and the options compute bytes; units of that: bytes, KiB, MiB"),
    ({"ledger": {}, "line": "total", "bytes": 2}, "bytes makes a size of parameters; these options compute bytes"),
    ({"bytes": "Q4_5"}, "unknown block format 'Q4_5'; nearest: Q4_"),
    ({"sum": [{}, {"bytes": 4}]}, "sum adds parameters and bytes"),
    ({"of": {"bytes": 4}}, "the unit 'K' is one of parameters, and the options compute what no unit measures"),
    ({"config": []}, "config must not be an empty list"),
    ({"config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "num_transformer_submodules": 2}},
     "num_transformer_submodules must be 1, as gpt2 has not both an encoder and a decoder, not 2"),
    ({"model": None, "quantize_4bit": {"blocksize": 63}, "line": "codes"}, "blocksize must be one of"),
    ({"config": {"peft_type": ["LORA"]}}, ""), ({"model": ["gpt2"]}, ""), ({"line": {}, "ledger": {}}, ""),
    ({"model": "x" * 5000}, ""), ({"times": 10**400}, "times must be a finite number"), ({"ledger": {"precision": []}}, ""),
    ({"model": None, "code": {"quant_type": [], "index": 0, "n": 1}}, "unknown argument of code"),
    ({"model": None, "code": {"quant_type": [], "index": 0}}, ""), ({"only": 5}, ""), ({"only": r"(\w|\w\w|\.)*[!#]"}, ""),
    ({"quantize_4bit": {"blocksize": []}, "line": "codes", "model": None}, ""),
    ({"model": {"model_type": "gpt2", "n_layer": 10**9}}, ""),
    ({"model": None, "code": {"quant_type": "nf5", "index": 0}}, "unknown quant_type 'nf5'; nearest: nf4"),
    ({"model": None, "code": {"quant_type": "nf4", "index": 16}}, "unknown index 16; there are 0, 1"),
])
def test_wrong_options_are_an_error_that_names_the_row(options, message):
    with pytest.raises(ValueError) as error:
        recompute({**MINE, "options": json.dumps({"model": "gpt2", **options})})
    assert str(error.value).startswith(f"row 'mine': {message}")


def test_a_file_that_is_no_such_table_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(FileError, match="no column id, quantity, unit"):
        read_published(path)
    path.write_text(write(tmp_path / "mine.csv").read_text() * 2)
    assert [f.verdict for f in audit(read_published(path))] == ["differs", "error", "error"]  # its heading again
    heading, row = write(tmp_path / "mine.csv").read_text().splitlines()
    for broken in (f"{row},more", row.partition(",")[0]):
        path.write_text(f"{heading}\n{broken}\n")
        (finding,) = audit(read_published(path))
        assert finding.reason.startswith("not as many fields as there are columns")
    path.write_bytes(b"\xff\xfe")
    for absent in (path, tmp_path / "absent.csv", tmp_path):
        with pytest.raises(FileError, match="cannot be read"):
            read_published(absent)


def test_a_table_from_a_spreadsheet_is_read(tmp_path):
    """With a byte order mark and Windows line ends, as Excel writes it."""
    text = write(tmp_path / "mine.csv").read_text()
    (tmp_path / "excel.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_published(tmp_path / "excel.csv") == read_published(tmp_path / "mine.csv")


def test_recompute_uses_the_rule_of_the_method_and_not_the_row():
    row = dict(ROWS["lora-gpt3-rqrv1"])
    options = json.loads(row["options"])
    options["config"]["r"] = 3
    assert recompute({**row, "options": json.dumps(options)}) == pytest.approx(3 * recompute(row))


def counted(model, config, quantity="trainable", **options):
    options = {"model": model, "config": config, "quantity": quantity, **options}
    return recompute({**MINE, "unit": "params", "options": json.dumps(options)})


PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5}
PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5}


def test_a_prompt_has_vectors_for_the_encoder_and_the_decoder_where_its_file_says_so():
    one = counted("t5-large", PROMPT)
    assert one == 5 * 1024
    for sides in ({"num_transformer_submodules": 2}, {"task_type": "SEQ_2_SEQ_LM"}):
        assert [counted("t5-large", {**PROMPT, **sides}, q) for q in ("trainable", "stored")] == [2 * one, 2 * one]
    for sides in ({"num_transformer_submodules": 1}, {"num_transformer_submodules": 1, "task_type": "SEQ_2_SEQ_LM"}):
        assert counted("t5-large", {**PROMPT, **sides}) == one
    prefix = counted("t5-large", PREFIX)
    assert counted("t5-large", {**PREFIX, "task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2}) == prefix
    assert counted("bert-base", {**PROMPT, "task_type": "SEQ_CLS"}) == 5 * 768
    for kind, head in (("bert-base", 768 * 3 + 3), ("gpt2", 768 * 3)):  # which PEFT trains beside it
        for task in ("SEQ_CLS", "TOKEN_CLS"):
            both = [counted(kind, {**PROMPT, "task_type": task}, q, num_labels=3) for q in ("trainable", "stored")]
            assert both == [5 * 768 + head] * 2
    for wrong in ({"task_type": "SEQ2SEQ"}, {"num_transformer_submodules": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            counted("t5-large", {**PROMPT, **wrong})


def test_adalora_counts_without_the_length_of_its_training():
    adalora = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 3, "target_modules": ["c_attn"]}
    expected = 12 * 4 * (768 + 1 + 2304)
    for total in ({}, {"total_step": None}, {"total_step": 100}):
        assert counted("gpt2", {**adalora, **total}) == expected


def test_a_ledger_of_several_methods_holds_what_each_adds():
    lora, ia3 = {**LORA, "target_modules": ["c_attn"]}, {"peft_type": "IA3"}

    def size(config, line="model states", model="gpt2"):
        options = {"model": model, "config": config, "ledger": {"precision": "mixed"}, "line": line}
        return recompute({**MINE, "unit": "bytes", "options": json.dumps(options)})

    n, added = 124_439_808, [counted("gpt2", config) for config in (lora, ia3)]
    assert size([lora, ia3], "frozen weights") == 2 * n
    assert size([lora, ia3]) == size([lora, ia3], "total") == 2 * n + 16 * sum(added)
    assert size(["head", ia3], "frozen weights") == size("head", "frozen weights")
    assert size([lora]) == size(lora) == 2 * n + 16 * added[0]


def test_lists_inside_a_message_of_names_are_short():
    """DeBERTa has dozens of names; the nearest are shown, as regular expressions that match them."""
    with pytest.raises(ValueError) as error:
        counted("deberta-v2-xxlarge", None, only="encoder.layer.3.attention.self.query.weight")
    named = str(error.value).partition("nearest: ")[2].split(", ")
    assert len(named) == 12 and r"encoder.layer.\d+.attention.self.query_proj.weight" in named
    assert counted("deberta-v2-xxlarge", None, only=named[0]) > 0
