"""The parameter tables against the models that transformers builds (on PyTorch's meta device: nothing is allocated)."""

from __future__ import annotations

import re

import pytest
from accounting_cases import CLASSES, on_meta

from minipeft.accounting.architectures import _published, architecture, names

pytest.importorskip("torch", reason="needs PyTorch: install the extra 'oracles'")
transformers = pytest.importorskip("transformers", reason="needs transformers: install the extra 'oracles'")

ONE_EACH = [
    "gpt2", "bert-base", "roberta-base", "deberta-v2-xxlarge", "deberta-v3-base", "t5-base", "smollm2-135m",
    "qwen2.5-3b", "mistral-7b", "mt5-large", "bloom-560m", "opt-125m", "opt-350m",
]  # fmt: skip
MODULES = {
    "Linear": "linear", "Conv1D": "conv1d", "Conv1d": "convolution", "Embedding": "embedding",
    "OPTLearnedPositionalEmbedding": "embedding",
}  # fmt: skip


def built(config: dict) -> dict:
    """Name -> shape of every parameter of transformers' model.

    The checkpoints of T5 v1.1 and mT5 hold a head of their own, which transformers 4 builds; transformers 5 ties it.
    """
    shapes = {name: tuple(p.shape) for name, p in on_meta(config).named_parameters()}
    untied = config["model_type"] == "mt5" or (
        config["model_type"] == "t5" and not config.get("tie_word_embeddings", True)
    )
    return shapes | ({"lm_head.weight": shapes["shared.weight"]} if untied else {})


@pytest.mark.parametrize("name", names())
def test_the_table_is_the_model_of_transformers(name):
    assert dict(architecture(name)) == built(_published()[name]["config"])


@pytest.mark.parametrize("name", ONE_EACH)
def test_kinds_are_the_modules_of_transformers(name):
    config = dict(_published()[name]["config"])
    arch, modules = architecture(config), dict(on_meta(config).named_modules())
    for path, kind in arch.kinds.items():
        owner, _, last = path.rpartition(".")
        module = type(modules[owner]).__name__
        expected = "norm" if module.endswith(("RMSNorm", "LayerNorm")) else MODULES[module]
        assert (path, kind) == (path, "bias" if last == "bias" else expected)


def test_every_family_is_compared():
    families = {architecture(n).model_type for n in names()}
    assert families == {architecture(n).model_type for n in ONE_EACH} == set(CLASSES)


@pytest.mark.parametrize("model_type", CLASSES)
def test_fields_that_a_configuration_leaves_out_have_the_defaults_of_transformers(model_type):
    small = {"num_hidden_layers": 2} if model_type not in ("t5", "mt5") else {"num_layers": 2}
    small = {"n_layer": 2} if model_type in ("gpt2", "bloom") else small
    assert dict(architecture({"model_type": model_type, **small})) == built({"model_type": model_type, **small})


@pytest.mark.parametrize("name", names())
def test_a_configuration_written_by_transformers_is_read(name, tmp_path):
    """By its major versions 4 and 5, which name, leave out and add other fields."""
    config = dict(_published()[name]["config"])
    cls = getattr(transformers, CLASSES[config.pop("model_type")])
    cls.config_class(**config).save_pretrained(tmp_path)
    assert dict(architecture(tmp_path)) == dict(architecture(name))


HEADS = [(name, "SEQ_CLS", "ForSequenceClassification") for name in ONE_EACH if "t5" not in name]
HEADS += [
    (name, "QUESTION_ANS", "ForQuestionAnswering") for name in ("bert-base", "roberta-base", "deberta-v2-xxlarge")
]


@pytest.mark.parametrize(("name", "task", "head"), HEADS)
def test_the_head_for_a_task_is_that_of_transformers(name, task, head):
    config = _published()[name]["config"]
    config = config | {next(k for k in ("num_hidden_layers", "n_layer") if k in config): 2}
    base = re.sub("Model$|LMHeadModel$|ForCausalLM$", "", CLASSES[config["model_type"]])
    model = on_meta(config, base + head, num_labels=3)
    prefix = f"{model.base_model_prefix}."  # which the tables of BERT, RoBERTa and DeBERTa leave out
    shapes = {path: tuple(p.shape) for path, p in model.named_parameters()}
    if config["model_type"] in ("bert", "roberta", "deberta-v2"):
        shapes = {path.removeprefix(prefix): shape for path, shape in shapes.items()}
    assert dict(architecture(config, 3, task)) == shapes
