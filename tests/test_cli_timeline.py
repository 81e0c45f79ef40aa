"""`minipeft memory --timeline`: a page that holds everything it shows, a trace, and clear refusals."""

from __future__ import annotations

import base64
import json
import re

import pytest
from cli_helpers import output, refused, reported, tiny

from minipeft.cli.bars import size

LORA = ("gpt2", "--method", "lora", "-r", 4, "--target", "c_attn", "--seq", 1024)


def test_the_page_holds_the_timeline_and_the_what_ifs(capsys, tmp_path):
    path = tmp_path / "step.html"
    status, out, err = output(capsys, "memory", *LORA, "--batch", 2, "--timeline", path)
    assert (status, err) == (0, "") and f"timeline of minipeft's own step: {path}" in out
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"<script|<link rel=\"stylesheet|(src|href)=\"(?!data:)|url\(|@import", text), "no network"
    assert "gpt2 (gpt2), lora" in text and "batch 2 x 1024 tokens, float32, adamw" in text
    assert "the step of minipeft's own engine" in text.replace("&#39;", "'")
    record = reported(capsys, "memory", *LORA, "--batch", 2, "--timeline", tmp_path / "step.json")
    assert f"{record['total']:,}" in text and record["timeline"]["peak"] == record["total"]
    assert f"the peak is in {record['timeline']['op']}" in out
    pictures = [base64.b64decode(found) for found in re.findall(r"data:image/svg\+xml;base64,([^\"]+)\"", text)]
    assert len(pictures) == 8 and all(b"</svg>" in picture for picture in pictures)
    for name in ("as asked", "rank 2", "rank 8", "length 512", "checkpointing", "adamw_8bit", "sgd"):
        assert f"<b>{name}: " in text
    assert "length 2048: the sequence reaches position 2047" in text
    assert f"<b>as asked: {size(record['total'])}</b>" in text
    assert "transformer.h.*.attn.c_attn" in text and path.stat().st_size < 2_000_000


def test_the_trace_is_the_timeline_of_the_same_options(capsys, tmp_path):
    path = tmp_path / "step.json"
    argv = "gpt2 --method qlora --batch 2 --seq 64 --checkpointing --optimizer sgd --plain-scales".split()
    record = reported(capsys, "memory", *argv, "--timeline", path)
    trace = json.loads(path.read_text(encoding="utf-8"))
    assert trace["otherData"]["peak"]["bytes"] == record["total"]
    assert trace["otherData"]["lines at the peak"] == record["lines"]
    assert record["timeline"]["bytes"] == path.stat().st_size
    assert record["timeline"]["events"] == sum(event.get("cat") == "op" for event in trace["traceEvents"])


def test_a_step_that_is_run_is_drawn_beside_the_prediction(capsys, tmp_path):
    model = tiny(tmp_path / "model")
    argv = ("memory", model, "--batch", 4, "--seq", 128, "--measure", "--timeline")
    status, out, _ = output(capsys, *argv, tmp_path / "step.html")
    assert status == 0 and "measured, the peak is" in out and "the largest difference of an op is" in out
    text = (tmp_path / "step.html").read_text(encoding="utf-8")
    assert "As measured, the peak is" in text and "tracemalloc" in text
    record = reported(capsys, *argv, tmp_path / "step.json")
    measured = record["timeline"]["measured"]
    assert measured["peak"] == pytest.approx(record["total"], rel=0.10)  # whatever the threads do at the same moment
    assert abs(measured["largest_difference"]) < 0.10 * record["total"]


@pytest.mark.parametrize(("argv", "message"), [
    ("gpt2 --seq 64 --timeline step.txt", "a timeline is a page, .html, or a trace, .json"),
    ("gpt2 --timeline step.html", "give their length, --seq"),
    ("gpt2 --seq 64 --inference --timeline step.html", "--timeline is of a training step: leave --inference out"),
    ("gpt2 --seq 64 --ppo 8 --timeline step.html", "--timeline is of a training step: leave --ppo out"),
    ("gpt2 --seq 64 --method frozen --timeline step.html", "nothing of the model is trained"),
    ("gpt2 --seq 64 --timeline nowhere/step.html", "there is no directory nowhere"),
    ("gpt2 --seq 64 --measure", "--measure does nothing without --timeline"),
    ("gpt2 --seq 64 --precision mixed --timeline step.json --measure", "a step is run in float32"),
    ("llama-65b --seq 64 --timeline step.json --measure", "and this machine has"),
    ("bert-base --seq 64 --timeline step.html", "activations are known of the families this package builds"),
    ("model --seq 64 --timeline model/step.html", "--timeline model/step.html lies in MODEL model, which is read"),
    ("model/config.json --seq 64 --timeline model/config.json", "is MODEL model/config.json, which is read"),
    ("model --seq 64 --timeline directory.html", "--timeline directory.html: is a directory; name a file"),
])
def test_a_mistake_is_one_line_and_leaves_no_file(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "model")
    (tmp_path / "directory.html").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert message in refused(capsys, "memory", *argv.split())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
