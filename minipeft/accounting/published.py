"""The literature's figures, recomputed: which of them follow from shapes and options, and which do not.

published.csv holds, row by row, what a paper or a README prints, with its source, its tolerance, what is known of it
(`status`), and `options`: how to compute it, as JSON. A row is computed by the public functions from its options alone;
there is no constant or formula for any row. A file of one's own has the same columns:

    id               names the row
    quantity         what is counted: "trainable parameters", "total parameters", "stored parameters", "share", or
                     anything else, where `options` say it in their terms
    unit             params, elements, K, M, B; %, fraction; bytes, KiB, MiB, GiB, KB, MB, GB, TB; bits/param, bytes/param
    published_value  the figure, and how far from it the computed one may be:
    tolerance
    status           "reproduces ...", "does not reproduce ..." or "not computable ..."; empty: claimed, as if "reproduces"
    options          see below; empty where this package has no rule for the row, which is listed as not covered
    source, table_or_path, model, method, hyperparameters, formula, notes    for the reader, and may be left out

The options are an object. What the figure is about:

    model        what `architecture` takes: a published model's name, {"name": ..., fields of its configuration that
                 differ}, the content of a config.json, or a number of parameters
    num_labels, task    the head, as `architecture` takes it
    config       the method: null (full fine-tuning), "frozen", "head", the content of an adapter_config.json, or a list
                 of these, which are there together
    quantity     "trainable", "stored", "total" or "share" (default: by the column)
    only         a regular expression: parameters of other names are not counted
    ledger       arguments of `memory_ledger`, for a figure of memory instead of a count, with
    line         a line of the ledger, a list of lines, "model states" or "total"
    quantize_4bit    arguments of `quantize_4bit`, for bytes a weight, with line "codes" or "absmax"
    code         {"quant_type": ..., "index": ...}: a number of a code book

and what is done with it:

    bytes        bytes a parameter, for sizes
    times        a factor: copies of a model, a part of it, -1 in a difference
    sum          a list of options, whose values are added; model, num_labels and task are those beside the list where
                 a term does not say them
    of           options (which inherit in the same way) whose value this one is divided by

Example: mine.csv, for `minipeft audit mine.csv`:

    id,quantity,unit,published_value,tolerance,status,options
    mine,trainable parameters,M,0.79,0.005,,"{""model"": ""gpt2-m"", ""config"": {""peft_type"": ""LORA"", ""r"": 8}}"
"""

from __future__ import annotations

import csv
import difflib
import importlib
import inspect
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..files import FileError
from ..peft.huggingface import METHODS
from ..quant import quantize_4bit
from ..quant.codebooks import CODES_4BIT
from .architectures import Architecture, architecture, names
from .memory import memory_ledger
from .parameters import ParameterCount, count_parameters

COLUMNS = ("id", "quantity", "unit", "published_value", "tolerance", "status", "options")
STATUSES = ("reproduces", "does not reproduce", "not computable")
QUANTITIES = {
    "trainable parameters": "trainable", "total parameters": "total", "backbone parameters": "total",
    "all parameters": "total", "stored parameters": "stored", "share": "share", "#Params %": "share",
}  # fmt: skip
UNITS = {
    "params": 1, "elements": 1, "K": 1e3, "M": 1e6, "B": 1e9, "%": 0.01, "fraction": 1, "1": 1, "bytes": 1,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "bits/param": 1 / 8,
    "bytes/param": 1,
}  # fmt: skip
INHERITED = ("model", "num_labels", "task")
OPTIONS = (
    *INHERITED, "config", "quantity", "only", "ledger", "line", "quantize_4bit", "code", "bytes", "times", "sum", "of",
)  # fmt: skip
WEIGHTS = 2**18  # a sample that every block size divides, for bytes a weight


class NotCovered(ValueError):
    """The row needs a method, a family or a reading of its figure that this package does not have."""


@dataclass(frozen=True)
class Finding:
    """What became of a row.

    computed  in the row's unit; None where it is not covered
    verdict   "reproduces" (within the tolerance), "differs", or "not covered"
    expected  whether the verdict is what the row's status says; None where nothing was computed
    solved    whether a hyperparameter was solved from the figure itself, so that agreeing proves little
    reason    why it may differ, or is not covered; what else is to be said of it
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
        content = (files(__package__).joinpath(name) if path is None else Path(path)).read_bytes()
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), restkey="")
        rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{name}: cannot be read as a table of comma-separated values ({error})") from error
    missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
    if missing:
        raise FileError(f"{name}: no column {', '.join(missing)}; the first line must name {', '.join(COLUMNS)}")
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        where = f"{name}: row {row['id'] or number!r}"
        if "" in row or None in row.values():
            raise FileError(f"{where}: not as many fields as there are columns; is a field with commas in quotes?")
        if not row["id"] or row["id"] in seen:
            raise FileError(f"{where}: {'used twice as an id' if row['id'] else 'no id'}; every row needs its own")
        seen.add(row["id"])
        for column in ("published_value", "tolerance"):
            if _number(row[column]) is None or (column == "tolerance" and _number(row[column]) < 0):
                kind = "a number" if column == "published_value" else "a number of at least 0"
                raise FileError(f"{where}: {column} must be {kind}, not {row[column]!r}")
        if row["status"] and not row["status"].startswith(STATUSES):
            raise FileError(f"{where}: status must begin with one of {', '.join(STATUSES)}, not {row['status']!r}")
    return rows


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------------- computing


def recompute(row: Mapping[str, str]) -> float:
    """The row's figure in its unit, from its options. Raises NotCovered, or ValueError for options that are wrong."""
    if not row["options"]:
        raise NotCovered(_why_not(row))
    try:
        options = json.loads(row["options"])
    except json.JSONDecodeError as error:
        raise ValueError(f"row {row['id']!r}: the options are not JSON ({error})") from error
    try:
        return _value(options, QUANTITIES.get(row["quantity"])) / _known("unit", row["unit"], UNITS)
    except (ValueError, TypeError) as error:
        raise ValueError(f"row {row['id']!r}: {error}") from error


def _why_not(row: Mapping[str, str]) -> str:
    """What a row without options asks for that is not here."""
    if row["status"].startswith("not computable"):
        return f"not computable: {row.get('notes') or 'it does not follow from shapes and options'}"
    if row["quantity"] not in QUANTITIES:
        return f"no rule for the quantity {row['quantity']!r}"
    model = (row.get("model") or "").partition(" ")[0]
    if model and model not in names():
        return f"no rule for the model {model!r}"
    return f"no rule for the method {row['method']!r}" if row.get("method") else "the row has no options"


def _known(what: str, name: Any, known: Mapping[str, Any] | Iterable[str]) -> Any:
    """known[name], or ValueError naming the nearest."""
    if name not in known:
        near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}" if near else f"there are {', '.join(known)}"
        raise ValueError(f"unknown {what} {name!r}; {hint}")
    return known[name] if isinstance(known, Mapping) else name


def _value(options: Any, quantity: str | None) -> float:
    """What options say, in parameters or bytes (or as a plain number)."""
    if not isinstance(options, dict):
        raise ValueError(f"options must be a JSON object, not {options!r}")
    for key in options:
        _known("option", key, OPTIONS)
    outer = {key: options[key] for key in INHERITED if key in options}
    if "sum" in options:
        if not isinstance(options["sum"], list) or not options["sum"]:
            raise ValueError(f"sum must be a list of options, not {options['sum']!r}")
        value: float = sum(_value({**outer, **_object("sum", term)}, quantity) for term in options["sum"])
    else:
        value = _term(options, quantity)
    for factor in ("bytes", "times"):
        number = options.get(factor, 1)
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ValueError(f"{factor} must be a number, not {number!r}")
        value *= number
    if "of" not in options:
        return value
    whole = _value({**outer, **_object("of", options["of"])}, quantity)
    if not whole:
        raise ValueError("of is 0, and nothing can be divided by it")
    return value / whole


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold JSON objects, not {value!r}")
    return value


def _arguments(function: Callable, key: str, given: Any, reserved: tuple[str, ...]) -> dict[str, Any]:
    """Arguments that options give for a function; the reserved ones are not theirs to give."""
    known = [name for name in inspect.signature(function).parameters if name not in reserved]
    for name in _object(key, given):
        _known(f"argument of {function.__name__}", name, known)
    return given


def _term(options: dict[str, Any], quantity: str | None) -> float:
    """One value: of a code book, of a quantized weight, of a ledger, or a count."""
    if "code" in options:
        code = _object("code", options["code"])
        book = _known("quant_type", code.get("quant_type"), CODES_4BIT)()
        return float(book[_known("index", code.get("index"), range(len(book)))])
    if "quantize_4bit" in options:
        arguments = _arguments(quantize_4bit, "quantize_4bit", options["quantize_4bit"], ("A",))
        packed, state = quantize_4bit(np.zeros(WEIGHTS, np.float32), **arguments)
        absmax = state.absmax.nbytes + (state.state2.absmax.nbytes if state.state2 is not None else 0)
        return _known("line", options.get("line"), {"codes": packed.nbytes, "absmax": absmax}) / WEIGHTS
    if "model" not in options:
        raise ValueError("the options name no model")
    arch = architecture(options["model"], options.get("num_labels"), options.get("task", "SEQ_CLS"))
    configs = [_config(c) for c in _as_list(options.get("config"))]
    if "ledger" in options:
        if len(configs) > 1:
            raise ValueError("a ledger is of one method, not of a list")
        arguments = _arguments(memory_ledger, "ledger", options["ledger"], ("model", "config", "labels"))
        ledger = memory_ledger(arch, configs[0], **arguments)
        sums = {"model states": ledger.model_states, "total": ledger.total}
        return sum(_known("line", line, {**ledger.held, **sums}) for line in _as_list(options.get("line")))
    quantity = options.get("quantity", quantity)
    if quantity is None:
        raise ValueError("the options must say which quantity this is: trainable, stored, total or share")
    _known("quantity", quantity, ("trainable", "stored", "total", "share"))
    return getattr(_count(arch, configs, options.get("only")), quantity)


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _config(value: Any) -> Any:
    """A method's configuration from the content of an adapter_config.json; names and null stay as they are."""
    if not isinstance(value, dict):
        return value
    module, name = _known("peft_type", value.get("peft_type"), METHODS)
    config = getattr(importlib.import_module(f"minipeft.peft.{module}"), name).from_dict(value)
    return config.replace(inference_mode=value.get("inference_mode", False))  # a prompt read from a file is folded


def _count(arch: Architecture, configs: list, only: str | None) -> ParameterCount:
    """Several methods on one model: what each of them trains and adds, together."""
    base = count_parameters(arch, "frozen", only).total
    counts = [count_parameters(arch, config, only) for config in configs]
    return ParameterCount(
        trainable=sum(c.trainable for c in counts),
        stored=sum(c.stored for c in counts),
        total=base + sum(c.total - base for c in counts),
    )


# -------------------------------------------------------------------------------------------------------- verdicts


def audit(rows: Iterable[Mapping[str, str]] | None = None) -> list[Finding]:
    """A finding for each row (of `read_published()` by default)."""
    return [_find(row) for row in (read_published() if rows is None else rows)]


def _find(row: Mapping[str, str]) -> Finding:
    notes = row.get("notes") or ""
    solved = re.search("solved|nearest", f"{row.get('hyperparameters')} {notes}") is not None
    try:
        computed = recompute(row)
    except NotCovered as error:
        return Finding(row, None, "not covered", None, solved, str(error))
    agrees = abs(computed - float(row["published_value"])) <= float(row["tolerance"]) * (1 + 1e-9)
    claimed = not row["status"] or row["status"].startswith("reproduces")
    return Finding(row, computed, "reproduces" if agrees else "differs", agrees == claimed, solved, notes)


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
