"""Generation: a language model continues its prompts, one token at a time.

    prompts [B, T] ─► model ─► logits at the last position [B, V] ─► pick a token a row ─► fed back, until EOS
                        ▲ keys and values of the positions seen so far (KVCache)

The model is asked through its call signature alone, so anything called like `Transformer` generates. A row whose token
ends it leaves the batch. On a GPU the token is chosen there, and all that is read in a step are the tokens [B]. NumPy and
CuPy models draw with the same random numbers: the same tokens from the same logits, up to rounding.

A row's tokens do not depend on the other rows: the random number of step t in row i is a function of (seed, i, t).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..autograd.tensor import no_grad
from ..backend import Array, Rng, as_rng, asarray, is_array, to_numpy, xp_of
from ..options import check_flags, fits
from . import device
from .module import Module
from .transformer import KeyValue, KVCache


def generate(
    model: Module, input_ids: Any, attention_mask: Any = None, max_new_tokens: int = 20, **options: Any
) -> np.ndarray:
    """The prompts and their continuations: int64 [B, T + n] in host memory, n <= max_new_tokens.

    A row that has ended (with EOS, which is kept) is filled up with the padding id on its right; n is the length of the
    longest continuation. The arguments and errors are those of `generate_stream`.
    """
    tokens = generate_stream(model, input_ids, attention_mask, max_new_tokens, **options)
    return np.concatenate([_host(input_ids, "input_ids"), *[t[:, None] for t in tokens]], axis=1)


def generate_stream(
    model: Module,
    input_ids: Any,
    attention_mask: Any = None,
    max_new_tokens: int = 20,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Rng = 0,
    eos_token_id: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
    pad_token_id: int | None = None,
    past_key_values: KVCache | Sequence[KeyValue] | None = None,
    use_cache: bool = True,
    adapter_names: Sequence[str] | None = None,
) -> Iterator[np.ndarray]:
    """Yields, step by step, the next token of every row: int64 [B]; the padding id for rows that have ended.

    Args:
        model: called as `model(input_ids, attention_mask=, past_key_values=KVCache)`.
        input_ids: prompts [B, T], lists or an array of any device.
        attention_mask: [B, past + T], zero where a position is padding. Prompts of different lengths are padded on the
            left, so that every row goes on from its last token.
        temperature: 0 takes the most probable token (the lowest id among equals); otherwise the logits are divided by
            it and a token is drawn.
        top_k, top_p: limit the draw; see `token_probabilities`.
        seed: names the random stream: a seed, or an `Rng` that says which rows of the whole batch these are.
        eos_token_id: an id, or several, that end a row, or a list of such lists, one a row; by default the model's
            configuration says. () never stops.
        pad_token_id: by default the configuration's, else the first EOS id.
        past_key_values: (k, v) per layer, [B, kv, past, D], such as a trained prefix; never changed.
        use_cache: False computes every position again at every step: the same tokens, slower.
        adapter_names: of a `PeftModel`: the adapter of each row, "__base__" for none.

    Raises ValueError for arguments that make no sense and for prompts that, continued by `max_new_tokens`, would be
    longer than the positions that the model has beside its virtual tokens; TypeError for adapter_names of a model
    without adapters, and a text as use_cache; FloatingPointError when the logits are not numbers.
    """
    ids, cache = _host(input_ids, "input_ids"), KVCache(past_key_values or ())
    (B, T), past = ids.shape, len(cache)
    mask = None if attention_mask is None else _host(attention_mask, "attention_mask")
    config, stream = getattr(model, "config", None), as_rng(seed)
    check_flags(use_cache=use_cache)
    _check(ids, mask, cache, max_new_tokens, temperature, top_k, top_p, stream)
    length = np.full(B, past + T) if mask is None else (mask != 0).sum(axis=1)
    virtual, limit = _virtual(model, adapter_names, B), getattr(config, "max_position_embeddings", None)
    _check_room(limit, length, virtual, max_new_tokens)
    ends = _ends(getattr(config, "eos_token_id", None) if eos_token_id is None else eos_token_id, B)
    pad = getattr(config, "pad_token_id", None) if pad_token_id is None else pad_token_id
    pad = _id("pad_token_id", pad) if pad is not None else next((i for row in ends for i in row), 0)

    xp, rows = xp_of(model.parameters()[0].data), np.arange(B)
    for step in range(max_new_tokens):
        seen = cache if use_cache else KVCache(cache) if past else None
        with no_grad():
            names = None if adapter_names is None else [adapter_names[row] for row in rows]  # that still run
            logits = next_logits(model, ids, mask, seen, names)
        chosen = next_tokens(logits, temperature, top_k, top_p, stream, rows, step)
        tokens = to_numpy(chosen)  # the step's one wait for the device
        if (tokens < 0).any():
            raise FloatingPointError(f"the model's logits are NaN or infinite at generation step {step}; check its weights")
        out = np.full(B, pad, np.int64)
        out[rows] = tokens
        yield out

        alive = np.array([token not in ends[row] for token, row in zip(tokens.tolist(), rows)])
        if not alive.any():
            return
        if not alive.all():  # rows that have ended leave the batch
            index = xp.asarray(np.flatnonzero(alive))
            rows, tokens, chosen = rows[alive], tokens[alive], chosen[index]
            ids = ids if use_cache else ids[alive]
            mask = None if mask is None else mask[alive]
            cache.select(index)
        ids = chosen[:, None] if use_cache else np.concatenate([ids, tokens[:, None]], axis=1)
        if mask is not None:
            mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)


def next_tokens(
    logits: Array, temperature: float, top_k: int | None, top_p: float | None, stream: Rng, rows: np.ndarray, step: int
) -> Array:
    """The tokens of a step, int64 [b], where the logits [b, V] of these rows are; -1 where the largest is no finite number."""
    xp = xp_of(logits)
    u = [uniform(stream, row, step) for row in rows] if temperature else None
    if xp.__name__ == "cupy":
        return device.pick(logits, temperature, top_k, top_p, None if u is None else xp.asarray(u))
    logits = to_numpy(logits)
    if not np.isfinite(logits.max(axis=-1)).all():  # NaN is the maximum of all
        return xp.full(len(rows), -1)
    if temperature == 0:
        return xp.asarray(logits.argmax(axis=-1))
    probabilities = token_probabilities(logits, temperature, top_k, top_p)
    return xp.asarray(np.array([_draw(p, number) for p, number in zip(probabilities, u)]))


def token_probabilities(
    logits: np.ndarray, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> np.ndarray:
    """The distribution a token is drawn from: logits [..., V] in host memory -> float64 [..., V].

    softmax(logits / temperature), then restricted, in this order, to
    top_k: the k most probable tokens, and any as probable as the k-th (Fan et al. 2018, arXiv:1805.04833);
    top_p: the smallest set of most probable tokens whose probabilities, after top_k, sum to at least p (Holtzman et al.
        2020, arXiv:1904.09751, eq. 2); among equally probable tokens the lower id goes first.
    None (or top_k=0, top_p=1) does not restrict. Order and limits are those of Hugging Face's `generate`.
    """
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # -inf at a temperature near 0, where all but the most probable have none
        scores = (scores - scores.max(axis=-1, keepdims=True)) / temperature
    if top_k and top_k < scores.shape[-1]:
        kth = np.partition(scores, -top_k, axis=-1)[..., -top_k, None]
        scores[scores < kth] = -np.inf
    p = np.exp(scores)
    p /= p.sum(axis=-1, keepdims=True)
    if top_p is not None and top_p < 1:
        order = np.argsort(-p, axis=-1, kind="stable")
        ranked = np.take_along_axis(p, order, axis=-1)
        reached = np.cumsum(ranked, axis=-1)[..., :-1] >= top_p  # the tokens before this one already suffice
        ranked[..., 1:][reached] = 0
        np.put_along_axis(p, order, ranked, axis=-1)
        p /= p.sum(axis=-1, keepdims=True)
    return p


def uniform(stream: Rng, row: int, step: int) -> float:
    """The number in [0, 1) of (seed, row, step)."""
    return np.random.default_rng([*stream.path, stream.row(row)[0], step]).random()


def _draw(p: np.ndarray, u: float) -> int:
    """The token at which the cumulative probability passes u."""
    total = np.cumsum(p)
    return int(np.searchsorted(total, u * total[-1], side="right"))


def next_logits(
    model: Module, ids: Array, mask: Array | None, past: KVCache | None, adapter_names: list[str] | None = None
) -> Array:
    """Logits at the last position, [B, V], of ids [B, T] and mask [B, past + T], which may be in host memory."""
    headed = hasattr(model, "backbone") and hasattr(model, "lm_head")
    if not headed:  # a model of another kind gets them on its device
        xp = xp_of(model.parameters()[0].data)
        ids, mask = asarray(ids, xp), None if mask is None else asarray(mask, xp)
    arguments = {"attention_mask": mask, "past_key_values": past}
    if adapter_names is not None:
        arguments["adapter_names"] = adapter_names
    if not headed:
        return model(ids, **arguments).data[:, -1]
    if hasattr(model, "last_logits"):  # of a model with adapters
        return model.last_logits(ids, **arguments).data
    hidden = model.backbone(ids, **arguments)  # [B, T, d]
    return model.lm_head(hidden[:, -1]).data  # the head on one position alone


def _ends(ids: Any, B: int) -> list[list[int]]:
    """The ids that end each of B rows, from one id, or several for all rows, or a list for each row."""
    several = (list, tuple, range, np.ndarray)
    ids = [] if ids is None else list(ids) if isinstance(ids, several) else [ids]
    if not any(isinstance(i, several) for i in ids):
        return [[_id("eos_token_id", i) for i in ids]] * B
    if len(ids) != B:
        raise ValueError(f"eos_token_id has lists for {len(ids)} rows, but there are {B} prompts")
    return [[_id("eos_token_id", i) for i in row] for row in ids]


def _id(name: str, value: Any) -> int:
    if not fits(value, int):
        raise ValueError(f"{name} must be a token id, an integer of 64 bits, not {value!r}")
    return int(value)


def _virtual(model: Module, adapter_names: Sequence[str] | None, B: int) -> np.ndarray:
    """How many virtual tokens the model itself puts in front of each of B rows, [B]."""
    if adapter_names is None:
        return np.full(B, getattr(model, "virtual_tokens", 0))
    if not hasattr(model, "virtual_tokens_of"):
        raise TypeError(f"adapter_names needs a model with named adapters; this is a {type(model).__name__}")
    if len(adapter_names) != B:
        raise ValueError(f"adapter_names has {len(adapter_names)} names for {B} prompts")
    return np.array(model.virtual_tokens_of(adapter_names))


def _check_room(limit: int | None, length: np.ndarray, virtual: np.ndarray, new: int) -> None:
    """Raise ValueError where a row's prompt [B], virtual tokens [B] and new tokens are more than the positions."""
    row = int((length + virtual).argmax())
    longest, taken = int(length[row]), int(virtual[row])
    if limit is not None and taken + longest + new > limit:
        has = f"{taken} virtual tokens leave {limit - taken}" if taken else f"this model has {limit}"
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={new} make {longest + new}, but {has} positions: shorten "
            f"the prompt or generate at most {max(0, limit - taken - longest)}"
        )


def _host(values: Any, name: str) -> np.ndarray:
    """Token ids or a mask in host memory: an explicit copy from the device, where they are on one."""
    try:
        array = to_numpy(values) if is_array(values) else np.asarray(values)
    except ValueError:
        raise ValueError(f"{name}: rows differ in length; pad them on the left and give an attention_mask") from None
    if array.ndim != 2:
        raise ValueError(f"{name} must have the shape [batch, seq], not {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} of shape {array.shape} is empty; a prompt needs at least one token, such as BOS")
    if array.dtype.kind not in "iub":
        raise ValueError(f"{name} must be integers, not {array.dtype}")
    return array.astype(np.int64)


def _check(
    ids: np.ndarray, mask: np.ndarray | None, cache: KVCache, new: Any, temperature: Any, k: Any, p: Any, stream: Rng
) -> None:
    (B, T), past = ids.shape, len(cache)
    if mask is not None:
        if mask.shape != (B, past + T):
            raise ValueError(f"attention_mask must have the shape {(B, past + T)}, not {mask.shape}")
        if not mask[:, -1].all():
            raise ValueError("attention_mask ends with padding in some row; to be continued, pad prompts on the left")
    if past and next(iter(cache))[0].shape[0] != B:
        raise ValueError(f"past_key_values hold {next(iter(cache))[0].shape[0]} rows, but there are {B} prompts")
    if not isinstance(new, (int, np.integer)) or new < 0:
        raise ValueError(f"max_new_tokens must be a non-negative integer, not {new!r}")
    if not (fits(temperature, float) and temperature >= 0):
        raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {temperature!r}")
    if k is not None and (not isinstance(k, (int, np.integer)) or k < 0):
        raise ValueError(f"top_k must be a positive integer, or None (or 0) for no limit, not {k!r}")
    if p is not None and not (fits(p, float) and 0 < p <= 1):
        raise ValueError(f"top_p must lie in (0, 1], not {p!r}")
    if stream is None or any(i < 0 for i in stream.path):
        raise ValueError("seed must be a non-negative integer")
