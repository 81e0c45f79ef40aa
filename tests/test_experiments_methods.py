"""The table of methods: each trains on either dialect and leaves the base alone."""

from __future__ import annotations

import numpy as np
import pytest
from test_peft import IDS, base

import minipeft as mp
from minipeft.peft.config import PeftError
from minipeft.peft.methods import METHODS

WIDE = dict(vocab_size=2048, hidden_size=24, num_attention_heads=4, max_position_embeddings=96)


def wide(dialect):
    """A model that every method fits: AdaLoRA starts with a rank of 12."""
    grouped = dict(num_key_value_heads=2, intermediate_size=32) if dialect == "llama" else {}
    return mp.Transformer(mp.TransformerConfig(model_type=dialect, num_hidden_layers=2, **WIDE, **grouped), seed=1)


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
@pytest.mark.parametrize("key", METHODS)
def test_a_method_trains_on_a_model_and_leaves_it_alone(key, dialect):
    method, model = METHODS[key], wide(dialect)
    if method.why_not(model):
        assert (key, dialect) == ("bitfit", "llama")
        with pytest.raises(PeftError, match="BitFit trains biases, and this model has none"):
            method.prepare(model, 4)
        return
    before = {path: p.data.copy() for path, p in model.named_parameters()}
    tuned = method.prepare(model, 4)
    examples = [(row, row) for row in IDS]
    arguments = mp.TrainingArguments(learning_rate=1e-2, max_steps=4, progress=False)
    trainer = mp.Trainer(tuned, examples, examples, arguments)
    start = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate() < start
    if isinstance(tuned, mp.PeftModel) and key != "adalora":  # of which a pruned triplet rests
        mp.assert_learning(tuned)
    assert all(np.array_equal(before[path], p.data) for path, p in model.named_parameters())


def test_adalora_has_spent_its_budget_when_half_of_the_run_is_over():
    for steps in (1, 2, 3, 10, 21):
        method, model = METHODS["adalora"], wide("llama")
        tuned = method.prepare(model, steps)
        arguments = mp.TrainingArguments(learning_rate=1e-2, max_steps=steps, progress=False)
        mp.Trainer(tuned, [(row, row) for row in IDS], args=arguments).train()
        left = tuned.peft_config["default"].rank_pattern
        assert sum(map(sum, left.values())) == 8 * len(left) == 8 * 14


def test_the_seed_reaches_the_adapters_start():
    method, model = METHODS["lora"], wide("llama")
    start = {seed: method.prepare(model, 4, seed).state_dict() for seed in (0, 1)}
    usual = mp.get_peft_model(model, method.config()).state_dict()
    drawn = [path for path in usual if path.endswith("lora_A")]
    assert len(drawn) == 14 and all(np.array_equal(usual[path], start[0][path]) for path in usual)
    assert not any(np.array_equal(start[0][path], start[1][path]) for path in drawn)


def test_why_not_says_what_does_not_fit():
    assert METHODS["lora"].why_not(wide("llama")) is None
    assert "a rank of 12 is larger than the matrix" in METHODS["adalora"].why_not(base("llama"))
    assert "needs target_modules" in METHODS["ia3"].why_not(mp.nn.Sequential(mp.nn.Linear(3, 3)))
    assert "needs a Transformer" in METHODS["prompt"].why_not(mp.nn.Sequential(mp.nn.Linear(3, 3)))
