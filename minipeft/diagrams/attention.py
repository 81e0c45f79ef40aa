"""Who attends to whom: masks [queries, keys] of a sequence by itself, behind a prefix, padded, and packed with another."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..train.batches import collate_packed
from .drawing import GREY, INK, ORANGE, WIDTH, cut, sheet, words

SAYS = {
    "causal": "causal: what has been",
    "prefix": "prefix: everybody sees it",
    "padded": "padded: nobody sees it",
    "packed": "packed: each its own text",
}
SHADES = {"seen": "#0072B2", "prefix": "#D55E00", "hidden": "#E9ECEF"}


def masks(tokens: int = 6, prefix: int = 2, padding: int = 2) -> dict[str, np.ndarray]:
    """Of "causal", "prefix", "padded" and "packed" a boolean [queries, keys]: True where the query's token sees the key's.

    tokens   in a row, padding included; packed, the first half is one text and the rest another
    prefix   trained keys in front of the tokens, which have no query
    padding  tokens on the left that only fill the row: a key of theirs is hidden, and a row of theirs means nothing
    """
    causal = np.tril(np.ones((tokens, tokens), bool))
    real = np.arange(tokens) >= padding
    lengths = [tokens // 2, tokens - tokens // 2]
    packed = collate_packed([(np.zeros(n, np.int64), np.zeros(n, np.int64)) for n in lengths], capacity=tokens)
    return {
        "causal": causal,
        "prefix": np.concatenate([np.ones((tokens, prefix), bool), causal], axis=1),
        "padded": causal & real & real[:, None],
        "packed": causal & packed.arguments["attention_mask"][0, 0],
    }


def attention_mask(tokens: int = 6, prefix: int = 2, padding: int = 2) -> Any:
    """A figure of the four `masks`: a row for the token that looks, a column for the token that is looked at."""
    axes = sheet()
    letters = "abcdefghijklmnopqrstuvwxyz"[:tokens]
    half = tokens // 2
    names = {
        "causal": letters, "prefix": "P" * prefix + letters, "padded": "." * padding + letters[: tokens - padding],
        "packed": letters[:half] + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: tokens - half],
    }  # fmt: skip
    cell = min(2.0, 15 / (tokens + prefix))
    for i, (kind, mask) in enumerate(masks(tokens, prefix, padding).items()):
        left, top = 3.5 + (i % 2) * WIDTH / 2, 11 + (i // 2) * 19.5
        words(axes, left - 2, top - 4.2, SAYS[kind], ha="left", fontweight="bold")
        for k, name in enumerate(names[kind]):
            words(axes, left + (k + 0.5) * cell, top - 1.2, name, color=ORANGE if name == "P" else INK)
        for q, row in enumerate(mask):
            words(axes, left - 1.2, top + (q + 0.5) * cell, names[kind][-tokens:][q])
            for k, seen in enumerate(row):
                shade = "hidden" if not seen else "prefix" if names[kind][k] == "P" else "seen"
                corner = (left + k * cell, top + q * cell)
                axes.add_patch(_square(corner, cell, SHADES[shade]))
    words(axes, WIDTH / 2, 46, "Row: the token that looks. Column: the one looked at.", color=GREY)
    words(axes, WIDTH / 2, 48.2, "P: trained keys and values.   Dot: padding.", color=GREY)
    return cut(axes, 50, "Who attends to whom")


def _square(corner: tuple[float, float], side: float, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, side, side, fc=color, ec="white", lw=1)
