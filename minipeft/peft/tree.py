"""A PeftModel as text: its module tree, repeated layers once, with what was put where."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from ..nn.module import Module, ModuleList, Parameter
from .layer import AdaptedLayer
from .targets import kind_of


def tree(model: Any) -> str:
    """A line for each module, below the adapted model's own name and its prompts."""
    prompts = [_describe_prompt(name, prompt, model.base_model) for name, prompt in model.prompts.items()]
    return "\n".join([type(model.base_model).__name__, *prompts, *_lines(model.base_model, "  ")])


def _lines(module: Module, indent: str) -> list[str]:
    """What is inside a module, or inside the base layer of an adapted one; of a list, equal modules in a row once."""
    module = module.base_layer if isinstance(module, AdaptedLayer) else module
    children = [(name, _describe(child), _lines(child, indent + "  ")) for name, child in module.children()]
    lines: list[str] = []
    for _, equal in groupby(children, key=lambda child: child[isinstance(module, ModuleList) :]):
        (first, text, below), *others = equal
        lines += [f"{indent}{f'{first}..{others[-1][0]}' if others else first}: {text}", *below]
    return lines


def _describe_prompt(name: str, prompt: Any, model: Any) -> str:
    limit = model.config.max_position_embeddings
    return (
        f"  + {name}: {_trained(prompt)}: {prompt.length} virtual tokens in front of the input, "
        f"which leave {limit - prompt.length} of {limit} positions"
    )


def _describe(module: Module) -> str:
    plain = module.base_layer if isinstance(module, AdaptedLayer) else module
    shapes = [f"{name} {list(p.shape)}" for name, p in plain.__dict__.items() if isinstance(p, Parameter)]
    text = type(plain).__name__ + (f"({', '.join(shapes)})" if shapes and kind_of(plain) else "")
    if isinstance(module, AdaptedLayer):
        text += "".join(f" + {name}: {_trained(adapter)}" for name, adapter in module.adapters.items())
    return text


def _trained(part: Any) -> str:
    return f"{type(part).__name__}({', '.join(f'{key} {list(p.shape)}' for key, p in part.trained().items())})"
