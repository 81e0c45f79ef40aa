"""Which variant of LoRA a configuration names; a variant's file is imported when it is asked for.

    dora             the length of each row is trained apart       pissa, olora     the start comes from W: its SVD, its QR
    lora_embedding   rows are looked up                            fused            parts of a fused QKV projection
"""

from __future__ import annotations

import importlib
from typing import Any

from .targets import PeftError

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
    start, enabled = config.init_lora_weights, config.enable_lora
    if start == "pissa":
        check_alpha(config, "PiSSA starts from W / s")
    if enabled is not None and not any(enabled):
        raise PeftError(f"enable_lora must name at least one projection to adapt, got {enabled}")
    if enabled and (config.use_dora or start in ("pissa", "olora")):
        raise PeftError("enable_lora adapts parts of a matrix; DoRA, PiSSA and OLoRA are about whole ones")


def check_alpha(config: Any, why: str) -> None:
    """Raises PeftError for a lora_alpha, also of alpha_pattern, by which a start cannot be divided."""
    for alpha in (config.lora_alpha, *config.alpha_pattern.values()):
        if alpha <= 0:
            raise PeftError(f"{why}, so lora_alpha must be positive, got {alpha!r}")


def variant_class(config: Any, name: str, kind: str) -> Any:
    """The class of adapter that a LoraConfig puts on the layer at a path, of this kind.

    Raises PeftError for an embedding with options that are for linear layers.
    """
    start = config.init_lora_weights
    varied = "fused" if config.enable_lora else start if start in ("pissa", "olora") else None
    if kind == "embedding":
        if varied:
            what = "enable_lora" if config.enable_lora else f"init_lora_weights={start!r}"
            raise PeftError(f"{name}: {what} is for linear layers, not for an embedding")
        varied = "embedding"
    file, plain, dora = VARIANTS[varied]
    file, found = ("dora", dora) if config.use_dora else (file, plain)
    return getattr(importlib.import_module(f".{file}", __package__), found)
