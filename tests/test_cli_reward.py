"""minipeft reward: from the user's pairs to a directory that PPO optimizes and transformers loads."""

from __future__ import annotations

import json

import pytest

import minipeft as mp
from minipeft.cli import main
from minipeft.hub.base import load_base

GOOD, BAD = ["good", "fine", "happy", "glad"], ["bad", "poor", "sad", "evil"]
PAIRS = [
    {"prompt": f"The {noun} was", "chosen": f" {good}.", "rejected": f" {bad}."}
    for noun in ("day", "man", "house", "king", "book") for good in GOOD for bad in BAD
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tiny, randomly initialised model and the shipped tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    _, tokenizer = load_base()
    config = mp.TransformerConfig.llama(
        vocab_size=2048, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    mp.save_pretrained(mp.Transformer(config, seed=1), path, tokenizer)
    return path


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    return path


def reward(output, *more) -> int:
    return main(["reward", "--output", str(output), "--batch-size", "8", "--lr", "0.02", *map(str, more)])


def refused(capsys, *argv) -> str:
    """The one line on standard error of a command that is refused."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("minipeft: error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_it_learns_the_users_pairs_and_saves_a_calibrated_classifier(model, data, tmp_path, capsys):
    output = tmp_path / "judge"
    assert reward(output, "--data", data, "--model", model, "--epochs", 4) == 0
    out = capsys.readouterr().out
    told = json.loads((output / "reward.json").read_text())
    assert told["accuracy"] > 0.9 and f"{told['accuracy']:.1%}" in out and f"minipeft ppo --reward {output}" in out
    assert told["pairs"] == {"training": 72, "held_out": 8}
    judge, tokenizer = mp.rlhf.RewardModel.from_pretrained(output)
    texts = [[*tokenizer.encode(f"The day was {word}."), tokenizer.eos_token_id] for word in ("good", "bad")]
    good, bad = judge.score_texts(texts)
    assert good > 0 > bad and good - bad > 0.5, "mean 0 and deviation 1 on what it was trained on"
    assert (output / "reward.png").read_bytes()[:4] == b"\x89PNG" and (output / "metrics.jsonl").exists()
    plain, _ = mp.from_pretrained(output)
    assert isinstance(plain, mp.SequenceClassifier) and plain.num_labels == 1


def test_made_pairs_need_nothing_but_the_extra(model, tmp_path, capsys, monkeypatch):
    pytest.importorskip("vaderSentiment", reason="needs the extra 'rlhf'")
    options = ("--model", model, "--pairs", 24, "--response-length", 6)
    assert reward(tmp_path / "a", *options) == 0
    assert reward(tmp_path / "b", *options) == 0
    files = [(tmp_path / d / "model.safetensors").read_bytes() for d in "ab"]
    assert files[0] == files[1], "same seed, same bytes"
    assert reward(tmp_path / "c", *options, "--seed", 1) == 0
    assert (tmp_path / "c" / "model.safetensors").read_bytes() != files[0]


def test_without_the_extra_the_sentence_names_it(model, tmp_path, capsys, monkeypatch):
    from minipeft.rlhf import gold

    gold._analyzer.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "vaderSentiment.vaderSentiment", None)
    err = refused(capsys, "reward", "--model", model, "--output", tmp_path / "x")
    assert "pip install 'minipeft[rlhf]'" in err and not (tmp_path / "x").exists()


def test_a_resumed_run_ends_with_the_same_bytes(model, data, tmp_path):
    options = ("--data", data, "--model", model, "--steps", 6, "--save-steps", 2)
    assert reward(tmp_path / "whole", *options) == 0
    assert reward(tmp_path / "again", *options) == 0
    last = max((tmp_path / "again").glob("checkpoint-*"))
    assert last.name == "checkpoint-6"
    assert reward(tmp_path / "again", *options, "--resume") == 0
    both = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("whole", "again")]
    assert both[0] == both[1]
    assert reward(tmp_path / "again", *options, "--overwrite") == 0


def test_bad_input_is_one_sentence(model, data, tmp_path, capsys):
    output = tmp_path / "out"
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"prompt": "a", "completion": "b"}\n')
    assert "preference pairs are wanted" in refused(
        capsys, "reward", "--data", wrong, "--model", model, "--output", output
    )
    wrong.write_text('{"prompt": "a", "chosen": "b"}\n')
    assert f"{wrong}:1: field 'rejected' is missing" in refused(capsys, "reward", "--data", wrong, "--output", output)
    assert "longer than 4 tokens" in refused(
        capsys, "reward", "--data", data, "--model", model, "--max-length", 4, "--output", output
    )
    assert "is more than the 64 positions" in refused(
        capsys, "reward", "--data", data, "--model", model, "--max-length", 65, "--output", output
    )
    assert "not both" in refused(capsys, "reward", "--data", data, "--human", data, "--output", output)
    assert "not a .tar.gz archive" in refused(capsys, "reward", "--human", data, "--model", model, "--output", output)
    assert "no such directory" in refused(capsys, "reward", "--adapter", tmp_path / "no", "--output", output)
    assert not output.exists()
    output.mkdir()
    (output / "mine.txt").write_text("x")
    assert "is not empty" in refused(capsys, "reward", "--data", data, "--output", output)
