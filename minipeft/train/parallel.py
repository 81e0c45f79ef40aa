"""Data-parallel training: threads, or the workers of an executor, compute the gradients of a step's batches.

    here ── trainable arrays, batch b ──► a worker: L_b and its gradients ──► here: added in the order of the batches

One update is that of gradient accumulation over the same batches: each batch's gradient is the same up to rounding,
wherever it is computed, and the sum has a fixed order. What moves in a step are the trainable arrays and their gradients,
once for each batch; the model, with its frozen base, goes only with a batch whose worker has none yet. So LoRA moves the
share of the bytes that it trains.

Departures from PyTorch's DistributedDataParallel (Li et al. 2020, arXiv:2006.15704): 1. One process holds the optimizer
and sends the weights; there, every process holds all and they average gradients (all-reduce). 2. Workers may come and
go. 3. The mean is over the labels that count in the whole step, not a mean of the workers' means.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..autograd.autocast import autocast
from ..autograd.tensor import gradients
from ..backend import Array, Rng, is_array, xp_of
from ..nn.module import Module, Parameter
from ..nn.watch import is_watched
from ..threads import get_num_threads, one_blas_thread, one_thread, run_tasks, set_num_threads
from .batches import Batch, RowsOf, in_rows, in_two
from .evaluation import Loss, Statistics, on_device, with_statistics

_here = threading.local()  # .held: (key, model, loss) that this thread of a worker holds


class Part(NamedTuple):
    """A batch of a step: `share` is w_b / Σ w, its weight in the step's loss; the rest as in `training_step`."""

    batch: Batch
    share: float
    rng: Rng
    precision: str | None = None
    scale: float = 1.0


# Rows of a batch are spread over threads where each has this many multiplications (tokens times parameters) or more, as
# with fewer they only wait for Python's lock: a whole batch with fewer has one thread. And where the threads' gradients
# take no more bytes than this.
WORK, GRADIENTS = 1 << 27, 1 << 26

Result = tuple[Array, Statistics]  # L_b, a scalar, and the statistics of the batch: on the model's device


def in_precision(precision: str | None) -> AbstractContextManager[None]:
    """`autocast` in "bfloat16" or "float16"; with None, all stays as it is."""
    return autocast(precision) if precision else nullcontext()


def groups_of(
    model: Module, batch: Batch, trainable: Sequence[Parameter], precision: str | None, workers: Workers | None
) -> list[list[RowsOf]]:
    """The parts of a batch's rows, in groups that are computed one after the other: the parts of a group at once.

    One part a worker, or a thread where that pays; else two in turn where much would be padding; else the whole batch, also
    on a device, in a lower precision, and where somebody looks on (`Module.watch`, `PrecisionReport`).
    """
    if workers:
        return [[part] for part in in_rows(batch, workers.cut)] if workers.cut > 1 else [[(None, batch)]]
    if precision or is_watched() or xp_of(*[p.data for p in trainable]) is not np:
        return [[(None, batch)]]
    n, work = min(get_num_threads(), batch.arguments["labels"].shape[0]), work_of(model, batch)
    if n > 1 and work >= n * WORK and n * sum(p.data.nbytes for p in trainable) <= GRADIENTS:
        return [in_rows(batch, n)]
    return [[part] for part in (in_two(batch) if work >= 4 * WORK else [(None, batch)])]


def work_of(model: Module, batch: Batch) -> int:
    """Tokens times parameters: the multiplications of a forward pass, but for attention's."""
    return batch.tokens * sum(p.size for p in model.parameters())


def add_gradients(model: Module, loss: Loss, parts: Sequence[Part], trainable: Sequence[Parameter]) -> list[Result]:
    """Add the gradients of scale · share · L_b to the trainable parameters', part by part; L_b is not looked at.

    Several parts are computed each on a thread of its own, with all of its products: threads so meet once, not in every
    op, for which each has gradients of its own until they are added.
    """
    found: list[tuple[Result, list[Array | None]]] = [None] * len(parts)

    def run(i: int) -> None:
        part = parts[i]
        with in_precision(part.precision):
            L_b, statistics = with_statistics(loss(model, **on_device(part.batch, model, loss), rng=part.rng))
        factor = xp_of(L_b.data).asarray(part.share * part.scale, L_b.dtype)
        if len(parts) == 1:
            L_b.backward(factor)
        found[i] = (L_b.data, statistics), [] if len(parts) == 1 else gradients(L_b, factor, trainable)

    little = len(parts) == 1 and work_of(model, parts[0].batch) < WORK
    with one_blas_thread() if len(parts) > 1 else one_thread() if little else nullcontext():
        run_tasks([partial(run, i) for i in range(len(parts))])
    return _added_up(found, trainable)


def _added_up(found: Sequence[tuple[Result, list[Array | None]]], trainable: Sequence[Parameter]) -> list[Result]:
    """The results; the gradients of each are added to those of the trainable parameters, one after the other."""
    for _, own in found:
        for p, gradient in zip(trainable, own):
            if gradient is not None:
                p.grad = gradient if p.grad is None else np.add(gradient, p.grad, out=gradient)
    return [result for result, _ in found]


class Workers:
    """Computes the losses and gradients of a step's parts on an executor that is open (see `minipeft.executors`).

    model, loss: as the Trainer has them; each worker has a copy. `moved` counts the bytes of arrays that went to workers
    and came back. A step has `batches`, each of which can be computed in up to `rows` parts: `cut` is in how many it should
    be, for every worker to have one. Raises ValueError for a model on a device, and for more workers than a step has parts.
    """

    def __init__(
        self, executor: Any, model: Module, loss: Loss, trainable: dict[str, Parameter], batches: int, rows: int = 1
    ):  # fmt: skip
        if xp_of(*[p.data for p in model.parameters()]) is not np:
            raise ValueError("training on workers is for a model on the CPU; this one is on a device")
        self.executor, self.model, self.loss, self.trainable = executor, model, loss, list(trainable.values())
        workers = getattr(executor, "_max_workers", 0)  # of pools on this machine, which share its threads
        if workers > batches * rows:
            hint = f"set gradient_accumulation_steps to {workers} or more" if rows == 1 else "use fewer workers, or larger batches"
            raise ValueError(f"a step has {batches * rows} parts for {workers} workers: {hint}")
        self.cut = max(1, -(-workers // batches))
        self.threads = max(1, get_num_threads() // workers) if workers else None
        self.key = (os.getpid(), id(self), time.time_ns())  # of this run, among all that a worker has seen
        self.moved = 0

    def losses(self, parts: Sequence[Part]) -> list[Result]:
        """`add_gradients`' result for each part; adds the gradients to the trainable parameters, part by part.

        A batch whose worker is lost is computed again elsewhere, by LocalProcesses and by Dask. RuntimeError where the
        executor cannot do that, as a ProcessPoolExecutor; ValueError for a loss that cannot reach another process.
        """
        try:
            found = self._computed(parts)
        except BrokenExecutor as error:
            hint = "executor=2 is two processes that are replaced"
            raise RuntimeError(f"a worker was lost, and its executor computes no more; {hint}") from error
        except Exception as error:
            if not _of_pickling(error):
                raise
            raise ValueError(f"the loss must be a function of a module to reach other processes: {error}") from error
        return _added_up(found, self.trainable)

    def _computed(self, parts: Sequence[Part]) -> list[tuple[Result, list[Array | None]]]:
        arrays = [p.data for p in self.trainable]
        futures = [self._submit(part, arrays) for part in parts]
        found = [future.result() for future in futures]  # None: the worker lacks the model
        again = {i: self._submit(parts[i], arrays, (self.model, self.loss)) for i, r in enumerate(found) if r is None}
        found = [again[i].result() if i in again else result for i, result in enumerate(found)]
        self.moved += sum(g.nbytes for _, own in found for g in own if g is not None)
        return found

    def _submit(self, part: Part, arrays: list[Array], sent: tuple[Module, Loss] | None = None) -> Any:
        inputs = [v for v in part.batch.arguments.values() if is_array(v)]
        weights = [p.data for p in sent[0].parameters()] if sent else []
        self.moved += sum(a.nbytes for a in (*arrays, *inputs, *weights))
        return self.executor.submit(_on_worker, self.key, self.threads, part, arrays, sent)


def _of_pickling(error: Exception) -> bool:
    """Whether something could not be sent; pickle raises a PicklingError, or errors of other types by their words."""
    kind, text = type(error), str(error)
    said = "pickle" in text or "local object" in text
    return kind.__name__ == "PicklingError" or (kind in (AttributeError, TypeError) and said)


def _on_worker(
    key: tuple, threads: int | None, part: Part, arrays: list[Array], sent: tuple[Module, Loss] | None
) -> tuple[Result, list[Array | None]] | None:
    """(`add_gradients`' result, gradients in the order of the trainable parameters); None where the model is not here."""
    if sent is not None and threads and key[0] != os.getpid():
        set_num_threads(threads)
    if sent is not None:
        _here.held = (key, sent[0].copy(share=True), sent[1])  # a thread's own; its trained arrays are replaced below
    held, model, loss = getattr(_here, "held", (None, None, None))
    if held != key:
        return None
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p, array in zip(trainable, arrays):
        p.data, p.grad = array.copy(), None
    with np.errstate(all="ignore"):
        (result,) = add_gradients(model, loss, [part], trainable)
    return result, [p.grad for p in trainable]
