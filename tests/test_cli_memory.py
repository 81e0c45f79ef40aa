"""`minipeft memory`: the ledgers' numbers at the terminal, what fits where, and clear refusals."""

from __future__ import annotations

import pytest
from cli_helpers import output, refused, reported

import minipeft as mp
from minipeft.accounting import Loop, memory_ledger, ppo_ledger, pytorch_ledger, step_flops
from minipeft.accounting.loop import LOGITS
from minipeft.accounting.memory import LINES
from minipeft.cli.bars import MARKS, bar, size

OURS = ["--engine", "minipeft"]


def ours(capsys, *argv):
    """The record of --json, of this package's own engine."""
    return reported(capsys, "memory", *argv, *OURS)


def test_the_table_the_bar_and_what_it_fits_on(capsys):
    status, out, err = output(capsys, "memory", "llama-7b", "--method", "qlora", "--batch", 1, "--seq", 512, *OURS)
    assert (status, err) == (0, "")
    ledger = memory_ledger("llama-7b", mp.LoraConfig(target_modules="all-linear"), 1, 512, quantization="nf4")
    text = [" ".join(line.split()) for line in out.splitlines()]
    assert text[0] == "llama-7b (llama), qlora, in minipeft: training, batch 1 x 512 tokens, float32, adamw"
    for line, n in ledger.lines.items():
        assert any(row.startswith(f"{line} {n:,} {size(n)} ") for row in text), line
    assert f"sum {ledger.total:,} {size(ledger.total)}" in text
    assert "fits on: 12, 16, 24, 32, 40, 48, 80, 96, 141, 192 GB; not on 8 GB" in text
    bars = [line for line in out.splitlines() if line.startswith(MARKS[0] * 5)]
    assert len(bars) == 1 and len(bars[0]) == 72
    assert max(map(len, out.splitlines())) <= 90


def test_the_figures_of_qlora(capsys):
    """Dettmers et al. 2023: more than 780 GB in 16 bits, and one GPU of 48 GB."""
    record = ours(capsys, "llama-65b", "--precision", "bfloat16")
    assert record["total"] == 12 * 65_285_660_672 and record["fits_gb"] == []
    _, out, _ = output(capsys, "memory", "llama-65b", "--precision", "bfloat16", *OURS)
    assert "fits on: none of 8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192 GB (the sum is 4.1 times 192 GB)" in out
    options = "--method qlora -r 64 --seq 512 --precision bfloat16 --checkpointing"
    assert ours(capsys, "llama-65b", *options.split())["fits_gb"] == [48, 80, 96, 141, 192]
    options = "--method qlora -r 64 --seq 512 --optimizer paged_adamw"
    assert reported(capsys, "memory", "llama-65b", *options.split())["fits_gb"] == [48, 80, 96, 141, 192]


def test_the_options_reach_the_ledger(capsys):
    config = mp.LoraConfig(r=4, target_modules=["c_attn"])
    lora = ["gpt2", "--method", "lora", "-r", 4, "--target", "c_attn", "--batch", 2, "--seq", 64]
    for argv, options in (
        ([], {}),
        (["--optimizer", "sgd"], {"optimizer": "sgd"}),
        (["--optimizer", "adamw_8bit"], {"optimizer": "adamw_8bit"}),
        (["--precision", "mixed"], {"precision": "mixed"}),
        (["--checkpointing"], {"checkpointing": True}),
        (["--quantization", "nf4", "--plain-scales"], {"quantization": "nf4", "double_quantization": False}),
        (["--inference"], {"mode": "evaluate"}),
        (["--generate", 70], {"mode": "generate", "max_new_tokens": 70}),
    ):
        expected = memory_ledger("gpt2", config, 2, 64, **options)
        record = ours(capsys, *lora, *argv)
        assert record["lines"] == dict(expected.lines), argv
        assert record["total"] == expected.total
        assert record["activations_per_layer"] == list(expected.activations_per_layer)
    record = reported(capsys, "memory", *lora, "--ppo", 8, "--mini-batch", 1, "--value-model")
    expected = ppo_ledger("gpt2", config, 2, 64, 8, mini_batch=1, value_model=True)
    assert record["lines"] == dict(expected.lines)


def test_without_a_length_the_states_of_any_family(capsys):
    record = ours(capsys, "bert-base", "--precision", "mixed")
    assert record["total"] == 16 * 109_482_240
    _, out, _ = output(capsys, "memory", "bert-base", "--precision", "mixed", *OURS)
    assert "model states in mixed; give --seq for what the batch needs" in out


def test_a_pytorch_loop_is_what_is_shown_with_its_assumptions(capsys):
    argv = ["memory", "llama3-70b", "--method", "qlora", "--seq", 4096, "--batch", 4]
    status, out, err = output(capsys, *argv)
    assert (status, err) == (0, "")
    config = mp.LoraConfig(target_modules="all-linear")
    ledger = pytorch_ledger("llama3-70b", config, 4, 4096, Loop(quantization="nf4"))
    text = [" ".join(line.split()) for line in out.splitlines()]
    assert text[0] == "llama3-70b (llama), qlora, in PyTorch: training on a GPU, batch 4 x 4096 tokens"
    assert text[2].startswith("at the peak: the loss")
    for line, n in ledger.lines.items():
        assert n and any(row.startswith(f"{line} {n:,} {size(n)} ") for row in text), line
    assert not any(row.startswith("gradients 0") for row in text)
    record = reported(capsys, *argv)
    assert record["engine"] == "pytorch" and record["lines"] == dict(ledger.lines) and record["peak"] == "the loss"
    assert record["fits_gb"] == [96, 141, 192]
    every = [flag for assumed in record["assumptions"] for flag in assumed["options"]]
    assert len(every) == len({*every}) >= 17
    for assumed in record["assumptions"]:
        assert assumed["what"] in " ".join(text)
    for flag in every:  # each is an option, and changes the answer or what it says
        assert flag in output(capsys, "memory", "--help")[1]


@pytest.mark.parametrize(("argv", "changed"), [
    ("--precision float32", {"precision": "float32"}),
    ("--adapter-dtype bfloat16", {"adapters": "bfloat16"}),
    ("--optimizer adamw_8bit", {"optimizer": "adamw_8bit"}),
    ("--no-checkpointing", {"checkpointing": False}),
    ("--attention eager", {"attention": "eager"}),
    *((f"--logits {kind}", {"logits": kind}) for kind in LOGITS),
    ("--accumulation 4", {"accumulation": 4}),
    ("--quantization nf4", {"quantization": "nf4"}),
    ("--quantization nf4 --plain-scales --upcast", {"quantization": "nf4", "double_quantization": False, "upcast": True}),
    ("--gpus 4 --sharding zero3 --offload", {"gpus": 4, "sharding": "zero3", "offload": True}),
    ("--gpus 4 --sharding zero3 --reentrant", {"gpus": 4, "sharding": "zero3", "reentrant": True}),
    ("--headroom 0", {"headroom": 0.0}),
])  # fmt: skip
def test_each_assumption_has_an_option_that_reaches_the_ledger(capsys, argv, changed):
    lora = mp.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
    options = "--method lora -r 4 --target q_proj --dropout 0.1 --batch 2 --seq 512".split()
    record = reported(capsys, "memory", "llama-7b", *options, *argv.split())
    expected = pytorch_ledger("llama-7b", lora, 2, 512, Loop(dropout=0.1, **changed))
    assert record["lines"] == dict(expected.lines)


def test_what_becomes_of_experts_in_four_bits_is_said(capsys):
    options = "mixtral-8x7b --method qlora --target q_proj --seq 128".split()
    said = {}
    for more in ([], ["--pack-experts"], ["--upcast"]):
        record = reported(capsys, "memory", *options, *more)
        (said[" ".join(more)],) = [a["what"] for a in record["assumptions"] if a["options"] == ["--pack-experts"]]
        upcast, packed = "--upcast" in more, "--pack-experts" in more
        loop = Loop(quantization="nf4", upcast=upcast, pack_experts=packed)
        config = mp.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
        assert record["lines"] == dict(pytorch_ledger("mixtral-8x7b", config, 1, 128, loop).lines)
    assert said == {
        "": "experts, which are one array, in 16 bits, as transformers packs linear layers alone",
        "--pack-experts": "experts, which are one array, in nf4, too, as bitsandbytes.nn.parametrize packs them",
        "--upcast": "experts, which are one array, in 32 bits, as transformers packs linear layers alone",
    }  # fmt: skip
    assert not [
        a for a in reported(capsys, "memory", "gpt2", "--method", "qlora")["assumptions"] if "experts" in a["what"]
    ]


def test_what_a_method_keeps_and_is_not_counted_is_said(capsys):
    def said(method):
        record = reported(capsys, "memory", "gpt2", "--method", method, "--seq", 64)
        return [a["what"] for a in record["assumptions"] if "--engine" in a["options"]]

    assert said("loha") == ["of what loha itself keeps of a sequence, no more than LoRA's terms"]
    assert said("dora") and not any(map(said, ("lora", "qlora", "bitfit", "ln", "full")))


def test_what_fits(capsys):
    """The longest sequence and the largest batch: one more does not fit."""
    options = ["llama3-8b", "--method", "lora", "-r", 8, "--target", "q_proj"]
    lora = mp.LoraConfig(r=8, target_modules=["q_proj"])
    longest = reported(capsys, "memory", *options, "--fit", 24)
    assert longest["batch"] == 1 and longest["total"] <= 24e9 < pytorch_ledger("llama3-8b", lora, 1, longest["seq"] + 1).total
    largest = reported(capsys, "memory", *options, "--fit", 24, "--seq", 512)
    assert largest["seq"] == 512 and largest["total"] <= 24e9 < pytorch_ledger("llama3-8b", lora, largest["batch"] + 1, 512).total
    _, out, _ = output(capsys, "memory", *options, "--fit", 24)
    assert f"in 24 GB, the longest sequence at batch 1 is {longest['seq']:,} tokens" in out
    _, out, _ = output(capsys, "memory", "gpt2", "--fit", 24)
    assert "is 1,024 tokens, all positions that the model has" in out


def test_time_and_money(capsys):
    options = "llama-7b --batch 2 --seq 512 --card h100 --utilization 0.5 --tokens 1e9 --price 3 --gpus 4".split()
    record = reported(capsys, "memory", *options)
    flops = step_flops("llama-7b", None, 2, 512)
    assert record["flops"] == flops.total and record["seconds"] == flops.total / (989e12 * 0.5)
    assert record["tokens_per_second"] == pytest.approx(4 * 1024 / record["seconds"])
    assert record["hours"] == pytest.approx(1e9 / record["tokens_per_second"] / 3600)
    assert record["cost"] == pytest.approx(record["hours"] * 4 * 3)
    _, out, _ = output(capsys, "memory", *options)
    assert f"GPU hours at 3: {record['cost']:,.2f}" in out
    assert "cost" not in reported(capsys, "memory", "llama-7b", "--seq", 512)  # no price is built in


@pytest.mark.parametrize(("argv", "message"), [
    ("lama-7b", "unknown model 'lama-7b'; nearest: llama-7b"),
    ("gpt2 --method qlorra", "did you mean qlora"),
    ("gpt2 --precision fp8", "unknown value of --precision 'fp8'"),
    ("gpt2 --generate 8", "give their length, --seq"),
    ("gpt2 --seq 2048", "1024 positions"),
    ("gpt2 --seq 64 --quantization nf4", "weights in four bits are frozen"),
    ("gpt2 --seq 64 --plain-scales", "--plain-scales does nothing without weights in four bits"),
    ("gpt2 --seq 64 --mini-batch 2", "--mini-batch does nothing without --ppo"),
    ("gpt2 --seq 64 --inference --generate 4", "--inference and --generate exclude each other: give one of them"),
    ("gpt2 --seq 64 --inference --checkpointing", "--checkpointing does nothing with --inference, which trains nothing"),
    ("gpt2 --seq 64 --generate 4 --optimizer sgd", "--optimizer does nothing with --generate, which trains nothing"),
    ("gpt2 --batch 4", "--batch does nothing without --seq, the length of the sequences"),
    ("gpt2 --checkpointing", "--checkpointing does nothing without --seq, the length of the sequences"),
    ("bert-base --seq 64 --engine minipeft", "activations are known of the families this package builds"),
    ("gpt2 --batch 0", "of at least 1, not '0'"),
    ("gpt2 --seq 64 --gpus 2 --engine minipeft", "--gpus does nothing with --engine minipeft"),
    ("gpt2 --seq 64 --fit 8 --engine minipeft", "--fit does nothing with --engine minipeft"),
    ("gpt2 --seq 64 --ppo 8 --engine pytorch", "--ppo is of this package's own engine"),
    ("gpt2 --seq 64 --precision float16-base", "precision must be one of bfloat16, mixed"),
    ("gpt2 --seq 64 --precision autocast --engine minipeft", "precision must be one of float32, mixed"),
    ("gpt2 --seq 64 --optimizer adafactor --engine minipeft", "optimizer must be one of adamw"),
    ("gpt2 --seq 64 --sharding zero3", "sharding='zero3' needs several GPUs"),
    ("gpt2 --seq 64 --upcast", "--upcast does nothing without weights in four bits"),
    ("gpt2 --seq 64 --pack-experts", "--pack-experts does nothing without weights in four bits"),
    ("gpt2 --seq 64 --method qlora --pack-experts", "--pack-experts is of experts in one array, and gpt2 has none"),
    ("gpt2 --seq 64 --gpus 2 --reentrant", "--reentrant does nothing without --sharding zero3 and checkpoints"),
    ("gpt2 --seq 64 --cache-bits 8", "--cache-bits does nothing without --generate"),
    ("gpt2 --seq 8 --generate 3 --cache-bits 3", "unknown value of --cache-bits 3 (known: 4, 8, 16)"),
    ("gpt2 --seq 32 --ppo 8 --batch 8 --mini-batch 3", "--mini-batch must divide the batch, 8; got 3"),
    ("gpt2 --seq 32 --ppo 8 --mini-batch 8", "--mini-batch must divide the batch, 1; got 8"),
    ("gpt2 --seq 64 --method frozen --tokens 1e6", "--tokens does nothing with --method frozen"),
    ("gpt2 --seq 64 --method frozen --optimizer sgd", "--optimizer does nothing with --method frozen"),
    ("gpt2 --seq 64 --adapter-dtype bfloat16", "--adapter-dtype does nothing with --method full"),
    ("gpt2 --seq 64 --price 2", "--price is of an hour: give --tokens too"),
    ("gpt2 --card h100", "--card does nothing without --seq"),
    ("gpt2 --seq 64 --inference --tokens 9", "--tokens does nothing with --inference"),
    ("gpt2 --seq 64 --batch 2 --fit 8", "--fit looks for the batch or for the length"),
    ("llama-7b --fit 8", "not even one fits in 8 GB: 71.2 GB are needed at least (optimizer step)"),
    ("gpt2 --seq 1000 --generate 50", "gpt2 has 1024 positions"),
    ("gpt2 --num-labels 2 --method lora --seq 16 --engine minipeft",
     "(gpt2, llama, mistral, qwen2) with a language model's head; gpt2 with 2 classes, of the family gpt2, is none of these"),
    ("gpt2 --method prefix --virtual-tokens 20 --seq 1024", "20 virtual tokens leave 1004 of them"),
    ("mixtral-8x7b --seq 64 --engine minipeft", "mixtral-8x7b, of the family mixtral, is none of these: leave seq_len out (--seq)"),
    ("gpt2 --method prompt --virtual-tokens 20 --seq 1024", "20 virtual tokens leave 1004 of them"),
    ("gpt2 --method prompt --virtual-tokens 1024 --fit 24", "1024 virtual tokens leave none"),
])
def test_a_mistake_is_one_line_and_exit_status_2(capsys, argv, message):
    assert message in refused(capsys, "memory", *argv.split())


def test_sizes_and_bars_are_readable():
    assert [size(n) for n in (0, 999, 1000, 12_345, 34_459_071_552, 10**12, 2.5e15)] == [
        "0 B", "999 B", "1 kB", "12.3 kB", "34.5 GB", "1 TB", "2,500 TB",
    ]  # fmt: skip
    lines = bar({"a": 3, "b": 1, "nothing": 0}).plain.splitlines()
    assert lines[0] == MARKS[0] * 54 + MARKS[1] * 18
    assert lines[1:] == [f"{MARKS[0]} a 3", f"{MARKS[1]} b 1", f"{MARKS[2]} nothing 0"]
    assert bar({"all": 0}).plain.splitlines()[0] == ""
    assert len(set(MARKS)) == len(MARKS) >= len(LINES), "no two lines of a ledger look alike"
