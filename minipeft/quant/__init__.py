"""Weights in four and eight bits, and layers that multiply by them.

    nf4, codebooks      the paper (QLoRA): blocks, scales, double quantization; the points of NF4, FP4, int4
    eight_bits          the dynamic map, and int8 by rows
    kernels             fast forms of nf4, on two codes to a byte
    bitsandbytes        its functions, bytes and files, with `checks` of what is given
    linear, surgery     Linear4bit; models whose layers are replaced by it, and back
"""

from .bitsandbytes import QuantState, dequantize_4bit, dequantize_blockwise, quantize_4bit, quantize_blockwise
from .checks import QuantError
from .eight_bits import int8_vectorwise_dequant, int8_vectorwise_quant
from .linear import Linear4bit, linear_4bit
from .surgery import dequantize_model, quantize_model

__all__ = [
    "Linear4bit", "QuantError", "QuantState", "dequantize_4bit", "dequantize_blockwise", "dequantize_model",
    "int8_vectorwise_dequant", "int8_vectorwise_quant", "linear_4bit", "quantize_4bit", "quantize_blockwise",
    "quantize_model",
]  # fmt: skip
