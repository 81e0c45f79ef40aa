"""Models by name: the configuration that a published model's name stands for, however it is spelled.

    find("meta-llama/Llama-3.1-8B-Instruct")   ->   ("llama3.1-8b", {"model_type": "llama", "hidden_size": 4096, ...})

models.json holds them by group, as Hugging Face configurations with their source: fields that a group shares, each
model's own, and under `also` its names on the hub and other ones. Of a name count only its letters and numbers, in
their order: "LLaMA 2-7B", "llama-2-7b" and "llama2_7b" are one. An organization before a slash is left out, and so are
words that say how a model was trained on and not of which shape it is (`NEUTRAL`).
"""

from __future__ import annotations

import difflib
import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

NEUTRAL = {"hf", "instruct", "it", "chat", "base", "pt", "meta", "deduped"}


def names() -> list[str]:
    """The names of the models, each in one spelling."""
    return [name for models in groups().values() for name in models]


@cache
def groups() -> dict[str, dict[str, dict[str, Any]]]:
    """{group: {name: {"config": a Hugging Face configuration, "source": where it is from, "also": other names}}}."""
    read = json.loads(files(__package__).joinpath("models.json").read_text("utf-8"))
    return {group: {name: _entry(shared, own) for name, own in shared["models"].items()} for group, shared in read.items()}


def _entry(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    fields = {**shared["config"], **own}
    also = fields.pop("also", [])
    return {"config": {k: v for k, v in fields.items() if v is not None}, "source": shared["source"], "also": also}


@cache
def _index() -> dict[tuple[str, ...], str]:
    """The parts of every name -> the name."""
    models = [(name, entry) for group in groups().values() for name, entry in group.items()]
    return {_parts(spelling): name for name, entry in models for spelling in (name, *entry["also"])}


def _parts(name: str) -> tuple[str, ...]:
    """The letters and numbers of a name without its organization: llama, 3, 1, 8, b."""
    return tuple(re.findall(r"[a-z]+|\d+", name.rpartition("/")[2].lower()))


def find(name: str) -> tuple[str, dict[str, Any]]:
    """(name as in `names`, configuration). Raises ValueError naming what a name could mean, or the nearest ones."""
    parts, known = _parts(name), _index()
    first_version = re.sub(r"[-_ ]v0\.1$", "", name)  # that a model is the first of its name says nothing of its shape
    bare = tuple(part for part in _parts(first_version) if part not in NEUTRAL)
    found = known.get(parts) or known.get(bare)
    if found is None or not re.fullmatch(r"(\w[^/]*/)?[^/]+", name):  # a path is no name
        hint = " (minipeft count --models lists all; or give a Hugging Face config.json)"
        several = list(dict.fromkeys(model for other, model in known.items() if bare and other[: len(bare)] == bare))
        if several and found is None:
            more = ", ..." * (len(several) > 12)
            raise ValueError(f"{name!r} is not one model: there are {', '.join(several[:12])}{more}{hint}")
        joined = {"".join(_parts(model)): model for model in names()}
        near = [joined[other] for other in difflib.get_close_matches("".join(bare), joined, cutoff=0.3)] or names()[:3]
        raise ValueError(f"unknown model {name!r}; nearest: {', '.join(near)}{hint}")
    return found, next(group[found]["config"] for group in groups().values() if found in group)
