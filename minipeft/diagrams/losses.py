"""One prediction of a language model, and its loss: text, token ids, logits, softmax, cross-entropy."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..autograd.tensor import no_grad
from .drawing import GREY, ORANGE, box, cut, line, sheet, words


def candidates(model: Any, ids: list[int], target: int, n: int) -> list[tuple[int, float, float]]:
    """(id, logit, probability) of the likeliest n next tokens; the last of them gives way to a target that is not there."""
    with no_grad():
        z = model(np.array([ids])).numpy()[0, -1].astype(np.float64)
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    best = [int(i) for i in z.argsort()[::-1][:n]]
    if target not in best:
        best[-1] = target
    return [(i, float(z[i]), float(p[i])) for i in best]


def prediction(model: Any, tokenizer: Any, text: str, target: str) -> Any:
    """A figure of how `model` predicts what comes after a short text, and of the loss when `target`, one token, comes."""
    ids, (goal,) = tokenizer.encode(text), tokenizer.encode(target)
    axes = sheet()
    words(axes, 20, 6.4, f"“{text} …”")
    line(axes, [(20, 7.8), (20, 10.4)])
    words(axes, 20.8, 9, "tokenizer", ha="left", color=GREY)
    step = 38.4 / len(ids)
    for k, i in enumerate(ids):
        box(axes, 1 + k * step, 10.4, step - 0.4, 4.6, f"{tokenizer.decode([i]).strip()}\n{i}")
    last = 1 + (len(ids) - 0.5) * step
    line(axes, [(last, 15), (last, 16.5), (20, 16.5), (20, 19)])
    words(axes, 20.8, 17.8, "model, at the last token", ha="left", color=GREY)
    shown = candidates(model, ids, goal, 3)
    for y, name in ((23.9, "logits"), (31.4, "probabilities"), (39, "loss")):
        words(axes, 9.6, y, name, ha="right", color=ORANGE if name == "loss" else GREY)
    for k, (i, z, p) in enumerate(shown):
        left = 10.4 + 7.2 * k
        words(axes, left + 3.3, 20.4, tokenizer.decode([i]).strip(), fontweight="bold" if i == goal else "normal")
        box(axes, left, 22.2, 6.6, 3.4, f"{z:.2f}", "frozen")
        box(axes, left, 29.7, 6.6, 3.4, f"{p:.3f}" if p > 0.001 else f"{p:.0e}", "trained" if i == goal else "frozen")
        if i == goal:
            line(axes, [(left + 3.3, 33.1), (left + 3.3, 37)], color=ORANGE)
            at, side = (left + 4.2, "left") if k == 0 else (left + 2.4, "right")
            words(axes, at, 35, f"$-\\ln p$ of “{target.strip()}”, which came", ha=side, color=ORANGE)
            box(axes, left, 37, 6.6, 4, f"{-np.log(p):.3f}", "trained")
    others = f"… {tokenizer.vocab_size - len(shown):,}\nmore"
    for y in (23.9, 31.4):
        words(axes, 35.4, y, others)
    line(axes, [(20.9, 25.6), (20.9, 29.7)])
    words(axes, 21.7, 27.6, f"softmax, over all {tokenizer.vocab_size:,}", ha="left", color=GREY)
    words(axes, 20, 43.4, "cross-entropy: the mean of this over the tokens", color=GREY)
    rows = "; ".join(f"{tokenizer.decode([i]).strip()} {z:.2f}, {p:.3g}" for i, z, p in shown)
    chance = next(p for i, _, p in shown if i == goal)
    alt = (
        f"“{text}” becomes {len(ids)} token ids. At the last of them the model gives each of {tokenizer.vocab_size:,} tokens "
        f"a logit, and softmax a probability: {rows}. The token that came is {target.strip()}: the loss is -ln {chance:.3g} = {-np.log(chance):.3f}."
    )
    return cut(axes, 45.4, "From a text to a loss", alt)
