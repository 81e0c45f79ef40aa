"""How many bytes a number takes, by what it is for; and how many moments an optimizer keeps for each parameter.

Sources: Rajbhandari et al. 2019 (ZeRO, arXiv:1910.02054, section 3.1): 16 bytes a parameter for mixed precision with
Adam; Dettmers et al. 2023 (QLoRA, arXiv:2305.14314, section 1): 12 bytes, "more than 780 GB" for 65B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Precision:
    """Bytes of an element, by the kind of memory."""

    frozen: int = 4
    trained: int = 4
    gradients: int = 4
    states: int = 4
    master: int = 0  # a float32 copy of the trained weights
    activations: int = 4


PRECISIONS = {
    "float32": Precision(),  # 16 bytes a trained parameter with Adam: 4 + 4 + 8
    "mixed": Precision(2, 2, 2, 4, master=4, activations=2),  # 16: 2 + 2 + 8 + 4 (ZeRO, section 3.1)
    "mixed-float32-gradients": Precision(2, 2, 4, 4, master=4, activations=2),  # 18: 2 + 4 + 8 + 4 (DeepSpeed's ZeRO-3)
    "bfloat16": Precision(2, 2, 2, 4, activations=2),  # 12: 2 + 2 + 8, no master copy (QLoRA, section 1)
    "float16-base": Precision(frozen=2),  # a frozen base stored in float16, widened where it is used
}
MOMENTS = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}  # of each trained parameter, `Precision.states` bytes each
OPTIMIZERS = (*MOMENTS, "adamw_8bit")
QUANT_TYPES = ("nf4", "fp4", "int4")


def state_bytes(optimizer: str, sizes: Iterable[int], p: Precision) -> int:
    """Bytes of an optimizer's states of trained parameters of these numbers of elements.

    8-bit AdamW: a byte and 4/256 of a scale for each of two moments; float32 for parameters of under 4,096 elements.
    """
    if optimizer != "adamw_8bit":
        return MOMENTS[optimizer] * p.states * sum(sizes)
    return sum(2 * (n + 4 * -(-n // 256)) if n >= 4096 else 8 * n for n in sizes)


def step_bytes(optimizer: str, p: Precision) -> int:
    """Bytes for each element of the piece that an optimizer works on; 8-bit AdamW adds in float64."""
    return 26 if optimizer == "adamw_8bit" else 3 * p.states


# ---------------------------------------------------------------------------------------------------------- arguments


def named(what: str, value: Any, known: Any) -> Any:
    """What a name stands for; a `Precision` is one already. Raises ValueError that lists the names."""
    if isinstance(value, str) and value in known:
        return known[value] if isinstance(known, Mapping) else value
    if isinstance(value, Precision) and what == "precision":
        return value
    raise ValueError(f"{what} must be one of {', '.join(known)}, not {value!r}")


def check_positive(**values: Any) -> None:
    """Raises ValueError for a number that is neither None nor a positive integer."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
