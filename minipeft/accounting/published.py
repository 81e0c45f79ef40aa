"""The literature's figures, recomputed: which of them follow from shapes and options, and which do not.

published.csv holds, row by row, what a paper or a README prints, with its source, its tolerance, what is known of it
(`status`), and `options`: how to compute it, as JSON. The public functions compute a row from its options alone; there
is no constant or formula for any row. A file of one's own has the same columns: `minipeft audit --help` describes them,
the conventions of counting, and an example; `Options` describes the options.
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
from typing import Any, NamedTuple

from ..files import FileError, parse_json
from ..options import configuration, option
from ..peft.huggingface import PEFT_TYPES
from ..peft.targets import check_patterns, match
from .architectures import Architecture, architecture
from .block_formats import BLOCK_FORMATS
from .counted import COUNTED, counted_config
from .memory import STATE_LINES, MemoryLedger, memory_ledger
from .parameters import ParameterCount, count_parameters, stored_parameters, trained_parameters

COLUMNS = ("id", "quantity", "unit", "published_value", "tolerance", "status", "options")
STATUSES = ("reproduces", "does not reproduce", "not computable")
QUANTITIES = {
    "trainable parameters": "trainable", "total parameters": "total", "backbone parameters": "total",
    "all parameters": "total", "stored parameters": "stored", "share": "share", "#Params %": "share",
}  # fmt: skip
COUNT, RATIO, SIZE, DENSITY = (0, 1), (0, 0), (1, 0), (1, -1)  # the powers of bytes and of parameters in a figure
MEASURES = {COUNT: "parameters", RATIO: "a ratio", SIZE: "bytes", DENSITY: "bytes for each parameter"}
UNITS = {
    "params": (1, COUNT), "elements": (1, COUNT), "K": (1e3, COUNT), "M": (1e6, COUNT), "B": (1e9, COUNT),
    "%": (0.01, RATIO), "fraction": (1, RATIO), "x": (1, RATIO), "1": (1, RATIO),
    "bytes": (1, SIZE), "KiB": (2**10, SIZE), "MiB": (2**20, SIZE), "GiB": (2**30, SIZE), "KB": (1e3, SIZE),
    "MB": (1e6, SIZE), "GB": (1e9, SIZE), "TB": (1e12, SIZE),
    "bits/param": (1 / 8, DENSITY), "bytes/param": (1, DENSITY),
}  # fmt: skip
INHERITED = ("model", "num_labels", "task")
COUNTING = "a count"
USED = {  # what is computed -> the other options that decide it; bytes, times and of go with all
    "code": (), "quantize_4bit": ("line",), "sum": (*INHERITED, "quantity"), "ledger": (*INHERITED, "config", "line"),
    COUNTING: (*INHERITED, "config", "quantity", "only"),
}  # fmt: skip
SHOWN = 12  # names in a message
SAMPLE = 2**18  # numbers quantized for the bytes of one; every block size divides it


@configuration(kw_only=True)
class Options:
    """What a figure is about (a model, under one or several methods together), and what is done with it.

    The quantity is by default the one that the column names. The options inside `sum` and `of` have the model,
    num_labels and task beside them where they do not give their own. An option that changes nothing is an error.
    """

    model: Any = option(None, "a published model's name, {name: ..., changes}, a config.json's content, or a number")
    num_labels: int | None = option(None, "classes of the head, as in `architecture`")
    task: str = option("SEQ_CLS", "the head, as in `architecture`")
    config: Any = option(None, "null (all is trained), frozen, head, an adapter_config.json's content, or a list")
    quantity: str | None = option(None, "what is counted", choices=(None, "trainable", "stored", "total", "share"))
    only: str | None = option(None, "a regular expression for whole names: parameters of other names are not counted")
    ledger: dict | None = option(None, "arguments of `memory_ledger`, for a figure of memory instead of a count, with")
    line: Any = option(None, "a line of the ledger, a list of lines, model states or total")
    quantize_4bit: dict | None = option(None, "arguments of `quantize_4bit`: bytes of a weight; line: codes, absmax")
    code: dict | None = option(None, "{quant_type: ..., index: ...}: a number of a code book")
    bytes: float | str | None = option(None, "of a parameter, for a size: a number or a GGUF block format (Q4_0)")
    times: float = option(1, "a factor: copies of a model, a part of it, -1 in a difference")
    sum: list[dict] | None = option(None, "options whose values are added")
    of: dict | None = option(None, "options whose value this one is divided by; a share is a quotient without it")


class Figure(NamedTuple):
    """A computed number and what it measures: the powers of bytes and of parameters in it."""

    value: float
    measure: tuple[int, int]


class NotCovered(ValueError):
    """The row has no options, and does not claim that its figure follows from any."""


@dataclass(frozen=True)
class AuditedRow:
    """A row and what became of it.

    computed  in the row's unit; None where it is not covered, or wrong
    verdict   "reproduces" (within the tolerance), "differs", "not covered", or "error": the row is wrong
    expected  whether the verdict is what the row's status says; None where nothing was computed
    solved    whether the status says that an option was solved from the figure itself: that it agrees proves little
    reason    of a row without a computed figure, why; what its notes say is theirs
    """

    row: Mapping[str, str]
    computed: float | None
    verdict: str
    expected: bool | None
    solved: bool
    reason: str = ""


# --------------------------------------------------------------------------------------------------------- the table


def read_published(path: str | os.PathLike | None = None) -> list[dict[str, str]]:
    """The rows of a CSV file of these columns; None reads the shipped one.

    Raises FileError for what is no such table. What a row says is looked at by `audit`.
    """
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
    return rows


def _problem(row: Mapping[str, str]) -> str | None:
    """What is wrong with a row itself, whatever its options are, if anything."""
    if "" in row or None in row.values():
        return "not as many fields as there are columns; is a field with commas in quotes?"
    if not row["id"]:
        return "no id; every row needs its own"
    if not math.isfinite(number(row["published_value"])):
        return f"published_value must be a number, not {row['published_value']!r}"
    if not 0 <= number(row["tolerance"]) < math.inf:
        return f"tolerance must be a number of at least 0, not {row['tolerance']!r}"
    if row["status"] and not row["status"].startswith(STATUSES):
        return f"status must begin with one of {', '.join(STATUSES)}, not {row['status']!r}"
    if row["status"].startswith(STATUSES[:2]) and not row["options"]:
        return f"the status {row['status']!r} needs options to compute the figure from; without them: not computable, or none"
    if row["status"].startswith(STATUSES[2]) and row["options"]:
        return f"the status {row['status']!r}, and options that compute the figure; leave one of them out"
    return None


def number(text: Any) -> float:
    """The number that a field holds; NaN for any other text, and for a field that is missing."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


# --------------------------------------------------------------------------------------------------------- computing


def recompute(row: Mapping[str, str]) -> float:
    """The row's figure in its unit, from its options. Raises NotCovered, or ValueError for what is wrong with them."""
    if not row["options"]:
        of_status = row["status"].startswith(STATUSES[2])
        raise NotCovered(f"{'not computable, as its status says: ' * of_status}the row has no options")
    try:
        options = parse_json(row["options"])
    except ValueError as error:
        raise ValueError(f"row {row['id']!r}: the options are not JSON ({error})") from error
    try:
        scale, measure = _known("unit", row["unit"], UNITS)
        figure = _figure(options, QUANTITIES.get(row["quantity"]))
        if figure.measure != measure:
            what = MEASURES.get(figure.measure, "what no unit measures")
            fit = [unit for unit, (_, m) in UNITS.items() if m == figure.measure]
            raise ValueError(
                f"the unit {row['unit']!r} is one of {MEASURES[measure]}, and the options compute {what}"
                + (f"; units of that: {', '.join(fit)}" if fit else "")
            )
        return figure.value / scale
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"row {row['id']!r}: {error}") from error


def _figure(given: Any, quantity: str | None) -> Figure:
    """What options say. `quantity` is the column's."""
    if not isinstance(given, dict):
        raise ValueError(f"options must be a JSON object, not {given!r}")
    for name in given:
        _known("option", name, [field.name for field in fields(Options)])
    options = Options(**given)
    _check_effect(options, given)
    counted, inherited = options.quantity or quantity, {name: given[name] for name in INHERITED if name in given}
    if options.sum is None:
        value, measure = _term(options, counted)
    else:
        terms = [_figure({**inherited, **term}, counted) for term in options.sum]
        value, (measure, *others) = sum(t.value for t in terms), dict.fromkeys(t.measure for t in terms)
        if others:
            raise ValueError(f"sum adds {' and '.join(MEASURES.get(m, 'others') for m in (measure, *others))}")
    if options.bytes is not None:
        if measure != COUNT:
            raise ValueError(f"bytes makes a size of parameters; these options compute {MEASURES.get(measure, 'no count')}")
        value, measure = value * _bytes(options.bytes), SIZE
    value *= options.times
    if options.of is None:
        return Figure(value, measure)
    if counted == "share" and measure == RATIO:
        raise ValueError("of divides a share, which is trainable / total already: leave of out, or count trainable")
    whole = _figure({**inherited, **options.of}, quantity)
    if not whole.value:
        raise ValueError("of is 0, and nothing can be divided by it")
    return Figure(value / whole.value, (measure[0] - whole.measure[0], measure[1] - whole.measure[1]))


def _check_effect(options: Options, given: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that changes nothing where it stands."""
    given = [name for name, value in given.items() if value is not None or name == "config"]
    what = _computed(given)
    for name in given:
        if name not in (what, "bytes", "times", "of", *USED[what]):
            where = "in a count" if what == COUNTING else f"beside {what}"
            raise ValueError(f"{name} has no effect {where}: leave it out{', or put it into the terms' * (what == 'sum')}")
    if "task" in given and "num_labels" not in given and what != "sum":
        raise ValueError("task has no effect without num_labels: leave it out, or say how many classes the head has")
    if options.sum is not None:
        if not options.sum:
            raise ValueError("sum must not be empty")
        for name in USED["sum"]:
            terms = [*options.sum, *([options.of] if options.of is not None and name in INHERITED else [])]
            if name in given and all(name in term or name not in USED[_computed(term)] for term in terms):
                raise ValueError(f"{name} has no effect beside sum, none of whose terms takes it: leave it out")


def _computed(given: Iterable[str]) -> str:
    """Which of `USED` options of these names compute."""
    return next((name for name in USED if name in given), COUNTING)


def _bytes(given: float | str) -> float:
    """Bytes of a parameter."""
    if not isinstance(given, str):
        return given
    weights, size = _known("block format", given, BLOCK_FORMATS)
    return size / weights


def _term(options: Options, quantity: str | None) -> Figure:
    """A number of a code book, or what a quantized weight, a line of a ledger, or a count has."""
    if options.code is not None:
        from ..quant.codebooks import CODES_4BIT

        for name in options.code:
            _known("argument of code", name, ("quant_type", "index"))
        book = _known("quant_type", options.code.get("quant_type"), CODES_4BIT)()
        return Figure(float(book[_known("index", options.code.get("index"), range(len(book)))]), RATIO)
    if options.quantize_4bit is not None:
        return Figure(_known("line", options.line, _quantized(options.quantize_4bit)) / SAMPLE, DENSITY)
    if options.model is None:
        raise ValueError("the options name no model")
    arch = architecture(options.model, options.num_labels, options.task)
    configs, lines = ([v] if not isinstance(v, list) else v for v in (options.config, options.line))
    if not configs:
        raise ValueError("config must not be an empty list; of a model that is not trained it is frozen")
    configs = [_config(value, arch) for value in configs]
    if options.ledger is not None:
        ledger = _ledger(arch, configs, options.ledger)
        known = {**ledger.held, "model states": ledger.model_states, "total": ledger.total}
        return Figure(sum(_known("line", line, known) for line in lines), SIZE)
    if quantity is None:
        raise ValueError("the options must say which quantity this is: trainable, stored, total or share")
    if options.only is not None:
        _check_only(arch, configs, options.only, quantity)
    return Figure(getattr(_count(arch, configs, options.only), quantity), RATIO if quantity == "share" else COUNT)


def _ledger(arch: Architecture, configs: list, arguments: Mapping[str, Any]) -> MemoryLedger:
    """A ledger; of several methods together, of the model's states: what each adds to, or takes from, the frozen model's."""
    for name, other in (("batch", "seq_len"), ("double_quantization", "quantization")):
        if arguments.get(name) is not None and arguments.get(other) is None:
            raise ValueError(f"the ledger's {name} has no effect without {other}: leave it out")
    if len(configs) == 1:
        return memory_ledger(arch, configs[0], **arguments)
    if arguments.get("seq_len") is not None:
        raise ValueError("of several methods together a ledger has the model's states alone: leave seq_len out")
    base, *ledgers = (memory_ledger(arch, config, **arguments).held for config in ("frozen", *configs))
    held = {line: base.get(line, 0) + sum(x.get(line, 0) - base.get(line, 0) for x in ledgers) for line in STATE_LINES}
    return MemoryLedger(held, held)


def _check_only(arch: Architecture, configs: list, only: str, quantity: str) -> None:
    """Raises ValueError, with the names that there are, where no parameter of those counted has such a name."""
    chosen = stored_parameters if quantity == "stored" else trained_parameters
    names = dict.fromkeys(name for config in configs for name in chosen(arch, config))
    if quantity == "total":
        names = {**dict.fromkeys(arch), **names}
    check_patterns("only", only)
    if not any(match(only, name, whole=True) for name in names):
        known = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", r"\\d+", name) for name in names))
        near = difflib.get_close_matches(only, known, n=SHOWN, cutoff=0) if len(known) > SHOWN else known
        raise ValueError(
            f"only={only!r} is the whole name of none of the {quantity} parameters; nearest: {', '.join(near) or 'there are none'}"
        )


def _quantized(arguments: dict[str, Any]) -> dict[str, int]:
    """Bytes of the codes and of the scales of a quantized sample."""
    import numpy as np

    from ..quant import quantize_4bit

    packed, state = quantize_4bit(np.zeros(SAMPLE, np.float32), **arguments)
    nested = 0 if state.state2 is None else state.state2.absmax.nbytes
    return {"codes": packed.nbytes, "absmax": state.absmax.nbytes + nested}


def _config(value: Any, arch: Architecture) -> Any:
    """A method's configuration from the content of an adapter_config.json; names and null stay as they are."""
    if not isinstance(value, dict):
        return value
    _known("peft_type", value.get("peft_type"), {**PEFT_TYPES, **COUNTED})
    return counted_config(value, arch)


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
    """What becomes of each row (of `read_published()` by default). A row that is wrong is one with the verdict "error"."""
    rows = read_published() if rows is None else list(rows)
    first = {row["id"]: i for i, row in reversed([*enumerate(rows)])}
    return [_audited(row, first[row["id"]] != i) for i, row in enumerate(rows)]


def _audited(row: Mapping[str, str], again: bool) -> AuditedRow:
    solved = "solved" in (row["status"] or "")
    problem = _problem(row) or ("used twice as an id; every row needs its own" if again else None)
    if problem:
        return AuditedRow(row, None, "error", None, solved, problem)
    try:
        computed = recompute(row)
    except NotCovered as why:
        return AuditedRow(row, None, "not covered", None, solved, str(why))
    except ValueError as error:
        return AuditedRow(row, None, "error", None, solved, str(error).removeprefix(f"row {row['id']!r}: "))
    agrees = abs(computed - float(row["published_value"])) <= float(row["tolerance"]) * (1 + 1e-9)
    claimed = not row["status"] or row["status"].startswith(STATUSES[0])
    return AuditedRow(row, computed, "reproduces" if agrees else "differs", agrees == claimed, solved)


def tally(audited: Iterable[AuditedRow]) -> dict[str, int]:
    """How many rows reproduce, differ, are not covered and are wrong, how many were solved for, and how many surprise."""
    audited = list(audited)
    counts = Counter(a.verdict for a in audited)
    return {
        "rows": len(audited),
        **{verdict: counts[verdict] for verdict in ("reproduces", "differs", "not covered", "error")},
        "solved from the figure": sum(a.solved and a.computed is not None for a in audited),
        "not as their status says": sum(a.expected is False for a in audited),
    }
