"""A method of one's own, registered: the README's, as it is printed, in Python and in every command; and what is refused."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import jsonl, output, refused, reported, run, tiny, written
from test_peft import base, close, logits, train

import minipeft as mp
from minipeft.accounting import memory_ledger
from minipeft.options import configuration
from minipeft.peft.config import PeftConfig, PeftError
from minipeft.peft.huggingface import PEFT_TYPES
from minipeft.peft.methods import METHODS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLE = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "@register(" in block)


pytestmark = pytest.mark.usefixtures("methods_as_before")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The name of a module in the working directory that holds the README's method."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_loha.py").write_text(EXAMPLE, encoding="utf-8")
    return "my_loha"


def test_the_readmes_method_is_short_and_known_in_python(plugin, tmp_path, monkeypatch):
    assert f"in {len(EXAMPLE.splitlines())} lines" in README
    monkeypatch.syspath_prepend(tmp_path)
    config = importlib.import_module(plugin).HadamardConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = base()
    adapted = mp.get_peft_model(model, config)
    np.testing.assert_array_equal(logits(adapted), logits(model))
    train(adapted)
    mp.assert_learning(adapted)
    close(logits(adapted.merge_and_unload()), logits(adapted))
    assert "Hadamard(hada_w1_a [16, 2]" in repr(adapted)
    counted = mp.accounting.count_parameters(mp.accounting.architecture(model.config), config)
    assert counted.trainable == adapted.get_nb_trainable_parameters()[0]
    adapted.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/adapter_config.json").read_text())["peft_type"] == "MY_LOHA"
    close(logits(mp.PeftModel.from_pretrained(model, tmp_path / "saved")), logits(adapted), 0)
    assert memory_ledger(model.config, config, batch=1, seq_len=8).lines == memory_ledger(adapted, batch=1, seq_len=8).lines


def test_a_method_may_make_its_adapters_itself():
    class Scale(mp.peft.Adapter):
        def __init__(self, factor, shapes, layer, seed):
            super().__init__(shapes, layer, seed)
            self.factor = factor

        def forward(self, x, inner, base, rng):
            return inner(x) * (1 + self.scale * self.factor)

    @configuration
    class ScaleConfig(PeftConfig):
        peft_type = "SCALE"

        def shapes(self, name, kind, n_out, n_in):
            return {"scale": (n_out,)}

        def adapter(self, name, layer, shapes, seed):
            return Scale(2.0, shapes, layer, seed)

    adapted = mp.get_peft_model(base(), ScaleConfig(target_modules=["q_proj"]))
    np.testing.assert_array_equal(logits(adapted), logits(base()))
    mp.assert_learning(train(adapted))


def test_the_commands_know_it(plugin, tmp_path, capsys):
    method = ("--method", "my-loha")
    count = reported(capsys, "--plugin", plugin, "count", "llama-7b", *method)
    shipped = reported(capsys, "count", "llama-7b", "--method", "loha")
    assert count["method"] == "my-loha" and count["trainable"] == shipped["trainable"] > 0
    sizes = ("memory", "llama-7b", "--seq", 64)
    ours, theirs = (reported(capsys, "--plugin", plugin, *sizes, *m) for m in (method, ("--method", "loha")))
    assert ours["total"] == pytest.approx(theirs["total"], rel=0.02)
    tiny(tmp_path / "base")
    data = jsonl(tmp_path / "data.jsonl", ({"prompt": f"{i} and", "completion": f" {i + 1}"} for i in range(12)))
    tune = ("finetune", "--model", "base", "--data", data, *method, "--steps", 3, "--output", "tuned")
    status, out, err = output(capsys, *tune, "--plugin", plugin)
    assert status == 0 and "learning rate 0.03" in err
    assert f"(minipeft --plugin {plugin} generate --adapter tuned --prompt ...)" in out
    assert written(tmp_path / "tuned")["options"]["plugin"] == [plugin]
    loss = written(tmp_path / "tuned")["held_out_loss"]
    assert loss["before"] != loss["after"]
    show = ("generate", "--model", "base", "--adapter", "tuned", "--prompt", "1 and", "--max-new-tokens", 3)
    assert run("--plugin", plugin, *show) == 0
    compare = ("compare", "--model", "base", "--methods", "lora", "my-loha", "--reduced", "--steps", 2, "--output", "out")
    status, out, err = output(capsys, *compare, f"--plugin={plugin}")
    assert status == 0 and "my LoHa r=4" in out, err
    rows = json.loads((tmp_path / "out/compare.json").read_text())["methods"]
    assert rows[2]["method"] == "my-loha" and rows[2]["storage"] > 0


def test_a_sweep_computes_all_anew_where_the_source_of_the_method_changes(plugin, tmp_path, capsys):
    tiny(tmp_path / "base")
    data = jsonl(tmp_path / "data.jsonl", ({"prompt": f"{i} and", "completion": f" {i + 1}"} for i in range(12)))
    sweep = ("sweep", "--plugin", plugin, "--model", "base", "--data", data, "--method", "my-loha", "--lr", 1e-3)
    sweep += ("--seeds", 1, "--steps", 1, "--executor", 1, "--output", "out")
    assert [output(capsys, *sweep)[2].count("1 of 1 runs") for _ in range(2)] == [1, 0]
    (tmp_path / f"{plugin}.py").write_text(EXAMPLE + "# changed\n", encoding="utf-8")
    assert "1 of 1 runs" in output(capsys, *sweep)[2]


def test_without_its_module_a_directory_is_refused_with_what_to_do(plugin, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    model, config = base(), importlib.import_module(plugin).HadamardConfig(target_modules=["q_proj"])
    mp.get_peft_model(model, config).save_pretrained(tmp_path / "saved")
    del PEFT_TYPES["MY_LOHA"]
    with pytest.raises(PeftError, match=r"'MY_LOHA' is not one of LORA, .*--plugin MODULE"):
        mp.PeftModel.from_pretrained(model, tmp_path / "saved")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--plugin mine: cannot import mine (ModuleNotFoundError: No module named 'mine')"),
        ("1 / 0", "--plugin mine: cannot import mine (ZeroDivisionError: division by zero)"),
        ("raise SystemExit(0)", "--plugin mine: cannot import mine (SystemExit: 0)"),
        ("x = 1", "--plugin mine registers no method: put @minipeft.peft.register before"),
        (EXAMPLE.replace("MY_LOHA", "LOHA"), "the peft_type 'LOHA' is taken, by LoHaConfig; choose another"),
        (EXAMPLE.replace("title=", 'name="lora", title='), "the name 'lora' is taken, by LoRA r=8; choose another with name="),
        (EXAMPLE.replace("title=", "rank=3, title="), "register: HadamardConfig has no option 'rank'; it has target_modules"),
        (EXAMPLE.replace("r={r}", "r={rank}"), "braces hold an option of HadamardConfig, such as {r}; got 'my LoHa r={rank}'"),
        (EXAMPLE.replace("r={r}", "r={0}"), "braces hold an option of HadamardConfig, such as {r}; got 'my LoHa r={0}'"),
        (EXAMPLE.replace("r={r}", "r={"), "braces hold an option of HadamardConfig, such as {r}; got 'my LoHa r={'"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_refused(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    known = list(METHODS), list(PEFT_TYPES)
    assert message in refused(capsys, "count", "gpt2", "--plugin", "mine")
    assert known == (list(METHODS), list(PEFT_TYPES))
    assert "a module's name has no .py: mine" in refused(capsys, "count", "gpt2", "--plugin", "mine.py")


def test_register_takes_configurations_of_methods_and_names_that_are_free():
    with pytest.raises(PeftError, match="takes a subclass of PeftConfig that has a peft_type"):
        mp.peft.register(dict)

    def define(**arguments):
        @mp.peft.register(**arguments)
        @configuration
        class Mine(PeftConfig):
            peft_type = "MINE_TOO"

        return Mine

    for name in ("frozen", "a b", "--x", "Lora"):
        with pytest.raises(PeftError, match="a method's name has small letters"):
            define(name=name)
    first = define()
    assert PEFT_TYPES["MINE_TOO"] is first and METHODS["mine-too"].title == "mine-too"
    assert METHODS["mine-too"].learning_rate == METHODS["lora"].learning_rate
    again = define(title="twice")  # as in a cell that is run again
    assert PEFT_TYPES["MINE_TOO"] is again is not first and type(METHODS["mine-too"].config()) is again
    assert METHODS["mine-too"].title == "twice"
