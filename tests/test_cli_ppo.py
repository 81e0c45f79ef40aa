"""minipeft ppo: stages chained through saved directories, resumed to the byte, stopped in a sentence."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from cli_helpers import jsonl, refused, run, tiny, written
from test_cli_reward import PAIRS, model  # noqa: F401 a fixture

import minipeft as mp

pytest.importorskip("vaderSentiment", reason="needs the extra 'rlhf'")

QUICK = ("--steps", 3, "--batch-size", 8, "--mini-batch-size", 4, "--response-length", 6, "--lr", 1e-3)


def ppo(output, *more) -> int:
    return run("ppo", "--output", output, *QUICK, *more)


@pytest.fixture(scope="module")
def judge(model, tmp_path_factory):  # noqa: F811
    directory = tmp_path_factory.mktemp("reward")
    data, output = jsonl(directory / "pairs.jsonl", PAIRS), directory / "judge"
    assert run("reward", "--data", data, "--model", model, "--output", output, "--lr", 0.02) == 0
    return output


@pytest.fixture
def prompts(tmp_path):
    return jsonl(tmp_path / "prompts.jsonl", ({"prompt": row["prompt"]} for row in PAIRS[::16]))


def test_sft_reward_and_ppo_chain_through_their_directories(tmp_path, prompts, capsys, rendered):
    rows = [{"instruction": f"Say {w}.", "output": w} for w in ("good", "bad", "one", "two", "red", "blue")]
    records = jsonl(tmp_path / "rows.jsonl", rows)
    pairs = ({"prompt": r["instruction"], "chosen": r["output"], "rejected": "no"} for r in rows)
    pairs = jsonl(tmp_path / "pairs.jsonl", pairs)
    base = tiny(tmp_path / "base", num_hidden_layers=1, max_position_embeddings=256, eos_token_id=1)
    tuned, judge, aligned = tmp_path / "tuned", tmp_path / "judge", tmp_path / "aligned"
    assert run("sft", "--model", base, "--data", records, "--steps", 2, "--output", tuned) == 0
    assert run("reward", "--model", tuned, "--data", pairs, "--output", judge) == 0
    assert ppo(aligned, "--model", tuned, "--reward", judge, "--prompts", prompts) == 0
    record = written(aligned)
    assert record["options"]["template"] == "alpaca", "asked as it was taught"
    assert "### Response:" in record["samples"][0]["prompt"]
    assert "watch/vader" in record["last"], "the gold is only watched"
    out = capsys.readouterr().out
    assert "reward" in out and "vader (watched)" in out and "before:" in out
    before, after = (mp.from_pretrained(d)[0].state_dict() for d in (tuned, aligned))
    assert any(not np.array_equal(before[n], after[n]) for n in before)
    lines = [json.loads(line) for line in (aligned / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == [1, 2, 3] and (aligned / "ppo.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((aligned / "template.json").read_text()) == {"template": "alpaca"}


def test_an_opening_that_is_too_long_is_said_to_be_one(model, tmp_path, capsys):  # noqa: F811
    argv = ("ppo", "--model", model, "--output", tmp_path / "o", "--response-length", 60)
    assert "minipeft: error: openings of the shipped novels: prompt " in refused(capsys, *argv)


def test_a_watcher_without_a_number_is_reported_as_none(model, judge, prompts, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(mp.rlhf, "gold_reward", lambda tokenizer: lambda roll: np.full(8, np.nan))
    assert ppo(tmp_path / "out", "--model", model, "--reward", judge, "--prompts", prompts) == 0
    assert "none -> none" in capsys.readouterr().out
    assert written(tmp_path / "out")["last"]["watch/vader"] is None


def test_defaults_need_no_file(tmp_path, capsys):
    assert ppo(tmp_path / "happy") == 0
    assert "reward" in capsys.readouterr().out


def test_an_adapter_is_made_or_trained_further(model, judge, prompts, tmp_path, capsys):  # noqa: F811
    options = ("--model", model, "--reward", judge, "--prompts", prompts)
    assert ppo(tmp_path / "first", *options, "--method", "lora") == 0
    assert f"minipeft generate --adapter {tmp_path / 'first'}" in capsys.readouterr().out
    assert ppo(tmp_path / "second", *options, "--adapter", tmp_path / "first") == 0
    history = (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()
    assert abs(json.loads(history[0])["objective/kl"]) < 1e-4, "its reference is the adapter as it was"
    base, _ = mp.from_pretrained(model)
    both = [mp.PeftModel.from_pretrained(base, tmp_path / d) for d in ("first", "second")]
    ids = np.array([[5, 6, 7]])
    assert not np.allclose(both[0](ids).numpy(), both[1](ids).numpy())
    assert "--method does nothing with --adapter" in refused(
        capsys, "ppo", *options, "--adapter", tmp_path / "first", "--method", "lora", "--output", tmp_path / "x"
    )


def test_what_goes_wrong_is_one_sentence(model, judge, prompts, tmp_path, capsys):  # noqa: F811
    def error(*more):
        return refused(capsys, "ppo", *QUICK, "--model", model, "--output", tmp_path / "out", *more)

    assert "--batch-size must be a multiple of --mini-batch-size, 3, got 8" in error("--mini-batch-size", 3)
    assert "--kl-target does nothing with --algorithm grpo" in error("--algorithm", "grpo", "--kl-target", 3)
    assert "--generations does nothing with --algorithm ppo" in error("--generations", 2)
    assert "the model has room for 2" in error("--prompts", prompts, "--response-length", 62)
    assert "unknown option '--fp16'" in error("--fp16")
    assert "leaves no room for a prompt" in error("--response-length", 64)
    assert "holds no reward model" in error("--reward", model)
    assert "no such directory" in error("--reward", tmp_path / "nothing")
    (tmp_path / "empty.jsonl").write_text("")
    assert "the file is empty" in error("--prompts", tmp_path / "empty.jsonl")
    assert not (tmp_path / "out").exists()
    assert ppo(tmp_path / "out", "--model", model, "--reward", judge, "--max-kl", 1e-6) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("minipeft: error: update 2: the policy is ") and "beyond max_kl=1e-06" in last


REWARDS = """
limit = 3

def has_the(prompts, completions, **kwargs):
    assert len(prompts) == len(completions) and all(isinstance(text, str) for text in prompts + completions)
    return ["the" in text.lower() for text in completions]

def short(completions, **kwargs):
    return [-len(text) for text in completions]

def one_too_few(completions, **kwargs):
    return [0.0] * (len(completions) - 1)

def infinite(completions, **kwargs):
    return [float("inf")] * len(completions)

def nothing(completions, **kwargs):
    return None

def fails(completions, **kwargs):
    return completions["a"]
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    (tmp_path / "broken_rewards.py").write_text("def reward(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("own_rewards", "broken_rewards"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_own_rewards_also_of_yes_and_no(algorithm, rewards, model, prompts, tmp_path):  # noqa: F811
    """`has_the` is 0 or 1, and the same for all answers of many updates: that is no error."""
    options = ("--algorithm", algorithm, "--model", model, "--prompts", prompts)
    assert ppo(tmp_path / "out", *options, "--reward-function", "own_rewards:has_the") == 0
    record = written(tmp_path / "out")
    assert record["options"]["reward_function"] == "own_rewards:has_the" and record["updates"] == 3
    assert 0 <= record["last"]["objective/raw_scores"] <= 1


@pytest.mark.parametrize("bf16", [False, True])
def test_an_own_reward_is_what_is_trained(bf16, rewards, model, prompts, tmp_path):  # noqa: F811
    tokenizer = mp.from_pretrained(model)[1]
    options = ("--model", model, "--prompts", prompts, "--steps", 1, *("--bf16",) * bf16)
    assert ppo(tmp_path / "out", *options, "--reward-function", "own_rewards:short") == 0
    first = written(tmp_path / "out")["first"]["objective/scores"]
    policy, encoded = (
        mp.from_pretrained(model)[0],
        [tokenizer.encode(json.loads(line)["prompt"]) for line in prompts.read_text().splitlines()],
    )
    config = mp.rlhf.PPOConfig(
        batch_size=8, mini_batch_size=4, response_length=6, stop_token_ids=(tokenizer.eos_token_id,), bf16=bf16
    )
    length = mp.rlhf.text_reward(lambda prompts, completions: [-len(c) for c in completions], tokenizer)
    assert mp.rlhf.PPOTrainer(policy, length, encoded, config).step()["objective/scores"] == pytest.approx(first)


def test_a_reward_that_does_not_work_is_one_sentence(rewards, model, prompts, tmp_path, capsys):  # noqa: F811
    def error(name, *more):
        options = ("--model", model, "--prompts", prompts, "--output", tmp_path / "out", "--reward-function", name)
        return refused(capsys, "ppo", *QUICK, *options, *more, silent=False)

    assert "own_rewards.py: must be MODULE:NAME, such as own_rewards:my_function of own_rewards.py" in error("own_rewards.py")
    assert "cannot import nowhere (ModuleNotFoundError" in error("nowhere:reward")
    assert "cannot import broken_rewards (SyntaxError" in error("broken_rewards:reward")
    assert "own_rewards has no function 'shor'; did you mean short?" in error("own_rewards:shor")
    assert "own_rewards has no function 'limit'" in error("own_rewards:limit")
    assert "--reward and --reward-function exclude each other" in error("own_rewards:short", "--reward", tmp_path)
    capsys.readouterr()
    for name, reason in (
        ("one_too_few", "must return a list of 3 numbers, one for each completion; it returned list, 2 of them"),
        ("nothing", "it returned NoneType, None"),
        ("infinite", "gave inf to the completion"),
        ("fails", "raised TypeError: list indices must be integers"),
    ):
        options = ("--model", model, "--prompts", prompts, "--reward-function", f"own_rewards:{name}")
        assert ppo(tmp_path / "out", *options) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"minipeft: error: the reward function own_rewards:{name} ") and reason in line
    assert not (tmp_path / "out").exists(), "it is tried before anything is written"
