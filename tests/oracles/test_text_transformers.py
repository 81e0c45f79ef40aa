"""The tokenizer and the ChatML template against transformers."""

from importlib.resources import files

import pytest

from minipeft.text.datasets import Conversation, Message
from minipeft.text.examples import encode_examples
from minipeft.text.templates import chatml_prompt
from minipeft.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="needs the extra 'oracles'")

BASE = files("minipeft").joinpath("hub", "base")
TEXTS = ["And God said,  Let there be light.\n\n", "<|im_start|>user\nHi<|im_end|>", "naïve ½ 1984 👩‍👩‍👧", ""]
MESSAGES = [("system", "Be kind."), ("user", " Hi\n"), ("assistant", "Hello!"), ("user", "Why?"), ("assistant", "So.")]


@pytest.fixture(scope="module", params=["shipped", "saved again"])
def theirs(request, tmp_path_factory):
    directory = BASE
    if request.param == "saved again":
        directory = tmp_path_factory.mktemp("saved")
        Tokenizer.load(BASE).save(directory)
    return transformers.AutoTokenizer.from_pretrained(str(directory))


def test_auto_tokenizer_reads_the_directory(theirs):
    ours = Tokenizer.load(BASE)
    assert (len(theirs), theirs.eos_token_id, theirs.pad_token_id) == (2048, ours.eos_token_id, ours.pad_token_id)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, allow_special=True) == ids
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)


def test_chatml_is_the_chat_template(theirs):
    ours = Tokenizer.load(BASE)
    chat = [{"role": role, "content": content} for role, content in MESSAGES]
    messages = tuple(Message(*message) for message in MESSAGES)
    whole = theirs.apply_chat_template(chat, return_dict=True)["input_ids"]
    (example,) = encode_examples([Conversation(messages)], ours, 200).examples
    assert [*example.input_ids, *ours.encode("\n")] == whole
    shown = theirs.apply_chat_template(chat[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ours.encode_pieces(chatml_prompt(messages[:2])) == shown


def test_what_transformers_saves_is_read(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.eos_token_id, again.pad_token_id, again.vocab_size) == (1, 0, 2048)
    assert again.chat_template == Tokenizer.load(BASE).chat_template
    assert [again.encode(text) for text in TEXTS] == [Tokenizer.load(BASE).encode(text) for text in TEXTS]
