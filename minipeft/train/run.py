"""A run: what all trainers do between their steps. It restores, counts, records, shows, saves and stops.

    run = Run(trainer, config, steps, callbacks, show={...})
    with run.start(resume):                # puts everything where the checkpoint was, opens the metrics file
        for step in run:                   # numbers from 1; saves a checkpoint after a step where one is due
            record = ...                   # one step of the trainer: of the optimizer, or an update of PPO
            run.record(record)             # a line of metrics.jsonl, and the progress
            run.stopped |= ...             # ends the loop, after a last checkpoint

Everything that a step does must depend on (seed, step) and on what a checkpoint holds alone: then a run that is resumed
ends with the same bytes as one that was never interrupted. A checkpoint holds the trained parameters, the optimizer's
state, what the callbacks and the trainer itself remember, and the run's identity: everything else that decides those
bytes, as JSON values, large things as their SHA-256. A run with another identity is refused. The identity is computed
once, when it is first needed, so a run that saves nothing hashes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import asarray, is_array, to_numpy, xp_of
from ..directory import locked
from ..files import expecting, parse_json
from ..options import fits
from . import checkpoint
from .callbacks import Callbacks
from .metrics import Metrics

Record = dict[str, Any]
_SAVED = {"identity", "metrics", "model", "optimizer", "state", "stopped"}  # what a run needs of a checkpoint


class Run:
    """One run of a trainer; see above.

    Args:
        trainer: has `trainable`, the trained parameters by name; their `optimizer`; `identity()`, what a run that
            resumes this one must share with it, as JSON values; `state()`, what the trainer remembers from step to
            step: JSON values, and dictionaries of arrays, each of which becomes a file of the checkpoint; and
            `load_state(state)`, which takes that up.
        config: has output_dir, save_steps and save_total_limit: where checkpoints and metrics go, and how often; and
            progress: whether stderr says how far the run is.
        total_steps: the number of steps of the whole run.
        callbacks: their state is saved, and one that has asked for the end ends the run.
        show: format strings of the fields of a record that the progress shows, such as {"loss": "loss {:.3f}"}.
        unit: what the progress calls a step.

    `step` is the number of steps done, `history` the records so far.
    """

    def __init__(
        self, trainer: Any, config: Any, total_steps: int, callbacks: Callbacks, show: Mapping[str, str],
        unit: str = "step",
    ):  # fmt: skip
        self.trainer, self.config, self.total_steps, self.callbacks = trainer, config, total_steps, callbacks
        self._show, self._unit = show, unit
        self.directory = None if config.output_dir is None else Path(config.output_dir)
        self.step, self.stopped = 0, False
        self.history: list[Record] = []

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a run that resumes this one must share with it."""
        identity = {**self.trainer.identity(), "callbacks": self.callbacks.names()}
        return json.loads(json.dumps(identity, default=_plain))  # as a checkpoint gives it back: tuples become lists

    @contextmanager
    def start(self, resume: bool | str | os.PathLike | None = None, before: Iterable[Record] = ()) -> Iterator[None]:
        """Start, or with `resume` (True, or the path of the last checkpoint in output_dir) go on; clean up at the end.

        `before` are the records of steps that were done before this start; a run that resumes has its checkpoint's.

        Raises ValueError for a fresh run into an output_dir that holds checkpoints, and to resume from any but its
        last; CheckpointError for one that is missing, damaged, or of another run; DirectoryInUse.
        """
        from .progress import progress  # and tqdm with it, which is only then needed

        directory = self.directory
        with locked(directory) if directory else nullcontext():
            lines = ""
            if resume:
                lines = self._resume(resume)
            elif directory and (found := checkpoint.last_checkpoint(directory)):
                raise ValueError(f"{found} is of an earlier run: resume from it, or choose another output_dir")
            self._metrics = Metrics(directory and directory / "metrics.jsonl", lines)
            for record in () if resume else before:
                self._metrics.write(record)
            self.history = self._metrics.history
            try:
                with progress(self.config.progress, self._unit, self.step, self.total_steps) as self._advance:
                    yield
            finally:
                self._metrics.close()

    def __iter__(self) -> Iterator[int]:
        while self.step < self.total_steps and not self.stopped:
            self.step += 1
            yield self.step
            self.stopped |= self.callbacks.stopped
            every = self.config.save_steps
            if every and (self.step == self.total_steps or self.stopped or self.step % every == 0):
                self.save()

    def record(self, record: Record) -> None:
        """Add a record to the history and the metrics file, show it if it has what is shown, and tell the callbacks."""
        self._metrics.write(record)
        self.callbacks.on_record(record)
        if self._show.keys() <= record.keys():
            self._advance(self.step, "  ".join(text.format(record[key]) for key, text in self._show.items()))

    def save(self) -> None:
        """Write a checkpoint of this step. Raises ValueError where there is one already."""
        moments, optimizer = checkpoint.pack_optimizer(self.trainer.optimizer)
        state = self.trainer.state()
        files = {name: value for name, value in state.items() if _is_file(value)}
        files |= {"model": {name: p.data for name, p in self.trainer.trainable.items()}, "optimizer": moments}
        files |= {"callbacks": kept} if (kept := self.callbacks.state_dict()) else {}
        content = {
            "state": {name: value for name, value in state.items() if name not in files},
            "stopped": self.stopped,
            "optimizer": optimizer,
            "metrics": "".join(self._metrics.lines),
            "identity": self.identity,
        }
        arrays = {file: {name: to_numpy(array) for name, array in group.items()} for file, group in files.items()}
        checkpoint.save_checkpoint(self.directory, self.step, arrays, content, self.config.save_total_limit)

    def _resume(self, source: bool | str | os.PathLike) -> str:
        """Put everything where the checkpoint was; returns the lines of the metrics file then."""
        if self.directory is None:
            raise ValueError("resume_from_checkpoint needs the output_dir of the run that is to be resumed")
        path = newest = checkpoint.last_checkpoint(self.directory)
        if source is not True:
            path = Path(source)
            if path.resolve().parent != self.directory.resolve():
                raise ValueError(f"{path} is not in output_dir {self.directory}; a run is resumed in its own directory")
        if newest is None:
            raise checkpoint.CheckpointError(f"{self.directory}: holds no checkpoint to resume from")
        step, arrays, content = checkpoint.load_checkpoint(path)
        lacking = sorted(_SAVED - {*content, *arrays})
        if lacking:
            raise checkpoint.CheckpointError(f"{path}: was not written by a trainer: it has no {', '.join(lacking)}")
        if path.resolve() != newest.resolve():
            raise ValueError(f"{newest} is later than {path.name}: resume from it, or remove it first")
        with expecting("what this run would have written", path, checkpoint.CheckpointError):
            checkpoint.check_identity(path, self.identity, content["identity"])
            stopped, metrics, parameters = content["stopped"], content["metrics"], self.trainer.trainable
            if not (fits(stopped, bool) and fits(metrics, str)):
                raise ValueError(f"stopped is {stopped!r}, metrics {metrics!r}")
            for record in map(parse_json, metrics.splitlines()):
                drawn = [record.get(name) for name in ("loss", "eval_loss")]  # the rest is a callback's own
                if not fits(record["step"], int) or not fits(drawn, list[float | None]):
                    raise ValueError(f"among the metrics is {record!r}")
            trained = arrays.pop("model")
            checkpoint.check_shapes(trained, {name: p.shape for name, p in parameters.items()})
            checkpoint.unpack_optimizer(self.trainer.optimizer, arrays.pop("optimizer"), content["optimizer"])
            xp = xp_of(*[p.data for p in parameters.values()])
            arrays = {file: {n: asarray(a.copy(), xp) for n, a in group.items()} for file, group in arrays.items()}
            kept = arrays.pop("callbacks", {})
            self.trainer.load_state({**content["state"], **arrays})
            self.callbacks.load_state_dict(kept)
            for name, p in parameters.items():
                p.data[...] = asarray(trained[name], xp)
                p._version += 1
            self.step, self.stopped = step, stopped
        checkpoint.remove_old(self.directory, self.config.save_total_limit)  # which a kill may have prevented
        return metrics


def _plain(value: Any) -> Any:
    """What JSON does not have: NumPy's numbers as Python's, and other things by their texts."""
    return value.item() if isinstance(value, np.generic) else repr(value)


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(is_array, value.values()))
