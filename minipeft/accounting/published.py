"""The literature's figures, recomputed: which of them follow from shapes and options, and which do not.

published.csv holds, row by row, what a paper or a README prints, with its source, its tolerance, what is known of it
(`status`), and `options`: how to compute it, as JSON. A row is computed by the public functions from its options alone;
there is no constant or formula for any row. The columns of a file of one's own are the same.

    id, source, table_or_path, model, method, hyperparameters, formula, notes      for the reader
    quantity, unit, published_value, tolerance, status      for the program too
    options     {"model": what `architecture` takes, "num_labels": classes of a head,
                 "config": null (full fine-tuning), "frozen", "head", an adapter_config.json or a list of them,
                 "quantity": "trainable" | "stored" | "total" | "share" (default: by the column),
                 "part": count only the parameters of the model whose name begins so,
                 "bytes": bytes a parameter, for figures in bytes, "copies": so many times,
                 "ledger": arguments of `memory_ledger`, "line": a line of it, or "model states"}
                empty where this package has no rule for the row: it is listed as not covered

Units: params, elements, K, M, B; %; bytes, KiB, MiB, GiB, KB, MB, GB, TB.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..files import FileError
from ..peft.directory import METHODS
from .architectures import Architecture, architecture
from .memory import memory_ledger
from .parameters import ParameterCount, count_parameters

COLUMNS = ("id", "quantity", "unit", "published_value", "tolerance", "status", "options")
QUANTITIES = {
    "trainable parameters": "trainable", "total parameters": "total", "backbone parameters": "total",
    "all parameters": "total", "stored parameters": "stored", "share": "share", "#Params %": "share",
}  # fmt: skip
UNITS = {
    "params": 1, "elements": 1, "K": 1e3, "M": 1e6, "B": 1e9, "%": 0.01, "bytes": 1, "KiB": 2**10, "MiB": 2**20,
    "GiB": 2**30, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
}  # fmt: skip
OPTIONS = ("model", "num_labels", "config", "quantity", "part", "bytes", "copies", "ledger", "line")


class NotCovered(ValueError):
    """The row needs a method, a family or a reading of its figure that this package does not have."""


@dataclass(frozen=True)
class Finding:
    """What became of a row.

    verdict   "reproduces" (within the tolerance), "differs", or "not covered" (`reason` says why)
    expected  False where the row's status says otherwise; None where nothing was computed
    solved    whether a hyperparameter was solved from the figure itself, so that agreeing proves little
    """

    row: Mapping[str, str]
    computed: float | None
    verdict: str
    expected: bool | None
    solved: bool
    reason: str = ""


def read_published(path: str | os.PathLike | None = None) -> list[dict[str, str]]:
    """The rows of a CSV file of these columns; None reads the shipped one. Raises FileError naming what is wrong."""
    name = "published.csv" if path is None else str(path)
    try:
        text = files(__package__).joinpath(name).read_text("utf-8") if path is None else Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{name}: cannot be read as a text file ({error})") from error
    reader = csv.DictReader(text.splitlines())
    missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
    if missing:
        raise FileError(f"{name}: no column {', '.join(missing)}; the first line must name {', '.join(COLUMNS)}")
    rows = list(reader)
    for row in rows:
        for column in ("published_value", "tolerance"):
            try:
                float(row[column])
            except (TypeError, ValueError):
                raise FileError(f"{name}: row {row['id']!r}: {column} must be a number, not {row[column]!r}") from None
    return rows


def recompute(row: Mapping[str, str]) -> float:
    """The row's figure in its unit, from its options. Raises NotCovered, or ValueError for options that are wrong."""
    if not row["options"]:
        raise NotCovered("no options: the method, the family or the figure is outside this package")
    try:
        options = json.loads(row["options"])
    except json.JSONDecodeError as error:
        raise ValueError(f"row {row['id']!r}: the options are not JSON ({error})") from error
    unknown = sorted(set(options) - set(OPTIONS)) if isinstance(options, dict) else ["(not an object)"]
    if unknown:
        raise ValueError(f"row {row['id']!r}: unknown option {unknown[0]}; there are {', '.join(OPTIONS)}")
    if row["unit"] not in UNITS:
        raise NotCovered(f"no rule for the unit {row['unit']!r}")
    arch = architecture(options["model"], options.get("num_labels"))
    configs = [_config(c) for c in _as_list(options.get("config"))]
    if "ledger" in options:
        ledger = memory_ledger(arch, configs[0], **options["ledger"])
        value: float = ledger.model_states if options["line"] == "model states" else ledger.held[options["line"]]
    else:
        quantity = options.get("quantity") or QUANTITIES.get(row["quantity"])
        if quantity is None:
            raise ValueError(f"row {row['id']!r}: options must say which quantity {row['quantity']!r} is")
        if "part" in options:
            value = sum(math.prod(shape) for name, shape in arch.items() if name.startswith(options["part"]))
        else:
            value = getattr(_count(arch, configs), quantity)
    return value * options.get("bytes", 1) * options.get("copies", 1) / UNITS[row["unit"]]


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _config(value: Any) -> Any:
    """A method's configuration from the content of an adapter_config.json; names and null stay as they are."""
    if not isinstance(value, dict):
        return value
    if value.get("peft_type") not in METHODS:
        raise NotCovered(f"no method {value.get('peft_type')}; there are {', '.join(METHODS)}")
    module, name = METHODS[value["peft_type"]]
    return getattr(importlib.import_module(f"minipeft.peft.{module}"), name).from_dict(value)


def _count(arch: Architecture, configs: list) -> ParameterCount:
    """Several methods on one model: what each of them trains and adds, together."""
    counts = [count_parameters(arch, config) for config in configs]
    return ParameterCount(
        trainable=sum(c.trainable for c in counts),
        stored=sum(c.stored for c in counts),
        total=arch.size + sum(c.total - arch.size for c in counts),
    )


def audit(rows: Iterable[Mapping[str, str]] | None = None) -> list[Finding]:
    """A finding for each row (of `read_published()` by default)."""
    return [_find(row) for row in (read_published() if rows is None else rows)]


def _find(row: Mapping[str, str]) -> Finding:
    solved = "solved" in (row.get("hyperparameters") or "") or "solved" in (row.get("notes") or "")
    try:
        computed = recompute(row)
    except NotCovered as error:
        return Finding(row, None, "not covered", None, solved, str(error))
    agrees = abs(computed - float(row["published_value"])) <= float(row["tolerance"]) * (1 + 1e-9)
    expected = agrees == row["status"].startswith("reproduces") if row["status"] else None
    return Finding(row, computed, "reproduces" if agrees else "differs", expected, solved, row.get("notes") or "")


def tally(findings: Iterable[Finding]) -> dict[str, int]:
    """How many rows reproduce, differ and are not covered, how many of them were solved for, and how many surprise."""
    findings = list(findings)
    counts = Counter(f.verdict for f in findings)
    return {
        "rows": len(findings),
        **{verdict: counts[verdict] for verdict in ("reproduces", "differs", "not covered")},
        "solved from the figure": sum(f.solved and f.computed is not None for f in findings),
        "not as their status says": sum(f.expected is False for f in findings),
    }
