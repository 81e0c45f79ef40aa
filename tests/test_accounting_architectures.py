"""The parameter tables of published models."""

from __future__ import annotations

import json

import pytest

from minipeft.accounting.architectures import architecture, names
from minipeft.accounting.families import FAMILIES
from minipeft.accounting.models import find, groups
from minipeft.nn.transformer import Transformer, TransformerConfig

LLAMA_SMALL = TransformerConfig.llama(
    vocab_size=97, hidden_size=48, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3,
    tie_word_embeddings=False,
)  # fmt: skip
BUILDABLE = [n for n in names() if architecture(n).config is not None]


# Totals as others state them: KerasHub's presets (keras-hub, keras_hub/src/models/*/*_presets.py), but for
COUNTED = {
    "gpt2": 124439808, "gpt2-m": 354823168, "gpt2-l": 774030080, "gpt2-xl": 1557611200, "llama2-7b": 6738415616,
    "llama3-8b": 8030261248, "llama3.1-8b": 8030261248, "mistral-7b": 7241732096, "mistral-7b-v0.3": 7248023552,
    "mistral-small-24b": 23572403200, "mixtral-8x7b": 46702792704, "gemma-2b": 2506172416, "gemma-7b": 8537680896,
    "gemma2-2b": 2614341888, "gemma2-9b": 9241705984, "gemma2-27b": 27227128320, "gemma3-270m": 268098176,
    "gemma3-1b": 999885952, "gemma3-4b": 4300079472, "gemma3-27b": 27432406640, "phi3-mini": 3821079552,
    "qwen2.5-0.5b": 494032768, "qwen2.5-1.5b": 1543714304, "qwen2.5-3b": 3085938688, "qwen2.5-7b": 7615616512,
    "qwen2.5-32b": 32763876352, "qwen2.5-72b": 72706203648, "qwen3-0.6b": 596049920, "qwen3-1.7b": 1720574976,
    "qwen3-4b": 4022468096, "qwen3-8b": 8190735360, "qwen3-14b": 14768307200, "qwen3-32b": 32762123264,
    "qwen3-30b-a3b": 30532122624, "qwen3-235b-a22b": 235093634560, "bloom-560m": 559214592, "bloom-1b1": 1065314304,
    "bloom-1b7": 1722408960, "bloom-3b": 3002557440, "t5-small": 60506624, "t5-base": 222903552, "t5-large": 737668096,
    "t5v1.1-small": 76961152, "t5v1.1-base": 247577856, "t5v1.1-large": 783150080, "t5v1.1-xl": 2849757184,
    "t5v1.1-xxl": 11135332352, "whisper-tiny": 37760640, "whisper-base": 72593920, "whisper-small": 241734912,
    "whisper-medium": 763857920, "whisper-large": 1543304960, "bert-base": 109482240, "bert-large": 335141888,
    "bert-base-cased": 108310272, "bert-large-cased": 333579264, "deberta-v3-base": 183831552,
    "deberta-v3-large": 434012160,
    # the numbers of stored elements on the hub
    "llama3.1-70b": 70553706496, "llama3.1-405b": 405853388800, "mixtral-8x22b": 140630071296, "qwen-7b": 7721324544,
    # the counts that PEFT's documentation prints, less what its methods add
    "roberta-base": 124645632, "roberta-large": 355359744, "mt5-large": 1229581312, "llama3.2-3b": 3212749824,
    # GPT-3 with GPT-2's vocabulary, biases and tied head; the authors of the others
    "gpt3": 174604259328, "bloom-176b": 176247271424, "deberta-v2-xxlarge": 1564549632, "llama-7b": 6738415616,
    "llama-13b": 13015864320, "llama-33b": 32528943616, "llama-65b": 65285660672, "opt-125m": 125239296,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_the_table_adds_up_to_the_published_total(name):
    assert architecture(name).size == COUNTED[name]


def test_an_image_classifier_has_its_published_total():
    """google/vit-base-patch16-224 without pooler, as KerasHub and PEFT's example with 101 classes count it."""
    assert architecture("vit-base", num_labels=1).size - 769 == 85_798_656
    assert architecture("vit-base", num_labels=101).size + 2 * 12 * 16 * 2 * 768 == 86_466_149


SPELLINGS = {
    "meta-llama/Llama-3.1-8B": "llama3.1-8b", "llama-3.1-8b": "llama3.1-8b", "LLAMA 3.1 8 B": "llama3.1-8b",
    "unsloth/Meta-Llama-3.1-8B-Instruct": "llama3.1-8b", "NousResearch/Llama-2-70b-hf": "llama2-70b",
    "Llama-2-7b-chat-hf": "llama2-7b", "llama-2-7b": "llama2-7b", "llama-3-8b": "llama3-8b", "LLaMA 30B": "llama-33b",
    "meta-llama/Llama-3.3-70B-Instruct": "llama3.3-70b", "qwen-1_8b-chat": "qwen-1.8b", "qwen2-7b": "qwen2-7b",
    "qwen2.5-7b": "qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b", "Qwen/Qwen3-8B-Base": "qwen3-8b",
    "mistralai/Mistral-7B-Instruct-v0.1": "mistral-7b", "mistralai/Mistral-7B-Instruct-v0.2": "mistral-7b",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral-7b-v0.3", "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-8x7b",
    "google/gemma-3-4b-it": "gemma3-4b", "gemma-2-9b-it": "gemma2-9b", "gemma-2b": "gemma-2b", "phi-1_5": "phi-1.5",
    "microsoft/Phi-4": "phi4", "Phi-3-mini-4k-instruct": "phi3-mini", "bigcode/gpt_bigcode-santacoder": "santacoder",
    "GPT-2": "gpt2", "gpt2-medium": "gpt2-m", "GPT-3 175B": "gpt3", "EleutherAI/pythia-1.4b-deduped": "pythia-1.4b",
    "StableLM Alpha 3 B": "stablelm-alpha-3b", "Falcon 7B": "falcon-7b", "tiiuae/falcon-40b-instruct": "falcon-40b",
    "bigscience/T0_3B": "t5v1.1-xl", "google/flan-t5-xxl": "t5v1.1-xxl", "google-bert/bert-base-uncased": "bert-base",
    "openai/whisper-large-v2": "whisper-large", "google/vit-base-patch16-224": "vit-base", "opt-1_3b": "opt-1.3b",
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_name_is_found_however_it_is_spelled(spelling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find(spelling)[0] == architecture(spelling).name == SPELLINGS[spelling]


def test_every_spelling_is_one_models():
    for models in groups().values():
        for name, entry in models.items():
            assert {find(spelling)[0] for spelling in (name, *entry["also"])} == {name}
            assert entry["source"] and entry["config"]["model_type"] in FAMILIES
    assert len(names()) == len(set(names())) > 150


@pytest.mark.parametrize(("name", "several"), [
    ("llama", "llama-7b, llama-13b"), ("bert", "bert-base, bert-large, bert-base-cased"), ("t5", "t5-small, t5-base"),
    ("Qwen/Qwen2.5", "qwen2.5-0.5b, qwen2.5-1.5b"), ("llama-3.1", "llama3.1-8b, llama3.1-70b, llama3.1-405b"),
    ("gemma-3", "gemma3-270m, gemma3-1b"), ("whisper", "whisper-tiny, whisper-base"), ("gpt", "gpt2, gpt2-m"),
])  # fmt: skip
def test_the_beginning_of_a_name_is_no_name(name, several):
    with pytest.raises(ValueError, match=f"{name!r} is not one model: there are {several}"):
        architecture(name)


def test_a_directory_that_is_there_goes_before_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen2.5-7B").mkdir(parents=True)
    (tmp_path / "Qwen/Qwen2.5-7B/config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1}))
    assert architecture("Qwen/Qwen2.5-7B").model_type == "gpt2"


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


def test_groups_of_debertas_convolution_share_its_inputs():
    arch = architecture({"name": "deberta-v2-xxlarge", "conv_groups": 2, "embedding_size": 1536, "attention_head_size": 64})
    assert arch["encoder.conv.conv.weight"] == (1536, 768, 3)


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
    (("Qwen/Qwen2.5-4B-Instruct",), r"unknown model 'Qwen/Qwen2.5-4B-Instruct'; nearest: .*qwen2.5-"),
    (("mistral-7b-v0.4",), "unknown model 'mistral-7b-v0.4'; nearest: mistral-7b"),
    (("./llama-7b",), "unknown model './llama-7b'; nearest: llama-7b"),
    (("models/of/llama-7b",), "unknown model 'models/of/llama-7b'; nearest: llama-7b"),
    (("",), "no such file"),
    (({"name": "gpt2", "n_layers": 3},), "gpt2: its shapes do not depend on 'n_layers'; nearest: n_layer"),
    (({"model_type": ["llama"]},), "no rule for the family"),
    (({"model_type": "llava", "text_config": {"model_type": "llama"}},), "its text_config, of llama, can be given alone"),
    (({"model_type": "stablelm", "qk_layernorm": True},), "the parameters that qk_layernorm adds are not known here"),
    (({"model_type": "gpt2", "add_cross_attention": True},), "the parameters that add_cross_attention adds"),
    (({"name": "deberta-v3-base", "embedding_size": 24},), "parameters of embedding_size=24 are not known here; it must be 768"),
    (({"name": "deberta-v3-base", "attention_head_size": 16},), "parameters of attention_head_size=16 are .* must be 64"),
    (({"name": "mixtral-8x7b", "num_experts_per_tok": 0},), "num_experts_per_tok must be a positive integer, not 0"),
    (({"model_type": "gemma3", "vision_config": {}},), "the parameters of vision_use_head are not known"),
    (({"model_type": "gemma3", "vision_config": 1},), "vision_config must be an object, not 1"),
    (({"model_type": "gemma3", "vision_config": {"num_hidden_layers": 10**6}},), "vision_config: num_hidden_layers must be"),
    (({"model_type": "falcon", "bias": 1},), "bias must be true or false, not 1"),
    (({"model_type": "t5", "feed_forward_proj": 3},), "feed_forward_proj must be a text, not 3"),
    (({"model_type": "qwen3_moe", "mlp_only_layers": [[]]},), "mlp_only_layers must be a list, not"),
    (({"model_type": "qwen3_moe", "decoder_sparse_step": 0},), "decoder_sparse_step must be a positive integer, not 0"),
    (({"model_type": "gpt_neo"},), r"model_type='gpt_neo' .nearest: gpt_neox.; there are gpt2, gpt_bigcode"),
    (({"model_type": "gpt2", "n_layer": "twelve"},), "n_layer must be a positive integer, not 'twelve'"),
    (({"model_type": "llama", "num_hidden_layers": 10**9},), "num_hidden_layers must be at most"),
    (({"model_type": "llama", "vocab_size": 10**30},), "vocab_size must be at most"),
    ((0,), "must have at least one, not 0"),
    (("t5-base", 2), "SEQ_CLS heads are known of gpt2, gpt_bigcode, .*; t5-base is of the family t5"),
    (("gpt2", 2, "QUESTION_ANS"), "QUESTION_ANS heads are known of bert, roberta, xlm-roberta, deberta-v2; gpt2 is"),
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


# config.json as transformers 2 to 4 wrote them (shortened by what says nothing of shapes), and 5 (three of the last).
WRITTEN = {
    "mixtral-8x7b": {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000,
                     "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02, "sliding_window": None,
                     "tie_word_embeddings": False, "max_position_embeddings": 32768},
    "gemma3-4b": {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 256,
                  "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                                  "num_hidden_layers": 34, "sliding_window": 1024,
                                  "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
                  "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                                    "image_size": 896, "num_attention_heads": 16, "num_hidden_layers": 27,
                                    "patch_size": 14, "vision_use_head": False}},
    "falcon-7b": {"model_type": "falcon", "alibi": False, "bias": False, "hidden_size": 4544, "multi_query": True,
                  "n_head": 71, "n_layer": 32, "new_decoder_architecture": False, "parallel_attn": True,
                  "num_kv_heads": None, "vocab_size": 65024},
    "whisper-large-v3-turbo": {
        "model_type": "whisper", "d_model": 1280, "decoder_attention_heads": 20, "decoder_ffn_dim": 5120,
        "decoder_layers": 4, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "encoder_layers": 32,
        "max_source_positions": 1500, "max_target_positions": 448, "num_hidden_layers": 32, "num_mel_bins": 128,
        "vocab_size": 51866},
    "phi4-mini": {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
                  "num_hidden_layers": 32, "num_key_value_heads": 8, "partial_rotary_factor": 0.75, "mlp_bias": False,
                  "rope_scaling": {"type": "longrope", "short_factor": [1]}, "tie_word_embeddings": True,
                  "vocab_size": 200064, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}},
    "gpt-j-6b": {"model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_inner": None, "n_layer": 28, "n_positions": 2048,
                 "rotary": True, "rotary_dim": 64, "tie_word_embeddings": False, "vocab_size": 50400},
    "pythia-1b": {"model_type": "gpt_neox", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 8,
                  "num_hidden_layers": 16, "rotary_pct": 0.25, "use_parallel_residual": True, "vocab_size": 50304},
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
