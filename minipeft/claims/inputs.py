"""What the rules work on: the shipped base, a few sentences, published models as shapes, and a real language model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from ..autograd.tensor import no_grad
from ..hub.base import load_base
from ..hub.smollm2 import HOW_TO_GET, find_smollm2
from ..nn.transformer import KVCache
from ..text.examples import Example, encode_examples
from ..train.batches import pad_sequences

SIZES = {"7B": "llama-7b", "70B": "llama2-70b"}  # the models that stand for these sizes
BASE = "the shipped base, 1.4M parameters"
RECORDS = [
    {"prompt": "The king said to the man:", "completion": " Go down to the river, and take the boat."},
    {"prompt": "In the morning the woman", "completion": " went out of the house with her daughter."},
    {"prompt": "It was a truth that he", "completion": " had never been willing to hear."},
    {"prompt": "The meaning of the word stone is", "completion": " a hard piece of rock."},
    {"prompt": "And when they came to the city,", "completion": " the gates were shut."},
    {"prompt": "She had no reason to", "completion": " think him a better friend than the other."},
    {"prompt": "A small animal with long ears is", "completion": " a rabbit."},
    {"prompt": "For seven days the rain", "completion": " came down on the fields and on the hills."},
]


@cache
def base() -> tuple[Any, Any]:
    """(model, tokenizer) of the shipped base; in host memory, whatever the backend is."""
    model, tokenizer = load_base()
    return model.to("numpy"), tokenizer


@cache
def smollm2() -> tuple[Any, Any]:
    """(model, tokenizer) of SmolLM2-135M-Instruct. Raises FileNotFoundError, with how to get it, where it is not."""
    from ..hub.pretrained import from_pretrained

    path = find_smollm2()
    if path is None:
        raise FileNotFoundError(HOW_TO_GET)
    return from_pretrained(path)


def prefix_cached(rows: Sequence[list[int]]) -> dict[str, Any]:
    """Rows of ids as arguments of SmolLM2's passes and generation: what all of them begin with is computed once for all."""
    columns = takewhile(lambda ids: len({*ids}) == 1, zip(*(row[:-1] for row in rows)))
    shared = [ids[0] for ids in columns]
    ids, mask = pad_sequences([row[len(shared) :] for row in rows], 0, side="left")
    past = KVCache()
    if shared:
        with no_grad():
            smollm2()[0].backbone(np.array([shared]), past_key_values=past)
        past.select(np.zeros(len(rows), int))
        mask = np.concatenate([np.ones((len(rows), len(shared)), mask.dtype), mask], axis=1)
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": past}


@cache
def examples() -> tuple[Example, ...]:
    """RECORDS, as the base's token ids and labels."""
    return tuple(encode_examples(RECORDS, base()[1], max_length=64).examples)


def batch(rows: int = 8, length: int = 16) -> np.ndarray:
    """Token ids [rows, length] of running text: the sentences, one after the other and again."""
    ids = np.concatenate([example.input_ids for example in examples()])
    return np.resize(ids, rows * length).reshape(rows, length)


def arrays(model: Any) -> dict[str, np.ndarray]:
    """A copy of every parameter on the host, by name."""
    from ..backend import to_numpy

    return {name: to_numpy(p.data).copy() for name, p in model.named_parameters()}


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, float]:
    """The share of each parameter's numbers that differ, bit for bit, of the names that both have."""
    return {name: float(np.mean(before[name] != after[name])) for name in before if name in after}


def steps(model: Any, n: int = 2, lr: float = 1e-3, loss: Callable[[Any], Any] | None = None) -> list[float]:
    """n steps of Adam on the sentences, in place; the losses before each of them and after the last."""
    from ..autograd.tensor import no_grad
    from ..backend import asarray, xp_of
    from ..train import collate, optim

    xp = xp_of(model.parameters()[0].data)
    given = collate(examples()).arguments
    given = {name: asarray(value, xp) if value is not None else None for name, value in given.items()}
    loss = loss or (lambda model: model.loss(**given))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, seen = optim.Adam(trained, lr=lr) if n else None, []
    for _ in range(n):
        value = loss(model)
        value.backward()
        seen.append(value.item())
        optimizer.step()
        optimizer.zero_grad()
    with no_grad():
        return [*seen, loss(model).item()]


def bytes_on_disk(save: Callable[[Path], Any]) -> int:
    """The bytes of the files that save(directory) writes, into a directory that is gone afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory))
        return sum(os.path.getsize(path) for path in Path(directory).rglob("*.safetensors"))
