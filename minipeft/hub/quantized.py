"""Models whose linear layers are in four bits, as transformers and bitsandbytes write them.

    config.json          "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true, ...}
    model.safetensors    for each such layer weight, weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4, ...

The layer's own entries say how it is quantized; the configuration only says that some are. GPT-2's layers are [out, in]
once quantized, in transformers too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..files import StoredTensor
from ..nn.layers import Conv1D, Linear
from ..nn.module import Module, Parameter
from ..quant import Linear4bit, QuantError
from ..quant.surgery import quantized_layers
from .configuration import HubError, naming

_MARK = ".weight.quant_state.bitsandbytes__"


def split_quantization(content: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """(a config.json without its quantization, whether it has one of bitsandbytes in four bits).

    Another kind of quantization is left in, where it is refused as an option that is not supported. Raises HubError for
    codes that are stored as anything but uint8.
    """
    options = content.get("quantization_config")
    if not isinstance(options, dict) or options.get("quant_method", "bitsandbytes") != "bitsandbytes" or not options.get("load_in_4bit"):
        return content, False
    if options.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        raise HubError(f"bnb_4bit_quant_storage is {options['bnb_4bit_quant_storage']!r}: only uint8 is supported")
    return {k: v for k, v in content.items() if k != "quantization_config"}, True


def take_quantized(model: Module, tensors: dict[str, StoredTensor]) -> dict[str, Linear4bit]:
    """{path: layer} of the quantized layers among a file's tensors, which lose those entries.

    The arrays of the layers are copies. Raises HubError for one that does not fit the model.
    """
    layers, modules = {}, dict(model.named_modules())
    for path in [name.partition(_MARK)[0] for name in tensors if _MARK in name]:
        plain = modules.get(path)
        if not isinstance(plain, Linear | Conv1D):
            raise HubError(f"{path} is quantized, but the configuration has no linear layer there")
        names = [name for name in tensors if name.startswith((f"{path}.weight", f"{path}.bias"))]
        own = {name: tensors.pop(name).read().copy() for name in names}
        with naming(path, QuantError):
            layer = Linear4bit.from_state_dict({name[len(path) + 1 :]: array for name, array in own.items()})
        have, want = (layer.out_features, layer.in_features), (plain.out_features, plain.in_features)
        if have != want or (layer.bias is None) != (plain.bias is None):
            raise HubError(
                f"{path} is quantized as {list(have)} with{'out' * (layer.bias is None)} a bias; "
                f"the configuration gives {list(want)} with{'out' * (plain.bias is None)} one"
            )
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.astype(np.float32, copy=False)
        layers[path] = layer
    return layers


def dense_parameters(model: Module) -> dict[str, Parameter]:
    """{name: parameter} of a model, without those of its quantized layers."""
    packed = {id(p) for layer in quantized_layers(model).values() for p in layer.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in packed}


def quantization_config(model: Module) -> dict[str, Any] | None:
    """What config.json says of a model's quantized layers; None without any. Raises HubError for int4, which only we have."""
    states = [layer.quant_state for layer in quantized_layers(model).values()]
    if not states:
        return None
    if any(state.quant_type not in ("nf4", "fp4") for state in states):
        raise HubError("layers in int4 cannot be saved: bitsandbytes has no such type; quantize to nf4 or fp4")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": states[0].quant_type,
        "bnb_4bit_use_double_quant": states[0].nested,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [path for path, m in model.named_modules() if isinstance(m, Linear | Conv1D)],
    }
