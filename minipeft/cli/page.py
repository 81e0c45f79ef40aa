"""A comparison as one HTML page that holds everything it shows: no script, no network, light and dark, for print too."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_text
from .plots import Rows, panel_svg

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #59636e; --line: #d4d9de; --best: #e3f3e6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #15181c; --soft: #9aa4ae; --line: #363c43; --best: #1d3a26; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p, li, dd { max-width: 46rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
.scroll:focus-visible { outline: 2px solid var(--soft); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; padding: .5rem .6rem; color: var(--soft); }
caption span { display: inline-block; max-width: calc(100vw - 4rem); }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); vertical-align: top; }
thead th { white-space: normal; vertical-align: bottom; font-weight: 600; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
td.best { background: var(--best); font-weight: 600; }
small { color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; } figcaption { color: var(--soft); font-size: .9rem; }
dl.sample { border-left: 3px solid var(--line); padding-left: .8rem; margin: 0 0 1.2rem; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem; white-space: pre-wrap; }
@media print {
  :root { --ink: #000; --paper: #fff; --soft: #444; --line: #bbb; --best: #eee; }
  main { max-width: none; padding: 0; } .scroll { overflow: visible; border: 0; } table { font-size: 7pt; }
  th, td { padding: .15rem .25rem; white-space: normal; } figure, tr, dl.sample { break-inside: avoid; }
}
"""

FIGURES = {
    "learning": "Loss on the task while learning: thin lines in training, marks on held-out examples; dashed, the base as it is.",
    "trade": "To the left is better at the task, down is less forgotten. Small marks are single seeds.",
    "memory": "Peak memory of a training step, weights, gradients and optimizer included; pale bars are predicted from shapes.",
}


def write_page(path: Path, settings: dict[str, Any], rows: Rows, shown: Sequence[tuple[Any, dict[str, str]]]) -> None:
    """Write the page; `rows` and `settings` are those of compare.json, `shown` samples with the answers of models."""
    title = f"Fine-tuning methods compared on {settings['data']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(introduction(settings))}</p>",
        "<h2>In short</h2>",
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in conclusions(rows)) + "</ul>",
        "<h2>The table</h2>",
        table(rows),
        "<h2>In pictures</h2>",
        '<div class="figures">' + "".join(figure(name, rows) for name in FIGURES) + "</div>",
        *(["<h2>What the models write</h2>", *map(sample, shown)] if shown else []),
        "<h2>How to read it</h2>",
        READING,
        "<h2>Settings</h2>",
        definitions(settings),
    ]
    write_text(path, PAGE.format(title=escape(title), style=STYLE, body="\n".join(parts)))


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

READING = """<ul>
<li><b>Task loss</b>: on held-out examples, in nats per token; lower is better, and 0.1 less makes the right token about ten
percent more probable. <b>General loss</b>: on general English of the kind that the shipped base was trained on.
<b>Forgotten</b>: by how much it rose.</li>
<li><b>Trained, share</b>: parameters that are trained, and their share of all. <b>Storage</b>: what is to be kept for each task.</li>
<li><b>Memory</b>: the peak of one step on the longest examples, everything included; measured, and predicted from shapes.</li>
<li><b>Step</b>: median seconds of a training step. <b>Token</b>: median milliseconds to generate one, with the method in
place, and after merging it into the weights where that is possible.</li>
<li>Where several seeds ran, numbers are means with standard deviations. Differences smaller than these mean nothing.</li>
</ul>"""


def introduction(settings: dict[str, Any]) -> str:
    """What was done, in two sentences."""
    seeds = settings["seeds"]
    several = f", each with {seeds} seeds" if seeds > 1 else ""
    return (
        f"Every method started from the same base ({settings['model']}) and learned for {settings['steps']} steps of "
        f"{settings['batch_size']} examples{several}. All were judged by the same {settings['held_out_examples']} held-out examples."
    )


def conclusions(rows: Rows) -> list[str]:
    """What the rows say: who learned most, who is as good within the spread and smaller, who forgot least, who is free."""
    base, *trained = rows
    best = min(trained, key=lambda row: row["task_loss"])
    lines = [
        f"{best['title']} learned most: task loss {best['task_loss']:.3f}{spread(best, 'task_loss')}, from the base's "
        f"{base['task_loss']:.3f}."
        if best["task_loss"] < base["task_loss"]
        else f"No method got below the base's task loss of {base['task_loss']:.3f}: more steps or another learning rate are needed."
    ]
    near = [row for row in trained if row["task_loss"] <= best["task_loss"] + margin(row, best) and row is not best]
    small = min(near, key=lambda row: row["storage"], default=None)
    if small is not None and small["storage"] < best["storage"]:
        lines.append(
            f"{small['title']} comes as close as the seeds can tell apart ({small['task_loss']:.3f}), and keeps "
            f"{megabytes(small['storage'])} MB a task instead of {megabytes(best['storage'])}."
        )
    gain = base["task_loss"] - best["task_loss"]
    useful = [row for row in trained if base["task_loss"] - row["task_loss"] >= gain / 2 > 0]
    if useful:
        kind = min(useful, key=lambda row: row["forgotten"])
        lines.append(
            f"Of those that learned at least half as much, {kind['title']} forgot least: {kind['forgotten']:+.3f} on general "
            f"text, {best['title']} {best['forgotten']:+.3f}."
        )
        lean = min(useful, key=peak)
        lines.append(f"Of the same, {lean['title']} needs the least memory: {megabytes(peak(lean))} MB at the peak of a step.")
    return lines


def margin(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The sum of two standard deviations of the task loss: what the seeds cannot tell apart. 0 with one seed."""
    return sum(deviation(row, "task_loss") or 0.0 for row in (a, b))


def deviation(row: dict[str, Any], key: str) -> float | None:
    """The standard deviation over the seeds; None with fewer than two."""
    values = [run[key] for run in row.get("seeds", [])]
    return statistics.stdev(values) if len(values) > 1 else None


def spread(row: dict[str, Any], key: str) -> str:
    """` ± 0.012`, or nothing with one seed."""
    s = deviation(row, key)
    return "" if s is None else f" ± {s:.3f}"


def peak(row: dict[str, Any]) -> int:
    """Peak memory: measured where it could be (not on a GPU)."""
    return row["memory_measured"] or row["memory_predicted"]


def megabytes(n: int | None) -> str:
    """Bytes in MB (10^6), to three figures, or - where there are none."""
    return "-" if n is None else f"{n / 1e6:,.{2 if n < 1e7 else 1 if n < 1e8 else 0}f}"


def table(rows: Rows) -> str:
    """All numbers, in a box of its own that scrolls where the screen is narrow; the best of a column is marked."""
    base, *trained = rows
    headings = (
        "Method", "Task loss", "Forgotten", "General loss", "Trained parameters", "Share, %", "Storage, MB",
        "Memory, MB", "predicted", "Step, s", "Token, ms", "merged",
    )  # fmt: skip
    best = {key: min(row[key] for row in trained) for key in ("task_loss", "forgotten", "storage", "seconds_per_step")}

    def number(row: dict[str, Any], key: str, text: str) -> str:
        marked = ' class="best"' if row is not base and row[key] == best.get(key) else ""
        plus_minus = spread(row, key) if key in ("task_loss", "forgotten") else ""
        return f"<td{marked}>{text}{f'<small>{plus_minus}</small>' if plus_minus else ''}</td>"

    lines = []
    for row in rows:
        learned = row is not base
        cells = [
            f'<th scope="row">{escape(row["title"])}</th>',
            number(row, "task_loss", f"{row['task_loss']:.3f}"),
            number(row, "forgotten", f"{row['forgotten']:+.3f}" if learned else "-"),
            f"<td>{row['general_loss']:.3f}</td>",
            f"<td>{row['trainable']:,}</td>",
            f"<td>{100 * row['trainable'] / row['parameters']:.2f}</td>",
            number(row, "storage", megabytes(row["storage"]) if learned else "-"),
            f"<td>{megabytes(row['memory_measured'])}</td>",
            f"<td>{megabytes(row['memory_predicted'])}</td>",
            number(row, "seconds_per_step", f"{row['seconds_per_step']:.3f}" if learned else "-"),
            f"<td>{1e3 * row['latency']:.2f}</td>",
            "<td>no</td>" if row["latency_merged"] is None else f"<td>{1e3 * row['latency_merged']:.2f}</td>",
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    return (
        '<div class="scroll" role="region" aria-label="Table of all methods" tabindex="0"><table>\n'
        "<caption><span>One line a method; the best of a column is marked.</span></caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def figure(name: str, rows: Rows) -> str:
    """A panel, in the colors that the reader's system asks for, with its text alternative."""
    light, dark = (base64.b64encode(panel_svg(name, rows, dark)).decode("ascii") for dark in (False, True))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="data:image/svg+xml;base64,{dark}">'
        f'<img src="data:image/svg+xml;base64,{light}" alt="{escape(alternative(name, rows))}"></picture>'
        f"<figcaption>{escape(FIGURES[name])}</figcaption></figure>"
    )


def alternative(name: str, rows: Rows) -> str:
    """What a figure shows, in words and numbers."""
    base, *trained = rows
    said = {
        "learning": lambda row: f"{row['title']} ends at {row['task_loss']:.2f}",
        "trade": lambda row: f"{row['title']} {row['task_loss']:.2f} and {row['forgotten']:+.2f}",
        "memory": lambda row: f"{row['title']} {megabytes(peak(row))} MB",
    }[name]
    opening = {
        "learning": f"Curves of the task loss over the steps, from {base['task_loss']:.2f}",
        "trade": "Points of task loss and rise of the loss on general text",
        "memory": "Bars of peak memory",
    }[name]
    return f"{opening}: {'; '.join(map(said, trained))}."


def sample(item: tuple[Any, dict[str, str]]) -> str:
    """A prompt, the answer of each model, and the reference."""
    prompt, answers = item
    pairs = (("Prompt", prompt.prompt), *answers.items(), ("Reference", prompt.reference))
    inner = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text.strip())}</dd>" for name, text in pairs)
    return f'<dl class="sample">{inner}</dl>'


def definitions(settings: dict[str, Any]) -> str:
    """The settings, all of them."""
    named = {key.replace("_", " "): value for key, value in settings.items() if key != "left_out"}
    items = [f"<li>{escape(str(key))}: {escape(str(value))}</li>" for key, value in named.items()]
    items += [f"<li>left out: {escape(key)}: {escape(why)}</li>" for key, why in settings["left_out"].items()]
    return f"<ul>{''.join(items)}</ul>"
