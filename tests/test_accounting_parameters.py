"""Parameter counts from shapes against counts from built models."""

from __future__ import annotations

import pytest

from minipeft.accounting import architecture, count_parameters
from minipeft.nn.heads import head_only
from minipeft.nn.transformer import Transformer, TransformerConfig

CONFIGS = [TransformerConfig.gpt2(), TransformerConfig.llama(), TransformerConfig.llama(tie_word_embeddings=False)]


@pytest.mark.parametrize("config", CONFIGS)
def test_full_fine_tuning_trains_everything(config):
    count = count_parameters(config)
    assert count.trainable == count.stored == count.total == sum(p.size for p in Transformer(config, seed=None).parameters())
    assert count.share == 1


@pytest.mark.parametrize("config", CONFIGS)
def test_head_only_is_the_model_that_head_only_builds(config):
    model, count = head_only(Transformer(config, seed=0)), count_parameters(config, "head")
    assert count.trainable == sum(p.size for p in model.parameters() if p.requires_grad) == 2048 * 128
    assert count.total == sum(p.size for p in model.parameters())


def test_a_frozen_model_trains_nothing():
    count = count_parameters("llama3-8b", "frozen")
    assert (count.trainable, count.stored, count.total, count.share) == (0, 0, 8_030_261_248, 0)


def test_a_method_is_counted_by_its_own_rule():
    class Halves:
        """Trains one vector as long as each linear layer's output."""

        def parameter_shapes(self, name, kind, shape):
            return {name.replace("weight", "scale"): shape[:1]} if kind == "linear" else {}

    arch = architecture(TransformerConfig.llama(num_hidden_layers=2, hidden_size=64, num_attention_heads=4))
    count = count_parameters(arch, Halves())
    assert count.trainable == 2 * (4 * 64 + 2 * 192 + 64)
    assert count.total == arch.size + count.trainable


def test_what_is_no_method_or_has_no_head_is_refused():
    with pytest.raises(ValueError, match="config must be None"):
        count_parameters("gpt2", "lora")
    with pytest.raises(ValueError, match="bert-base has no language-model head"):
        count_parameters("bert-base", "head")
