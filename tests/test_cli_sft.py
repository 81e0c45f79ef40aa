"""minipeft sft: every form of data and template, the shipped instructions, and what the stages after it find."""

from __future__ import annotations

import shutil

import pytest
from cli_helpers import continued, jsonl, refused, run, tiny, written

import minipeft as mp
from minipeft.cli.models import saved_template
from minipeft.text.templates import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, asked_turn, get_template

ROWS = [("Translate to Italian.", english, italian) for english, italian in
        [("one", "uno"), ("two", "due"), ("three", "tre"), ("four", "quattro"), ("five", "cinque"), ("six", "sei")]]  # fmt: skip
CUSTOM = "Task: {instruction}\\nText: {input}\\nAnswer:"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=512)


@pytest.fixture
def data(tmp_path):
    return jsonl(tmp_path / "rows.jsonl", [dict(zip(("instruction", "input", "output"), row)) for row in ROWS])


def sft(output, *more) -> int:
    return run("sft", "--output", output, "--steps", 4, "--batch-size", 4, "--lr", 0.03, *more)


def generate(*argv, capsys) -> str:
    capsys.readouterr()
    assert run("generate", "--max-new-tokens", 4, *argv) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "template, name",
    [(None, "alpaca"), ("chatml", "chatml"), (CUSTOM, CUSTOM.replace("\\n", "\n"))],
)
def test_generate_asks_in_the_template_of_the_training(model, data, tmp_path, capsys, template, name):
    output = tmp_path / "tuned"
    assert sft(output, "--model", model, "--data", data, "--validation", data, "--schedule", "constant",
               *(("--template", template) if template else ())) == 0  # fmt: skip
    out = capsys.readouterr().out
    record = written(output)
    assert record["held_out_loss"]["after"] < record["held_out_loss"]["before"]
    assert f"minipeft generate --model {output}" in out
    assert saved_template(output) == name

    tuned, tokenizer = mp.from_pretrained(output)
    turn = asked_turn("Say one.", get_template(name))
    ids = tokenizer.encode_pieces(turn.prompt)
    answer = continued(tuned, tokenizer, ids, 4, [tokenizer.eos_token_id, tokenizer.token_to_id("<|im_end|>")])
    assert generate("--model", output, "--prompt", "Say one.", capsys=capsys) == answer + "\n"
    raw = generate("--model", output, "--prompt", "Say one.", "--template", "plain", capsys=capsys)
    assert raw.startswith("Say one.")


def test_what_alpaca_learns_is_the_answer_and_the_end(model, data, tmp_path, monkeypatch):
    seen = []
    trainer = mp.Trainer.__init__
    spy = lambda self, m, train, *a, **k: seen.extend(train) or trainer(self, m, train, *a, **k)  # noqa: E731
    monkeypatch.setattr(mp.Trainer, "__init__", spy)
    assert sft(tmp_path / "o", "--model", model, "--data", data, "--validation", "0") == 0
    _, tokenizer = mp.load_base()
    for (ids, labels), (instruction, input, output) in zip(seen, ROWS, strict=True):
        prompt = ALPACA_WITH_INPUT.format(instruction=instruction, input=input)
        assert tokenizer.decode(ids) == f"{prompt}{output}<|endoftext|>"
        assert tokenizer.decode(labels[labels != -100]) == f"{output}<|endoftext|>"


def test_forms_of_data(model, tmp_path, capsys):
    chat = [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "uno"}]
    forms = {
        "chatml": [{"messages": [{"role": "system", "content": f"Be brief {i}."}, *chat, *chat]} for i in range(4)],
        "plain": [{"prompt": f"Q: {b}\nA:", "completion": f" {c}"} for _, b, c in ROWS],
        None: [{"text": f"{b} is {c}."} for _, b, c in ROWS],
    }
    for name, rows in forms.items():
        data, output = jsonl(tmp_path / f"{name}.jsonl", rows), tmp_path / f"out-{name}"
        assert sft(output, "--model", model, "--data", data, "--max-length", 120) == 0, capsys.readouterr().err
        assert saved_template(output) == name
    completions = tmp_path / "plain.jsonl"
    assert sft(tmp_path / "a", "--model", model, "--data", completions, "--template", "alpaca") == 0
    tuned_prompt = "".join(asked_turn("Hi", get_template(saved_template(tmp_path / "a"))).prompt)
    assert tuned_prompt == ALPACA_WITHOUT_INPUT.format(instruction="Hi")


def test_an_adapter_carries_its_template(model, data, tmp_path, capsys):
    output = tmp_path / "adapter"
    assert sft(output, "--model", model, "--data", data, "--method", "lora", "--packing") == 0
    assert (output / "adapter_config.json").is_file() and saved_template(output) == "alpaca"
    answer = generate("--model", model, "--adapter", output, "--prompt", "Say one.", capsys=capsys)
    raw = generate("--model", model, "--adapter", output, "--prompt", "Say one.", "--template", "plain", capsys=capsys)
    assert "Say one." not in answer and raw.startswith("Say one.")


def test_an_adapter_without_a_template_is_asked_as_the_base_that_it_remembers(model, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    (base / "template.json").write_text('{"template": "alpaca"}')
    adapted = mp.get_peft_model(mp.from_pretrained(base)[0], mp.LoraConfig(r=1, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    asked = ("--adapter", tmp_path / "adapter", "--prompt", "Say one.")
    named = generate("--model", base, *asked, capsys=capsys)
    assert generate(*asked, capsys=capsys) == named and "Say one." not in named
    assert generate(*asked, "--template", "plain", capsys=capsys).startswith("Say one.")


def test_the_shipped_instructions_are_tested_apart(model, tmp_path, capsys):
    output = tmp_path / "tuned"
    options = ("--model", model, "--tasks", "define", "source", "--per-task", 12, "--template", "chatml", "--packing",
               "--schedule", "constant")  # fmt: skip
    assert sft(output, *options) == 0
    out, record = capsys.readouterr().out, written(output)
    assert record["examples"]["training"] == 24
    apart = record["loss_apart"]
    assert list(apart) == ["new inputs", "new phrasings", "new tasks"]
    assert all(loss["after"] < loss["before"] for loss in apart.values())
    assert all(f"before {loss['before']:.4f}  after {loss['after']:.4f}" in out for loss in apart.values())
    assert apart["new inputs"] == record["held_out_loss"]


@pytest.mark.parametrize(
    "more, reason",
    [
        ((), "--output"),
        (("--output", "o", "--tasks", "definne"), "unknown task 'definne'; did you mean define?"),
        (("--output", "o", "--tasks", "fill"), "unknown task 'fill'"),
        (("--output", "o", "--data", "{data}", "--tasks", "use"), "does nothing with --data"),
        (("--output", "o", "--data", "{data}", "--per-task", "3"), "does nothing with --data"),
        (("--output", "o", "--validation", "0.2"), "--validation does nothing without --data"),
        (("--output", "o", "--data", "{data}", "--template", "vicuna"), "a template is one of plain, alpaca, chatml"),
        (("--output", "o", "--data", "{data}", "--template", "{{prompt}}"), "takes {prompt, completion} records"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(model, data, tmp_path, monkeypatch, capsys, more, reason):
    monkeypatch.chdir(tmp_path)
    argv = [text.format(data=data) for text in more]
    assert reason in refused(capsys, "sft", *argv, *(("--model", model) if argv else ()))
    assert not (tmp_path / "o").exists(), "nothing is written before the input is known to be right"


def test_a_template_file_that_is_something_else_is_named(model, data, tmp_path, capsys):
    assert sft(tmp_path / "o", "--model", model, "--data", data) == 0
    (tmp_path / "o" / "template.json").write_text('["alpaca"]')
    capsys.readouterr()
    assert "template.json: must hold" in refused(capsys, "generate", "--model", tmp_path / "o", "--prompt", "x")
