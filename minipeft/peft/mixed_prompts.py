"""Virtual tokens in a mixed batch: each row has its own adapter's, or none.

                     past, K     input, P + T
    prefix of 2      0 0 1 1 │  0 0 0 x x x x      1, x: attention_mask. 0: padding, which no query sees and no
    prompt of 3      0 0 0 0 │  1 1 1 x x x x            position counts; a row's positions are 0, 1, 2, ...
    LoRA, or none    0 0 0 0 │  0 0 0 x x x x            over its 1 and x, as in the row alone

K is the longest prefix of the batch, P its longest prompt. The vectors of all virtual tokens stand in one table, below
zeros for padding: table[ids], of ids [B, K] and [B, P], is what goes into the past and in front of the input.

A KVCache keeps the left side of the mask (`KVCache.visible`) and drops its rows with its keys, so the later calls of a
generation work for the rows that are left. Dropout: `Rng.behind` gives a row the numbers that it draws alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Rng, xp_of
from ..nn.transformer import KVCache, Transformer
from .prompt_learning import Prompt
from .virtual_positions import make_room


class RowPrompts:
    """For each row of a batch its `Prompt`, or None. `arguments` is used as a Prompt's is.

    soft    [B]: how many virtual tokens each row's input has
    """

    def __init__(self, prompts: Sequence[Prompt | None]):
        self.prompts = prompts
        self.soft = np.array([p.length if p is not None and p.in_input else 0 for p in prompts])

    def arguments(self, model: Transformer, **given: Any) -> dict[str, Any]:
        """As `Prompt.arguments`; the first call writes into the cache which positions each row sees."""
        past, limit = given["past_key_values"], model.config.max_position_embeddings
        cache = past if isinstance(past, KVCache) else KVCache()
        if len(cache) and cache.visible is not None:  # a later call, perhaps with fewer rows
            return make_room(cache.visible.shape[1], 0, given, limit, cache.visible)[0]
        sides = [_side(self.prompts, in_input) for in_input in (False, True)]
        K, P = (ids.shape[1] for _, ids in sides)
        if K + P == 0:
            return given
        xp, visible = xp_of(model.backbone.embedding.weight.data), np.concatenate([ids for _, ids in sides], axis=1) > 0
        given, first = make_room(K, P, given, limit, visible)
        given = {**given, "rng": self.behind(given["rng"])}
        if first:
            cache.visible = visible
            for prompts, ids in sides:
                if prompts:
                    vectors = F.embedding(xp.asarray(ids), _table(prompts))  # [B, K or P, n]
                    given = prompts[0].put(model, given, vectors)
        return given

    def behind(self, rng: Rng | None) -> Rng | None:
        """The random stream for rows of P + T positions, of which each draws what it draws alone."""
        return rng and rng.behind((self.soft.max(initial=0) - self.soft).tolist())


def _side(rows: Sequence[Prompt | None], in_input: bool) -> tuple[list[Prompt], np.ndarray]:
    """(the different prompts on one side, the row of their table at each virtual position [B, longest]; 0: padding)."""
    prompts = list(dict.fromkeys(p for p in rows if p is not None and p.in_input == in_input))
    starts = dict(zip(prompts, np.cumsum([1, *(p.length for p in prompts)])))
    ids = np.zeros((len(rows), max((p.length for p in prompts), default=0)), np.int64)
    for i, p in enumerate(rows):
        if p in starts:
            ids[i, -p.length :] = starts[p] + np.arange(p.length)
    return prompts, ids


def _table(prompts: list[Prompt]) -> Tensor:
    """Zeros, then the vectors of every virtual token: [1 + Σ length, n]."""
    vectors = [p.vectors() for p in prompts]
    zeros = xp_of(vectors[0].data).zeros((1, vectors[0].shape[1]), vectors[0].dtype)
    return F.cat([Tensor(zeros), *vectors])
