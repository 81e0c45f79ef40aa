"""The parameter tables against the models that transformers builds (on PyTorch's meta device: nothing is allocated)."""

from __future__ import annotations

import re

import pytest
from accounting_cases import CLASSES, on_meta

from minipeft.accounting.architectures import architecture, names
from minipeft.accounting.families import FAMILIES
from minipeft.accounting.models import find

pytest.importorskip("torch", reason="needs PyTorch: install the extra 'oracles'")
transformers = pytest.importorskip("transformers", reason="needs transformers: install the extra 'oracles'")

NAMES = [name for name in names() if find(name)[1]["model_type"] in CLASSES]
SAME_TREE = {find(name)[1]["model_type"]: name for name in reversed(NAMES)}  # the first of each family
ONE_EACH = [*SAME_TREE.values(), "deberta-v3-base", "opt-350m", "falcon-40b"]
MODULES = {"Linear": "linear", "FalconLinear": "linear", "Conv1D": "conv1d", "Conv1d": "convolution", "Conv2d": "convolution"}


def built(config: dict) -> dict:
    """Name -> shape of every parameter of transformers' model.

    The checkpoints of T5 v1.1 and mT5 hold a head of their own, which transformers 4 builds; transformers 5 ties it.
    """
    shapes = {name: tuple(p.shape) for name, p in on_meta(config).named_parameters()}
    untied = config["model_type"] == "mt5" or (
        config["model_type"] == "t5" and not config.get("tie_word_embeddings", True)
    )
    return shapes | ({"lm_head.weight": shapes["shared.weight"]} if untied else {})


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_the_model_of_transformers(name):
    assert dict(architecture(name)) == built(find(name)[1])


def test_every_family_is_compared():
    """But for Qwen's first, whose code is on the hub."""
    assert set(SAME_TREE) == set(CLASSES) == set(FAMILIES) - {"qwen"}


@pytest.mark.parametrize("name", ONE_EACH)
def test_kinds_are_the_modules_of_transformers(name):
    config = shortened(find(name)[1])
    arch, modules = architecture(config), dict(on_meta(config).named_modules())
    for path, kind in arch.kinds.items():
        owner, _, last = path.rpartition(".")
        module = type(modules[owner]).__name__
        expected = "norm" if module.endswith(("RMSNorm", "LayerNorm")) else MODULES.get(module)
        expected = "embedding" if "Embedding" in module and last == "weight" else expected
        if module.endswith(("Router", "Experts", "Embeddings", "Projector")) or owner.endswith("shared_expert_gate"):
            assert kind in ("router", "experts", "parameter") or module == "PhimoeTopKRouter"
        else:
            assert (path, kind) == (path, "bias" if last == "bias" else expected)


def shortened(config: dict) -> dict:
    """With two layers."""
    if "text_config" in config:
        return config | {part: shortened(config[part]) for part in ("text_config", "vision_config")}
    layers = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
    return config | {key: 2 for key in layers if key in config}


SMALL = dict(hidden_size=48, intermediate_size=56, num_attention_heads=6, num_hidden_layers=2, vocab_size=50)
GROUPED = SMALL | {"num_key_value_heads": 2}
GPT = dict(vocab_size=50, n_positions=9, n_embd=48, n_layer=2, n_head=6)
PATCHES = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=7)
ODD = {
    "gpt2": [GPT, GPT | {"n_inner": 31}, GPT | {"tie_word_embeddings": False}],
    "gpt_bigcode": [GPT, GPT | {"multi_query": False, "n_inner": 31}],
    "gptj": [GPT | {"rotary_dim": 4}, GPT | {"rotary_dim": 4, "tie_word_embeddings": True, "n_inner": 31}],
    "gpt_neox": [SMALL, SMALL | {"attention_bias": False, "use_parallel_residual": False, "tie_word_embeddings": True}],
    "llama": [GROUPED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, GROUPED | {"head_dim": 10}],
    "mistral": [GROUPED | {"head_dim": 10}],
    "mixtral": [GROUPED | {"num_local_experts": 3}, GROUPED | {"num_experts": 5, "head_dim": 10}],
    "qwen2": [GROUPED, GROUPED | {"tie_word_embeddings": True}],
    "qwen2_moe": [
        GROUPED | {"num_experts": 3, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 30},
        GROUPED | {"num_experts": 3, "qkv_bias": False, "mlp_only_layers": [1]},
    ],
    "qwen3": [GROUPED | {"attention_bias": True, "head_dim": 10}, SMALL | {"num_key_value_heads": None}],
    "qwen3_moe": [
        GROUPED | {"num_experts": 3, "moe_intermediate_size": 20, "head_dim": 10},
        GROUPED | {"num_experts": 3, "decoder_sparse_step": 2, "attention_bias": True},
    ],
    "gemma": [GROUPED | {"head_dim": 10}, GROUPED | {"attention_bias": True, "tie_word_embeddings": False}],
    "gemma2": [GROUPED | {"head_dim": 10}, GROUPED | {"attention_bias": True}],
    "gemma3_text": [GROUPED | {"head_dim": 10}, GROUPED | {"attention_bias": True, "tie_word_embeddings": False}],
    "gemma3": [
        {"text_config": GROUPED | {"head_dim": 10}, "vision_config": PATCHES | {"vision_use_head": False}},
        {"text_config": SMALL, "vision_config": PATCHES | {"vision_use_head": False, "num_channels": 1},
         "tie_word_embeddings": False},
    ],
    "phi": [GROUPED, GROUPED | {"qk_layernorm": True, "tie_word_embeddings": True}],
    "phi3": [GROUPED | {"pad_token_id": 0}, SMALL | {"pad_token_id": 0, "tie_word_embeddings": True}],
    "phimoe": [GROUPED | {"num_local_experts": 3}, GROUPED | {"attention_bias": True, "lm_head_bias": True}],
    "stablelm": [GROUPED | {"use_qkv_bias": True}, GROUPED | {"use_parallel_residual": True, "tie_word_embeddings": True}],
    "falcon": [
        SMALL, SMALL | {"multi_query": False, "bias": True, "tie_word_embeddings": False},
        SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 31},
        SMALL | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}, SMALL | {"parallel_attn": False},
    ],
    "bloom": [dict(vocab_size=50, hidden_size=48, n_layer=2, n_head=6)],
    "opt": [
        SMALL | {"ffn_dim": 31, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
        SMALL | {"enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False},
        SMALL | {"_remove_final_layer_norm": True},
    ],
    "t5": [
        dict(vocab_size=50, d_model=48, d_kv=7, d_ff=31, num_layers=2, num_decoder_layers=3, num_heads=5),
        dict(vocab_size=50, d_model=48, num_layers=2, feed_forward_proj="gated-silu", relative_attention_num_buckets=9),
    ],
    "mt5": [dict(vocab_size=50, d_model=48, d_kv=7, d_ff=31, num_layers=2, num_heads=5)],
    "whisper": [
        dict(vocab_size=50, d_model=48, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=31, decoder_ffn_dim=33,
             encoder_attention_heads=6, decoder_attention_heads=6, num_mel_bins=5, max_source_positions=12,
             max_target_positions=8, pad_token_id=0),
    ],
    "bert": [SMALL | {"type_vocab_size": 3, "max_position_embeddings": 7}],
    "roberta": [SMALL], "xlm-roberta": [SMALL],
    "deberta-v2": [
        SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        SMALL | {"relative_attention": True, "pos_att_type": "p2c", "norm_rel_ebd": "layer_norm", "type_vocab_size": 2},
    ],
    "vit": [PATCHES, PATCHES | {"qkv_bias": False, "pooler_output_size": 12, "num_channels": 1}],
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "i"), [(model_type, i) for model_type in ODD for i in range(len(ODD[model_type]))])
def test_odd_configurations_have_the_tables_of_transformers(model_type, i):
    config = {"model_type": model_type, **ODD[model_type][i]}
    assert dict(architecture(config)) == built(config)


@pytest.mark.parametrize("model_type", sorted(set(CLASSES) - {"gemma3"}))
def test_fields_that_a_configuration_leaves_out_have_the_defaults_of_transformers(model_type):
    fields = FAMILIES[model_type][1]
    few = {key: 2 for key in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers") if key in fields}
    config = {"model_type": model_type, **few}
    assert dict(architecture(config)) == built(config)
    assert architecture(config).dimensions["num_hidden_layers"] == 2


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_configuration_written_by_transformers_is_read(name, tmp_path):
    """By its major versions 4 and 5, which name, leave out and add other fields."""
    config = dict(find(name)[1])
    cls = getattr(transformers, CLASSES[config.pop("model_type")])
    cls.config_class(**config).save_pretrained(tmp_path)
    assert dict(architecture(tmp_path)) == dict(architecture(name))


NO_HEAD = ("t5", "mt5", "whisper", "gemma3", "gemma3_text")  # Gemma 3's have names of their own
HEADS = [(name, "SEQ_CLS", "ForSequenceClassification") for name in ONE_EACH if find(name)[1]["model_type"] not in NO_HEAD]
HEADS += [
    (name, "QUESTION_ANS", "ForQuestionAnswering") for name in ("bert-base", "roberta-base", "deberta-v2-xxlarge")
]


@pytest.mark.parametrize(("name", "task", "head"), HEADS)
def test_the_head_for_a_task_is_that_of_transformers(name, task, head):
    config = shortened(find(name)[1])
    base = re.sub("Model$|LMHeadModel$|ForCausalLM$", "", CLASSES[config["model_type"]])
    head = "ForImageClassification" if base == "ViT" else head
    model = on_meta(config, base + head, num_labels=3)
    prefix = f"{model.base_model_prefix}."  # which the tables of BERT, RoBERTa, DeBERTa and ViT leave out
    shapes = {path: tuple(p.shape) for path, p in model.named_parameters()}
    if base.startswith(("Bert", "Roberta", "XLMRoberta", "Deberta", "ViT")):
        shapes = {path.removeprefix(prefix): shape for path, shape in shapes.items()}
    assert dict(architecture(config, 3, task)) == shapes
