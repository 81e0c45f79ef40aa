"""Directories: what we write transformers loads as it is, and what it writes we read."""

import dataclasses
import json
import logging

import numpy as np
import pytest

import minipeft as mp
from minipeft.hub.base import BASE
from minipeft.nn.heads import SequenceClassifier
from minipeft.nn.transformer import RopeScaling, Transformer, TransformerConfig

torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'oracles'")

SHAPE = dict(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
CONFIGS = {
    "gpt2": dict(model_type="gpt2", eos_token_id=2, pad_token_id=0),
    "gpt2 untied": dict(model_type="gpt2", tie_word_embeddings=False, intermediate_size=40, dropout=0.1),
    "llama": dict(model_type="llama", num_key_value_heads=2, bos_token_id=1, eos_token_id=(2, 5), pad_token_id=0),
    "llama untied": dict(
        model_type="llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True, head_dim=10, rope_theta=500.0
    ),
    "llama 3": dict(model_type="llama", head_dim=12, rope_theta=500.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 12)),
    "mistral": dict(model_type="mistral", num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, rope_theta=500.0),
    "qwen2": dict(model_type="qwen2", num_key_value_heads=2, rope_theta=500.0),
}
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
every_case = pytest.mark.parametrize("case", CONFIGS)
dialects = pytest.mark.parametrize("case", ["gpt2", "llama"])


def ours(case):
    return Transformer(TransformerConfig(**SHAPE, **CONFIGS[case]), seed=4)


def theirs(case, task="CausalLM", **options):
    """A model of transformers with random weights and its own way of writing down the same shapes."""
    c = TransformerConfig(**SHAPE, **CONFIGS[case])
    common = dict(
        tie_word_embeddings=c.tie_word_embeddings, initializer_range=0.3, eos_token_id=2, pad_token_id=0, **options
    )
    if c.model_type == "gpt2":
        sizes = dict(n_embd=c.hidden_size, n_head=4, n_layer=2, n_positions=256, n_inner=c.intermediate_size)
        config = transformers.GPT2Config(vocab_size=60, bos_token_id=1, **sizes, **common)
    else:
        names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        names += "max_position_embeddings rms_norm_eps"
        names += {"llama": " head_dim attention_bias mlp_bias", "mistral": " head_dim", "qwen2": ""}[c.model_type]
        scaling = c.rope_scaling and {"rope_type": "llama3", **dataclasses.asdict(c.rope_scaling)}
        major = int(transformers.__version__.partition(".")[0])
        rope = (
            dict(rope_theta=c.rope_theta, rope_scaling=scaling)
            if major < 5
            else dict(rope_parameters={**(scaling or {"rope_type": "default"}), "rope_theta": c.rope_theta})
        )
        window = {} if c.model_type == "llama" else {"sliding_window": None}
        kind = transformers.CONFIG_MAPPING[c.model_type]
        config = kind(vocab_size=60, **rope, **window, **{n: getattr(c, n) for n in names.split()}, **common)
    torch.manual_seed(0)
    model = getattr(transformers, "AutoModelFor" + task).from_config(config).eval()
    for name, parameter in model.named_parameters():  # initialized to zero and one, where a mistake would not show
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name or "ln_" in name), std=0.3)
    return model


def load(directory, task="CausalLM", **options):
    """As transformers loads it, having found every weight, no other, and nothing to warn of."""
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        auto = getattr(transformers, "AutoModelFor" + task)
        model, found = auto.from_pretrained(directory, output_loading_info=True, **options)
    finally:
        logger.removeHandler(handler)
    assert not any(found.values()), found
    assert not [record.getMessage() for record in heard if record.levelno >= logging.WARNING]
    return model.eval()


def tokens():
    return np.random.default_rng(0).integers(3, 60, (2, 9))


def close(found, expected):
    expected = expected.detach().float().numpy()
    np.testing.assert_allclose(found.data, expected, rtol=0, atol=64 * 2.0**-23 * np.abs(expected).max())


@every_case
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_transformers_loads_what_we_write(case, dtype, tmp_path):
    model = ours(case)
    mp.save_pretrained(model, tmp_path, dtype=dtype)
    twin = load(tmp_path, dtype="auto")  # what version 5 does by default
    c, d = model.config, twin.config
    assert type(twin).__name__ == CLASSES[c.model_type]
    assert twin.dtype == (torch.float16 if dtype else torch.float32)
    ends = list(c.eos_token_id) if isinstance(c.eos_token_id, tuple) else c.eos_token_id
    assert (d.bos_token_id, d.eos_token_id, d.pad_token_id) == (c.bos_token_id, ends, c.pad_token_id)
    assert d.tie_word_embeddings == c.tie_word_embeddings == (twin.lm_head.weight is twin.get_input_embeddings().weight)
    again, tokenizer = mp.from_pretrained(tmp_path)
    assert again.config == c and tokenizer is None
    twin = load(tmp_path, dtype=torch.float32)
    close(again(tokens()), twin(torch.tensor(tokens())).logits)
    if dtype is None:
        close(model(tokens()), twin(torch.tensor(tokens())).logits)


@dialects
def test_greedy_generation_of_both(case, tmp_path):
    mp.save_pretrained(ours(case), tmp_path)
    model, twin = mp.from_pretrained(tmp_path)[0], load(tmp_path)
    ids = tokens()[:, :4]
    expected = twin.generate(
        torch.tensor(ids), attention_mask=torch.ones(ids.shape), max_new_tokens=30, do_sample=False
    )
    assert np.array_equal(model.generate(ids, max_new_tokens=30)[:, : expected.shape[1]], expected.numpy())


@every_case
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "float64"])
def test_we_read_what_transformers_writes(case, stored, tmp_path):
    theirs(case).to(getattr(torch, stored)).save_pretrained(tmp_path)
    model, twin = mp.from_pretrained(tmp_path)[0], load(tmp_path, dtype=torch.float32)
    assert {p.dtype.name for p in model.parameters()} == {"float32"}
    assert all(p.data.flags.writeable for p in model.parameters())
    close(model(tokens()), twin(torch.tensor(tokens())).logits)
    for name, parameter in twin.named_parameters():
        assert np.array_equal(dict(model.named_parameters())[name].data, parameter.detach().numpy()), name


@pytest.mark.parametrize("case", ["llama 3", "qwen2", "gpt2"])
def test_we_read_what_transformers_writes_in_several_files(case, tmp_path):
    theirs(case).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model, twin = mp.from_pretrained(tmp_path)[0], load(tmp_path, dtype=torch.float32)
    close(model(tokens()), twin(torch.tensor(tokens())).logits)
    packed = mp.from_pretrained(tmp_path, load_in_4bit=True)[0].state_dict()
    expected = mp.quant.quantize_model(model).state_dict()
    assert packed.keys() == expected.keys() and all(np.array_equal(packed[n], a) for n, a in expected.items())


@every_case
def test_there_and_back_is_bit_for_bit(case, tmp_path):
    twin = theirs(case)
    twin.save_pretrained(tmp_path / "theirs")
    mp.save_pretrained(mp.from_pretrained(tmp_path / "theirs")[0], tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert twin.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in twin.state_dict().items())


@dialects
def test_bare_backbone_has_the_tied_head(case, tmp_path):
    twin = theirs(case)
    twin.base_model.save_pretrained(tmp_path)
    if case == "llama":  # its class ties nothing, and writes so: a matter of the head that it does not have
        content = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": True}))
    close(mp.from_pretrained(tmp_path)[0](tokens()), twin(torch.tensor(tokens())).logits)


@dialects
@pytest.mark.parametrize("labels", [1, 2, 3])
def test_classifiers_both_ways(case, labels, tmp_path):
    ids, mask = tokens(), np.ones((2, 9), np.int64)
    ids[1, 6:], mask[1, 6:] = 0, 0
    inputs = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))

    model = SequenceClassifier(ours(case), num_labels=labels, seed=2)
    mp.save_pretrained(model, tmp_path / "ours")
    twin = load(tmp_path / "ours", "SequenceClassification")
    assert twin.config.num_labels == labels
    close(model(ids, mask), twin(**inputs).logits)

    twin = theirs(case, "SequenceClassification", num_labels=labels)
    twin.save_pretrained(tmp_path / "theirs")
    model, _ = mp.from_pretrained(tmp_path / "theirs")
    assert isinstance(model, SequenceClassifier) and model.num_labels == labels
    close(model(ids, mask), twin(**inputs).logits)


def test_shipped_base():
    model, tokenizer = mp.load_base()
    twin = load(BASE, dtype=torch.float32)
    prompt = "In the beginning God created"
    ids = np.array([tokenizer.encode(prompt)])
    theirs = transformers.AutoTokenizer.from_pretrained(BASE)
    assert theirs(prompt)["input_ids"] == ids[0].tolist()
    close(model(ids), twin(torch.tensor(ids)).logits)
    expected = twin.generate(
        torch.tensor(ids), attention_mask=torch.ones(ids.shape), max_new_tokens=20, do_sample=False
    )
    assert np.array_equal(model.generate(ids, max_new_tokens=20), expected.numpy())
