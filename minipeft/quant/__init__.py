"""Weights in four bits, and layers that multiply by them.

    nf4, codebooks      the paper (QLoRA): blocks, scales, double quantization; the points of NF4, FP4, int4
    eight_bits          the dynamic map
    kernels             fast forms of nf4, on two codes to a byte
    bitsandbytes        its functions, bytes and files, with `checks` of what is given
    linear, surgery     Linear4bit; models whose layers are replaced by it, and back
"""

from .bitsandbytes import QuantState, dequantize_4bit, quantize_4bit
from .checks import QuantError
from .linear import Linear4bit, linear_4bit
from .surgery import dequantize_model, quantize_model

__all__ = [
    "Linear4bit", "QuantError", "QuantState", "dequantize_4bit", "dequantize_model", "linear_4bit", "quantize_4bit",
    "quantize_model",
]  # fmt: skip
