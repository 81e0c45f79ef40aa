"""Bottleneck adapters: where they go, what they compute and count, that they start as the base and cannot be merged."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_peft import IDS, base, train

import minipeft as mp
from minipeft import functional as F
from minipeft.backend import to_numpy
from minipeft.files import read_safetensors
from minipeft.nn import Embedding, Linear, Module, ModuleList, Sequential
from minipeft.peft.config import PeftError

PLACES = {
    ("gpt2", "houlsby"): ["attn", "mlp"], ("gpt2", "pfeiffer"): ["mlp"], ("gpt2", "parallel"): ["mlp"],
    ("llama", "houlsby"): ["self_attn", "mlp"], ("llama", "pfeiffer"): ["mlp"], ("llama", "parallel"): ["mlp"],
}  # fmt: skip
both = list(PLACES)


def config(placement, **options):
    return mp.BottleneckConfig(**{"placement": placement, "bottleneck_size": 3, "scaling": 2.0} | options)


@pytest.mark.parametrize("ln_before", [False, True])
@pytest.mark.parametrize(("dialect", "placement"), both)
def test_adapters_stand_at_their_places_and_start_as_the_base(dialect, placement, ln_before, xp):
    model = base(dialect, xp)
    adapted = mp.get_peft_model(model, config(placement, ln_before=ln_before))
    assert [path.rpartition(".")[2] for path in adapted.layers] == 2 * PLACES[dialect, placement]
    np.testing.assert_array_equal(to_numpy(adapted(xp.asarray(IDS)).data), to_numpy(model(xp.asarray(IDS)).data))
    assert not ln_before or all((to_numpy(a.ln_before_weight.data) == 1).all() for _, a in adapted.parts("default"))


@pytest.mark.parametrize("ln_before", [False, True])
@pytest.mark.parametrize("non_linearity", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_the_equation(placement, non_linearity, ln_before, rng):
    """h + s (W_up f(W_down z + b) + b'), z the sublayer's output h, or in parallel its input; perhaps normalized."""
    layer = Linear(6, 4)
    options = {"target_modules": ["0"], "non_linearity": non_linearity, "ln_before": ln_before}
    adapted = mp.get_peft_model(Sequential(layer), config(placement, **options))
    part = adapted.layers["0"].adapters["default"]
    for p in part.parameters():
        p.data = rng.standard_normal(p.shape).astype(np.float32)
    x = rng.standard_normal((5, 6)).astype(np.float32)
    h = x @ layer.weight.data.T + layer.bias.data
    f = {
        "relu": lambda z: np.maximum(z, 0),
        "silu": lambda z: z / (1 + np.exp(-z)),
        "gelu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    }[non_linearity]
    z = x if placement == "parallel" else h
    if ln_before:
        z = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)
        z = z * part.ln_before_weight.data + part.ln_before_bias.data
    a = f(z @ part.down_weight.data.T + part.down_bias.data) @ part.up_weight.data.T + part.up_bias.data
    np.testing.assert_allclose(adapted(mp.Tensor(x)).data, h + 2 * a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ln_before", [False, True])
@pytest.mark.parametrize(("dialect", "placement"), both)
def test_the_count_is_2dm_and_the_biases(dialect, placement, ln_before):
    model, d = base(dialect), 16
    for m, options in ((3, {}), (4, {"bottleneck_size": None, "reduction_factor": 4})):
        n = 2 * len(PLACES[dialect, placement]) * (2 * d * m + m + d + 2 * d * ln_before)
        made = config(placement, ln_before=ln_before, **options)
        counted = mp.accounting.count_parameters(mp.accounting.architecture(model.config), made)
        built = mp.get_peft_model(model, made).get_nb_trainable_parameters()[0]
        assert built == counted.trainable == counted.stored == n


def test_a_sublayer_and_the_layer_that_ends_it_are_both_counted():
    made = mp.BottleneckConfig(bottleneck_size=2, target_modules=["mlp", "down_proj"])
    model = base("llama")
    counted = mp.accounting.count_parameters(mp.accounting.architecture(model.config), made)
    assert counted.trainable == mp.get_peft_model(model, made).get_nb_trainable_parameters()[0]


def test_what_is_not_said_is_adapterhubs_preset():
    presets = {p: mp.BottleneckConfig(placement=p) for p in ("houlsby", "pfeiffer", "parallel")}
    assert {p: (c.reduction_factor, c.non_linearity, c.scaling) for p, c in presets.items()} == {
        "houlsby": (16, "silu", 1.0), "pfeiffer": (16, "relu", 1.0), "parallel": (2, "relu", 4.0)
    }  # fmt: skip
    n = mp.get_peft_model(base(), presets["parallel"]).get_nb_trainable_parameters()[0]
    assert n == 2 * (2 * 16 * 8 + 8 + 16)


def test_published_counts():
    houlsby = mp.BottleneckConfig(bottleneck_size=64, target_modules=["output.dense"])  # after attention and the MLP
    assert mp.accounting.count_parameters("bert-base", houlsby).trainable == 24 * (2 * 768 * 64 + 64 + 768)
    gpt3 = mp.BottleneckConfig(bottleneck_size=1, placement="houlsby")  # Hu et al. 2021, table 4: 7.1M
    assert round(mp.accounting.count_parameters("gpt3", gpt3).trainable / 1e6, 1) == 7.1


def test_a_plain_module_is_adapted_by_name(rng):
    class Residual(Module):
        def __init__(self):
            self.blocks = ModuleList([Sequential(Linear(8, 12), F.relu, Linear(12, 8)) for _ in range(2)])
            self.head = Linear(8, 3)

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    model, x = Residual(), mp.Tensor(rng.standard_normal((4, 8)).astype(np.float32))
    start = model(x).data
    adapted = mp.get_peft_model(model, config("pfeiffer", target_modules=["blocks.0", "blocks.1"]))
    np.testing.assert_array_equal(adapted(x).data, start)
    assert adapted.get_nb_trainable_parameters()[0] == 2 * (2 * 8 * 3 + 3 + 8)
    (adapted(x) ** 2).sum().backward()
    assert all(np.abs(layer.adapters["default"].up_weight.grad).max() > 0 for layer in adapted.layers.values())


def test_what_a_file_holds(tmp_path):
    mp.get_peft_model(base("llama"), config("houlsby", non_linearity="silu")).save_pretrained(tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (options["peft_type"], options["bottleneck_size"], options["non_linearity"]) == ("BOTTLENECK", 3, "silu")
    arrays = read_safetensors(tmp_path / "adapter_model.safetensors")[0]
    assert arrays["base_model.model.model.layers.0.self_attn.down_weight"].shape == (3, 16)
    assert len(arrays) == 2 * 2 * 4


def test_it_composes_with_lora_inside_the_sublayer_and_generation():
    model = base("gpt2")
    adapted = mp.get_peft_model(model, config("houlsby"))
    adapted.add_adapter("lora", mp.LoraConfig(r=2, target_modules=["mlp.c_proj"]))
    adapted.set_adapter(["default", "lora"])
    train(adapted)
    mp.assert_learning(adapted)
    cached = adapted.generate(IDS, max_new_tokens=4)
    np.testing.assert_array_equal(cached, adapted.generate(IDS, max_new_tokens=4, use_cache=False))


def test_merging_is_refused_and_says_why():
    adapted = mp.get_peft_model(base(), config("pfeiffer"))
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(PeftError, match=r"not linear.*cannot be merged.*unload"):
            merge()
    np.testing.assert_array_equal(adapted.unload()(IDS).data, base()(IDS).data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "sequential"}, "placement must be one of houlsby, pfeiffer, parallel, got 'sequential'"),
        ({"non_linearity": "tanhh"}, "non_linearity must be one of None, relu, gelu, silu, got 'tanhh'"),
        ({"bottleneck_size": 0}, "bottleneck_size must be an integer of at least 1, or None, got 0"),
        ({"bottleneck_size": None, "reduction_factor": 0}, "reduction_factor must be a number above 0, or None, got 0"),
        ({"bottleneck_size": None, "reduction_factor": 100}, "reduction_factor=100 leaves nothing of a width of 16"),
        ({"target_modules": ["mpl"]}, "no module is called 'mpl'; nearest: mlp"),
        ({"target_modules": ".*mpl"}, "matches no module that may be adapted"),
        ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens', a Embedding, holds no linear layer"),
    ],
)
def test_what_does_not_fit_is_a_clear_error(options, message):
    with pytest.raises(PeftError, match=message):
        mp.get_peft_model(base(), config(**{"placement": "pfeiffer"} | options))


def test_another_family_needs_names():
    with pytest.raises(PeftError, match=r"needs target_modules for a .* of type None .it knows those of: gpt2, llama"):
        mp.get_peft_model(Sequential(Embedding(3, 4), Linear(4, 4)), config("pfeiffer"))
