"""The memory ledger against what tracemalloc measures, line by line and at the peak."""

from __future__ import annotations

import gc
import math
import tracemalloc

import numpy as np
import pytest

from minipeft.accounting import MemoryLedger, Precision, architecture, measure_peak, memory_ledger
from minipeft.accounting.memory import WEIGHTS, kv_cache_bytes
from minipeft.autograd.tensor import no_grad
from minipeft.backend import Rng, get_num_threads, is_array, set_num_threads
from minipeft.nn.heads import SequenceClassifier, head_only
from minipeft.nn.module import Module
from minipeft.nn.transformer import KVCache, Transformer, TransformerConfig
from minipeft.peft.adalora import AdaLoraConfig
from minipeft.peft.bitfit import BitFitConfig
from minipeft.peft.bottleneck import BottleneckConfig
from minipeft.peft.ia3 import IA3Config
from minipeft.peft.ln_tuning import LNTuningConfig
from minipeft.peft.lora import LoraConfig
from minipeft.peft.model import get_peft_model
from minipeft.peft.p_tuning import PromptEncoderConfig
from minipeft.peft.prefix_tuning import PrefixTuningConfig
from minipeft.peft.prompt_tuning import PromptTuningConfig
from minipeft.peft.vera import VeraConfig
from minipeft.quant import quantize_model
from minipeft.train.optim import SGD, Adam, AdamW

B, T = 3, 128
SHAPE = dict(vocab_size=512, hidden_size=128, num_hidden_layers=3, num_attention_heads=4)
CONFIGS = {"llama": TransformerConfig.llama(num_key_value_heads=2, **SHAPE), "gpt2": TransformerConfig.gpt2(**SHAPE)}
EVERY = "all-linear"
METHODS = {
    "full": None,
    "head": "head",
    "lora": LoraConfig(r=8),
    "lora, every layer": LoraConfig(r=8, target_modules=EVERY, modules_to_save=["lm_head"]),
    "lora with dropout": LoraConfig(r=8, target_modules=EVERY, lora_dropout=0.1),
    "dora": LoraConfig(r=8, target_modules=EVERY, use_dora=True),
    "pissa": LoraConfig(r=8, target_modules=EVERY, init_lora_weights="pissa"),
    "qlora": LoraConfig(r=8, target_modules=EVERY),
    "qlora, plain scales": LoraConfig(r=8, target_modules=EVERY),
    "qdora": LoraConfig(r=8, target_modules=EVERY, use_dora=True),
    "vera": VeraConfig(r=16),
    "adalora": AdaLoraConfig(total_step=10, target_modules=EVERY),
    "ia3": IA3Config(),
    "ln": LNTuningConfig(),
    "bitfit": BitFitConfig(),
    "houlsby": BottleneckConfig(placement="houlsby"),
    "parallel": BottleneckConfig(placement="parallel", scaling=4),
    "prompt": PromptTuningConfig(num_virtual_tokens=16),
    "prefix": PrefixTuningConfig(num_virtual_tokens=16),
    "prefix by an MLP": PrefixTuningConfig(num_virtual_tokens=16, prefix_projection=True),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=16),
}
QUANTIZED = {  # what of METHODS stands on a base in four bits, and how
    "qlora": dict(quantization="nf4"),
    "qlora, plain scales": dict(quantization="nf4", double_quantization=False),
    "qdora": dict(quantization="nf4"),
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


@pytest.fixture(params=METHODS)
def method(request, dialect):
    if request.param == "bitfit" and dialect == "llama":
        pytest.skip("the Llama dialect has no biases to train")
    return request.param


def built(dialect: str, method: str) -> Module:
    model, config = Transformer(CONFIGS[dialect], seed=0), METHODS.get(method, method)
    if method in QUANTIZED:
        model = quantize_model(model, compress_statistics=QUANTIZED[method].get("double_quantization", True))
    if not isinstance(config, str):
        return model if config is None else get_peft_model(model, config)
    return head_only(model) if config == "head" else model.requires_grad_(False)


def foretold(dialect: str, method: str, batch: int = B, seq_len: int | None = T, **options) -> MemoryLedger:
    config = METHODS.get(method, method)
    return memory_ledger(CONFIGS[dialect], config, batch, seq_len, **QUANTIZED.get(method, {}), **options)


def callbacks_of(model: Module) -> list:
    """What the Trainer calls around the optimizer's step."""
    return model.training_callbacks() if hasattr(model, "training_callbacks") else []


def held_by(fn) -> int:
    """Bytes of the arrays that `fn` leaves allocated; Python's own objects weigh much on models this small."""
    fn()  # whatever is made once is made
    gc.collect()
    tracemalloc.start()
    result = fn()
    held = arrays()
    tracemalloc.stop()
    del result
    return held


def arrays() -> int:
    """Bytes of all NumPy arrays made since tracemalloc was started, and of nothing else."""
    domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([domain]).traces)


def train(dialect: str, method: str, checkpointing: bool) -> None:
    """Two steps, for the optimizer's states are there from the second on."""
    model = built(dialect, method)
    model.gradient_checkpointing_enable(checkpointing)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    callbacks = callbacks_of(model)
    for step in (1, 2):
        model.loss(IDS, IDS, rng=Rng(step)).backward()
        for callback in callbacks:
            callback.before_step(model, step)
        optimizer.step()
        for callback in callbacks:
            callback.after_step(model, step)
        optimizer.zero_grad()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_training_is_within_10_percent(dialect, method, checkpointing):
    measured = measure_peak(lambda: train(dialect, method, checkpointing))
    by_name = foretold(dialect, method, checkpointing=checkpointing)
    assert by_name.total == pytest.approx(measured, rel=0.10)
    assert sum(by_name.lines.values()) == by_name.total
    of_model = memory_ledger(built(dialect, method), batch=B, seq_len=T, checkpointing=checkpointing)
    assert dict(of_model.lines) == dict(by_name.lines)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_line_is_within_2_percent_of_the_arrays_that_are_allocated(dialect, method, checkpointing):
    ledger, ids = foretold(dialect, method, 2, 64, checkpointing=checkpointing), IDS[:2, :64]
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
        total = arrays()
        callbacks = callbacks_of(model)
        for callback in callbacks:
            callback.after_step(model, 1)
        found["running averages"] = arrays() - total
    finally:
        tracemalloc.stop()
    held = dict(ledger.held)
    held["weights"] = sum(held[line] for line in WEIGHTS)
    held["kept"] = held["activations"] + held["logits"]
    assert {line: held[line] for line in found} == {
        line: pytest.approx(n, rel=0.02, abs=64) for line, n in found.items()
    }


def test_states_from_shapes_are_those_of_the_model(dialect, method):
    """Without a length nothing is built, with one everything is: two ways to the same bytes."""
    by_shape, built = foretold(dialect, method, seq_len=None).held, foretold(dialect, method).held
    assert by_shape == {line: built[line] for line in by_shape}


def test_the_peak_of_evaluation_is_within_10_percent(dialect, method):
    template = built(dialect, method)

    def evaluate():
        model = template.copy()
        with no_grad():
            model.loss(IDS, IDS)

    assert foretold(dialect, method, mode="evaluate").total == pytest.approx(measure_peak(evaluate), rel=0.10)


def test_the_peak_of_generation_is_within_10_percent(dialect, method):
    template, prompt = built(dialect, method), IDS[:, :24]

    def generate():
        template.copy().generate(prompt, max_new_tokens=12)

    ledger = foretold(dialect, method, seq_len=24, mode="generate", max_new_tokens=12)
    assert ledger.total == pytest.approx(measure_peak(generate), rel=0.10)


def test_the_cache_of_generation_is_foretold_as_it_grows(dialect):
    """Positions held, and the room that doubling leaves."""
    c = CONFIGS[dialect]
    for prompt, new, room in ((16, 1, 16), (16, 2, 32), (16, 17, 32), (16, 18, 64), (3, 1, 16)):
        ledger = foretold(dialect, "frozen", seq_len=prompt, mode="generate", max_new_tokens=new)
        assert ledger.held["KV cache"] == kv_cache_bytes(c, B, prompt + new - 1)
        model, cache = built(dialect, "frozen"), KVCache()
        with no_grad():
            model(IDS[:, :prompt], past_key_values=cache)
            for _ in range(new - 1):
                model(IDS[:, :1], past_key_values=cache)
        assert cache.nbytes == ledger.held["KV cache"]
        assert sum(k.nbytes + v.nbytes for k, v in cache._buffers) == kv_cache_bytes(c, B, room)
        assert ledger.lines["KV cache"] <= kv_cache_bytes(c, B, room) * 1.5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_the_forward_pass_keeps_is_foretold_to_2_percent(dialect, checkpointing):
    model = built(dialect, "full")
    model.gradient_checkpointing_enable(checkpointing)
    ledger = memory_ledger(model, batch=B, seq_len=T)
    kept = ledger.held["activations"] + ledger.held["logits"]
    assert kept == pytest.approx(held_by(lambda: model.loss(IDS, IDS)), rel=0.02)
    assert sum(ledger.activations_by_op.values()) == kept


def test_a_frozen_backbone_keeps_no_activations(dialect):
    model = built(dialect, "head")
    ledger = memory_ledger(model, batch=B, seq_len=T)
    assert ledger.activations_per_layer == (0,) * 3
    kept = ledger.held["activations"] + ledger.held["logits"]
    assert kept == pytest.approx(held_by(lambda: model.loss(IDS, IDS)), rel=0.02)


def test_activations_of_a_llama_block_by_the_formula():
    c = CONFIGS["llama"]
    d, q, kv, ff = c.hidden_size, c.hidden_size, 2 * c.head_dim, c.intermediate_size
    weights = sum(
        64 * 64 * (i + 1) for i in range(T // 64)
    )  # the causal trapezoid: per head, keys that a query block sees
    token = (d + d + 1) + (q + 2 * kv + q) + (d + d + 1) + (ff + ff + ff)  # norms with x̂'s rstd, attention, swiglu
    expected = 4 * (B * T * token + B * c.num_attention_heads * (weights + T))
    assert memory_ledger(c, batch=B, seq_len=T).activations_per_layer == (expected,) * 3


def test_a_checkpointed_block_keeps_its_input(dialect):
    c = CONFIGS[dialect]
    assert memory_ledger(c, None, B, T, checkpointing=True).activations_per_layer == (4 * B * T * c.hidden_size,) * 3


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", AdamW), ("adam", Adam), ("sgd", lambda p: SGD(p, lr=1e-3)),
        ("momentum", lambda p: SGD(p, lr=1e-3, momentum=0.9)),
    ],
)  # fmt: skip
def test_every_optimizer_is_foretold(dialect, name, make):
    def steps(result):
        model = built(dialect, "full")
        optimizer = make(model.parameters())
        for _ in range(2):
            model.loss(IDS, IDS).backward()
            optimizer.step()
            optimizer.zero_grad()
        result["states"] = sum(a.nbytes for s in optimizer.state.values() for a in s.values() if is_array(a))

    found = {}
    measured = measure_peak(lambda: steps(found))
    ledger = foretold(dialect, "full", optimizer=name)
    assert ledger.total == pytest.approx(measured, rel=0.10)
    assert ledger.held["optimizer states"] == found["states"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_in_float16_is_foretold(dialect, checkpointing):
    base = built(dialect, "frozen")
    for p in base.parameters():
        p.data = p.data.astype(np.float16)

    def steps():
        model = get_peft_model(base.copy(), METHODS["lora"])
        model.gradient_checkpointing_enable(checkpointing)
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            model.loss(IDS, IDS).backward()
            optimizer.step()
            optimizer.zero_grad()

    ledger = foretold(dialect, "lora", precision="float16-base", checkpointing=checkpointing)
    assert ledger.total == pytest.approx(measure_peak(steps), rel=0.10)


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
    """QLoRA, section 1: full fine-tuning takes more than 780 GB, QLoRA less than 48."""
    lora = LoraConfig(r=64, target_modules=EVERY)
    ledger = memory_ledger("llama-65b", lora, 1, 512, precision="bfloat16", quantization="nf4", checkpointing=True)
    assert ledger.held["frozen weights"] == pytest.approx(34.3e9, rel=0.005)
    assert 35e9 < ledger.total < 48e9
    assert memory_ledger("llama-65b", precision="bfloat16").model_states > 780e9


@pytest.mark.parametrize("config", ["frozen", LoraConfig(), BottleneckConfig()])
def test_generation_computes_the_logits_of_the_last_position_alone(config):
    every_position = 4 * 4 * 128 * 49152
    assert memory_ledger("smollm2-135m", config, 4, 128, mode="generate").lines["activations"] < every_position / 5


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
    with pytest.raises(ValueError, match="mode must be one of train, evaluate, generate, not 'dream'"):
        memory_ledger("gpt2", mode="dream")
    with pytest.raises(ValueError, match="quantization must be one of nf4, fp4, int4, not 'nf3'"):
        memory_ledger("gpt2", LoraConfig(), quantization="nf3")
    with pytest.raises(ValueError, match="weights in four bits are frozen"):
        memory_ledger("gpt2", quantization="nf4")
    with pytest.raises(ValueError, match="max_new_tokens must be a positive integer, not 0"):
        memory_ledger("gpt2", "frozen", 1, 8, mode="generate", max_new_tokens=0)
    with pytest.raises(ValueError, match="this model has 1024 positions"):
        memory_ledger("gpt2", seq_len=1025)
    with pytest.raises(ValueError, match="a built model says itself"):
        memory_ledger(Transformer(CONFIGS["llama"], seed=None), quantization="nf4")
