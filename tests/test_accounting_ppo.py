"""The ledger of PPO's four models against what tracemalloc measures of PPOTrainer's own updates."""

from __future__ import annotations

import numpy as np
import pytest

from minipeft.accounting import measure_peak, ppo_ledger
from minipeft.backend import get_num_threads, set_num_threads
from minipeft.nn.heads import ValueModel
from minipeft.nn.transformer import Transformer, TransformerConfig
from minipeft.peft.bitfit import BitFitConfig
from minipeft.peft.lora import LoraConfig
from minipeft.peft.model import get_peft_model
from minipeft.quant import quantize_model
from minipeft.rlhf import PPOConfig, PPOTrainer, RewardModel

PROMPT, RESPONSE, BATCH, MINI = 12, 16, 12, 6
SHAPE = dict(vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {"llama": TransformerConfig.llama(num_key_value_heads=2, **SHAPE), "gpt2": TransformerConfig.gpt2(**SHAPE)}
LORA = LoraConfig(r=8, target_modules="all-linear")
METHODS = {
    "full": (None, {}),
    "lora": (LORA, {}),
    "qlora": (LORA, {"quantization": "nf4"}),
    "bitfit": (BitFitConfig(), {}),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """How many threads work at the same moment is the scheduler's affair; with one, measurements repeat themselves."""
    before = get_num_threads()
    set_num_threads(1)
    update("llama", "lora", False, False, False)  # whatever is imported once is imported
    yield
    set_num_threads(before)


def policy(dialect, config, quantization=None):
    base = Transformer(CONFIGS[dialect], seed=0)
    base = quantize_model(base) if quantization else base
    return base if config is None else get_peft_model(base, config)


def update(dialect, method, reward_model, value_model, checkpointing):
    """One of two minibatches: at the second there are optimizer states. The models are made here, to be counted."""
    config, options = METHODS[method]
    model = policy(dialect, config, **options)
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
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dialect", CONFIGS)
def test_an_update_is_within_10_percent(dialect, method, reward_model, value_model, checkpointing):
    if method == "bitfit" and dialect == "llama":
        pytest.skip("the Llama dialect has no biases to train")
    config, options = METHODS[method]
    ledger = ppo_ledger(
        CONFIGS[dialect], config, BATCH, PROMPT, RESPONSE, mini_batch=MINI, reward_model=reward_model,
        value_model=value_model, checkpointing=checkpointing, **options,
    )  # fmt: skip
    measured = measure_peak(lambda: update(dialect, method, reward_model, value_model, checkpointing))
    assert ledger.total == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize("dialect", CONFIGS)
def test_built_models_say_the_same(dialect):
    config = CONFIGS[dialect]
    by_name = ppo_ledger(config, LORA, BATCH, PROMPT, RESPONSE, value_model=True)
    built = ppo_ledger(
        policy(dialect, LORA), None, BATCH, PROMPT, RESPONSE, reward_model=RewardModel(Transformer(config, seed=1)),
        value_model=ValueModel(Transformer(config, seed=2)),
    )  # fmt: skip
    assert dict(built.held) == dict(by_name.held)
    assert dict(built.lines) == dict(by_name.lines)


def test_the_reference_shares_what_is_frozen():
    full, lora = (ppo_ledger("llama-7b", c, 8, 128, 128).held for c in (None, LoraConfig(r=8)))
    assert full["reference"] == full["trained weights"] == 4 * 6_738_415_616
    assert lora["reference"] == lora["adapters"] == 4 * 4_194_304
    assert lora["frozen weights"] == full["trained weights"]
    assert (
        full["reward model"] == lora["reward model"] == 4 * (6_738_415_616 - 32000 * 4096 + 4096)
    )  # a score for a head


def test_nonsense_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="mini_batch must be a positive integer, not 0"):
        ppo_ledger("gpt2", None, 8, mini_batch=0)
    with pytest.raises(ValueError, match="nothing to train"):
        ppo_ledger("gpt2", "frozen", 8)
    with pytest.raises(ValueError, match="activations are known of"):
        ppo_ledger("bert-base", LoraConfig())
