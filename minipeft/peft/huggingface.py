"""Adapters as Hugging Face PEFT reads and writes them: directories, names, options, and what is refused.

    adapter_config.json         the method's options
    adapter_model.safetensors   base_model.model.<path of the layer>.<key>: lora_A.weight, lora_embedding_A, ia3_l, ...;
                                modules_to_save as base_model.model.<path>.weight; prompts as prompt_embeddings

Where a target is called embed_tokens or lm_head, PEFT also writes the weights of all adapted embeddings and heads,
<path>.base_layer.weight. Around a model with a prompt, modules_to_save are base_model.<path>.weight.

PEFT has no LoRA on parts of a fused layer, and its OLoRA decomposes the transposed weights of GPT-2's [in, out] layers.
Such an adapter is saved as the plain LoRA of a higher rank that it equals.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import asarray, to_numpy, xp_of
from ..directory import replacing
from ..files import FileError, read_json, read_safetensors, write_json, write_safetensors
from ..nn.module import Parameter, some
from .config import PeftConfig
from .prompt_learning import MODULE_OPTIONS, PromptLearningConfig
from .provenance import CONFIG, WEIGHTS, config_path, metadata_of
from .targets import PeftError, kind_of

PREFIX = "base_model."
EMBEDDINGS = ("embed_tokens", "lm_head")

PEFT_TYPES: dict[str, Any] = {  # peft_type in a file -> class: its name in this package, or itself (`methods.register`)
    "LORA": "LoraConfig",
    "IA3": "IA3Config",
    "LN_TUNING": "LNTuningConfig",
    "BITFIT": "BitFitConfig",
    "VERA": "VeraConfig",
    "ADALORA": "AdaLoraConfig",
    "LOHA": "LoHaConfig",
    "LOKR": "LoKrConfig",
    "OFT": "OFTConfig",
    "BOTTLENECK": "BottleneckConfig",
    "TRAINABLE_TOKENS": "TrainableTokensConfig",
    "PROMPT_TUNING": "PromptTuningConfig",
    "PREFIX_TUNING": "PrefixTuningConfig",
    "P_TUNING": "PromptEncoderConfig",
}

# Options of PEFT's files that change nothing about what a saved adapter computes: of all methods, and of one
NEUTRAL = frozenset(
    "peft_type peft_version auto_mapping revision megatron_config megatron_core qalora_group_size init_weights "
    "eva_config corda_config lora_ga_config loftq_config".split()
)
NEUTRAL_OF = {
    "ADALORA": {"r", "fan_in_fan_out"},
    "IA3": {"init_ia3_weights"},
    "PROMPT_TUNING": {"tokenizer_kwargs"},
    "P_TUNING": {"encoder_num_layers", "encoder_dropout"},
}
OURS = ("enable_lora", "folded", "prompt_tuning_init_ids")  # options that PEFT does not have
STARTS_WITHOUT_TRACE = ("eva", "orthogonal", "mica")  # init_lora_weights of which a trained file holds nothing


def config_class(peft_type: str) -> type[PeftConfig]:
    """The configuration class of a method, by its name in files (else KeyError); its module is imported only now."""
    found = PEFT_TYPES[peft_type]
    return getattr(importlib.import_module(__package__), found) if isinstance(found, str) else found


# ------------------------------------------------------------------------------------------------------------- options


def to_dict(config: PeftConfig) -> dict[str, Any]:
    """What adapter_config.json says of a configuration."""
    options = {"peft_type": config.peft_type, **dataclasses.asdict(config)}
    for name in (*OURS, *(MODULE_OPTIONS if isinstance(config, PromptLearningConfig) else ())):
        options.pop(name, None)
    if "fan_in_fan_out" in options:
        options["fan_in_fan_out"] = bool(config.fan_in_fan_out)
    if options.get("prompt_tuning_init") == "TEXT" and not config.tokenizer_name_or_path:
        options["prompt_tuning_init"] = "RANDOM"  # PEFT asks TEXT for a tokenizer even of a trained prompt
    return options


def from_dict(cls: type[PeftConfig], options: dict[str, Any]) -> Any:
    """The configuration of an adapter_config.json.

    Raises PeftError naming each option that this package does not know and that is set to something: it would change
    the result; and each that the method needs and the file lacks.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    own = NEUTRAL_OF.get(cls.peft_type, set())
    neutral = NEUTRAL | own
    unset = [None, False, "none", [], {}]
    refused = {k: v for k, v in options.items() if k not in known | neutral and v not in unset}
    if refused:
        listed = ", ".join(f"{k}={v!r}" for k, v in sorted(refused.items()))
        raise PeftError(f"the adapter uses options that {cls.__name__} does not have: {listed}")
    given = {k: v for k, v in options.items() if k in known - own}
    needed = [f.name for f in dataclasses.fields(cls) if dataclasses.MISSING is f.default is f.default_factory]
    if lacking := [name for name in needed if name not in given]:
        raise PeftError(f"the adapter's configuration lacks {', '.join(lacking)}, which {cls.__name__} needs")
    if "fan_in_fan_out" in given:
        given["fan_in_fan_out"] = None  # PEFT's files say it of models as a whole, in which each layer knows its own
    if "folded" in known and given.get("inference_mode"):
        given["folded"] = True
    if given.get("init_lora_weights") in STARTS_WITHOUT_TRACE:
        given["init_lora_weights"] = True
    return cls(**given)


# -------------------------------------------------------------------------------------------------------------- arrays


def _plain_rank(model: Any, config: Any) -> int | None:
    """How many times the rank is, of the plain LoRA that an adapter is saved as; None: it is saved as it is."""
    if getattr(config, "enable_lora", None):
        return sum(config.enable_lora)
    return 2 if getattr(config, "init_lora_weights", None) == "olora" and _has_conv1d(model, config) else None


def _has_conv1d(model: Any, config: PeftConfig) -> bool:
    return any(config.targets(path, "conv1d") and kind_of(x.base_layer) == "conv1d" for path, x in model.layers.items())


def _as_plain(config: Any, times: int) -> Any:
    """The configuration of that plain LoRA: the same scaling at `times` the rank."""
    factor = math.sqrt(times) if config.use_rslora else times
    return config.replace(
        r=config.r * times,
        lora_alpha=config.lora_alpha * factor,
        rank_pattern={k: v * times for k, v in config.rank_pattern.items()},
        alpha_pattern={k: v * factor for k, v in config.alpha_pattern.items()},
        enable_lora=None,
        init_lora_weights=True,
    )


def state(model: Any, adapter_name: str) -> dict[str, Parameter]:
    """{key in a file: parameter} of a named adapter."""
    found: dict[str, Parameter] = {}
    plain = _plain_rank(model, model.peft_config[adapter_name])
    for path, adapter in model.parts(adapter_name):
        saved = adapter.saved()
        if plain and hasattr(adapter, "factors"):
            saved |= {f"lora_{key}.weight": Parameter(p.data) for key, p in zip("AB", adapter.factors())}
        for key, parameter in saved.items():
            found[key if key.startswith(PREFIX) or not path else f"{_prefix(model, adapter_name)}{path}.{key}"] = parameter
    return found


def _prefix(model: Any, adapter_name: str) -> str:
    """Before a module's path in a file; around a model with a prompt alone PEFT puts one module less."""
    return PREFIX if isinstance(model.peft_config[adapter_name], PromptLearningConfig) else f"{PREFIX}model."


def _base_weights(model: Any, adapter_name: str, read: bool = False) -> dict[str, Parameter]:
    """The weights of adapted embeddings and heads under the keys that PEFT gives them; none beside trained tokens.

    Not of 4-bit layers, whose bytes are no weight, nor where the start is taken off the weight (PiSSA, OLoRA): PEFT's
    is another one then. To `read`, of embeddings under any name: PEFT writes all where one is so called.
    """
    saved, found = state(model, adapter_name), {}
    config = model.peft_config[adapter_name]
    if config.peft_type == "TRAINABLE_TOKENS" or getattr(config, "trainable_token_indices", None):
        return found
    for path, adapter in model.parts(adapter_name):
        layer = model.layers[path].base_layer if path else None
        named = path.rpartition(".")[2] in EMBEDDINGS or (read and kind_of(layer) == "embedding")
        if named and f"{_prefix(model, adapter_name)}{path}.weight" not in saved and hasattr(layer, "weight"):
            if layer.weight.dtype.kind == "f" and not adapter.frozen:
                found[f"{PREFIX}model.{path}.base_layer.weight"] = layer.weight
    return found


# --------------------------------------------------------------------------------------------------------- directories


def save_adapter(model: Any, adapter_name: str, directory: str | os.PathLike) -> None:
    """Write one adapter, whole or not at all. Raises PeftError, before that, for an option that JSON cannot hold."""
    config = model.peft_config[adapter_name]
    saved = {**state(model, adapter_name), **_base_weights(model, adapter_name)}
    arrays = {key: to_numpy(p.data) for key, p in saved.items()}
    plain = _plain_rank(model, config)
    options = {**(_as_plain(config, plain) if plain else config).to_dict(), "inference_mode": True}
    if "fan_in_fan_out" in options:
        options["fan_in_fan_out"] = _has_conv1d(model, config)
    if options["task_type"] is None and hasattr(model.base_model, "lm_head"):
        options["task_type"] = "CAUSAL_LM"  # PEFT adds AdaLoRA's penalty, and finds a prompt's model, by it
    for name, value in options.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PeftError(f"{name} is {value!r}, which a file cannot hold: {error}") from error
    with replacing(directory) as fresh:
        write_json(fresh / CONFIG, dict(sorted(options.items())))
        write_safetensors(fresh / WEIGHTS, arrays, {"format": "pt", **metadata_of(model.base_model)})


def read_options(path: str | os.PathLike, known: Iterable[str] = PEFT_TYPES) -> dict[str, Any]:
    """The content of an adapter_config.json, or of its directory's, for one of the `known` methods.

    Raises FileError for what is no such file, PeftError for a method that is not known.
    """
    path = config_path(path) if Path(path).is_dir() else path
    options = read_json(path)
    if "peft_type" not in options:
        raise FileError(f"{path}: not an adapter's configuration (no peft_type)")
    if not isinstance(options["peft_type"], str) or options["peft_type"] not in known:
        listed = f"{', '.join(known)}; import the module that registers one of your own (--plugin MODULE)"
        raise PeftError(f"{path}: the method {options['peft_type']!r} is not one of {listed}")
    return options


def read_config(path: str | os.PathLike, **fixed: Any) -> PeftConfig:
    """The configuration of an adapter_config.json, or of its directory's, with these options in place of its own.

    Raises as `read_options`, and PeftError for an option that is unknown here.
    """
    options = read_options(path)
    return config_class(options["peft_type"]).from_dict({**options, **fixed})


def read_adapter(directory: str | os.PathLike) -> tuple[PeftConfig, dict[str, np.ndarray]]:
    """(configuration, arrays by key) of an adapter directory; nothing outside of it is read.

    Raises FileError for what is missing or damaged, PeftError for a method or an option that is unknown here.
    """
    directory = Path(directory)
    # whatever it says, a file holds what a trained adapter computes: a prompt's vectors, not their network
    config = read_config(directory, inference_mode=True)
    if not (directory / WEIGHTS).exists() and (directory / "adapter_model.bin").exists():
        raise FileError(f"{directory}: adapter_model.bin is a pickle, which is never read; save it as safetensors")
    return config, read_safetensors(directory / WEIGHTS)[0]


def load_arrays(model: Any, adapter_name: str, arrays: dict[str, np.ndarray], directory: str | os.PathLike) -> None:
    """Give a named adapter the arrays of a file, with which it starts: exactly the keys it has, in its shapes.

    Raises PeftError, with nothing changed, otherwise; and for an OLoRA of PEFT on GPT-2's layers.
    """
    if _plain_rank(model, model.peft_config[adapter_name]):
        what = "neither enable_lora nor init_lora_weights='olora' on GPT-2's [in, out] layers"
        raise PeftError(f"{directory}: {what} is read from a file; PEFT's OLoRA does not start at the base there")
    for path, adapter in model.parts(adapter_name):
        adapter.loading(model.layers[path].base_layer if path else model.base_model)
    expected, optional = state(model, adapter_name), _base_weights(model, adapter_name, read=True)
    of_base = {f"{PREFIX}model.{path}.base_layer.weight" for path, _ in model.parts(adapter_name)} - {*optional}
    arrays = {key: array for key, array in arrays.items() if key not in of_base}  # the base's own are meant
    missing = [key for key in expected if key not in arrays]
    unexpected = [key for key in arrays if key not in expected and key not in optional]
    if missing or unexpected:
        wrong = f"its file lacks {some(missing)} and has unexpected {some(unexpected)}"
        raise PeftError(f"{directory}: the adapter does not fit this model; {wrong}")
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
    model.mark_start(adapter_name)
