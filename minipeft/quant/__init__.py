"""Weights in four and eight bits, and layers that multiply by them: NF4, FP4, double quantization (QLoRA)."""

from .bitsandbytes import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)
from .checks import QuantError
from .eight_bits import int8_vectorwise_dequant, int8_vectorwise_quant
from .linear import Linear4bit, linear_4bit
from .surgery import dequantize_model, quantize_model

__all__ = [
    "Linear4bit", "QuantError", "QuantState", "dequantize_4bit", "dequantize_blockwise", "dequantize_model",
    "int8_vectorwise_dequant", "int8_vectorwise_quant", "linear_4bit", "quantize_4bit", "quantize_blockwise",
    "quantize_model",
]  # fmt: skip
