"""Measured memory of training runs that others published, beside what `pytorch_ledger` predicts for their settings.

footprints.csv holds each run's source, its settings in words and, as JSON in `options`, as arguments:

    model, num_labels, config   as in published.csv
    batch, seq                  of one GPU; a length that the source gives as a cap is taken as the length
    loop                        the fields of `Loop` that are not its defaults
    measured                    "allocated" (torch.cuda.max_memory_allocated), "reserved" (..._reserved), "used" (NVML), or
                                "states" (allocated after an optimizer step)
    context                     bytes of the CUDA context on that machine, where the source measured it

Predictions are of arrays, and of the context for "used": nothing is added for what an allocator reserves in vain. No
term or constant of the ledger was fitted to a row. `split` says which rows were looked at while the ledger was written;
of those held out, only the settings were, and `first_GiB` is what was predicted before their values were seen. All
corrections since came of explaining misses, each from the code of that time or from a step of torch that was watched:
an embedding in float32 makes a stream in float32 (its row is now among those looked at), `Loop.holds_outputs`,
`Loop.reentrant`, FSDP's root and its MixedPrecision, logits copied or never widened (LOGITS), and GELU in one op. But
that embeddings have float32 states beside adamw_8bit was read in transformers' Trainer: the two rows of it, whose script
made the optimizer itself, had not; it adds 0.2 GiB to their predictions, which stay too low.
`reason` says why a row is missed, or not covered.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ..files import parse_json
from .architectures import architecture
from .loop import CONTEXT, Loop
from .published import _config
from .pytorch_loop import pytorch_ledger

WITHIN = 0.15
SPLITS = ("looked at", "held out")


@dataclass(frozen=True)
class Footprint:
    """A published measurement, and its prediction in bytes: None where the row has no options."""

    row: dict[str, str]  # "quantity": what was measured
    measured: float
    predicted: float | None

    @property
    def ratio(self) -> float | None:
        """predicted / measured."""
        return None if self.predicted is None else self.predicted / self.measured

    @property
    def first_close(self) -> bool:
        """Whether the first prediction of a row that was held out was within 15 %."""
        first = self.row["first_GiB"]
        return bool(first) and abs(float(first) * 2**30 / self.measured - 1) <= WITHIN

    @property
    def close(self) -> bool:
        """Whether the prediction is within 15 %."""
        return self.ratio is not None and abs(self.ratio - 1) <= WITHIN


def footprints(ids: Collection[str] | None = None) -> list[Footprint]:
    """Every published run, predicted; or those of these ids."""
    text = files(__package__).joinpath("footprints.csv").read_text("utf-8")
    found = []
    for row in csv.DictReader(io.StringIO(text)):
        if ids is not None and row["id"] not in ids:
            continue
        options = parse_json(row["options"]) if row["options"] else None
        row["quantity"] = options["measured"] if options else ""
        found.append(Footprint(row, float(row["published_GiB"]) * 2**30, _predicted(row["options"]) if options else None))
    return found


@cache
def _predicted(options: str) -> float:
    return predict(parse_json(options))


def predict(options: dict[str, Any]) -> float:
    """Bytes of a run by its options."""
    arch = architecture(options["model"], options.get("num_labels"))
    loop = Loop(**{"headroom": 0.0, **options.get("loop", {})})
    ledger = pytorch_ledger(arch, _config(options["config"], arch), options.get("batch", 1), options.get("seq"), loop)
    if options["measured"] == "states":
        return ledger.model_states
    context = options.get("context", CONTEXT) if options["measured"] == "used" else 0
    return ledger.total - CONTEXT + context


def summary(found: Sequence[Footprint]) -> dict[str, dict[str, float | None]]:
    """Runs, runs predicted, those within 15 % and the median of predicted / measured: by split, and of allocated memory.

    That is what a ledger predicts; what an allocator reserves, and NVML sees, is more.
    """
    groups = {split: [f for f in found if f.row["split"] == split] for split in SPLITS}
    groups["of allocated memory"] = [f for f in found if f.row["quantity"] in ("allocated", "states")]
    counts = {}
    for name, here in groups.items():
        ratios = [f.ratio for f in here if f.ratio is not None]
        counts[name] = {
            "runs": len(here), "predicted": len(ratios), "within 15 %": sum(f.close for f in here),
            "median": statistics.median(ratios) if ratios else None,
        }  # fmt: skip
    counts["held out"]["at first"] = sum(f.first_close for f in found)
    return counts
