"""Where virtual positions stand: what they change about a caller's masks, positions and cache.

    positions    0 ... P-1      P ... P+T-1
                 virtual   │    the input             P + T may be at most the model's context
                 1 1 ... 1 │    attention_mask        left padding stands after the virtual positions, and uses none
                 0 0 ... 1 │    attention_mask        of a row with fewer of them than others (mixed_prompts.py)

Departure from PEFT: positions count the unmasked tokens, in `forward` and `generate` alike, so that padding a row on
the left changes no logits. PEFT's forward counts padding too, and ignores position_ids (except in prefix tuning).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import Array, asarray, xp_of
from ..nn.transformer import past_length
from .targets import PeftError


def make_room(
    K: int, P: int, given: dict[str, Any], limit: int, visible: Array | None = None
) -> tuple[dict[str, Any], bool]:
    """The arguments of `Transformer.forward` with virtual positions in front.

    Args:
        K, P: how many are part of the past (prefix tuning), and of the input (prompt tuning).
        given: the caller's arguments, which know of no virtual positions; but past_key_values that hold positions
            already hold the virtual ones first.
        limit: positions that the model has.
        visible: boolean [B, K + P]: which of them each row has, where adapters are mixed in a batch; None: all.

    Returns (arguments, whether this is the first call, in which the virtual positions must be put there).
    Raises PeftError for a mask of another shape and an input that is too long.
    """
    inputs = given["input_ids"] if given["inputs_embeds"] is None else given["inputs_embeds"]
    mask, positions = given["attention_mask"], given["position_ids"]
    B, T = inputs.shape[:2]
    past, V = past_length(given["past_key_values"]), K + P
    first, seen = past == 0, max(0, past - V)  # seen: of the caller's own positions
    if 0 < past < V:
        raise PeftError(f"past_key_values hold {past} positions; the {V} virtual tokens cannot be among them")
    S = seen + T
    if mask is not None and mask.shape not in ((B, S), (B, 1, T, S)):
        shapes = f"the shape {(B, S)} or {(B, 1, T, S)}, not {mask.shape}"
        raise PeftError(f"attention_mask must have {shapes}: the {V} virtual tokens are added to it here")
    xp = xp_of(mask, positions)  # what is computed here is so where the caller's arrays are: in host memory, by default
    if positions is None and xp is np:  # arrays of a device are not read
        _check_limit(V if visible is None else visible.sum(axis=1), mask, S, limit)
    if visible is None and mask is None and positions is None:
        return given, first  # the model counts right by itself
    if visible is not None and mask is None:
        mask = xp.ones((B, S), bool)
    visible = xp.ones((1, V), bool) if visible is None else asarray(visible, xp)
    if positions is None and mask.ndim == 4:
        positions = xp.arange(seen, S)[None]
    if positions is not None:
        positions = positions + visible.sum(axis=1, keepdims=True)  # [B or 1, T]
        if first and P:
            own = xp.maximum(visible[:, K:].cumsum(axis=1) - 1, 0).astype(positions.dtype)  # from 0, in every row
            positions = xp.concatenate([xp.broadcast_to(own, (positions.shape[0], P)), positions], axis=1)
    if mask is not None:
        mask = _see_virtual(mask, visible, P if first else 0)
    return {**given, "attention_mask": mask, "position_ids": positions}, first


def _check_limit(taken: Any, mask: Array | None, S: int, limit: int) -> None:
    """Raise PeftError where a row reaches further than the model; `taken`: virtual tokens, of all rows or each [B]."""
    reached = S if mask is None or mask.ndim == 4 else (mask != 0).sum(axis=1)
    total = taken + reached
    row = None if isinstance(total, int) else int(total.argmax())
    taken, reached = (n if isinstance(n, int) else int(n[row]) for n in (taken, reached))
    if taken + reached > limit:
        room = f"{taken} virtual tokens leave {limit - taken} of this model's {limit} positions"
        raise PeftError(f"{room}, but the input reaches {reached}: shorten it to at most {limit - taken} tokens")


def _see_virtual(mask: Array, visible: Array, P: int) -> Array:
    """The mask with V more keys in front, which the queries of their rows see; P more queries see only these.

    mask [B, S] or [B, 1, T, S], visible [B or 1, V] -> [B, V + S] or [B, 1, P + T, V + S].
    """
    xp, (B, *middle, S), V = xp_of(mask), mask.shape, visible.shape[1]
    keys = visible.astype(mask.dtype).reshape(-1, *[1 for _ in middle], V)
    mask = xp.concatenate([xp.broadcast_to(keys, (B, *middle, V)), mask], axis=-1)
    if not (middle and P):
        return mask
    rows = xp.zeros((B, 1, P, V + S), mask.dtype)
    rows[..., :V] = keys
    return xp.concatenate([rows, mask], axis=2)
