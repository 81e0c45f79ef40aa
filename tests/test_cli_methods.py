"""--method and its options: one set in every command, where the same name means the same adapter."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from cli_helpers import jsonl, refused, reported, run, tiny, weights, written
from test_cli_reward import PAIRS
from test_experiments_methods import wide

import minipeft as mp
from minipeft.cli import _parse
from minipeft.cli.method_options import given_options
from minipeft.hub.base import load_base
from minipeft.peft.methods import METHODS

COMMANDS = {
    "finetune": "--data d --output o", "sft": "--output o", "reward": "--output o", "dpo": "--output o",
    "ppo": "--output o", "compare": "", "count": "gpt2", "memory": "gpt2",
}  # fmt: skip
OPTIONS = ("-r", 2, "--alpha", 4, "--target", "q_proj", "v_proj", "--dropout", 0.1, "--set", "use_rslora=true")
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "use_rslora": True}
BOTTLENECK = ("--placement", "parallel", "--reduction", 4)
ADAPTERS = [key for key, method in METHODS.items() if method.kind not in (None, "head")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=96)


@pytest.fixture
def data(tmp_path):
    return jsonl(tmp_path / "data.jsonl", ({"prompt": f"{i} and", "completion": f" {i + 1}"} for i in range(12)))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_every_option(command, capsys):
    more = ["--exclude", "k_proj", "--layers", "0", "--modules-to-save", "norm", "--virtual-tokens", "3"]
    more += "--no-projection --hidden-size 8 --placement pfeiffer --bottleneck 4 --reduction 2".split()
    args = _parse([command, *COMMANDS[command].split(), *map(str, OPTIONS), *more, "--adapter-config", "path"])
    assert given_options(args) == {
        "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["k_proj"], "layers_to_transform": [0], "modules_to_save": ["norm"], "num_virtual_tokens": 3,
        "prefix_projection": False, "encoder_hidden_size": 8, "placement": "pfeiffer", "bottleneck_size": 4,
        "reduction_factor": 2, "set": ["use_rslora=true"],
    }  # fmt: skip
    assert args.adapter_config == "path" and re.search("-r( N)?, --rank N", helped(command, capsys))  # Python 3.13: -r, --rank N


def helped(command, capsys):
    capsys.readouterr()
    assert run(command, "--help") == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("method", "options"), [
    *((key, ()) for key in METHODS),
    ("lora", ("-r", 3, "--target", "c_attn")), ("lora", ("--set", "target_modules=null")), ("adalora", ("-r", 4)),
    ("bottleneck", BOTTLENECK), ("prefix", ("--virtual-tokens", 5, "--no-projection")),
    ("ia3", ("--modules-to-save", "ln_f")),
])  # fmt: skip
def test_what_count_counts_is_what_finetune_trains(method, options, data, tmp_path, capsys):
    mp.save_pretrained(wide("gpt2"), tmp_path / "base", load_base()[1])
    output, of = tmp_path / "out", ("--method", method, *options)
    assert run("finetune", "--model", tmp_path / "base", "--data", data, *of, "--steps", 3, "--output", output) == 0
    record, counted = written(output), reported(capsys, "count", tmp_path / "base", *of)
    assert record["parameters"] == {"trainable": counted["trainable"], "all": counted["total"]}
    assert record["options"]["method"] == method
    loss = record["held_out_loss"]
    assert np.isfinite([loss["before"], loss["after"]]).all() and loss["before"] != loss["after"]
    if method in ADAPTERS:  # and it can be had again from what was written
        assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == METHODS[method].kind
        packed = ("--method", "qlora") if method == "qlora" else ()
        again = reported(capsys, "count", tmp_path / "base", "--adapter-config", output, *packed)
        assert again["trainable"] == counted["trainable"] or method == "adalora"  # of which the file has the ranks left


def test_every_command_that_trains_makes_the_same_adapter(model, data, tmp_path, capsys):
    pairs = jsonl(tmp_path / "pairs.jsonl", PAIRS[:16])
    judge, prompts = tmp_path / "judge", jsonl(tmp_path / "prompts.jsonl", [{"prompt": "The day"}])
    training = ("--model", model, "--steps", 3, "--method", "lora", *OPTIONS)
    assert run("reward", *training, "--data", pairs, "--output", judge) == 0
    before, after = weights(model), weights(judge)
    moved = [name for name in after if name in before and not np.array_equal(before[name], after[name])]
    assert moved == [f"model.layers.{i}.self_attn.{m}_proj.weight" for i in (0, 1) for m in "qv"], "and the new head"
    few = ("--reward", judge, "--prompts", prompts, "--batch-size", 4, "--mini-batch-size", 4, "--response-length", 4)
    made = {}
    for command, *more in (
        ("finetune", "--data", data), ("sft", "--data", data), ("dpo", "--data", pairs), ("ppo", *few),
    ):  # fmt: skip
        assert run(command, *training, *more, "--output", tmp_path / command) == 0
        made[command] = json.loads((tmp_path / command / "adapter_config.json").read_text())
        assert {name: made[command][name] for name in LORA} == LORA
        assert written(tmp_path / command)["options"]["rank"] == 2
    assert made["finetune"] == made["sft"] == made["dpo"] == made["ppo"]
    told = capsys.readouterr().err
    rates = [f"learning rate {rate}" for rate in ("0.003", "0.003", "0.003", "0.0003", "0.0005")]
    assert [f"learning rate {part.split(',')[0].split()[0]}" for part in told.split("learning rate ")[1:]] == rates


def test_an_adapter_of_a_reward_model_must_merge_into_it(model, tmp_path, capsys):
    argv = ("reward", "--data", jsonl(tmp_path / "pairs.jsonl", PAIRS), "--model", model, "--output", tmp_path / "out")
    assert "it cannot be merged" in refused(capsys, *argv, "--method", "bottleneck")
    assert "is for task_type='CAUSAL_LM'" in refused(capsys, *argv, "--method", "prompt")
    assert not (tmp_path / "out").exists()
    assert run(*argv, "--method", "head", "--steps", 1) == 0


def test_compare_changes_an_option_in_the_methods_that_have_it(model, tmp_path, capsys):
    mp.get_peft_model(mp.from_pretrained(model)[0], mp.LoraConfig(r=1)).save_pretrained(tmp_path / "adapter")
    argv = ("compare", "--reduced", "--steps", 2, "--model", model, "--output", tmp_path / "out", "--methods", "full", "vera", "lora")
    assert run(*argv, "-r", 4, "--alpha", 2, "--adapter-config", tmp_path / "adapter") == 0
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    rows = {row["method"]: row for row in content["methods"]}
    assert [*rows] == ["frozen", "full", "vera", "lora", "LORA"]
    assert [row["title"] for row in rows.values()] == ["frozen", "full", "VeRA r=4", "LoRA r=4", "LORA"]
    for key, of in (("vera", ("--method", "vera", "-r", 4)), ("LORA", ("--adapter-config", tmp_path / "adapter"))):
        assert rows[key]["trainable"] == reported(capsys, "count", model, *of)["trainable"]
    assert content["settings"]["method_options"] == {"r": 4, "lora_alpha": 2}
    none = refused(capsys, *argv[:-4], "--methods", "full", "ia3", "-r", 4)
    assert "none of full and ia3 has an option --rank; there are --target" in none
    assert "none of full and head has options, so --rank means nothing" in refused(
        capsys, *argv[:-4], "--methods", "full", "head", "-r", 4
    )


@pytest.mark.parametrize(("command", "argv", "message"), [
    ("finetune", "--data {data} --method ia3 -r 4", "--method ia3 has no option --rank"),
    ("finetune", "--data {data} -r 4", "--method full has no options, so --rank means nothing there"),
    ("dpo", "--alpha 4", "--method full has no options, so --alpha means nothing there"),
    ("ppo", "--method lora --virtual-tokens 4", "--method lora has no option --virtual-tokens"),
    ("ppo", "--adapter x -r 4", "--rank does nothing with --adapter"),
    ("dpo", "--adapter x --adapter-config y", "--adapter-config does nothing with --adapter"),
    ("sft", "--method prompt --target q_proj", "--method prompt has no option --target"),
    ("sft", "--method lora --dropout 1", "--dropout: must be a number of at least 0 and below 1"),
    ("reward", "--adapter-config nowhere -r 4", "--adapter-config says everything about the method"),
    ("sft", "--method lora -r 1 --set r=3", "r is given twice, as 1 and as 3"),
    ("sft", "--method lora --set r=2 --set r=3", "r is given twice, as 2 and as 3"),
])  # fmt: skip
def test_an_option_without_effect_is_refused_by_name(command, argv, message, data, tmp_path, capsys):
    argv = argv.format(data=data).split()
    assert message in refused(capsys, command, *argv, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_is_resumed_with_the_same_options(model, data, tmp_path, capsys):
    argv = ("finetune", "--model", model, "--data", data, "--steps", 2, "--method", "lora", "--output", tmp_path / "o")
    assert run(*argv, "--alpha", 4) == 0
    assert run(*argv, "--alpha", 5, "--resume") == 2
    assert "is of a run with other options of the adapters" in capsys.readouterr().err
