"""The memory ledger against what tracemalloc measures, line by line and at the peak."""

from __future__ import annotations

import math
import tracemalloc

import accounting_cases
import numpy as np
import pytest
from accounting_cases import CONFIGS, EVERY, METHODS, QUANTIZED, built, skip_what_does_not_fit

from minipeft import BottleneckConfig, LoraConfig, SequenceClassifier, Transformer, get_peft_model
from minipeft.accounting import MemoryLedger, Precision, architecture, measure_peak, memory_ledger
from minipeft.accounting.memory import WEIGHT_LINES, kv_cache_bytes
from minipeft.autograd.tensor import no_grad
from minipeft.backend import Rng, is_array
from minipeft.nn.layers import Linear
from minipeft.nn.module import Module
from minipeft.nn.transformer import KVCache
from minipeft.quant import Linear4bit
from minipeft.quant.nf4 import storage_bytes
from minipeft.train.callbacks import Callbacks
from minipeft.train.optim import SGD, Adam, AdamW, AdamW8bit

B, T = 3, 128
dialect, one_thread = accounting_cases.dialect, accounting_cases.one_thread
IDS = np.random.default_rng(0).integers(0, 512, (B, T)).astype(np.int64)


@pytest.fixture(params=METHODS)
def method(request, dialect):
    skip_what_does_not_fit(dialect, request.param)
    return request.param


def predicted(dialect: str, method: str, batch: int = B, seq_len: int | None = T, **options) -> MemoryLedger:
    config = METHODS.get(method, method)
    return memory_ledger(CONFIGS[dialect], config, batch, seq_len, **QUANTIZED.get(method, {}), **options)


def arrays() -> int:
    """Bytes of all NumPy arrays made since tracemalloc was started; Python's own objects weigh much on small models."""
    traces, domain = tracemalloc.take_snapshot().traces, np.lib.tracemalloc_domain
    return sum(trace.size for trace in traces if trace.domain == domain)


def train(model: Module, checkpointing: bool = False, make=AdamW) -> int:
    """Two steps, for the optimizer's states are there from the second on; returns the bytes of those states."""
    model.gradient_checkpointing_enable(checkpointing)
    optimizer, callbacks = make([p for p in model.parameters() if p.requires_grad]), Callbacks(model)
    for step in (1, 2):
        model.loss(IDS, IDS, rng=Rng(step)).backward()
        callbacks.before_step(step)
        optimizer.step()
        callbacks.after_step(step, {})
        optimizer.zero_grad()
    return sum(a.nbytes for s in optimizer.state.values() for a in s.values() if is_array(a))


def test_the_peak_of_training_is_within_10_percent(dialect, method):
    """A method keeps inputs of blocks only in one dialect, all in the other, and the next method the other way round."""
    checkpointing = ([*METHODS].index(method) + (dialect == "gpt2")) % 2 == 1
    model = built(dialect, method)  # what is imported once, such as regex for a pattern, is imported
    of_model = memory_ledger(model, batch=B, seq_len=T, checkpointing=checkpointing)
    measured = measure_peak(lambda: train(built(dialect, method), checkpointing))
    by_name = predicted(dialect, method, checkpointing=checkpointing)
    assert by_name.total == pytest.approx(measured, rel=0.10)
    assert sum(by_name.lines.values()) == by_name.total
    assert dict(of_model.lines) == dict(by_name.lines)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_line_is_within_2_percent_of_the_arrays_that_are_allocated(dialect, method, checkpointing):
    ledger, ids = predicted(dialect, method, 2, 64, checkpointing=checkpointing), IDS[:2, :64]
    built(dialect, method).loss(ids, ids)  # whatever is made once is made
    tracemalloc.start()
    try:
        found, model = {}, built(dialect, method)
        model.gradient_checkpointing_enable(checkpointing)
        total = found["weights"] = arrays()
        loss = model.loss(ids, ids, rng=Rng(0))
        found["kept"] = arrays() - total
        loss.backward()
        del loss
        found["gradients"] = arrays() - total
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        optimizer.step()
        found["optimizer states"] = arrays() - total - found["gradients"]
        total, callbacks = arrays(), Callbacks(model)
        callbacks.after_step(1, {})
        found["running averages"] = arrays() - total
    finally:
        tracemalloc.stop()
    held = dict(ledger.held)
    held["weights"] = sum(held[line] for line in WEIGHT_LINES)
    held["kept"] = held["activations"] + held["logits"]
    assert sum(ledger.activations_by_op.values()) == held["kept"]
    assert method != "head" or ledger.activations_per_layer == (0, 0), "a frozen backbone keeps nothing"
    assert {line: held[line] for line in found} == {
        line: pytest.approx(n, rel=0.02, abs=64) for line, n in found.items()
    }


def test_states_from_shapes_are_those_of_the_built_model(dialect, method):
    assert predicted(dialect, method, seq_len=None) == memory_ledger(built(dialect, method))


@pytest.mark.parametrize("options", [{"mode": "evaluate"}, {"mode": "generate", "seq_len": 24, "max_new_tokens": 3}])
def test_the_peak_of_evaluation_and_of_generation_is_within_10_percent(dialect, method, options):
    template = built(dialect, method)

    def use():
        model = template.copy()
        if options["mode"] == "generate":
            model.generate(IDS[:, :24], max_new_tokens=3)
        else:
            with no_grad():
                model.loss(IDS, IDS)

    assert predicted(dialect, method, **options).total == pytest.approx(measure_peak(use), rel=0.10)


def test_the_cache_of_generation_is_predicted_as_it_grows(dialect):
    """Positions held, and the room that doubling leaves."""
    c = CONFIGS[dialect]
    for prompt, new, room in ((16, 1, 16), (16, 2, 32), (16, 17, 32), (16, 18, 64), (3, 1, 16)):
        ledger = predicted(dialect, "frozen", seq_len=prompt, mode="generate", max_new_tokens=new)
        assert ledger.held["KV cache"] == kv_cache_bytes(c, B, prompt + new - 1)
        model, cache = built(dialect, "frozen"), KVCache()
        with no_grad():
            model(IDS[:, :prompt], past_key_values=cache)
            for _ in range(new - 1):
                model(IDS[:, :1], past_key_values=cache)
        assert cache.nbytes == ledger.held["KV cache"]
        assert sum(k.nbytes + v.nbytes for k, v in cache._buffers) == kv_cache_bytes(c, B, room)
        assert ledger.lines["KV cache"] <= kv_cache_bytes(c, B, room) * 1.5


def test_activations_of_a_llama_block_by_the_formula():
    c = CONFIGS["llama"]
    d, q, kv, ff = c.hidden_size, c.hidden_size, 2 * c.head_dim, c.intermediate_size
    weights = sum(64 * 64 * (i + 1) for i in range(T // 64))  # causal: the keys that each block of queries sees
    token = (d + d + 1) + (q + 2 * kv + q) + (d + d + 1) + (ff + ff + ff)  # norms with x̂'s rstd, attention, swiglu
    expected = 4 * (B * T * token + B * c.num_attention_heads * (weights + T))
    assert memory_ledger(c, batch=B, seq_len=T).activations_per_layer == (expected, expected)


def test_a_checkpointed_block_keeps_its_input(dialect):
    c = CONFIGS[dialect]
    assert memory_ledger(c, None, B, T, checkpointing=True).activations_per_layer == (4 * B * T * c.hidden_size,) * 2


@pytest.mark.parametrize(("name", "make"), [
    ("adamw", AdamW), ("adam", Adam), ("sgd", lambda p: SGD(p, lr=1e-3)),
    ("momentum", lambda p: SGD(p, lr=1e-3, momentum=0.9)), ("adamw_8bit", AdamW8bit),
])  # fmt: skip
def test_every_optimizer_is_predicted(dialect, name, make):
    states = []
    measured = measure_peak(lambda: states.append(train(built(dialect, "full"), make=make)))
    ledger = predicted(dialect, "full", optimizer=name)
    assert ledger.total == pytest.approx(measured, rel=0.10)
    assert [ledger.held["optimizer states"]] == states


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_in_float16_is_predicted(dialect, checkpointing):
    base = built(dialect, "frozen")
    for p in base.parameters():
        p.data = p.data.astype(np.float16)
    measured = measure_peak(lambda: train(get_peft_model(base.copy(), METHODS["lora"]), checkpointing))
    ledger = predicted(dialect, "lora", precision="float16-base", checkpointing=checkpointing)
    assert ledger.total == pytest.approx(measured, rel=0.10)


def test_a_classifier_is_predicted_too(dialect):
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
    whole, half = (memory_ledger(c, "frozen", B, T, precision=p, quantization="nf4") for p in ("float32", "float16-base"))
    rest = 512 * 128 + 5 * 128  # what is not in four bits: the tied table and the norms
    assert whole.held["frozen weights"] - half.held["frozen weights"] == 2 * rest


def test_the_classical_ledgers_of_full_fine_tuning():
    n = architecture("llama-65b").size
    assert memory_ledger("llama-65b").model_states == 16 * n  # float32: 4 + 4 + 8
    assert memory_ledger("llama-65b", precision="mixed").model_states == 16 * n
    assert memory_ledger("llama-65b", precision="mixed-float32-gradients").model_states == 18 * n
    assert memory_ledger("llama-65b", precision="bfloat16").model_states == 12 * n == 783_427_928_064
    assert memory_ledger("llama-65b", optimizer="sgd").model_states == 8 * n
    one_byte = Precision(trained=2, gradients=2, states=1)
    assert memory_ledger("t5v1.1-xxl", precision=one_byte).model_states == 6 * 11_135_332_352


def test_a_model_of_175_billion_parameters_is_walked_without_being_allocated():
    ledger = {}
    peak = measure_peak(lambda: ledger.update(it=memory_ledger("gpt3", batch=1, seq_len=2048, precision="mixed")))
    assert peak < 20e6
    assert ledger["it"].held["trained weights"] == 2 * 174_604_259_328
    assert len(ledger["it"].activations_per_layer) == 96


@pytest.mark.parametrize("name", ["llama-7b", "gpt2", "bert-base"])
@pytest.mark.parametrize("double", [False, True])
def test_bits_a_packed_weight(name, double):
    """QLoRA, section 3: 4 + 0.5 bits with float32 scales of blocks of 64, 4 + 0.127 with double quantization."""
    arch, options = architecture(name), dict(precision="bfloat16", quantization="nf4", double_quantization=double)
    layers = {n: s for n, s in arch.items() if arch.kinds[n] in ("linear", "conv1d") and n != "lm_head.weight"}
    packed = sum(math.prod(s) for s in layers.values())
    frozen = memory_ledger(arch, "frozen", **options).held["frozen weights"]
    bits = 8 * (frozen - 2 * (arch.size - packed)) / packed
    assert bits == pytest.approx(4.127 if double else 4.5, rel=0.02 if name != "llama-7b" else 2e-4)


def test_qlora_fits_65_billion_parameters_into_48_gb():
    """QLoRA, section 1: more than 780 GB are what full fine-tuning takes (see above), less than 48 QLoRA."""
    lora = LoraConfig(r=64, target_modules=EVERY)
    ledger = memory_ledger("llama-65b", lora, 1, 512, precision="bfloat16", quantization="nf4", checkpointing=True)
    assert ledger.held["frozen weights"] == pytest.approx(34.3e9, rel=0.005)
    assert 35e9 < ledger.total < 48e9


@pytest.mark.parametrize("config", ["frozen", LoraConfig(), BottleneckConfig()])
def test_generation_computes_the_logits_of_the_last_position_alone(config):
    every_position = 4 * 4 * 128 * 49152
    assert memory_ledger("smollm2-135m", config, 4, 128, mode="generate").lines["activations"] < every_position / 5


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(8, 64), (5, 33), (400, 48)])
def test_bytes_in_four_bits_by_formula_are_those_of_a_layer(shape, double):
    layer = Linear4bit.from_linear(Linear(shape[1], shape[0], bias=False, seed=0), compress_statistics=double)
    nbytes = sum(p.data.nbytes for p in layer.parameters())
    assert storage_bytes(math.prod(shape), compress_statistics=double) == nbytes


@pytest.mark.parametrize(("arguments", "sentence"), [
    (dict(precision="fp8"), r"precision must be one of float32, .* not 'fp8'"),
    (dict(optimizer="lion"), "optimizer must be one of adamw"),
    (dict(seq_len=0), "seq_len must be a positive integer, not 0"),
    (dict(model="bert-base", seq_len=128), r"activations are known of .*gpt2, llama.* leave seq_len out"),
    (dict(config="lora"), "config must be None"),
    (dict(mode="dream"), "mode must be one of train, evaluate, generate, not 'dream'"),
    (dict(config=LoraConfig(), quantization="nf3"), "quantization must be one of nf4, fp4, int4, not 'nf3'"),
    (dict(quantization="nf4"), "weights in four bits are frozen"),
    (dict(seq_len=8, mode="generate", max_new_tokens=0), "max_new_tokens must be a positive integer, not 0"),
    (dict(seq_len=1025), "this model has 1024 positions"),
    (dict(model=Transformer(CONFIGS["llama"], seed=None), quantization="nf4"), "a built model says itself"),
    (dict(config="frozen", mode="generate"), "mode='generate' needs seq_len, the length of the prompt"),
    (dict(seq_len=8, max_new_tokens=2), "max_new_tokens has no effect with mode='train' and seq_len=8"),
    (dict(labels=IDS), "labels has no effect with mode='train' and seq_len=None"),
    (dict(seq_len=8, labels=IDS, mode="generate"), "labels has no effect with mode='generate'"),
    (dict(seq_len=8, checkpointing=True, mode="evaluate"), "checkpointing has no effect with mode='evaluate'"),
])
def test_nonsense_is_refused_in_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        memory_ledger(**{"model": "gpt2", **arguments})
