"""Floating-point formats bit by bit: the exponent's bits buy range, the fraction's resolution."""

from __future__ import annotations

from typing import Any

from .drawing import GREY, INK, box, cut, sheet, words

FORMATS = {"float32": (8, 23), "bfloat16": (8, 7), "float16": (5, 10)}  # bits of the exponent, and of the fraction
FILL = {"sign": "#FFFFFF", "exponent": "#DDE9F3", "fraction": "#FBD3B4"}


def reach(exponent: int, fraction: int) -> tuple[float, float]:
    """(the largest number, the step from 1 to the next) of an IEEE 754 format with these numbers of bits."""
    step = 2.0**-fraction
    return (2 - step) * 2.0 ** (2 ** (exponent - 1) - 1), step


def number_formats() -> Any:
    """A figure of the bits of float32, bfloat16 and float16, each with its largest number and its step at 1."""
    axes, left, side, said = sheet(), 2.4, 1.1, []
    for row, (name, (exponent, fraction)) in enumerate(FORMATS.items()):
        y, (largest, step) = 5.0 + 8.6 * row, reach(exponent, fraction)
        text = f"up to {largest:{',.0f' if largest < 1e6 else '.1e'}}; from 1 to the next number: {step:.2g}"
        for i, part in enumerate(["sign", *exponent * ["exponent"], *fraction * ["fraction"]]):
            box(axes, left + i * side, y + 1.4, side, 2.6, fc=FILL[part], ec=INK)
        words(axes, left, y, name, ha="left", fontweight="bold")
        words(axes, left, y + 5.4, text, ha="left", color=GREY)
        said.append(f"{name}: {exponent} exponent bits, {fraction} fraction bits; {text}")
    for i, (part, color) in enumerate(FILL.items()):
        box(axes, left + 11.5 * i, 30.5, side, 2, fc=color, ec=INK)
        words(axes, left + 11.5 * i + 2, 31.5, part, ha="left")
    return cut(axes, 34, "Exponent bits and fraction bits", ". ".join(said) + ".")
