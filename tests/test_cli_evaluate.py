"""minipeft evaluate: scores of files of every form, an adapter's, as JSON, and what is refused."""

import json
import os

import numpy as np
import pytest
from cli_helpers import jsonl, output, refused, reported, run, tiny

import minipeft as mp
from minipeft.evaluation import evaluate
from minipeft.text.datasets import read_dataset

ROWS = [{"prompt": f"What follows {i}?", "completion": f" {i + 1}"} for i in range(6)]
CHOICES = [
    {"question": f"After {i} comes", "choices": [str(i + 1), str(i + 5)], "answer": str(i + 1)} for i in range(4)
]
ALPACA = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(4)]
CHAT = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Hello {i}"}]} for i in range(3)
]
TEXT = [{"text": f"This is text number {i}, and it goes on."} for i in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", ROWS)


@pytest.mark.parametrize(
    "rows, names",
    [
        (ROWS, ["loss", "exact_match", "chrf"]),
        (ALPACA, ["loss", "exact_match", "chrf"]),
        (CHAT, ["loss", "exact_match", "chrf"]),
        (TEXT, ["loss"]),
        (CHOICES, ["acc", "acc_norm"]),
    ],
)
def test_the_scores_of_every_form_are_the_librarys(model, tmp_path, capsys, rows, names):
    pytest.importorskip("sacrebleu", reason="needs the extra 'hub'")
    file = jsonl(tmp_path / "a.jsonl", rows)
    options = {} if rows in (TEXT, CHOICES) else {"max_new_tokens": 5}
    expected = evaluate(*mp.from_pretrained(model), read_dataset(file), **options)
    found = reported(
        capsys, "evaluate", "--data", file, "--model", model, *(("--max-new-tokens", 5) if options else ())
    )
    assert list(found["scores"]) == names == list(expected.scores)
    for name, score in expected.scores.items():
        assert found["scores"][name] == score._asdict()
    assert found["details"] == json.loads(json.dumps(expected.details))
    assert (found["chance"] is None) == (rows is not CHOICES)


def test_the_table_shows_value_interval_chance_and_number(model, tmp_path, capsys):
    file = jsonl(tmp_path / "a.jsonl", CHOICES)
    json_file = tmp_path / "scores.json"
    status, out, err = output(capsys, "evaluate", "--data", file, "--model", model, "--json", json_file, "--limit", 3)
    found = json.loads(json_file.read_text())
    acc = found["scores"]["acc"]
    assert (status, err, found["records"]) == (0, "", 3)
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["3", "records"]
    assert lines[1] == ["acc", f"{acc['value']:.4f}", f"[{acc['low']:.4f},", f"{acc['high']:.4f}]"]
    assert lines[3] == ["chance", "0.5000"] and out.endswith(f"saved: {json_file}\n")


def test_an_adapter_is_asked_as_it_was_taught_and_scores_better(model, data, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    assert run("finetune", "--data", data, "--model", model, "--method", "lora", "--output", adapter, "--steps", 40, "--lr",
               "3e-2", "--validation", 0, "--template", "Q: {prompt}\nA:") == 0  # fmt: skip
    before = reported(
        capsys, "evaluate", "--data", data, "--model", model, "--loss-only", "--template", "Q: {prompt}\\nA:"
    )
    after = reported(capsys, "evaluate", "--data", data, "--adapter", adapter, "--loss-only")
    assert before["model"] == after["model"] == str(model), "the adapter's directory names it"
    assert before["template"] == after["template"] == "Q: {prompt}\nA:" and list(after["scores"]) == ["loss"]
    assert after["scores"]["loss"]["value"] < before["scores"]["loss"]["value"]
    base, tokenizer = mp.from_pretrained(model)
    tuned = mp.PeftModel.from_pretrained(base, adapter)
    own = evaluate(tuned, tokenizer, read_dataset(data), "Q: {prompt}\nA:", answers=False)
    assert after["scores"]["loss"] == own.scores["loss"]._asdict()
    choices = jsonl(tmp_path / "choices.jsonl", CHOICES)
    found = reported(capsys, "evaluate", "--data", choices, "--model", model, "--adapter", adapter)
    assert found["template"] is None, "multiple choice is asked as it is"
    other = reported(
        capsys, "evaluate", "--data", choices, "--model", model, "--adapter", adapter, "--template", "alpaca"
    )
    assert other["details"] != found["details"]


def test_a_metric_of_ones_own(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_metrics.py").write_text("def length(answer, expected):\n    return len(answer) - len(expected)\n")
    argv = ("evaluate", "--data", data, "--model", model, "--metric", "own_metrics:length", "--max-new-tokens", 3)
    found = reported(capsys, *argv)
    lengths = [len(own["answer"]) - len(own["expected"]) for own in found["details"]]
    assert found["scores"]["metric"]["value"] == pytest.approx(np.mean(lengths))
    assert "\nown_metrics:length" in output(capsys, *argv)[1]


def test_the_shipped_items(capsys, tmp_path):
    argv, file = ("evaluate", "--data", "general-cloze", "--limit", 8, "--batch-size", 8), tmp_path / "scores.json"
    status, out, _ = output(capsys, *argv, "--json", file)
    assert status == 0 and out.startswith("8 records\nacc") and out.endswith(f"0.2500\nsaved: {file}\n")
    assert json.loads(file.read_text())["model"] == "minipeft:base"


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--metric", "length"], "--metric length: must be MODULE:NAME"),
        (["--metric", "no_such:length"], "--metric no_such:length: cannot import no_such (ModuleNotFoundError"),
        (["--metric", "json:lenght"], "--metric json:lenght: json has no function 'lenght'"),
        (["--metric", "operator:sub"], "the metric fails on record 1: TypeError"),
        (["--limit", "0"], "--limit: must be an integer of at least 1"),
        (["--loss-only", "--metric", "operator:eq"], "metric is for answers that are generated"),
        (["--loss-only", "--temperature", "1"], "temperature is for answers"),
        (["--json", "no/such/file.json"], "--json no/such/file.json: there is no directory no/such"),
        (["--json", "."], "--json .: is a directory; name a file"),
        (["--json", "pipe"], "--json pipe: is a device, a pipe or an open file; name a file"),
        (["--max-length", "500"], "--max-length 500 is more than the 192 positions"),
        (["--max-new-tokens", "500"], "this model has 192 positions"),
        (["--template", "alpacca"], "alpaca"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--data", "general-close"], "general-close: a data set is a .jsonl or .txt file"),
        (["--data", "missing.jsonl"], "missing.jsonl: cannot be read"),
    ],
)
def test_what_is_refused(model, data, tmp_path, monkeypatch, capsys, argv, sentence):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    assert sentence in refused(capsys, "evaluate", "--data", data, "--model", model, *argv)


@pytest.mark.parametrize("rows, what", [(TEXT, "running text"), (CHOICES, "multiple choice")])
def test_options_that_do_nothing_with_the_records_are_refused(model, tmp_path, capsys, rows, what):
    argv = ("evaluate", "--data", jsonl(tmp_path / "a.jsonl", rows), "--model", model)
    assert f"--loss-only does nothing with {what}" in refused(capsys, *argv, "--loss-only")
    if rows is TEXT:
        assert "running text has none; leave it out" in refused(capsys, *argv, "--template", "alpaca")


def test_preference_pairs_are_no_answers(model, tmp_path, capsys):
    file = jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert f"{file}: preferences have no single right answer to score; minipeft reward and dpo tell" in refused(
        capsys, "evaluate", "--data", file, "--model", model
    )
