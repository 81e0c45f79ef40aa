"""Parameter counts from shapes against counts from built models."""

from __future__ import annotations

import numpy as np
import pytest

from minipeft.accounting import architecture, count_parameters
from minipeft.files import read_safetensors
from minipeft.nn.heads import head_only
from minipeft.nn.transformer import Transformer, TransformerConfig
from minipeft.peft.adalora import AdaLoraConfig
from minipeft.peft.bitfit import BitFitConfig
from minipeft.peft.bottleneck import BottleneckConfig
from minipeft.peft.ia3 import IA3Config
from minipeft.peft.ln_tuning import LNTuningConfig
from minipeft.peft.lora import LoraConfig
from minipeft.peft.model import PeftModel, get_peft_model
from minipeft.peft.p_tuning import PromptEncoderConfig
from minipeft.peft.prefix_tuning import PrefixTuningConfig
from minipeft.peft.prompt_tuning import PromptTuningConfig
from minipeft.peft.vera import VeraConfig

CONFIGS = [TransformerConfig.gpt2(), TransformerConfig.llama(), TransformerConfig.llama(tie_word_embeddings=False)]


@pytest.mark.parametrize("config", CONFIGS)
def test_full_fine_tuning_trains_everything(config):
    count = count_parameters(config)
    assert (
        count.trainable
        == count.stored
        == count.total
        == sum(p.size for p in Transformer(config, seed=None).parameters())
    )
    assert count.share == 1


@pytest.mark.parametrize("config", CONFIGS)
def test_head_only_is_the_model_that_head_only_builds(config):
    model, count = head_only(Transformer(config, seed=0)), count_parameters(config, "head")
    assert count.trainable == sum(p.size for p in model.parameters() if p.requires_grad) == 2048 * 128
    assert count.total == sum(p.size for p in model.parameters())


def test_a_frozen_model_trains_nothing():
    count = count_parameters("llama3-8b", "frozen")
    assert (count.trainable, count.stored, count.total, count.share) == (0, 0, 8_030_261_248, 0)


METHODS = {
    "usual targets": LoraConfig(r=4),
    "every linear layer": LoraConfig(r=2, target_modules="all-linear"),
    "dora": LoraConfig(r=3, target_modules="all-linear", use_dora=True),
    "the embedding": LoraConfig(r=2, target_modules=["wte", "embed_tokens"]),
    "the head trained whole": LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"]),
    "one layer": LoraConfig(r=2, target_modules=["c_fc", "up_proj"], layers_to_transform=[1]),
    "ranks by name": LoraConfig(r=2, target_modules="all-linear", rank_pattern={"(c_attn|q_proj)": 5}),
    "vera": VeraConfig(r=16),
    "ia3": IA3Config(),
    "layer norms": LNTuningConfig(),
    "adalora": AdaLoraConfig(total_step=10),
    "bottleneck": BottleneckConfig(placement="houlsby"),
    "parallel bottleneck": BottleneckConfig(placement="parallel", bottleneck_size=7),
    "prompt": PromptTuningConfig(num_virtual_tokens=9),
    "prefix": PrefixTuningConfig(num_virtual_tokens=9),
    "prefix by an MLP": PrefixTuningConfig(num_virtual_tokens=9, prefix_projection=True),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=9),
}


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda c: c.model_type)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_counted_as_the_model_that_it_builds(config, method):
    lora = METHODS[method]
    if isinstance(lora.target_modules, list):
        of_model = {p.split(".")[-2] for p in architecture(config)}
        lora = lora.replace(target_modules=[t for t in lora.target_modules if t in of_model])
    count = count_parameters(config, lora)
    built = PeftModel(Transformer(config, seed=None), lora, seed=None)
    assert (count.trainable, count.total) == built.get_nb_trainable_parameters()


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda c: c.model_type)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_stored_is_what_the_file_holds(config, method, tmp_path):
    options = METHODS[method]
    if isinstance(options.target_modules, list):
        of_model = {p.split(".")[-2] for p in architecture(config)}
        options = options.replace(target_modules=[t for t in options.target_modules if t in of_model])
    if options.modules_to_save or "embed" in method:
        pytest.skip("PEFT's format adds the base's own embedding or head")
    get_peft_model(Transformer(config, seed=0), options).save_pretrained(tmp_path)
    arrays, _ = read_safetensors(tmp_path / "adapter_model.safetensors")
    assert count_parameters(config, options).stored == sum(a.size for a in arrays.values())


FAMILIES = [
    "gpt2", "llama3.2-1b", "mistral-7b", "qwen2.5-3b", "bert-base", "roberta-base", "deberta-v2-xxlarge", "t5-base",
    "mt5-large", "bloom-560m",
]  # fmt: skip


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [LoraConfig(r=4), VeraConfig(r=4), IA3Config(), LNTuningConfig(), AdaLoraConfig(total_step=1), BottleneckConfig()],
    ids=lambda c: c.peft_type,
)
def test_every_family_has_usual_targets(model, options):
    assert 0 < count_parameters(model, options).share < 0.03


def test_adapters_around_the_sublayers_of_other_families():
    """Houlsby et al. 2019 (figure 2): two in each layer of BERT; Pfeiffer et al. 2020: one."""
    one = 2 * 768 * 64 + 64 + 768
    for model in ("bert-base", "roberta-base", "t5-base"):
        layers = 24 if model == "t5-base" else 12
        houlsby, pfeiffer, parallel = (
            count_parameters(model, BottleneckConfig(placement=p, bottleneck_size=64)).trainable
            for p in ("houlsby", "pfeiffer", "parallel")
        )
        assert (houlsby, pfeiffer, parallel) == (2 * layers * one, layers * one, layers * one)


def test_the_projections_that_vera_shares_are_stored_and_not_counted_otherwise():
    config = VeraConfig(r=256, target_modules=["q_proj", "v_proj"])
    count, arch = count_parameters("llama3.2-3b", config), architecture("llama3.2-3b")
    assert count.stored - count.trainable == 256 * (3072 + 3072)
    assert count.total == arch.size + count.trainable


def test_a_rank_costs_no_time_however_large_the_model(monkeypatch):
    monkeypatch.setattr(np, "zeros", None)  # nothing is allocated
    count = count_parameters("gpt3", LoraConfig(r=12288, target_modules="all-linear"))
    assert count.trainable == 96 * 12288 * 12288 * (2 + 4 + 5 + 5)


def test_trained_biases_are_copies_beside_the_frozen_ones():
    count = count_parameters(CONFIGS[0], BitFitConfig())
    built = PeftModel(Transformer(CONFIGS[0], seed=None), BitFitConfig(), seed=None)
    assert (count.trainable, count.total) == built.get_nb_trainable_parameters()
    assert count.total == architecture(CONFIGS[0]).size + count.trainable


def test_published_counts_of_lora():
    q_and_v = LoraConfig(r=4, enable_lora=[True, False, True], target_modules=["c_attn"])
    assert count_parameters("gpt3", q_and_v).trainable == 18_874_368  # Hu et al. 2021, table 15: 18.8M
    qwen = count_parameters("qwen2.5-3b", LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    assert (qwen.trainable, qwen.total) == (3_686_400, 3_089_625_088)  # the README of Hugging Face PEFT
    assert (
        count_parameters("roberta-base", LoraConfig(r=8, target_modules=["query", "value"])).trainable == 294_912
    )  # 0.3M


def test_what_is_no_method_or_has_no_head_is_refused():
    with pytest.raises(ValueError, match="config must be None"):
        count_parameters("gpt2", "lora")
    with pytest.raises(ValueError, match="bert-base has no language-model head"):
        count_parameters("bert-base", "head")
    with pytest.raises(ValueError, match=r"no module is called 'q_proj'; .*query, key, value"):
        count_parameters("bert-base", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"no module is called 'v_pro'; nearest: v_proj"):
        count_parameters("llama-7b", LoraConfig(target_modules=["q_proj", "v_pro"]))
    with pytest.raises(ValueError, match=r"'encoder\.layer\.0\.attention' of bert-base is not a layer but several"):
        count_parameters("bert-base", LoraConfig(target_modules=["query", "attention"]))
    with pytest.raises(ValueError, match=r"'embeddings\.LayerNorm' of bert-base is of the kind norm"):
        count_parameters("bert-base", LoraConfig(target_modules=["LayerNorm"]))
    with pytest.raises(ValueError, match="modules_to_save: no module is called 'lm_heat'"):
        count_parameters("gpt2", LoraConfig(modules_to_save=["lm_heat"]))
    with pytest.raises(ValueError, match="BitFitConfig trains nothing of llama-7b"):
        count_parameters("llama-7b", BitFitConfig())


def test_only_some_names_are_counted():
    last_two = count_parameters("gpt2-m", only=r"transformer\.h\.(22|23)\..*")
    assert last_two.trainable == last_two.total == 2 * (12 * 1024**2 + 13 * 1024)
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    count = count_parameters("llama-7b", lora, only=r".*lora_B.*")
    assert (count.trainable, count.stored, count.total) == (32 * 4 * 4096,) * 3
    with pytest.raises(ValueError, match=r"only='\(' is not a regular expression"):
        count_parameters("gpt2", only="(")


def test_targets_that_are_no_names_are_refused():
    for targets in ([None], ["q_proj", 1], {2, 3}, 7):
        with pytest.raises(ValueError, match="target_modules must be a list, each a text, or a text, or None, got"):
            LoraConfig(target_modules=targets)
