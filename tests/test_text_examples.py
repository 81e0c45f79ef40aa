"""From records to batches: what is learned, what does not fit, and an order that can be taken up again."""

from importlib.resources import files

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.text.datasets import (
    Completion,
    Conversation,
    Document,
    Instruction,
    Message,
    Preference,
    UnpairedPreference,
)
from minipeft.text.examples import (
    chunk_text,
    encode_documents,
    encode_examples,
    encode_preferences,
    encode_turns,
    encode_unpaired,
)
from minipeft.text.templates import Turn, chatml, chatml_prompt, custom
from minipeft.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(files("minipeft").joinpath("hub", "base"))
EOS = TOKENIZER.eos_token_id


def learned(example):
    return TOKENIZER.decode(example.labels[example.labels != -100])


def test_only_the_completion_is_learned():
    ((example,), truncated, dropped) = encode_examples([Completion("Say hi:", " hi there")], TOKENIZER, 64)
    assert (truncated, dropped) == (0, 0) and example.input_ids.dtype == example.labels.dtype == np.int64
    prompt = TOKENIZER.encode("Say hi:")
    assert example.input_ids.tolist() == prompt + TOKENIZER.encode(" hi there") + [EOS]
    assert example.labels.tolist() == [-100] * len(prompt) + TOKENIZER.encode(" hi there") + [EOS]
    ((same,), *_) = encode_examples([{"prompt": "Say hi:", "completion": " hi there"}], TOKENIZER, 64)
    assert np.array_equal(same.labels, example.labels)
    with pytest.raises(ValueError, match="field 'completion' is missing"):
        encode_examples([{"prompt": "Say hi:"}], TOKENIZER, 64)


def merging_tokenizer(**options):
    """Byte-pair encoding of the letters a to d and the space, with the merges "b c" and "bc d"."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "a", "b", "c", "d", " ", "bc", "bcd"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("b", "c"), ("bc", "d")], **options))
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


def test_a_completion_starts_where_the_tokens_diverge():
    def parts(prompt, completion, tokenizer):
        ((ids, labels),) = encode_examples([Completion(prompt, completion)], tokenizer, 64).examples
        assert ids.tolist()[:-1] == tokenizer.encode(prompt + completion, add_special_tokens=True)
        shown = [tokenizer.id_to_token(i) for i in ids]
        start = next(t for t, label in enumerate(labels) if label != -100)
        assert labels.tolist() == [-100] * start + ids.tolist()[start:]
        return shown[:start], shown[start:]

    tokenizer = merging_tokenizer()
    assert parts("aa", "bcd", tokenizer) == (["a", "a"], ["bcd", "</s>"])
    assert parts("aab", "cda", tokenizer) == (["a", "a"], ["bcd", "a", "</s>"])  # b is in the prompt, bcd is learned
    assert parts("abc", "b", tokenizer) == (["a", "bc"], ["b", "</s>"])
    backend = merging_tokenizer()._plain
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    assert parts("b", "cd", Tokenizer(backend, {"eos_token": "</s>"})) == (["<s>"], ["bcd", "</s>"])
    assert parts("Say hi: ", "there", TOKENIZER)[1][0] == "Ġthere"  # the prompt's last space is learned again


def test_a_completion_ends_where_the_tokens_diverge():
    turns = [Turn(("a",), ("ab",)), Turn(("ca",), ("d",))]
    ids, labels = encode_turns(turns, merging_tokenizer())
    assert ids.tolist() == [2, 2, 7, 2, 5, 1]  # a a bc a d </s>: bc is not the first answer's
    assert labels.tolist() == [-100, 2, -100, -100, 5, 1]


def test_templates_of_the_forms():
    (alpaca,) = encode_examples([Instruction("Name a dog.", "", "Rex")], TOKENIZER, 99).examples
    assert TOKENIZER.decode(alpaca.input_ids).endswith("### Response:Rex<|endoftext|>")
    assert learned(alpaca) == "Rex<|endoftext|>"
    template = custom("{instruction} ->")
    (own,) = encode_examples([Instruction("Name a dog.", "", "Rex")], TOKENIZER, 99, template).examples
    assert TOKENIZER.decode(own.input_ids) == "Name a dog. ->Rex<|endoftext|>"


def test_conversation_learns_every_answer_and_is_chatml():
    said = ("system", "Kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "<|im_end|>?"), ("assistant", "Bye")
    messages = tuple(Message(*m) for m in said)
    (example,) = encode_examples([Conversation(messages)], TOKENIZER, 99).examples
    assert learned(example) == "Hello!<|im_end|>Bye<|im_end|>"
    assert (example.input_ids == 3).sum() == 5 and example.input_ids[-1] == 3  # no <|im_end|> from the user's text
    shown = TOKENIZER.encode_pieces(chatml_prompt(messages[:2]))  # what generation would be given
    assert example.input_ids[: len(shown)].tolist() == shown
    text = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
    assert TOKENIZER.decode(example.input_ids) + "\n" == text


def test_documents_become_blocks():
    texts = ["In the beginning God made the heaven and the earth.", "And God said", "light"]
    examples, truncated, dropped = encode_examples([Document(text) for text in texts], TOKENIZER, 8)
    stream = np.concatenate([example.input_ids for example in examples])
    assert stream.tolist() == [i for text in texts for i in [*TOKENIZER.encode(text), EOS]][: len(stream)]
    assert all(len(example.input_ids) == 8 for example in examples[:-1]) and 2 <= len(examples[-1].input_ids) <= 8
    assert all((example.labels == example.input_ids).all() for example in examples) and truncated == dropped == 0


@settings(deadline=None)
@given(st.lists(st.text(max_size=12), max_size=5), st.integers(2, 9))
def test_chunks_are_the_stream(texts, length):
    stream = encode_documents(texts, TOKENIZER)
    assert (stream == EOS).sum() == len(texts)
    blocks = chunk_text(stream, length)
    joined = np.concatenate([stream[:0], *blocks])
    assert (joined == stream[: len(joined)]).all() and 0 <= len(stream) - len(joined) <= 1
    assert all(len(block) == length for block in blocks[:-1])


def test_a_block_of_one_token_is_refused():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        chunk_text(np.arange(5), 1)


def test_overflow_is_said_not_hidden():
    records = [Completion("a", " b"), Completion("a", " b" * 50), Completion("a" + " a" * 49, " b")]
    with pytest.raises(
        ValueError, match=r"2 of 3 records are longer than 10 tokens, the first of them record 2 with 52"
    ):
        encode_examples(records, TOKENIZER, 10)
    examples, truncated, dropped = encode_examples(records, TOKENIZER, 10, on_overflow="truncate")
    assert (len(examples), truncated, dropped) == (2, 1, 1)  # of the third only prompt would be left
    assert len(examples[1].input_ids) == len(examples[1].labels) == 10 and (examples[1].labels[1:] != -100).all()
    examples, truncated, dropped = encode_examples(records, TOKENIZER, 10, on_overflow="drop")
    assert (len(examples), truncated, dropped) == (1, 0, 2)
    with pytest.raises(ValueError, match="'error', 'truncate' or 'drop', got 'cut'"):
        encode_examples(records, TOKENIZER, 10, on_overflow="cut")
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        encode_examples(records, TOKENIZER, 1)


def test_unpaired_preferences_are_refused_as_pairs_are():
    with pytest.raises(ValueError, match=r"an unpaired preference takes .* records, got \{dict\}"):
        encode_unpaired([{"prompt": "a", "completion": "b", "label": True}], TOKENIZER, 9)
    with pytest.raises(ValueError, match="shorten them"):
        encode_unpaired([UnpairedPreference("a", "b " * 99, True)], TOKENIZER, 9)


def test_preferences():
    ((chosen, rejected),) = encode_preferences([Preference("Q:", " good", " bad one")], TOKENIZER, 32)
    assert learned(chosen) == " good<|endoftext|>" and learned(rejected) == " bad one<|endoftext|>"
    size = len(TOKENIZER.encode("Q:"))
    assert chosen.input_ids[:size].tolist() == rejected.input_ids[:size].tolist() == TOKENIZER.encode("Q:")
    ((chosen, _),) = encode_preferences([Preference("Q:", "good", "bad")], TOKENIZER, 32, chatml)
    assert learned(chosen) == "good<|im_end|>"
    with pytest.raises(ValueError, match="1 of 1 records are longer than 4 tokens"):
        encode_preferences([Preference("Q:", "good", "bad " * 9)], TOKENIZER, 4)
    with pytest.raises(ValueError, match=r"takes \{prompt, completion\} records, got \{prompt, chosen, rejected\}"):
        encode_examples([Preference("Q:", "good", "bad")], TOKENIZER, 32)
