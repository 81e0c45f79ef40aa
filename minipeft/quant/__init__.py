"""Weights in four and eight bits, and layers that multiply by them: NF4, FP4, double quantization (QLoRA)."""

from .blockwise import (
    QuantError,
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)
from .int8 import int8_vectorwise_dequant, int8_vectorwise_quant

__all__ = [
    "QuantError", "QuantState", "dequantize_4bit", "dequantize_blockwise", "int8_vectorwise_dequant",
    "int8_vectorwise_quant", "quantize_4bit", "quantize_blockwise",
]  # fmt: skip
