"""`minipeft memory`: the ledger's numbers at the terminal, what fits where, and clear refusals."""

from __future__ import annotations

import pytest
from cli_helpers import output, refused, reported

import minipeft as mp
from minipeft.accounting import memory_ledger, ppo_ledger
from minipeft.cli.bars import MARKS, bar, size


def test_the_table_the_bar_and_what_it_fits_on(capsys):
    status, out, err = output(capsys, "memory", "llama-7b", "--method", "qlora", "--batch", 1, "--seq", 512)
    assert (status, err) == (0, "")
    ledger = memory_ledger("llama-7b", mp.LoraConfig(target_modules="all-linear"), 1, 512, quantization="nf4")
    text = [" ".join(line.split()) for line in out.splitlines()]
    assert text[0] == "llama-7b (llama), qlora: a training step, batch 1 x 512 tokens, float32, adamw"
    for line, n in ledger.lines.items():
        assert any(row.startswith(f"{line} {n:,} {size(n)} ") for row in text), line
    assert f"sum {ledger.total:,} {size(ledger.total)}" in text
    assert out.rstrip().endswith("fits on: 16 GB, 24 GB, 48 GB, 80 GB; not on 8 GB")
    bars = [line for line in out.splitlines() if line.startswith(MARKS[0] * 5)]
    assert len(bars) == 1 and len(bars[0]) == 72
    assert max(map(len, out.splitlines())) <= 80


def test_the_figures_of_qlora(capsys):
    """Dettmers et al. 2023: more than 780 GB in 16 bits, and one GPU of 48 GB."""
    record = reported(capsys, "memory", "llama-65b", "--precision", "bfloat16")
    assert record["total"] == 12 * 65_285_660_672 and record["fits_gb"] == []
    _, out, _ = output(capsys, "memory", "llama-65b", "--precision", "bfloat16")
    assert "fits on: none of 8, 16, 24, 48, 80 GB (the sum is 9.8 times 80 GB)" in out
    options = "--method qlora -r 64 --seq 512 --precision bfloat16 --checkpointing"
    assert reported(capsys, "memory", "llama-65b", *options.split())["fits_gb"] == [48, 80]


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
        record = reported(capsys, "memory", *lora, *argv)
        assert record["lines"] == dict(expected.lines), argv
        assert record["total"] == expected.total
        assert record["activations_per_layer"] == list(expected.activations_per_layer)
    record = reported(capsys, "memory", *lora, "--ppo", 8, "--mini-batch", 1, "--value-model")
    expected = ppo_ledger("gpt2", config, 2, 64, 8, mini_batch=1, value_model=True)
    assert record["lines"] == dict(expected.lines)


def test_without_a_length_the_states_of_any_family(capsys):
    record = reported(capsys, "memory", "bert-base", "--precision", "mixed")
    assert record["total"] == 16 * 109_482_240
    _, out, _ = output(capsys, "memory", "bert-base", "--precision", "mixed")
    assert "model states in mixed; give --seq for what the batch needs" in out


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
    ("bert-base --seq 64", "activations are known of the families this package builds"),
    ("gpt2 --batch 0", "of at least 1, not '0'"),
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
