"""Parameter counts from shapes against counts from built models."""

from __future__ import annotations

import subprocess
import sys

import accounting_cases
import numpy as np
import pytest

import minipeft as mp
from minipeft.accounting import architecture, count_parameters
from minipeft.files import read_safetensors

gpt2, llama = mp.TransformerConfig.gpt2, mp.TransformerConfig.llama
CONFIGS = [gpt2(), llama(), llama(tie_word_embeddings=False)]


@pytest.mark.parametrize("config", CONFIGS)
def test_full_fine_tuning_and_the_head_alone_are_the_models_that_are_built(config):
    full, n = count_parameters(config), sum(p.size for p in mp.Transformer(config, seed=None).parameters())
    assert (full.trainable, full.stored, full.total, full.share) == (n, n, n, 1)
    model, count = mp.head_only(mp.Transformer(config, seed=0)), count_parameters(config, "head")
    assert count.trainable == sum(p.size for p in model.parameters() if p.requires_grad) == 2048 * 128
    assert count.total == sum(p.size for p in model.parameters())


def test_a_frozen_model_trains_nothing():
    count = count_parameters("llama3-8b", "frozen")
    assert (count.trainable, count.stored, count.total, count.share) == (0, 0, 8_030_261_248, 0)


METHODS = {
    **{name: config for name, config in accounting_cases.METHODS.items() if hasattr(config, "peft_type")},
    "the embedding": mp.LoraConfig(r=2, target_modules=["wte", "embed_tokens"]),
    "bitfit of linear layers": mp.BitFitConfig(target_modules="all-linear"),
    "one layer": mp.LoraConfig(r=2, target_modules=["c_fc", "up_proj"], layers_to_transform=[1]),
    "ranks by name": mp.LoraConfig(r=2, target_modules="all-linear", rank_pattern={"(c_attn|q_proj)": 5}),
    "a parallel bottleneck's size": mp.BottleneckConfig(placement="parallel", bottleneck_size=7),
}


@pytest.fixture(params=CONFIGS[:2], ids=lambda c: c.model_type)
def config(request):
    return request.param


@pytest.fixture(params=METHODS)
def method(request, config):
    """A configuration whose targets the model has."""
    options, of_model = METHODS[request.param], {p.split(".")[-2] for p in architecture(config)}
    accounting_cases.skip_what_does_not_fit(config.model_type, request.param)
    if isinstance(options.target_modules, list):
        options = options.replace(target_modules=[t for t in options.target_modules if t in of_model])
    return options


def test_a_method_is_counted_as_the_model_that_it_builds(config, method):
    count = count_parameters(config, method)
    built = mp.PeftModel(mp.Transformer(config, seed=None), method, seed=None)
    assert (count.trainable, count.total) == built.get_nb_trainable_parameters()


def test_what_is_stored_is_what_the_file_holds(config, method, tmp_path):
    if method.modules_to_save or {"wte", "embed_tokens"} & set(method.target_modules or ()):
        pytest.skip("PEFT's format adds the base's own embedding or head")
    mp.get_peft_model(mp.Transformer(config, seed=0), method).save_pretrained(tmp_path)
    arrays, _ = read_safetensors(tmp_path / "adapter_model.safetensors")
    assert count_parameters(config, method).stored == sum(a.size for a in arrays.values())


FAMILIES = [
    "gpt2", "llama3.2-1b", "mistral-7b", "qwen2.5-3b", "bert-base", "roberta-base", "deberta-v2-xxlarge", "t5-base",
    "mt5-large", "bloom-560m",
]  # fmt: skip


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [mp.LoraConfig(r=4), mp.VeraConfig(r=4), mp.IA3Config(), mp.LNTuningConfig(), mp.AdaLoraConfig(total_step=1),
     mp.BottleneckConfig()],
    ids=lambda c: c.peft_type,
)
def test_every_family_has_usual_targets(model, options):
    assert 0 < count_parameters(model, options).share < 0.03


@pytest.mark.parametrize(("model", "options", "trainable"), [
    # 32 layers of q: 4096 -> 4096 and v: 4096 -> 1024
    ("mixtral-8x7b", mp.LoraConfig(r=8), 32 * 8 * (4096 + 4096 + 4096 + 1024)),
    # as PEFT 0.21: in each layer factors of the ranks 2 r E and r E, and at the router
    ("mixtral-8x7b", mp.LoraConfig(r=8, target_modules=["w1", "w2", "w3"]),
     32 * 8 * 8 * (2 * (4096 + 2 * 14336) + 14336 + 4096)),
    ("mixtral-8x7b", mp.LoraConfig(r=8, target_modules=["gate"]), 32 * 8 * (4096 + 8)),
    ("qwen3-30b-a3b", mp.LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]),
     48 * 2 * 128 * (2 * (2048 + 2 * 768) + 768 + 2048)),
    ("mixtral-8x7b", mp.LoHaConfig(r=2, target_modules="all-linear"), 32 * 2 * 2 * (2 * 8192 + 2 * 5120)),
    # PEFT's documentation: LoRA with a head of two classes on Gemma 2 2B, LoRA on Whisper large
    ("openai/whisper-large-v2", mp.LoraConfig(r=32, target_modules=["q_proj", "v_proj"]), 15_728_640),
    ("phi-2", mp.LoraConfig(r=8), 32 * 8 * (2 * 2 * 2560 + 2 * (2560 + 10240))),
    ("falcon-7b", mp.LNTuningConfig(), 33 * 2 * 4544),  # which has one norm a block, of the usual two
    ("phi-2", "head", 51200 * 2561),
    ("whisper-tiny", "head", 51865 * 384),
    # rows of the embedding beside LoRA, or a prompt as wide, whatever the family calls its embedding
    ("bloom-560m", mp.LoraConfig(r=8, trainable_token_indices=[1, 5]), 24 * 8 * (1024 + 3072) + 2 * 1024),
    ("pythia-1.4b", mp.LoraConfig(r=8, trainable_token_indices=[1, 5]), 24 * 8 * (2048 + 3 * 2048) + 2 * 2048),
    ("t5-small", mp.LoraConfig(r=8, trainable_token_indices=[1, 5]), 18 * 2 * 8 * 2 * 512 + 2 * 512),
    ("pythia-1.4b", mp.PromptTuningConfig(num_virtual_tokens=5), 5 * 2048),
    ("pythia-1.4b", mp.PrefixTuningConfig(num_virtual_tokens=5), 5 * 2 * 24 * 2048),
])  # fmt: skip
def test_counts_of_other_families(model, options, trainable):
    assert count_parameters(model, options).trainable == trainable


def test_a_classifier_of_gemma_2_is_counted_as_pefts_documentation_prints_it():
    config = mp.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    assert count_parameters(architecture("google/gemma-2-2b", num_labels=2), config).trainable == 3_199_488


def test_four_bits_leave_experts_that_are_in_one_array():
    options = dict(quantization="nf4", precision="bfloat16")
    frozen = mp.accounting.memory_ledger("mixtral-8x7b", mp.LoraConfig(r=1), **options).lines["frozen weights"]
    assert frozen > 2 * 32 * 8 * 3 * 4096 * 14336


def test_adapters_around_the_sublayers_of_other_families():
    """Houlsby et al. 2019 (figure 2): two in each layer of BERT; Pfeiffer et al. 2020: one."""
    one = 2 * 768 * 64 + 64 + 768
    for model in ("bert-base", "roberta-base", "t5-base"):
        layers = 24 if model == "t5-base" else 12
        houlsby, pfeiffer, parallel = (
            count_parameters(model, mp.BottleneckConfig(placement=p, bottleneck_size=64)).trainable
            for p in ("houlsby", "pfeiffer", "parallel")
        )
        assert (houlsby, pfeiffer, parallel) == (2 * layers * one, layers * one, layers * one)


def test_the_projections_that_vera_shares_are_stored_and_not_counted_otherwise():
    config = mp.VeraConfig(r=256, target_modules=["q_proj", "v_proj"])
    count, arch = count_parameters("llama3.2-3b", config), architecture("llama3.2-3b")
    assert count.stored - count.trainable == 256 * (3072 + 3072)
    assert count.total == arch.size + count.trainable


def test_a_rank_costs_no_time_however_large_the_model(monkeypatch):
    monkeypatch.setattr(np, "zeros", None)  # nothing is allocated
    count = count_parameters("gpt3", mp.LoraConfig(r=12288, target_modules="all-linear"))
    assert count.trainable == 96 * 12288 * 12288 * (2 + 4 + 5 + 5)


def test_counting_loads_neither_training_nor_quantization_nor_text():
    code = (
        "import sys; import minipeft as mp; mp.accounting.count_parameters('gpt2', mp.LoraConfig()); "
        "mp.accounting.memory_ledger('gpt2', mp.LoraConfig()); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "minipeft.accounting.memory" in loaded
    assert {f"minipeft.{name}" for name in ("train", "rlhf", "text", "hub.pretrained", "quant")} & set(loaded) == set()


def test_trained_biases_are_copies_beside_the_frozen_ones():
    count = count_parameters(CONFIGS[0], mp.BitFitConfig())
    assert count.total == architecture(CONFIGS[0]).size + count.trainable


@pytest.mark.parametrize(("model", "config", "sentence"), [
    ("gpt2", "lora", "config must be None"),
    ("bert-base", "head", "bert-base has no language-model head"),
    ("bert-base", mp.LoraConfig(target_modules=["q_proj"]), r"no module is called 'q_proj'; .*query, key, value"),
    ("llama-7b", mp.LoraConfig(target_modules=["q_proj", "v_pro"]), "no module is called 'v_pro'; nearest: v_proj"),
    ("bert-base", mp.LoraConfig(target_modules=["query", "attention"]),
     r"'encoder\.layer\.0\.attention' of bert-base is not a layer but several"),
    ("bert-base", mp.LoraConfig(target_modules=["LayerNorm"]), "'embeddings.LayerNorm' of bert-base is of the kind norm"),
    ("gpt2", mp.LoraConfig(modules_to_save=["lm_heat"]), "modules_to_save: no module is called 'lm_heat'"),
    ("llama-7b", mp.BitFitConfig(), "BitFitConfig trains nothing of llama-7b"),
    ("mixtral-8x7b", mp.LoraConfig(target_modules=["w1"]), "w1 and w3 of mixtral-8x7b are one array: name both or neither"),
    ("mixtral-8x7b", mp.LoraConfig(target_modules=["w1", "w3"], use_dora=True), "DoRA is not defined for experts in one"),
    ("mixtral-8x7b", mp.LoHaConfig(target_modules=["gate_up_proj"]), "is of the kind experts; LoHaConfig works on linear"),
    ("llama-7b", mp.LoraConfig(trainable_token_indices={"nope": [1]}), "there is no embedding called 'nope'"),
    ("vit-base", mp.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]), "there is no embedding$"),
    ("llama-7b", mp.LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[1]),
     "model.embed_tokens is a target of the adapter, so its tokens cannot"),
    ("llama-7b", mp.LoraConfig(modules_to_save=["embed_tokens"], trainable_token_indices=[1]),
     r"model.embed_tokens is trained whole \(modules_to_save\), so its tokens cannot"),
    ("phi4", mp.LoraConfig(), "LoraConfig needs target_modules for a .* of type 'phi3'"),
])  # fmt: skip
def test_what_is_no_method_or_fits_no_parameter_is_refused(model, config, sentence):
    with pytest.raises(ValueError, match=sentence):
        count_parameters(model, config)


def test_only_some_names_are_counted():
    last_two = count_parameters("gpt2-m", only=r"transformer\.h\.(22|23)\..*")
    assert last_two.trainable == last_two.total == 2 * (12 * 1024**2 + 13 * 1024)
    lora = mp.LoraConfig(r=4, target_modules=["q_proj"])
    count = count_parameters("llama-7b", lora, only=r".*lora_B.*")
    assert (count.trainable, count.stored, count.total) == (32 * 4 * 4096,) * 3
    with pytest.raises(ValueError, match=r"only='\(' is not a regular expression"):
        count_parameters("gpt2", only="(")
