"""minipeft dpo: pairs in, a model or an adapter out that prefers the chosen answers."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from cli_helpers import refused, run, written
from test_cli_reward import data, model  # noqa: F401 fixtures

import minipeft as mp


def dpo(output, *more) -> int:
    return run("dpo", "--output", output, "--batch-size", 8, *more)


def test_it_learns_to_prefer_the_chosen_answers(model, data, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "better"
    assert dpo(output, "--data", data, "--model", model, "--lr", 5e-3, "--epochs", 4) == 0
    record = written(output)
    assert record["accuracy"] == 1 and record["margin"] > 0 and record["loss"] < math.log(2)
    assert "prefers the chosen answer, more than at the start, in 100.0% of 8 held-out pairs" in capsys.readouterr().out
    first = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5), "the reference is the model as it was"
    tuned, tokenizer = mp.from_pretrained(output)
    base, _ = mp.from_pretrained(model)

    def gain(answer):
        ids = np.array([tokenizer.encode("The day was" + answer)])
        labels = np.where(np.arange(ids.shape[1]) < len(tokenizer.encode("The day was")), -100, ids)
        after, before = (mp.rlhf.sequence_logprobs(m, ids, labels).item() for m in (tuned, base))
        return after - before

    assert gain(" good.") > gain(" bad.")


def test_an_adapter_is_made_or_trained_further(model, data, tmp_path, capsys):  # noqa: F811
    options = ("--data", data, "--model", model, "--steps", 4, "--lr", 1e-2)
    assert dpo(tmp_path / "a", *options, "--method", "lora") == 0
    assert "minipeft generate --adapter" in capsys.readouterr().out
    assert dpo(tmp_path / "c", *options, "--adapter", tmp_path / "a") == 0
    first = json.loads((tmp_path / "c" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_plain_template_is_saved_too_where_the_base_has_another(model, data, tmp_path):  # noqa: F811
    base = tmp_path / "base"
    shutil.copytree(model, base)
    (base / "template.json").write_text('{"template": "alpaca"}')
    options = ("--data", data, "--model", base, "--steps", 1, "--method", "lora", "--template", "plain")
    assert dpo(tmp_path / "adapter", *options) == 0
    assert json.loads((tmp_path / "adapter" / "template.json").read_text()) == {"template": "plain"}


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (("--data", "{data}", "--beta", "0"), "--beta: must be a number above 0, not '0'"),
        (("--data", "no.jsonl"), "cannot be read"),
        (("--data", "{data}", "--adapter", "x", "--method", "lora"), "give one of them"),
        (("--data", "{data}", "--pairs", "5"), "--pairs does nothing with --data"),
        (("--max-length", "20"), "--max-length does nothing with generated pairs"),
    ],
)
def test_bad_input_is_one_sentence(wrong, reason, data, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "out"
    assert reason in refused(capsys, "dpo", "--output", output, *(w.format(data=data) for w in wrong))
    assert not output.exists()
