"""Looking inside a model: what its modules give, the gradients of that, and how large the gradients of each layer are.

    with model.watch("*.mlp") as seen:
        loss = model.loss(ids, labels)
        loss.backward()
    seen["model.layers.0.mlp"].data, seen["model.layers.0.mlp"].grad       [B, T, d] each

A module is watched by giving it, until the `with` ends, a class of its own whose `forward` goes through a function. So the
call of a module that is not watched costs what it always does.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from ..autograd.tensor import Tensor
from ..backend import xp_of
from .module import Module

_watched: list[list] = []  # the modules of every `with` that is open


def is_watched() -> bool:
    """Whether calls of some module are looked at, on any thread."""
    return bool(_watched)


@contextmanager
def watch(model: Module, pattern: str = "*") -> Iterator[dict[str, Any]]:
    """{path: what the module there gave when it was last called} of the modules whose paths match `pattern`.

    Args:
        model: a model; a PeftModel's paths begin with "base_model.", and its adapters are modules too.
        pattern: as of file names: `*` stands for any text, dots included, `?` for one character, [ab] for a or b.

    The tensors are those of the graph: a term of a loss may use them, and a backward pass, inside or after the `with`,
    leaves its gradient in their `.grad`. They are kept for as long as the dictionary is. With gradient checkpointing a
    block is computed again in the backward pass, which must then run inside, to be seen. All threads are watched.

    Raises KeyError, with the nearest paths, where nothing matches, and TypeError for a pattern that is no text.
    """
    paths, seen = _matching(model, pattern), {}

    def note(path: str, call: Callable[[], Any]) -> Any:
        seen[path] = result = call()
        if isinstance(result, Tensor):
            result.retain_grad()
        return result

    with called_through(paths, note):
        yield seen


@contextmanager
def called_through(
    paths: list[tuple[str, Module]], around: Callable[[str, Callable[[], Any]], Any]
) -> Iterator[None]:
    """Inside, a call of one of these modules is `around(its path, the call)`, on all threads."""
    live = [around]
    before = [(module, type(module)) for _, module in paths]
    _watched.append(before)
    try:
        for path, module in paths:
            module.__class__ = _through(type(module), id(module), path, live)
        yield
    finally:
        _watched.remove(before)
        live.clear()  # a class lives on for a while, and must hold nothing then
        for module, cls in before:
            module.__class__ = cls


def _matching(model: Module, pattern: str) -> list[tuple[str, Module]]:
    """(path, module) of those whose paths match. Raises KeyError, with the nearest paths, where none does."""
    if not isinstance(pattern, str):
        raise TypeError(f"modules are chosen by one pattern, such as '*.mlp' or '*.[qv]_proj', not by {pattern!r}")
    paths = list(model.named_modules())
    found = [(path, module) for path, module in paths if fnmatchcase(path, pattern)]
    if not found:
        near = _nearest(pattern, [path for path, _ in paths])
        raise KeyError(f"no module's path matches {pattern!r}; nearest: {', '.join(near) or 'none'}")
    return found


def _nearest(pattern: str, paths: list[str]) -> list[str]:
    """Three paths whose last names are like the pattern's, those first that are like it as a whole."""
    last = difflib.get_close_matches(_last(pattern), {_last(path): None for path in paths}, n=3, cutoff=0.5)
    near = [path for name in last for path in paths if _last(path) == name] or paths
    return difflib.get_close_matches(pattern, near, n=3, cutoff=0.0 if last else 0.3)


def _last(path: str) -> str:
    return path.rpartition(".")[2].strip("*")


def _through(cls: type, watched: int, path: str, live: list[Callable]) -> type:
    """A class whose `forward` goes through live[0], of the module with this id and not of a copy that has its class."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        call = functools.partial(cls.forward, self, *args, **options)
        return live[0](path, call) if live and id(self) == watched else call()

    plain = getattr(cls, "unwatched", cls)  # the class that a copy has
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "unwatched": plain})


def gradient_norms(model: Module, pattern: str = "*") -> dict[str, float]:
    """{path: 2-norm of the gradients of all parameters in the module there}, after a backward pass, in the model's order.

    `pattern` chooses modules as in `watch`; "" is the whole model. Modules without a gradient are left out, so `{}`
    says that there was no backward pass, or nothing that it reached. Raises KeyError as `watch`.
    """
    norms = {}
    for path, module in _matching(model, pattern):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            xp = xp_of(gradients[0])
            norms[path] = math.sqrt(sum(float((g.astype(xp.float64) ** 2).sum().item()) for g in gradients))
    return norms
