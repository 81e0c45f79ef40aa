"""How many bytes a number takes, by what it is for; and how many moments an optimizer keeps for each parameter.

Sources: Rajbhandari et al. 2019 (ZeRO, arXiv:1910.02054, section 3.1): 16 bytes a parameter for mixed precision with
Adam; Dettmers et al. 2023 (QLoRA, arXiv:2305.14314, section 1): 12 bytes, "more than 780 GB" for 65B.
"""

from __future__ import annotations

from dataclasses import dataclass


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
OPTIMIZERS = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}  # moments of each trained parameter
