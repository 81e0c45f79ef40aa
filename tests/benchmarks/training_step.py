"""A training step of minipeft against other libraries: same weights, same data, in turns.

    python tests/benchmarks/training_step.py [small] [middle] [large] [--peers torch,jax] [--dialect gpt2|llama]
        [--repeat 9] [--threads 1,2] [--json FILE]

torch   a hand-written PyTorch model (scaled_dot_product_attention, fused AdamW), eager: nothing of a framework's
        overhead beyond PyTorch itself
jax, tinygrad, autograd, mygrad   see `peers`: GPT-2 alone, in three pairs of turns but for JAX

Each library has a process of its own and takes turns of five steps (see `turns`). A library that is not installed is left
out. The losses of the two must agree over the first steps.
"""

from __future__ import annotations

import importlib.util
import os

import peers
import turns
from turns import stepper, trainers_step

STEPS = 5  # in a turn
LIBRARIES = ("torch", *peers.STEPS)
SIZES = {  # vocabulary, width, layers, heads, batch, tokens
    "small": (512, 64, 2, 4, 8, 64),
    "middle": (512, 128, 4, 4, 16, 128),
    "large": (2048, 256, 6, 8, 8, 256),
}


def tokens_of(size: str):
    import numpy as np

    vocab, _, _, _, batch, tokens = SIZES[size]
    return np.random.default_rng(0).integers(0, vocab, (batch, tokens + 1))


def data(size: str):
    ids = tokens_of(size)
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def config_of(dialect: str, size: str):
    from minipeft import TransformerConfig

    vocab, width, layers, heads, _, tokens = SIZES[size]
    shape = dict(vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
    return getattr(TransformerConfig, dialect)(**shape, max_position_embeddings=tokens + 1)


def ours(dialect: str, size: str) -> tuple:
    """(step, weights before it)."""
    import minipeft as mp

    model = mp.Transformer(config_of(dialect, size), seed=0)
    optimizer = mp.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    return trainers_step(model, optimizer, tokens_of(size)), model.state_dict()


def in_torch(dialect: str, size: str) -> tuple:
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    weights = ours(dialect, size)[1]
    _, width, layers, heads, _, tokens = SIZES[size]
    p = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in weights.items()}
    optimizer = torch.optim.AdamW(p.values(), lr=1e-3, weight_decay=0.01, fused=True)
    D = width // heads
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    cos, sin = torch.cat([angle.cos()] * 2, -1).float(), torch.cat([angle.sin()] * 2, -1).float()

    def attention(q, k, v, B, T):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(B, T, width)

    def gpt2(ids):
        B, T = ids.shape
        x = F.embedding(ids, p["transformer.wte.weight"]) + p["transformer.wpe.weight"][:T]
        for i in range(layers):
            n = f"transformer.h.{i}."

            def conv(x, name, n=n):
                return torch.addmm(p[n + name + ".bias"], x.reshape(-1, x.shape[-1]), p[n + name + ".weight"]).view(B, T, -1)

            h = F.layer_norm(x, (width,), p[n + "ln_1.weight"], p[n + "ln_1.bias"])
            q, k, v = (t.view(B, T, heads, D).transpose(1, 2) for t in conv(h, "attn.c_attn").split(width, dim=2))
            x = x + conv(attention(q, k, v, B, T), "attn.c_proj")
            h = F.layer_norm(x, (width,), p[n + "ln_2.weight"], p[n + "ln_2.bias"])
            x = x + conv(F.gelu(conv(h, "mlp.c_fc"), approximate="tanh"), "mlp.c_proj")
        x = F.layer_norm(x, (width,), p["transformer.ln_f.weight"], p["transformer.ln_f.bias"])
        return x @ p["transformer.wte.weight"].T

    def llama(ids):
        B, T = ids.shape
        x = F.embedding(ids, p["model.embed_tokens.weight"])

        def rope(x):
            half = D // 2
            return x * cos[:T] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:T]

        for i in range(layers):
            n = f"model.layers.{i}."

            def linear(x, name, n=n):
                return F.linear(x, p[n + name + ".weight"])

            h = F.rms_norm(x, (width,), p[n + "input_layernorm.weight"], 1e-6)
            q, k, v = (linear(h, f"self_attn.{c}_proj").view(B, T, heads, D).transpose(1, 2) for c in "qkv")
            x = x + linear(attention(rope(q), rope(k), v, B, T), "self_attn.o_proj")
            h = F.rms_norm(x, (width,), p[n + "post_attention_layernorm.weight"], 1e-6)
            x = x + linear(F.silu(linear(h, "mlp.gate_proj")) * linear(h, "mlp.up_proj"), "mlp.down_proj")
        return F.rms_norm(x, (width,), p["model.norm.weight"], 1e-6) @ p["model.embed_tokens.weight"].T

    forward = gpt2 if dialect == "gpt2" else llama
    ids, targets = map(torch.from_numpy, data(size))
    return stepper(lambda: F.cross_entropy(forward(ids).flatten(0, 1), targets.flatten()), optimizer), weights


def compare(dialect: str, size: str, peer: str, threads: int, repeat: int, path: str) -> None:
    from minipeft.accounting import step_flops

    config, (vocab, width, layers, _, batch, tokens) = config_of(dialect, size), SIZES[size]
    with turns.Pair(threads, "--dialect", dialect, size, libraries=("ours", peer)) as pair:
        times, losses = pair.alternate(repeat, "steps", STEPS)
        for i, (mine, theirs) in enumerate(zip(*losses)):
            if abs(mine - theirs) > 1e-4 * abs(theirs):
                raise SystemExit(f"{size}: losses differ at step {i}: minipeft {mine}, {peer} {theirs}")
        name = {"gpt2": "GPT-2", "llama": "Llama"}[dialect]
        work = f"{name} step, V {vocab}, d {width}, {layers} layers, {batch} x {tokens}"
        flops = step_flops(config, None, batch, tokens, checkpointing=False).total
        row = pair.row(work, peer, times, amount=STEPS)
        turns.report(pair.beside_products(row, turns.weights(config, batch * tokens), 3, flops), path)


def numbers(dialect: str, size: str) -> tuple:
    """What `peers` needs: the weights, the data, and the numbers of heads and of layers."""
    _, _, layers, heads, _, _ = SIZES[size]
    return ours(dialect, size)[1], *data(size), layers, heads


if __name__ == "__main__":
    options = turns.options(__doc__, tuple(SIZES), ("ours", *LIBRARIES), dialect="gpt2", repeat=9, peers=",".join(LIBRARIES))
    if options.serve:
        size = options.what[0]
        if options.serve in peers.STEPS:
            step, products = peers.STEPS[options.serve](*numbers(options.dialect, size))
        elif options.serve == "torch":
            step, products = in_torch(options.dialect, size)[0], turns.torch_products()
        else:
            step, products = ours(options.dialect, size)[0], turns.numpy_products()
        raise SystemExit(turns.serve({"steps": lambda n: [step() for _ in range(n)], "products": products}))
    for peer in options.peers.split(","):
        if peer not in LIBRARIES:
            raise SystemExit(f"unknown peer {peer!r}; there are {', '.join(LIBRARIES)}")
        if not importlib.util.find_spec(peer):
            print(f"{peer} is not installed and is left out")
        elif peer == "torch" or options.dialect == "gpt2":
            for size in options.what:
                for threads in options.threads:
                    repeat = options.repeat if peer in ("torch", "jax") else min(options.repeat, 3)
                    compare(options.dialect, size, peer, threads, repeat, options.json)
