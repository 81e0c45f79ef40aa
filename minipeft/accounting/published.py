"""The literature's figures, recomputed: which of them follow from shapes and options, and which do not.

published.csv holds, row by row, what a paper or a README prints, with its source, its tolerance, what is known of it
(`status`), and `options`: how to compute it, as JSON. The public functions compute a row from its options alone; there
is no constant or formula for any row. A file of one's own has the same columns:

    id               names the row
    quantity         what is counted: "trainable parameters", "total parameters", "stored parameters", "share", or
                     anything else, where `options` say it in their terms
    unit             params, elements, K, M, B; %, fraction; bytes, KiB, MiB, GiB, KB, MB, GB, TB; bits/param,
                     bytes/param
    published_value  the figure, and how far from it the computed one may be:
    tolerance
    status           "reproduces ...", "does not reproduce ..." or "not computable ..."; empty: as if "reproduces"
    options          the fields of `Options` as a JSON object; empty where this package has no rule for the row, which
                     is listed as not covered
    source, table_or_path, model, method, hyperparameters, formula, notes    for the reader, and may be left out

Example: mine.csv, for `minipeft audit mine.csv`:

    id,quantity,unit,published_value,tolerance,status,options
    mine,trainable parameters,M,0.79,0.005,,"{""model"": ""gpt2-m"", ""config"": {""peft_type"": ""LORA"", ""r"": 8}}"
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..files import FileError, parse_json
from ..options import configuration, option
from ..peft.huggingface import PEFT_TYPES, config_class
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
SAMPLE = 2**18  # numbers quantized for the bytes of one; every block size divides it


@configuration(kw_only=True)
class Options:
    """What a figure is about (a model, under one or several methods together), and what is done with it.

    The quantity is by default the one that the column names. The options inside `sum` and `of` have the model,
    num_labels and task beside them where they do not give their own.
    """

    model: Any = option(None, "a published model's name, {name: ..., changes}, a config.json's content, or a number")
    num_labels: int | None = option(None, "classes of the head, as in `architecture`")
    task: str = option("SEQ_CLS", "the head, as in `architecture`")
    config: Any = option(None, "null (all is trained), frozen, head, an adapter_config.json's content, or a list")
    quantity: str | None = option(None, "what is counted", choices=(None, "trainable", "stored", "total", "share"))
    only: str | None = option(None, "a regular expression: parameters of other names are not counted")
    ledger: dict | None = option(None, "arguments of `memory_ledger`, for a figure of memory instead of a count, with")
    line: Any = option(None, "a line of the ledger, a list of lines, model states or total")
    quantize_4bit: dict | None = option(None, "arguments of `quantize_4bit`: bytes of a weight; line: codes, absmax")
    code: dict | None = option(None, "{quant_type: ..., index: ...}: a number of a code book")
    bytes: float = option(1, "bytes a parameter, for sizes")
    times: float = option(1, "a factor: copies of a model, a part of it, -1 in a difference")
    sum: list[dict] | None = option(None, "options whose values are added")
    of: dict | None = option(None, "options whose value this one is divided by")


class NotCovered(ValueError):
    """The row needs a method, a family or a reading of its figure that this package does not have."""


@dataclass(frozen=True)
class AuditedRow:
    """A row and what became of it.

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


# --------------------------------------------------------------------------------------------------------- the table


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
        if problem := _problem(row, seen):
            raise FileError(f"{name}: row {row['id'] or number!r}: {problem}")
        seen.add(row["id"])
    return rows


def _problem(row: Mapping[str, str], seen: set[str]) -> str | None:
    """What is wrong with a row, if anything; `seen` are the ids before it."""
    if "" in row or None in row.values():
        return "not as many fields as there are columns; is a field with commas in quotes?"
    if not row["id"] or row["id"] in seen:
        return f"{'used twice as an id' if row['id'] else 'no id'}; every row needs its own"
    if not math.isfinite(_number(row["published_value"])):
        return f"published_value must be a number, not {row['published_value']!r}"
    if not 0 <= _number(row["tolerance"]) < math.inf:
        return f"tolerance must be a number of at least 0, not {row['tolerance']!r}"
    if row["status"] and not row["status"].startswith(STATUSES):
        return f"status must begin with one of {', '.join(STATUSES)}, not {row['status']!r}"
    return None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# --------------------------------------------------------------------------------------------------------- computing


def recompute(row: Mapping[str, str]) -> float:
    """The row's figure in its unit, from its options. Raises NotCovered, or ValueError for options that are wrong."""
    if not row["options"]:
        raise NotCovered(_why_not(row))
    try:
        options = parse_json(row["options"])
    except ValueError as error:
        raise ValueError(f"row {row['id']!r}: the options are not JSON ({error})") from error
    try:
        return _value(options, QUANTITIES.get(row["quantity"])) / _known("unit", row["unit"], UNITS)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
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


def _value(given: Any, quantity: str | None) -> float:
    """What options say, in parameters or bytes (or as a plain number)."""
    if not isinstance(given, dict):
        raise ValueError(f"options must be a JSON object, not {given!r}")
    for name in given:
        _known("option", name, [field.name for field in fields(Options)])
    options = Options(**given)
    inherited = {name: given[name] for name in INHERITED if name in given}
    if options.sum is None:
        value = _term(options, quantity)
    elif options.sum:
        value = sum(_value({**inherited, **term}, quantity) for term in options.sum)
    else:
        raise ValueError("sum must not be empty")
    value = value * options.bytes * options.times
    if options.of is None:
        return value
    whole = _value({**inherited, **options.of}, quantity)
    if not whole:
        raise ValueError("of is 0, and nothing can be divided by it")
    return value / whole


def _term(options: Options, quantity: str | None) -> float:
    """One value: of a code book, of a quantized weight, of a ledger, or a count."""
    if options.code is not None:
        from ..quant.codebooks import CODES_4BIT

        book = _known("quant_type", options.code.get("quant_type"), CODES_4BIT)()
        return float(book[_known("index", options.code.get("index"), range(len(book)))])
    if options.quantize_4bit is not None:
        return _known("line", options.line, _quantized(options.quantize_4bit)) / SAMPLE
    if options.model is None:
        raise ValueError("the options name no model")
    arch = architecture(options.model, options.num_labels, options.task)
    configs, lines = ([v] if not isinstance(v, list) else v for v in (options.config, options.line))
    configs = [_config(value) for value in configs]
    if options.ledger is not None:
        if len(configs) > 1:
            raise ValueError("a ledger is of one method, not of a list")
        ledger = memory_ledger(arch, configs[0], **options.ledger)
        known = {**ledger.held, "model states": ledger.model_states, "total": ledger.total}
        return sum(_known("line", line, known) for line in lines)
    quantity = options.quantity or quantity
    if quantity is None:
        raise ValueError("the options must say which quantity this is: trainable, stored, total or share")
    return getattr(_count(arch, configs, options.only), quantity)


def _quantized(arguments: dict[str, Any]) -> dict[str, int]:
    """Bytes of the codes and of the scales of a quantized sample."""
    import numpy as np

    from ..quant import quantize_4bit

    packed, state = quantize_4bit(np.zeros(SAMPLE, np.float32), **arguments)
    nested = 0 if state.state2 is None else state.state2.absmax.nbytes
    return {"codes": packed.nbytes, "absmax": state.absmax.nbytes + nested}


def _config(value: Any) -> Any:
    """A method's configuration from the content of an adapter_config.json; names and null stay as they are."""
    if not isinstance(value, dict):
        return value
    _known("peft_type", value.get("peft_type"), PEFT_TYPES)
    return config_class(value["peft_type"]).from_dict(value)


def _count(arch: Architecture, configs: list, only: str | None) -> ParameterCount:
    """Several methods on one model: what each of them trains and adds, together."""
    base = count_parameters(arch, "frozen", only).total
    counts = [count_parameters(arch, config, only) for config in configs]
    return ParameterCount(
        trainable=sum(c.trainable for c in counts),
        stored=sum(c.stored for c in counts),
        total=base + sum(c.total - base for c in counts),
    )


def _known(what: str, name: Any, known: Mapping[str, Any] | Iterable[Any]) -> Any:
    """known[name], or the name itself of a list. Raises ValueError naming the nearest."""
    if name not in known:
        near = difflib.get_close_matches(str(name), [k for k in known if isinstance(k, str)], n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}" if near else f"there are {', '.join(map(str, known))}"
        raise ValueError(f"unknown {what} {name!r}; {hint}")
    return known[name] if isinstance(known, Mapping) else name


# ---------------------------------------------------------------------------------------------------------- verdicts


def audit(rows: Iterable[Mapping[str, str]] | None = None) -> list[AuditedRow]:
    """What becomes of each row (of `read_published()` by default). Raises ValueError for options that are wrong."""
    return [_audited(row) for row in (read_published() if rows is None else rows)]


def _audited(row: Mapping[str, str]) -> AuditedRow:
    notes = row.get("notes") or ""
    solved = re.search("solved|nearest", f"{row.get('hyperparameters')} {notes}") is not None
    try:
        computed = recompute(row)
    except NotCovered as error:
        return AuditedRow(row, None, "not covered", None, solved, str(error))
    agrees = abs(computed - float(row["published_value"])) <= float(row["tolerance"]) * (1 + 1e-9)
    claimed = not row["status"] or row["status"].startswith("reproduces")
    return AuditedRow(row, computed, "reproduces" if agrees else "differs", agrees == claimed, solved, notes)


def tally(audited: Iterable[AuditedRow]) -> dict[str, int]:
    """How many rows reproduce, differ and are not covered, how many of them were solved for, and how many surprise."""
    audited = list(audited)
    counts = Counter(a.verdict for a in audited)
    return {
        "rows": len(audited),
        **{verdict: counts[verdict] for verdict in ("reproduces", "differs", "not covered")},
        "solved from the figure": sum(a.solved and a.computed is not None for a in audited),
        "not as their status says": sum(a.expected is False for a in audited),
    }
