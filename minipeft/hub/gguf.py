"""GGUF files, llama.cpp's format: metadata, tokenizer and weights of a model in one file. Read, never written.

    "GGUF" version   number of tensors   number of metadata entries
    metadata         key, type, value        general.architecture = "llama", llama.block_count = 30, tokenizer.ggml.tokens, ...
    tensor table     name, shape (fastest axis first), block format, offset
    data             from the next multiple of general.alignment

The `gguf` package turns the blocks of a quantized tensor (32 or 256 weights of a row that share their scales) into
float32. Tensor names are llama.cpp's and are translated here. One thing about the values differs, too: llama.cpp's
rotary embedding for the architecture "llama" turns the pairs (0, 1), (2, 3), ... of a head, Hugging Face's (0, D/2),
(1, D/2 + 1), ...; the rows of the query and key projections are put back into Hugging Face's order.

The header is read here and not by gguf.GGUFReader (version 0.19), which does not check lengths against the end of the
file: a file of 1 KB that announces an array of 2^40 numbers keeps it busy without end (0.9 GB after 10 seconds). It
is also slower: 1.4 seconds against 0.05 for a vocabulary of 49,152 tokens.

Source: the specification in ggml's repository, docs/gguf.md; llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..files import FileError, MappedFile, StoredTensor
from ..lazy import extra
from ..nn.transformer import RopeScaling, TransformerConfig
from ..text.tokenizer import Tokenizer
from .configuration import FIELDS, HubError, from_hugging_face, naming, our_name
from .gguf_tokenizer import tokenizer_of

_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_CHUNK = 1 << 20  # weights dequantized together

# llama.cpp's names -> Hugging Face's, for each architecture
_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "blk.*.attn_norm": "model.layers.*.input_layernorm", "blk.*.ffn_norm": "model.layers.*.post_attention_layernorm",
    "blk.*.attn_q": "model.layers.*.self_attn.q_proj", "blk.*.attn_k": "model.layers.*.self_attn.k_proj",
    "blk.*.attn_v": "model.layers.*.self_attn.v_proj", "blk.*.attn_output": "model.layers.*.self_attn.o_proj",
    "blk.*.ffn_gate": "model.layers.*.mlp.gate_proj", "blk.*.ffn_up": "model.layers.*.mlp.up_proj",
    "blk.*.ffn_down": "model.layers.*.mlp.down_proj",
}  # fmt: skip
_GPT2_NAMES = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "blk.*.attn_norm": "transformer.h.*.ln_1", "blk.*.ffn_norm": "transformer.h.*.ln_2",
    "blk.*.attn_qkv": "transformer.h.*.attn.c_attn", "blk.*.attn_output": "transformer.h.*.attn.c_proj",
    "blk.*.ffn_up": "transformer.h.*.mlp.c_fc", "blk.*.ffn_down": "transformer.h.*.mlp.c_proj",
}  # fmt: skip
_NAMES = {"llama": _LLAMA_NAMES, "qwen2": _LLAMA_NAMES, "gpt2": _GPT2_NAMES}
# our names of a configuration's fields -> the metadata's
_KEYS = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "layer_norm_epsilon": "attention.layer_norm_epsilon",
}  # fmt: skip


def read_gguf(path: Path) -> tuple[TransformerConfig, dict[str, StoredTensor], Tokenizer | None]:
    """(configuration, tensors by their Hugging Face names, tokenizer or None) of a .gguf file; no weight is read yet.

    Raises HubError for an architecture, an option or a block format that is not supported and where the package `gguf` is
    missing, FileError for a file that is truncated or no GGUF.
    """
    file = MappedFile(path) if path.stat().st_size else None
    header = _Header(path, file)
    with naming(path):
        kind, files = header.metadata.get("general.type", "model"), header.metadata.get("split.count", 0)
        if kind != "model":
            raise HubError(f"general.type is {kind!r}: only a model is read")
        if files not in (0, 1):
            raise HubError(f"split.count is {files!r}: the model is in several files; llama-gguf-split merges them")
        architecture = header.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in _NAMES:
            raise HubError(f"the architecture is {architecture!r}: only {', '.join(_NAMES)} are supported")
        config = from_hugging_face(_configuration(architecture, header))
        config, tensors = _tensors(architecture, config, header)
        return config, tensors, tokenizer_of(header.metadata)


class _Header:
    """What stands before the weights: `metadata`, and `tensors`: name -> (shape, block format, begin, end)."""

    def __init__(self, path: Path, file: MappedFile | None):
        self.path, self.file, self._at = path, file, 4
        self._bytes = memoryview(b"" if file is None else file.view(0, len(file)))
        magic = bytes(self._bytes[:4])
        if magic != b"GGUF":
            raise FileError(f"{path}: not a GGUF file: it begins with {magic!r}, not with b'GGUF'")
        version = self._integer(4)
        if version not in (2, 3):
            raise FileError(f"{path}: GGUF version {version} is not supported, only 2 and 3 (little-endian)")
        n_tensors, n_entries = self._integer(8), self._integer(8)
        self.metadata = {self._string(): self._value(self._integer(4)) for _ in range(n_entries)}
        table = [self._entry() for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise FileError(f"{path}: general.alignment must be a positive integer, not {alignment!r}")
        start = -(-self._at // alignment) * alignment
        self.tensors: dict[str, tuple[tuple[int, ...], Any, int, int]] = {}
        for name, shape, kind, offset in table:
            if name in self.tensors:
                raise FileError(f"{path}: damaged: there are two tensors {name!r}")
            self.tensors[name] = self._place(name, shape, kind, start + offset)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, number of the block format, offset) of a tensor."""
        name, axes = self._string(), self._integer(4)
        if axes > 4:
            raise FileError(f"{self.path}: damaged: the tensor {name!r} has {axes} axes")
        shape = tuple(reversed([self._integer(8) for _ in range(axes)]))
        return name, shape, self._integer(4), self._integer(8)

    def _place(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> tuple[tuple[int, ...], Any, int, int]:
        gguf = _gguf()
        try:
            format_ = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise HubError(f"{self.path}: {name} has the block format {kind}, which the package gguf does not know") from None
        block, size = gguf.GGML_QUANT_SIZES[format_]
        if not math.prod(shape) or not shape or shape[-1] % block:
            raise FileError(f"{self.path}: damaged: {name} of shape {shape} is not made of {format_.name}'s blocks of {block}")
        end = begin + math.prod(shape) // block * size
        if end > len(self._bytes):
            raise FileError(f"{self.path}: truncated: {name} ends at byte {end}, the file at {len(self._bytes)}")
        return shape, format_, begin, end

    def _take(self, size: int) -> memoryview:
        end = self._at + size
        if end > len(self._bytes):
            raise FileError(f"{self.path}: truncated or damaged: its header goes on beyond byte {len(self._bytes)}, the last")
        part, self._at = self._bytes[self._at : end], end
        return part

    def _integer(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _string(self) -> str:
        try:
            return str(self._take(self._integer(8)), "utf-8")
        except UnicodeDecodeError as error:
            raise FileError(f"{self.path}: damaged: a string before byte {self._at} is not UTF-8 ({error.reason})") from error

    def _numbers(self, kind: int, length: int) -> list:
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(length * dtype.itemsize), dtype).tolist()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _NUMBERS:
            (value,) = self._numbers(kind, 1)
            return float(str(np.float32(value))) if kind == _FLOAT32 else value  # 1e-05, not 9.999999747378752e-06
        if kind == _ARRAY:
            kind, length = self._integer(4), self._integer(8)
            if kind in _NUMBERS:
                return self._numbers(kind, length)
            if kind == _STRING:
                return [self._string() for _ in range(length)]
        raise FileError(f"{self.path}: damaged: a metadata value before byte {self._at} has the type {kind}")


def _configuration(architecture: str, header: _Header) -> dict[str, Any]:
    """The metadata as the content of a config.json. Raises HubError for an option that our model does not compute."""
    metadata, tensors = header.metadata, header.tensors

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    if "token_embd.weight" not in tensors:
        raise HubError("there is no tensor token_embd.weight, the embedding")
    d, heads = value("embedding_length"), value("attention.head_count")
    content = {
        "model_type": architecture,
        "vocab_size": tensors["token_embd.weight"][0][0],
        "tie_word_embeddings": "output.weight" not in tensors,
        **{f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()},
    }
    ours = {name: our_name(name) for name in FIELDS[architecture]}
    content |= {name: value(_KEYS[our]) for name, our in ours.items() if our in _KEYS}
    if architecture == "gpt2":
        return content | {"resid_pdrop": 0.0}
    head_dim = value("attention.key_length", d // heads if isinstance(d, int) and isinstance(heads, int) and heads else None)
    supported = dict.fromkeys(("attention.value_length", "rope.dimension_count"), head_dim)
    supported |= {"rope.scaling.type": "none", "expert_count": 0, "attention.sliding_window": value("context_length")}
    if value("rope.scaling.type") != "none":  # without a type, llama.cpp scales linearly
        supported |= dict.fromkeys(("rope.scaling.factor", "rope.scale_linear"), 1.0)
    for key, only in supported.items():
        if value(key) not in (None, only) and not (key.startswith("rope.scal") and value(key) == 0):
            raise HubError(f"{architecture}.{key} is {value(key)!r}: only {only!r} is supported")
    return content | {
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": value("rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
    }


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _tensors(
    architecture: str, config: TransformerConfig, header: _Header
) -> tuple[TransformerConfig, dict[str, StoredTensor]]:
    """The tensors under Hugging Face's names, and the configuration with the rotary scaling that stands among them."""
    found: dict[str, StoredTensor] = {}
    for name, (shape, format_, begin, end) in header.tensors.items():
        _check_format(name, format_)
        arrange = _arrangement(architecture, name, config)
        read = partial(_read, header.file, begin, end, shape, format_, arrange)
        own = format_.name not in _PLAIN or arrange is not None
        dtype = np.dtype(_PLAIN.get(format_.name, np.float32))
        if arrange is not None:
            shape = arrange(np.broadcast_to(np.float32(0), shape)).shape
        stored = StoredTensor(shape, dtype, not own, read, partial(header.file.release, begin, end))
        if name == "rope_freqs.weight" and architecture == "llama":
            config = config.replace(rope_scaling=_llama3_scaling(stored.read(), config))
        else:
            found[_hugging_face_name(architecture, name)] = stored
    return config, found


_PLAIN = {"F32": np.float32, "F16": np.float16}


def _hugging_face_name(architecture: str, name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    number, part, kind = match.groups() if match else ("", "", "")
    target = _NAMES[architecture].get(f"blk.*.{part}" if number else part)
    if target is None:
        raise HubError(f"the tensor {name!r} is not one of {architecture}'s")
    return f"{target.replace('*', number or '')}.{kind}"


def _arrangement(architecture: str, name: str, config: TransformerConfig) -> Callable[[np.ndarray], np.ndarray] | None:
    """The function that puts a tensor's values into Hugging Face's order; None where they are in it already."""
    part, _, kind = name.rpartition(".")
    part = part.rpartition(".")[2]
    if architecture == "gpt2" and kind == "weight" and part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
        return lambda w: np.ascontiguousarray(w.T)  # Conv1D's [in, out]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part)
    if architecture == "llama" and heads:
        return partial(_halves_from_pairs, heads=heads)
    return None


def _halves_from_pairs(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows (0, 1), (2, 3), ... of each head to the places (0, D/2), (1, D/2 + 1), ...: [heads * D, ...] -> the same."""
    if w.shape[0] % (2 * heads):
        raise HubError(f"a projection of {w.shape[0]} rows is not one of {heads} heads")
    return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _read(file: MappedFile, begin: int, end: int, shape: tuple[int, ...], format_: Any, arrange: Any) -> np.ndarray:
    raw = file.view(begin, end)
    if format_.name in _PLAIN:
        values = raw.view(_PLAIN[format_.name]).reshape(shape)
    else:
        values = np.empty(shape, np.float32)
        out = values.reshape(-1, shape[-1])
        rows = raw.reshape(len(out), -1)
        step = max(1, _CHUNK // shape[-1])  # dequantizing all of it at once would take twice its float32 size
        for i in range(0, len(rows), step):
            out[i : i + step] = _gguf().quants.dequantize(rows[i : i + step], format_)
    return values if arrange is None else arrange(values)


def _check_format(name: str, format_: Any) -> None:
    gguf = _gguf()
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[format_][1]), np.uint8), format_)
    except NotImplementedError:
        raise HubError(f"{name} has the block format {format_.name}, which the package gguf cannot dequantize") from None


def _llama3_scaling(factors: np.ndarray, config: TransformerConfig) -> RopeScaling:
    """The rotary scaling behind `rope_freqs`, the numbers [head_dim / 2] by which llama.cpp divides each frequency.

    A file holds these numbers only, not the options they follow from; in Llama 3.1 and 3.2 only the factor differs.
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-np.arange(half) / half)
    with naming("rope_freqs.weight", ValueError):
        scaling = RopeScaling(max(1.0, float(factors.max(initial=1))), 1.0, 4.0, 8192)
    if factors.shape != (half,) or not np.allclose(frequency / scaling(frequency), factors, rtol=1e-4):
        raise HubError("rope_freqs.weight holds frequency factors other than those of Llama 3.1 and 3.2: not supported")
    return scaling


def _gguf() -> Any:
    with naming(error=ImportError):
        return extra("gguf", "hub", "reading a .gguf file")
