"""minipeft reward: from the user's pairs to a directory that PPO optimizes and transformers loads."""

from __future__ import annotations

import pytest
from cli_helpers import jsonl, refused, run, same_bytes, tiny, written

import minipeft as mp
from minipeft.cli.preferences import accuracy_told

GOOD, BAD = ["good", "fine", "happy", "glad"], ["bad", "poor", "sad", "evil"]
PAIRS = [
    {"prompt": f"The {noun} was", "chosen": f" {good}.", "rejected": f" {bad}."}
    for noun in ("day", "man", "house", "king", "book") for good in GOOD for bad in BAD
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=64)


@pytest.fixture
def data(tmp_path):
    return jsonl(tmp_path / "pairs.jsonl", PAIRS)


def reward(output, *more) -> int:
    return run("reward", "--output", output, "--batch-size", 8, "--lr", 0.02, *more)


def test_the_accuracy_of_training_pairs_has_no_interval():
    found = {"accuracy": 0.75, "accuracy_interval": None, "accuracy_of": "training pairs"}
    assert accuracy_told(0.75, 8, held_out=False) == ("75.0% of 8 training", found)


def test_it_learns_the_users_pairs_and_saves_a_calibrated_classifier(model, data, tmp_path, capsys, rendered):
    output = tmp_path / "a judge"
    assert reward(output, "--data", data, "--model", model, "--epochs", 4) == 0
    out = capsys.readouterr().out
    record = written(output)
    assert record["accuracy"] > 0.9 and f"{record['accuracy']:.1%}" in out and f"(minipeft ppo --reward '{output}' --output DIR)" in out
    assert record["pairs"] == {"training": 72, "held_out": 8} and record["accuracy_of"] == "held-out pairs"
    low, high = record["accuracy_interval"]
    assert f"agrees with {record['accuracy']:.1%} [{low:.1%}, {high:.1%}] of 8 held-out preferences" in out and low < record["accuracy"]
    judge, tokenizer = mp.rlhf.RewardModel.from_pretrained(output)
    texts = [[*tokenizer.encode(f"The day was {word}."), tokenizer.eos_token_id] for word in ("good", "bad")]
    good, bad = judge.score_texts(texts)
    assert good > 0 > bad and good - bad > 0.5, "mean 0 and deviation 1 on what it was trained on"
    assert (output / "reward.png").read_bytes()[:4] == b"\x89PNG" and (output / "metrics.jsonl").exists()
    plain, _ = mp.from_pretrained(output)
    assert isinstance(plain, mp.SequenceClassifier) and plain.num_labels == 1


def test_a_run_is_resumed_with_the_same_center(model, data, tmp_path, capsys):
    options = ("--data", data, "--model", model, "--steps", 2)
    assert reward(tmp_path / "judge", *options, "--center", 0.5) == 0
    assert reward(tmp_path / "judge", *options, "--resume") == 2
    assert "other loss (RewardModel.loss(center=0.5) there, RewardModel.loss(center=0.0) here)" in capsys.readouterr().err


def test_generated_pairs_need_nothing_but_the_extra(model, tmp_path, capsys, monkeypatch):
    pytest.importorskip("vaderSentiment", reason="needs the extra 'rlhf'")
    options = ("--model", model, "--pairs", 24, "--response-length", 6)
    assert reward(tmp_path / "a", *options) == 0
    assert reward(tmp_path / "b", *options) == 0
    assert same_bytes("model.safetensors", tmp_path / "a", tmp_path / "b"), "same seed, same bytes"
    assert reward(tmp_path / "a", *options, "--seed", 1, "--overwrite") == 0
    assert not same_bytes("model.safetensors", tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (("--data", "completions.jsonl", "--model", "{model}"), "preference pairs are wanted"),
        (("--data", "incomplete.jsonl"), "incomplete.jsonl:1: field 'rejected' is missing"),
        (("--data", "{data}", "--model", "{model}", "--max-length", "4"), "longer than 4 tokens"),
        (("--data", "{data}", "--model", "{model}", "--max-length", "65"), "is more than the 64 positions"),
        (("--data", "{data}", "--human", "{data}"), "--data and --human exclude each other"),
        (("--human", "{data}", "--model", "{model}"), "not a .tar.gz archive"),
        (("--adapter", "no"), "no such directory"),
        (("--data", "{data}", "--output", "."), "is not empty"),
        (("--data", "{data}", "--pairs", "5"), "--pairs does nothing with --data"),
        (("--data", "{data}", "--response-length", "5"), "--response-length does nothing with --data"),
        (("--data", "{data}", "--rater-flip", "0"), "--rater-flip does nothing with --data"),
        (("--human", "{data}", "--rater-temperature", "1"), "--rater-temperature does nothing with --human"),
        (("--max-length", "20"), "--max-length does nothing with generated pairs"),
    ],
)
def test_bad_input_is_one_sentence(wrong, reason, model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "completions.jsonl", [{"prompt": "a", "completion": "b"}])
    jsonl(tmp_path / "incomplete.jsonl", [{"prompt": "a", "chosen": "b"}])
    assert reason in refused(capsys, "reward", "--output", "out", *(w.format(data=data, model=model) for w in wrong))
    assert not (tmp_path / "out").exists()
