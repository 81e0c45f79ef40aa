"""`config.json` of Hugging Face's families GPT-2, Llama, Mistral and Qwen2 <-> `TransformerConfig`.

Each family has its own names for the same things (`n_embd` is `hidden_size`), and the major versions of transformers
differ in a few: version 4 has `rope_theta`, `rope_scaling` and `torch_dtype`; version 5 has `rope_parameters`, which
holds the first two, and `dtype`. We read both and write both. An option under which our model would compute something
else is refused by its name, before any weight is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..nn.transformer import RopeScaling, TransformerConfig
from ..options import fits


class HubError(ValueError):
    """A directory holds no model that can be read, or a model cannot be written as one."""


@contextmanager
def naming(place: object = None, error: type[Exception] = HubError) -> Iterator[None]:
    """Inside, an `error` becomes a HubError that says at which place it is."""
    try:
        yield
    except error as e:
        raise HubError(str(e) if place is None else f"{place}: {e}") from e


_REQUIRED = object()
_SHAPE = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
_LLAMA = dict.fromkeys(_SHAPE, _REQUIRED) | {
    "num_key_value_heads": 0, "head_dim": 0, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "initializer_range": 0.02,
    "minipeft_dropout": 0.0,  # these families have no residual dropout: the key is ours
}  # fmt: skip
# Hugging Face's name -> what its configuration class assumes where config.json does not say
FIELDS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"attention_bias": False, "mlp_bias": False},
    "mistral": _LLAMA | {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": _LLAMA | {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "gpt2": dict.fromkeys("vocab_size n_embd n_layer n_head".split(), _REQUIRED)
    | {"n_inner": 0, "n_positions": 1024, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1}
    | {"tie_word_embeddings": True, "initializer_range": 0.02},
}
# Hugging Face's name -> ours, where they differ
_OURS = {
    "n_embd": "hidden_size", "n_inner": "intermediate_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_positions": "max_position_embeddings", "resid_pdrop": "dropout",
    "minipeft_dropout": "dropout",
}  # fmt: skip
_SPECIAL_IDS: dict[str, dict[str, int]] = {  # what its class assumes, too
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {},
    "gpt2": {"bos_token_id": 50256, "eos_token_id": 50256},
}

# the values under which the families compute what our model computes; an option that is absent or null has one of them
_COMMON = {"quantization_config": (), "add_cross_attention": (False,), "is_encoder_decoder": (False,)}
_LLAMA_SUPPORTED = _COMMON | {
    "hidden_act": ("silu", "swish"), "pretraining_tp": (1,), "partial_rotary_factor": (1,),
    "use_sliding_window": (False,), "rope_interleaved": (False,),
}  # fmt: skip
_SUPPORTED: dict[str, dict[str, tuple]] = {
    "llama": _LLAMA_SUPPORTED | {"sliding_window": ()},
    "mistral": _LLAMA_SUPPORTED,
    "qwen2": _LLAMA_SUPPORTED,  # whose sliding_window means nothing unless it is used
    "gpt2": _COMMON
    | {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
}


def our_name(name: str) -> str:
    """The name of a field of `TransformerConfig`, from Hugging Face's."""
    return _OURS.get(name, name)


def from_hugging_face(content: dict[str, Any]) -> TransformerConfig:
    """The configuration in the content of a `config.json`.

    In the GPT-2 family `resid_pdrop` becomes `dropout`; dropout of attention weights, which our model does not have,
    is not read. Several EOS ids become a tuple. Raises HubError naming the key that is missing, of the wrong type, or
    set to something that our model does not compute.
    """
    family = content.get("model_type")
    if not isinstance(family, str) or family not in FIELDS:
        raise HubError(f"model_type must be one of {', '.join(map(repr, FIELDS))}, not {family!r}")
    for name, values in _SUPPORTED[family].items():
        if content.get(name) is not None and content[name] not in values:
            can = f"only {' or '.join(map(repr, values))} is" if values else "the option is not"
            raise HubError(f"{name} is {content[name]!r}: {can} supported")
    fields: dict[str, Any] = {"model_type": family}
    if family != "gpt2":
        _check_attention(content)
        theta, fields["rope_scaling"] = _rope(content)
        content = content | {"rope_theta": theta}
    for name, default in FIELDS[family].items():
        value = default if content.get(name) is None else content[name]
        if value is _REQUIRED:
            raise HubError(f"the key {name!r} is missing")
        ours = our_name(name)
        fields[ours] = _typed(name, value, type(getattr(TransformerConfig, ours)))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        default = _SPECIAL_IDS[family].get(name)
        value = content.get(name, default if default is not None and default < fields["vocab_size"] else None)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [] if value is None else [value]
        ids = [_typed(name, i, int) for i in ids]
        fields[name] = tuple(ids) if isinstance(value, list) else ids[0] if ids else None
    with naming(error=ValueError):
        return TransformerConfig(**fields)


def _typed(name: str, value: Any, kind: type) -> Any:
    if not fits(value, kind):
        what = {int: "an integer", float: "a number", bool: "true or false", list: "a list"}[kind]
        raise HubError(f"{name} must be {what}, not {value!r}")
    return kind(value)


def _check_attention(content: dict[str, Any]) -> None:
    """Every position must see all earlier ones: a window narrower than the model's context is refused."""
    for kind in _typed("layer_types", content.get("layer_types") or [], list):
        if kind != "full_attention":
            raise HubError(f"layer_types names {kind!r}: only 'full_attention' is supported")
    if content["model_type"] == "mistral":
        window, positions = content.get("sliding_window", 4096), content.get("max_position_embeddings", 131072)
        if isinstance(window, int) and isinstance(positions, int) and window < positions:
            raise HubError(
                f"sliding_window is {window}, narrower than the {positions} positions: not supported "
                "(null, which Mistral has had since version 0.2, is)"
            )


def _rope(content: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """(theta, scaling), from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    theta, scaling = content.get("rope_theta"), None
    for key in ("rope_parameters", "rope_scaling"):
        rope = content.get(key) or {}
        if not isinstance(rope, dict):
            raise HubError(f"{key} must be an object, not {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"} and not rope.keys() & {"rope_type", "type"}:
            raise HubError(f"{key} is {rope!r}, and does not say its rope_type")
        if kind not in ("default", "llama3"):
            raise HubError(f"{key} asks for the rope_type {kind!r}: only 'default' and 'llama3' are supported")
        if rope.get("partial_rotary_factor") not in (None, 1):
            raise HubError(f"{key}: partial_rotary_factor is {rope['partial_rotary_factor']!r}: only 1 is supported")
        inner = rope.get("rope_theta")
        if None not in (inner, theta) and inner != theta:
            raise HubError(f"{key} says rope_theta is {inner!r}, the key rope_theta {theta!r}")
        theta = theta if inner is None else inner
        if kind == "llama3":
            missing = next((name for name in _LLAMA3 if rope.get(name) is None), None)
            if missing is not None:
                raise HubError(f"{key} of the rope_type 'llama3' lacks the key {missing!r}")
            values = {name: _typed(f"{key}: {name}", rope[name], type_) for name, type_ in _LLAMA3.items()}
            with naming(key, ValueError):
                scaling = RopeScaling(**values)
    return theta, scaling


_LLAMA3 = {"factor": float, "low_freq_factor": float, "high_freq_factor": float, "original_max_position_embeddings": int}


def to_hugging_face(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """The content of a `config.json` that transformers 4 and 5 read alike; `dtype` is that of the stored weights."""
    family = config.model_type
    content: dict[str, Any] = {"model_type": family}
    content |= {name: getattr(config, our_name(name)) for name in FIELDS[family]}
    if family != "gpt2":
        scaling = config.rope_scaling and {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
        content |= {
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "rope_scaling": scaling,
            "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta},
        }
        content |= {"pretraining_tp": 1} if family == "llama" else {"sliding_window": None, "use_sliding_window": False}
    else:
        content |= {
            "activation_function": "gelu_new", "embd_pdrop": config.dropout, "attn_pdrop": 0.0,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        }  # fmt: skip
    # written also where they are null: transformers assumes its family's usual ids for those that are left out
    content |= {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return content | {"torch_dtype": dtype, "dtype": dtype, "use_cache": True}
