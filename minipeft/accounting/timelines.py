"""One training step, op by op: the bytes that live while each op runs, by line, and which op makes the peak.

    events   e_1 ... e_n      each op, each pullback, then the optimizer's step
    live     bytes [n, lines] of weights, states, activations, ... at the moment of e_i at which their sum is largest
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
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, xp_of
from ..files import write_text
from ..nn.module import Module
from ..train.metrics import panels, save_png
from . import recorder, timeline_shown, walk
from .architectures import Architecture, architecture
from .memory import LINES, optimizer_lines, optimizer_work, states_and_model
from .precision import OPTIMIZERS, PRECISIONS, Precision, check_positive, named
from .recorder import Event
from .shapes import Shape

SIZES = (  # what the size of a method is called, and its fields
    ("rank", ("init_r", "target_r")), ("rank", ("r",)), ("width", ("bottleneck_size",)),
    ("virtual tokens", ("num_virtual_tokens",)),
)  # fmt: skip


class Group(NamedTuple):
    """Arrays that live at the peak and differ in their layer alone, whose number is * in the path.

    n, nbytes    how many, and their bytes together
    shape        of each; None: what an op works in
    op, path, phase    which made them
    """

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
        return timeline_shown.runs([event.phase for event in self.events])

    def to_chrome(self, path: str | os.PathLike) -> None:
        """Write the timeline in Chrome's Trace Event Format, for ui.perfetto.dev or chrome://tracing.

        An event takes a microsecond, whatever it would take. Phases contain blocks, which contain ops (complete events,
        "X"); live bytes by line, their sum and what was measured are counters ("C"), written where they change; the
        peak is a global instant event ("i") that names the op, the module and the phase. Some 450 bytes an event.
        """
        write_text(path, json.dumps(timeline_shown.chrome(self), separators=(",", ":"), ensure_ascii=False) + "\n")

    def plot(self, path: str | os.PathLike) -> Any:
        """Write the picture, bytes by line over the events, as a PNG file; returns the figure, for a notebook."""
        figure, (axes,) = panels(1, 11, 4.8)
        timeline_shown.draw(axes, self)
        title = f"{self.peak:,} bytes at the peak, in {self.at_peak}"
        axes.set_title(f"{self.name}\n{title}", fontsize=10, loc="left")
        figure.legend(loc="outside lower center", ncols=5, fontsize=9, frameon=False)
        lines = ", ".join(f"{line} {n:,}" for line, n in self.lines_at_peak.items())
        figure.alt = f"what lives during {', '.join(phase for phase, *_ in self.phases())}; {title}: {lines}."
        save_png(figure, path)
        return figure


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
    """The timelines of steps that differ in one thing, by its name; what cannot be is the sentence that says why.

    Half and double rank (or width, or virtual tokens), half and double length, checkpointing, the optimizer's states.
    Arguments as in `timeline`.
    """
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
    found = [Group(sum(sizes), len(sizes), *key) for key, sizes in groups.items()]
    return tuple(sorted(found, key=lambda group: group.nbytes, reverse=True))
