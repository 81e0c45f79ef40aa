"""How the memory of a step grows, at its peak: in nothing faster than theory, in two links.

Theory, and the ledger at sizes that nobody could measure here: with x, 2 x and 4 x of something, bytes a + b x + c x² have
the second difference p(4x) - 3 p(2x) + 2 p(x) = 6 c x². Attention keeps an unnormalized weight of 4 bytes for each pair of
tokens that see each other, half of all: c = 4/2 · heads · sequences · layers that are kept at once, none where there is
no backward pass. Nothing else grows with the square of the tokens, nor anything with that of the depth, the batch, the
vocabulary or the rank. The ledger, and what tracemalloc measures: the same growth, at sizes that take a moment.
"""

from __future__ import annotations

import accounting_cases
import numpy as np
import pytest

import minipeft as mp
from minipeft.accounting import measure_peak, memory_ledger
from minipeft.autograd.tensor import no_grad

one_thread = accounting_cases.one_thread
BASE = {"tokens": 64, "width": 64, "depth": 2, "batch": 2, "vocabulary": 256, "rank": 4}
HEADS = 4
MODES = {"train": {}, "checkpointed": {"checkpointing": True}, "evaluate": {"mode": "evaluate"}}
modes = pytest.mark.parametrize("mode", MODES)


def shapes(dialect: str = "llama", method: str = "full", **sizes: int) -> tuple:
    """(a model's configuration, a method's or None, sequences, tokens)."""
    s = BASE | sizes
    config = getattr(mp.TransformerConfig, dialect)(
        vocab_size=s["vocabulary"], hidden_size=s["width"], num_hidden_layers=s["depth"], num_attention_heads=HEADS,
        max_position_embeddings=s["tokens"],
    )  # fmt: skip
    lora = mp.LoraConfig(r=s["rank"], target_modules="all-linear") if method == "lora" else None
    return config, lora, s["batch"], s["tokens"]


def ledger(mode: str, **sizes) -> int:
    return memory_ledger(*shapes(**sizes), **MODES[mode]).total


def measured(mode: str, **sizes) -> int:
    """The peak of making the model and of two steps, so that the optimizer has its moments; or of its loss."""
    config, lora, *shape = shapes(**sizes)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape)

    def run() -> None:
        model = mp.Transformer(config, seed=0)
        model.gradient_checkpointing_enable(mode == "checkpointed")
        model = mp.get_peft_model(model, lora) if lora else model
        if mode == "evaluate":
            with no_grad():
                model.loss(ids, ids)
            return
        optimizer = mp.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            model.loss(ids, ids).backward()
            optimizer.step()
            optimizer.zero_grad()

    return measure_peak(run)


def curvature(mode: str, axis: str, x: int, **others) -> float:
    """c of a + b x + c x², through the ledger's bytes at x, 2 x and 4 x."""
    p = [ledger(mode, **{axis: n * x}, **others) for n in (1, 2, 4)]
    return (p[2] - 3 * p[1] + 2 * p[0]) / (6 * x**2)


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
@modes
def test_only_attentions_weights_grow_with_the_square_of_the_tokens(mode, dialect):
    layers = {"train": BASE["depth"], "checkpointed": 1, "evaluate": 0}[mode]  # the others are made again, or not needed
    assert curvature(mode, "tokens", 8192, dialect=dialect) == 4 / 2 * HEADS * BASE["batch"] * layers


@modes
@pytest.mark.parametrize("axis, x, others", [
    ("depth", 8, {}), ("batch", 64, {}), ("vocabulary", 4096, {}), ("rank", 512, {"method": "lora", "width": 4096}),
])  # fmt: skip
def test_nothing_grows_with_the_square_of_depth_batch_vocabulary_or_rank(axis, x, others, mode):
    assert curvature(mode, axis, x, **others) == 0


@pytest.mark.parametrize("method, copies", [("full", 4), ("lora", 1)])
def test_only_weights_grow_with_the_square_of_the_width(method, copies):
    """In full tuning each with a gradient and two moments."""
    found = curvature("train", "width", 1024, dialect="gpt2", method=method)
    assert found == pytest.approx(4 * copies * 12 * BASE["depth"], rel=1e-3)


@pytest.mark.parametrize("axis, x, mode, method", [
    *[("tokens", 128, mode, "full") for mode in MODES], ("width", 64, "train", "full"), ("depth", 2, "train", "full"),
    ("batch", 2, "train", "full"), ("vocabulary", 512, "train", "full"), ("rank", 16, "train", "lora"),
])  # fmt: skip
def test_what_is_measured_grows_as_the_ledger_says(axis, x, mode, method):
    found, predicted = ([peak(mode, method=method, **{axis: n * x}) for n in (1, 2, 4)] for peak in (measured, ledger))
    assert np.diff(found).tolist() == pytest.approx(np.diff(predicted).tolist(), rel=0.05)
