"""The FLOPs of a step by formula, equal to those of the products that the engine's own graph computes."""

from __future__ import annotations

import dataclasses
import math

import pytest

from minipeft import LNTuningConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from minipeft.accounting import architecture, step_flops
from minipeft.accounting.flops import Flops, counted_flops

CASES = {
    "full": (None, 3), "all-linear": (LoraConfig(target_modules="all-linear"), 2), "head": ("head", 2),
    "some": (LoraConfig(r=3, target_modules=["q_proj", "down_proj", "c_fc"]), 2),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2"])
def test_the_formula_counts_the_products_of_the_engines_own_graph(name, method, checkpointing):
    config, passes = CASES[method]
    batch, length = 2, 64  # one block of queries: the engine computes every score
    if method == "some":
        config = config.replace(target_modules=["c_fc"] if name == "gpt2" else ["q_proj", "down_proj"])
    ours = step_flops(name, config, batch, length, checkpointing, causal=False)
    arch = architecture(name)
    unlabeled = passes * 2 * batch * math.prod(arch[arch.tied["lm_head.weight"]])  # the engine skips the last positions
    assert ours.total - unlabeled == counted_flops(name, config, batch, length, checkpointing)


@pytest.mark.parametrize("config", [
    LoraConfig(r=2, modules_to_save=["lm_head"]), LoraConfig(r=2, target_modules=["lm_head"]),
    LNTuningConfig(target_modules=["norm"]),
])  # fmt: skip
def test_what_a_method_trains_behind_the_blocks_is_counted(config):
    ours = step_flops("smollm2-135m", config, 1, 64, False, causal=False).total
    assert ours == pytest.approx(counted_flops("smollm2-135m", config, 1, 64, False), rel=0.01)  # the last position


def test_virtual_tokens_are_computed_too():
    """A prompt's as positions, which have logits in PEFT's loop and none in this engine; a prefix's as keys."""
    arch, t, v = architecture("smollm2-135m"), 64, 128
    head = math.prod(arch[arch.tied["lm_head.weight"]])
    for config, logits in ((PromptTuningConfig(num_virtual_tokens=v), v), (PrefixTuningConfig(num_virtual_tokens=v), 0)):
        ours = step_flops(arch, config, 1, t, False, causal=False).total - 2 * 2 * (logits + 1) * head
        assert ours == pytest.approx(counted_flops(arch, config, 1, t, False), rel=0.02)
    one, many = (step_flops(arch, PromptTuningConfig(num_virtual_tokens=n), 1, t) for n in (1, 65))
    assert 1.9 < many.total / one.total < 2.2


def test_six_operations_a_parameter_and_token():
    """Kaplan et al. 2020 (arXiv:2001.08361): 6 N; a frozen model costs 4 N, and checkpointing 2 N more."""
    arch = architecture("llama-7b")
    n = arch.size - 32000 * 4096  # the embedding multiplies nothing
    full, lora = (step_flops(arch, config, 1, 1) for config in (None, LoraConfig(target_modules=["q_proj"])))
    assert full.forward + full.backward == pytest.approx(6 * n, rel=0.001)
    assert lora.forward + lora.backward == pytest.approx(4 * n, rel=0.01)
    assert full.recomputed == pytest.approx(2 * n, rel=0.03)


def test_whispers_head_is_a_product_too_and_trained_alone_ends_the_backward_pass():
    arch, t = architecture("whisper-tiny"), 10
    head = 2 * t * 51865 * 384
    bare, whole = (step_flops(a, None, 1, t, False).forward for a in (dataclasses.replace(arch, tied={}), arch))
    assert whole - bare == head
    assert step_flops(arch, "head", 1, t).backward == head


def test_a_token_goes_to_as_many_experts_as_the_configuration_says():
    one, two = (step_flops({"name": "mixtral-8x7b", "num_experts_per_tok": k}).forward for k in (1, 2))
    assert two - one == 2 * 32 * 3 * 4096 * 14336 and step_flops("mixtral-8x7b").forward == two
    head = step_flops(architecture({"name": "mixtral-8x7b", "num_experts_per_tok": 1}, num_labels=1)).forward
    assert one - head == 2 * 32000 * 4096  # a classifier's head is left out
    embedding = 151936 * 3584
    assert step_flops("qwen2-57b-a14b").forward / 2 + embedding == pytest.approx(14.2e9, rel=0.01)  # A14B


def test_causal_attention_is_half_of_the_scores():
    half, whole = (step_flops("llama-7b", None, 1, 4096, False, causal) for causal in (True, False))
    assert whole.forward - half.forward == 32 * 2 * 4096**2 * 4096


def test_seconds_are_those_of_a_card_at_a_share_of_its_peak():
    assert Flops(312 * 10**12, 0).seconds("a100", 0.5) == 2


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="FLOPs need the shapes of blocks"):
        step_flops(10**9)
