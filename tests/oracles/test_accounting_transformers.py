"""The parameter tables against the models that transformers builds (on PyTorch's meta device: nothing is allocated)."""

from __future__ import annotations

import pytest

from minipeft.accounting.architectures import _published, architecture, names

torch = pytest.importorskip("torch", reason="needs PyTorch: install the extra 'oracles'")
transformers = pytest.importorskip("transformers", reason="needs transformers: install the extra 'oracles'")

CLASSES = {
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "bert": "BertModel", "roberta": "RobertaModel", "deberta-v2": "DebertaV2Model",
    "t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration", "bloom": "BloomForCausalLM",
    "opt": "OPTForCausalLM",
}  # fmt: skip
SMALLEST = [
    "gpt2", "bert-base", "roberta-base", "deberta-v2-xxlarge", "deberta-v3-base", "t5v1.1-small", "t5-base",
    "mt5-large", "smollm2-135m", "llama2-70b", "llama3.2-1b", "qwen2.5-3b", "mistral-7b", "bloom-560m", "opt-125m",
    "opt-350m",
]  # fmt: skip


def built(config: dict) -> dict:
    """Name -> shape of every parameter of transformers' model.

    The checkpoints of T5 v1.1 and mT5 hold a head of their own, which transformers 4 builds; transformers 5 ties it.
    """
    fields = {k: v for k, v in config.items() if k != "model_type"}
    with torch.device("meta"):
        cls = getattr(transformers, CLASSES[config["model_type"]])
        shapes = {name: tuple(p.shape) for name, p in cls(cls.config_class(**fields)).named_parameters()}
    untied = config["model_type"] == "mt5" or (
        config["model_type"] == "t5" and not config.get("tie_word_embeddings", True)
    )
    return shapes | ({"lm_head.weight": shapes["shared.weight"]} if untied else {})


@pytest.mark.parametrize("name", SMALLEST)
def test_the_table_is_the_model_of_transformers(name):
    config = dict(_published()[name]["config"])
    layers = next(k for k in ("num_hidden_layers", "n_layer", "num_layers") if k in config)
    config |= {layers: 2} | ({"num_decoder_layers": 2} if "num_decoder_layers" in config else {})
    assert dict(architecture(config)) == built(config)


def test_every_family_is_compared():
    assert (
        {architecture(n).model_type for n in names()} == {architecture(n).model_type for n in SMALLEST} == set(CLASSES)
    )


@pytest.mark.parametrize("model_type", CLASSES)
def test_fields_that_a_configuration_leaves_out_have_the_defaults_of_transformers(model_type):
    small = {"num_hidden_layers": 2} if model_type not in ("t5", "mt5") else {"num_layers": 2}
    small = {"n_layer": 2} if model_type in ("gpt2", "bloom") else small
    assert dict(architecture({"model_type": model_type, **small})) == built({"model_type": model_type, **small})


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_configuration_written_by_transformers_is_read(model_type, tmp_path):
    small = {"num_layers": 2} if model_type in ("t5", "mt5") else {"num_hidden_layers": 2}
    config_class = getattr(transformers, CLASSES[model_type]).config_class
    config_class(**small).save_pretrained(tmp_path)
    table = dict(architecture(tmp_path))
    if model_type == "mt5":  # the file of transformers 5 says "tied"
        table.setdefault("lm_head.weight", table["shared.weight"])
    assert table == built({"model_type": model_type, **small})


@pytest.mark.parametrize("name", ["bert-base", "roberta-base", "deberta-v2-xxlarge"])
def test_the_classification_head_is_that_of_transformers(name):
    config = _published()[name]["config"] | {"num_hidden_layers": 2}
    cls = getattr(transformers, CLASSES[config["model_type"]].replace("Model", "ForSequenceClassification"))
    with torch.device("meta"):
        fields = {k: v for k, v in config.items() if k != "model_type"}
        model = cls(cls.config_class(**fields, num_labels=3))
    prefix = f"{model.base_model_prefix}."
    assert dict(architecture(config, num_labels=3)) == {
        path.removeprefix(prefix): tuple(p.shape) for path, p in model.named_parameters()
    }
