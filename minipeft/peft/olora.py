"""OLoRA: LoRA that starts as part of W's QR decomposition (Büyükakyüz 2024, arXiv:2406.01775, section 3).

    W = Q R,    A0 = R[:r],    B0 = Q[:, :r]        W' = (W - s B0 A0) + s B A

Departure from PEFT: on GPT-2's [in, out] layers the matrix that is applied is decomposed. PEFT decomposes its
transpose, and so does not start at the base (a square layer) or does not run.
"""

from __future__ import annotations

import numpy as np

from .pissa import PissaLinear


class OloraLinear(PissaLinear):
    """As PiSSA, with another start."""

    @staticmethod
    def decompose(W: np.ndarray, r: int, s: float) -> tuple[np.ndarray, np.ndarray]:
        """(A0 [r, in], B0 [out, r]) of W [out, in]."""
        Q, R = np.linalg.qr(W)
        return R[:r].copy(), Q[:, :r].copy()  # views would keep the whole of R and Q
