"""What forward and backward, and a generated token, ask of a GPU: launches (products included), waits and memory.

A count needs a CUDA runtime that counts: these run where `import cupy` has brought the module `hostcuda`. A layer's share
does not depend on widths, so small models of one and of two layers say what many layers cost.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial

import numpy as np
import pytest

import minipeft as mp
from minipeft import functional as F
from minipeft.autograd.autocast import DTYPES, autocast, rounded
from minipeft.autograd.tensor import no_grad
from minipeft.backend import Rng
from minipeft.nn.transformer import KVCache
from minipeft.quant import quantize_model

SHAPE = dict(vocab_size=64, hidden_size=24, intermediate_size=48, num_attention_heads=3, num_key_value_heads=1,
             max_position_embeddings=64, tie_word_embeddings=True)  # fmt: skip
LLAMA, GPT2 = mp.TransformerConfig.llama, mp.TransformerConfig.gpt2


@pytest.fixture(scope="module")
def counting(request):
    """counting(fn) -> (launches and products, waits) of fn(), which has run before, so that kernels are compiled."""
    if "cupy" not in (request.config.getoption("device") or []) or importlib.import_module("cupy") is None:
        pytest.skip("needs CuPy: pytest --device cupy")
    if "hostcuda" not in sys.modules:
        pytest.skip("this CUDA runtime does not count its calls")

    def count(fn):
        fn()
        with sys.modules["hostcuda"].counting() as n:
            fn()
        return n.launches + n.gemms, n.waits

    return count


def on_device(config, quantized=False, **lora):
    model = mp.Transformer(config, seed=0, backend="cupy")
    model = quantize_model(model) if quantized else model
    return mp.get_peft_model(model, mp.LoraConfig(target_modules="all-linear", **lora)) if lora else model


def step(model, **given):
    ids = np.random.default_rng(0).integers(0, 64, (2, 12))
    labels = np.where(np.arange(12) < 5, -100, ids)
    model.zero_grad()
    model.loss(ids, labels, rng=Rng(0), **given).backward()


def of_many_layers(counting, layers, run, make):
    """Launches of `run(model)` in a model of this many layers, from models of one and of two; nothing waits."""
    (one, waits), (two, more) = (counting(partial(run, make(n))) for n in (1, 2))
    assert waits == more == 0
    return two + (layers - 2) * (two - one)


def test_a_step_of_the_shipped_base(counting):
    """6 layers, 16 x 128, in which the optimizer and the norm of gradients have room up to 350."""
    hostcuda, (base, _) = sys.modules["hostcuda"], mp.load_base(backend="cupy")
    ids = np.random.default_rng(0).integers(2, 2000, (16, 128))

    def run():
        base.zero_grad()
        base.loss(ids, labels=ids).backward()

    hostcuda.execute(False)  # kernels are counted, and not run
    try:
        assert counting(run) <= (260, 0)
    finally:
        hostcuda.execute(True)


PADDED = np.arange(12) < np.array([[12], [9]])
STEPS = {  # configuration, LoRA's options, arguments, launches of 30 layers at most
    "full": (LLAMA(**SHAPE), {}, {}, 1220),
    "full, padded": (LLAMA(**SHAPE), {}, {"attention_mask": PADDED}, 1220),
    "LoRA": (LLAMA(**SHAPE), {"r": 4}, {}, 2200),
    "QLoRA": (LLAMA(**SHAPE), {"r": 4, "quantized": True}, {}, 2617),
    "LoRA with dropout": (LLAMA(**SHAPE), {"r": 4, "lora_dropout": 0.1}, {}, 2830),
    "GPT-2": (GPT2(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}), {}, {}, 1260),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_thirty_layers(name, counting):
    config, lora, given, most = STEPS[name]
    found = of_many_layers(counting, 30, lambda m: step(m, **given), lambda n: on_device(config.replace(num_hidden_layers=n), **lora))
    assert most - 30 <= found <= most


@pytest.mark.parametrize("padded", [False, True])
def test_a_generated_token_of_thirty_layers(padded, counting):
    caches = {}

    def token(model):
        with no_grad():
            cache = caches.setdefault(id(model), KVCache())
            ids = np.full((2, 1 if len(cache) else 5), 7)
            mask = np.arange(len(cache) + ids.shape[1]) >= np.array([[0], [2]]) if padded else None
            return model.lm_head(model.backbone(ids, mask, past_key_values=cache)[:, -1])

    models = [on_device(LLAMA(**SHAPE, num_hidden_layers=n)) for n in (1, 2)]
    for model in models:
        token(model)
    assert of_many_layers(counting, 30, token, lambda n: models[n - 1]) <= 370


def test_the_norm_adds_what_waits_to_be_added(counting):
    x = importlib.import_module("cupy").ones((8, 16), "float32")
    assert counting(lambda: F.rms_norm(F.add(x, x, later=True), x[0])) == (1, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rounding_is_one_launch_and_a_step_in_mixed_precision_waits_for_nothing(counting, dtype):
    x = importlib.import_module("cupy").ones((8, 9), "float32").T
    assert counting(lambda: rounded(x, dtype)) == (1, 0)
    model = on_device(LLAMA(num_hidden_layers=1, **SHAPE))

    def rounding():
        with autocast(dtype):
            step(model)

    (exact, _), (launches, waits) = counting(lambda: step(model)), counting(rounding)
    assert waits == 0 and launches < 3.2 * exact
