"""Which variant of LoRA a configuration names; a variant's file is imported when it is asked for.

    dora             the length of each row is trained apart       pissa, olora     the start comes from W: its SVD, its QR
    lora_embedding   rows are looked up                            fused            parts of a fused QKV projection
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from .targets import PeftError, Shape, check_patterns, pattern_value

# what is varied -> the file, the class, and the class with DoRA (in dora.py)
VARIANTS = {
    None: ("lora", "LoraLinear", "DoraLinear"),
    "pissa": ("pissa", "PissaLinear", "DoraPissa"),
    "olora": ("olora", "OloraLinear", "DoraOlora"),
    "embedding": ("lora_embedding", "LoraEmbedding", "DoraEmbedding"),
    "fused": ("fused", "FusedLora", ""),
}


def check_variant(config: Any) -> None:
    """Raises PeftError for options of a LoraConfig that contradict each other."""
    check_patterns("rank_pattern", *config.rank_pattern)
    check_patterns("alpha_pattern", *config.alpha_pattern)
    start, enabled = config.init_lora_weights, config.enable_lora
    for alpha in (config.lora_alpha, *config.alpha_pattern.values()):
        if start == "pissa" and alpha <= 0:
            raise PeftError(f"PiSSA starts from W / s, so lora_alpha must be positive, got {alpha!r}")
    if enabled is not None and not any(enabled):
        raise PeftError(f"enable_lora must name at least one projection to adapt, got {enabled}")
    if enabled and (config.use_dora or start in ("pissa", "olora")):
        raise PeftError("enable_lora adapts parts of a matrix; DoRA, PiSSA and OLoRA are about whole ones")


def check_patterns_of(config: Any, found: Iterable[str]) -> None:
    """Raises PeftError for a pattern of a LoraConfig that matches none of the paths found."""
    for what in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, what):
            if not any(pattern_value({pattern: True}, name, False) for name in found):
                such = ", ".join(list(found)[:3])
                raise PeftError(f"{what}: {pattern!r} matches none of the adapted modules, such as {such}")


def variant_class(config: Any, name: str, kind: str) -> Any:
    """The class of adapter that a LoraConfig puts on the layer at a path, of this kind.

    Raises PeftError for an embedding with options that are for linear layers.
    """
    varied = config.init_lora_weights if config.init_lora_weights in ("pissa", "olora") else None
    if kind == "embedding":
        if varied or config.enable_lora:
            what = "enable_lora" if config.enable_lora else f"init_lora_weights={varied!r}"
            raise PeftError(f"{name}: {what} is for linear layers, not for an embedding")
        varied = "embedding"
    file, plain, dora = VARIANTS["fused" if config.enable_lora else varied]
    file, found = ("dora", dora) if config.use_dora else (file, plain)
    return getattr(importlib.import_module(f".{file}", __package__), found)


def usual_learning_rate(config: Any) -> float:
    """PiSSA's is lower: both of its factors start away from zero, so a step moves their product more."""
    return 1e-3 if config.init_lora_weights == "pissa" else 3e-3


def constant_shapes(config: Any, layers: dict[str, tuple[str, Shape]]) -> dict[str, Shape]:
    """The start that PiSSA and OLoRA keep beside W, {path.start_A: shape}, of {path: (kind, shape of W)}."""
    return {
        f"{name}.{constant}": config.parameter_shapes(name, kind, shape)[key]
        for name, (kind, shape) in layers.items()
        for constant, key in getattr(variant_class(config, name, kind), "constants", {}).items()
    }
