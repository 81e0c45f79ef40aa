"""What a training step does, op by op, while its bytes are counted: on shapes; or run, as tracemalloc has them.

    forward      each op, as a module calls it
    backward     each pullback, with the sums that the engine makes of what it gives; with checkpointing, ops again
    optimizer    its step

What happens between the beginning of one and of the next belongs to the first. A step that is run has the same ops in
the same order as its prediction, so both can be drawn on one axis.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..autograd.tensor import evaluated_by
from ..backend import Array, Rng
from ..nn.layers import Linear
from ..nn.module import Module
from ..nn.watch import called_through
from ..train import callbacks, optim
from . import walk
from .precision import Precision
from .shapes import Buffer, Meter, Shape

MAKE: dict[str, Callable[..., Any]] = {
    "adamw": optim.AdamW, "adam": optim.Adam, "adamw_8bit": optim.AdamW8bit, "sgd": optim.SGD,
    "momentum": partial(optim.SGD, momentum=0.9),
}  # fmt: skip


class Event(NamedTuple):
    """An op of a step, the path of the module that called it, "forward", "backward" or "optimizer", and whether it is
    the op's pullback that runs."""

    op: str
    path: str
    phase: str
    pullback: bool = False

    def __str__(self) -> str:
        """linear (pullback) in model.layers.3.mlp.up_proj, backward"""
        return f"{self.op}{' (pullback)' * self.pullback}{f' in {self.path}' if self.path else ''}, {self.phase}"


class Change(NamedTuple):
    """Bytes more or less in a line, in an event.

    made, shape    the event in which the array was made, and its shape; None: what an op works in
    key            no other has it while this one lives
    """

    event: int
    line: str
    nbytes: int
    key: int
    made: int
    shape: Shape | None


class _Tape:
    """Where a step is: the path of the module being called, and the phase. `begin` is called when an op begins."""

    path, phase = "", "forward"

    def begin(self, op: str, path: str = "", pullback: bool = False) -> None:
        """An op begins."""
        raise NotImplementedError

    def evaluated(self, compute: Callable, name: str, *arrays: Any, **options: Any) -> tuple:
        """The value and pullbacks that `compute` gives, noted now and when they run."""
        path = self.path
        self.begin(name, path)
        value, *pullbacks = compute(*arrays, **options)
        return value, *[pullback and partial(self._pull, pullback, name, path) for pullback in pullbacks]

    def _pull(self, pullback: Callable, name: str, path: str, g: Array) -> Any:
        self.begin(name, path, True)
        return pullback(g)


def _located(model: Module, tape: _Tape) -> AbstractContextManager[None]:
    """Inside, the tape knows which module is being called. A plain head keeps its class, at which the loss looks: the loss
    uses its weight and does not call it."""

    def around(path: str, call: Callable[[], Any]) -> Any:
        before, tape.path = tape.path, path
        try:
            return call()
        finally:
            tape.path = before

    heads = [path for path, m in model.named_modules() if type(m) is Linear and path.rpartition(".")[2] == "lm_head"]
    return called_through([(path, m) for path, m in model.named_modules() if path not in heads], around)


# ---------------------------------------------------------------------------------------------------------- on shapes


class _Recorder(Meter, _Tape):
    """A meter that notes every change; it evaluates ops as meters do."""

    def __init__(self, p: Precision):
        super().__init__(p.activations, p.gradients)
        self.events: list[Event] = []
        self.changes: list[Change] = []

    def begin(self, op: str, path: str = "", pullback: bool = False) -> None:
        self.event = len(self.events)
        self.events.append(Event(op, path, self.phase, pullback))

    def _evaluate(self, name: str, form: Any, *arrays: Any, **options: Any) -> tuple:
        return self.evaluated(partial(super()._evaluate, name, form), name, *arrays, **options)

    def count(self, buffer: Buffer, nbytes: int) -> None:
        super().count(buffer, nbytes)
        if nbytes:
            self.changes.append(Change(self.event, buffer.line, nbytes, id(buffer), buffer.event, buffer.shape))


def predicted(
    model: Module, batch: int, seq_len: int, p: Precision, optimizer: str, work: int, labels: Array | None
) -> tuple[list[Event], list[Change]]:
    """The events of a step, and the changes of bytes in them; `work` are those of the optimizer. Changes the model."""
    recorder = _Recorder(p)
    walk.onto_shapes(model, recorder)
    ids = np.zeros((batch, seq_len), np.int64)
    with recorder, _located(model, recorder):
        loss = model.loss(ids, ids if labels is None else labels, rng=Rng(0))
        recorder.phase = "backward"
        recorder.backward(loss)
    del loss
    recorder.phase = "optimizer"
    recorder.begin(optimizer)
    Buffer(recorder, work)
    return recorder.events, recorder.changes


# ------------------------------------------------------------------------------------------------------------ when run


class _Measurer(_Tape):
    """Reads, when an op begins, the most that the one before it had; without making anything that would be counted."""

    def __init__(self, events: list[Event]):
        self.live, self.events, self.n, self.start = np.zeros(len(events), np.int64), events, 0, 0

    def start_from(self, before: int) -> None:
        """The step begins; `before` are the bytes of arrays that were there before the model."""
        gc.collect()
        self.start = tracemalloc.get_traced_memory()[0] - (_arrays() - before)
        tracemalloc.reset_peak()

    def begin(self, op: str, path: str = "", pullback: bool = False) -> None:
        self.read()
        if self.n == len(self.events) or self.events[self.n][:2] != (op, path):
            raise RuntimeError(f"the step that is run has another op {self.n} than the predicted one: {op} of {path}")
        self.n += 1

    def read(self) -> None:
        """The most bytes since the last time are the last op's."""
        if self.n:
            self.live[self.n - 1] = tracemalloc.get_traced_memory()[1] - self.start
            tracemalloc.reset_peak()

    def evaluate(self, name: str, form: Callable, *arrays: Any, **options: Any) -> tuple:
        return self.evaluated(form, name, *arrays, **options)


def measured(
    make: Callable[[], Module], batch: int, seq_len: int, optimizer: str, labels: Array | None, events: list[Event]
) -> np.ndarray:
    """The most bytes in each of the events, int64 [events], of a step that is run: the second, which has the
    optimizer's states. `make` gives the model, which is trained.

    Bytes are those of the arrays there before the step, as NumPy reports them to tracemalloc, and of all that is
    allocated in it, the graph's Python objects included. Raises RuntimeError where the step has other events.
    """
    ours = not tracemalloc.is_tracing()
    if ours:
        tracemalloc.start()
    try:
        before = _arrays()
        model = make()
        vocabulary = walk.backbone_of(model).config.vocab_size
        ids = np.arange(batch * seq_len).reshape(batch, seq_len) % vocabulary
        labels = ids if labels is None else labels
        stepper = MAKE[optimizer]([q for q in model.parameters() if q.requires_grad], lr=1e-5)
        called = callbacks.Callbacks(model)
        model.loss(ids, labels, rng=Rng(0)).backward()
        called.before_step(1)
        stepper.step()
        called.after_step(1, {})
        stepper.zero_grad()
        tape = _Measurer(events)
        with evaluated_by(tape.evaluate), _located(model, tape):
            tape.start_from(before)
            loss = model.loss(ids, labels, rng=Rng(0))
            loss.backward()
        del loss
        tape.begin(optimizer)
        called.before_step(2)
        stepper.step()
        called.after_step(2, {})
        tape.read()
        return tape.live
    finally:
        if ours:
            tracemalloc.stop()


def _arrays() -> int:
    """Bytes of the NumPy arrays that are alive, of those made since tracemalloc was started."""
    domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([domain]).traces)
