"""The usual targets of every family, and LoRA of experts: as many parameters as Hugging Face PEFT trains there."""

from __future__ import annotations

import pytest
from accounting_cases import CLASSES, on_meta

import minipeft as mp
from minipeft.accounting import count_parameters

pytest.importorskip("torch", reason="needs PyTorch: install the extra 'oracles'")
pytest.importorskip("transformers", reason="needs transformers: install the extra 'oracles'")
peft = pytest.importorskip("peft", reason="needs PEFT: install the extra 'oracles'")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT about each other

TASKS = dict.fromkeys(("t5", "mt5", "whisper"), "SEQ_2_SEQ_LM")
TASKS |= dict.fromkeys(("bert", "roberta", "xlm-roberta", "deberta-v2", "vit"), "FEATURE_EXTRACTION")
TINY = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
GPT = dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
SMALL = {  # model_type -> fields
    **dict.fromkeys(CLASSES, TINY), **dict.fromkeys(("gpt2", "gpt_bigcode", "gptj"), GPT),
    "bloom": dict(hidden_size=64, n_layer=2, n_head=4), "opt": TINY | {"ffn_dim": 96},
    **dict.fromkeys(("mixtral", "phimoe"), TINY | {"num_local_experts": 4}),
    "qwen2_moe": TINY | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    "qwen3_moe": TINY | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    **{family: dict(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4) for family in ("t5", "mt5")},
    "whisper": dict(d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4),
    "gemma3": {"text_config": TINY, "vision_config": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vision_use_head": False}},
}  # fmt: skip
METHODS = {
    "lora": (mp.LoraConfig(r=2), peft.LoraConfig(r=2)),
    "lora, all-linear": (mp.LoraConfig(r=2, target_modules="all-linear"), peft.LoraConfig(r=2, target_modules="all-linear")),
    "ia3": (mp.IA3Config(), peft.IA3Config()),
    "ln": (mp.LNTuningConfig(), peft.LNTuningConfig()),
}
HERE_ONLY = {  # PEFT has no usual targets for these, or fails with its own: LN tuning of OPT, BERT, ...; LoRA of Mixtral
    ("mixtral", "lora"), ("opt", "ln"), ("bert", "ln"), ("roberta", "ln"), ("deberta-v2", "ln"),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", CLASSES)
def test_a_familys_usual_targets_train_as_many_parameters_as_in_peft(model_type, method):
    config, (ours, theirs) = {"model_type": model_type, **SMALL[model_type]}, METHODS[method]
    if (model_type, method) in HERE_ONLY:
        assert count_parameters(config, ours).trainable
        return
    theirs = type(theirs)(**{k: v for k, v in theirs.to_dict().items() if k in ("r", "target_modules")})
    theirs.task_type = TASKS.get(model_type, "CAUSAL_LM")
    try:
        model = peft.get_peft_model(on_meta(config), theirs, low_cpu_mem_usage=True)
    except ValueError as error:
        assert "target_modules" in str(error)  # no usual targets for the family
        with pytest.raises(ValueError, match=r"needs target_modules|needs feedforward_modules"):
            count_parameters(config, ours)
    else:
        expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count_parameters(config, ours).trainable == expected


@pytest.mark.parametrize(("model_type", "targets"), [
    ("mixtral", ["w1", "w2", "w3"]), ("mixtral", ["q_proj", "gate"]), ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"]),
    ("qwen3_moe", ["q_proj", "down_proj"]), ("qwen2_moe", ["gate_proj", "up_proj", "down_proj"]),
])  # fmt: skip
def test_lora_of_experts_is_counted_as_in_peft(model_type, targets):
    config = {"model_type": model_type, **SMALL[model_type]}
    theirs = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(on_meta(config), theirs, low_cpu_mem_usage=True)
    ours = count_parameters(config, mp.LoraConfig(r=4, target_modules=targets))
    assert (ours.trainable, ours.total) == model.get_nb_trainable_parameters()
