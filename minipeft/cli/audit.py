"""Recompute the literature's counts and memory figures.

297 parameter counts, memory figures and code values of papers and repositories are shipped with this package. Each is
computed again, from the shapes of the model and the options of the method. A verdict is
    reproduces     within the row's tolerance
    differs        outside of it
    not covered    the row has no options: its figure does not follow from shapes, or its status claims nothing
    error          the row is wrong, and what is wrong; all other rows are audited. --verdict and --unexpected keep it
and ends in * where an option was solved for from the figure itself, in ! where the row's status says otherwise. Below a
row that does not reproduce stand its own notes.

FILE.csv audits figures of your own. Its first line names the columns, in any order:
    id, quantity, unit, published_value, tolerance, status, options
    and, for the reader alone, any of: source, model, method, hyperparameters, notes, ...
unit is one of what the options compute: of a count params, elements, K, M or B; of a ratio %, fraction, x or 1; of a
size bytes, KiB, MiB, GiB, KB, MB, GB or TB; of a size for each parameter bits/param or bytes/param.
tolerance is in that unit. status may be empty (as if it said reproduces), or begin with "reproduces", "does not
reproduce" or, without options, "not computable"; "(solved)" behind it is the * above.
options says, as JSON, how to compute the row; one that changes nothing is an error:
    model       a published model's name, a config.json's content, a name with changes, or a number of parameters
    num_labels  classes of a classification head; task: "SEQ_CLS" or "QUESTION_ANS"
    config      an adapter_config.json's content, a list of them, "head", "frozen", or null for full fine-tuning
    quantity    "trainable", "stored", "total" or "share", where the column does not say it
    only        a regular expression for whole names: count only parameters of such names. `minipeft count MODEL
                --method full` lists a model's, and of any other method those that it trains
    ledger      arguments of memory_ledger, and line: which of its lines, a list of them, "model states" or "total"
    bytes       bytes a parameter, a number or a GGUF block format such as "Q4_0"; times: a factor; sum: a list of
                options to add; of: options to divide by
    quantize_4bit, code    a 4-bit weight's bytes, a code book's number
All of them: python -c "import minipeft.accounting.published as p; print(p.Options.__doc__)". For example, mine.csv:

id,quantity,unit,published_value,tolerance,status,options
lora,trainable parameters,M,0.79,0.005,,"{""model"": ""gpt2-m"", ""config"": {""peft_type"": ""LORA"", ""r"": 8}}"
full,memory,GB,107.8,0.1,,"{""model"": ""llama-7b"", ""ledger"": {""precision"": ""mixed""}, ""line"": ""model states""}"

Conventions:
    c_attn of GPT-2 and GPT-3 makes queries, keys and values: LoRA on queries and values alone says
    "target_modules": ["c_attn"], "enable_lora": [true, false, true]. VeRA has no such option: its figures of GPT-3 are
    counted on OPT's layers of the same shapes, {"model_type": "opt", ...} with q_proj and v_proj.
    A prompt on T5 is one, as in its paper; "num_transformer_submodules": 2 makes it two, as PEFT does
    (one for the encoder, one for the decoder); so does "task_type": "SEQ_2_SEQ_LM".
    modules_to_save are copies, and the total counts the frozen ones beside them, as PEFT does.
    Methods that this package counts and does not train: ADAPTION_PROMPT, BOFT, C3A, DELORA, FOURIERFT, HRA, MISS,
    RANDLORA, ROAD, SHIRA, VBLORA. AdaLoRA counts at its ranks of the start, and needs no total_step.

The exit status is 0 when every row is as its status says, 1 when one is not (a row without a status is expected to
reproduce), 2 when a row or the file is wrong.

examples:
  minipeft audit
  minipeft audit --verdict differs
  minipeft audit --source QLoRA
  minipeft audit mine.csv --unexpected
  minipeft audit --footprints
  minipeft audit --json
"""

from __future__ import annotations

import math
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
    parser.add_argument("--unexpected", action="store_true", help="show only rows that are not as their status says (!)")
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
    shown = [f for f in findings if f.verdict == "error" or _asked_for(f, args)]
    counts = mp.accounting.published.tally(findings)
    if args.json:
        print_json({"rows": [as_json(f) for f in shown], "tally": counts})
    else:
        width = max(80, min(shutil.get_terminal_size().columns, 120)) if sys.stdout.isatty() else 80
        print(*table(shown, width), textwrap.fill(summary(counts), width), sep="\n")
    if counts["error"]:
        first = next(f for f in shown if f.verdict == "error")
        more = f" ({counts['error']} rows are wrong; each stands in the list)" if counts["error"] > 1 else ""
        raise ValueError(f"row {first.row['id'] or '(no id)'!r}: {first.reason}{more}")
    return 1 if counts["not as their status says"] else 0


def _asked_for(finding: mp.accounting.published.AuditedRow, args: Arguments) -> bool:
    verdict = args.verdict in (None, finding.verdict.replace(" ", "-"))
    return verdict and (finding.expected is False or not args.unexpected)


def as_json(finding: mp.accounting.published.AuditedRow) -> dict[str, Any]:
    """One row, with numbers as numbers."""
    row = finding.row
    shown = ("id", "source", "table_or_path", "model", "method", "hyperparameters", "quantity", "unit", "status", "notes")
    number = mp.accounting.published.number
    published, tolerance = (
        x if math.isfinite(x := number(row[name])) else None for name in ("published_value", "tolerance")
    )
    return {key: row[key] for key in shown if key in row} | {
        "published": published, "tolerance": tolerance,
        "computed": finding.computed, "verdict": finding.verdict, "as_its_status_says": finding.expected,
        "solved_from_the_figure": finding.solved, "reason": finding.reason,
    }  # fmt: skip


def table(findings: Sequence[mp.accounting.published.AuditedRow], width: int) -> Iterator[str]:
    """The lines of a table of at most `width` columns: a heading for each source, a line for each row, and what is to
    be said of it: why it has no figure, and its own notes where it does not reproduce.
    """
    yield _line("", "published", "computed", "unit", "verdict")
    source = None
    for finding in findings:
        row = {key: value or "" for key, value in finding.row.items()}
        if row.get("source") and row["source"] != source:
            source = row["source"]
            yield ""
            yield from textwrap.wrap(source, width)
        label, printed = f"  {row['id'] or '(no id)'}", grouped(row["published_value"])
        if len(label) + len(printed) >= PUBLISHED:
            yield label
            label = ""
        mark = ("*" if finding.solved and finding.computed is not None else "") + "!" * (finding.expected is False)
        computed = "-" if finding.computed is None else readable(finding.computed, row["published_value"])
        yield _line(label, printed, computed, row["unit"], f"{finding.verdict} {mark}")
        notes = f"notes: {row['notes']}" if row.get("notes") and finding.verdict != "reproduces" else ""
        for text in filter(None, (finding.reason, notes)):
            yield from textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ")
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
    surprises, solved, wrong = (counts[k] for k in ("not as their status says", "solved from the figure", "error"))
    others = "other " if wrong else ""
    return (
        f"{counts['rows']} rows: {counts['reproduces']} reproduce, {counts['differs']} differ, "
        f"{counts['not covered']} not covered{f', {wrong} wrong' if wrong else ''}. "
        + (f"{solved} (*) with a hyperparameter solved from the figure itself. " if solved else "")
        + (f"{surprises} (!) not as their status says." if surprises else f"Every {others}row is as its status says.")
    )
