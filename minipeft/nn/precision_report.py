"""Where a 16-bit format gave out: how many numbers each op of each module rounded to infinity, and how many to zero.

    with mp.PrecisionReport(model) as report, mp.autocast("float16"):
        model.loss(ids, ids).backward()
    print(report)

    first overflow   none
    first flush      step 1, backward, linear in model.layers.1.mlp.down_proj: 5,120 of 16,384 numbers (31.2 %)
    ...

An overflow is a finite number that has become infinite; a flush one that was not zero and has become zero.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from ..autograd.autocast import observed_by
from ..backend import Array, read, xp_of
from .module import Module
from .watch import called_through


class Rounded(NamedTuple):
    """What was rounded at one place: of `size` numbers, `overflowed` became infinite, and `flushed` zero.

    step       the first in which one did, from 1 on
    direction  "forward": the inputs and results of the op; "backward": the gradients of them
    module     path of the innermost module whose call the op was a part of; "" outside all
    """

    step: int
    direction: str
    op: str
    module: str
    size: int
    overflowed: int
    flushed: int

    def __str__(self) -> str:
        where = f"step {self.step}, {self.direction}, {self.op}" + f" in {self.module}" * bool(self.module)
        kinds = ((self.overflowed, "became infinite"), (self.flushed, "became zero"))
        said = [f"{n:,} of {self.size:,} numbers ({n / self.size:.2%}) {what}" for n, what in kinds if n]
        return f"{where}: {', '.join(said) or 'none'}"


class PrecisionReport:
    """Looks on while `autocast` rounds: `with PrecisionReport(model) as report:` around training, or around one step.

    Args:
        model: whose modules' paths are named; None names the ops alone.

    first_overflow  the first place at which a number became infinite, with the counts of that time; None: nowhere
    first_flush     the first at which a gradient became zero
    rows            every place at which one did, in order, its counts summed over the steps
    step            of the next rounding; in a Trainer, `train(callbacks=[report])` counts it

    Each rounding is counted, for which a device is waited.
    """

    only_looks = True  # as a Callback

    def __init__(self, model: Module | None = None):
        self.model, self.step = model, 1
        self.first_overflow: Rounded | None = None
        self.first_flush: Rounded | None = None
        self._rows: dict[tuple[str, str, str], Rounded] = {}
        self._inside = [""]  # the paths of the modules that are being called
        self._stack = ExitStack()

    @property
    def rows(self) -> list[Rounded]:
        """Every place at which a number became infinite or zero."""
        return [row for row in self._rows.values() if row.overflowed or row.flushed]

    def __enter__(self) -> PrecisionReport:
        if self.model is not None:
            self._stack.enter_context(called_through(list(self.model.named_modules()), self._called))
        self._stack.enter_context(observed_by(self._observe))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def before_step(self, model: Any, step: int) -> None:
        """The backward pass of a step is over."""
        self.step = step + 1

    def after_step(self, model: Any, step: int, record: dict[str, Any]) -> None:
        """Nothing is left to be seen of a step."""

    def _called(self, path: str, call: Callable[[], Any]) -> Any:
        self._inside.append(path)
        try:
            return call()
        finally:
            self._inside.pop()

    def _observe(self, op: str) -> Callable[[str, Array, Array], None]:
        path = self._inside[-1]
        return lambda direction, before, after: self._note(direction, op, path, before, after)

    def _note(self, direction: str, op: str, path: str, before: Array, after: Array) -> None:
        xp = xp_of(before)
        infinite, zero = (xp.isinf(after) & xp.isfinite(before)).sum(), ((after == 0) & (before != 0)).sum()
        n, m = (int(count.item()) for count in read(infinite, zero))
        now, key = Rounded(self.step, direction, op, path, before.size, n, m), (direction, op, path)
        self.first_overflow = self.first_overflow or (now if n else None)
        self.first_flush = self.first_flush or (now if m and direction == "backward" else None)
        if (row := self._rows.get(key)) is not None:
            first = row.step if row.overflowed or row.flushed else self.step
            now = row._replace(step=first, size=row.size + now.size, overflowed=row.overflowed + n, flushed=row.flushed + m)
        self._rows[key] = now

    def __repr__(self) -> str:
        """The first overflow, the first flush of gradients, and the largest shares of each."""
        lines = [f"first overflow   {self.first_overflow or 'none'}", f"first flush      {self.first_flush or 'none'}"]
        for what, of in (("infinite", "overflowed"), ("zero", "flushed")):
            rows = [row for row in self.rows if getattr(row, of)]
            rows.sort(key=lambda row: -getattr(row, of) / row.size)
            lines += [f"most {what:11s} {row}" for row in rows[:3]]
        return "\n".join(lines)
