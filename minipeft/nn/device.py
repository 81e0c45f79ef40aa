"""What a model computes on a device beside its ops, one launch each: the angles of positions, and the next token."""

from __future__ import annotations

import numpy as np

from .. import cuda_kernels as kernels
from ..backend import Array
from ..cuda import cupy


def rotation(positions: Array, frequency: np.ndarray, dtype: np.dtype) -> tuple[Array, Array]:
    """cos and sin of position * frequency: positions [B, T], frequency [D/2] on the host -> [B, T, D/2] each."""
    xp, shape = cupy(), (*positions.shape, len(frequency))
    return kernels.angles(positions[..., None], xp.asarray(frequency), xp.empty(shape, dtype), xp.empty(shape, dtype))


def pick(logits: Array, temperature: float, top_k: int | None, top_p: float | None, uniform: Array | None) -> Array:
    """The next token of each row, int64 [B], or -1 where a logit is NaN: logits [B, V], uniform numbers float64 [B].

    As `nn.generation` has it on the host: `token_probabilities`, up to rounding, then the token at which their sum passes
    the uniform number. temperature 0 takes the most probable token, and no numbers. One launch.
    """
    xp, (B, V) = cupy(), logits.shape
    logits = xp.ascontiguousarray(logits, dtype=None if logits.dtype == np.float64 else np.float32)
    token, mass = xp.empty(B, xp.int64), xp.empty(logits.shape if temperature else 0, xp.float64)
    options = V, float(temperature), int(top_k or V), float(top_p or 1)
    given = logits, 0 if uniform is None else uniform, mass, token, *options
    kernels.pick(logits, logits.dtype, B, V, *given, threads=min(1024, max(32, 1 << (V // 48).bit_length())))
    return token
