"""How long a decoding step takes: an experiment that LoRA's and the adapters' rules read."""

from __future__ import annotations

from typing import Any

import numpy as np

import minipeft as mp

from ..autograd.tensor import no_grad
from ..backend import asarray, synchronize, xp_of
from ..nn.transformer import KVCache
from .register import Experiment, Number, measured
from .timing import in_turns, machine

REPEATS, CASES = 8, ((128, 1), (128, 8), (128, 32), (512, 1))  # (width, batch size)
PROMPT, TOKENS = 16, 8


def random_model(width: int, layers: int = 6, seed: int = 0) -> Any:
    """A model of the shipped base's proportions; its values do not matter to a time."""
    shape = {"vocab_size": 2048, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": width // 32, "num_key_value_heads": width // 64, "max_position_embeddings": 512}
    return mp.Transformer(mp.TransformerConfig.llama(**shape), seed=seed)


def decode(model: Any, batch: int) -> None:
    """TOKENS steps of `batch` sequences, with a cache, after a prompt."""
    xp = xp_of(model.parameters()[0].data)
    ids, cache = asarray(np.ones((batch, PROMPT), np.int64), xp), KVCache()
    with no_grad():
        model(ids, past_key_values=cache)
        for _ in range(TOKENS):
            model(ids[:, :1], past_key_values=cache)
    synchronize(xp)


def times(width: int, batch: int, seed: int) -> dict[str, Any]:
    """The row of a repeat: seconds of a prompt and TOKENS steps, of the base, of a copy, and of what is put on the base.

    The copy is the control: the same operations, on arrays elsewhere in memory."""
    base = random_model(width, seed=seed)
    lora = mp.get_peft_model(base, mp.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False), seed=seed)
    bottleneck = mp.get_peft_model(base, mp.BottleneckConfig(placement="houlsby", bottleneck_size=16), seed=seed)
    models = {"base": base, "copy": base.copy(), "unmerged": lora, "merged": lora.merge_and_unload(), "adapters": bottleneck}
    return in_turns({name: lambda model=model: decode(model, batch) for name, model in models.items()}) | machine()


DECODING = Experiment(
    "decoding",
    times,
    lambda: [run for width, batch in CASES for run in mp.grid(width=width, batch=batch, seed=range(REPEATS))],
    timed=True,
)


def slowdown(rows: list[dict[str, Any]], what: str, beside: str = "base") -> dict[str, Number]:
    """Time over that of the base, or of its copy, with the interval over repeats, by width and batch size."""
    found = {}
    for width, batch in sorted({(row["width"], row["batch"]) for row in rows}):
        ratios = [row[what] / row[beside] for row in rows if (row["width"], row["batch"]) == (width, batch)]
        case = f"width {width}, batch {batch}"
        found[case] = measured(f"{what}, {case}: time over the {beside}'s", ratios, "times")
    return found


def repeats(rows: list[dict[str, Any]]) -> int:
    """How often each was timed."""
    return len({row["seed"] for row in rows})
