"""What the tests of accounting share: small models, every method on them, and the models that transformers builds."""

from __future__ import annotations

import pytest

import minipeft as mp
from minipeft.backend import get_num_threads, set_num_threads
from minipeft.quant import quantize_model

SHAPE = dict(vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "llama": mp.TransformerConfig.llama(num_key_value_heads=2, **SHAPE),
    "gpt2": mp.TransformerConfig.gpt2(**SHAPE),
}
BASES = {name: mp.Transformer(config, seed=0) for name, config in CONFIGS.items()}  # to be copied, which is faster
EVERY = "all-linear"
METHODS = {
    "full": None,
    "head": "head",
    "lora": mp.LoraConfig(r=8),
    "lora, every layer": mp.LoraConfig(r=8, target_modules=EVERY, modules_to_save=["lm_head"]),
    "lora with dropout": mp.LoraConfig(r=8, target_modules=EVERY, lora_dropout=0.1),
    "dora": mp.LoraConfig(r=8, target_modules=EVERY, use_dora=True),
    "pissa": mp.LoraConfig(r=8, target_modules=EVERY, init_lora_weights="pissa"),
    "qlora": mp.LoraConfig(r=8, target_modules=EVERY),
    "qlora, plain scales": mp.LoraConfig(r=8, target_modules=EVERY),
    "qdora": mp.LoraConfig(r=8, target_modules=EVERY, use_dora=True),
    "vera": mp.VeraConfig(r=16),
    "adalora": mp.AdaLoraConfig(total_step=10, target_modules=EVERY),
    "loha": mp.LoHaConfig(r=4, target_modules=EVERY),
    "loha with dropout": mp.LoHaConfig(r=4, target_modules=EVERY, rank_dropout=0.1, module_dropout=0.1),
    "lokr": mp.LoKrConfig(r=4, target_modules=EVERY, decompose_both=True),
    "oft": mp.OFTConfig(target_modules=EVERY),
    "oft exactly": mp.OFTConfig(oft_block_size=16, use_cayley_neumann=False, module_dropout=0.2, coft=True),
    "ia3": mp.IA3Config(),
    "ln": mp.LNTuningConfig(),
    "bitfit": mp.BitFitConfig(),
    "houlsby": mp.BottleneckConfig(placement="houlsby"),
    "parallel": mp.BottleneckConfig(placement="parallel", scaling=4),
    "prompt": mp.PromptTuningConfig(num_virtual_tokens=16),
    "prefix": mp.PrefixTuningConfig(num_virtual_tokens=16),
    "prefix by an MLP": mp.PrefixTuningConfig(num_virtual_tokens=16, prefix_projection=True),
    "p-tuning": mp.PromptEncoderConfig(num_virtual_tokens=16),
}
QUANTIZED = {  # what of METHODS stands on a base in four bits, and how
    "qlora": dict(quantization="nf4"),
    "qlora, plain scales": dict(quantization="nf4", double_quantization=False),
    "qdora": dict(quantization="nf4"),
}
CLASSES = {  # model_type -> transformers' class
    "gpt2": "GPT2LMHeadModel", "gpt_bigcode": "GPTBigCodeForCausalLM", "gptj": "GPTJForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "gemma3": "Gemma3ForConditionalGeneration",
    "phi": "PhiForCausalLM", "phi3": "Phi3ForCausalLM", "phimoe": "PhimoeForCausalLM", "stablelm": "StableLmForCausalLM",
    "falcon": "FalconForCausalLM", "bloom": "BloomForCausalLM", "opt": "OPTForCausalLM",
    "t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration", "bert": "BertModel", "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel", "deberta-v2": "DebertaV2Model", "vit": "ViTModel",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The scheduler decides how many threads work at the same moment; with one, measurements repeat themselves."""
    before = get_num_threads()
    set_num_threads(1)
    yield
    set_num_threads(before)


@pytest.fixture(scope="module", params=CONFIGS)
def dialect(request):
    return request.param


def skip_what_does_not_fit(dialect: str, method: str) -> None:
    if method.startswith("bitfit") and dialect == "llama":
        pytest.skip("the Llama dialect has no biases to train")


def built(dialect: str, method: str):
    """The model under a method of METHODS, or "frozen"."""
    model, config = BASES[dialect].copy(), METHODS.get(method, method)
    if method in QUANTIZED:
        model = quantize_model(model, compress_statistics=QUANTIZED[method].get("double_quantization", True))
    if not isinstance(config, str):
        return model if config is None else mp.get_peft_model(model, config)
    return mp.head_only(model) if config == "head" else model.requires_grad_(False)


def on_meta(config: dict, name: str | None = None, **fields):
    """The model of transformers, or its class `name`, on PyTorch's meta device: nothing is allocated."""
    import torch
    import transformers

    with torch.device("meta"):
        cls = getattr(transformers, name or CLASSES[config["model_type"]])
        return cls(cls.config_class(**{k: v for k, v in config.items() if k != "model_type"}, **fields))
