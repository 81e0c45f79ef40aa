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
TOKENS, PREFIX, PADDING = 6, 2, 2  # in a row; of trained keys; of the tokens, those that only fill the row
SHADES = {"seen": "#0072B2", "prefix": "#D55E00", "hidden": "#E9ECEF"}


def masks() -> dict[str, np.ndarray]:
    """Of "causal", "prefix", "padded" and "packed" a boolean [queries, keys]: True where the query's token sees the key's.

    There are TOKENS in a row, padding included; packed, half of them are one text and half another. A prefix of PREFIX
    trained keys in front has no query. PADDING tokens on the left only fill the row: a key of theirs is hidden, and a row
    of theirs means nothing.
    """
    causal = np.tril(np.ones((TOKENS, TOKENS), bool))
    real = np.arange(TOKENS) >= PADDING
    packed = collate_packed([(np.zeros(TOKENS // 2, np.int64),) * 2] * 2, capacity=TOKENS)
    return {
        "causal": causal,
        "prefix": np.concatenate([np.ones((TOKENS, PREFIX), bool), causal], axis=1),
        "padded": causal & real & real[:, None],
        "packed": causal & packed.arguments["attention_mask"][0, 0],
    }


def attention_mask() -> Any:
    """A figure of the four `masks`: a row for the token that looks, a column for the token that is looked at."""
    axes, said = sheet(), []
    names = {"causal": "abcdef", "prefix": "PPabcdef", "padded": "..abcd", "packed": "abcABC"}
    cell = 15 / (TOKENS + PREFIX)
    for i, (kind, mask) in enumerate(masks().items()):
        left, top = 3.5 + (i % 2) * WIDTH / 2, 11 + (i // 2) * 19.5
        words(axes, left - 2, top - 4.2, SAYS[kind], ha="left", fontweight="bold")
        seen_by = ("".join(name for name, seen in zip(names[kind], row) if seen) or "nobody" for row in mask)
        said.append(f"{kind}: {', '.join(seen_by)}")
        for k, name in enumerate(names[kind]):
            words(axes, left + (k + 0.5) * cell, top - 1.2, name, color=ORANGE if name == "P" else INK)
        for q, row in enumerate(mask):
            words(axes, left - 1.2, top + (q + 0.5) * cell, names[kind][-TOKENS:][q])
            for k, seen in enumerate(row):
                shade = "hidden" if not seen else "prefix" if names[kind][k] == "P" else "seen"
                corner = (left + k * cell, top + q * cell)
                axes.add_patch(_square(corner, cell, SHADES[shade]))
    words(axes, WIDTH / 2, 46, "Row: the token that looks. Column: the one looked at.", color=GREY)
    words(axes, WIDTH / 2, 48.2, "P: trained keys and values.   Dot: padding.", color=GREY)
    alt = f"whom each token of a row sees, from the first to the last. {'; '.join(said)}. P: trained keys and values."
    return cut(axes, 50, "Who attends to whom", alt)


def _square(corner: tuple[float, float], side: float, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, side, side, fc=color, ec="white", lw=1)
