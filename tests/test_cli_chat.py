"""Chats on the command line, and the whole way of a .gguf file: finetune in four bits, adapter, conversation."""

import io
import json
import sys

import pytest
from cli_helpers import continued, jsonl, refused, run, written
from test_text_chat import SYSTEM

import minipeft as mp
from minipeft.cli.models import save_template
from minipeft.nn.transformer import TransformerConfig
from minipeft.text.datasets import Message
from minipeft.text.tokenizer import Tokenizer

QUESTIONS = {"red": "warm", "blue": "cold", "green": "mild", "black": "dark", "white": "light"}


def say(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(lines)))


def small(**changes):
    tokenizer = mp.load_base()[1]
    config = TransformerConfig.llama(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, initializer_range=0.3, eos_token_id=tokenizer.eos_token_id, **changes,
    )  # fmt: skip
    return mp.Transformer(config, seed=1), tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a small model and a chat template that puts a system message first."""
    path = tmp_path_factory.mktemp("model")
    made, shipped = small()
    mp.save_pretrained(made, path, Tokenizer(shipped._control, {**shipped.config, "chat_template": SYSTEM}))
    return path


@pytest.fixture(scope="module")
def chat_data(tmp_path_factory):
    turns = ([{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in QUESTIONS.items())
    return jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", ({"messages": both} for both in turns))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A .gguf file with a small model in blocks of eight bits, the shipped vocabulary and its chat template."""
    pytest.importorskip("gguf", reason="needs the extra 'hub': pip install 'minipeft[hub]'")
    from test_gguf import Q8_0, write

    made, shipped = small()
    backend = json.loads(shipped._plain.to_str())["model"]
    tokens = [shipped.id_to_token(i) for i in range(shipped.vocab_size)]

    def tokenizer(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 4 + [1] * (len(tokens) - 4))
        writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
        writer.add_chat_template(SYSTEM)
        writer.add_pad_token_id(0)

    return write(tmp_path_factory.mktemp("gguf") / "small.gguf", made, kind=Q8_0, tokenizer=tokenizer)


def answer(model, tokenizer, messages, n=12):
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return continued(model, tokenizer, prompt, n, [tokenizer.eos_token_id, tokenizer.token_to_id("<|im_end|>")])


# ------------------------------------------------------------------------------------------------------------- chat


def test_one_message_in_the_models_own_template(model, capsys):
    own, tokenizer = mp.from_pretrained(model)
    options = ("generate", "--model", model, "--chat", "--max-new-tokens", 12)
    assert run(*options, "--prompt", "Hello") == 0
    assert capsys.readouterr().out == answer(own, tokenizer, [Message("user", "Hello")]) + "\n"
    assert run(*options, "--prompt", "Hello", "--system", "Be brief.", "--json") == 0
    expected = answer(own, tokenizer, [Message("system", "Be brief."), Message("user", "Hello")])
    assert json.loads(capsys.readouterr().out) == {"prompt": "Hello", "completion": expected}


@pytest.mark.parametrize("end", ["", "/exit\nnot read\n", "  /exit"])
def test_a_conversation_keeps_what_was_said(end, model, capsys, monkeypatch):
    own, tokenizer = mp.from_pretrained(model)
    said, expected = [], []
    for text in ("Hello", "And then?"):
        said.append(Message("user", text))
        expected.append(answer(own, tokenizer, said))
        said.append(Message("assistant", expected[-1]))
    say(monkeypatch, "Hello\n", "\n", "  And then?  \n", end)
    assert run("generate", "--model", model, "--chat", "--max-new-tokens", 12) == 0
    out, err = capsys.readouterr()
    assert out == "".join(text + "\n" for text in expected) and err == ""
    assert expected[1] != answer(own, tokenizer, [Message("user", "And then?")]), "the first answer is in view"


@pytest.mark.parametrize("trained, noted", [("chat", False), ("alpaca", True), ("chatml", True), ("Q: {prompt}", True)])
def test_a_chat_in_another_template_than_that_of_the_training_is_noted(trained, noted, model, tmp_path, capsys, monkeypatch):
    mp.get_peft_model(mp.from_pretrained(model)[0], mp.LoraConfig(r=1)).save_pretrained(tmp_path)
    save_template(tmp_path, trained)
    note = f"{tmp_path} was trained in the template {trained!r}, and --chat asks in the tokenizer's chat template: "
    note += "for answers as trained, leave --chat out\n"
    for more in ((), ("--prompt", "Hello")):
        say(monkeypatch, "Hello\n")
        assert run("generate", "--adapter", tmp_path, "--chat", "--max-new-tokens", 2, *more) == 0
        assert capsys.readouterr().err == note * noted


def test_a_conversation_in_json_and_one_without_words(model, capsys, monkeypatch):
    say(monkeypatch, "Hello\n", "Bye")
    assert run("generate", "--model", model, "--chat", "--json", "--max-new-tokens", 4) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["Hello", "Bye"]
    say(monkeypatch, "")
    assert run("generate", "--model", model, "--chat") == 0
    assert capsys.readouterr() == ("", "")


def test_a_conversation_that_outgrows_the_model_goes_on_without_its_beginning(model, capsys, monkeypatch):
    own, tokenizer = mp.from_pretrained(model)
    system, said, expected, lost = Message("system", "Be brief."), [], [], []
    for text in ("Hello", "And then?", "Why?", "Who?", "Where?"):
        said.append(Message("user", text))
        lost.append(0)
        while len(tokenizer.apply_chat_template([system, *said], add_generation_prompt=True)) + 60 > 256:
            del said[:2]
            lost[-1] += 2
        expected.append(answer(own, tokenizer, [system, *said], 60))
        said.append(Message("assistant", expected[-1]))
    assert lost[:2] == [0, 0] and lost[-1] == 2
    say(monkeypatch, "Hello\nAnd then?\n", "word " * 400, "\nWhy?\nWho?\nWhere?\n")
    assert run("generate", "--model", model, "--chat", "--max-new-tokens", 60, "--system", system.content) == 0
    out, err = capsys.readouterr()
    assert out == "".join(text + "\n" for text in expected)
    alone = tokenizer.apply_chat_template([system, Message("user", "word " * 399 + "word")], add_generation_prompt=True)
    first, *others = err.splitlines()
    assert first == (
        f"(not answered: the message makes a prompt of {len(alone)} tokens; at most 196 fit beside --max-new-tokens 60)"
    )
    assert others == [f"(the conversation is full: its oldest {n} messages are left out)" for n in lost if n]


def test_chats_that_cannot_be(model, tmp_path, capsys, monkeypatch):
    def fails(sentence, *argv):
        assert sentence in refused(capsys, "generate", *argv, silent=False)

    tokenizer = mp.load_base()[1]
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message, please') }}{% endif %}x"
    mp.save_pretrained(small()[0], tmp_path / "a", Tokenizer(tokenizer._control, {**tokenizer.config, "chat_template": refusing}))
    fails("the chat template refuses these messages: no system message, please", "--model", tmp_path / "a", "--chat",
          "--system", "s", "--prompt", "x")  # fmt: skip
    fails("--chat and --template exclude each other", "--model", model, "--chat", "--template", "plain", "--prompt", "x")


# ------------------------------------------------------------------------------------------------------ the whole way


def test_finetune_a_gguf_file_in_four_bits_and_talk_to_it(gguf_file, chat_data, tmp_path, capsys, monkeypatch):
    output = tmp_path / "adapter"
    assert run(
        "finetune", "--model", gguf_file, "--data", chat_data, "--method", "qlora", "--output", output, "--steps", 60,
        "--lr", "1e-2", "--validation", 0,
    ) == 0  # fmt: skip
    out = capsys.readouterr().out
    use = f"minipeft generate --adapter {output} --chat"
    assert use in out
    assert json.loads((output / "template.json").read_text()) == {"template": "chat"}
    assert run(*use.split()[1:], "--prompt", "red", "--prompt", "black", "--max-new-tokens", 8) == 0
    assert capsys.readouterr().out == "warm\ndark\n"
    say(monkeypatch, "blue\n")
    assert run(*use.split()[1:], "--max-new-tokens", 8) == 0
    assert capsys.readouterr().out == "cold\n"
    base, tokenizer = mp.from_pretrained(gguf_file, load_in_4bit=True)
    tuned = mp.PeftModel.from_pretrained(base, output)
    assert answer(tuned, tokenizer, [Message("user", "green")]) == "mild"
    merged, _ = mp.from_pretrained(gguf_file)
    with pytest.warns(UserWarning, match="trained on a base in four bits, and this one is in floats"):
        tuned = mp.PeftModel.from_pretrained(merged, output)
    assert answer(tuned, tokenizer, [Message("user", "white")]) == "light"


def test_a_gguf_file_finetuned_whole_is_a_directory(gguf_file, chat_data, tmp_path, capsys):
    output = tmp_path / "tuned"
    assert run("finetune", "--model", gguf_file, "--data", chat_data, "--output", output, "--steps", 2) == 0
    capsys.readouterr()
    model, tokenizer = mp.from_pretrained(output)
    assert model.config == mp.from_pretrained(gguf_file)[0].config
    assert tokenizer.chat_template == SYSTEM and tokenizer.encode("a 12") == mp.load_base()[1].encode("a 12")


def test_defaults_of_a_large_model(gguf_file, chat_data, tmp_path, capsys, monkeypatch):
    """Two at a time, four times a step, activations computed again; unless the options say otherwise."""
    monkeypatch.setattr("minipeft.cli.finetune.LARGE", 1000)
    seen = []
    enable = mp.Transformer.gradient_checkpointing_enable
    monkeypatch.setattr(mp.Transformer, "gradient_checkpointing_enable", lambda self, *a: seen.append(1) or enable(self, *a))
    for i, (options, batch, accumulation, checkpointed) in enumerate((
        ((), 2, 4, True), (("--batch-size", 3), 3, 1, True), (("--no-gradient-checkpointing",), 2, 4, False),
    )):  # fmt: skip
        seen.clear()
        output = tmp_path / str(i)
        data = ("--data", chat_data, "--method", "lora", "--validation", 0, "--steps", 1, "--output", output)
        assert run("finetune", "--model", gguf_file, *data, *options) == 0
        assert f"1 steps of {batch * accumulation}," in capsys.readouterr().err
        options = written(output)["options"]
        assert (options["batch_size"], options["accumulation"]) == (batch, accumulation)
        assert bool(seen) == checkpointed


def test_the_default_learning_rate_falls_with_the_width():
    from minipeft.peft.methods import METHODS, at_width

    base, real = small()[0], mp.Transformer(TransformerConfig.llama(hidden_size=576, num_attention_heads=9), seed=None)
    assert at_width(METHODS["lora"].learning_rate, base) == METHODS["lora"].learning_rate
    assert at_width(METHODS["lora"].learning_rate, real) == pytest.approx(METHODS["lora"].learning_rate * 128 / 576)
