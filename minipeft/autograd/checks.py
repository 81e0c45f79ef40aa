"""What an op refuses, in one sentence that names the op, the shapes and what would be right: `check.norm(...)`.

They raise ValueError for shapes and options, TypeError for dtypes, IndexError for axes and numbers out of range.
"""

from __future__ import annotations

import numpy as np

from ..backend import Array


def axis(axis: int, ndim: int) -> int:
    """The axis counted from the front, of a tensor with `ndim` axes."""
    if not -ndim <= axis < ndim:
        raise IndexError(f"axis {axis} is out of range for a tensor with {ndim} axes")
    return axis % ndim


def gather(shape: tuple[int, ...], indices: Array, axis: int) -> None:
    """Indices have x's shape on every other axis, and lie in it on theirs; on a device they are not read."""
    if indices.shape[:axis] != shape[:axis] or indices.shape[axis + 1 :] != shape[axis + 1 :]:
        raise ValueError(
            f"gather: indices of shape {indices.shape} must equal x's shape {shape} on every axis but {axis}"
        )
    if isinstance(indices, np.ndarray) and indices.size:
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= shape[axis]:
            bad = low if low < 0 else high
            raise IndexError(f"gather: index {bad} is out of range; indices must lie in 0..{shape[axis] - 1}")


def probability(p: float) -> None:
    """Of dropout: 0 <= p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability must lie in [0, 1), not {p}")


def degrees_of_freedom(n: int, correction: float) -> None:
    """Of a variance: n > correction."""
    if n <= correction:
        raise ValueError(f"var: {n} elements have no variance with correction={correction}; there must be more of them")


def same_shape(name: str, a: Array, b: Array) -> None:
    """A loss of two arrays does not broadcast: [N] beside [N, 1] would be N * N differences."""
    if a.shape != b.shape:
        raise ValueError(f"{name}: input {a.shape} and target {b.shape} must have the same shape")


def smoothing(label_smoothing: float) -> None:
    """Of cross_entropy: 0 <= label_smoothing <= 1."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], not {label_smoothing}")


def matmul(a: Array, b: Array) -> None:
    """The inner dimensions of a [..., n, k] (or [k]) and b [..., k, m] (or [k]) agree."""
    if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise ValueError(f"matmul: shapes {a.shape} and {b.shape} do not match (inner dimensions must be equal)")


def square(x: Array) -> None:
    """Of inv: matrices [..., n, n]."""
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"inv takes square matrices [..., n, n], not the shape {x.shape}")


def linear(name: str, x: Array, weight: Array, bias: Array | None = None, inputs: int = 1) -> None:
    """x [..., in], weight with its inputs on axis `inputs`, bias [out] or [..., out] or None."""
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[inputs]:
        need = weight.shape[-inputs]
        raise ValueError(f"{name}: input {x.shape} does not match weight {weight.shape} (last axis must be {need})")
    out = weight.shape[1 - inputs]
    if bias is not None and bias.shape not in ((out,), (*x.shape[:-1], out)):
        raise ValueError(f"{name}: bias {bias.shape} does not match weight {weight.shape} (must be ({out},))")


def ids(ids: Array, rows: int, values: bool = True) -> None:
    """Integers [...], each the number of one of an embedding's `rows`; without `values` they are not read."""
    if ids.dtype.kind not in "iu":
        raise TypeError(f"embedding: ids must be integers, not {ids.dtype}")
    if ids.size and values:
        low, high = int(ids.min().item()), int(ids.max().item())
        if low < 0 or high >= rows:
            raise IndexError(
                f"embedding: token id {low if low < 0 else high} is out of range; ids must lie in 0..{rows - 1}"
            )


def norm(name: str, x: Array, **parameters: Array) -> None:
    """Weight and bias [d] have the length of the last axis of x [..., d]."""
    for what, p in parameters.items():
        if p.shape != x.shape[-1:]:
            raise ValueError(f"{name}: {what} {p.shape} does not match the last axis of the input {x.shape}")


def attention(q: Array, k: Array, v: Array, mask: Array | None) -> None:
    """q [B, H, T, D], k [B, H', S, D], v [B, H', S, Dv] with H' dividing H; a mask that broadcasts to [B, H, T, S]."""
    B, H, T, D = q.shape
    if k.shape[:3] != v.shape[:3] or k.shape[0] != B or k.shape[3] != D or k.shape[1] == 0 or H % k.shape[1]:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not match: "
            "[B, H, T, D], [B, H', S, D], [B, H', S, Dv] with H' dividing H"
        )
    if mask is not None:
        want = (B, H, T, k.shape[2])
        if mask.dtype.kind not in "fb":
            raise TypeError(f"attention: the mask must be boolean (True = attend) or additive floats, not {mask.dtype}")
        if mask.ndim > 4 or any(m not in (1, w) for m, w in zip(mask.shape[::-1], want[::-1])):
            raise ValueError(f"attention: a mask of shape {mask.shape} cannot be broadcast to [B, H, T, S] = {want}")


def rotary(q: Array, k: Array, v: Array, cos: Array, sin: Array) -> None:
    """q [B, T, H D], k and v [B, T, H' D], cos and sin [B or 1, T, D/2]."""
    (B, T), D = cos.shape[:2], 2 * cos.shape[2]
    fits = k.shape == v.shape and q.shape[:2] == k.shape[:2] and T == q.shape[1] and B in (1, q.shape[0])
    if not fits or cos.shape != sin.shape or not D or q.shape[2] % D or k.shape[2] % D:
        raise ValueError(
            f"rotary_attention: q {q.shape}, k {k.shape}, v {v.shape}, cos {cos.shape} and sin {sin.shape} do not match: "
            "[B, T, H D], [B, T, H' D], [B, T, H' D], [B or 1, T, D/2] twice"
        )


def targets(
    name: str, targets: Array, rows: tuple[int, ...], classes: int, ignore_index: int, values: bool = True
) -> None:
    """One integer class id in 0..classes-1 (or ignore_index) for each row of logits: targets of the shape `rows`.

    Without `values` the ids are not read.
    """
    if targets.shape != rows:
        raise ValueError(
            f"{name}: targets of shape {targets.shape} must have the shape {rows}, one class id per row of logits"
        )
    if targets.dtype.kind not in "iu":
        raise TypeError(f"{name}: targets must be integer class ids, not {targets.dtype}")
    if not values:
        return
    real = targets[targets != ignore_index]
    low, high = (int(real.min().item()), int(real.max().item())) if real.size else (0, 0)
    if low < 0 or (high >= classes and real.size):
        bad, allowed = low if low < 0 else high, f"0..{classes - 1} (or be {ignore_index})"
        raise IndexError(f"{name}: target {bad} is out of range; class ids must lie in {allowed}")
