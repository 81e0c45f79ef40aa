"""`minipeft merge`: one plain model directory of an adapter and the base that it remembers, whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_helpers import output, refused, run, tiny

import minipeft as mp
from minipeft.peft.methods import METHODS

IDS = np.array([[5, 6, 7, 8]])


@pytest.fixture
def model(tmp_path):
    return tiny(tmp_path / "tiny", hidden_size=64)


def adapter(model, directory, method, load_in_4bit=False):
    """The logits of a model with an adapter, which is written to the directory."""
    base, _ = mp.from_pretrained(model, load_in_4bit=load_in_4bit)
    adapted = METHODS[method].prepare(base, 2)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += np.random.default_rng(p.size).standard_normal(p.shape).astype(p.dtype) * 0.1
    adapted.save_pretrained(directory)
    return adapted(IDS).numpy()


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3", "ln", "qlora"])
def test_the_merged_model_computes_what_base_and_adapter_did(model, method, tmp_path, capsys):
    expected = adapter(model, tmp_path / "adapter", method, load_in_4bit=method == "qlora")
    (tmp_path / "adapter" / "template.json").write_text('{"template": "alpaca"}')
    status, out, err = output(
        capsys, "merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "deep in" / "merged"
    )
    assert (status, err) == (0, "") and f"(minipeft generate --model '{tmp_path / 'deep in' / 'merged'}' --prompt ...)" in out
    merged, tokenizer = mp.from_pretrained(tmp_path / "deep in" / "merged")
    np.testing.assert_allclose(merged(IDS).numpy(), expected, atol=1e-4)
    assert type(merged) is mp.Transformer and tokenizer.encode("a 12") == mp.load_base()[1].encode("a 12")
    assert [path.name for path in (tmp_path / "deep in").iterdir()] == ["merged"]
    assert json.loads((tmp_path / "deep in" / "merged" / "template.json").read_text()) == {"template": "alpaca"}


def test_the_template_of_the_base_stays_where_the_adapter_has_none(model, tmp_path, capsys):
    (model / "template.json").write_text('{"template": "alpaca"}')
    adapter(model, tmp_path / "adapter", "lora")
    assert output(capsys, "merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")[0] == 0
    assert json.loads((tmp_path / "merged" / "template.json").read_text()) == {"template": "alpaca"}


def test_what_was_in_four_bits_can_be_so_again(model, tmp_path, capsys):
    expected = adapter(model, tmp_path / "adapter", "qlora", load_in_4bit=True)
    argv = ("merge", "--adapter", tmp_path / "adapter", "--requantize", "--output", tmp_path / "merged")
    status, out, _ = output(capsys, *argv)
    assert status == 0 and "quantizing again lost" in out and "the most of 14 layers" in out
    merged, _ = mp.from_pretrained(tmp_path / "merged")
    assert len(mp.quant.surgery.quantized_layers(merged)) == 14
    error = np.linalg.norm(merged(IDS).numpy() - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.5
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]["load_in_4bit"]


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(model, tmp_path, capsys):
    argv = ("merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert f"--adapter {tmp_path / 'adapter'}: there is no such directory" in refused(capsys, *argv)
    for method, why in (("prompt", "no plain model equals it"), ("bottleneck", "it cannot be merged")):
        adapter(model, tmp_path / "adapter", method)
        assert why in refused(capsys, *argv)
    adapter(model, tmp_path / "adapter", "lora")
    assert "--requantize is for an adapter on a base in four bits" in refused(capsys, *argv, "--requantize")
    assert not (tmp_path / "merged").exists() and not [*tmp_path.glob(".*")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "is not empty; choose another\n" in refused(capsys, *argv[:-1], tmp_path / "mine")
    assert "is a file" in refused(capsys, *argv[:-1], model / "config.json")


def test_a_merge_that_fails_while_it_is_written_leaves_nothing(model, tmp_path, capsys, monkeypatch):
    adapter(model, tmp_path / "adapter", "lora")
    names = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    argv = ("merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "empty")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        assert "No space left on device" in refused(capsys, *argv)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "empty"])
    assert not [*(tmp_path / "empty").iterdir()]
    assert run(*argv) == 0 and (tmp_path / "empty" / "config.json").exists()
