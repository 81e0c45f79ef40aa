"""`minipeft memory --timeline FILE`: the step op by op, as a page with what-ifs, or as a trace for Perfetto."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import minipeft as mp

from .. import accounting
from ..options import configuration, option
from .arguments import Arguments
from .bars import size
from .outputs import check_file

SHOWN = 12  # rows of what lives at the peak
NARROW = 100  # columns of a small picture


@configuration(kw_only=True)
class TimelineOptions:
    """What is written of the step's course."""

    timeline: str | None = option(
        None, "the step op by op: a page with what-ifs, .html; a trace for ui.perfetto.dev, .json", metavar="FILE"
    )
    measure: bool = option(False, "run the step here too, with random weights, and draw what was measured")


def check(args: Arguments, mode: str) -> None:
    """Raises ValueError for a file that cannot be written, and a step that has no timeline; nothing is computed yet."""
    if args.timeline is None:
        return args.refuse(("measure",), "without --timeline, which shows what was measured")
    path = Path(args.timeline)
    if path.suffix not in (".html", ".json"):
        raise ValueError(f"--timeline {path}: a timeline is a page, .html, or a trace, .json: give such an ending")
    if mode != "training":
        raise ValueError(f"--timeline is of a training step: leave --{mode} out")
    if args.seq is None:
        raise ValueError("--timeline is of a step on sequences: give their length, --seq")
    check_file(args, path, "--timeline")


def write(args: Arguments, title: str, arch: Any, config: Any, options: dict[str, Any]) -> Any:
    """Write the file; returns the timeline. `options` are the ledger's. Raises ValueError as `accounting.timeline`."""
    options = {"batch": args.batch, "seq_len": args.seq, **options}
    found = accounting.timeline(arch, config, **options, measure=args.measure)
    found = dataclasses.replace(found, name=title)
    with mp.directory.locked(Path(args.timeline).parent, Path(args.timeline).name):
        if Path(args.timeline).suffix == ".json":
            found.to_chrome(args.timeline)
        else:
            mp.files.write_text(args.timeline, page(found, accounting.what_ifs(arch, config, **options)))
    return found


def record(args: Arguments, found: Any) -> dict[str, Any]:
    """What --json says of the file."""
    said = {"file": args.timeline, "bytes": Path(args.timeline).stat().st_size, "events": len(found.events)}
    said |= {"peak": found.peak, **found.at_peak._asdict()}
    if found.measured is not None:
        gap, event = found.deviation
        said["measured"] = {"peak": int(found.measured.max()), "largest_difference": gap, **event._asdict()}
    return said


def sentences(args: Arguments, found: Any) -> str:
    """What the command says of the file."""
    what = f"{size(Path(args.timeline).stat().st_size)}, {len(found.events):,} ops"
    lines = [f"timeline of minipeft's own step: {args.timeline} ({what})", f"the peak is in {found.at_peak}"]
    return "\n".join(lines if found.measured is None else [*lines, measured(found)])


def measured(found: Any) -> str:
    """How far a step that was run is from the prediction."""
    most, (gap, event) = int(found.measured.max()), found.deviation
    differs = f"the largest difference of an op is {gap / found.peak:+.1%} of the peak, in {event}"
    return f"measured, the peak is {size(most)}, {most / found.peak - 1:+.1%}; {differs}"


def page(found: Any, others: dict[str, Any]) -> str:
    """The timeline as a page, with the what-ifs beside it."""
    from ..accounting import timeline_shown
    from ..train.metrics import panels
    from .page import encoded, rendered
    from .plots import svg

    def picture(timeline: Any, name: str, width: float, height: float, **options: Any) -> str:
        figure, (axes,) = panels(1, width, height)
        timeline_shown.draw(axes, timeline, **options)
        if options.get("words", True):
            figure.legend(loc="outside lower center", ncols=6, fontsize=9, frameon=False)
        return encoded(svg(figure, name))

    steps = {"as asked": dataclasses.replace(found, measured=None)}
    steps |= {name: other for name, other in others.items() if not isinstance(other, str)}
    top = max(step.peak for step in steps.values())
    small = []
    for name, step in steps.items():
        drawn = picture(step, name, 4.2, 2.1, columns=NARROW, top=top, words=False)
        small.append((drawn, name, step, size(step.peak), _change(step.peak - found.peak)))
    rest = found.largest[SHOWN:]
    return rendered(
        "timeline.html.jinja", title=f"{size(found.peak)} at the peak of a training step", found=found,
        conclusions=conclusions(found, steps), picture=picture(found, "step", 11, 4.6), small=small, size=size,
        impossible={name: why for name, why in others.items() if isinstance(why, str)},
        largest=found.largest[:SHOWN], rest=(sum(g.n for g in rest), sum(g.nbytes for g in rest)),
    )  # fmt: skip


def _change(nbytes: int) -> str:
    return f"{'+' if nbytes > 0 else '−'}{size(abs(nbytes))}" if nbytes else ""


def conclusions(found: Any, steps: dict[str, Any]) -> list[str]:
    """What the timeline says: where the peak is and what it is made of, what lowers it most, how right it is."""
    lines, peak = found.lines_at_peak, found.peak
    number = int(found.total.argmax()) + 1
    largest = sorted(lines, key=lines.__getitem__, reverse=True)[:2]
    said = [f"The peak is in op {number:,} of {len(found.events):,}: {found.at_peak}."]
    parts = " and ".join(f"{line} ({size(lines[line])}, {lines[line] / peak:.0%})" for line in largest)
    said.append(f"Its largest parts are {parts}.")
    name, best = min(steps.items(), key=lambda item: item[1].peak)
    if best.peak < peak:
        said.append(f"Of the what-ifs, {name} lowers it most: to {size(best.peak)}, {1 - best.peak / peak:.0%} less.")
    else:
        said.append("None of the what-ifs lowers it.")
    if found.measured is not None:
        said.append(f"As {measured(found)}.")
    return said
