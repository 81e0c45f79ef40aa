"""The loss that a model has on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from ..autograd.tensor import Tensor, no_grad
from ..backend import asarray, is_array, xp_of
from ..nn.module import Module
from .batches import Batch
from .batches import collate as collate_pairs

Loss = Callable[..., Tensor]  # loss(model, **batch.arguments, rng=None): a scalar, the mean over `batch.weight` units
Collate = Callable[[list[Any]], Batch]


def model_loss(model: Module, **arguments: Any) -> Tensor:
    """The model's own loss, a scalar: of a language model, the mean next-token cross-entropy in nats."""
    return model.loss(**arguments)


def on_device(batch: Batch, xp: ModuleType) -> dict[str, Any]:
    """The arguments of a batch, its arrays moved to the device of `xp`."""
    return {k: asarray(v, xp) if is_array(v) else v for k, v in batch.arguments.items()}


def evaluate(
    model: Module, examples: Sequence[Any], batch_size: int = 8, pad_token_id: int = 0, *,
    collate: Collate | None = None, loss: Loss | None = None,
) -> float:  # fmt: skip
    """Mean loss in nats per label token, over all labels that count in `examples`, without dropout or gradients.

        L = Σ_b w_b L_b / Σ_b w_b        w_b: the weight of a batch, L_b: its loss

    Up to rounding it does not depend on `batch_size`. `collate` and `loss` are those of `Trainer`, for other kinds of
    examples and other objectives; the loss is then in their units.

    Raises ValueError where there is nothing to evaluate, or for a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(examples):
        raise ValueError("there are no examples to evaluate on")
    collate, loss = collate or partial(collate_pairs, pad_token_id=pad_token_id), loss or model_loss
    xp = xp_of(*[p.data for p in model.parameters()])
    total, weight = 0.0, 0
    with no_grad():
        for i in range(0, len(examples), batch_size):
            batch = collate([examples[k] for k in range(i, min(i + batch_size, len(examples)))])
            if batch.weight:
                total += loss(model, **on_device(batch, xp)).item() * batch.weight
                weight += batch.weight
    if not weight:
        raise ValueError(f"no label counts in any of the {len(examples)} evaluation examples")
    return total / weight
