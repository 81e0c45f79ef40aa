"""One training step, op by op: the bytes that live while each op runs, by line, and which op makes the peak.

    events   e_1 ... e_n      each op, each pullback, then the optimizer's step
    live     bytes [n, lines] of weights, states, activations, gradients, ... at the moment of e_i at which they are most
    peak     max_i Σ_lines live[i]       the total of `memory_ledger`

The step is that of this engine, run on shapes; a loop of PyTorch's allocates otherwise. With `measure=True` it is also
run, and what tracemalloc has seen in each event stands beside the prediction.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, xp_of
from ..files import write_text
from ..nn.module import Module
from ..train.metrics import panels, save_png
from . import recorder, walk
from .architectures import Architecture, architecture
from .memory import LINES, check_positive, named, optimizer_lines, optimizer_work, states_and_model
from .precision import OPTIMIZERS, PRECISIONS, Precision
from .recorder import Event
from .shapes import Shape

COLORS = {
    "frozen weights": "#8d99ae", "trained weights": "#5b6b8a", "adapters": "#2f4b7c", "master copies": "#b8a9c9",
    "gradients": "#59a14f", "optimizer states": "#8cd17d", "running averages": "#d4e6a5", "activations": "#f28e2b",
    "logits": "#ffbe7d", "working memory": "#e15759",
}  # fmt: skip
SIZES = (  # what the size of a method is called, and its fields
    ("rank", ("init_r", "target_r")), ("rank", ("r",)), ("width", ("bottleneck_size",)),
    ("virtual tokens", ("num_virtual_tokens",)),
)  # fmt: skip
COLUMNS = 500  # of a picture: as many events as can be told apart in it, each the largest of its neighbors


class Group(NamedTuple):
    """Arrays that live at the peak and differ in their layer alone: n of this shape, made by an op of modules whose paths
    have * for the layer's number; `nbytes` is their sum."""

    nbytes: int
    n: int
    line: str
    shape: Shape | None
    op: str
    path: str
    phase: str


@dataclass(frozen=True, eq=False)
class Timeline:
    """A step's bytes over its events.

    name      what was counted
    events    in the order in which they happen
    lines     names of the columns of `live`, in the order of `memory_ledger`
    live      int64 [events, lines]
    largest   what was made in the step and lives at the peak, the largest first
    measured  int64 [events]: what tracemalloc saw, or None
    """

    name: str
    events: tuple[Event, ...] = field(repr=False)
    lines: tuple[str, ...]
    live: Array = field(repr=False)
    largest: tuple[Group, ...] = field(repr=False)
    measured: Array | None = field(default=None, repr=False)

    @property
    def total(self) -> Array:
        """Bytes in each event, int64 [events]."""
        return self.live.sum(1)

    @property
    def peak(self) -> int:
        """The predicted peak, in bytes: `memory_ledger`'s total."""
        return int(self.total.max())

    @property
    def at_peak(self) -> Event:
        """The event of the peak, the first of several: its op, path and phase."""
        return self.events[int(self.total.argmax())]

    @property
    def lines_at_peak(self) -> dict[str, int]:
        """Bytes by line at the peak: the ledger's lines."""
        row = self.live[int(self.total.argmax())].tolist()
        return {line: n for line, n in zip(self.lines, row) if n}

    @property
    def deviation(self) -> tuple[int, Event] | None:
        """(measured - predicted) bytes of the event in which they differ most, and the event. None: nothing was run."""
        if self.measured is None:
            return None
        gap = self.measured - self.total
        worst = int(np.abs(gap).argmax())
        return int(gap[worst]), self.events[worst]

    def phases(self) -> Iterator[tuple[str, int, int]]:
        """(phase, its first event, the one after its last)."""
        return runs([event.phase for event in self.events])

    def to_chrome(self, path: str | os.PathLike) -> None:
        """Write the timeline in Chrome's Trace Event Format, for ui.perfetto.dev or chrome://tracing.

        An event takes a microsecond, whatever it would take. Phases contain blocks, which contain ops (complete events,
        "X"); live bytes by line, their sum and what was measured are counters ("C"), written where they change; the peak
        is an instant event ("i"), global, that names the op, the module and the phase.
        """
        write_text(path, json.dumps(chrome(self), separators=(",", ":"), ensure_ascii=False) + "\n")

    def plot(self, path: str | os.PathLike) -> None:
        """Write the picture, bytes by line over the events, as a PNG file."""
        figure, (axes,) = panels(1, 11, 4.8)
        draw(axes, self)
        axes.set_title(f"{self.name}\n{self.peak:,} bytes at the peak, in {self.at_peak}", fontsize=10, loc="left")
        figure.legend(loc="outside lower center", ncols=5, fontsize=9, frameon=False)
        save_png(figure, path)


def timeline(
    model: Any,
    config: Any = None,
    batch: int = 1,
    seq_len: int = 512,
    optimizer: str = "adamw",
    precision: str | Precision = "float32",
    checkpointing: bool | None = None,
    quantization: str | None = None,
    *,
    double_quantization: bool = True,
    labels: Array | None = None,
    measure: bool = False,
) -> Timeline:
    """The timeline of a training step in the steady state; arguments as in `memory_ledger`, whose total is the peak.

    `measure`: also run two steps on the CPU, and measure the second. A built model is copied first; of shapes one with
    random weights is made, for memory does not depend on their values.

    Raises ValueError as `memory_ledger`, where nothing is trained, and, with `measure`, for a precision other than
    float32, which is what is computed here, and for a step that needs more memory than this machine has.
    """
    p, optimizer = named("precision", precision, PRECISIONS), named("optimizer", optimizer, OPTIMIZERS)
    check_positive(batch=batch, seq_len=seq_len)
    states, build = states_and_model(model, config, p, quantization, double_quantization)
    if not states.trained:
        raise ValueError("nothing of the model is trained, so there is no step: give a method's config")
    constant = states.lines | optimizer_lines(states.trained, p, optimizer)
    constant |= {"gradients": 0, "running averages": states.averaged * p.states}
    twin = _checkpointed(build(), checkpointing)
    work = optimizer_work(states.trained, p, optimizer)
    events, changes = recorder.predicted(twin, batch, seq_len, p, optimizer, work, labels)
    found = _replayed(_name(model), constant, events, changes)
    if not measure:
        return found
    if p != PRECISIONS["float32"]:
        raise ValueError(f"a step is run in float32; precision={precision!r} is only predicted: leave measure out")
    if isinstance(model, Module) and xp_of(model.parameters()[0].data) is not np:
        raise ValueError("a step is measured in host memory: move a copy of the model there, model.copy().to('numpy')")
    there = _physical_memory()
    if found.peak > there:
        raise ValueError(f"the step needs {found.peak:,} bytes, and this machine has {there:,}: leave measure out")

    def make() -> Module:
        made = model.copy() if isinstance(model, Module) else _random(model, config, quantization, double_quantization)
        return _checkpointed(made, checkpointing)

    measured = recorder.measured(make, batch, seq_len, optimizer, labels, events)
    return dataclasses.replace(found, measured=measured)


def what_ifs(
    model: Any,
    config: Any = None,
    batch: int = 1,
    seq_len: int = 512,
    optimizer: str = "adamw",
    checkpointing: bool | None = None,
    **options: Any,
) -> dict[str, Timeline | str]:
    """The timelines of steps that differ in one thing: half and double rank (or width, or virtual tokens), half and double
    length, checkpointing, the optimizer's states. What cannot be is the sentence that says why. Arguments as in `timeline`."""
    usual = {"config": config, "seq_len": seq_len, "optimizer": optimizer, "checkpointing": checkpointing}
    if checkpointing is None:
        checkpointing = isinstance(model, Module) and walk.backbone_of(model).gradient_checkpointing
    cases = {name: {"config": changed} for name, changed in _sizes(config)}
    cases |= {f"length {n}": {"seq_len": n} for n in (seq_len // 2, 2 * seq_len) if n}
    cases |= {f"{'no ' * checkpointing}checkpointing": {"checkpointing": not checkpointing}}
    cases |= {name: {"optimizer": name} for name in ("adamw", "adamw_8bit", "sgd") if name != optimizer}
    found: dict[str, Timeline | str] = {}
    for name, changed in cases.items():
        try:
            found[name] = timeline(model, batch=batch, **usual | options | changed)
        except ValueError as error:
            found[name] = str(error)
    return found


def _sizes(config: Any) -> Iterator[tuple[str, Any]]:
    """("rank 4", the configuration) with half and with double the rank, or what the method has instead."""
    for name, fields in SIZES:
        if not all(getattr(config, field, None) for field in fields):
            continue
        for factor in (0.5, 2):
            sizes = {field: int(getattr(config, field) * factor) for field in fields}
            if all(sizes.values()):
                yield f"{name} {' to '.join(map(str, sizes.values()))}", dataclasses.replace(config, **sizes)
        return


# ------------------------------------------------------------------------------------------------------- what is made


def _name(model: Any) -> str:
    if isinstance(model, Module):
        return type(model).__name__
    return (model if isinstance(model, Architecture) else architecture(model)).name


def _checkpointed(model: Module, checkpointing: bool | None) -> Module:
    if checkpointing is not None:
        walk.backbone_of(model).gradient_checkpointing = checkpointing
    return model


def _random(model: Any, config: Any, quantization: str | None, double_quantization: bool) -> Module:
    """A model of these shapes under a method, with random weights."""
    from ..nn.transformer import Transformer

    arch = model if isinstance(model, Architecture) else architecture(model)
    made: Any = Transformer(arch.config, seed=0)
    if quantization:
        from ..quant.surgery import quantize_model

        made = quantize_model(made, quant_type=quantization, compress_statistics=double_quantization)
    if config == "head":
        from ..nn.heads import head_only

        return head_only(made)
    if config is not None:
        from ..peft.model import get_peft_model

        return get_peft_model(made, config)
    return made


def _physical_memory() -> int:
    """Bytes of this machine's memory; where the system does not say, more than any step needs."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 2**63


def _replayed(name: str, constant: Mapping[str, int], events: list[Event], changes: list[recorder.Change]) -> Timeline:
    """The timeline of what was recorded: each event at its largest moment, and what lives at the largest of all."""
    made = {change.line for change in changes}
    lines = tuple(line for line in LINES if constant.get(line) or line in made)
    now = np.array([constant.get(line, 0) for line in lines], np.int64)
    live, place = np.zeros((len(events), len(lines)), np.int64), {line: i for i, line in enumerate(lines)}
    total = most = int(now.sum())
    i, last = 0, 0  # the event, and how many changes had happened at the peak
    live[0] = now
    top = total
    for done, change in enumerate(changes, start=1):
        while i < change.event:
            i, top = i + 1, total
            live[i] = now
        now[place[change.line]] += change.nbytes
        total += change.nbytes
        if total > top:
            top, live[i] = total, now
        if total > most:
            most, last = total, done
    live[i + 1 :] = now
    return Timeline(name, tuple(events), lines, live, _largest(events, changes[:last]))


def _largest(events: list[Event], changes: list[recorder.Change]) -> tuple[Group, ...]:
    """The arrays that are alive after these changes, grouped."""
    alive: dict[int, recorder.Change] = {}
    for change in changes:
        if change.nbytes > 0:
            alive[change.key] = change
        else:
            alive.pop(change.key)
    groups: dict[tuple, list[int]] = {}
    for change in alive.values():
        event = events[change.made]
        key = change.line, change.shape, event.op, re.sub(r"\.\d+(?=\.|$)", ".*", event.path), event.phase
        groups.setdefault(key, []).append(change.nbytes)
    return tuple(sorted((Group(sum(sizes), len(sizes), *key) for key, sizes in groups.items()), key=_size, reverse=True))


def _size(group: Group) -> int:
    return group.nbytes


# ------------------------------------------------------------------------------------------------------------- shown


def runs(values: list[Any]) -> Iterator[tuple[Any, int, int]]:
    """(value, begin, end) of each stretch of equal values."""
    start = 0
    for value, equal in groupby(values):
        end = start + len(list(equal))
        yield value, start, end
        start = end


def block_of(path: str) -> str:
    """The block that a module's path lies in, model.layers.3 of model.layers.3.mlp.up_proj; "" for none."""
    found = re.match(r".*?\.\d+(?=\.|$)", path)
    return found[0] if found else ""


def chrome(timeline: Timeline) -> dict[str, Any]:
    """The object that `Timeline.to_chrome` writes."""
    where = {"pid": 1, "tid": 1}
    trace: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", **where, "args": {"name": f"{timeline.name}: a step of minipeft's engine"}},
        {"ph": "M", "name": "thread_name", **where, "args": {"name": "ops, each drawn as a microsecond"}},
    ]

    def span(name: str, kind: str, start: int, end: int, **more: Any) -> None:
        trace.append({"ph": "X", "name": name, "cat": kind, "ts": start, "dur": end - start, **where, **more})

    for phase, start, end in timeline.phases():
        span(phase, "phase", start, end)
        blocks = [block_of(event.path) for event in timeline.events[start:end]]
        for block, first, after in runs(blocks):
            if block:
                name = ".".join(block.split(".")[-2:])  # layers.3
                span(name, "block", start + first, start + after, args={"module": block})
            for i in range(start + first, start + after):
                op, path, _, pullback = timeline.events[i]
                span(f"{op} (pullback)" if pullback else op, "op", i, i + 1, args={"module": path})
    counters = {"live bytes": [dict(zip(timeline.lines, row)) for row in timeline.live.tolist()]}
    counters["live bytes, sum"] = [{"bytes": n} for n in timeline.total.tolist()]
    if timeline.measured is not None:
        counters["live bytes, measured"] = [{"bytes": n} for n in timeline.measured.tolist()]
    for name, rows in counters.items():
        before = None
        for i, row in enumerate(rows):
            if row != before:
                trace.append({"ph": "C", "name": name, "ts": i, **where, "args": row})
            before = row
    at, event = int(timeline.total.argmax()), timeline.at_peak
    what = {"bytes": timeline.peak, "op": event.op, "module": event.path, "phase": event.phase, "pullback": event.pullback}
    name = f"peak: {timeline.peak:,} bytes, {event}"
    trace.append({"ph": "i", "s": "g", "name": name, "cat": "peak", "ts": at, **where, "args": what})
    return {"traceEvents": trace, "displayTimeUnit": "ns", "otherData": {"peak": what, "lines at the peak": timeline.lines_at_peak}}


def draw(axes: Any, timeline: Timeline, columns: int = COLUMNS, top: int | None = None, words: bool = True) -> None:
    """Bytes by line over the events, the phases, and the peak; black: measured. The optimizer's step is drawn wider.

    `top`: bytes that the axis has room for, by default the peak. Without `words` the phases have no names.
    """
    n, total = len(timeline.events), timeline.total
    wide = max(1, n // 25)  # of one event among thousands nothing would be seen
    begins = np.unique(np.linspace(0, n - 1, min(columns, n - 1) + 1).astype(int))
    ends = np.append(begins[1:], n)
    x = np.append(begins, n - 1 + wide)
    scale, unit = _unit(top or timeline.peak)

    def tops(values: Array) -> Array:
        """The event with the most, of those that share a column."""
        found = [a + int(values[a:b].argmax()) for a, b in zip(begins, ends)]
        return np.array([*found, n - 1])

    rows = timeline.live[tops(total)].T / scale
    seen = [i for i in range(len(rows)) if timeline.live[:, i].any()]
    axes.stackplot(
        x, rows[seen], step="post", labels=[timeline.lines[i] for i in seen], linewidth=0,
        colors=[COLORS[timeline.lines[i]] for i in seen],
    )  # fmt: skip
    if timeline.measured is not None:
        measured = timeline.measured[tops(timeline.measured)] / scale
        axes.step(x, measured, where="post", color="black", linewidth=1, label="measured")
    for phase, start, end in timeline.phases():
        if start:
            axes.axvline(start, color="black", linewidth=0.6, linestyle=":")
        if words:
            at = (start + (n - 1 + wide if end == n else end)) / 2
            axes.text(at, -0.02, phase, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=9)
    axes.plot(int(total.argmax()) + 0.5, timeline.peak / scale, "v", color="black", markersize=6, clip_on=False)
    axes.set(xlim=(0, n - 1 + wide), ylim=(0, 1.06 * (top or timeline.peak) / scale), ylabel=unit, xticks=[])


def _unit(nbytes: int) -> tuple[int, str]:
    return next((10**power, unit) for power, unit in ((9, "GB"), (6, "MB"), (3, "kB"), (0, "bytes")) if nbytes >= 10**power)
