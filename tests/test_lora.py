"""What LoRA's configuration says by itself: defaults, the start, scales, rates and the constants beside the factors."""

from __future__ import annotations

import minipeft as mp
from minipeft.nn import Linear, Sequential


def test_the_defaults_are_pefts():
    c = mp.LoraConfig()
    assert (c.r, c.lora_alpha, c.lora_dropout, c.use_rslora, c.use_dora, c.init_lora_weights) == (8, 8, 0.0, False, False, True)
    assert c.scaling("any") == 1


def test_pissa_has_a_lower_rate_than_lora():
    assert mp.LoraConfig().usual_learning_rate == 3e-3
    assert mp.LoraConfig(init_lora_weights="pissa").usual_learning_rate == 1e-3


def test_the_gaussian_start_has_the_deviation_one_over_the_rank():
    config = mp.LoraConfig(r=4, target_modules=["0"], init_lora_weights="gaussian")
    adapted = dict(mp.get_peft_model(Sequential(Linear(2000, 9, seed=1)), config).named_parameters())
    A, B = (next(p.data for name, p in adapted.items() if f"lora_{part}" in name) for part in "AB")
    assert abs(A.std() * 4 - 1) < 0.05 and abs(A.mean()) < 0.01 and not B.any()


def test_pissa_keeps_a_start_of_the_shapes_of_its_factors_beside_them_and_out_of_the_file():
    config = mp.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    layers = {"0": ("linear", (5, 6)), "1": ("linear", (7, 5))}
    assert config.constant_shapes(layers) == {"0.start_A": (2, 6), "0.start_B": (5, 2)} and not config.stores_constants
