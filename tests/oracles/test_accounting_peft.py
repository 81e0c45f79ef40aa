"""The audit's counts against Hugging Face PEFT's own, on transformers' models (PyTorch's meta device)."""

from __future__ import annotations

import json

import pytest
from accounting_cases import on_meta

from minipeft import LoraConfig
from minipeft.accounting.architectures import architecture, names
from minipeft.accounting.block_formats import BLOCK_FORMATS
from minipeft.accounting.counted import COUNTED, counted_config
from minipeft.accounting.models import find
from minipeft.accounting.parameters import constant_parameters, count_parameters, elements, trained_parameters
from minipeft.accounting.published import _figure, read_published

pytest.importorskip("torch", reason="needs PyTorch: install the extra 'oracles'")
pytest.importorskip("transformers", reason="needs transformers: install the extra 'oracles'")
peft = pytest.importorskip("peft", reason="needs PEFT: install the extra 'oracles'")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT about each other

TASKS = {"t5": "SEQ_2_SEQ_LM", "mt5": "SEQ_2_SEQ_LM"}
TASKS |= dict.fromkeys(("bert", "roberta", "deberta-v2"), "FEATURE_EXTRACTION")


def comparable() -> dict[str, tuple[dict, dict]]:
    """id -> (options, method) of the shipped rows that are one of PEFT's methods on one published model."""
    rows = {}
    for row in read_published():
        options = json.loads(row["options"] or "{}")
        config, model = options.get("config"), options.get("model")
        if isinstance(config, dict) and model in names() and "num_labels" not in options and "only" not in options:
            shared = config["peft_type"] in peft.PeftType.__members__ and config["peft_type"] not in COUNTED
            if shared and "enable_lora" not in config:
                rows.setdefault(json.dumps([model, config]), (row["id"], options, config))
    return {name: (options, config) for name, options, config in rows.values()}


ROWS = comparable()


@pytest.mark.parametrize("row", ROWS)
def test_a_rows_count_is_that_of_peft(row):
    options, method = ROWS[row]
    published, method = find(options["model"])[1], dict(method)
    family, base = published["model_type"], on_meta(published)
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[method.pop("peft_type")]]
    extra = {"num_transformer_submodules": 1} if "num_virtual_tokens" in method else {}  # T5 in PEFT: one for each side
    config = cls(task_type=TASKS.get(family, "CAUSAL_LM"), **method, **extra)
    model = peft.get_peft_model(base, config, low_cpu_mem_usage=True)
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert _figure({"model": options["model"], "config": options["config"]}, "trainable").value == expected


def test_most_methods_are_compared():
    assert {method["peft_type"] for _, method in ROWS.values()} >= {
        "LORA", "IA3", "LN_TUNING", "VERA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING",
    }  # fmt: skip
    assert len(ROWS) > 60


SMALL = {
    "llama": dict(
        model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False),
    "gpt2": dict(model_type="gpt2", vocab_size=64, n_positions=32, n_embd=64, n_layer=3, n_head=4),
    "t5": dict(model_type="t5", vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
    "bloom": dict(model_type="bloom", vocab_size=64, hidden_size=64, n_layer=2, n_head=4),
    **{family: dict(model_type=family, vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
       for family in ("falcon", "gpt_neox", "bert")},
}  # fmt: skip
MLP = ["gate_proj", "down_proj", "q_proj"]  # of three shapes


@pytest.mark.parametrize(("family", "method"), [
    ("llama", dict(peft_type="ADAPTION_PROMPT", adapter_len=5, adapter_layers=2)),
    ("gpt2", dict(peft_type="ADAPTION_PROMPT", adapter_len=5, adapter_layers=3, target_modules="attn")),
    ("llama", dict(peft_type="BOFT", boft_block_size=4)),
    ("llama", dict(peft_type="BOFT", boft_block_size=0, boft_block_num=4, target_modules=MLP)),
    ("llama", dict(peft_type="C3A", block_size=16, target_modules=MLP, block_size_pattern={"q_proj": 32})),
    ("llama", dict(peft_type="C3A", block_size=32)),
    ("llama", dict(peft_type="DELORA", r=3, target_modules=MLP, rank_pattern={"q_proj": 2})),
    ("llama", dict(peft_type="FOURIERFT", n_frequency=100, target_modules=MLP, n_frequency_pattern={"q_proj": 30})),
    ("gpt2", dict(peft_type="FOURIERFT", n_frequency=100, fan_in_fan_out=True)),
    ("llama", dict(peft_type="HRA", r=3, target_modules=MLP)),
    ("llama", dict(peft_type="MISS", r=4, target_modules=MLP)),
    ("llama", dict(peft_type="MISS", r=16, init_weights="bat", target_modules=MLP)),
    ("llama", dict(peft_type="MISS", r=4, mini_r=8, init_weights="mini", target_modules=MLP)),
    ("llama", dict(peft_type="RANDLORA", r=5, target_modules=MLP)),
    ("llama", dict(peft_type="RANDLORA", r=8, save_projection=False)),
    ("llama", dict(peft_type="ROAD", variant="road_1", group_size=16, target_modules=MLP)),
    ("llama", dict(peft_type="ROAD", variant="road_2", group_size=16)),
    ("llama", dict(peft_type="ROAD", variant="road_4", group_size=32)),
    ("llama", dict(peft_type="SHIRA", r=3, target_modules=MLP, random_seed=1)),
    ("llama", dict(peft_type="VBLORA", r=2, num_vectors=9, vector_length=16, target_modules=MLP)),
    ("gpt2", dict(peft_type="VBLORA", r=2, num_vectors=9, vector_length=32, topk=3)),
    ("t5", dict(peft_type="VBLORA", r=2, num_vectors=9, vector_length=16)),
    ("llama", dict(peft_type="LOHA", r=3, target_modules=MLP)),
    ("llama", dict(peft_type="LOKR", r=3, decompose_factor=4, target_modules=MLP)),
    ("llama", dict(peft_type="OFT", oft_block_size=8, target_modules=MLP)),
    ("llama", dict(peft_type="ADALORA", init_r=4, target_r=2, target_modules=MLP)),
    ("llama", dict(peft_type="TRAINABLE_TOKENS", token_indices=[1, 5])),
    ("t5", dict(peft_type="PROMPT_TUNING", num_virtual_tokens=5)),
    ("t5", dict(peft_type="PROMPT_TUNING", num_virtual_tokens=5, num_transformer_submodules=1)),
    ("t5", dict(peft_type="PROMPT_TUNING", num_virtual_tokens=5, num_transformer_submodules=2)),
    ("t5", dict(peft_type="P_TUNING", num_virtual_tokens=5, encoder_hidden_size=32)),
    ("t5", dict(peft_type="PREFIX_TUNING", num_virtual_tokens=5)),
], ids=lambda value: value if isinstance(value, str) else value["peft_type"])  # fmt: skip
def test_a_method_counts_as_in_peft(family, method):
    """From the file that PEFT writes of the configuration; trained, and what never is, as PEFT's file holds them."""
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[method["peft_type"]]]
    given = {k: v for k, v in method.items() if k != "peft_type"} | {"task_type": TASKS.get(family, "CAUSAL_LM")}
    if method["peft_type"] == "ADALORA":
        given["total_step"] = 10
    base = transformers_model(SMALL[family])
    config = cls(**given)
    written = json.loads(json.dumps(config.to_dict(), default=sorted))
    model = peft.get_peft_model(base, config)
    arch = architecture(SMALL[family])
    ours = counted_config({**written, "total_step": None} if method["peft_type"] == "ADALORA" else written, arch)
    trained = elements(trained_parameters(arch, ours))
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    if method["peft_type"] in COUNTED:
        held = {p.data_ptr(): p for p in peft.get_peft_model_state_dict(model).values()}  # what layers share once
        stored = sum(p.numel() for p in held.values())
        constants = constant_parameters(arch, ours) if ours.stores_constants else {}
        assert trained + elements(constants) == stored


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "LORA"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_classifiers_head_counts_as_in_peft(family, kind):
    """It is trained beside each method, a prompt too."""
    import transformers

    given = {"r": 2} if kind == "LORA" else {"num_virtual_tokens": 5}
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]](task_type="SEQ_CLS", **given)
    written = json.loads(json.dumps(config.to_dict(), default=sorted))
    whole = transformers.AutoConfig.for_model(**SMALL[family], num_labels=3)
    model = peft.get_peft_model(transformers.AutoModelForSequenceClassification.from_config(whole), config)
    arch = architecture(SMALL[family], num_labels=3)
    ours = count_parameters(arch, counted_config(written, arch))
    assert (ours.trainable, ours.total) == model.get_nb_trainable_parameters()


@pytest.mark.parametrize("family", ["bloom", "falcon", "gpt_neox", "t5", "bert"])
def test_trained_tokens_beside_lora_count_as_in_peft(family):
    config = peft.LoraConfig(r=2, trainable_token_indices=[1, 5, 7], task_type=TASKS.get(family, "CAUSAL_LM"))
    model = peft.get_peft_model(transformers_model(SMALL[family]), config)
    arch = architecture(SMALL[family])
    ours = count_parameters(arch, LoraConfig(r=2, trainable_token_indices=[1, 5, 7]))
    assert (ours.trainable, ours.total) == model.get_nb_trainable_parameters()


def transformers_model(config):
    """A small model of transformers, with weights, at which some methods look."""
    import transformers

    kind = {"t5": "AutoModelForSeq2SeqLM", "bert": "AutoModel"}.get(config["model_type"], "AutoModelForCausalLM")
    return getattr(transformers, kind).from_config(transformers.AutoConfig.for_model(**config))


def test_all_counted_methods_are_compared():
    marks = test_a_method_counts_as_in_peft.pytestmark
    cases = next(m.args[1] for m in marks if m.name == "parametrize")
    assert {method["peft_type"] for _, method in cases} >= set(COUNTED)


def test_block_formats_are_those_of_gguf():
    gguf = pytest.importorskip("gguf", reason="needs gguf: install the extra 'hub'")
    for name, sizes in BLOCK_FORMATS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == sizes, name
