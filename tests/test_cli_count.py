"""`minipeft count`: published counts at the terminal, and every wrong word named with the nearest right one."""

from __future__ import annotations

import json
import math

import pytest
from cli_helpers import output, refused, reported

import minipeft as mp
from minipeft.accounting import architecture, count_parameters
from minipeft.accounting.counted import COUNTED, counted_config
from minipeft.cli import main
from minipeft.peft.methods import METHODS


def test_the_table_the_sums_and_the_bar(capsys):
    status, out, err = output(capsys, "count", "llama-7b", "--method", "lora", "-r", 8, "--target", "q_proj", "v_proj")
    assert (status, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "llama-7b (llama), lora"
    for row in (
        "model.layers.*.self_attn.q_proj.lora_A.weight 8 x 4096 32 1,048,576",
        "model.layers.*.self_attn.v_proj.lora_B.weight 4096 x 8 32 1,048,576",
        "trained 4,194,304 0.0622% of all",
        "stored 4,194,304 16.8 MB a task in float32, 8.39 MB in 16 bits",
        "total 6,742,609,920 13.5 GB in 16 bits",
        "█ trained 4,194,304",
        "▓ frozen 6,738,415,616",
    ):
        assert row in lines
    assert max(map(len, out.splitlines())) <= 80


def test_the_bar_is_divided_as_the_parameters_are(capsys):
    _, out, _ = output(capsys, "count", "gpt2", "--method", "head")
    bar = next(line for line in out.splitlines() if line.startswith("█" * 3))
    head, gpt2 = 50257 * 768, 124_439_808
    assert (bar.count("█"), bar.count("▓")) == (round(72 * head / (gpt2 + head)), round(72 * gpt2 / (gpt2 + head)))


@pytest.mark.parametrize(("argv", "trainable"), [
    ("gpt2", 124_439_808),
    ("gpt2 --method frozen", 0),
    # Hu et al. 2021, table 4: LoRA of q and v, r = 1, in GPT-3
    ("gpt3 --method lora -r 1 --target c_attn --set enable_lora=[true,false,true]", 4_718_592),
    # Lester et al. 2021, table 4: a prompt of 100 in T5 XXL
    ("t5v1.1-xxl --method prompt --virtual-tokens 100", 409_600),
    # Houlsby et al. 2019, size 64 in BERT-base
    ("bert-base --method bottleneck --placement houlsby --bottleneck 64", 2_379_264),
    # PEFT's MetaMathQA comparison on Llama-3.2-3B
    ("llama3.2-3b --method ia3", 286_720),
    ("gpt2 --method oft -r 8", 12 * 8 * (3 * 96 * 95 + 384 * 383) // 2),
    ("llama3.2-3b --method loha -r 32 --alpha 6 --set target_modules=null", 18_350_080),
    ("llama3.2-3b --method ln", 175_104),
    ("llama3.2-3b --method prefix --virtual-tokens 200 --no-projection", 11_468_800),
    ("llama3.2-3b --method p-tuning", 28_382_208),
    ("llama3.2-3b --method lora -r 32 --target q_proj v_proj", 9_175_040),
    ("llama3.2-3b --method lora -r 32 --set target_modules=null", 9_175_040),
    # biases of BERT, with the pooler's
    ("bert-base --method bitfit", 102_912),
    ("roberta-base --num-labels 3 --method lora --target query value --modules-to-save classifier", 294_912 + 592_899),
    ("gpt2 --method lora --layers 0 1", 2 * 8 * (768 + 2304 + 768 + 768 + 768 + 3072 + 3072 + 768)),
    ("gpt2 --method lora --target c_attn c_fc c_proj --layers 0 1 --exclude mlp.c_proj",
     2 * 8 * (768 + 2304 + 768 + 768 + 768 + 3072)),
])  # fmt: skip
def test_published_counts(capsys, argv, trainable):
    assert reported(capsys, "count", *argv.split())["trainable"] == trainable


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_package_can_be_counted(capsys, method):
    record = reported(capsys, "count", "gpt2", "--method", method)
    assert 0 < record["trainable"] <= record["total"]
    assert record["share"] == record["trainable"] / record["total"]
    if record["parameters"]:
        assert sum(math.prod(s) for s in record["parameters"].values()) == record["trainable"]


def test_methods_differ_as_they_should(capsys):
    lora, dora = (reported(capsys, "count", "gpt2", "--method", method)["trainable"] for method in ("lora", "dora"))
    assert dora - lora == 12 * (2304 + 768 + 3072 + 768)  # a magnitude for each output
    assert reported(capsys, "count", "gpt2", "--method", "qlora")["trainable"] == lora
    assert reported(capsys, "count", "gpt2", "--method", "adalora", "-r", 4)["trainable"] == 12 * 6 * (5 * 768 + 2304 + 2 * 3072 + 4)
    projected = reported(capsys, "count", "gpt2", "--method", "prefix", "--hidden-size", 512)
    assert projected["stored"] == 20 * 2 * 12 * 768 < projected["trainable"]


def test_a_configuration_file_and_a_model_directory(capsys, tmp_path):
    config = mp.TransformerConfig.llama(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = mp.Transformer(config, seed=0)
    mp.save_pretrained(model, tmp_path / "model")
    adapter = mp.LoraConfig(r=2, target_modules=["up_proj"])
    mp.get_peft_model(model, adapter).save_pretrained(tmp_path / "adapter")
    expected = count_parameters(config, adapter)
    for path in (tmp_path / "model", tmp_path / "model" / "config.json"):
        record = reported(capsys, "count", path, "--adapter-config", tmp_path / "adapter")
        assert (record["trainable"], record["total"]) == (expected.trainable, expected.total)
        assert record["method"] == "LORA"  # as the file says
    _, out, _ = output(capsys, "count", path, "--adapter-config", tmp_path / "adapter")
    assert "(llama), LORA\n" in out


FILES = {  # options beside the class's own, where LLaMA's widths or the class ask for them
    "ADAPTION_PROMPT": {"adapter_len": 10, "adapter_layers": 30},
    "BOFT": {"boft_block_size": 8, "target_modules": ["q_proj"]},
    "OFT": {"peft_version": "0.21.2", "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("kind", [*COUNTED, "LOHA", "VERA", "OFT"])
def test_a_files_method_may_be_one_that_is_counted_and_not_trained(capsys, tmp_path, kind):
    written = {"peft_type": kind, "inference_mode": True, **FILES.get(kind, {"target_modules": ["q_proj", "v_proj"]})}
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    arch = architecture("llama-7b")
    expected = count_parameters(arch, counted_config({**written, "inference_mode": False}, arch))
    record = reported(capsys, "count", "llama-7b", "--adapter-config", tmp_path)
    assert (record["trainable"], record["stored"], record["method"]) == (expected.trainable, expected.stored, kind)
    assert sum(math.prod(shape) for shape in record["parameters"].values()) == record["trainable"] > 0
    states = reported(capsys, "memory", "llama-7b", "--adapter-config", tmp_path)["lines"]
    assert states["gradients"] == 4 * expected.trainable
    if kind in COUNTED:
        sentence = f"of {kind}, weights, gradients and states are known here, and not what it keeps of a sequence"
        for more in (["--seq", 128], ["--fit", 24], ["--seq", 128, "--engine", "minipeft"]):
            assert sentence in refused(capsys, "memory", "llama-7b", "--adapter-config", tmp_path, *more)


@pytest.mark.parametrize(("written", "message"), [
    ({"peft_type": "FOURIERFT", "n_frequencies": 3}, "options that FourierFTConfig does not have: n_frequencies=3"),
    ({"peft_type": "ADAPTION_PROMPT", "adapter_len": 10}, "lacks adapter_layers, which AdaptionPromptConfig needs"),
    ({"peft_type": "HRA", "r": "8"}, "r must be an integer of at least 1, got '8'"),
    ({"peft_type": "C3A", "block_size": 100}, "block_size must divide its inputs and outputs, and 100 does not divide 2304"),
    ({"peft_type": "SHRIA"}, "the method 'SHRIA' is not one of LORA"),
    ({"r": 8}, "not an adapter's configuration (no peft_type)"),
])
@pytest.mark.parametrize("command", ["count", "memory"])
def test_a_wrong_file_is_one_line(capsys, tmp_path, command, written, message):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": ["c_attn"]} | written))
    assert message in refused(capsys, command, "gpt2", "--adapter-config", tmp_path)


@pytest.mark.parametrize(("argv", "message"), [
    ("lama-7b", "unknown model 'lama-7b'; nearest: llama-7b"),
    ("llama-3", "'llama-3' is not one model: there are llama3-8b, llama3-70b, llama3.1-8b"),
    ("gpt2 --method lorra", "unknown value of --method 'lorra'; did you mean lora"),
    ("gpt2 --method ia3 -r 8", "--method ia3 has no option --rank; there are --target"),
    ("gpt2 --method full -r 8", "--method full has no options, so --rank means nothing there"),
    ("gpt2 --method lora --target c_atn", "no module is called 'c_atn'; nearest: c_attn"),
    ("gpt2 --method lora --set use_dorra=1", "--method lora has no option 'use_dorra'; did you mean"),
    ("gpt2 --method lora -r 1000", "a rank of 1000 is larger than the matrix"),
    ("gpt2 --method lora -r 0", "of at least 1, not '0'"),
    ("gpt2 --method bottleneck --placement above", "placement must be one of houlsby, pfeiffer"),
    ("gpt2 --method bottleneck --bottleneck 8 --reduction 4", "--reduction divides another by it: give one of them"),
    ("gpt2 --method prefix --hidden-size 64 --no-projection", "the MLP that computes a prefix: leave --no-projection out"),
    ("llama-7b --method bitfit", "BitFitConfig trains nothing of llama-7b"),
    ("bert-base --method head", "bert-base has no language-model head"),
    ("gpt2 --adapter-config nowhere", "nowhere"),
    ("gpt2 --adapter-config nowhere -r 8", "--adapter-config says everything about the method; leave --rank out"),
    ("gpt2 --adapter-config nowhere --method lora", "--adapter-config says everything about the method; leave --method out"),
    ("gpt2 --methud lora", "unknown option '--methud'; did you mean --method"),
    ("", "required: MODEL"),
])
def test_a_mistake_is_one_line_and_exit_status_2(capsys, argv, message):
    assert message in refused(capsys, "count", *argv.split())


@pytest.mark.parametrize("command", ["count", "memory"])
def test_the_models_are_listed_by_family(capsys, command):
    status, out, err = output(capsys, command, "--models")
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    assert "Mixtral\n  mixtral-8x7b, mixtral-8x22b\n" in out
    listed = [name for line in out.splitlines() if line.startswith(" ") for name in line.strip(" ,").split(", ")]
    assert listed == mp.accounting.architectures.names()


def test_a_name_on_the_hub_is_answered_with_the_models_own(capsys):
    record = reported(capsys, "count", "meta-llama/Llama-3.1-8B-Instruct", "--method", "frozen")
    assert (record["model"], record["total"]) == ("llama3.1-8b", 8_030_261_248)


@pytest.mark.parametrize("command", ["count", "memory"])
def test_help_has_examples_that_run(capsys, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    examples = [line.split()[1:] for line in lines if line.startswith(f"  minipeft {command} ")]
    assert len(examples) >= 5
    for argv in examples:
        assert "path/to" in argv[1] or main(argv) == 0
