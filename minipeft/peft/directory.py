"""Adapter directories, as Hugging Face PEFT reads and writes them.

    adapter_config.json         the method's options
    adapter_model.safetensors   base_model.model.<path of the layer>.<key>: lora_A.weight, lora_embedding_A, ia3_l, ...;
                                modules_to_save as base_model.model.<path>.weight; prompts as prompt_embeddings

Where a target is called embed_tokens or lm_head, PEFT also writes the layer's own weight, <path>.base_layer.weight.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import asarray, to_numpy, xp_of
from ..files import FileError, read_json, read_safetensors, write_json, write_safetensors
from ..nn.module import Parameter
from .config import PeftConfig, PeftError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model."
EMBEDDINGS = ("embed_tokens", "lm_head")

METHODS = {  # peft_type in a file -> module and class
    "LORA": ("lora", "LoraConfig"),
    "IA3": ("ia3", "IA3Config"),
    "LN_TUNING": ("ln_tuning", "LNTuningConfig"),
    "BITFIT": ("bitfit", "BitFitConfig"),
    "VERA": ("vera", "VeraConfig"),
    "ADALORA": ("adalora", "AdaLoraConfig"),
    "BOTTLENECK": ("bottleneck", "BottleneckConfig"),
    "PROMPT_TUNING": ("prompt_tuning", "PromptTuningConfig"),
    "PREFIX_TUNING": ("prefix_tuning", "PrefixTuningConfig"),
    "P_TUNING": ("p_tuning", "PromptEncoderConfig"),
}


def config_class(peft_type: str) -> type[PeftConfig]:
    """The configuration class of a method, by its name in files; its module is imported only now."""
    module, name = METHODS[peft_type]
    return getattr(importlib.import_module(f".{module}", __package__), name)


def state(model: Any, adapter_name: str) -> dict[str, Parameter]:
    """{key in a file: parameter} of a named adapter."""
    found: dict[str, Parameter] = {}
    for path, adapter in model.parts(adapter_name):
        for key, parameter in adapter.saved().items():
            found[key if key.startswith(PREFIX) or not path else f"{PREFIX}model.{path}.{key}"] = parameter
    return found


def _base_weights(model: Any, adapter_name: str) -> dict[str, Parameter]:
    """The weights of adapted embeddings and heads under the keys that PEFT gives them."""
    paths = [p for p, _ in model.parts(adapter_name) if p.rpartition(".")[2] in EMBEDDINGS]
    saved = state(model, adapter_name)
    keys = {p: f"{PREFIX}model.{p}.base_layer.weight" for p in paths if f"{PREFIX}model.{p}.weight" not in saved}
    return {
        key: model.layers[p].base_layer.weight
        for p, key in keys.items()
        if hasattr(model.layers[p].base_layer, "weight")
    }


def save_adapter(model: Any, adapter_name: str, directory: str | os.PathLike) -> None:
    """Write one adapter. Each file appears whole or not at all, the configuration last."""
    directory = Path(directory)
    config = model.peft_config[adapter_name]
    arrays = {
        key: to_numpy(p.data) for key, p in {**state(model, adapter_name), **_base_weights(model, adapter_name)}.items()
    }
    parts = [part for _, part in model.parts(adapter_name)]
    options = {**config.saved_as(parts).to_dict(), "inference_mode": True}
    if options["task_type"] is None and hasattr(model.base_model, "lm_head"):
        options["task_type"] = "CAUSAL_LM"  # PEFT adds AdaLoRA's penalty, and finds a prompt's model, by it
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / WEIGHTS, arrays, {"format": "pt"})
    write_json(directory / CONFIG, dict(sorted(options.items())))


def read_adapter(directory: str | os.PathLike) -> tuple[PeftConfig, dict[str, np.ndarray]]:
    """(configuration, arrays by key) of an adapter directory; nothing outside of it is read.

    Raises FileError for what is missing or damaged, PeftError for a method or an option that is
    unknown here.
    """
    directory = Path(directory)
    options = read_json(directory / CONFIG)
    if not isinstance(options, dict) or "peft_type" not in options:
        raise FileError(f"{directory / CONFIG}: not an adapter's configuration (no peft_type)")
    if options["peft_type"] not in METHODS:
        raise PeftError(f"{directory / CONFIG}: the method {options['peft_type']!r} is not one of {', '.join(METHODS)}")
    config = config_class(options["peft_type"]).from_dict(options)
    if not (directory / WEIGHTS).exists() and (directory / "adapter_model.bin").exists():
        raise FileError(
            f"{directory}: the weights are a pickle (adapter_model.bin), which is never read; save them as safetensors"
        )
    return config, read_safetensors(directory / WEIGHTS)[0]


def load_arrays(model: Any, adapter_name: str, arrays: dict[str, np.ndarray], directory: str | os.PathLike) -> None:
    """Give a named adapter the arrays of a file: exactly the keys it has, in its shapes.

    Raises PeftError, with nothing changed, otherwise.
    """
    expected, optional = state(model, adapter_name), _base_weights(model, adapter_name)
    missing = [key for key in expected if key not in arrays]
    unexpected = [key for key in arrays if key not in expected and key not in optional]
    if missing or unexpected:
        listed = [
            f"{what} {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}"
            for what, keys in (("lacks", missing), ("has unexpected", unexpected))
            if keys
        ]
        raise PeftError(f"{directory}: the adapter does not fit this model; its file {' and '.join(listed)}")
    known = {**optional, **expected}
    for key, array in arrays.items():
        if array.shape != known[key].shape:
            raise PeftError(f"{directory}: {key} has the shape {array.shape}; this model needs {known[key].shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise PeftError(f"{directory}: {key} holds values that are not finite")
    for key, array in arrays.items():
        parameter = known[key]
        if key in optional and np.array_equal(to_numpy(parameter.data), array):
            continue  # the base's own array stays shared
        parameter.data = asarray(np.array(array, dtype=parameter.dtype), xp_of(parameter.data))
