"""Hugging Face directories and GGUF files <-> our models: the ecosystem's format is our own format.

    config.json                 the shape, the family, what the head is for          see configuration.py
    model.safetensors           the weights, under their family's names              or several files and an index
    tokenizer.json, ...         the tokenizer, where there is one                    see text/tokenizer.py
    model.gguf                  all of it in one file, read but never written        see gguf.py

Module trees, names and orientations are those of the family, so nothing in a directory is renamed or transposed.
Weights are read one tensor at a time from a memory map, so there is never a second copy of a model.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import asarray, get_backend, to_numpy
from ..directory import replacing
from ..files import FileError, StoredTensor, map_safetensors, read_json, unfinished, write_json, write_safetensors
from ..nn.heads import SequenceClassifier
from ..nn.layers import Conv1D, Linear
from ..nn.module import Module, Parameter, some
from ..nn.transformer import Transformer, TransformerConfig
from ..options import check_flags
from ..quant import Linear4bit
from ..quant.surgery import quantizable_layers, quantized_layers
from ..text.tokenizer import OTHERS, Tokenizer
from .configuration import HubError, from_hugging_face, naming, to_hugging_face
from .gguf import read_gguf
from .quantized import dense_parameters, quantization_config, split_quantization, take_quantized

__all__ = ["HubError", "from_pretrained", "save_pretrained"]

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_CLASS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "gpt2": "GPT2"}  # how a family's classes are called
_LANGUAGE_MODEL = {family: f"{name}ForCausalLM" for family, name in _CLASS.items()} | {"gpt2": "GPT2LMHeadModel"}
_CLASSIFIER = {family: f"{name}ForSequenceClassification" for family, name in _CLASS.items()}
_BARE = {family: f"{name}Model" for family, name in _CLASS.items()}  # has a head only where it is tied to the embedding
_BUFFERS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")  # constants in older checkpoints
_DTYPES = ("float16", "float32")


# ---------------------------------------------------------------------------------------------------------- writing


def save_pretrained(
    model: Transformer | SequenceClassifier,
    path: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
) -> None:
    """Write a directory that `transformers` loads as it is: LlamaForCausalLM, GPT2LMHeadModel, ... or their classifiers.

    Args:
        path: the directory; made if missing. A model that is already there is replaced by the whole new one, or not at
            all (see `minipeft.directory`).
        tokenizer: written beside the model, as AutoTokenizer reads it; None leaves a tokenizer that is there.
        dtype: "float32" or "float16", of the stored weights; None keeps each as it is.

    A tied head is written once, layers in four bits as bitsandbytes has them. Everything is checked before anything is
    written.

    Raises HubError for another class of model or dtype, a path that is a file, layers that have been replaced by others
    (merge adapters first), and values that float16 cannot hold; DirectoryInUse where another process writes there.
    """
    if not isinstance(model, Transformer | SequenceClassifier):
        what = f"a Transformer or a SequenceClassifier, not a {type(model).__name__}"
        if hasattr(model, "merge_and_unload"):
            what += ": model.save_pretrained(path) writes its adapters, model.merge_and_unload() makes a plain model"
        raise HubError(f"save_pretrained writes {what}")
    if dtype is not None and dtype not in _DTYPES:
        raise HubError(f"dtype must be 'float32' or 'float16', not {dtype!r}")
    model = _with_conv1d(model)
    _check_plain(model)
    floats = dense_parameters(model)
    weights = {n: _cast(n, to_numpy(a), dtype if n in floats else None) for n, a in model.state_dict().items()}
    content = to_hugging_face(model.config, np.result_type(*[weights[name] for name in floats]).name)
    quantization = quantization_config(model)
    if quantization is not None:
        content["quantization_config"] = quantization
    content["architectures"] = [_architecture(model)]
    if isinstance(model, SequenceClassifier):
        content["id2label"] = model.id2label
        content["label2id"] = {label: int(i) for i, label in model.id2label.items()}

    path = Path(path)
    if path.exists() and not path.is_dir():
        raise HubError(f"{path}: is a file; a model is written as a directory")
    if (path / "adapter_config.json").exists():
        raise HubError(f"{path}: holds an adapter, which transformers would put on the model: write it to another directory")
    with replacing(path, (*_stale(path, model), *(OTHERS if tokenizer is not None else ()))) as fresh:
        write_json(fresh / _CONFIG, dict(sorted(content.items())))
        if tokenizer is not None:
            tokenizer.save(fresh)
        write_safetensors(fresh / _WEIGHTS, weights, {"format": "pt"})


def _stale(path: Path, model: Module) -> list[str]:
    """The generation_config.json that is there, where it does not end texts as the model's configuration does."""
    file = path / "generation_config.json"
    if not file.is_file():
        return []
    try:
        there = read_json(file).get("eos_token_id")
    except FileError:
        return []  # nothing that would be read
    ends = [set(np.atleast_1d(ids).tolist()) if ids is not None else set() for ids in (there, model.config.eos_token_id)]
    return [file.name] if ends[0] and not ends[1] <= ends[0] else []


def _architecture(model: Module) -> str:
    return (_CLASSIFIER if isinstance(model, SequenceClassifier) else _LANGUAGE_MODEL)[model.config.model_type]


def _with_conv1d(model: Any) -> Any:
    """The model, with GPT-2's layers [in, out] again where four bits, merged or dequantized, have left them [out, in]."""
    ours, here = Transformer(model.config, seed=None).named_modules(), dict(model.named_modules())
    turned = [path for path, m in ours if isinstance(m, Conv1D) and type(here.get(path)) is Linear]
    made = model.copy(share=True) if turned else model
    for path in turned:
        layer = made.get_submodule(path)
        conv = Conv1D(layer.in_features, layer.out_features, seed=None)
        conv.weight, conv.bias = Parameter(layer.weight.data.T), layer.bias
        made.replace(path, conv)
    return made


def _check_plain(model: Transformer | SequenceClassifier) -> None:
    """Raises HubError unless the parameters are the configuration's, dense or quantized: no adapter, no untied head."""
    plain: Module = Transformer(model.config, seed=None)
    if isinstance(model, SequenceClassifier):
        plain = SequenceClassifier(plain, model.num_labels, seed=None)
    for path, layer in quantized_layers(model).items():
        plain.replace(path, layer)
    have, want = ({(name, p.shape) for name, p in m.named_parameters()} for m in (model, plain))
    differing = sorted({name for name, _ in have ^ want})
    if differing:
        raise HubError(
            f"{some(differing)} differ from what the configuration of a {_architecture(model)} describes: "
            "merge adapters before saving, or save the adapter by itself"
        )


def _cast(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array in a float dtype (None: its own); no copy where it has it. Raises HubError where float16 overflows."""
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if cast.dtype.itemsize < array.dtype.itemsize and not np.isfinite(cast).all() and np.isfinite(array).all():
        largest = float(np.abs(array).max())
        raise HubError(f"{name} holds values up to {largest:g}, which {dtype} cannot hold: keep a wider dtype")
    return cast


# ---------------------------------------------------------------------------------------------------------- reading


def from_pretrained(
    path: str | os.PathLike, dtype: str | None = None, backend: str | None = None, load_in_4bit: bool = False
) -> tuple[Transformer | SequenceClassifier, Tokenizer | None]:
    """Read a Hugging Face directory or a .gguf file: (model, tokenizer); the tokenizer is None where there is none.

    A directory: the families GPT-2, Llama, Mistral and Qwen2 as transformers 4 and 5 write them; one safetensors file, or
    several and an index; float16, bfloat16, float32 or float64 weights; a tied head written or not; GPT-2's weights also
    without their `transformer.` prefix and with the constant `attn.bias` buffers of older checkpoints. Sequence
    classifiers come as SequenceClassifier, layers that bitsandbytes quantized to four bits as Linear4bit.

    A .gguf file (extra `hub`): llama.cpp's architectures llama, qwen2 and gpt2, in any of its formats; weights are
    dequantized.

    Args:
        dtype: of the weights in memory: "float32" (by default) or "float16", a storage format that operations widen.
        backend: "numpy" or "cupy"; None asks MINIPEFT_BACKEND.
        load_in_4bit: the model that `quant.quantize_model` makes (NF4 with double quantization), frozen as a base for
            QLoRA. Layers are quantized one by one while they are read, so the peak of memory is the result and one
            tensor.

    The file is mapped into memory. Weights that have the wanted dtype stay there: they are read at their first use and
    cost no memory of their own until they are changed; a change never reaches the file. Others are converted tensor by
    tensor. So leave the file in its place, or replace it as a whole, while the model is in use.

    Nothing is downloaded and no pickle is read. Raises HubError for a path without a model, an architecture or option
    that our model does not compute (before any weight is read), and weights that do not fit the configuration;
    FileError for a damaged file; TypeError for a text as load_in_4bit.
    """
    check_flags(load_in_4bit=load_in_4bit)
    path, xp = Path(path), get_backend(backend)
    dtype = dtype or "float32"
    if dtype not in _DTYPES:
        raise HubError(f"dtype must be 'float32' or 'float16', not {dtype!r}")
    if path.suffix == ".gguf" and path.is_file():
        config, tensors, tokenizer = read_gguf(path)
        num_labels, quantized = None, False
    else:
        content = _read_config(path)
        with naming(path / _CONFIG):
            content, quantized = split_quantization(content)
            config, num_labels = _described(content)
        tensors = _map_weights(path)
        tokenizer = Tokenizer.load(path) if (path / "tokenizer.json").is_file() else None
    with naming(path):
        model = _unallocated_model(config, num_labels, len(tensors))
        layers = take_quantized(model, tensors) if quantized else {}
        for place, layer in layers.items():
            model.replace(place, layer.to(xp))
        _fit(model, tensors)
        _fill(model, tensors, dtype, xp, quantizable_layers(model) if load_in_4bit and not quantized else {})
    if num_labels is not None and isinstance(content.get("id2label"), dict):
        model.id2label = {str(i): str(label) for i, label in content["id2label"].items()}
    model.name_or_path = str(path)
    return (model.requires_grad_(False) if load_in_4bit else model), tokenizer


def _fill(model: Module, tensors: dict[str, StoredTensor], dtype: str, xp: Any, to_quantize: dict[str, Module]) -> None:
    """Give the model its weights, one tensor after the other; quantize the layers of `to_quantize` on the way."""
    parameters = dense_parameters(model)
    for name in list(parameters):
        stored = tensors.pop(name)
        mapped = _load(name, parameters.pop(name), stored, dtype, xp)
        layer = to_quantize.pop(name.removesuffix(".weight"), None)
        if layer is not None:
            model.replace(name.removesuffix(".weight"), Linear4bit.from_linear(layer))
        if layer is not None or not mapped:
            stored.release()
        del layer  # its float weights


def _load(name: str, parameter: Parameter, stored: StoredTensor, dtype: str, xp: Any) -> bool:
    """Give a parameter its values. Returns whether they are a view of the file."""
    values = stored.read()
    array = _cast(name, values, dtype)
    if not array.flags.aligned:  # a file's tensors begin where its header happens to end
        array = array.copy()
    parameter.data = asarray(array, xp)
    return stored.is_view and parameter.data is values


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        what = "is a file, but no .gguf" if path.exists() else f"no such {'file' if path.suffix == '.gguf' else 'directory'}"
        raise HubError(f"{path}: {what}; give a local Hugging Face directory or a .gguf file (nothing is ever downloaded)")
    if not (path / _CONFIG).is_file():
        what, ggufs = f"no model there{unfinished(path)}", sorted(file.name for file in path.glob("*.gguf"))
        if (path / "adapter_config.json").is_file():
            what = "it is an adapter's: load it with PeftModel.from_pretrained (--adapter), or merge it first (minipeft merge)"
        elif ggufs:
            what = f"give the path of the file instead: {some(ggufs)}"
        raise HubError(f"{path}: there is no {_CONFIG} in this directory; {what}")
    return read_json(path / _CONFIG)


def _described(content: dict[str, Any]) -> tuple[TransformerConfig, int | None]:
    """(configuration, number of labels of a classifier or None) of the model that a config.json describes."""
    config = from_hugging_face(content)
    family = config.model_type
    names = content.get("architectures") or [_LANGUAGE_MODEL[family]]
    known = [_LANGUAGE_MODEL[family], _CLASSIFIER[family], _BARE[family]]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in known:
        raise HubError(f"architectures is {names!r}: only one of {', '.join(known)} is supported")
    if names[0] != _CLASSIFIER[family]:
        return config, None
    if content.get("problem_type") == "multi_label_classification":
        raise HubError("problem_type 'multi_label_classification', several labels a text, has a loss that is not computed here")
    labels = content.get("id2label")
    count = len(labels) if isinstance(labels, dict) else content.get("num_labels", 2)
    if isinstance(labels, dict) and {*map(str, labels)} != {*map(str, range(len(labels)))}:
        raise HubError(f"id2label must name the classes 0 to {len(labels) - 1}, not {', '.join(map(str, labels))}")
    if type(count) is not int or not 1 <= count < 2**31:
        raise HubError(f"num_labels must be a positive integer, not {count!r}")
    return config, count


def _unallocated_model(config: TransformerConfig, num_labels: int | None, stored: int) -> Transformer | SequenceClassifier:
    """The model without its weights, of which this number of tensors is stored."""
    if config.num_hidden_layers > max(stored, 128):  # of fewer, `_fit` says which are missing
        raise HubError(f"the configuration has {config.num_hidden_layers} layers, and the weights are {stored} tensors")
    try:
        model = Transformer(config, seed=None)
        return model if num_labels is None else SequenceClassifier(model, num_labels, seed=None)
    except (ValueError, OverflowError) as error:
        raise HubError(f"no array has the shapes of this hidden_size, vocab_size, ... ({error})") from error


def _map_weights(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory's safetensors files, not read yet."""
    if (path / _WEIGHTS).is_file():
        return map_safetensors(path / _WEIGHTS)[0]
    index = path / _INDEX
    if not index.is_file():
        pickles = [p.name for pattern in ("*.bin", "*.pt*") for p in sorted(path.glob(pattern))]
        if pickles:
            raise HubError(
                f"{path}: the weights are only there as {some(pickles)}, a pickle, which can run code when it is read "
                f"and so is never read here; convert it once, where you trust it: with transformers, "
                f"AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained(DIR) writes safetensors"
            )
        raise HubError(f"{path}: there is neither {_WEIGHTS} nor {_INDEX} in this directory")
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise FileError(f"{index}: must hold an object 'weight_map' that names each tensor's file")
    tensors, here = {}, {file.name for file in path.iterdir() if file.is_file()}
    for file in sorted(set(placed.values())):
        if file not in here:
            raise FileError(f"{index}: names the file {file}, which is not in this directory")
        part = map_safetensors(path / file)[0]
        for name in (name for name, where in placed.items() if where == file):
            if name not in part:
                raise FileError(f"{index}: the tensor {name!r} is not in {file}, where it should be")
            tensors[name] = part[name]
    return tensors


def _fit(model: Transformer | SequenceClassifier, tensors: dict[str, StoredTensor]) -> None:
    """Give `tensors` the names of the model's parameters. Raises HubError unless names, shapes and dtypes fit."""
    prefix = "transformer." if model.config.model_type == "gpt2" else "model."
    for name in [name for name in tensors if _BUFFERS.search(name)]:
        del tensors[name]
    if not any(name.startswith(prefix) for name in tensors):  # saved from the bare backbone, as the original GPT-2 is
        for name in [name for name in tensors if name not in ("lm_head.weight", "score.weight")]:
            tensors[prefix + name] = tensors.pop(name)
    parameters = dense_parameters(model)
    if isinstance(model, Transformer) and model.config.tie_word_embeddings:
        embedding = next(name for name, p in parameters.items() if p is model.lm_head.weight)
        head = tensors.pop("lm_head.weight", None)
        if head is not None and embedding in tensors and not np.array_equal(head.read(), tensors[embedding].read()):
            raise HubError(f"tie_word_embeddings is true, but lm_head.weight differs from {embedding}")
    missing, unexpected = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or unexpected:
        names = f"missing {some(missing)}; unexpected {some(unexpected)}"
        raise HubError(f"the weights do not fit the configuration: {names}")
    for name, parameter in parameters.items():
        stored = tensors[name]
        if stored.shape != parameter.shape:
            raise HubError(f"{name} has the shape {stored.shape}, the configuration gives {parameter.shape}")
        if stored.dtype.kind != "f":
            raise HubError(f"{name} holds {stored.dtype}, no floating-point numbers; config.json names no quantization")
