"""LoRA on some of the projections that one layer fuses: loralib's MergedLinear(enable_lora=[True, False, True]).

    W = [W_q; W_k; W_v],    W_q' = W_q + s B_q A_q,    W_v' = W_v + s B_v A_v

The k enabled parts have their A stacked and their B block-diagonal, so that the layer is a LoRA of rank k r.
"""

from __future__ import annotations

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import xp_of
from .config import PeftError, Shape
from .lora import LoraConfig, LoraLinear


class FusedLora(LoraLinear):
    """LoRA of each enabled part: lora_A [k r, in] and lora_B [k width, r], k parts of the input's width."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A [k r, in], B [parts * width, k r]): each part's B in its own rows and columns, zeros elsewhere."""
        B, enable_lora = self.lora_B, self.config.enable_lora
        xp, r, k = xp_of(B.data), B.shape[1], sum(enable_lora)
        width, rows, i = B.shape[0] // k, [], 0
        for enabled in enable_lora:
            if not enabled:
                rows.append(Tensor(xp.zeros((width, k * r), B.dtype)))
                continue
            left, right = (Tensor(xp.zeros((width, n * r), B.dtype)) for n in (i, k - 1 - i))
            rows.append(F.cat([left, B[i * width : (i + 1) * width], right], axis=1))
            i += 1
        return self.lora_A, F.cat(rows, axis=0)

    @staticmethod
    def factor_shapes(config: LoraConfig, name: str, r: int, n_out: int, n_in: int) -> dict[str, Shape]:
        """What is trained. Raises PeftError for a layer that does not fuse that many projections of the input's width."""
        parts, enabled = len(config.enable_lora), sum(config.enable_lora)
        if n_out != parts * n_in:
            needed = f"a layer that fuses {parts} projections of width {n_in}"
            raise PeftError(f"{name}: enable_lora={config.enable_lora} needs {needed}; this one gives {n_out}")
        return {"lora_A.weight": (enabled * r, n_in), "lora_B.weight": (enabled * n_in, r)}
