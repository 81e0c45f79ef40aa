"""Which base an adapter was trained on: its directory says it, loading it elsewhere warns, commands find it again."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from cli_helpers import jsonl, output, refused, run, tiny

import minipeft as mp
from minipeft.hub.base import NAME
from minipeft.peft.provenance import recorded_base


@pytest.fixture
def model(tmp_path):
    return tiny(tmp_path / "tiny", hidden_size=64)


def trained(model, directory, load_in_4bit=False):
    base, _ = mp.from_pretrained(model, load_in_4bit=load_in_4bit)
    mp.get_peft_model(base, mp.LoraConfig(r=2, init_lora_weights=False)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_directory_remembers_its_base_and_whether_it_was_in_four_bits(model, tmp_path, load_in_4bit):
    adapter = trained(model, tmp_path / "adapter", load_in_4bit)
    assert recorded_base(adapter) == (str(model), load_in_4bit)
    base, _ = mp.from_pretrained(model, load_in_4bit=load_in_4bit)
    again = mp.PeftModel.from_pretrained(base, adapter)  # without a warning
    again.load_adapter(adapter, "other")
    with pytest.warns(UserWarning, match="floats" if load_in_4bit else "this one is in four bits"):
        mp.PeftModel.from_pretrained(mp.from_pretrained(model, load_in_4bit=not load_in_4bit)[0], adapter)
    assert again.merge_and_unload().name_or_path is None, "a merged model is not what is stored there"


def test_the_name_of_the_base_is_its_own_the_configurations_or_that_of_the_shipped_one(model, tmp_path):
    named = mp.LoraConfig(r=2, base_model_name_or_path="somebody/model")
    mp.get_peft_model(mp.from_pretrained(model)[0], named).save_pretrained(tmp_path / "named")
    assert recorded_base(tmp_path / "named") == ("somebody/model", False)
    shipped, _ = mp.load_base()
    mp.get_peft_model(shipped, mp.LoraConfig(r=2)).save_pretrained(tmp_path / "shipped")
    assert recorded_base(tmp_path / "shipped") == (NAME, False)
    nameless = mp.Transformer(mp.from_pretrained(model)[0].config)
    mp.get_peft_model(nameless, mp.LoraConfig(r=2)).save_pretrained(tmp_path / "nameless")
    assert recorded_base(tmp_path / "nameless") == (None, False)


def test_another_base_warns_and_the_same_under_another_path_does_not(model, tmp_path, monkeypatch):
    adapter = trained(model, tmp_path / "adapter")
    other = tiny(tmp_path / "other", hidden_size=64)
    with pytest.warns(UserWarning, match=f"trained on {model}, and this model is {other}") as seen:
        loaded = mp.PeftModel.from_pretrained(mp.from_pretrained(other)[0], adapter)
    assert len(seen) == 1
    loaded.save_pretrained(tmp_path / "further")
    assert recorded_base(tmp_path / "further")[0] == str(other), "from here on it belongs to this one"
    with pytest.warns(UserWarning, match="this model is"):
        loaded.load_adapter(adapter, "more")
    monkeypatch.chdir(tmp_path)
    mp.PeftModel.from_pretrained(mp.from_pretrained("tiny")[0], adapter)
    (tmp_path / "moved").mkdir()
    shutil.move(model, tmp_path / "moved" / "tiny")
    mp.PeftModel.from_pretrained(mp.from_pretrained(tmp_path / "moved" / "tiny")[0], adapter)


def test_an_adapter_that_does_not_fit_is_an_error_as_before(model, tmp_path):
    adapter = trained(model, tmp_path / "adapter")
    with pytest.raises(mp.peft.PeftError, match="has the shape"):
        mp.PeftModel.from_pretrained(mp.from_pretrained(tiny(tmp_path / "small"))[0], adapter)


@pytest.mark.filterwarnings("always")
def test_generate_finds_the_base_and_says_what_differs(model, tmp_path, capsys):
    adapter, packed = trained(model, tmp_path / "adapter"), trained(model, tmp_path / "packed", load_in_4bit=True)
    prompt = ("--prompt", "The day", "--max-new-tokens", 5, "--completion-only")
    status, found, err = output(capsys, "generate", "--adapter", adapter, *prompt)
    assert (status, err) == (0, "")
    assert (0, found, "") == output(capsys, "generate", "--model", model, "--adapter", adapter, *prompt)
    in_four_bits = output(capsys, "generate", "--adapter", packed, *prompt)
    assert in_four_bits[::2] == (0, ""), "the base is in four bits, as in training"
    assert in_four_bits == output(capsys, "generate", "--adapter", packed, "--load-in-4bit", *prompt)
    with pytest.warns(UserWarning, match="load_in_4bit=True"):
        mp.PeftModel.from_pretrained(mp.from_pretrained(model)[0], packed)
    assert "--json and --completion-only exclude each other" in refused(capsys, "generate", "--adapter", adapter, "--json", *prompt)
    several = refused(capsys, "generate", "--adapter", tmp_path, *prompt)
    assert f"but holds the adapters adapter, packed: give {tmp_path / 'adapter'}" in several
    os.rename(model, tmp_path / "elsewhere")
    wrong = refused(capsys, "generate", "--adapter", adapter, *prompt)
    assert f"its base is {model}, which is no path here; say with --model where it is" in wrong
    _, _, err = output(capsys, "generate", "--model", tmp_path / "elsewhere", "--adapter", adapter, *prompt)
    assert f"was trained on {model}, and this model is {tmp_path / 'elsewhere'}" in err and err.count("\n") == 1


def test_an_adapter_is_trained_further_on_the_base_that_it_remembers(model, tmp_path):
    data = [{"prompt": "a", "chosen": f" {word}", "rejected": " no"} for word in ("yes", "so", "well", "fine")]
    pairs = jsonl(tmp_path / "pairs.jsonl", data)
    made = tmp_path / "adapter"
    argv = ("dpo", "--data", pairs, "--steps", 2)
    assert run(*argv, "--model", model, "--method", "qlora", "--output", made) == 0
    assert recorded_base(made) == (str(model), True)
    assert run(*argv, "--adapter", made, "--output", tmp_path / "further") == 0
    assert recorded_base(tmp_path / "further") == (str(model), True)
    assert json.loads((tmp_path / "further" / "dpo.json").read_text())["options"]["method"] == "adapter"
    before, after = (
        mp.files.read_safetensors(d / "adapter_model.safetensors")[0] for d in (made, tmp_path / "further")
    )
    assert any(not np.array_equal(before[key], after[key]) for key in before)
