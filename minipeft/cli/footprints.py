"""`minipeft audit --footprints`: the memory of published training runs, measured and predicted."""

from __future__ import annotations

import textwrap
from typing import Any

from ..accounting.footprints import SPLITS, WITHIN, Footprint, footprints, summary
from .arguments import Arguments
from .bars import console, grid, print_json

LEFT, RIGHT, CELLS = 0.5, 1.5, 21  # of the drawing, in predicted / measured


def run(args: Arguments) -> int:
    """Print the table and its summary. The exit status is 0: a prediction is no claim."""
    if args.file is not None:
        raise ValueError(f"--footprints has its own runs: leave {args.file} out")
    args.refuse(("verdict", "unexpected"), "with --footprints, whose runs are shipped")
    wanted = (args.source or "").lower()
    found = [f for f in footprints() if wanted in f.row["source"].lower()]
    if not found:
        raise ValueError(f"no run's source contains {args.source!r}")
    counts = summary(found)
    if args.json:
        print_json({"runs": [as_json(f) for f in found], "summary": counts})
        return 0
    table = grid("run", "measured", "predicted", "ratio", "0.5      1      1.5")
    for split in SPLITS:
        table.add_row(f"\n{split}", style="bold")
        for f in found:
            if f.row["split"] == split and f.ratio is not None:
                sizes = (f"{n / 2**30:.2f}" for n in (f.measured, f.predicted))
                table.add_row(f"{f.row['id']}{'' if f.close else ' !'}", *sizes, f"{f.ratio:.2f}", mark(f.ratio))
    out = console()
    out.print("GiB on one GPU; ! marks what is more than 15 % off\n", table, "", sep="\n")
    reasons: dict[str, list[str]] = {}
    for f in found:
        if f.row["reason"]:
            reasons.setdefault(f.row["reason"], []).append(f.row["id"])
    for reason, ids in reasons.items():
        out.print(textwrap.fill(f"{', '.join(ids)}: {reason}", 80, subsequent_indent="  ", break_on_hyphens=False))
    out.print("", *(sentence(split, count) for split, count in counts.items()), sep="\n")
    return 0


def as_json(f: Footprint) -> dict[str, Any]:
    """One run, its numbers in bytes."""
    return {key: value for key, value in f.row.items() if key not in ("options", "published_GiB")} | {
        "measured": f.measured, "predicted": f.predicted, "ratio": f.ratio, "within_15_percent": f.close,
    }  # fmt: skip


def mark(ratio: float) -> str:
    """A dot on a scale of predicted / measured; the bar between the two colons is what is within 15 %."""
    cells = [" "] * CELLS

    def place(x: float) -> int:
        return min(CELLS - 1, max(0, round((x - LEFT) / (RIGHT - LEFT) * (CELLS - 1))))

    for x, sign in ((1 - WITHIN, ":"), (1 + WITHIN, ":"), (1, "|"), (ratio, "●")):
        cells[place(x)] = sign
    return "".join(cells)


def sentence(split: str, count: dict[str, float]) -> str:
    """The summary of one split."""
    share = f"{count['within 15 %']} of {count['predicted']} within 15 %"
    median = "" if count["median"] is None else f", median ratio {count['median']:.2f}"
    first = f" ({count['at first']} when first predicted)" if "at first" in count else ""
    more = count["runs"] - count["predicted"]
    return f"{split}: {share}{first}{median}{f'; {more} more runs are not covered' * bool(more)}"
