"""minipeft dpo: pairs in, a model or an adapter out that prefers the chosen answers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from test_cli_reward import data, model, refused  # noqa: F401 fixtures

import minipeft as mp
from minipeft.cli import main


def dpo(output, *more) -> int:
    return main(["dpo", "--output", str(output), "--batch-size", "8", *map(str, more)])


def test_it_learns_to_prefer_the_chosen_answers(model, data, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "better"
    assert dpo(output, "--data", data, "--model", model, "--lr", 5e-3, "--epochs", 4) == 0
    told = json.loads((output / "dpo.json").read_text())
    assert told["accuracy"] == 1 and told["margin"] > 0 and told["loss"] < math.log(2)
    assert "prefers the chosen answer, more than at the start, in 100.0% of 8 held-out pairs" in capsys.readouterr().out
    first = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5), "the reference is the model as it was"
    tuned, tokenizer = mp.from_pretrained(output)
    base, _ = mp.from_pretrained(model)

    def gain(answer):
        ids = np.array([tokenizer.encode("The day was" + answer)])
        labels = np.where(np.arange(ids.shape[1]) < len(tokenizer.encode("The day was")), -100, ids)
        return float(
            (
                mp.rlhf.sequence_logprobs(tuned, ids, labels).data - mp.rlhf.sequence_logprobs(base, ids, labels).data
            ).item()
        )

    assert gain(" good.") > gain(" bad.")


def test_adapters_and_resuming(model, data, tmp_path, capsys):  # noqa: F811
    options = ("--data", data, "--model", model, "--steps", 4, "--lr", 1e-2)
    assert dpo(tmp_path / "a", *options, "--method", "lora") == 0
    assert "minipeft generate --adapter" in capsys.readouterr().out
    assert dpo(tmp_path / "b", *options, "--method", "lora", "--save-steps", 2) == 0
    assert dpo(tmp_path / "b", *options, "--method", "lora", "--save-steps", 2, "--resume") == 0
    both = [(tmp_path / d / "adapter_model.safetensors").read_bytes() for d in "ab"]
    assert both[0] == both[1]
    assert dpo(tmp_path / "c", *options, "--adapter", tmp_path / "a") == 0
    first = json.loads((tmp_path / "c" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_bad_input_is_one_sentence(model, data, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "out"
    assert "beta" in refused_usage(capsys, "dpo", "--data", data, "--beta", 0, "--output", output)
    assert "cannot be read" in refused(capsys, "dpo", "--data", tmp_path / "no.jsonl", "--output", output)
    assert "give one of them" in refused(
        capsys, "dpo", "--data", data, "--model", model, "--adapter", model, "--method", "lora", "--output", output
    )
    assert not output.exists()


def refused_usage(capsys, *argv):
    assert main([str(a) for a in argv]) == 2
    return capsys.readouterr().err
