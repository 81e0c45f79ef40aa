"""Where virtual positions stand: what they change about a caller's masks, positions and cache.

    positions    0 ... P-1      P ... P+T-1
                 virtual   │    the input             P + T may be at most the model's context
                 1 1 ... 1 │    attention_mask        left padding stands after the virtual positions, and uses none

Departure from PEFT: positions count the unmasked tokens, in `forward` and `generate` alike, so that padding a row on
the left changes nothing. PEFT's forward counts padding too, and ignores position_ids (except in prefix tuning).
"""

from __future__ import annotations

from typing import Any

from ..backend import Array, xp_of
from ..nn.transformer import past_length
from .targets import PeftError


def make_room(P: int, given: dict[str, Any], limit: int, in_input: bool) -> tuple[dict[str, Any], bool]:
    """The arguments of `Transformer.forward` with `P` virtual positions in front.

    Args:
        given: the caller's arguments, which know of no virtual positions; but past_key_values that hold positions
            already hold the virtual ones first.
        limit: positions that the model has.
        in_input: whether the virtual positions are part of the input (prompt tuning) or of the past (prefix tuning).

    Returns (arguments, whether this is the first call, in which the virtual positions must be put there).
    Raises PeftError for a mask of another shape and an input that is too long.
    """
    inputs = given["input_ids"] if given["inputs_embeds"] is None else given["inputs_embeds"]
    mask, positions = given["attention_mask"], given["position_ids"]
    B, T = inputs.shape[:2]
    past = past_length(given["past_key_values"])
    first, seen = past == 0, max(0, past - P)  # seen: of the caller's own positions
    if 0 < past < P:
        raise PeftError(f"past_key_values hold {past} positions; the {P} virtual tokens cannot be among them")
    S = seen + T
    if mask is not None and mask.shape not in ((B, S), (B, 1, T, S)):
        raise PeftError(
            f"attention_mask must have the shape {(B, S)} or {(B, 1, T, S)}, not {mask.shape}: the {P} virtual tokens "
            "are added to it here"
        )
    longest = S if mask is None or mask.ndim == 4 else int((mask != 0).sum(axis=1).max().item())
    if positions is None and P + longest > limit:
        raise PeftError(
            f"{P} virtual tokens leave {limit - P} of this model's {limit} positions, but the input reaches {longest}: "
            f"shorten it to at most {limit - P} tokens"
        )
    if mask is not None:
        mask = _see_virtual(mask, P, in_input and first)
    if positions is not None:
        positions = positions + P
        if in_input and first:
            xp = xp_of(positions)
            virtual = xp.broadcast_to(xp.arange(P, dtype=positions.dtype), (positions.shape[0], P))
            positions = xp.concatenate([virtual, positions], axis=1)
    return {**given, "attention_mask": mask, "position_ids": positions}, first


def _see_virtual(mask: Array, P: int, as_queries: bool) -> Array:
    """The mask with P more keys in front, which every query sees; and P more queries, which see only these keys."""
    xp = xp_of(mask)
    mask = xp.concatenate([xp.ones((*mask.shape[:-1], P), mask.dtype), mask], axis=-1)
    if mask.ndim == 2 or not as_queries:
        return mask
    rows = xp.zeros((mask.shape[0], 1, P, mask.shape[3]), mask.dtype)
    rows[..., :P] = 1
    return xp.concatenate([rows, mask], axis=2)
