"""Small models with large initial weights, so that attention is far from uniform and every path shows in the logits."""

import tracemalloc
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest

from minipeft.experiments import shipped
from minipeft.nn.transformer import Transformer, TransformerConfig

DIALECTS = ["gpt2", "llama"]
dialects = pytest.mark.parametrize("dialect", DIALECTS)
SHAPE = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32)


def config(dialect, **fields):
    grouped = dict(num_key_value_heads=2) if dialect == "llama" else {}
    return TransformerConfig(model_type=dialect, **(SHAPE | dict(initializer_range=0.4) | grouped | fields))


def double(model):
    """The same model in float64, where only real differences are visible."""
    for p in model.parameters():
        p.data = p.data.astype("float64")
    return model


def build(dialect, xp=np, **fields):
    return double(Transformer(config(dialect, **fields), seed=1)).to(xp)


def tokens(rng, *shape):
    return rng.integers(0, SHAPE["vocab_size"], shape)


def sgd_steps(model, loss, steps=5, lr=0.1):
    """Plain SGD written in place, as optimizers write."""
    for _ in range(steps):
        model.zero_grad()
        loss().backward()
        for p in model.parameters():
            if p.requires_grad:
                p.data -= lr * p.grad


@cache
def unlearned():
    """In the place of the shipped base where nothing depends on what it knows: (a smaller model, the shipped tokenizer)."""
    tokenizer = shipped.base()[1]
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512)
    small |= dict(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2)
    return Transformer(TransformerConfig.llama(**small), seed=1), tokenizer


@contextmanager
def traced():
    """Yields a function that says how many bytes allocated inside are held now, and how many were at most."""
    tracemalloc.start()
    try:
        yield tracemalloc.get_traced_memory
    finally:
        tracemalloc.stop()
