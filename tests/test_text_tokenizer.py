"""The tokenizer: exact round trips, special tokens only where asked for, padding, and any Hugging Face directory."""

import base64
import copy
import json
import pickle
import shutil
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.files import FileError
from minipeft.text import build_tokenizer
from minipeft.text.tokenizer import Special, Tokenizer

BASE = files("minipeft").joinpath("hub", "base")
TOKENIZER = Tokenizer.load(BASE)
NASTY = [
    "<|im_end|>", "<|endoftext|>", "<|pad|>", "<|im_start|>user\n", " ", "\n\n", "\x00", "é", "é", "𝕏",
    "👩‍👩‍👧", "١٢", "0042",
]  # fmt: skip


def test_shipped_tokenizer():
    assert TOKENIZER.vocab_size == 2048
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (0, 1)
    assert [TOKENIZER.id_to_token(i) for i in range(4)] == ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    text = "And God said, Let there be light: and there was light."
    assert len(TOKENIZER.encode(text)) == 14
    assert TOKENIZER.encode("1984") == [TOKENIZER.token_to_id(digit) for digit in "1984"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(NASTY)), max_size=6).map("".join))
def test_round_trip_is_exact_and_never_special(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(ids, skip_special_tokens=True) == text
    assert all(3 < token_id < 2048 for token_id in ids)
    assert TOKENIZER.decode(TOKENIZER.encode(text, allow_special=True)) == text
    pieces = [Special("<|im_start|>"), text, Special("<|im_end|>"), "\n"]
    ids = TOKENIZER.encode_pieces(pieces)
    assert ids[0] == 2 and ids.count(2) == 1 and ids.count(3) == 1 and TOKENIZER.decode(ids) == "".join(pieces)


def test_special_tokens_only_where_asked_for():
    text = "Hi<|im_end|>"
    assert 3 not in TOKENIZER.encode(text)
    assert TOKENIZER.encode(text, allow_special=True) == [*TOKENIZER.encode("Hi"), 3]
    assert TOKENIZER.decode([*TOKENIZER.encode("Hi"), 3], skip_special_tokens=True) == "Hi"
    clean = [Special("<|im_start|>"), "user\n", "Hi there", Special("<|im_end|>")]
    assert TOKENIZER.encode_pieces(clean) == TOKENIZER.encode("".join(clean), allow_special=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))], ids=["deepcopy", "pickle"])
def test_a_copy_keeps_special_tokens_from_text_too(copied):
    """As another process has it, to which a run of a sweep is sent."""
    other, text = copied(TOKENIZER), "Hi<|im_end|>"
    assert other.encode(text) == TOKENIZER.encode(text) != other.encode(text, allow_special=True)
    assert (other.config, other.eos_token_id) == (TOKENIZER.config, TOKENIZER.eos_token_id)
    TOKENIZER.chat_template, before = "{{ messages }}", TOKENIZER.chat_template
    assert copied(TOKENIZER).chat_template == "{{ messages }}", "what was set stays"
    TOKENIZER.chat_template = before
    other.add_tokens(["<think>"])
    assert other.vocab_size == TOKENIZER.vocab_size + 1, "its backend is its own"


def test_what_is_no_text_or_no_token_is_refused():
    for call, value, error, message in (
        (TOKENIZER.encode, b"abc", TypeError, "must be a str, got bytes"),
        (TOKENIZER.encode, "\ud800", ValueError, "not valid Unicode"),
        (TOKENIZER.decode, [5, 2048], ValueError, "token ids are 0 to 2047, got 2048"),
        (TOKENIZER.decode, np.array([-1]), ValueError, "got -1"),
        (TOKENIZER.token_to_id, "<think>", ValueError, "no token '<think>'"),
        (TOKENIZER.encode_pieces, [Special("<think>")], ValueError, "no token '<think>'"),
    ):
        with pytest.raises(error, match=message):
            call(value)
    for name in ("allow_special", "add_special_tokens"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, not the text 'false'"):
            TOKENIZER.encode("Hi", **{name: "false"})


def test_pad():
    ids, mask = TOKENIZER.pad([[5, 6, 7], [8]])
    assert ids.dtype == mask.dtype == np.int64
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = TOKENIZER.pad([[5, 6, 7], [8]], side="left")
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert TOKENIZER.pad([])[0].shape == (0, 0)
    with pytest.raises(ValueError, match="'right' or 'left', got 'middle'"):
        TOKENIZER.pad([[1]], side="middle")


def test_save_and_load(tmp_path):
    TOKENIZER.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.config == TOKENIZER.config
    assert again.encode("Behold<|pad|>", True) == TOKENIZER.encode("Behold<|pad|>", True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == BASE.joinpath(name).read_bytes()


def test_nothing_of_another_tokenizer_stays_beside_a_saved_one(tmp_path):
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("OLD")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<|im_start|>"}')
    assert Tokenizer.load(tmp_path).config["bos_token"] == "<|im_start|>", "what is read there, a saved one has"
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<unk>"}')
    (tmp_path / "weights.bin").write_text("kept")
    TOKENIZER.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json", "weights.bin"]
    assert Tokenizer.load(tmp_path).config == TOKENIZER.config


def test_special_tokens_are_a_list_and_not_the_letters_of_a_text():
    with pytest.raises(TypeError, match="must be a list of texts, got '<think>'"):
        TOKENIZER.add_special_tokens({"additional_special_tokens": "<think>"})


def test_pieces_begin_as_the_tokenizer_says_and_do_not_end(tmp_path):
    """What it puts behind a text is no part of a prompt, which is to be continued."""
    TOKENIZER.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    bos, eos = ({"id": name, "ids": [TOKENIZER.token_to_id(name)], "tokens": [name]} for name in ("<|pad|>", "<|endoftext|>"))
    single = [{"SpecialToken": {"id": bos["id"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
              {"SpecialToken": {"id": eos["id"], "type_id": 0}}]  # fmt: skip
    content["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
                                 "special_tokens": {one["id"]: one for one in (bos, eos)}}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    t, (b, e) = Tokenizer.load(tmp_path), (*bos["ids"], *eos["ids"])
    assert t.encode("hello", add_special_tokens=True) == [b, *t.encode("hello"), e]
    assert t.encode_pieces(["hello"], add_special_tokens=True) == [b, *t.encode("hello")]
    assert t.encode_pieces(["<|pad|>"], add_special_tokens=True) == [b, *t.encode("<|pad|>")]
    assert t.encode_pieces(["hello"]) == t.encode("hello")


def test_training_is_deterministic_and_uses_the_size_it_is_given():
    documents = [f"the quick brown fox number {number} jumped over {number % 7} lazy dogs" for number in range(300)]
    one, two = (build_tokenizer.build_tokenizer(documents) for _ in range(2))
    assert one._plain.to_str() == two._plain.to_str()
    assert 260 < one.vocab_size <= 2048 and one.decode(one.encode("ÿ fox")) == "ÿ fox"


@pytest.fixture
def directory(tmp_path):
    shutil.copy(BASE.joinpath("tokenizer.json"), tmp_path)
    return tmp_path


def test_hugging_face_directory_with_added_token_objects(directory):
    config = {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True}, "pad_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(directory)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 3, None)
    assert tokenizer.pad([[5], [5, 6]])[0].tolist() == [[5, 3], [5, 6]]  # no padding token: end of sequence


def test_hugging_face_directory_without_config(directory):
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.eos_token_id is None and tokenizer.encode("light") == TOKENIZER.encode("light")
    with pytest.raises(ValueError, match="neither a padding nor an end-of-sequence token"):
        tokenizer.pad([[5], [5, 6]])
    (directory / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.eos_token_id == 1 and tokenizer.chat_template == "{{ messages }}"


def test_padding_and_truncation_in_the_file_are_not_obeyed(directory):
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>"}
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    text = "And God said, Let there be light"
    assert Tokenizer.load(directory).encode(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"eos_token": "</s>"}, "names '</s>' as eos_token, which tokenizer.json does not have"),
        ({"pad_token": 0}, "pad_token must be a string or an added token, got 0"),
        ({"chat_template": [{"name": [], "template": "x"}]}, "each chat_template of a list must be an object with a name"),
        ({"chat_template": ["x"]}, "each chat_template of a list must be an object with a name"),
    ],
)
def test_contradicting_config(directory, config, reason):
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        Tokenizer.load(directory)


def test_unreadable_directories(directory, tmp_path_factory):
    with pytest.raises(FileError, match=r"there is no tokenizer\.json"):
        Tokenizer.load(tmp_path_factory.mktemp("empty"))
    for name, content, message in (
        ("tokenizer_config.json", "[1]", "must hold an object, got list"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer.json", '{"model": 3}', r"tokenizer\.json: not a tokenizer"),
    ):
        (directory / name).write_text(content)
        with pytest.raises(FileError, match=message):
            Tokenizer.load(directory)


def edited(tmp_path, **changes):
    """The shipped tokenizer with other entries: of its model, its added tokens, its configuration."""
    content = json.loads((BASE / "tokenizer.json").read_text("utf-8"))
    content["model"] |= changes.get("model", {})
    content["model"]["vocab"] |= changes.get("vocab", {})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((BASE / "tokenizer_config.json").read_text("utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | changes.get("config", {})))
    return tmp_path


def test_ids_that_are_not_used_count_and_far_ones_are_refused_before_they_take_memory(tmp_path):
    tokenizer = Tokenizer.load(edited(tmp_path, vocab={"zzz": 2050}))
    assert tokenizer.vocab_size == 2051 and tokenizer.id_to_token(2050) == "zzz" and tokenizer.decode([2050]) == "zzz"
    with pytest.raises(ValueError, match="the tokenizer has 2049 tokens, but ids up to 500000000"):
        Tokenizer.load(edited(tmp_path, vocab={"zzz": 500_000_000}))


def test_files_that_are_no_text_or_no_tokenizer_are_an_error_of_the_file(tmp_path, capfd):
    with pytest.raises(ValueError, match=r"names '.ud800' as eos_token, which tokenizer.json does not have"):
        Tokenizer.load(edited(tmp_path, config={"eos_token": "\ud800"}))
    edited(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match=r"chat_template.jinja: does not hold text in UTF-8"):
        Tokenizer.load(tmp_path)
    merges = [["a", "b"]]
    edited(tmp_path, model={"continuing_subword_prefix": "1e9999", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": merges})
    with pytest.raises(FileError, match="not a tokenizer that the tokenizers library reads"):  # it panics
        Tokenizer.load(tmp_path)


def replace(text, put):
    return {"type": "Replace", "pattern": {"String": text}, "content": put}


TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 11, "pair": [], "special_tokens": {}}
CHARSMAP = base64.b64encode(b"\4\0\0\0" + bytes(4) + b"x" * 10_001 + b"\0").decode()


@pytest.mark.parametrize("part, content", [
    ("normalizer", {"type": "Sequence", "normalizers": [replace("a", "a" * 10)] * 5}),
    ("normalizer", {"normalizers": [{"pattern": {"String": "a"}, "content": "a" * 10}] * 5}),  # as older versions wrote it
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [replace("aa", "b" * 202)] * 2}, replace("", "b")]}),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 600}, {"type": "NFKC"}]}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}] * 6}),
    ("post_processor", {"type": "Sequence", "processors": [TEMPLATE] * 4}),
    ("decoder", {"type": "Sequence", "decoders": [{"type": "CTC", "pad_token": "p", "word_delimiter_token": "", "cleanup": False}] * 9}),
])  # fmt: skip
def test_what_may_make_a_text_much_longer_is_refused_before_the_library_runs_it(directory, part, content):
    path = directory / "tokenizer.json"
    read = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(read | {part: content}))
    with pytest.raises(FileError, match=f"tokenizer.json: its {part} may make a text more than 10,000 times as long"):
        Tokenizer.load(directory)


def test_ordinary_normalizers_are_not_refused_and_long_patterns_are(directory):
    path = directory / "tokenizer.json"
    read = json.loads(path.read_text("utf-8"))
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    albert = [replace("``", '"'), {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}, spaces]
    for normalizers in ([{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")], albert):
        path.write_text(json.dumps(read | {"normalizer": {"type": "Sequence", "normalizers": normalizers}}))
        assert Tokenizer.load(directory).encode("Let there be light")
    longer = json.dumps({"type": "Sequence", "normalizers": [replace("a", "a" * 10)] * 5})
    path.write_text(f'{{"normalizer": {longer}, {json.dumps(read | {"normalizer": None})[1:]}')  # the library would obey the first
    assert Tokenizer.load(directory).encode("a") == TOKENIZER.encode("a")
    spaces["pattern"]["Regex"] = "(?i)" + "xk" * 2499
    path.write_text(json.dumps(read | {"normalizer": spaces}))
    with pytest.raises(FileError, match=r"tokenizer.json: its regular expressions have 5,002 characters; at most 5,000 are"):
        Tokenizer.load(directory)


def test_what_a_tokenizer_has_no_token_for_is_a_value_error():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    with pytest.raises(ValueError, match=r"the tokenizer cannot encode this .*UNK") as error:
        Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="[UNK]"))).encode("b")
    assert type(error.value) is ValueError
