"""The memory ledger against what tracemalloc measures, line by line and at the peak."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

from minipeft.accounting import Precision, architecture, measure_peak, memory_ledger
from minipeft.accounting.memory import kv_cache_bytes
from minipeft.autograd.tensor import no_grad
from minipeft.backend import get_num_threads, set_num_threads
from minipeft.nn.heads import SequenceClassifier, head_only
from minipeft.nn.module import Module
from minipeft.nn.transformer import KVCache, Transformer, TransformerConfig
from minipeft.peft.bottleneck import BottleneckConfig
from minipeft.peft.ia3 import IA3Config
from minipeft.peft.ln_tuning import LNTuningConfig
from minipeft.peft.lora import LoraConfig
from minipeft.peft.model import get_peft_model
from minipeft.peft.prefix_tuning import PrefixTuningConfig
from minipeft.peft.prompt_tuning import PromptTuningConfig
from minipeft.peft.vera import VeraConfig
from minipeft.train.optim import AdamW

B, T = 8, 128
SHAPE = dict(vocab_size=512, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
CONFIGS = {"llama": TransformerConfig.llama(num_key_value_heads=2, **SHAPE), "gpt2": TransformerConfig.gpt2(**SHAPE)}
METHODS = {
    "full": None,
    "head": "head",
    "lora": LoraConfig(r=8),
    "lora, every layer": LoraConfig(r=8, target_modules="all-linear", modules_to_save=["lm_head"]),
    "dora": LoraConfig(r=8, target_modules="all-linear", use_dora=True),
    "vera": VeraConfig(r=16),
    "ia3": IA3Config(),
    "ln": LNTuningConfig(),
    "bottleneck": BottleneckConfig(placement="houlsby"),
    "prompt": PromptTuningConfig(num_virtual_tokens=16),
    "prefix": PrefixTuningConfig(num_virtual_tokens=16),
}
IDS = np.random.default_rng(0).integers(0, 512, (B, T)).astype(np.int64)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """How many threads work at the same moment is the scheduler's affair; with one, measurements repeat themselves."""
    before = get_num_threads()
    set_num_threads(1)
    yield
    set_num_threads(before)


@pytest.fixture(scope="module", params=CONFIGS)
def dialect(request):
    return request.param


def built(dialect: str, config) -> Module:
    model = Transformer(CONFIGS[dialect], seed=0)
    if not isinstance(config, str):
        return model if config is None else get_peft_model(model, config)
    return head_only(model) if config == "head" else model.requires_grad_(False)


def held_by(fn) -> int:
    """Bytes that `fn` leaves allocated."""
    fn()  # whatever is made once is made
    gc.collect()
    tracemalloc.start()
    result = fn()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del result
    return held


def train(dialect: str, config, checkpointing: bool) -> None:
    """Two steps, for the optimizer's states are there from the second on."""
    model = built(dialect, config)
    model.gradient_checkpointing_enable(checkpointing)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        model.loss(IDS, IDS).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_peak_of_training_is_within_10_percent(dialect, method, checkpointing):
    config = METHODS[method]
    measured = measure_peak(lambda: train(dialect, config, checkpointing))
    by_name = memory_ledger(CONFIGS[dialect], config, B, T, checkpointing=checkpointing)
    assert by_name.total == pytest.approx(measured, rel=0.10)
    assert sum(by_name.lines.values()) == by_name.total
    of_model = memory_ledger(built(dialect, config), batch=B, seq_len=T, checkpointing=checkpointing)
    assert dict(of_model.lines) == dict(by_name.lines)


def test_the_peak_of_evaluation_is_within_10_percent(dialect):
    template = built(dialect, "frozen")

    def evaluate():
        model = template.copy()
        with no_grad():
            model.loss(IDS, IDS)

    assert memory_ledger(CONFIGS[dialect], "frozen", B, T, mode="evaluate").total == pytest.approx(
        measure_peak(evaluate), rel=0.10
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_the_forward_pass_keeps_is_foretold_to_2_percent(dialect, checkpointing):
    model = built(dialect, None)
    model.gradient_checkpointing_enable(checkpointing)
    ledger = memory_ledger(model, batch=B, seq_len=T)
    kept = ledger.held["activations"] + ledger.held["logits"]
    assert kept == pytest.approx(held_by(lambda: model.loss(IDS, IDS)), rel=0.02)
    assert sum(ledger.activations_by_op.values()) == kept


def test_a_frozen_backbone_keeps_no_activations(dialect):
    model = built(dialect, "head")
    ledger = memory_ledger(model, batch=B, seq_len=T)
    assert ledger.activations_per_layer == (0,) * 4
    kept = ledger.held["activations"] + ledger.held["logits"]
    assert kept == pytest.approx(held_by(lambda: model.loss(IDS, IDS)), rel=0.02)


def test_activations_of_a_llama_block_by_the_formula():
    c = CONFIGS["llama"]
    d, q, kv, ff = c.hidden_size, c.hidden_size, 2 * c.head_dim, c.intermediate_size
    weights = sum(
        64 * 64 * (i + 1) for i in range(T // 64)
    )  # the causal trapezoid: per head, keys that a query block sees
    token = (d + d + 1) + (q + 2 * kv + q) + (d + d + 1) + (ff + ff + ff)  # two norms, attention, swiglu, and x̂'s rstd
    expected = 4 * (B * T * token + B * c.num_attention_heads * (weights + T))
    assert memory_ledger(c, batch=B, seq_len=T).activations_per_layer == (expected,) * 4


def test_weights_gradients_and_optimizer_states_are_the_bytes_that_are_allocated(dialect):
    template = built(dialect, None)
    held = memory_ledger(CONFIGS[dialect], batch=B, seq_len=T).held
    assert held["trained weights"] == pytest.approx(held_by(lambda: template.copy()), rel=0.02)

    def gradients():
        template.zero_grad()
        template.loss(IDS, IDS).backward()

    assert held["gradients"] == pytest.approx(held_by(gradients), rel=0.02)

    def optimizer():
        optimizer = AdamW(template.parameters(), lr=0.0)
        optimizer.step()
        return optimizer

    assert held["optimizer states"] == pytest.approx(held_by(optimizer), rel=0.02)


def test_a_classifier_is_foretold_too(dialect):
    base, labels = Transformer(CONFIGS[dialect], seed=0), np.arange(B) % 3
    measured = measure_peak(lambda: SequenceClassifier(base, num_labels=3).loss(IDS, labels).backward())
    ledger = memory_ledger(SequenceClassifier(base, num_labels=3), batch=B, seq_len=T, labels=labels)
    assert ledger.total - ledger.held["optimizer states"] == pytest.approx(measured, rel=0.10)


def test_rows_without_a_label_cost_no_logits():
    labels = np.where(np.arange(T) < T // 2, -100, IDS)
    held = memory_ledger(CONFIGS["llama"], batch=B, seq_len=T, labels=labels).held
    assert held["logits"] == 4 * 512 * B * (T // 2)
    assert memory_ledger(CONFIGS["llama"], batch=B, seq_len=T).held["logits"] == 4 * 512 * B * (T - 1)


def test_a_float16_base_costs_half():
    c = CONFIGS["llama"]
    whole, half = (memory_ledger(c, "head", B, T, precision=p) for p in ("float32", "float16-base"))
    assert half.held["frozen weights"] * 2 == whole.held["frozen weights"]
    assert half.held["trained weights"] == whole.held["trained weights"]


def test_the_classical_ledgers_of_full_fine_tuning():
    n = architecture("llama-65b").size
    assert memory_ledger("llama-65b").model_states == 16 * n  # float32: 4 + 4 + 8
    assert memory_ledger("llama-65b", precision="mixed").model_states == 16 * n
    assert memory_ledger("llama-65b", precision="mixed-float32-gradients").model_states == 18 * n
    assert memory_ledger("llama-65b", precision="bfloat16").model_states == 12 * n == 783_427_928_064
    assert memory_ledger("llama-65b", optimizer="sgd").model_states == 8 * n
    assert (
        memory_ledger("t5v1.1-xxl", precision=Precision(trained=2, gradients=2, states=1)).model_states
        == 6 * 11_135_332_352
    )


def test_a_model_of_175_billion_parameters_is_walked_without_being_allocated():
    ledger = {}
    peak = measure_peak(lambda: ledger.update(it=memory_ledger("gpt3", batch=1, seq_len=2048, precision="mixed")))
    assert peak < 20e6
    assert ledger["it"].held["trained weights"] == 2 * 174_604_259_328
    assert len(ledger["it"].activations_per_layer) == 96


def test_the_cache_of_generation(dialect):
    c = CONFIGS[dialect]
    model = Transformer(c, seed=0)
    cache = KVCache()
    with no_grad():
        model(IDS, past_key_values=cache)
    assert cache.nbytes == kv_cache_bytes(c, B, T) == memory_ledger(c, "frozen", B, T, mode="generate").held["KV cache"]


def test_nonsense_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"precision must be one of float32, .* not 'fp8'"):
        memory_ledger("gpt2", precision="fp8")
    with pytest.raises(ValueError, match="optimizer must be one of adamw"):
        memory_ledger("gpt2", optimizer="lion")
    with pytest.raises(ValueError, match="seq_len must be a positive integer, not 0"):
        memory_ledger("gpt2", seq_len=0)
    with pytest.raises(ValueError, match=r"activations are known of .*gpt2, llama.* leave seq_len out"):
        memory_ledger("bert-base", seq_len=128)
    with pytest.raises(ValueError, match="config must be None"):
        memory_ledger("gpt2", "lora")
