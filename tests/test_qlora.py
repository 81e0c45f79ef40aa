"""Adapters over quantized layers: trained end to end, merged, quantized again; LoftQ's start."""

from __future__ import annotations

import numpy as np
import pytest
from test_quant_linear import small as base

import minipeft as mp
from minipeft import nn
from minipeft.accounting.memory import measure_peak
from minipeft.autograd.tensor import Tensor
from minipeft.peft.config import PeftError
from minipeft.peft.loftq import get_loftq_model
from minipeft.peft.requantize import merge_and_requantize
from minipeft.quant import Linear4bit, dequantize_model, quantize_model

IDS = np.arange(48).reshape(4, 12) % 17
CONFIGS = {
    "lora": dict(r=4),
    "dora": dict(r=4, use_dora=True),
    "rslora": dict(r=4, use_rslora=True, lora_alpha=4),
    "pissa": dict(r=4, init_lora_weights="pissa"),
    "dora with dropout": dict(r=4, use_dora=True, lora_dropout=0.3),
}


def config(**options):
    return mp.LoraConfig(target_modules="all-linear", **options)


def train(model, steps, lr=1e-2, **arguments):
    optimizer = mp.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model.loss(IDS, IDS, **arguments)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_trained_over_four_bits_as_over_their_dequantized_weights(model_type, method):
    quantized = quantize_model(base(model_type))
    before = {name: p.data.tobytes() for name, p in quantized.named_parameters()}
    arguments = {"rng": 3} if "dropout" in method else {}
    model = mp.get_peft_model(quantized, config(**CONFIGS[method]))
    dense = mp.get_peft_model(dequantize_model(quantized), config(**CONFIGS[method]))
    np.testing.assert_allclose(model(IDS).data, quantized(IDS).data, atol=1e-4)  # the start changes nothing
    losses, expected = train(model, 8, **arguments), train(dense, 8, **arguments)
    np.testing.assert_allclose(losses, expected, rtol=2e-3)
    assert losses[-1] < losses[0] - 0.2
    assert {name: p.data.tobytes() for name, p in quantized.named_parameters()} == before


def test_dora_over_four_bits_makes_no_float_copy_of_the_weight():
    layer = nn.Linear(2048, 2048, bias=False, seed=0)  # a tile of 256 rows is an eighth of it
    model = mp.get_peft_model(quantize_model(nn.Sequential(layer)), mp.LoraConfig(target_modules=["0"], r=2, use_dora=True, lora_dropout=0.1))
    x = Tensor(np.ones((2, 2048), np.float32))

    def step():
        model(x).sum().backward()

    step()
    assert measure_peak(step) < 0.9 * layer.weight.data.nbytes


def test_an_adapter_over_four_bits_is_saved_and_loaded(tmp_path):
    quantized = quantize_model(base())
    model = mp.get_peft_model(quantized, config(r=4))
    train(model, 3)
    model.save_pretrained(tmp_path)
    again = mp.PeftModel.from_pretrained(quantized, tmp_path)
    assert np.array_equal(again(IDS).data, model(IDS).data)


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_a_dense_merge_is_exact_and_a_requantized_one_reports_what_it_loses(method):
    model = mp.get_peft_model(quantize_model(base()), config(**CONFIGS[method]))
    train(model, 8)
    expected = model(IDS).data
    dense = model.merge_and_unload()
    np.testing.assert_allclose(dense(IDS).data, expected, atol=1e-4)
    assert all(type(dense.get_submodule(path)) is nn.Linear for path in model.layers)

    again, errors = merge_and_requantize(model)
    assert set(errors) == set(model.layers)
    assert all(isinstance(again.get_submodule(path), Linear4bit) for path in model.layers)
    assert not any("lora" in name for name, _ in again.named_parameters())
    lost = np.abs(again(IDS).data - expected).max()
    assert 1e-3 < lost < np.abs(expected).max()
    for path, error in errors.items():
        assert error.dense < 1e-5 < error.requantized < 0.2
        W, merged = again.get_submodule(path).dequantize(), dense.get_submodule(path).weight.data
        relative = np.linalg.norm(W - merged) / np.linalg.norm(merged)
        assert abs(error.requantized - relative) < 0.3 * relative  # normal inputs weigh all directions alike
        assert 0 < error.codes < 1


def test_a_requantized_merge_of_an_untrained_adapter_changes_no_code_but_where_scales_round():
    model = mp.get_peft_model(quantize_model(base(), compress_statistics=False), config(r=4))
    again, errors = merge_and_requantize(model)
    assert all(e.codes == 0 and e.requantized < 1e-6 for e in errors.values())
    np.testing.assert_allclose(again(IDS).data, model(IDS).data, atol=1e-5)


def test_a_layer_of_zeros_is_requantized_without_an_error():
    plain = base()
    plain.model.layers[0].mlp.down_proj.weight.data[:] = 0
    model = mp.get_peft_model(quantize_model(plain), mp.LoraConfig(r=4, target_modules=["down_proj"]))
    model.merge_adapter()
    _, errors = merge_and_requantize(model)
    assert errors["model.layers.0.mlp.down_proj"].requantized == 0


def test_a_requantized_merge_owns_its_arrays_and_merges_only_the_adapters_asked_for():
    model = base("gpt2")
    peft = mp.get_peft_model(quantize_model(model), config(r=4), "active")
    peft.add_adapter("other", mp.LoraConfig(r=4, target_modules=["c_attn", "wte"], init_lora_weights=False))
    before = {name: p.data.tobytes() for name, p in peft.named_parameters()}
    again, errors = merge_and_requantize(peft, ["active"])
    assert again.config.tie_word_embeddings and "transformer.wte" not in errors
    again.requires_grad_(True)
    train(again, 2)
    peft.set_adapter("other")
    untouched, errors = merge_and_requantize(peft)
    assert not untouched.config.tie_word_embeddings and all("c_attn" in path for path in errors)
    train(untouched, 2)
    assert {name: p.data.tobytes() for name, p in peft.named_parameters()} == before


# --------------------------------------------------------------------------------------------------------------- LoftQ


def test_loftq_starts_nearer_to_the_model_than_quantization_alone():
    model = base(hidden_size=64)
    options = config(r=8, lora_alpha=32)
    errors = {}
    for iterations in (0, 1, 4):
        made = get_loftq_model(model, options, iterations) if iterations else mp.get_peft_model(quantize_model(model), options)
        merged = made.merge_and_unload()
        errors[iterations] = {p: float(np.linalg.norm(merged.get_submodule(p).weight.data - model.get_submodule(p).weight.data)) for p in made.layers}
    assert all(errors[1][p] < 0.9 * errors[0][p] for p in errors[0])
    assert sum(errors[4].values()) < sum(errors[1].values())
    assert np.abs(made(IDS).data - model(IDS).data).max() < np.abs(quantize_model(model)(IDS).data - model(IDS).data).max()


def test_loftq_leaves_the_model_as_it_was_and_trains():
    model = base()
    before = {name: p.data.tobytes() for name, p in model.named_parameters()}
    made = get_loftq_model(model, config(r=4))
    losses = train(made, 6)
    assert losses[-1] < losses[0]
    assert {name: p.data.tobytes() for name, p in model.named_parameters()} == before


def test_what_is_trained_whole_is_in_floats():
    made = get_loftq_model(base(), config(r=4, modules_to_save=["lm_head"]))
    assert train(made, 2)
    with pytest.raises(PeftError, match="a Linear4bit with quantized weights cannot be trained whole"):
        mp.get_peft_model(quantize_model(base()), config(r=4, modules_to_save=["q_proj"]))


def test_loftq_refuses_what_it_does_not_start():
    for options, message in (
        (dict(options=config(use_dora=True)), "plain LoRA"),
        (dict(options=config(init_lora_weights="pissa")), "plain LoRA"),
        (dict(options=config(), iterations=0), "positive integer, not 0"),
        (dict(options=config(lora_alpha=0)), r"LoftQ starts from \(W - Q\) / s, so lora_alpha must be positive, got 0"),
        (dict(options=config(alpha_pattern={"q_proj": -1})), "lora_alpha must be positive, got -1"),
        (dict(options=config(), skip=("lm_head", "o_proj")), "o_proj: LoftQ is for quantized layers; this one is a Linear"),
    ):
        with pytest.raises(PeftError, match=message):
            get_loftq_model(base(), options.pop("options"), **options)
