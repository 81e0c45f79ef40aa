"""Hugging Face directories without transformers: round trips, what others write, and what is refused, by name."""

import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
from cli_helpers import weights

import minipeft as mp
from minipeft.backend import to_numpy
from minipeft.files import FileError, read_safetensors, write_safetensors
from minipeft.hub import base, pretrained
from minipeft.hub.pretrained import HubError
from minipeft.nn.heads import SequenceClassifier, ValueModel
from minipeft.nn.layers import Linear
from minipeft.nn.transformer import RopeScaling, Transformer, TransformerConfig

SHAPE = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32)
FAMILY_CLASS = {"gpt2": "GPT2LMHeadModel", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
CONFIGS = {
    "gpt2": dict(model_type="gpt2", eos_token_id=2, dropout=0.25),
    "gpt2 untied": dict(model_type="gpt2", tie_word_embeddings=False, intermediate_size=24, layer_norm_epsilon=1e-4),
    "llama": dict(model_type="llama", num_key_value_heads=2, eos_token_id=(2, 7), bos_token_id=1, pad_token_id=0),
    "llama untied": dict(
        model_type="llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True, head_dim=6, dropout=0.1,
        rope_theta=500.0, rms_norm_eps=1e-3, initializer_range=0.5,
    ),
    "llama 3": dict(model_type="llama", rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16)),
    "mistral": dict(model_type="mistral", num_key_value_heads=2, head_dim=6, tie_word_embeddings=False),
    "qwen2": dict(model_type="qwen2", num_key_value_heads=2, eos_token_id=(2, 3), rope_theta=1e6),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CONFIGS)
dialects = pytest.mark.parametrize("case", ["gpt2", "llama"])

# the files that the two versions of transformers write for one small model of each family, as they are
LLAMA_4 = json.loads("""{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1,
  "dtype": "float32", "eos_token_id": 2, "head_dim": 4, "hidden_act": "silu", "hidden_size": 16,
  "initializer_range": 0.02, "intermediate_size": 64, "max_position_embeddings": 32, "mlp_bias": false,
  "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 20000.0,
  "tie_word_embeddings": false, "transformers_version": "4.57.6", "use_cache": true, "vocab_size": 40}""")
LLAMA_5 = {k: v for k, v in LLAMA_4.items() if k not in ("rope_scaling", "rope_theta")}
LLAMA_5 |= {"pad_token_id": None, "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}}
GPT2_4 = json.loads("""{
  "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
  "dtype": "float32", "embd_pdrop": 0.1, "eos_token_id": 3, "initializer_range": 0.02,
  "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_embd": 16, "n_head": 4, "n_inner": null, "n_layer": 2,
  "n_positions": 32, "reorder_and_upcast_attn": false, "resid_pdrop": 0.1, "scale_attn_by_inverse_layer_idx": false,
  "scale_attn_weights": true, "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
  "summary_type": "cls_index", "summary_use_proj": true, "transformers_version": "4.57.6", "use_cache": true,
  "vocab_size": 40}""")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
GPT2_5 = GPT2_4 | {"add_cross_attention": False, "pad_token_id": None, "tie_word_embeddings": True}


def normal(model, seed=1):
    """The model with normal numbers everywhere: also in biases and norms, so that a mix-up shows."""
    generator = np.random.default_rng(seed)
    for p in model.parameters():
        p.data = generator.standard_normal(p.shape).astype(np.float32)
    return model


def build(case, seed=1):
    return normal(Transformer(TransformerConfig(**(SHAPE | CONFIGS[case])), seed=seed), seed)


@pytest.fixture
def saved(tmp_path):
    """save(case) -> a directory with that model."""

    def save(case="llama", **options):
        mp.save_pretrained(build(case), tmp_path / case, **options)
        return tmp_path / case

    return save


def edit(directory, **changes):
    path = directory / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


def same(model, other):
    mine, others = model.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(np.array_equal(a, others[name]) for name, a in mine.items())


def ids():
    return np.arange(12).reshape(2, 6)


# ------------------------------------------------------------------------------------------------------ round trips


@every_case
def test_round_trip_is_exact(case, saved):
    model, tokenizer = mp.from_pretrained(saved(case))
    assert tokenizer is None
    assert model.config == build(case).config
    assert same(model, build(case))
    assert np.array_equal(model(ids()).data, build(case)(ids()).data)


@dialects
def test_classifier_round_trip(case, tmp_path):
    for labels in (1, 2, 5):
        model = SequenceClassifier(build(case), num_labels=labels, seed=3)
        mp.save_pretrained(model, tmp_path)
        again, _ = mp.from_pretrained(tmp_path)
        assert isinstance(again, SequenceClassifier) and again.num_labels == labels
        assert again.config == model.config and same(again, model)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {str(i): name for i, name in enumerate("good bad ugly plain odd".split())}
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": names}))
    mp.save_pretrained(mp.from_pretrained(tmp_path)[0].copy(), tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["id2label"] == names and kept["label2id"] == {name: int(i) for i, name in names.items()}
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"a": "good", "b": "bad"}}))
    with pytest.raises(HubError, match="id2label must name the classes 0 to 1, not a, b"):
        mp.from_pretrained(tmp_path)
    del config["id2label"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_labels": 5}))
    assert list(mp.from_pretrained(tmp_path)[0].id2label.values()) == [f"LABEL_{i}" for i in range(5)]
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_labels": True}))
    with pytest.raises(HubError, match="num_labels must be a positive integer, not True"):
        mp.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_labels": 10**6}))
    tracemalloc.start()
    with pytest.raises(HubError, match=r"score.weight has the shape \(5, 16\), the configuration gives \(1000000, 16\)"):
        mp.from_pretrained(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10**7  # no name of each label
    tracemalloc.stop()
    (tmp_path / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    with pytest.raises(HubError, match="several labels a text, has a loss that is not computed here"):
        mp.from_pretrained(tmp_path)


def test_same_model_same_bytes(tmp_path):
    for name in ("a", "b"):
        mp.save_pretrained(build("llama"), tmp_path / name, mp.load_base()[1])
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


@every_case
def test_a_tied_head_is_written_once(case, saved):
    arrays, metadata = read_safetensors(saved(case) / "model.safetensors")
    assert metadata == {"format": "pt"}
    assert ("lm_head.weight" in arrays) == (not build(case).config.tie_word_embeddings)


def test_tokenizer_travels_along(tmp_path):
    model, tokenizer = mp.load_base()
    mp.save_pretrained(model, tmp_path, tokenizer)
    again, its = mp.from_pretrained(tmp_path)
    assert same(again, model)
    text = "And God said, <|im_end|> Let there be light."
    assert its.encode(text) == tokenizer.encode(text)
    assert (its.eos_token_id, its.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


@every_case
def test_half_precision_is_storage(case, saved):
    directory = saved(case, dtype="float16")
    wide, _ = mp.from_pretrained(directory)
    half, _ = mp.from_pretrained(directory, dtype="float16")
    assert {p.dtype.name for p in wide.parameters()} == {"float32"}
    assert {p.dtype.name for p in half.parameters()} == {"float16"}
    for (name, a), (_, b) in zip(half.named_parameters(), build(case).named_parameters()):
        assert np.array_equal(a.data, b.data.astype(np.float16)), name
    logits, expected = half(ids()).data, wide(ids()).data
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    mp.save_pretrained(half, directory)  # and stays what it is
    assert {a.dtype.name for a in read_safetensors(directory / "model.safetensors")[0].values()} == {"float16"}


def test_float16_that_would_overflow_is_refused(tmp_path):
    model = build("llama")
    model.model.norm.weight.data[0] = 1e5
    with pytest.raises(HubError, match=r"model\.norm\.weight holds values up to 100000, which float16 cannot hold"):
        mp.save_pretrained(model, tmp_path, dtype="float16")
    assert not list(tmp_path.iterdir())
    mp.save_pretrained(model, tmp_path)
    with pytest.raises(HubError, match=r"model\.norm\.weight holds values up to 100000"):
        mp.from_pretrained(tmp_path, dtype="float16")


def test_device(xp, saved):
    """The backend's arrays, whatever they are read from."""
    model = build("llama").to(xp)
    directory = saved()
    mp.save_pretrained(model, directory)
    again, _ = mp.from_pretrained(directory, backend="numpy")
    assert all(np.array_equal(to_numpy(p.data), q.data) for p, q in zip(model.parameters(), again.parameters()))


def peak_of(load):
    """(what `load()` gives, the most memory that Python's and NumPy's allocators held in it)."""
    tracemalloc.start()
    try:
        made = load()
        return made, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model large enough for its weights to outweigh everything else, in every way of storing it."""
    directory = tmp_path_factory.mktemp("large")
    model = Transformer(TransformerConfig.llama(vocab_size=2000, hidden_size=256, num_hidden_layers=4), seed=0)
    for dtype in ("float32", "float16"):
        mp.save_pretrained(model, directory / dtype, dtype=dtype)
    mp.save_pretrained(model, directory / "bfloat16")
    to_bfloat16(directory / "bfloat16")
    return directory


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_loading_holds_the_weights_once(dtype, large):
    """Not at all where they are in the file as they are wanted: there they stay."""
    (model, _), peak = peak_of(lambda: mp.from_pretrained(large / dtype))
    size = sum(p.data.nbytes for p in model.parameters())
    assert peak < (0.1 * size if dtype == "float32" else 1.1 * size)
    assert (peak > size) == (dtype != "float32")
    if dtype == "float16":
        (model, _), peak = peak_of(lambda: mp.from_pretrained(large / dtype, dtype="float16"))
        assert peak < 0.1 * size and {p.dtype.name for p in model.parameters()} == {"float16"}
    if dtype == "bfloat16":  # the upper half of a float32, widened bit for bit
        for p, q in zip(model.parameters(), mp.from_pretrained(large / "float32")[0].parameters(), strict=True):
            assert np.array_equal(p.data.view(np.uint32), q.data.view(np.uint32) >> 16 << 16)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_loading_in_four_bits(dtype, large):
    """The model that quantize_model makes, at a peak of little more than its own size."""
    wide = mp.from_pretrained(large / dtype)[0]
    (model, _), peak = peak_of(lambda: mp.from_pretrained(large / dtype, load_in_4bit=True))
    expected = mp.quant.quantize_model(wide)
    assert same(model, expected) and not any(p.requires_grad for p in model.parameters())
    assert [type(m) for _, m in model.named_modules()] == [type(m) for _, m in expected.named_modules()]
    allocated = sum(p.data.nbytes for p in model.parameters() if not (dtype == "float32" and p.dtype == np.float32 and p.ndim > 1))
    largest = max(p.data.nbytes for p in wide.parameters() if p is not wide.model.embed_tokens.weight)
    assert allocated < 0.5 * sum(p.data.nbytes for p in wide.parameters())
    assert peak < 1.1 * allocated + 3 * largest


def test_a_loaded_weight_is_trained_in_place_and_does_not_reach_the_file(large):
    """It is mapped privately: changed here, and nowhere else."""
    path = large / "float32" / "model.safetensors"
    before = path.read_bytes()
    one, _ = mp.from_pretrained(large / "float32")
    other, _ = mp.from_pretrained(large / "float32")
    for p in one.parameters():
        assert p.requires_grad and p.data.flags.writeable
        p.data += 1
    assert path.read_bytes() == before
    assert same(other, mp.from_pretrained(large / "float32")[0]) and not same(one, other)


def test_a_model_saved_over_itself(saved):
    """The file that it is mapped from is replaced as a whole; the model keeps the old one."""
    directory = saved("llama")
    model, _ = mp.from_pretrained(directory)
    model.model.norm.weight.data *= 2
    mp.save_pretrained(model, directory)
    own = np.atleast_1d(model.config.eos_token_id).tolist()
    for ends, kept in (([*own, 5], True), ([77, 78], False)):  # the second is of another model
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "temperature": 0.6}))
        mp.save_pretrained(model, directory)
        assert (directory / "generation_config.json").exists() == kept
    again, _ = mp.from_pretrained(directory)
    assert same(again, model) and not same(again, build("llama"))


# -------------------------------------------------------------------------------------------------- what others write


@pytest.mark.parametrize("content", [LLAMA_4, LLAMA_5, GPT2_4, GPT2_5], ids=["llama 4", "llama 5", "gpt2 4", "gpt2 5"])
def test_a_configuration_as_transformers_writes_it(content, tmp_path):
    config = {
        "gpt2": TransformerConfig.gpt2(**SHAPE, dropout=0.1, bos_token_id=50256, eos_token_id=3),
        "llama": TransformerConfig.llama(
            **SHAPE, num_key_value_heads=2, intermediate_size=64, rms_norm_eps=1e-5, rope_theta=20000.0,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        ),
    }[content["model_type"]]  # fmt: skip
    model = normal(Transformer(config))
    mp.save_pretrained(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    again, _ = mp.from_pretrained(tmp_path)
    assert again.config == config and same(again, model)


def test_ids_that_a_configuration_leaves_out(saved):
    """The family's own, where the vocabulary has them; null says that there is none."""
    directory = saved("llama")
    edit(directory, bos_token_id="absent", eos_token_id="absent")
    config = mp.from_pretrained(directory)[0].config
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    edit(directory, bos_token_id=None, eos_token_id=None)
    config = mp.from_pretrained(directory)[0].config
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
    directory = saved("gpt2")
    edit(directory, eos_token_id="absent")
    assert mp.from_pretrained(directory)[0].config.eos_token_id is None


@dialects
def test_bare_names_and_old_buffers(case, saved):
    """As the first GPT-2 files and those of a LlamaModel have them."""
    directory = saved(case)
    renamed = {name.partition(".")[2]: a for name, a in weights(directory).items()}
    if case == "llama":
        renamed["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        edit(directory, architectures=["LlamaModel"])
    else:
        renamed["h.1.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), np.float32))
        renamed["h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    write_safetensors(directory / "model.safetensors", renamed)
    assert same(mp.from_pretrained(directory)[0], build(case))


@pytest.mark.parametrize("spelling", ["transformers 4", "transformers 4, before rope_type", "transformers 5"])
def test_rotary_scaling_of_llama_3(spelling, saved):
    directory = saved("llama 3")
    written = json.loads((directory / "config.json").read_text())
    assert written["rope_scaling"] == LLAMA3 and written["rope_parameters"] == {**LLAMA3, "rope_theta": 5e5}
    if spelling == "transformers 5":
        edit(directory, rope_theta="absent", rope_scaling="absent")
    elif spelling == "transformers 4":
        edit(directory, rope_parameters="absent")
    else:
        scaling = {"type" if k == "rope_type" else k: v for k, v in LLAMA3.items()}
        edit(directory, rope_parameters="absent", rope_scaling=scaling)
    model, _ = mp.from_pretrained(directory)
    assert model.config == build("llama 3").config
    plain = Transformer(model.config.replace(rope_scaling=None), seed=None)
    plain.load_state_dict(model.state_dict())
    assert not np.allclose(model(ids()).data, plain(ids()).data, atol=1e-3)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_other_families_of_the_llama_dialect(family, saved):
    directory = saved(family)
    written = json.loads((directory / "config.json").read_text())
    assert written["architectures"] == [FAMILY_CLASS[family]] and written["model_type"] == family
    arrays, _ = read_safetensors(directory / "model.safetensors")
    biases = {name.split(".")[-2] for name in arrays if name.endswith(".bias")}
    assert biases == ({"q_proj", "k_proj", "v_proj"} if family == "qwen2" else set())
    edit(directory, sliding_window=64, **({"use_sliding_window": False} if family == "qwen2" else {}))
    assert same(mp.from_pretrained(directory)[0], build(family))


@dialects
def test_tied_head_that_is_written_all_the_same(case, saved):
    directory = saved(case)
    arrays = weights(directory)
    embedding = next(name for name in arrays if name.endswith(("wte.weight", "embed_tokens.weight")))
    arrays["lm_head.weight"] = arrays[embedding].copy()
    write_safetensors(directory / "model.safetensors", arrays)
    assert same(mp.from_pretrained(directory)[0], build(case))
    arrays["lm_head.weight"][0, 0] += 1
    write_safetensors(directory / "model.safetensors", arrays)
    with pytest.raises(HubError, match=rf"tie_word_embeddings is true, but lm_head\.weight differs from {embedding}"):
        mp.from_pretrained(directory)


def as_bfloat16(data):
    """The bytes of a safetensors file whose 16-bit integers are said to be bfloat16."""
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].replace(b'"U16"', b'"BF16"')
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def to_bfloat16(directory):
    """Cut a directory's float32 weights to bfloat16, the upper half of their bits."""
    path = directory / "model.safetensors"
    halves = {name: (a.view(np.uint32) >> 16).astype(np.uint16) for name, a in weights(directory).items()}
    write_safetensors(path, halves)
    path.write_bytes(as_bfloat16(path.read_bytes()))


def shard(directory, places=lambda i: f"model-{i % 3 + 1:05d}-of-00003.safetensors"):
    """Spread the weights over several files with an index, as transformers does for large models."""
    path = directory / "model.safetensors"
    arrays = weights(directory)
    placed = {name: places(i) for i, name in enumerate(arrays)}
    for file in set(placed.values()):
        write_safetensors(directory / file, {name: a for name, a in arrays.items() if placed[name] == file})
    path.unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return placed


@every_case
def test_weights_in_several_files(case, saved):
    directory = saved(case)
    placed = shard(directory)
    assert len(set(placed.values())) == 3
    model, _ = mp.from_pretrained(directory)
    assert same(model, build(case))
    mp.save_pretrained(model, directory)  # one file takes their place
    assert not (directory / "model.safetensors.index.json").exists()
    assert same(mp.from_pretrained(directory)[0], build(case))


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(model_type="gemma2"), "model_type must be one of 'llama', 'mistral', 'qwen2', 'gpt2', not 'gemma2'"),
        (dict(model_type="absent"), "model_type must be one of 'llama', 'mistral', 'qwen2', 'gpt2', not None"),
        (dict(model_type="mistral", max_position_embeddings=8192), "sliding_window is 4096, narrower than"),
        (dict(model_type="mistral", sliding_window=16), "sliding_window is 16, narrower than the 32 positions"),
        (dict(model_type="qwen2", use_sliding_window=True), "use_sliding_window is True: only False is supported"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types names 'sliding_attention'"),
        (dict(architectures=["LlamaForTokenClassification"]), "LlamaForTokenClassification"),
        (dict(architectures="LlamaForCausalLM"), "architectures"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu': only 'silu' or 'swish' is supported"),
        (dict(pretraining_tp=2), "pretraining_tp is 2: only 1 is supported"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling asks for the rope_type 'linear'"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "of the rope_type 'llama3' lacks the key 'low_freq"),
        (dict(rope_parameters={**LLAMA3, "factor": "8"}), "rope_parameters: factor must be a number, not '8'"),
        (dict(rope_scaling={**LLAMA3, "high_freq_factor": 1.0}), "0 < low_freq_factor < high_freq_factor, not 1.0 and 1.0"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 8.0}), "rope_parameters asks for the rope_type 'yarn'"),
        (
            dict(rope_parameters={"rope_theta": 5.0}),
            "rope_parameters says rope_theta is 5.0, the key rope_theta 10000.0",
        ),
        (dict(rope_parameters=[1]), "rope_parameters must be an object"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        (
            dict(quantization_config={"quant_method": "gptq"}),
            "quantization_config is {'quant_method': 'gptq'}: the option is not",
        ),
        (dict(sliding_window=128), "sliding_window is 128: the option is not supported"),
        (dict(add_cross_attention=True), "add_cross_attention is True: only False is supported"),
        (dict(hidden_size="absent"), "the key 'hidden_size' is missing"),
        (dict(hidden_size="16"), "hidden_size must be an integer, not '16'"),
        (dict(hidden_size=True), "hidden_size must be an integer, not True"),
        (dict(hidden_size=-16), "hidden_size must be an integer of at least 1"),
        (dict(hidden_size=10**30), "hidden_size"),
        (dict(rms_norm_eps="tiny"), "rms_norm_eps must be a number, not 'tiny'"),
        (dict(tie_word_embeddings=1), "tie_word_embeddings must be true or false, not 1"),
        (dict(eos_token_id=[2, "x"]), "eos_token_id must be an integer, not 'x'"),
        (dict(num_key_value_heads=3), "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        (dict(model_type=["llama"]), "model_type must be one of 'llama', 'mistral', 'qwen2', 'gpt2', not ['llama']"),
        (dict(layer_types=5), "layer_types must be a list, not 5"),
        (dict(rms_norm_eps=10**400), "rms_norm_eps must be a number"),
        (dict(rms_norm_eps=-1e-6), "rms_norm_eps must be a number of at least 0, got -1e-06"),
        (dict(rope_theta=0, rope_parameters=None), "rope_theta must be a number above 0, got 0.0"),
        (dict(rope_theta=-1e4, rope_parameters=None), "rope_theta must be a number above 0, got -10000.0"),
        (dict(rope_scaling={"factor": 2.0}), "rope_scaling is {'factor': 2.0}, and does not say its rope_type"),
        (dict(pad_token_id=2**63), "pad_token_id must be an integer"),
    ],
)
def test_llama_configurations_that_are_refused(changes, sentence, saved):
    refused(saved("llama"), changes, sentence)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(activation_function="gelu"), "activation_function is 'gelu': only 'gelu_new' or"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True: only False is"),
        (dict(scale_attn_weights=False), "scale_attn_weights is False: only True is supported"),
        (dict(n_embd=None), "the key 'n_embd' is missing"),
        (dict(resid_pdrop=1.0), "dropout must be a number of at least 0 and below 1"),
    ],
)  # fmt: skip
def test_gpt2_configurations_that_are_refused(changes, sentence, saved):
    refused(saved("gpt2"), changes, sentence)


def refused(directory, changes, sentence):
    """In one sentence that names the file, and before any weight is read."""
    edit(directory, **changes)
    (directory / "model.safetensors").write_bytes(b"would fail")
    with pytest.raises(HubError) as error:
        mp.from_pretrained(directory)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"{directory / 'config.json'}: ")


def test_no_such_directory_and_nothing_downloaded(tmp_path):
    with pytest.raises(HubError, match="gpt2: no such directory; give a local Hugging Face directory or"):
        mp.from_pretrained("gpt2")
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match=r"is a file, but no \.gguf; give a local Hugging Face directory or a \.gguf file"):
        mp.from_pretrained(tmp_path / "file")


def test_directories_without_a_model(saved, tmp_path):
    with pytest.raises(HubError, match=r"there is no config\.json in this directory; no model there"):
        mp.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(HubError, match=r"an adapter's: load it with PeftModel\.from_pretrained \(--adapter\), or merge it first \(minipeft merge\)"):
        mp.from_pretrained(tmp_path)
    directory = saved()
    (directory / "model.safetensors").unlink()
    with pytest.raises(HubError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        mp.from_pretrained(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_a_pickle_is_never_read(name, saved):
    directory = saved()
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(HubError, match=rf"only there as {name}, a pickle, .* never read here; convert it once"):
        mp.from_pretrained(directory)


@pytest.mark.parametrize("text", ["[]", '"x"', "{", "", "\ufeff{}", "{\xff", "[" * 100_000])
def test_config_that_is_no_object(text, saved):
    directory = saved()
    (directory / "config.json").write_bytes(text.encode("latin-1", "replace"))
    with pytest.raises(FileError, match=r"config\.json: "):
        mp.from_pretrained(directory)


def test_weights_that_do_not_fit(saved):
    directory = saved("llama")
    path = directory / "model.safetensors"
    arrays = weights(directory)
    q = "model.layers.1.self_attn.q_proj.weight"

    def read(changes):
        write_safetensors(path, {name: a for name, a in (arrays | changes).items() if a is not None})
        return mp.from_pretrained(directory)

    with pytest.raises(HubError, match=rf"missing {q}; unexpected nothing"):
        read({q: None})
    with pytest.raises(HubError, match=r"missing nothing; unexpected model\.extra"):
        read({"model.extra": np.ones(3, np.float32)})
    with pytest.raises(HubError, match=rf"{q} has the shape \(16, 8\), the configuration gives \(16, 16\)"):
        read({q: np.ones((16, 8), np.float32)})
    with pytest.raises(HubError, match=rf"{q} holds int8, no floating-point numbers"):
        read({q: np.ones((16, 16), np.int8)})
    with pytest.raises(HubError, match=r"and 14 more"):
        read({name: None for name in arrays if name != q})
    assert same(read({})[0], build("llama"))
    edit(directory, tie_word_embeddings=False)
    with pytest.raises(HubError, match=r"missing lm_head\.weight"):
        read({})


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "C:\\x", "x\0y"]
)
def test_an_index_cannot_name_files_outside(file, saved):
    directory = saved()
    shard(directory)
    path = directory / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(content))
    with pytest.raises(FileError, match="which is not in this directory"):
        mp.from_pretrained(directory)


def test_damaged_index(saved):
    directory = saved()
    placed = shard(directory)
    path = directory / "model.safetensors.index.json"
    for content in ([], {}, {"weight_map": []}, {"weight_map": {"a": 1}}):
        path.write_text(json.dumps(content))
        with pytest.raises(FileError, match="must hold an object"):
            mp.from_pretrained(directory)
    files = sorted(set(placed.values()))
    elsewhere = next(f for f in files if f != placed["model.norm.weight"])
    path.write_text(json.dumps({"weight_map": placed | {"model.norm.weight": elsewhere}}))
    with pytest.raises(FileError, match=r"the tensor 'model\.norm\.weight' is not in"):
        mp.from_pretrained(directory)
    path.write_text(json.dumps({"weight_map": placed}))
    (directory / files[0]).unlink()
    with pytest.raises(FileError, match=f"index.json: names the file {files[0]}, which is not in this directory"):
        mp.from_pretrained(directory)


def test_damaged_weights_give_one_sentence(saved):
    """A byte of the header changed at random: the model, where the byte does not matter, or an error that says so."""
    directory = saved()
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    generator = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[generator.integers(8 + length)] = generator.choice(list(b'"0123456789-[]{}:,eEx\xff\x00'))
        path.write_bytes(bytes(damaged))
        try:
            mp.from_pretrained(directory)
        except (HubError, FileError) as error:
            assert "\n" not in str(error)


# ---------------------------------------------------------------------------------------------------------- writing


def test_a_model_is_not_written_beside_an_adapter_that_transformers_would_put_on_it(tmp_path):
    adapted = mp.get_peft_model(build("llama"), mp.LoraConfig(r=2))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(HubError, match="holds an adapter, which transformers would put on the model"):
        mp.save_pretrained(adapted.merge_and_unload(), tmp_path)


def test_what_is_not_a_plain_model_is_refused(tmp_path):
    model = build("llama")
    for other in (ValueModel(model), Linear(3, 3), model.model, None):
        with pytest.raises(HubError, match=f"a Transformer or a SequenceClassifier, not a {type(other).__name__}"):
            mp.save_pretrained(other, tmp_path)
    adapted = mp.get_peft_model(model, mp.LoraConfig(r=2))
    with pytest.raises(HubError, match=r"not a PeftModel: model.save_pretrained\(path\) .* model.merge_and_unload\(\)"):
        mp.save_pretrained(adapted, tmp_path)
    with pytest.raises(HubError, match="dtype must be 'float32' or 'float16', not 'bfloat16'"):
        mp.save_pretrained(model, tmp_path, dtype="bfloat16")
    changed = model.copy()
    changed.replace("model.layers.0.mlp.up_proj", Linear(16, 7, bias=False))
    with pytest.raises(HubError, match=r"model\.layers\.0\.mlp\.up_proj\.weight differ"):
        mp.save_pretrained(changed, tmp_path)
    untied = model.copy()
    untied.lm_head.weight = type(untied.lm_head.weight)(untied.lm_head.weight.data.copy())
    with pytest.raises(HubError, match=r"lm_head\.weight differ"):
        mp.save_pretrained(untied, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="is a file; a model is written as a directory"):
        mp.save_pretrained(model, tmp_path / "file")


class Stop(Exception):
    """The moment at which the process dies."""


@pytest.mark.parametrize("step", range(6))
def test_a_crash_leaves_one_model_or_none(step, saved, monkeypatch):
    """Killed before any one of the changes to the directory: the old model, the new one, or an error; never a mix."""
    directory = saved("llama", tokenizer=mp.load_base()[1])
    new = Transformer(build("llama").config.replace(rope_theta=77.0), seed=9)  # old weights fit the new configuration
    left = [step]

    def dying(change):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise Stop
            left[0] -= 1
            return change(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(pretrained.Path, "unlink", dying(pretrained.Path.unlink))
    try:
        mp.save_pretrained(new, directory, mp.load_base()[1])
        finished = True
    except Stop:
        finished = False
    monkeypatch.undo()
    try:
        model, _ = mp.from_pretrained(directory)
    except HubError as error:
        assert "there is no config.json" in str(error) and not finished
    else:
        old = same(model, build("llama")) and model.config == build("llama").config
        assert (old and not finished) or (same(model, new) and model.config == new.config)


def test_a_full_disk_leaves_the_old_model(saved, monkeypatch):
    directory = saved("llama")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        mp.save_pretrained(build("llama", seed=5), directory)
    monkeypatch.undo()
    assert same(mp.from_pretrained(directory)[0], build("llama"))
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "model.safetensors"]


# ---------------------------------------------------------------------------------------------------- the shipped base


def test_base_loads_and_has_learned():
    model, tokenizer = mp.load_base()
    assert {p.dtype.name for p in model.parameters()} == {"float32"}
    assert model.config.vocab_size == tokenizer.vocab_size == 2048
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    text = "And God said, Let there be light: and there was light."
    row = np.array([tokenizer.encode(text)])
    assert model.loss(row, row).item() < 0.6 * np.log(2048)


def test_base_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "BASE", tmp_path)
    with pytest.raises(HubError, match="the shipped base's weights are not in this installation"):
        mp.load_base()


def test_a_number_of_layers_that_is_not_stored_is_refused_before_they_are_built(saved):
    for case, name in (("llama", "num_hidden_layers"), ("gpt2", "n_layer")):
        directory = saved(case)
        edit(directory, **{name: 10**8})
        with pytest.raises(HubError, match=r"the configuration has 100000000 layers, and the weights are [0-9]+ tensors"):
            mp.from_pretrained(directory)


def test_an_index_may_name_files_that_no_system_has(saved):
    directory = saved()
    shard(directory)
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": "x" * 5000}}))
    with pytest.raises(FileError, match="which is not in this directory"):
        mp.from_pretrained(directory)
