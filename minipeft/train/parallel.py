"""Data-parallel training: the workers of an executor compute the gradients of a step's batches.

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
from typing import Any, NamedTuple

import numpy as np

from ..autograd.autocast import autocast
from ..backend import Array, Rng, is_array, xp_of
from ..nn.module import Module, Parameter
from ..threads import get_num_threads, set_num_threads
from .batches import Batch
from .evaluation import Loss, Statistics, on_device, with_statistics

_here = threading.local()  # .held: (key, model, loss) that this thread of a worker holds


class Part(NamedTuple):
    """A batch of a step, w_b / Σ w of its mean loss in the step's, its random stream; mixed precision, loss scaling."""

    batch: Batch
    share: float
    rng: Rng
    precision: str | None = None
    scale: float = 1.0


Result = tuple[Array, Statistics]  # L_b, a scalar, and the statistics of the batch: on the model's device


def in_precision(precision: str | None) -> AbstractContextManager[None]:
    """`autocast` in "bfloat16" or "float16"; with None, all stays as it is."""
    return autocast(precision) if precision else nullcontext()


def add_gradients(model: Module, loss: Loss, part: Part) -> Result:
    """Add the gradients of scale · share · L_b to the model's. L_b is not looked at: that would be to wait for a device."""
    with in_precision(part.precision):
        L_b, statistics = with_statistics(loss(model, **on_device(part.batch, model, loss), rng=part.rng))
    L_b.backward(part.share * part.scale)
    return L_b.data, statistics


class Workers:
    """Computes the losses and gradients of a step's parts on an executor that is open (see `minipeft.executors`).

    model, loss: as the Trainer has them; each worker has a copy. `moved` counts the bytes of arrays that went to workers
    and came back. Raises ValueError for a model on a device, and for more workers than a step has `batches`.
    """

    def __init__(self, executor: Any, model: Module, loss: Loss, trainable: dict[str, Parameter], batches: int):
        if xp_of(*[p.data for p in model.parameters()]) is not np:
            raise ValueError("training on workers is for a model on the CPU; this one is on a device")
        self.executor, self.model, self.loss, self.trainable = executor, model, loss, list(trainable.values())
        workers = getattr(executor, "_max_workers", 0)  # of pools on this machine, which share its threads
        if workers > batches:
            hint = f"set gradient_accumulation_steps to {workers} or more"
            raise ValueError(f"a step has {batches} batches for {workers} workers: {hint}")
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
        for _, gradients in found:
            for p, gradient in zip(self.trainable, gradients):
                if gradient is not None:
                    p.grad = gradient if p.grad is None else p.grad + gradient
        return [result for result, _ in found]

    def _computed(self, parts: Sequence[Part]) -> list[tuple[Result, list[Array | None]]]:
        arrays = [p.data for p in self.trainable]
        futures = [self._submit(part, arrays) for part in parts]
        found = [future.result() for future in futures]  # None: the worker lacks the model
        again = {i: self._submit(parts[i], arrays, (self.model, self.loss)) for i, r in enumerate(found) if r is None}
        found = [again[i].result() if i in again else result for i, result in enumerate(found)]
        self.moved += sum(g.nbytes for _, gradients in found for g in gradients if g is not None)
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
        result = add_gradients(model, loss, part)
    return result, [p.grad for p in trainable]
