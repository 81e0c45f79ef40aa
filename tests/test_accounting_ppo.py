"""The ledger of PPO's four models against what tracemalloc measures of PPOTrainer's own updates."""

from __future__ import annotations

import accounting_cases
import numpy as np
import pytest
from accounting_cases import CONFIGS, METHODS, QUANTIZED, built, skip_what_does_not_fit

from minipeft import LoraConfig, Transformer, ValueModel
from minipeft.accounting import measure_peak, memory_ledger, ppo_ledger
from minipeft.rlhf import PPOConfig, PPOTrainer, RewardModel

PROMPT, RESPONSE, BATCH, MINI = 20, 8, 12, 6
one_thread = accounting_cases.one_thread


@pytest.fixture(autouse=True, scope="module")
def imported(one_thread):
    update("llama", "lora", False, False, False)  # whatever is imported once is imported


def update(dialect, method, reward_model, value_model, checkpointing):
    """One of two minibatches: at the second there are optimizer states. The models are made here, to be counted."""
    model = built(dialect, method)
    model.gradient_checkpointing_enable(checkpointing)
    reward = RewardModel(Transformer(CONFIGS[dialect], seed=1)) if reward_model else lambda roll: np.arange(BATCH) % 3.0
    value = ValueModel(Transformer(CONFIGS[dialect], seed=2)) if value_model else None
    settings = PPOConfig(
        steps=1, batch_size=BATCH, mini_batch_size=MINI, num_epochs=1, response_length=RESPONSE, missing_eos_score=None
    )
    trainer = PPOTrainer(model, reward, [[1] * PROMPT], settings, value_model=value)
    trainer.step()


@pytest.mark.parametrize(
    ("reward_model", "value_model", "checkpointing"), [(False, False, False), (True, False, True), (True, True, False)]
)
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "bitfit"])
@pytest.mark.parametrize("dialect", CONFIGS)
def test_an_update_is_within_10_percent(dialect, method, reward_model, value_model, checkpointing):
    skip_what_does_not_fit(dialect, method)
    ledger = ppo_ledger(
        CONFIGS[dialect], METHODS[method], BATCH, PROMPT, RESPONSE, mini_batch=MINI, reward_model=reward_model,
        value_model=value_model, checkpointing=checkpointing, **QUANTIZED.get(method, {}),
    )  # fmt: skip
    measured = measure_peak(lambda: update(dialect, method, reward_model, value_model, checkpointing))
    assert ledger.total == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize("dialect", CONFIGS)
def test_built_models_say_the_same(dialect):
    config = CONFIGS[dialect]
    by_name = ppo_ledger(config, METHODS["lora"], BATCH, PROMPT, RESPONSE, value_model=True)
    as_built = ppo_ledger(
        built(dialect, "lora"), None, BATCH, PROMPT, RESPONSE, reward_model=RewardModel(Transformer(config, seed=1)),
        value_model=ValueModel(Transformer(config, seed=2)),
    )  # fmt: skip
    assert dict(as_built.held) == dict(by_name.held)
    assert dict(as_built.lines) == dict(by_name.lines)


def test_the_averages_of_a_method_are_held_too():
    config = CONFIGS["llama"]
    ledger, alone = ppo_ledger(config, METHODS["adalora"], 2, 4, 4), memory_ledger(config, METHODS["adalora"])
    assert ledger.lines["running averages"] == alone.held["running averages"] > 0


def test_the_reference_shares_what_is_frozen():
    full, lora = (ppo_ledger("llama-7b", c, 8, 128, 128).held for c in (None, LoraConfig(r=8)))
    assert full["reference"] == full["trained weights"] == 4 * 6_738_415_616
    assert lora["reference"] == lora["adapters"] == 4 * 4_194_304
    assert lora["frozen weights"] == full["trained weights"]
    score_for_head = 4 * (6_738_415_616 - 32000 * 4096 + 4096)
    assert full["reward model"] == lora["reward model"] == score_for_head


@pytest.mark.parametrize(("model", "config", "options", "sentence"), [
    ("gpt2", None, {"mini_batch": 0}, "mini_batch must be a positive integer, not 0"),
    ("gpt2", "frozen", {}, "nothing to train"),
    ("bert-base", LoraConfig(), {}, "activations are known of"),
    (Transformer(CONFIGS["gpt2"], seed=None), LoraConfig(), {}, "a built model says itself what it trains"),
])
def test_nonsense_is_refused_in_one_sentence(model, config, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ppo_ledger(model, config, 8, **options)
