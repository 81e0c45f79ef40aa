"""Recompute the literature's counts and memory figures.

297 parameter counts and memory figures of papers and repositories are shipped with this package. Each is computed
again, from the shapes of the model and the options of the method. A verdict is
    reproduces     within the row's tolerance
    differs        outside of it; the likely reason is shown
    not covered    the method, the model or the quantity is not of this package, or it was measured and not derived
and ends in * where a hyperparameter was solved from the figure itself, in ! where the row's status says otherwise.

FILE.csv audits figures of your own. Its first line names the columns, in any order:
    id, quantity, unit, published_value, tolerance, status, options
    and, for the reader, any of: source, model, method, hyperparameters, notes, ...
unit is params, elements, K, M or B; % or fraction; bytes, KiB, MiB, GiB, KB, MB, GB or TB; bits/param or bytes/param.
tolerance is in that unit. status may be empty, or begin with "reproduces", "does not reproduce" or "not computable".
options says, as JSON, how to compute the row:
    model       a published model's name, a config.json's content, a name with changes, or a number of parameters
    num_labels  classes of a classification head
    config      an adapter_config.json's content, a list of them, "head", "frozen", or null for full fine-tuning
    quantity    "trainable", "stored", "total" or "share", where the column does not say it
    only        a regular expression: count only parameters of such names
    ledger      arguments of memory_ledger, and line: which of its lines, or "model states"
    bytes       bytes a parameter; times: a factor; sum: a list of options to add; of: options to divide by
All of them: python -c "import minipeft.accounting.published as p; print(p.Options.__doc__)". For example, mine.csv:

id,quantity,unit,published_value,tolerance,status,options
lora,trainable parameters,M,0.79,0.005,,"{""model"": ""gpt2-m"", ""config"": {""peft_type"": ""LORA"", ""r"": 8}}"
full,memory,GB,107.8,0.1,,"{""model"": ""llama-7b"", ""ledger"": {""precision"": ""mixed""}, ""line"": ""model states""}"

The exit status is 0 when every row is as its status says, 1 when one is not (a row without a status is expected to
reproduce), 2 when something cannot be read or is not known.

examples:
  minipeft audit
  minipeft audit --verdict differs
  minipeft audit --source QLoRA
  minipeft audit mine.csv
  minipeft audit --footprints
  minipeft audit --json
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import minipeft as mp

from .arguments import Arguments, Common, Parser, nearest
from .bars import print_json

PUBLISHED = 38  # where the published number ends


def add_arguments(parser: Parser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE.csv", help="figures of your own (default: the shipped ones)")
    parser.add_argument("--verdict", choices=("reproduces", "differs", "not-covered"), help="show only these rows")
    parser.add_argument("--footprints", action="store_true", help="measured memory of runs, and what is predicted for them")
    parser.add_argument("--source", metavar="TEXT", help="audit only rows whose source contains this")
    parser.options(Common, "json")


def run(args: Arguments) -> int:
    if args.footprints:
        from . import footprints

        return footprints.run(args)
    rows = mp.accounting.read_published(args.file)
    if args.source is not None:
        sources = [row.get("source") or "" for row in rows]
        rows = [row for row, source in zip(rows, sources) if args.source.lower() in source.lower()]
        if not rows:
            known = list(dict.fromkeys(re.split(r" \(|,", source)[0] for source in sources if source))
            hint = f"{nearest(args.source, known)} (known: {', '.join(known) or 'none'})"
            raise ValueError(f"no row's source contains {args.source!r}{hint}")
    findings = mp.accounting.audit(rows)
    shown = [f for f in findings if args.verdict in (None, f.verdict.replace(" ", "-"))]
    counts = mp.accounting.published.tally(findings)
    if args.json:
        print_json({"rows": [as_json(f) for f in shown], "tally": counts})
    else:
        width = max(80, min(shutil.get_terminal_size().columns, 120)) if sys.stdout.isatty() else 80
        print(*table(shown, width), textwrap.fill(summary(counts), width), sep="\n")
    return 1 if counts["not as their status says"] else 0


def as_json(finding: mp.accounting.published.AuditedRow) -> dict[str, Any]:
    """One row, with numbers as numbers."""
    row = finding.row
    shown = ("id", "source", "table_or_path", "model", "method", "hyperparameters", "quantity", "unit", "status")
    return {key: row[key] for key in shown if key in row} | {
        "published": float(row["published_value"]), "tolerance": float(row["tolerance"]),
        "computed": finding.computed, "verdict": finding.verdict, "as_its_status_says": finding.expected,
        "solved_from_the_figure": finding.solved, "reason": finding.reason,
    }  # fmt: skip


def table(findings: Sequence[mp.accounting.published.AuditedRow], width: int) -> Iterator[str]:
    """The lines of a table of at most `width` columns: a heading for each source, a line and a reason for each row."""
    yield _line("", "published", "computed", "unit", "verdict")
    source = None
    for finding in findings:
        row = finding.row
        if row.get("source") and row["source"] != source:
            source = row["source"]
            yield ""
            yield from textwrap.wrap(source, width)
        label, printed = f"  {row['id']}", grouped(row["published_value"])
        if len(label) + len(printed) >= PUBLISHED:
            yield label
            label = ""
        mark = ("*" if finding.solved and finding.computed is not None else "") + "!" * (finding.expected is False)
        computed = "-" if finding.computed is None else readable(finding.computed, row["published_value"])
        yield _line(label, printed, computed, row["unit"], f"{finding.verdict} {mark}")
        if finding.reason and finding.verdict != "reproduces":
            yield from textwrap.wrap(finding.reason, width, initial_indent="      ", subsequent_indent="      ")
    yield ""


def _line(label: str, published: str, computed: str, unit: str, verdict: str) -> str:
    return f"{label}{published:>{PUBLISHED - len(label)}}{computed:>15} {unit:<12}{verdict}".rstrip()  # of 80 columns


def readable(value: float, published: str) -> str:
    """A computed number with two more decimals than the published one has; whole numbers stay whole."""
    if "e" in published.lower() or (value and abs(value) < 1e-4):
        return f"{value:.3g}"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.{min(9, len(published.partition('.')[2]) + 2)}f}"


def grouped(published: str) -> str:
    """The published number as it is printed, its whole digits in threes."""
    whole, point, rest = published.partition(".")
    return f"{int(whole):,}{point}{rest}" if whole.isdigit() and len(whole) > 3 else published


def summary(counts: dict[str, int]) -> str:
    """The tally as a sentence."""
    surprises, solved = counts["not as their status says"], counts["solved from the figure"]
    return (
        f"{counts['rows']} rows: {counts['reproduces']} reproduce, {counts['differs']} differ, "
        f"{counts['not covered']} not covered. "
        + (f"{solved} (*) with a hyperparameter solved from the figure itself. " if solved else "")
        + (f"{surprises} (!) not as their status says." if surprises else "Every row is as its status says.")
    )
