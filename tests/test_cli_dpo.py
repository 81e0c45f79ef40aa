"""minipeft dpo: pairs in, a model or an adapter out that prefers the chosen answers."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from cli_helpers import jsonl, refused, run, written
from test_cli_reward import PAIRS, data, model  # noqa: F401 fixtures

import minipeft as mp


def dpo(output, *more) -> int:
    return run("dpo", "--output", output, "--batch-size", 8, *more)


def test_it_learns_to_prefer_the_chosen_answers(model, data, tmp_path, capsys, rendered):  # noqa: F811
    output = tmp_path / "better"
    assert dpo(output, "--data", data, "--model", model, "--lr", 5e-3, "--epochs", 4) == 0
    assert (output / "dpo.png").read_bytes()[:4] == b"\x89PNG"
    record = written(output)
    assert record["accuracy"] == 1 and record["margin"] > 0 and record["loss"] < math.log(2)
    assert "prefers the chosen answer, more than at the start, in 100.0% [67.6%, 100.0%] of 8 held-out pairs" in capsys.readouterr().out
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


@pytest.mark.parametrize("loss", ["ipo", "kto", "orpo", "simpo"])
def test_the_losses_beside_it(loss, model, data, tmp_path, capsys):  # noqa: F811
    output = tmp_path / loss
    assert dpo(output, "--data", data, "--model", model, "--lr", 5e-3, "--epochs", 2, "--loss", loss) == 0
    record, out = written(output), capsys.readouterr().out
    assert record["options"]["loss"] == loss and record["options"]["beta"] == (2.0 if loss == "simpo" else 0.1)
    assert record["after"]["loss"] < record["before"]["loss"]
    for side in ("chosen", "rejected"):
        before, after = (record[when][f"logps/{side}"] for when in ("before", "after"))
        assert f"log-probability, {side:8} {before:9.3f} -> {after:.3f}" in out
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert any("logps/chosen" in r for r in records) and any("eval_logps/rejected" in r for r in records)
    assert (output / "dpo.png").exists()


def test_kto_takes_answers_that_were_liked_or_not(model, tmp_path, capsys):  # noqa: F811
    rows = [{"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"} for p in PAIRS[::4]
            for side in ("chosen", "rejected")]  # fmt: skip
    liked = jsonl(tmp_path / "liked.jsonl", rows[1:])
    options = ("--data", liked, "--model", model, "--steps", 4)
    assert dpo(tmp_path / "out", *options, "--loss", "kto", "--undesirable-weight", 2) == 0
    assert "answers to the right side of the KL" in capsys.readouterr().out
    assert "preference pairs are wanted" in refused(capsys, "dpo", *options, "--output", tmp_path / "x")
    few = [{"prompt": f"Number {i}:", "completion": " yes", "label": i % 2 == 0} for i in range(10)]
    few = ("dpo", "--data", jsonl(tmp_path / "few.jsonl", few), "--model", model, "--loss", "kto", "--output", tmp_path / "x")
    assert "KTO needs two held-out answers at least, and --validation holds out one" in refused(capsys, *few)
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a", "completion": "b", "label": 1}')
    wrong = ("dpo", "--data", tmp_path / "wrong.jsonl", "--loss", "kto", "--output", tmp_path / "x")
    assert "field 'label' must be true (desirable) or false, got a number" in refused(capsys, *wrong)
    assert "preferences are not something to imitate" in refused(
        capsys, "finetune", "--data", liked, "--model", model, "--output", tmp_path / "x"
    )


def test_an_epoch_of_kto_has_both_answers_of_every_pair(model, data, tmp_path, capsys):  # noqa: F811
    assert dpo(tmp_path / "out", "--data", data, "--model", model, "--epochs", 1, "--batch-size", 4, "--loss", "kto") == 0
    record = written(tmp_path / "out")
    pairs = record["pairs"]
    assert (record["accuracy_of"], record["accuracy_interval"]) == ("held-out answers", None), "two answers depend on each other"
    assert f"{2 * pairs['training']} answers to learn from, {2 * pairs['held_out']} held out" in capsys.readouterr().err
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == math.ceil(2 * pairs["training"] / 4) and steps[-2]["epoch"] == 1.0


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (("--gamma", "1"), "--gamma does nothing with --loss sigmoid"),
        (("--loss", "orpo", "--undesirable-weight", "1"), "--undesirable-weight does nothing with --loss orpo"),
        (("--loss", "ipo", "--beta", "0"), "must be a number above 0"),
        (("--data", "no.jsonl"), "cannot be read"),
        (("--data", "{data}", "--columns", "chosen=better"), "there is no field 'better'"),
        (("--data", "{data}", "--adapter", "x", "--method", "lora"), "--method does nothing with --adapter"),
    ],
)
def test_bad_input_is_one_sentence(wrong, reason, data, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "out"
    assert reason in refused(capsys, "dpo", "--output", output, *(w.format(data=data) for w in wrong))
    assert not output.exists()
