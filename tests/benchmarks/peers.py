"""GPT-2's training step in other libraries, from the same weights and on the same data, each by its own means.

    pip install jax tinygrad autograd mygrad        for those who want them; tinygrad compiles with clang

One model, of which a library supplies the parts: what it has of its own (JAX's GELU and attention, tinygrad's layer norm,
MyGrad's softmax) it uses. JAX and tinygrad compile the whole step, AdamW's update included; HIPS autograd and MyGrad
compute with NumPy, op by op, and are updated in place. Each function takes the weights {name: array}, ids and targets
[B, T], the numbers of layers and heads, and returns (a step that returns its loss, `turns.products`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import turns

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01


def gpt2(p: dict, ids: Any, layers: int, heads: int, parts: Any) -> Any:
    """Logits [B T, V]. Rows of all sequences stand below each other, but in attention: so a product is one product."""
    B, T = ids.shape
    d = p["transformer.wpe.weight"].shape[1]

    def affine(x: Any, name: str) -> Any:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    def norm(x: Any, name: str) -> Any:
        return parts.layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"])

    x = (p["transformer.wte.weight"][ids] + p["transformer.wpe.weight"][:T]).reshape(B * T, d)
    for i in range(layers):
        n = f"transformer.h.{i}"
        qkv = affine(norm(x, f"{n}.ln_1"), f"{n}.attn.c_attn").reshape(B, T, 3, heads, d // heads)
        y = parts.attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])  # [B, T, heads, D], all four
        x = x + affine(y.reshape(B * T, d), f"{n}.attn.c_proj")
        x = x + affine(parts.gelu(affine(norm(x, f"{n}.ln_2"), f"{n}.mlp.c_fc")), f"{n}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ p["transformer.wte.weight"].T


def adamw(w: Any, g: Any, m: Any, v: Any, t: Any) -> tuple:
    """(w, m, v) after step t."""
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
    unbiased = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
    return w - LR * (DECAY * w + unbiased[0] / (unbiased[1] ** 0.5 + EPS)), m, v


class Ops:
    """The parts, from the functions of a library like NumPy. Numbers are float32: MyGrad makes Python's float64 arrays."""

    def __init__(self, np: Any, mask: Any = None):
        from numpy import float32

        self.np, self.mask, self.number = np, mask, float32

    def layer_norm(self, x: Any, weight: Any, bias: Any) -> Any:
        x = x - self.np.mean(x, axis=-1, keepdims=True)
        return x / self.np.sqrt(self.np.mean(x * x, axis=-1, keepdims=True) + self.number(1e-5)) * weight + bias

    def gelu(self, x: Any) -> Any:
        half, one, root, cubic = map(self.number, (0.5, 1, math.sqrt(2 / math.pi), 0.044715))
        return half * x * (one + self.np.tanh(root * (x + cubic * x * x * x)))

    def softmax(self, scores: Any) -> Any:
        e = self.np.exp(scores - constant(scores).max(axis=-1, keepdims=True))
        return e / self.np.sum(e, axis=-1, keepdims=True)

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        q, k, v = (self.np.swapaxes(a, 1, 2) for a in (q, k, v))
        scores = self.np.matmul(q, self.np.swapaxes(k, 2, 3)) / self.number(math.sqrt(q.shape[-1])) + self.mask
        return self.np.swapaxes(self.np.matmul(self.softmax(scores), v), 1, 2)


def constant(x: Any) -> Any:
    """The array of a value of HIPS autograd: the softmax's maximum needs no gradient."""
    from autograd.tracer import getval

    return getval(x)


def hidden(T: int) -> Any:
    """[T, T]: -inf at the keys that a query must not see."""
    import numpy as np

    return np.triu(np.full((T, T), -np.inf, np.float32), 1)


def in_place(p: dict) -> Callable:
    """AdamW on arrays of NumPy: update(gradients) writes the weights."""
    import numpy as np

    state = {name: (np.zeros_like(w), np.zeros_like(w), np.empty_like(w)) for name, w in p.items()}
    step = 0

    def update(gradients: dict) -> None:
        nonlocal step
        step += 1
        for name, (m, v, s) in state.items():
            w, g = p[name], gradients[name]
            m *= BETAS[0]
            m += np.multiply(1 - BETAS[0], g, out=s)
            v *= BETAS[1]
            v += np.multiply(np.multiply(g, g, out=s), 1 - BETAS[1], out=s)
            np.sqrt(np.divide(v, 1 - BETAS[1] ** step, out=s), out=s)
            s += EPS
            np.divide(m, s, out=s)
            s *= LR / (1 - BETAS[0] ** step)
            w *= 1 - LR * DECAY
            w -= s

    return update


def in_autograd(weights: dict, ids: Any, targets: Any, layers: int, heads: int) -> tuple:
    import autograd.numpy as np
    from autograd import value_and_grad

    p, rows, t = {name: w.copy() for name, w in weights.items()}, np.arange(targets.size), targets.reshape(-1)
    parts, update = Ops(np, hidden(ids.shape[1])), in_place(p)

    def loss(p: dict) -> Any:
        z = gpt2(p, ids, layers, heads, parts)
        z = z - constant(z).max(axis=-1, keepdims=True)
        return np.mean(np.log(np.sum(np.exp(z), axis=-1)) - z[rows, t])

    def step() -> float:
        value, gradients = value_and_grad(loss)(p)
        update(gradients)
        return float(value)

    return step, turns.numpy_products()


def in_mygrad(weights: dict, ids: Any, targets: Any, layers: int, heads: int) -> tuple:
    import mygrad as mg
    from mygrad.nnet.activations import softmax
    from mygrad.nnet.losses import softmax_crossentropy

    mg.turn_memory_guarding_off()  # its checks that no array is written into take time
    p, t = {name: mg.tensor(w.copy()) for name, w in weights.items()}, targets.reshape(-1)
    parts, update = Ops(mg, hidden(ids.shape[1])), in_place({name: w.data for name, w in p.items()})
    parts.softmax = softmax

    def step() -> float:
        loss = softmax_crossentropy(gpt2(p, ids, layers, heads, parts), t)
        loss.backward()
        update({name: w.grad for name, w in p.items()})
        return float(loss.item())

    return step, turns.numpy_products()


def in_jax(weights: dict, ids: Any, targets: Any, layers: int, heads: int) -> tuple:
    import jax
    import jax.numpy as np

    class Parts(Ops):
        gelu = staticmethod(partial(jax.nn.gelu, approximate=True))
        attention = staticmethod(partial(jax.nn.dot_product_attention, is_causal=True))

    def loss(p: dict) -> Any:
        z = gpt2(p, ids, layers, heads, Parts(np))
        return np.mean(jax.nn.logsumexp(z, axis=-1) - z[np.arange(targets.size), targets.reshape(-1)])

    @partial(jax.jit, donate_argnums=(0,))
    def one(state: dict, t: Any) -> tuple:
        value, g = jax.value_and_grad(loss)({name: w for name, (w, _, _) in state.items()})
        return {name: adamw(w, g[name], m, v, t) for name, (w, m, v) in state.items()}, value

    state, count = {name: (np.array(w), np.zeros_like(w), np.zeros_like(w)) for name, w in weights.items()}, 0
    ids, targets = np.array(ids), np.array(targets)

    def step() -> float:
        nonlocal state, count
        count += 1
        state, value = one(state, float(count))
        return float(value)

    def make(n: int, m: int) -> Any:
        return jax.random.uniform(jax.random.key(0), (n, m))

    return step, turns.products(make, jax.block_until_ready)


def in_tinygrad(weights: dict, ids: Any, targets: Any, layers: int, heads: int) -> tuple:
    os.environ.setdefault("DEV", "CPU")
    from tinygrad import Context, Tensor, TinyJit
    from tinygrad.nn.optim import AdamW

    class Parts:
        gelu = staticmethod(Tensor.gelu)

        @staticmethod
        def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
            return x.layernorm(eps=1e-5) * weight + bias

        @staticmethod
        def attention(q: Any, k: Any, v: Any) -> Any:
            q, k, v = (a.transpose(1, 2) for a in (q, k, v))
            return q.scaled_dot_product_attention(k, v, is_causal=True).transpose(1, 2)

    p = {name: Tensor(w) for name, w in weights.items()}
    optimizer = AdamW([*p.values()], lr=LR, b1=BETAS[0], b2=BETAS[1], eps=EPS, weight_decay=DECAY)
    ids, t = Tensor(ids.astype("int32")), Tensor(targets.reshape(-1).astype("int32"))

    @TinyJit
    def one() -> Any:
        optimizer.zero_grad()
        loss = gpt2(p, ids, layers, heads, Parts).sparse_categorical_crossentropy(t)
        loss.backward()
        return loss.realize(*optimizer.schedule_step())

    def step() -> float:
        with Context(TRAINING=1):  # its optimizers ask for it
            return one().item()

    return step, turns.products(lambda n, m: Tensor.rand(n, m).realize(), Tensor.realize)


STEPS = {"jax": in_jax, "tinygrad": in_tinygrad, "autograd": in_autograd, "mygrad": in_mygrad}
