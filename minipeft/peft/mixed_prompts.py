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
    """For each row of a batch its `Prompt`, or None; used as a Prompt is."""

    def __init__(self, prompts: Sequence[Prompt | None]):
        self.prompts = prompts
        self.soft = np.array([p.length if p is not None and p.in_input else 0 for p in prompts])  # of each row's input

    def arguments(self, model: Transformer, **given: Any) -> dict[str, Any]:
        """As `Prompt.arguments`; the first call writes into the cache which positions each row sees."""
        past, limit = given["past_key_values"], model.config.max_position_embeddings
        cache = past if isinstance(past, KVCache) else KVCache()
        if len(cache) and cache.visible is not None:  # a later call, perhaps with fewer rows
            return make_room(cache.visible.shape[1], 0, given, limit, cache.visible)[0]
        parts = [self._ids(in_input) for in_input in (False, True)]  # [B, K], [B, P]
        K, P = (ids.shape[1] for ids in parts)
        if K + P == 0:
            return given
        xp, visible = xp_of(model.backbone.embedding.weight.data), np.concatenate(parts, axis=1) > 0
        given, first = make_room(K, P, given, limit, visible)
        given = {**given, "rng": self.behind(given["rng"])}
        if first:
            cache.visible = visible
            for in_input, ids in zip((False, True), parts):
                if ids.shape[1]:
                    kind = next(p for p in self.prompts if p is not None and p.in_input == in_input)
                    vectors = F.embedding(xp.asarray(ids), self._table(in_input))  # [B, K or P, n]
                    given = kind.put(model, given, vectors)
        return given

    def behind(self, rng: Rng | None) -> Rng | None:
        """The random stream for rows of P + T positions, of which each draws what it draws alone."""
        return rng and rng.behind((self.soft.max(initial=0) - self.soft).tolist())

    def _of(self, in_input: bool) -> list[Prompt]:
        """The different ones that are part of the input, or of the past."""
        return list(dict.fromkeys(p for p in self.prompts if p is not None and p.in_input == in_input))

    def _ids(self, in_input: bool) -> np.ndarray:
        """The rows of the table at each virtual position, [B, longest], 0 where there is padding."""
        prompts = self._of(in_input)
        starts = dict(zip(prompts, np.cumsum([1, *(p.length for p in prompts)])))
        ids = np.zeros((len(self.prompts), max((p.length for p in prompts), default=0)), np.int64)
        for row, p in enumerate(self.prompts):
            if p in starts:
                ids[row, -p.length :] = starts[p] + np.arange(p.length)
        return ids

    def _table(self, in_input: bool) -> Tensor:
        """Zeros, then the vectors of every virtual token: [1 + Σ length, n]."""
        vectors = [p.vectors() for p in self._of(in_input)]
        zeros = xp_of(vectors[0].data).zeros((1, vectors[0].shape[1]), vectors[0].dtype)
        return F.cat([Tensor(zeros), *vectors])
