"""Whether a step's numbers are finite, which a device need not be waited for to know: its kernels look themselves.

    gradients ─► Σ g² and the losses, on the device ─► clip ─► optimizer ─► read them all: the step's one wait
                                            └──────────┴───────────┘ do nothing where one of them is not finite
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..backend import Array, Unread


class Finite(Unread):
    """Numbers of a step, read together; true where all of the first are finite. To ask is to wait for a device.

    Args:
        first: scalars, such as the sum of squares of the gradients and the losses, without which there is no step.
        more: arrays that are read with them, of which any may hold NaN.

    `looked` [n], float64: the first numbers on their device, where kernels look; None on the CPU.
    """

    def __init__(self, first: Iterable[Array], more: Iterable[Array] = ()):
        first = list(first)
        super().__init__(*first, *more)
        self._n = len(first)
        self.looked = None if self.joined is None else self.joined[: len(first)]

    def __bool__(self) -> bool:
        return all(np.isfinite(number) for number in self.numbers[: self._n])
