"""A training step of minipeft against PyTorch eager: same weights, same data, alternately, in one process.

    python tests/benchmarks/training_step.py [--steps 20] [--threads 2] [--dialect gpt2|llama] [--sizes small middle large]

The peer is a hand-written PyTorch model (scaled_dot_product_attention, fused AdamW): nothing of a framework's overhead
beyond eager PyTorch itself. Each pair of steps is timed one after the other, so a machine whose speed drifts slows both;
the figure is the median of the pairwise ratios. Before timing, losses of the two must agree over the first steps.
Peak memory of a step, over what lies there before it, is measured in a fresh process for each library.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

SIZES = {  # vocabulary, width, layers, heads, batch, tokens
    "small": (512, 64, 2, 4, 8, 64),
    "middle": (512, 128, 4, 4, 16, 128),
    "large": (2048, 256, 6, 8, 8, 256),
}


def make_ours(dialect: str, size: str):
    import minipeft as mp

    vocab, width, layers, heads, _, tokens = SIZES[size]
    config = getattr(mp.TransformerConfig, dialect)(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=tokens
    )
    model = mp.Transformer(config, seed=0)
    optimizer = mp.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)

    def step(ids, targets) -> float:
        loss = mp.functional.cross_entropy(model(ids), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step


def make_torch(dialect: str, size: str, weights: dict):
    import torch
    import torch.nn.functional as F

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

    def step(ids, targets) -> float:
        logits = forward(torch.from_numpy(ids))
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), torch.from_numpy(targets).view(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def data(size: str):
    import numpy as np

    vocab, _, _, _, batch, tokens = SIZES[size]
    ids = np.random.default_rng(0).integers(0, vocab, (batch, tokens + 1))
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def peak(library: str, dialect: str, size: str) -> float:
    """MiB by which the peak resident memory of a fresh process grows in three steps."""
    out = subprocess.run(
        [sys.executable, __file__, "--peak", library, "--dialect", dialect, "--sizes", size],
        capture_output=True, text=True, check=True, env=os.environ,
    )  # fmt: skip
    return float(out.stdout.split()[-1])


def measure_peak(library: str, dialect: str, size: str) -> None:
    ids, targets = data(size)
    model, step = make_ours(dialect, size)
    if library == "torch":
        import torch

        torch.set_num_threads(int(os.environ["MINIPEFT_THREADS"]))
        (torch.ones(64, 64) @ torch.ones(64, 64)).sum()  # the library's own buffers are not the step's
        step = make_torch(dialect, size, {k: v.copy() for k, v in model.state_dict().items()})
    before = peak_of_this_process()
    for _ in range(3):
        step(ids, targets)
    print(peak_of_this_process() - before)


def peak_of_this_process() -> float:
    """MiB. Not getrusage's figure, in which a child begins with the peak of its parent."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dialect", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--peak", choices=["minipeft", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["MINIPEFT_THREADS"] = str(args.threads)
    if args.peak:
        return measure_peak(args.peak, args.dialect, args.sizes[0])

    import torch

    import minipeft as mp

    torch.set_num_threads(args.threads)
    mp.backend.set_num_threads(args.threads)
    print(f"{args.dialect}, {args.threads} threads, torch {torch.__version__}; a step in ms (median), ratio minipeft / torch (median of pairs)")
    for size in args.sizes:
        ids, targets = data(size)
        model, ours = make_ours(args.dialect, size)
        theirs = make_torch(args.dialect, size, {k: v.copy() for k, v in model.state_dict().items()})
        for i in range(5):
            a, b = ours(ids, targets), theirs(ids, targets)
            if abs(a - b) > 1e-4 * abs(b):
                raise SystemExit(f"{size}: losses differ at step {i}: minipeft {a}, torch {b}")
        times = []
        for _ in range(args.steps):
            t0 = time.perf_counter()
            ours(ids, targets)
            t1 = time.perf_counter()
            theirs(ids, targets)
            times.append((t1 - t0, time.perf_counter() - t1))
        ratio = statistics.median(a / b for a, b in times)
        mine, peer = (statistics.median(t) * 1e3 for t in zip(*times))
        memory = [peak(library, args.dialect, size) for library in ("minipeft", "torch")]
        print(
            f"{size:7} {'x'.join(map(str, SIZES[size])):20} minipeft {mine:7.1f}  torch {peer:7.1f}  ratio {ratio:5.2f}"
            f"   peak memory {memory[0]:6.1f} / {memory[1]:6.1f} MiB = {memory[0] / max(memory[1], 0.1):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
