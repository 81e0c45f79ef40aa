"""Which base an adapter was trained on: its files say it, and loading the adapter on another base warns.

    adapter_config.json         base_model_name_or_path, as in PEFT: a directory, a .gguf file, or the shipped base's name
    adapter_model.safetensors   in the metadata, which PEFT does not look at: base_in_4bit, "true" or "false"
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from ..files import FileError, map_safetensors, read_json
from ..nn.module import Module, some
from .weights import quantized

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IN_4BIT = "base_in_4bit"


def on_base(config: Any, model: Module) -> Any:
    """A configuration that names the model as its base, where the model has a name."""
    name = getattr(model, "name_or_path", None)
    return config.replace(base_model_name_or_path=name) if name else config


def metadata_of(model: Module) -> dict[str, str]:
    """What the metadata of an adapter's weights say of its base."""
    return {IN_4BIT: str(bool(quantized(model))).lower()}


def config_path(directory: str | os.PathLike) -> Path:
    """Where the configuration of an adapter directory is. FileError for one that holds adapters in directories alone."""
    path, inside = Path(directory) / CONFIG, sorted(p.parent for p in Path(directory).glob(f"*/{CONFIG}"))
    if inside and not path.exists():
        adapters = some([p.name for p in inside])
        raise FileError(f"{directory}: is no adapter, but holds the adapters {adapters}: give {inside[0]}")
    return path


def recorded_base(directory: str | os.PathLike) -> tuple[str | None, bool | None]:
    """(name of the base, whether it was in four bits) that an adapter directory tells; None where it does not.

    Raises FileError for files that are missing or damaged.
    """
    name = read_json(config_path(directory)).get("base_model_name_or_path")
    bits = map_safetensors(Path(directory) / WEIGHTS)[1].get(IN_4BIT)
    return name if isinstance(name, str) and name else None, {"true": True, "false": False}.get(bits)


def warn_of_another_base(model: Module, directory: str | os.PathLike) -> None:
    """A UserWarning where the model has another name than the base of the adapter in a directory, or other bits; none
    where either does not say.
    """
    name, packed = recorded_base(directory)
    own, is_packed = getattr(model, "name_or_path", None), bool(quantized(model))
    if name and own and not _same(name, own):
        _warn(f"{directory}: the adapter was trained on {name}, and this model is {own}")
    if packed is not None and packed != is_packed:
        was, now = ("in four bits" if bits else "in floats" for bits in (packed, is_packed))
        hint = ": load it with load_in_4bit=True (--load-in-4bit)" * packed
        _warn(f"{directory}: the adapter was trained on a base {was}, and this one is {now}{hint}")


def _same(name: str, own: str) -> bool:
    """Whether two names are of one model: one path; or, where the first is no path on this machine, the same ending."""
    if name == own or os.path.realpath(name) == os.path.realpath(own):
        return True
    return not os.path.exists(name) and Path(name).name == Path(own).name


def _warn(what: str) -> None:
    warnings.warn(what, UserWarning, stacklevel=4)
