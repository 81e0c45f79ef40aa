"""The parameter tables of published models."""

from __future__ import annotations

import json

import pytest

from minipeft.accounting.architectures import _published, architecture, names
from minipeft.nn.transformer import Transformer, TransformerConfig

LLAMA_SMALL = TransformerConfig.llama(
    vocab_size=97, hidden_size=48, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3,
    tie_word_embeddings=False,
)  # fmt: skip
BUILDABLE = [n for n in names() if architecture(n).config is not None]


@pytest.mark.parametrize("name", names())
def test_the_table_adds_up_to_the_published_total(name):
    assert architecture(name).size == _published()[name]["parameters"]


@pytest.mark.parametrize("name", BUILDABLE)
def test_the_table_is_the_model_that_this_package_builds(name):
    arch = architecture(name)
    model = Transformer(arch.config, seed=None)
    assert dict(arch) == {path: p.shape for path, p in model.named_parameters()}
    assert list(arch) == [path for path, _ in model.named_parameters()]
    aliases = {path for path, _ in model.all_named_parameters()} - set(arch)
    assert set(arch.tied) == aliases


@pytest.mark.parametrize("config", [
    LLAMA_SMALL,
    LLAMA_SMALL.replace(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    TransformerConfig.llama(hidden_size=64, num_attention_heads=4, head_dim=32),
    LLAMA_SMALL.replace(model_type="qwen2"),
    LLAMA_SMALL.replace(model_type="mistral"),
    TransformerConfig.gpt2(vocab_size=61, hidden_size=36, num_attention_heads=3, intermediate_size=50),
    TransformerConfig.gpt2(tie_word_embeddings=False),
])
def test_a_configuration_has_the_table_of_its_model(config):
    shapes = {path: p.shape for path, p in Transformer(config, seed=None).named_parameters()}
    assert dict(architecture(config)) == shapes
    assert architecture(config).config == config


def test_gpt3_is_counted_without_being_allocated():
    arch = architecture("gpt3")
    assert arch.size == 174_604_259_328  # 50257 d + 2048 d + 96 (12 d² + 13 d) + 2 d with d = 12288
    assert arch["transformer.h.95.attn.c_attn.weight"] == (12288, 36864)
    assert arch.kinds["transformer.h.95.attn.c_attn.weight"] == "conv1d"
    assert arch.tied == {"lm_head.weight": "transformer.wte.weight"}


def test_kinds_tell_what_a_method_may_adapt():
    kinds = architecture("qwen2.5-3b").kinds
    assert kinds["model.layers.0.self_attn.q_proj.bias"] == "bias"
    assert "model.layers.0.self_attn.o_proj.bias" not in kinds
    assert kinds["model.norm.weight"] == "norm"
    assert kinds["model.embed_tokens.weight"] == "embedding"


def test_a_configuration_file_and_its_directory_are_read(tmp_path):
    config = {
        "model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 11,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    arch = architecture(tmp_path)
    assert arch["model.layers.1.self_attn.k_proj.weight"] == (16, 64)
    assert dict(arch) == dict(architecture(tmp_path / "config.json")) == dict(architecture(config))


def test_a_number_is_a_model_of_which_no_more_is_known():
    arch = architecture(7_500_000_000)
    assert (arch.name, arch.size, arch.config) == ("7,500,000,000 parameters", 7_500_000_000, None)


def test_a_head_takes_the_place_of_the_language_models():
    llama = architecture("llama-7b", num_labels=1)
    assert llama["score.weight"] == (1, 4096) and "lm_head.weight" not in llama
    assert llama.size == architecture("llama-7b").size - 32000 * 4096 + 4096
    tied = architecture("gpt2", num_labels=2)
    assert tied.size == architecture("gpt2").size + 2 * 768 and not tied.tied
    qa = architecture("bert-base-cased", 2, "QUESTION_ANS")
    assert qa.size == architecture("bert-base-cased").size - 768 * 769 + 2 * 769  # no pooler


@pytest.mark.parametrize(("arguments", "message"), [
    (("lama-7b",), "unknown model 'lama-7b'; nearest: llama-7b"),
    (("Qwen/Qwen2.5-3B-Instruct",), r"unknown model 'Qwen/Qwen2.5-3B-Instruct'; nearest: qwen2.5-3b"),
    (({"model_type": "gpt_neo"},), r"model_type='gpt_neo'.*there are gpt2, llama"),
    (({"model_type": "gpt2", "n_layer": "twelve"},), "n_layer must be a positive integer, not 'twelve'"),
    (({"model_type": "llama", "num_hidden_layers": 10**9},), "num_hidden_layers must be at most"),
    (({"model_type": "llama", "vocab_size": 10**30},), "vocab_size must be at most"),
    ((0,), "must have at least one, not 0"),
    (("t5-base", 2), "SEQ_CLS heads are known of gpt2, llama, .*; t5-base is of the family t5"),
    (("gpt2", 2, "QUESTION_ANS"), "QUESTION_ANS heads are known of bert, roberta, deberta-v2; gpt2 is"),
    (("bert-base", 0), "num_labels must be a positive integer, not 0"),
    (("bert-base", 2, "TOKEN"), "task must be 'SEQ_CLS' or 'QUESTION_ANS', not 'TOKEN'"),
    ((1000, 2), "1,000 parameters is of the family nominal"),
])
def test_what_is_not_known_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        architecture(*arguments)


def test_dimensions_have_one_name_in_all_families():
    for name in names():
        d = architecture(name).dimensions
        assert all(type(n) is int and n > 0 for n in d.values()), name
    assert architecture("t5v1.1-small").dimensions == {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64,
    }  # fmt: skip
    assert architecture("llama3.2-3b").dimensions["num_key_value_heads"] == 8


# config.json as transformers 2 to 4 wrote them (shortened by what says nothing of shapes), and 5 (the last three).
WRITTEN = {
    "gpt2": {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
             "n_inner": None, "vocab_size": 50257, "task_specific_params": {"text-generation": {"do_sample": True}}},
    "bloom-560m": {"model_type": "bloom", "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16,
                   "offset_alibi": 100, "pretraining_tp": 1, "vocab_size": 250880},
    "t5v1.1-small": {"model_type": "t5", "d_ff": 1024, "d_kv": 64, "d_model": 512, "feed_forward_proj": "gated-gelu",
                     "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8, "relative_attention_num_buckets": 32,
                     "is_encoder_decoder": True, "tie_word_embeddings": False, "vocab_size": 32128},
    "t5-base": {"model_type": "t5", "d_ff": 3072, "d_kv": 64, "d_model": 768, "n_positions": 512, "num_heads": 12,
                "num_layers": 12, "relative_attention_num_buckets": 32, "vocab_size": 32128},
    "deberta-v3-base": {"model_type": "deberta-v2", "hidden_size": 768, "intermediate_size": 3072, "vocab_size": 128100,
                        "max_position_embeddings": 512, "relative_attention": True, "position_buckets": 256,
                        "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p",
                        "max_relative_positions": -1, "position_biased_input": False, "num_attention_heads": 12,
                        "num_hidden_layers": 12, "type_vocab_size": 0},
    "roberta-base": {"model_type": "roberta", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                     "num_attention_heads": 12, "max_position_embeddings": 514, "type_vocab_size": 1,
                     "vocab_size": 50265, "bos_token_id": 0},
    "opt-350m": {"model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24,
                 "num_attention_heads": 16, "max_position_embeddings": 2048, "word_embed_proj_dim": 512,
                 "do_layer_norm_before": False, "_remove_final_layer_norm": False, "vocab_size": 50272},
    "mistral-7b": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096, "rope_theta": 10000.0,
                   "max_position_embeddings": 32768, "tie_word_embeddings": False, "vocab_size": 32000},
    "llama3.2-1b": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "dtype": "bfloat16",
                    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0},
                    "max_position_embeddings": 131072, "tie_word_embeddings": True, "vocab_size": 128256},
    "qwen2.5-3b": {"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                   "num_attention_heads": 16, "num_key_value_heads": 2, "layer_types": ["full_attention"] * 36,
                   "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "sliding_window": None,
                   "max_position_embeddings": 32768, "tie_word_embeddings": True, "vocab_size": 151936},
    "t5v1.1-large": {"model_type": "t5", "d_ff": 2816, "d_kv": 64, "d_model": 1024, "feed_forward_proj": "gated-gelu",
                     "is_gated_act": True, "num_decoder_layers": 24, "num_heads": 16, "num_layers": 24,
                     "scale_decoder_outputs": False, "tie_word_embeddings": True, "vocab_size": 32128},
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_a_published_models_own_configuration_file_has_its_table(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(WRITTEN[name]))
    assert dict(architecture(tmp_path)) == dict(architecture(name))
