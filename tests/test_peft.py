"""Methods on models: the base stays as it is, adapters come and go, merges are exact, files strict, errors clear."""

from __future__ import annotations

import gc
import json
import re
import time

import numpy as np
import pytest
from models import config as config_of
from models import traced

import minipeft as mp
from minipeft import functional as F
from minipeft.backend import Rng, to_numpy, xp_of
from minipeft.files import FileError, read_safetensors, write_safetensors
from minipeft.nn import Embedding, Linear, Sequential
from minipeft.peft.config import PeftError, kind_of, shape_of
from minipeft.peft.model import plain_modules
from minipeft.peft.targets import matches
from minipeft.text.examples import Example, PreferencePair

IDS = np.random.default_rng(3).integers(0, 40, (3, 7))
LINEAR = {"gpt2": ["c_attn", "mlp.c_proj"], "llama": ["q_proj", "down_proj"]}
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens"}

METHODS = {
    "lora": lambda d: mp.LoraConfig(r=2, lora_alpha=3, target_modules=LINEAR[d]),
    "rslora": lambda d: mp.LoraConfig(r=4, target_modules="all-linear", use_rslora=True),
    "dora": lambda d: mp.LoraConfig(r=2, target_modules=LINEAR[d], use_dora=True),
    "pissa": lambda d: mp.LoraConfig(r=2, target_modules=LINEAR[d], init_lora_weights="pissa"),
    "olora": lambda d: mp.LoraConfig(r=2, target_modules=LINEAR[d], init_lora_weights="olora"),
    "embedding": lambda d: mp.LoraConfig(r=2, target_modules=[EMBEDDING[d]]),
    "modules_to_save": lambda d: mp.LoraConfig(r=2, target_modules=LINEAR[d], modules_to_save=["lm_head"]),
    "ia3": lambda d: mp.IA3Config(),
    "ln_tuning": lambda d: mp.LNTuningConfig(),
    "vera": lambda d: mp.VeraConfig(r=4, target_modules=LINEAR[d]),
    "adalora": lambda d: mp.AdaLoraConfig(total_step=50, init_r=4, target_r=2, target_modules=LINEAR[d]),
    "loha": lambda d: mp.LoHaConfig(r=2, alpha=6, target_modules=LINEAR[d]),
    "lokr": lambda d: mp.LoKrConfig(r=1, alpha=2, target_modules=LINEAR[d]),
    "lokr of four factors": lambda d: mp.LoKrConfig(r=1, target_modules=LINEAR[d], decompose_both=True),
    "lokr, second zero": lambda d: mp.LoKrConfig(decompose_factor=2, target_modules=LINEAR[d], init_weights="lycoris"),
    "oft": lambda d: mp.OFTConfig(oft_block_size=4, target_modules=LINEAR[d]),
    "oft exactly": lambda d: mp.OFTConfig(
        r=4, oft_block_size=0, target_modules=LINEAR[d], use_cayley_neumann=False, block_share=True
    ),
}
CASES = [(d, m) for d in ("gpt2", "llama") for m in METHODS] + [("gpt2", "bitfit"), ("gpt2", "fused")]
METHODS["bitfit"] = lambda d: mp.BitFitConfig()
METHODS["fused"] = lambda d: mp.LoraConfig(r=2, target_modules=["c_attn"], enable_lora=[True, False, True])
PROMPTS = {
    "prompt": mp.PromptTuningConfig(num_virtual_tokens=5),
    "prompt of words": mp.PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB"),
    "prefix": mp.PrefixTuningConfig(num_virtual_tokens=5),
    "prefix by an MLP": mp.PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=6),
    "p-tuning": mp.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=6),
}
BOTTLENECKS = {
    p: mp.BottleneckConfig(placement=p, bottleneck_size=3, scaling=2.0, non_linearity="gelu", ln_before=p == "pfeiffer")
    for p in ("houlsby", "pfeiffer", "parallel")
}
METHODS |= {name: lambda d, config=config: config for name, config in {**PROMPTS, **BOTTLENECKS}.items()}
ALL = CASES + [(d, m) for d in ("gpt2", "llama") for m in (*PROMPTS, *BOTTLENECKS)]  # CASES can be merged


def base(dialect="llama", xp=np, dtype=np.float32, **fields):
    model = mp.Transformer(config_of(dialect, **dict(initializer_range=0.3) | fields), seed=1)
    generator = np.random.default_rng(2)
    for p in model.parameters():
        p.data = (p.data + (0.1 * generator.standard_normal(p.shape) if p.ndim == 1 else 0)).astype(dtype)
    return model.to(xp)


def train(model, xp=np, steps=3, lr=1e-2, rng=None, labels=IDS):
    ids, labels = xp.asarray(IDS), xp.asarray(labels)
    optimizer = mp.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        model.zero_grad()
        model.loss(ids, labels, rng=rng and rng.at(step)).backward()
        optimizer.step()
    return model


def logits(model, ids=IDS, **arguments):
    xp = xp_of(model.parameters()[0].data)
    return to_numpy(model(xp.asarray(ids), **arguments).data)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=tolerance, atol=tolerance)


def values(model):
    return {path: to_numpy(p.data).copy() for path, p in model.named_parameters()}


# -------------------------------------------------------------------------------------------------------- the surgery


@pytest.mark.parametrize(("dialect", "method"), ALL)
def test_a_method_leaves_the_base_alone_learns_switches_off_and_merges(dialect, method, xp):
    model = base(dialect, xp)
    before, start = values(model), logits(model)
    adapted = mp.get_peft_model(model, METHODS[method](dialect))
    if method not in PROMPTS:  # whose start differs
        exact = method not in ("pissa", "olora", "ia3", "bitfit")
        (np.testing.assert_array_equal if exact else close)(logits(adapted), start)
    first = adapted.loss(xp.asarray(IDS), xp.asarray(IDS)).item()
    train(adapted, xp)
    mp.assert_learning(adapted)
    assert adapted.loss(xp.asarray(IDS), xp.asarray(IDS)).item() < first
    trained = logits(adapted)
    assert trained.shape == start.shape and np.abs(trained - start).max() > 1e-3
    with adapted.disable_adapter():
        np.testing.assert_array_equal(logits(adapted), start)
    if (dialect, method) in CASES:
        merged = adapted.merge_and_unload()
        close(logits(merged), trained)
        assert not any(".peft." in type(m).__module__ for _, m in merged.named_modules())
        train(merged, xp, steps=1, lr=0.1)  # its arrays are its own
    np.testing.assert_array_equal(logits(adapted), trained)
    np.testing.assert_array_equal(logits(adapted.unload()), start)
    adapted.delete_adapter("default")
    np.testing.assert_array_equal(logits(adapted), start)
    assert [type(m) for _, m in plain_modules(model)] == [type(m) for _, m in adapted.base_model.named_modules()]
    after = values(model)
    assert all(np.array_equal(before[path], after[path]) for path in before)


@pytest.mark.parametrize(("dialect", "method"), ALL)
def test_the_counts_are_those_of_the_formula(dialect, method):
    model, config = base(dialect), METHODS[method](dialect)
    adapted = mp.get_peft_model(model, config)
    trainable, total = adapted.get_nb_trainable_parameters()
    counted = mp.accounting.count_parameters(mp.accounting.architecture(model.config), config)
    assert trainable == counted.trainable
    assert total == counted.total == trainable + sum(p.size for p in model.parameters())
    config, shapes = adapted.peft_config["default"], []
    for path, module in plain_modules(model):
        if kind := kind_of(module):
            shapes += config.parameter_shapes(path, kind, shape_of(module)).values()
            bias = getattr(module, "bias", None)
            shapes += [] if bias is None else config.parameter_shapes(path, "bias", bias.shape).values()
    shapes += [model.lm_head.weight.shape] if config.modules_to_save else []
    assert sorted(shapes) == sorted(p.shape for _, part in adapted.parts("default") for p in part.trained().values())


@pytest.mark.parametrize(("dialect", "method"), ALL)
def test_the_gradient_is_the_slope_of_the_loss(dialect, method):
    """In a random direction, by a central difference. DoRA's norm is a constant in backward alone: only m is free."""
    adapted, step = train(mp.get_peft_model(base(dialect, dtype=np.float64), METHODS[method](dialect))), 1e-5
    named = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    generator = np.random.default_rng(4)
    free = [method != "dora" or name.endswith("vector") for name, _ in named]
    directions = [generator.standard_normal(p.shape) * one for (_, p), one in zip(named, free)]
    adapted.zero_grad()
    adapted.loss(IDS, IDS).backward()
    slope, start = sum((p.grad * v).sum() for (_, p), v in zip(named, directions)), [p.data for _, p in named]

    def at(t):
        for (_, p), value, v in zip(named, start, directions):
            p.data = value + t * v
        return adapted.loss(IDS, IDS).item()

    np.testing.assert_allclose((at(step) - at(-step)) / (2 * step), slope, rtol=1e-6)


def test_an_oft_of_an_earlier_peft_is_refused():
    """Its rotations are others; a version may be any text."""
    for version in ("0.17.9", "0", "0.1³", "x", None):
        with pytest.raises(PeftError, match=r"the adapter is of a PEFT before .* train it again"):
            mp.OFTConfig.from_dict({"peft_version": version})
    for version in ("0.18", "1.0.dev0", "9" * 5000):
        assert mp.OFTConfig.from_dict({"peft_version": version}) == mp.OFTConfig()


@pytest.mark.parametrize(
    ("config", "option", "share"),
    [
        (mp.LoHaConfig, "rank_dropout", 1.0), (mp.LoKrConfig, "rank_dropout", 0.6), (mp.LoKrConfig, "module_dropout", 0.6),
        (mp.OFTConfig, "module_dropout", 0.6),
    ],
)  # fmt: skip
def test_dropout_leaves_out_rows_updates_or_blocks(config, option, share, xp):
    """In training alone, the same for the same stream, and on average `share` of the update is left."""
    size = dict(oft_block_size=4) if config is mp.OFTConfig else dict(rank_pattern={"c_attn": 3})
    start = dict(init_weights=False, target_modules=["c_attn"], **size)
    adapted = mp.get_peft_model(base("gpt2", xp), config(**start, **{option: 0.4}))
    layer = next(iter(adapted.layers.values()))
    x = mp.Tensor(xp.asarray(np.random.default_rng(1).standard_normal((2, 16)).astype(np.float32)))
    plain, whole = to_numpy(layer.base_layer(x).data), to_numpy(layer(x).data) - to_numpy(layer.base_layer(x).data)
    drawn = [to_numpy(layer(x, Rng(seed)).data) - plain for seed in range(400)]
    close(drawn[3], to_numpy(layer(x, Rng(3)).data) - plain, 0)
    np.testing.assert_allclose(np.mean(drawn, 0) / share, whole, atol=0.25 * np.abs(whole).max())
    if option == "rank_dropout":
        kept = np.array([np.abs(d).max(axis=0) > 1e-6 for d in drawn])
        assert abs(kept.mean() - 0.6) < 0.02 and kept.any(axis=1).all()
    elif config is mp.LoKrConfig:
        assert {round(float(np.abs(d / whole).mean()), 3) for d in drawn} == {0.0, 1.0}


def test_any_module_can_be_adapted(xp, rng):
    net = Sequential(Linear(6, 5, seed=1), F.tanh, Linear(5, 2, seed=2)).to(xp)
    x = mp.Tensor(xp.asarray(rng.standard_normal((4, 6)).astype(np.float32)))
    y = net(x).numpy()
    adapted = mp.get_peft_model(net, mp.LoraConfig(r=1, target_modules=["0"]))
    np.testing.assert_array_equal(adapted(x).numpy(), y)
    (adapted(x) ** 2).sum().backward()
    assert [p.grad is not None for p in adapted.parameters()] == [p.requires_grad for p in adapted.parameters()]
    assert net.parameters()[0].grad is None


def test_a_layer_alone_has_no_name_to_be_found_by():
    with pytest.raises(PeftError, match=r"no module is called '0'; nothing is inside this one: .* Sequential"):
        mp.get_peft_model(Linear(3, 3), mp.LoraConfig(target_modules=["0"]))


def test_a_layer_used_twice_is_adapted_where_it_is_named(rng):
    class Twice(mp.nn.Module):
        def __init__(self):
            self.a = Linear(4, 4, seed=1)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    net, x = Twice(), mp.Tensor(rng.standard_normal((3, 4)).astype(np.float32))
    adapted = mp.get_peft_model(net, mp.LoraConfig(r=2, target_modules=["a"]))
    np.testing.assert_array_equal(adapted(x).data, net(x).data)
    optimizer = mp.optim.AdamW(adapted.parameters(), lr=0.1)
    for _ in range(3):
        adapted.zero_grad()
        (adapted(x) ** 2).sum().backward()
        optimizer.step()
    merged = adapted.merge_and_unload()
    close(merged(x).data, adapted(x).data)
    assert merged.a is not merged.b and np.array_equal(merged.b.weight.data, net.b.weight.data)


def test_parts_of_a_fused_projection():
    adapted = train(mp.get_peft_model(base("gpt2"), METHODS["fused"]("gpt2")))
    layer = adapted.layers["transformer.h.0.attn.c_attn"]
    delta = layer.adapters["default"].delta_weight()  # [3 * 16, 16]
    assert np.abs(delta[:16]).max() > 0 and np.abs(delta[32:]).max() > 0
    assert not delta[16:32].any()
    assert layer.adapters["default"].lora_A.shape == (4, 16) and layer.adapters["default"].lora_B.shape == (32, 2)


def test_a_tied_embedding_is_untied_by_a_merge_and_the_configuration_says_so():
    model = base("llama")
    adapted = train(mp.get_peft_model(model, METHODS["embedding"]("llama")))
    merged = adapted.merge_and_unload()
    assert not merged.config.tie_word_embeddings and not merged.backbone.config.tie_word_embeddings
    assert not np.array_equal(merged.lm_head.weight.data, merged.backbone.embedding.weight.data)
    assert adapted.config.tie_word_embeddings and model.config.tie_word_embeddings
    assert adapted.unload().config.tie_word_embeddings


def test_a_copy_is_independent():
    adapted = train(mp.get_peft_model(base(), METHODS["lora"]("llama")))
    y = logits(adapted)
    twin = adapted.copy()
    twin.set_adapter([])
    train(mp.PeftModel.copy(adapted), lr=0.1)
    np.testing.assert_array_equal(logits(adapted), y)
    assert np.abs(logits(twin) - y).max() > 1e-3


# ----------------------------------------------------------------------------------------------------- many adapters


def three(dialect="llama", xp=np, **options):
    """A model with the adapters a (LoRA), b (LoRA elsewhere, another rank) and c (IA3), each trained."""
    adapted = mp.get_peft_model(base(dialect, xp), mp.LoraConfig(r=2, target_modules=LINEAR[dialect], **options), "a")
    adapted.add_adapter("b", mp.LoraConfig(r=3, target_modules=[LINEAR[dialect][0], EMBEDDING[dialect]]), seed=1)
    adapted.add_adapter("c", mp.IA3Config())
    for name in "abc":
        adapted.set_adapter(name)
        train(adapted, xp)
    return adapted


def test_only_the_active_adapter_learns():
    adapted = three()
    adapted.set_adapter("b")
    before = values(adapted)
    train(adapted)
    moved = {path.split(".")[-2] for path, v in values(adapted).items() if not np.array_equal(before[path], v)}
    assert moved == {"b"}
    adapted.set_adapter("b", inference_mode=True)
    assert adapted.get_nb_trainable_parameters()[0] == 0


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_a_mixed_batch_is_each_row_alone(dialect, xp):
    adapted = three(dialect, xp)
    names = ["b", "a", "__base__", "c", "a"]
    ids = np.random.default_rng(0).integers(0, 40, (5, 6))
    mixed = logits(adapted, ids, adapter_names=names)
    for i, name in enumerate(names):
        adapted.set_adapter([] if name == "__base__" else name)
        close(mixed[i : i + 1], logits(adapted, ids[i : i + 1]))
    with pytest.raises(PeftError, match="3 names for an input of 5 rows"):
        adapted(ids if xp is np else xp.asarray(ids), adapter_names=["a", "b", "c"])
    with pytest.raises(PeftError, match="no adapter 'd'"):
        adapted(ids, adapter_names=["d"] * 5)


def test_names_are_a_list_or_an_array_of_text_and_one_text_is_refused(tmp_path):
    adapted, names = three(), ["b", "a", "__base__"]
    np.testing.assert_array_equal(logits(adapted, adapter_names=np.array(names)), logits(adapted, adapter_names=names))
    found = [adapted.generate(IDS, adapter_names=given, max_new_tokens=3) for given in (np.array(names), names)]
    np.testing.assert_array_equal(*found)
    refused = r"must be a list of names, such as \['abc'\], not the text 'abc'$"
    for use in (adapted, adapted.last_logits, adapted.generate, lambda ids, **given: adapted.loss(ids, ids, **given)):
        with pytest.raises(PeftError, match=f"^adapter_names {refused}"):
            use(IDS, adapter_names="abc")
    with pytest.raises(PeftError, match=f"^adapter_names {refused}"):
        adapted.merge_and_unload("abc")
    with pytest.raises(PeftError, match=f"^selected_adapters {refused}"):
        adapted.save_pretrained(tmp_path / "saved", selected_adapters="abc")
    assert not (tmp_path / "saved").exists()


def test_a_mixed_batch_with_adapted_positions(xp):
    config = mp.LoraConfig(r=2, target_modules=["wpe", "wte"], init_lora_weights=False)
    adapted = mp.get_peft_model(base("gpt2", xp), config)
    mixed = logits(adapted, adapter_names=["default", "__base__", "default"])
    close(mixed[::2], logits(adapted)[::2])
    close(mixed[1:2], logits(adapted.unload())[1:2])
    close(logits(adapted, adapter_names=["default"] * 3), logits(adapted))
    with pytest.raises(PeftError, match="3 names for an input of 1 rows"):
        logits(adapted, IDS[:1], adapter_names=["default", "__base__", "default"])


def test_checkpointed_blocks_are_computed_again_with_the_adapters_of_their_forward_pass():
    """Backward comes after the call of a mixed batch is over, or after other adapters have been selected."""
    adapted = three()
    for rows in (["a", "__base__", "a"], None):
        gradients = []
        for checkpointing in (False, True):
            adapted.gradient_checkpointing_enable(checkpointing)
            adapted.set_adapter("a")
            adapted.zero_grad()
            loss = adapted.loss(IDS, IDS, adapter_names=rows)
            with adapted.disable_adapter():
                loss.backward()
            gradients.append({path: p.grad for path, p in adapted.named_parameters() if p.requires_grad})
        assert all(np.abs(g).max() > 0 for g in gradients[0].values())
        for path in gradients[0]:
            close(gradients[0][path], gradients[1][path], 1e-6)


def test_active_adapters_are_applied_one_around_the_other_and_merge_so():
    adapted = three()
    adapted.set_adapter(["a", "c", "b"])
    y = logits(adapted)
    assert all(np.abs(y - logits(three())).max() > 1e-3 for _ in range(1))
    close(logits(adapted.merge_and_unload()), y)


@pytest.mark.parametrize("below", ["lora", "ia3", "bitfit", "dora"])
def test_dora_around_another_adapter_trains_the_function_that_it_evaluates_and_merges(below):
    adapted = mp.get_peft_model(base("gpt2"), METHODS[below]("gpt2"), "a")
    adapted.add_adapter("b", METHODS["dora"]("gpt2").replace(lora_dropout=1e-9), seed=1)  # a dropout that drops nothing
    adapted.set_adapter(["a", "b"])
    y = logits(train(adapted, steps=10))
    close(logits(adapted, rng=1), y)
    close(logits(adapted.merge_and_unload()), y)


def test_ten_adapters_cost_ten_adapters_and_not_ten_models():
    model = base(hidden_size=256, intermediate_size=512, vocab_size=2000)
    config = mp.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    adapted = mp.get_peft_model(model, config, "a0")
    one = 4 * adapted.get_nb_trainable_parameters()[0]
    whole = 4 * sum(p.size for p in model.parameters())
    gc.collect()
    with traced() as memory:
        for i in range(1, 11):
            adapted.add_adapter(f"a{i}", config)
        gc.collect()
        held, _ = memory()
    assert 10 * one <= held <= 10 * one + 100_000 < whole / 20
    pairs = zip(model.parameters(), adapted.unload().parameters())
    assert all(np.array_equal(p.data, q.data) for p, q in pairs)


def test_lora_keeps_its_input_and_its_rank_and_no_more(rng):
    """Of y = W x + B s A x, backward needs x (which the caller holds anyway) and the r numbers per row between."""
    layer = mp.get_peft_model(Sequential(Linear(512, 512, bias=False)), mp.LoraConfig(r=4, target_modules=["0"]))
    x = mp.Tensor(rng.standard_normal((1000, 512)).astype(np.float32))
    layer(x)
    gc.collect()
    with traced() as memory:
        y = layer(x)
        held, _ = memory()
    between = 1000 * 4 * 4
    assert y.data.nbytes <= held <= y.data.nbytes + 2 * between + 20_000


@pytest.mark.parametrize(
    "config",
    [
        mp.LoraConfig(r=512, target_modules="all-linear"), mp.LoraConfig(use_dora=True),
        mp.LoraConfig(init_lora_weights="pissa"), mp.LoraConfig(modules_to_save=["wte"]), mp.IA3Config(),
        mp.LNTuningConfig(), mp.BitFitConfig(), mp.VeraConfig(), mp.AdaLoraConfig(total_step=9), mp.BottleneckConfig(),
        mp.PromptTuningConfig(num_virtual_tokens=9), mp.PromptEncoderConfig(num_virtual_tokens=9),
        mp.PrefixTuningConfig(num_virtual_tokens=9, prefix_projection=True),
    ],
    ids=lambda config: type(config).__name__,
)  # fmt: skip
def test_without_a_seed_a_model_of_175_billion_parameters_is_adapted_in_no_memory(config):
    shape = dict(vocab_size=50257, hidden_size=12288, num_hidden_layers=96, num_attention_heads=96)
    gpt3 = mp.Transformer(mp.TransformerConfig.gpt2(**shape, max_position_embeddings=2048), seed=None)
    gc.collect()
    with traced() as memory:
        adapted = mp.PeftModel(gpt3, config, seed=None)
        trainable, total = adapted.get_nb_trainable_parameters()
        _, held = memory()
    assert held < 4_000_000 < 4 * trainable + 4 * total
    assert trainable == mp.accounting.count_parameters(mp.accounting.architecture(gpt3.config), config).trainable


# ------------------------------------------------------------------------------------------------------------- merging


def test_disabled_means_the_base_whatever_is_chosen_inside():
    adapted = three()
    with adapted.disable_adapter():
        adapted.set_adapter("b")
        assert adapted.active_adapters == []
        for names in (None, ["a", "b", "__base__"]):
            np.testing.assert_array_equal(adapted(IDS, adapter_names=names).data, logits(base()))
    assert adapted.active_adapters == ["b"] and adapted.loss(IDS, IDS).requires_grad


def test_a_model_whose_layers_have_adapters_takes_no_second_set():
    with pytest.raises(PeftError, match="the model has adapters already"):
        mp.get_peft_model(three().base_model, mp.LoraConfig(r=2))


def test_a_block_that_stands_in_two_places_has_one_adapter():
    class Block(mp.nn.Module):
        def __init__(self):
            self.fc = Linear(4, 4, seed=1)

    block = Block()
    net = mp.nn.ModuleList([block, block])
    adapted = mp.get_peft_model(net, mp.LoraConfig(r=2, target_modules=["fc"]))
    assert list(adapted.layers) == ["0.fc"] and adapted.base_model[1].fc is adapted.layers["0.fc"]


@pytest.mark.parametrize("pattern", [None, "blocks", "stages"])
def test_layers_are_counted_as_in_peft(pattern):
    """In stages.0.blocks.1 without a pattern: the first number with two names before it."""
    config = mp.LoraConfig(target_modules=["fc"], layers_to_transform=[0], layers_pattern=pattern)
    named = [f"stages.{i}.blocks.{j}.fc" for i in (0, 1) for j in (0, 1)]
    found = [name for name in named if config.targets(name, "linear")]
    assert found == (named[:2] if pattern == "stages" else named[::2])
    assert config.targets("blocks.0.fc", "linear") is (pattern == "blocks")


@pytest.mark.parametrize("method", ["lora", "ia3", "loha", "oft"])
def test_all_linear_layers_of_some_blocks(method, tmp_path):
    """Which PEFT refuses; so the file, which it is to read, has names."""
    config = getattr(mp, {"lora": "LoraConfig", "ia3": "IA3Config", "loha": "LoHaConfig", "oft": "OFTConfig"}[method])
    adapted = mp.get_peft_model(base(), config(target_modules="all-linear", layers_to_transform=[1]))
    adapted.add_adapter("second", config(target_modules="all-linear", layers_to_transform=[1]))
    paths = {path for path, module in base().named_modules() if isinstance(module, Linear) and ".layers.1." in path}
    assert adapted.layers.keys() == paths and len(paths) == 7
    names = sorted(path.rpartition(".")[2] for path in paths)
    assert all(own.target_modules == names for own in adapted.peft_config.values())
    adapted.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["target_modules"], saved["layers_to_transform"]) == (names, [1])
    assert mp.PeftModel.from_pretrained(base(), tmp_path).layers.keys() == paths


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "ia3", "embedding", "vera", "adalora"])
def test_merged_weights_are_used_while_their_adapters_are_and_dropped_exactly(method):
    adapted = train(mp.get_peft_model(base(), METHODS[method]("llama")))
    y = logits(adapted)
    adapted.merge_adapter()
    close(logits(adapted), y)
    with adapted.disable_adapter():
        np.testing.assert_array_equal(logits(adapted), logits(base()))
    adapted.unmerge_adapter()
    np.testing.assert_array_equal(logits(adapted), y)


def test_merged_adapters_are_not_trained_and_move_with_the_model(xp):
    adapted = mp.get_peft_model(base(), METHODS["adalora"]("llama"))
    adapted.merge_adapter()
    with pytest.raises(PeftError, match="merged adapters get no gradient: call unmerge_adapter"):
        adapted.loss(IDS, IDS)
    with mp.no_grad():
        merged = adapted.loss(IDS, IDS).item()
    assert not adapted(IDS).requires_grad
    copy = adapted.copy().to(xp)
    close(logits(copy), logits(adapted))
    adapted.add_adapter("other", mp.LoraConfig(r=2))
    adapted.set_adapter("other")  # for which nothing is merged
    adapted.loss(IDS, IDS).backward()
    adapted.set_adapter("default")
    adapted.unmerge_adapter()
    with mp.no_grad():
        assert abs(adapted.loss(IDS, IDS).item() - merged) < 1e-5


def test_a_module_trained_whole_is_a_copy_without_the_adapters_of_layers_inside(tmp_path):
    adapted = train(mp.get_peft_model(base(), mp.LoraConfig(r=2, target_modules=["down_proj"]), "inside"))
    adapted.add_adapter("whole", mp.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"]))
    adapted.set_adapter("whole")
    np.testing.assert_array_equal(logits(adapted), logits(base()))
    y = logits(train(adapted))
    assert not any("inside" in name for name, p in adapted.named_parameters() if p.requires_grad)
    adapted.save_pretrained(tmp_path)
    np.testing.assert_array_equal(logits(mp.PeftModel.from_pretrained(base(), tmp_path / "whole")), y)
    close(logits(adapted.merge_and_unload()), y)


def test_an_adapter_inside_a_layer_with_another_learns_again_after_unmerging():
    adapted = mp.get_peft_model(base(), mp.LoraConfig(r=2), "a")
    adapted.add_adapter("b", mp.BottleneckConfig(placement="houlsby", bottleneck_size=2))
    before = adapted.get_nb_trainable_parameters()
    adapted.merge_adapter()
    assert adapted.get_nb_trainable_parameters() == before
    adapted.unmerge_adapter()
    mp.assert_learning(train(adapted))
    assert adapted.get_nb_trainable_parameters() == before and before[0] > 0


def test_merging_and_subtracting_restores_the_weight_to_rounding():
    adapted = train(mp.get_peft_model(base(), METHODS["lora"]("llama")))
    for layer in adapted.layers.values():
        merged = layer.merge().weight.data
        W = layer.base_layer.weight.data
        assert np.abs(merged - W).max() > 1e-4
        close(merged - layer.adapters["default"].delta_weight(), W, 2e-7)


def test_a_merge_that_is_not_finite_is_refused():
    adapted = mp.get_peft_model(base(), METHODS["lora"]("llama"))
    adapter = adapted.layers["model.layers.1.self_attn.q_proj"].adapters["default"]
    adapter.lora_B.data[0, 0] = np.inf
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(PeftError, match="not finite"):
            merge()
    assert all(layer.merged is None for layer in adapted.layers.values())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "dare", "dare_ties", "magnitude_prune", "ties_svd"])
def test_one_adapter_with_weight_one_is_itself(kind, rslora):
    adapted = three(use_rslora=rslora, lora_alpha=5, rank_pattern={"down_proj": 3})
    density = {} if kind in ("linear", "cat", "svd") else {"density": 1.0}
    adapted.add_weighted_adapter(["a"], [1.0], "d", combination_type=kind, **density)
    adapted.set_adapter("a")
    y = logits(adapted)
    adapted.set_adapter("d")
    close(logits(adapted), y, 2e-5)


def test_cat_is_the_exact_sum_and_survives_a_file(tmp_path):
    adapted = three()
    adapted.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum", combination_type="cat")
    for layer in adapted.layers.values():
        if "sum" in layer.adapters:
            parts = {n: layer.adapters[n].delta_weight() for n in "ab" if n in layer.adapters}
            expected = sum({"a": 0.5, "b": -2.0}[n] * d for n, d in parts.items())
            close(layer.adapters["sum"].delta_weight(), expected, 1e-6)
    adapted.set_adapter("sum")
    with pytest.raises(PeftError, match="there is no adapter 'som'"):
        adapted.save_pretrained(tmp_path, selected_adapters=["som"])
    adapted.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert [path.name for path in tmp_path.iterdir()] == ["sum"]
    loaded = mp.PeftModel.from_pretrained(base(), tmp_path / "sum")
    np.testing.assert_array_equal(logits(loaded), logits(adapted))


def test_dare_drops_and_rescales():
    adapted = three()
    for seed, name in ((1, "d"), (1, "e"), (2, "f")):
        adapted.add_weighted_adapter(["a", "a"], [1.0, 0.0], name, combination_type="dare", density=0.5, seed=seed)
    A = {n: adapted.layers["model.layers.0.mlp.down_proj"].adapters[n].lora_A.data for n in "adef"}
    kept = A["d"] != 0
    assert 0.3 < kept.mean() < 0.7
    close(A["d"][kept], 2 * A["a"][kept] * np.sqrt(8 / 2))
    assert np.array_equal(A["d"], A["e"]) and not np.array_equal(A["d"], A["f"])


@pytest.mark.parametrize("kind", ["ties", "dare", "magnitude_prune", "cat"])
def test_one_adapter_alone_gives_itself(kind):
    """As in PEFT, which takes nothing away from one."""
    adapted = three()
    options = {} if kind == "cat" else {"density": 0.3}
    adapted.add_weighted_adapter(np.array(["a"]), np.array([1.0]), "alone", combination_type=kind, **options)
    for layer in adapted.layers.values():
        if "a" in layer.adapters:
            (A, B), (C, D) = (layer.adapters[n].factors() for n in ("a", "alone"))
            close(layer.adapters["alone"].scaling * (D.data @ C.data), layer.adapters["a"].scaling * (B.data @ A.data))


def test_what_cannot_be_combined_is_refused():
    adapted = three()
    adapted.add_adapter("dora", METHODS["dora"]("llama"))
    for names, kind, options, match in [
        (["a", "b"], "linear", {}, "ranks are"), (["a", "c"], "cat", {}, "'c' uses IA3"), (["dora"], "cat", {}, "use_dora"),
        (["a"], "mean", {}, "combination_type"), (["a"], "ties", {}, "density"), (["x"], "cat", {}, "no adapter 'x'"),
        (["a"], "svd", {"svd_rank": -1}, "svd_rank must be an integer of at least 1, or None, got -1"),
        (["a"], "svd", {"svd_rank": 0}, "svd_rank must be an integer of at least 1, or None, got 0"),
        (["a"], "cat", {"svd_rank": 2}, "cat has no svd_rank"), (["a"], "svd", {"density": 0.5}, "it has no density"),
        (["a"] * 9, "cat", {}, "a rank of 18, but its matrix has one of 16 at most; use svd"),
    ]:  # fmt: skip
        with pytest.raises(PeftError, match=match):
            adapted.add_weighted_adapter(names, [1.0] * len(names), "new", combination_type=kind, **options)
    assert "new" not in adapted.peft_config


# ------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_acts_only_with_a_stream_and_replays(xp):
    config = mp.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    adapted = mp.get_peft_model(base(xp=xp), config)
    ids = xp.asarray(IDS)
    plain, one, again, other = (to_numpy(adapted(ids, rng=rng).data) for rng in (None, Rng(1), Rng(1), Rng(2)))
    assert np.array_equal(one, again) and not np.array_equal(one, other) and not np.array_equal(one, plain)
    part = to_numpy(adapted(ids[1:], rng=Rng(1, first_row=1)).data)  # a row's mask does not depend on the other rows
    close(part, one[1:])


def test_dropout_acts_on_an_adapted_head_in_the_loss_as_in_the_logits():
    config = mp.LoraConfig(r=2, lora_dropout=0.5, target_modules=["lm_head"], init_lora_weights=False)
    adapted = mp.get_peft_model(base(tie_word_embeddings=False), config)
    expected = F.cross_entropy(adapted(IDS, rng=Rng(1))[:, :-1], IDS[:, 1:]).item()
    assert abs(adapted.loss(IDS, IDS, rng=Rng(1)).item() - expected) < 1e-6
    assert abs(adapted.loss(IDS, IDS).item() - expected) > 1e-3


def test_each_layer_draws_its_own_mask():
    config = mp.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "k_proj", "v_proj"])
    adapted, masks = mp.get_peft_model(base(), config), []
    dropout = F.dropout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", lambda x, p, rng: (masks.append(rng.path), dropout(x, p, rng))[1])
        adapted(IDS, rng=Rng(0))
    assert len(masks) == len(set(masks)) == 6


@pytest.mark.parametrize("method", ["dropout", *PROMPTS, *BOTTLENECKS])
def test_checkpointing_replays_dropout_and_gives_the_same_gradients(method):
    config = mp.LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear")
    adapted = train(mp.get_peft_model(base(), config if method == "dropout" else METHODS[method]("llama")))
    found = []
    for enabled in (False, True):
        adapted.gradient_checkpointing_enable(enabled)
        adapted.zero_grad()
        adapted.loss(IDS, IDS, rng=Rng(5)).backward()
        found.append([p.grad for p in adapted.parameters() if p.requires_grad])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------------------------- AdaLoRA


def adalora_by_hand(loss=lambda model, ids: model.loss(ids, ids), before=lambda model, step: None, lr=0.1):
    """Six steps of a loop of one's own, four of which prune: the model, and the callback."""
    options = dict(total_step=6, tfinal=1, init_r=4, target_r=2, target_modules=LINEAR["llama"])
    adapted = mp.get_peft_model(base(), mp.AdaLoraConfig(**options))
    (callback,) = adapted.training_callbacks()
    optimizer = mp.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=lr)
    for step in range(1, 7):
        before(adapted, step)
        adapted.zero_grad()
        loss(adapted, xp_of(adapted.parameters()[0].data).asarray(IDS)).backward()
        callback.before_step(adapted, step)
        optimizer.step()
        callback.after_step(adapted, step)
    return adapted, callback


def test_any_loss_can_be_trained_with_adalora_in_a_loop_of_ones_own():
    adapted, callback = adalora_by_hand(loss=lambda model, ids: (model(ids) ** 2).mean())
    pattern = adapted.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 2 * len(pattern) == 2 * len(adapted.layers)
    for path, part in adapted.parts("default"):
        np.testing.assert_array_equal(part.lora_E.data[:, 0] != 0, pattern[f"{path}.lora_E"])
    adapted.zero_grad()
    callback.before_step(adapted, 7)  # adds the gradient of the penalty, which is no part of the loss
    gradients = {path: part.lora_A.grad for path, part in adapted.parts("default")}
    adapted.zero_grad()
    callback.penalty().backward()
    assert all(np.array_equal(part.lora_A.grad, gradients[path]) for path, part in adapted.parts("default"))
    with pytest.raises(PeftError, match="call after_step before zero_grad"):
        callback.after_step(adapted.zero_grad(), 1)
    shapes = {f"{path}.{key}": p.shape for path, part in adapted.parts("default") for key, p in part.trained().items()}
    kept = adapted.peft_config["default"].training_state_shapes(shapes)
    assert kept == {key: a.shape for key, a in callback.state_dict().items() if not key.endswith(".kept")}
    adapted.set_adapter("default", inference_mode=True)
    assert adapted.training_callbacks() == mp.get_peft_model(base(), mp.LoraConfig()).training_callbacks() == []


@pytest.mark.parametrize(("total", "tfinal", "skipped"), [(4, 1, 3), (2, 0, 1)])
def test_a_step_that_a_loss_scale_skips_loses_no_pruning(total, tfinal, skipped):
    options = dict(total_step=total, tfinal=tfinal, init_r=4, target_r=2, target_modules=LINEAR["llama"])
    adapted = mp.get_peft_model(base(), mp.AdaLoraConfig(**options))
    (callback,) = adapted.training_callbacks()
    optimizer = mp.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, total + 1):
        adapted.zero_grad()
        adapted.loss(IDS, IDS).backward()
        if step != skipped:
            optimizer.step()
            callback.after_step(adapted, step)
    pattern = adapted.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)
    (again,) = adapted.training_callbacks()  # one made anew prunes no second time
    again.after_step(adapted, total + 1)
    assert again.pruned and adapted.peft_config["default"].rank_pattern == pattern


def test_preferences_train_adalora_whole():
    options = dict(total_step=6, tinit=1, tfinal=1, init_r=4, target_r=2, target_modules=LINEAR["llama"])
    policy = mp.get_peft_model(base(), mp.AdaLoraConfig(**options))
    example = lambda row: Example(row, row)  # noqa: E731
    pairs = [PreferencePair(example(IDS[0]), example(IDS[1])), PreferencePair(example(IDS[2]), example(IDS[1]))]
    arguments = mp.TrainingArguments(max_steps=6, learning_rate=1e-2, per_device_train_batch_size=2, progress=False)
    history = mp.rlhf.dpo_trainer(policy, pairs, args=arguments).train().history
    assert history[-1]["loss"] < history[0]["loss"]
    pattern = policy.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)


def adalora_run(directory):
    """Eight steps, of which the third to the sixth prune; the best of the evaluations is kept."""
    options = dict(total_step=8, tinit=2, tfinal=2, init_r=4, target_r=2, target_modules=LINEAR["llama"])
    adapted = mp.get_peft_model(base(), mp.AdaLoraConfig(**options))
    examples = [(row, row) for row in np.random.default_rng(8).integers(0, 40, (16, 9))]
    arguments = mp.TrainingArguments(
        output_dir=directory, max_steps=8, per_device_train_batch_size=4, learning_rate=3e-2, eval_steps=1,
        early_stopping_patience=8, save_steps=1, progress=False,
    )  # fmt: skip
    return mp.Trainer(adapted, examples[:12], examples[12:], arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from its beginning to its end."""
    run = adalora_run(tmp_path_factory.mktemp("whole"))
    run.train()
    return run


@pytest.mark.parametrize("at", [1, 3, 5, 7])
def test_adalora_resumed_from_a_checkpoint_ends_with_the_same_bytes(at, whole, tmp_path):
    run, step = adalora_run(tmp_path / "parts"), None
    step, run._step = run._step, lambda k: step(k) if k <= at else (_ for _ in ()).throw(InterruptedError)
    with pytest.raises(InterruptedError):
        run.train()
    resumed = adalora_run(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert whole.model.peft_config["default"] == resumed.model.peft_config["default"]
    for a, b in (
        (values(whole.model), values(resumed.model)),
        (whole._callbacks.state_dict(), resumed._callbacks.state_dict()),
    ):
        assert a and all(np.array_equal(a[key], b[key]) for key in {*a, *b})
    whole.model.save_pretrained(tmp_path / "a")
    resumed.model.save_pretrained(tmp_path / "b")
    files = [(tmp_path / x / "adapter_model.safetensors").read_bytes() for x in "ab"]
    assert files[0] == files[1]


def test_adalora_goes_on_after_a_move_to_another_device(xp):
    move = lambda model, step: model.to(xp) if step in (3, 6) else None  # noqa: E731  # 6 only applies what 5 pruned
    runs = [adalora_by_hand(before=before, lr=0.0)[0].to("numpy") for before in (move, lambda model, step: None)]
    assert runs[0].peft_config["default"].rank_pattern == runs[1].peft_config["default"].rank_pattern is not None
    parts = [run.parts("default")[0][1].saved() for run in runs]
    assert all(np.array_equal(parts[0][key].data, parts[1][key].data) for key in parts[0])


def test_adalora_ends_with_the_triplets_of_the_weights_it_ends_with(tmp_path):
    """Early stopping puts the best weights back, of a moment when fewer triplets were pruned: all are saved."""
    run = adalora_run(tmp_path / "run")
    run.args.learning_rate = 1.0  # far too much: the first step is the best
    run = mp.Trainer(run.model, run.train_examples, run.eval_examples, run.args)
    result = run.train()
    assert result.best_step < 3, "the best evaluation is meant to be one before the first pruning"
    run.model.save_pretrained(tmp_path / "adapter")
    loaded = mp.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    close(logits(loaded), logits(run.model), 1e-6)


# -------------------------------------------------------------------------------------------------------------- errors


HUGE = "(?:(?:a{1000}){,1000}){1000,}"  # a pattern that the package regex writes out, until memory ends


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("Lora", dict(target_modules=["q_porj"]), "no module is called 'q_porj'; nearest: q_proj"),
        ("Lora", dict(target_modules=["q_proj", "c_attn"]), "no module is called 'c_attn'"),
        ("Lora", dict(target_modules="q_proj"), "regular expression for whole paths.*nearest: q_proj"),
        ("Lora", dict(target_modules="q_proj("), "is not a regular expression"),
        ("Lora", dict(target_modules=["mlp"]), "'model.layers.0.mlp' is a LlamaMLP; LoraConfig works on linear"),
        ("Lora", dict(r=17), "rank of 17 is larger than the matrix"),
        ("Lora", dict(r=0), "r must be an integer of at least 1, got 0"),
        ("Lora", dict(lora_dropout=1.0), "lora_dropout"),
        ("Lora", dict(init_lora_weights="loftq"), "init_lora_weights"),
        ("Lora", dict(rank_pattern={"z_proj": 4}), "rank_pattern: 'z_proj' matches none"),
        ("Lora", dict(modules_to_save=["score"]), "modules_to_save: no module is called 'score'"),
        ("Lora", dict(target_modules=["down_proj"], modules_to_save=["self_attn"]), "takes more than one input"),
        ("Lora", dict(target_modules=["q_proj"], modules_to_save=["mlp", "up_proj"]), "mlp.up_proj lies inside of .*mlp, which"),
        ("Lora", dict(target_modules=["q_proj"], modules_to_save=["proj"]), "q_proj is a target and in modules_to_save"),
        ("PromptTuning", dict(num_virtual_tokens=2, prompt_tuning_init_ids=[1]), "are the tokens of prompt_tuning_init='TEXT'"),
        ("Lora", dict(enable_lora=[True, False, True]), "fuses 3 projections"),
        ("Lora", dict(target_modules=["embed_tokens"], init_lora_weights="pissa"), "not for an embedding"),
        ("Lora", dict(target_modules=["q_proj"], layers_to_transform=[7]), "matches no module"),
        ("Lora", dict(target_modules="all-linear", layers_to_transform=[7]), r"='all-linear' matches no .* in the layers \[7\]"),
        ("Lora", dict(target_modules=".*q_proj", layers_to_transform=[0]), "as names"),
        ("BitFit", {}, "BitFit trains biases, and this model has none"),
        ("BitFit", dict(target_modules=["q_proj"]), "the modules it was asked for have none"),
        ("IA3", dict(target_modules=["q_proj"], feedforward_modules=["v_proj"]), "v_proj is not"),
        ("AdaLora", {}, "total_step must be an integer of at least 1, got None"),
        ("AdaLora", dict(total_step=5, tinit=3, tfinal=2), "leave none"),
        ("Vera", dict(save_projection=False), "save_projection"),
        ("Vera", dict(projection_prng_key=None), "projection_prng_key must be an integer of at least 0, got None"),
        ("Lora", dict(exclude_modules=["v_porj"]), "exclude_modules: no .* 'v_porj'; nearest: v_proj"),
        ("Lora", dict(exclude_modules=".*v_porj"), "exclude_modules: no module is called"),
        ("Lora", dict(rank_pattern={"q(": 4}), r"rank_pattern='q\(' is not a regular expression"),
        ("Lora", dict(target_modules=f"{HUGE}x"), r"target_modules: a pattern must be at most 10,000 .*; '\(\?:.*x' is longer"),
        ("Lora", dict(exclude_modules=f"(?x){HUGE}".replace("{", "{ ")), "exclude_modules: a pattern must be at most"),
        ("Lora", dict(rank_pattern={f"(?x){HUGE}".replace("{1", "{1#}\n"): 4}), "rank_pattern: a pattern must be at most"),
        ("Lora", dict(alpha_pattern={"|".join(["x" * 99] * 101): 4}), "alpha_pattern: a pattern must be at most"),
        ("Lora", dict(layers_to_transform=[0], layers_pattern="a{%s}" % ("9" * 5000)), "layers_pattern: a pattern must be"),
        ("IA3", dict(feedforward_modules=HUGE), "feedforward_modules: a pattern must be at most"),
        ("Lora", dict(layers_to_transform=[0], layers_pattern=["(l"]), r"layers_pattern='\(l' is not a regular exp"),
        ("Lora", dict(lora_alpha="16"), "lora_alpha must be a finite number, got '16'"),
        ("Lora", dict(lora_alpha=None), "lora_alpha must be a finite number, got None"),
        ("Lora", dict(lora_alpha=0, init_lora_weights="pissa"), "lora_alpha must be positive, got 0"),
        ("AdaLora", dict(total_step=5, deltaT=0), "deltaT must be an integer of at least 1, got 0"),
        ("BitFit", dict(layers_to_transform=[0]), r"\(--layers\) chooses among target_modules \(--target\): give that, too"),
    ],
)
def test_a_method_that_does_not_fit_is_a_clear_error(method, options, message):
    model = base()
    with pytest.raises(PeftError, match=message):
        mp.get_peft_model(model, getattr(mp, f"{method}Config")(**options))


@pytest.mark.parametrize(("dialect", "stored"), [("llama", True), ("gpt2", False)])
@pytest.mark.parametrize("method", [mp.LoraConfig, mp.IA3Config, mp.VeraConfig])
def test_a_layout_that_contradicts_the_layers_is_refused(dialect, stored, method):
    options = {} if method is mp.IA3Config else {"r": 2}
    mp.get_peft_model(base(dialect), method(fan_in_fan_out=not stored, **options))
    layout = "out, in" if stored else "in, out"
    with pytest.raises(PeftError, match=rf"fan_in_fan_out={stored}, but .* stores its weight \[{layout}\]"):
        mp.get_peft_model(base(dialect), method(fan_in_fan_out=stored, **options))


def test_public_names_are_found_in_the_package():
    assert mp.peft.PeftError is PeftError and mp.peft.LoraConfig is mp.LoraConfig
    assert all(hasattr(mp.peft, name) for name in mp.peft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'LoraConfi'"):
        mp.peft.LoraConfi  # noqa: B018


def test_a_configuration_that_is_changed_later_changes_no_model(tmp_path):
    config = mp.LoraConfig(r=2, target_modules=["q_proj"])
    adapted = train(mp.get_peft_model(base(), config))
    y = logits(adapted)
    config.lora_alpha, config.lora_dropout = 100, 0.5
    np.testing.assert_array_equal(logits(adapted), y)
    adapted.save_pretrained(tmp_path)
    np.testing.assert_array_equal(logits(mp.PeftModel.from_pretrained(base(), tmp_path)), y)


def test_names_of_adapters():
    adapted = mp.get_peft_model(base(), mp.LoraConfig())
    for name, message in [("default", "already"), ("../x", "letters"), ("base_layer", "got 'base_l"), ("", "letters")]:
        with pytest.raises(PeftError, match=message):
            adapted.add_adapter(name, mp.LoraConfig())
    with pytest.raises(PeftError, match="no adapter 'x'; there are default"):
        adapted.set_adapter("x")
    for use in (adapted.set_adapter, adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(PeftError, match="used once, but the names are default, default"):
            use(["default", "default"])
    with pytest.raises(PeftError, match="already"):
        mp.get_peft_model(adapted, mp.LoraConfig())
    net = Sequential(Embedding(4, 3))
    with pytest.raises(PeftError, match="needs target_modules"):
        mp.get_peft_model(net, mp.LoraConfig())


def test_a_parameter_that_never_moved_is_named():
    adapted = train(mp.get_peft_model(base(), METHODS["lora"]("llama")))
    mp.assert_learning(adapted)
    adapted.add_adapter("b", METHODS["lora"]("llama"))
    adapted.set_adapter("b")
    adapter = adapted.layers["model.layers.1.mlp.down_proj"].adapters["b"]
    kept = adapter.lora_A.data.copy()
    train(adapted)
    adapter.lora_A.data = kept
    name = "base_model.model.layers.1.mlp.down_proj.b.lora_A"
    assert adapted.unmoved() == [name] and dict(adapted.named_parameters())[name] is adapter.lora_A
    with pytest.raises(AssertionError, match=f"1 adapter parameters never moved: {re.escape(name)}$"):
        mp.assert_learning(adapted)
    fresh = mp.get_peft_model(base(), mp.LoraConfig(r=2), "a")
    fresh.add_adapter("b", mp.LoraConfig(r=2))
    fresh.set_requires_grad(["a", "b"])
    unmoved = fresh.unmoved()
    assert len(set(unmoved)) == len(unmoved) and {n.split(".")[-2] for n in unmoved} == {"a", "b"}


def test_the_tree_shows_what_was_put_where():
    text = repr(mp.get_peft_model(base(), mp.LoraConfig(r=2, target_modules=["q_proj"])))
    assert "(0-1): 2 x LlamaBlock(" in text
    line = "(q_proj): Linear(weight [16, 16]) + default: LoraLinear(lora_A [2, 16], lora_B [16, 2])"
    assert [x.strip() for x in text.splitlines() if "+" in x] == [line]


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("dialect", "method"), ALL)
def test_a_directory_holds_the_adapter(dialect, method, tmp_path, xp):
    adapted = train(mp.get_peft_model(base(dialect, xp), METHODS[method](dialect)), xp, steps=2)  # what starts at 0 moves the rest
    adapted.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = mp.PeftModel.from_pretrained(base(dialect, xp), tmp_path)
    np.testing.assert_array_equal(logits(loaded), logits(adapted))
    assert loaded.get_nb_trainable_parameters()[0] == 0
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    more = mp.PeftModel.from_pretrained(base(dialect, xp), tmp_path, is_trainable=True)
    train(more, xp, steps=1)
    mp.assert_learning(more)


def test_inference_mode_and_is_trainable_say_whether_an_adapter_is_trained(tmp_path):
    frozen = mp.get_peft_model(base(), mp.LoraConfig(inference_mode=True))
    assert frozen.get_nb_trainable_parameters()[0] == 0
    frozen.set_adapter("default")
    count = frozen.get_nb_trainable_parameters()[0]
    assert count > 0
    frozen.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        adapted = mp.get_peft_model(base(), mp.LoraConfig(inference_mode=True))
        adapted.load_adapter(tmp_path, "b", is_trainable=is_trainable)
        assert adapted.get_nb_trainable_parameters()[0] == count * is_trainable
        assert adapted.active_adapters == ["default"]


def test_named_adapters_go_into_sub_directories(tmp_path):
    adapted = three()
    adapted.save_pretrained(tmp_path)
    with pytest.raises(FileError, match=f"but holds the adapters a, b, c: give {re.escape(str(tmp_path / 'a'))}$"):
        mp.PeftModel.from_pretrained(base(), tmp_path)
    loaded = mp.PeftModel.from_pretrained(base(), tmp_path / "a", "a")
    loaded.load_adapter(tmp_path / "b", "b")
    loaded.load_adapter(tmp_path / "c", "c")
    for name in "abc":
        adapted.set_adapter(name)
        loaded.set_adapter(name)
        np.testing.assert_array_equal(logits(loaded), logits(adapted))


def test_a_file_that_does_not_fit_is_refused_and_nothing_changes(tmp_path):
    adapted = train(mp.get_peft_model(base(), METHODS["lora"]("llama")))
    adapted.save_pretrained(tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    arrays = {k: a.copy() for k, a in read_safetensors(path)[0].items()}
    options = json.loads(config.read_text())
    key = next(k for k in arrays if k.endswith("q_proj.lora_A.weight"))
    assert key == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    other = mp.get_peft_model(base(), METHODS["ia3"]("llama"), "other")
    y = logits(other)

    def refused(error, message, arrays=arrays, options=options):
        write_safetensors(path, arrays)
        config.write_text(json.dumps(options))
        with pytest.raises(error, match=message):
            mp.PeftModel.from_pretrained(base(), tmp_path)
        with pytest.raises(error, match=message):
            other.load_adapter(tmp_path, "new")
        assert list(other.peft_config) == ["other"] and np.array_equal(logits(other), y)

    refused(PeftError, "lacks .*q_proj.lora_A.weight", {k: a for k, a in arrays.items() if k != key})
    refused(PeftError, "has unexpected extra", {**arrays, "extra": np.zeros(1, np.float32)})
    shapes = r"has the shape \(3, 16\); this model needs \(2, 16\)"
    refused(PeftError, shapes, {**arrays, key: np.zeros((3, 16), np.float32)})
    refused(PeftError, "not finite", {**arrays, key: np.full((2, 16), np.nan, np.float32)})
    refused(PeftError, "LoraConfig does not have: use_qalora=True", options={**options, "use_qalora": True})
    refused(PeftError, "the method 'HRA'", options={**options, "peft_type": "HRA"})
    refused(FileError, "no peft_type", options={"r": 8})
    config.write_text(json.dumps(options))
    path.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(FileError, match="pickle"):
        mp.PeftModel.from_pretrained(base(), tmp_path)
    with pytest.raises(FileError, match="no such file"):
        mp.PeftModel.from_pretrained(base(), tmp_path / "nowhere")


@pytest.mark.parametrize(("method", "options"), [
    ("ia3", dict(init_ia3_weights=False)), ("lora", dict(layers_to_transform=[])), ("lora", dict(r=17, lora_alpha=17)),
])  # fmt: skip
def test_a_file_of_peft_is_read_with_options_that_mean_nothing_to_a_trained_adapter(method, options, tmp_path):
    adapted = train(mp.get_peft_model(base(), METHODS[method]("llama")))
    adapted.save_pretrained(tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    was = json.loads(config.read_text())
    config.write_text(json.dumps({**was, **options}))
    if "r" in options:  # as many rows and columns as PEFT's file has then, the last of them zero
        scale = was["lora_alpha"] / was["r"]
        arrays = read_safetensors(path)[0].items()
        write_safetensors(path, {
            k: np.pad(a, [(0, 15), (0, 0)]) if "lora_A" in k else scale * np.pad(a, [(0, 0), (0, 15)]) for k, a in arrays
        })  # fmt: skip
    close(logits(mp.PeftModel.from_pretrained(base(), tmp_path)), logits(adapted))


def test_an_empty_list_of_layers_means_all():
    config = mp.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[])
    assert len(mp.get_peft_model(base(), config).layers) == 2


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_the_weight_keeps_nothing_but_its_factors(start):
    adapted = mp.get_peft_model(base(), mp.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start))
    for _, part in adapted.parts("default"):
        for p in part.parameters():
            assert p.data.base is None or p.data.base.size == p.size


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_file_cannot_start_from_more_directions_than_its_base_has(start, tmp_path):
    options = dict(r=2, target_modules=["q_proj"], init_lora_weights=start)
    mp.get_peft_model(base(), mp.LoraConfig(**options)).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 17}))
    with pytest.raises(PeftError, match="q_proj: a start from W has a rank of 16 at most there, not 17"):
        mp.PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize(("dialect", "method"), ALL)
def test_of_every_method_an_option_that_is_unknown_and_an_array_that_is_missing_are_refused_by_name(
    dialect, method, tmp_path
):
    mp.get_peft_model(base(dialect), METHODS[method](dialect)).save_pretrained(tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    options = json.loads(config.read_text())
    config.write_text(json.dumps({**options, "an_option_of_tomorrow": 3}))
    with pytest.raises(PeftError, match=r"options that .*Config does not have: an_option_of_tomorrow=3"):
        mp.PeftModel.from_pretrained(base(dialect), tmp_path)
    config.write_text(json.dumps({**options, "an_option_of_tomorrow": None}))  # not set: changes nothing
    mp.PeftModel.from_pretrained(base(dialect), tmp_path)
    arrays = read_safetensors(path)[0]
    for key in (min(arrays), max(arrays)):
        if key.endswith("base_layer.weight"):  # the base's own, which the model has
            continue
        write_safetensors(path, {k: np.array(a) for k, a in arrays.items() if k != key})
        with pytest.raises(PeftError, match=f"its file lacks {key}"):
            mp.PeftModel.from_pretrained(base(dialect), tmp_path)


# ------------------------------------------------------------------------------------------------------ other models


def test_adapters_on_a_four_bit_base(xp):
    dense = base(xp=xp, hidden_size=64, intermediate_size=64)
    quantized = mp.quant.quantize_model(dense)
    for config in (mp.LoraConfig(r=2, target_modules="all-linear"), mp.LoraConfig(r=2, use_dora=True), mp.IA3Config()):
        start = logits(quantized)
        adapted = mp.get_peft_model(quantized, config)
        counts = mp.get_peft_model(dense, config).get_nb_trainable_parameters()
        assert adapted.get_nb_trainable_parameters() == counts
        np.testing.assert_array_equal(logits(adapted), start)
        train(adapted, xp)
        mp.assert_learning(adapted)
        merged = adapted.merge_and_unload()
        close(logits(merged), logits(adapted), 1e-4)
        assert not any(hasattr(m, "dequantize") for _, m in merged.named_modules())
        np.testing.assert_array_equal(logits(quantized), start)


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_of_a_four_bit_model_only_what_has_a_gradient_is_ever_trained(dialect):
    quantized = mp.quant.quantize_model(base(dialect, hidden_size=64, intermediate_size=64)).requires_grad_(True)
    flagged = {path for path, p in quantized.named_parameters() if p.requires_grad}
    packed = {path for path, m in quantized.named_modules() if isinstance(m, mp.quant.Linear4bit)}
    assert flagged and packed
    assert {path.rpartition(".")[0] for path in flagged} & packed == (packed if dialect == "gpt2" else set())
    assert all(path.endswith("bias") for path in flagged if path.rpartition(".")[0] in packed)
    before = values(quantized)
    train(quantized)
    moved = {path for path, v in values(quantized).items() if not np.array_equal(v, before[path])}
    assert moved == flagged


@pytest.mark.parametrize(("dialect", "method"), CASES)
def test_on_a_base_in_float16_what_is_trained_is_float32_and_merges_into_float16(dialect, method, xp):
    model = base(dialect, xp, dtype=np.float16)
    adapted = train(mp.get_peft_model(model, METHODS[method](dialect)), xp)
    mp.assert_learning(adapted)
    assert {str(p.dtype) for p in adapted.parameters() if p.requires_grad} == {"float32"}
    merged = adapted.merge_and_unload()
    assert {str(p.dtype) for p in merged.parameters()} == {"float16"}
    close(logits(merged), logits(adapted), 2e-2)  # a weight is known to 1 part in 2,000


def test_a_classifier_keeps_its_head_with_the_adapter(tmp_path):
    model = mp.SequenceClassifier(base(), num_labels=3)
    adapted = mp.get_peft_model(model, mp.LoraConfig(r=2, task_type="SEQ_CLS"))  # its head is random: it is trained
    assert adapted.get_nb_trainable_parameters()[0] > model.score.weight.size
    train(adapted, steps=2, labels=np.array([0, 1, 2]))
    mp.assert_learning(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = mp.PeftModel.from_pretrained(model, tmp_path)
    np.testing.assert_array_equal(loaded(IDS).data, adapted(IDS).data)
    with pytest.raises(PeftError, match="'default' uses modules_to_save"):
        adapted.add_weighted_adapter(["default"], [1.0], "twice")
    named = mp.get_peft_model(model, mp.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj", "score"]))
    assert named.get_nb_trainable_parameters()[0] > model.score.weight.size


def test_options_of_any_container_are_saved(tmp_path):
    ids = np.unique(IDS)[:3]
    for name, config in {
        "tokens": mp.TrainableTokensConfig(token_indices=list(ids)),
        "ranks": mp.LoraConfig(r=2, rank_pattern={"q_proj": np.int64(1)}, target_modules={"v_proj", "q_proj"}, layers_to_transform={0}),
        "ia3": mp.IA3Config(target_modules={"v_proj", "down_proj"}, feedforward_modules={"down_proj"}),
    }.items():
        adapted = train(mp.get_peft_model(base(), config))
        adapted.save_pretrained(tmp_path / name)
        np.testing.assert_array_equal(logits(mp.PeftModel.from_pretrained(base(), tmp_path / name)), logits(adapted))


def test_generation_takes_its_arguments_in_the_models_order():
    adapted, mask = mp.get_peft_model(base(), mp.LoraConfig(r=2)), np.ones_like(IDS)
    np.testing.assert_array_equal(adapted.generate(IDS, mask, 3), base().generate(IDS, mask, 3))


def test_generation_uses_the_adapter():
    adapted = train(mp.get_peft_model(base(), METHODS["lora"]("llama")), steps=10)
    out, merged, without = (
        model.generate(IDS[:, :3], max_new_tokens=6, eos_token_id=())
        for model in (adapted, adapted.merge_and_unload(), base())
    )
    assert np.array_equal(out, merged) and not np.array_equal(out, without)


ENDLESS = r"(\w|\w\w|\w\w\w|\.)*[!#]"


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=ENDLESS), dict(target_modules=["q_proj"], exclude_modules=ENDLESS),
        dict(target_modules=["q_proj"], rank_pattern={ENDLESS: 3}), dict(target_modules=["q_proj"], alpha_pattern={ENDLESS: 3}),
        dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=ENDLESS),
    ],
)  # fmt: skip
def test_a_pattern_that_would_match_without_end_is_refused_soon(options):
    base, began = mp.Transformer(config_of("llama"), seed=0), time.process_time()
    with pytest.raises(PeftError, match="takes too long to match; repeat nothing that repeats itself"):
        mp.get_peft_model(base, mp.LoraConfig(r=2, **options))
    assert time.process_time() - began < 5


def test_a_pattern_that_takes_long_for_each_path_is_refused_for_all_of_them_together():
    began = time.process_time()
    with pytest.raises(PeftError, match="takes too long to match"):
        for i in range(1000):
            matches(r"(\w|\w\w|\.)*[!#]", f"model.layers.{i}.self_attn.q_proj")
    assert time.process_time() - began < 5


def test_patterns_that_peft_takes_match_as_there_and_alternatives_need_no_parentheses():
    base = mp.Transformer(config_of("llama"), seed=0)
    paths = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    for pattern in (
        r".*\.(q_proj|v_proj)", r"(?!.*(k_proj|o_proj)).*self_attn\..*", r"model\.layers\.(?:0|1)\..*\b[qv]_proj", r"(?i).*\.[QV]_PROJ",
    ):  # fmt: skip
        assert list(mp.get_peft_model(base, mp.LoraConfig(r=2, target_modules=pattern)).layers) == paths
    for pattern in ("(layers|h)", "layers|h", "|layers"):
        config = mp.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=1, layers_pattern=pattern)
        assert list(mp.get_peft_model(base, config).layers) == paths[2:], "a group in the pattern is not the number"


@pytest.mark.parametrize(
    "options",
    [dict(peft_type=["LORA"]), dict(lora_alpha=10**400), dict(r=2**63), dict(target_modules="a{99999999999}"), dict(target_modules="(" * 9999)],
)
def test_a_file_with_values_of_another_kind_is_refused_by_name(tmp_path, options):
    base = mp.Transformer(config_of("llama"), seed=0)
    mp.get_peft_model(base, mp.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    with pytest.raises(PeftError, match=next(iter(options)) if "peft_type" not in options else r"the method \['LORA'\] is not one"):
        mp.PeftModel.from_pretrained(base, tmp_path)
