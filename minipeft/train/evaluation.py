"""The loss that a model has on held-out examples: the mean over all of them, or of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor, no_grad
from ..backend import Array, asarray, is_array, read, to_numpy, xp_of
from ..nn.module import Module
from .batches import IGNORE, Batch
from .batches import collate as collate_pairs

Statistics = dict[str, Array]  # numbers [units] by name, NaN for a unit that has none
# loss(model, **batch.arguments, rng=None): a scalar, the mean over `batch.weight` units; or (that, its Statistics)
Loss = Callable[..., Tensor | tuple[Tensor, Statistics]]
# of a record, so that no statistic can be called so
OWN = {"step", "loss", "learning_rate", "tokens", "grad_norm", "loss_scale", "epoch", "seconds", "tokens_per_second", "bytes_moved"}
Collate = Callable[[list[Any]], Batch]


def model_loss(model: Module, **arguments: Any) -> Tensor:
    """The model's own loss, a scalar: of a language model, the mean next-token cross-entropy in nats."""
    return model.loss(**arguments)


def on_device(batch: Batch, model: Module, loss: Loss = model_loss) -> dict[str, Any]:
    """The arguments of a batch for a loss, its arrays moved to the model's device.

    The own loss of a language model or classifier gets them as they are: it looks at them in host memory, where that is
    not to wait, and moves them then.
    """
    plain = getattr(model, "base_model", model)
    own = getattr(loss, "func", loss) in (model_loss, getattr(type(plain), "loss", None))  # func: of a partial
    if own and hasattr(plain, "backbone"):
        return batch.arguments
    xp = xp_of(*[p.data for p in model.parameters()])
    return {k: asarray(v, xp) if is_array(v) else v for k, v in batch.arguments.items()}


def _headed(model: Module) -> bool:
    """Whether it is a Transformer, perhaps with adapters."""
    return hasattr(model, "backbone") and hasattr(model, "lm_head")


def with_statistics(result: Tensor | tuple[Tensor, Statistics], own: Set[str] = OWN) -> tuple[Tensor, Statistics]:
    """What a loss gave as (loss, a scalar; statistics). Raises ValueError for a statistic with a name of `own`."""
    loss, given = result if isinstance(result, tuple) else (result, {})
    if taken := sorted(given.keys() & own):
        raise ValueError(f"a statistic of the loss cannot be called {taken[0]!r}: a record has that field already")
    return loss, {name: n if is_array(n) else np.asarray(n) for name, n in given.items()}


Results = Sequence[tuple[Array, Statistics]]  # what batches gave


def arrays_of(results: Results) -> tuple[list[Array], list[Array]]:
    """(losses, all statistics) of batches."""
    return [L for L, _ in results], [array for _, statistics in results for array in statistics.values()]


def in_order(results: Results, numbers: Sequence[np.ndarray]) -> tuple[list[float], list[Statistics]]:
    """(the loss, the statistics) of each batch, from the `arrays_of` results as they were read."""
    losses, rest = [L.item() for L in numbers[: len(results)]], iter(numbers[len(results) :])
    return losses, [{name: next(rest) for name in statistics} for _, statistics in results]


def means(parts: Sequence[Statistics]) -> dict[str, float]:
    """The mean of each statistic, read, over the units of all parts that have a number; without one it is left out."""
    found = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        numbers = np.concatenate([np.ravel(part[name]) for part in parts if name in part])
        numbers = numbers[~np.isnan(numbers)]
        if numbers.size:
            found[name] = float(numbers.mean())
    return found


def evaluate(
    model: Module, examples: Sequence[Any], batch_size: int = 8, pad_token_id: int = 0, *,
    collate: Collate | None = None, loss: Loss | None = None,
) -> float:  # fmt: skip
    """Mean loss in nats per label token, over all labels that count in `examples`, without dropout or gradients.

        L = Σ_b w_b L_b / Σ_b w_b        w_b: the weight of a batch, L_b: its loss

    Up to rounding it does not depend on `batch_size`. `collate` and `loss` are those of `Trainer`, for other kinds of
    examples and other objectives; the loss is then in their units, and one that compares the examples of a batch, as
    KTO's does, depends on `batch_size`.

    Raises ValueError where there is nothing to evaluate, or for a batch_size below 1.
    """
    return measure(model, examples, batch_size, pad_token_id, collate=collate, loss=loss)["loss"]


def measure(
    model: Module, examples: Sequence[Any], batch_size: int = 8, pad_token_id: int = 0, *,
    collate: Collate | None = None, loss: Loss | None = None,
) -> dict[str, float]:  # fmt: skip
    """`evaluate` as {"loss": ...}, with the means of what the loss gives beside itself. Raises ValueError as it does."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(examples):
        raise ValueError("there are no examples to evaluate on")
    collate, loss = collate or partial(collate_pairs, pad_token_id=pad_token_id), loss or model_loss
    weights, results = [], []
    with no_grad():
        for i in range(0, len(examples), batch_size):
            batch = collate([examples[k] for k in range(i, min(i + batch_size, len(examples)))])
            if batch.weight:
                value, statistics = with_statistics(loss(model, **on_device(batch, model, loss)), {"loss"})
                weights.append(batch.weight)
                results.append((value.data, statistics))
    if not weights:
        raise ValueError(f"no label counts in any of the {len(examples)} evaluation examples")
    losses, more = arrays_of(results)
    losses, seen = in_order(results, read(*losses, *more))
    return {"loss": sum(value * weight for value, weight in zip(losses, weights)) / sum(weights), **means(seen)}


POSITIONS = 512  # whose logits are held at a time


def example_losses(
    model: Module, examples: Sequence[tuple[np.ndarray, np.ndarray]], batch_size: int = 8, pad_token_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(nll, tokens) of each (input_ids, labels) pair, float64 [n] and int64 [n] in host memory, without dropout.

        nll_i = -Σ_t log softmax(logits_{t-1})[labels_t]        over the tokens_i labels that count, from t = 1 on

    So Σ nll / Σ tokens is what `evaluate` gives, and -nll_i the log-probability of a completion. Examples of about the
    same length share a batch. Raises FloatingPointError where a loss is not a finite number, ValueError for a
    batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    nll, tokens = np.zeros(len(examples)), np.zeros(len(examples), np.int64)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    xp = xp_of(*[p.data for p in model.parameters()])
    for start in range(0, len(order), batch_size):
        chosen = np.array(order[start : start + batch_size])
        batch = collate_pairs([examples[i] for i in chosen], pad_token_id)
        labels = batch.arguments.pop("labels")
        row, position = np.nonzero(labels[:, 1:] != IGNORE)
        at = [asarray(array, xp) for array in (row, position, labels[row, position + 1])]
        with no_grad():
            losses = _losses_at(model, on_device(batch, model), *at)
        np.add.at(nll, chosen[row], losses)
        np.add.at(tokens, chosen[row], 1)
    wrong = np.flatnonzero(~np.isfinite(nll))
    if wrong.size:
        raise FloatingPointError(f"the loss of example {wrong[0]} is {nll[wrong[0]]}: check the model's weights")
    return nll, tokens


def _losses_at(model: Module, arguments: dict[str, Any], row: Array, position: Array, target: Array) -> np.ndarray:
    """-log softmax(logits[row, position])[target] [n], in host memory; the head sees these positions alone."""
    headed = _headed(model) and not getattr(model, "virtual_tokens", 0)
    states = model.backbone(**arguments) if headed else model(**arguments)  # hidden states [B, T, d], or logits
    losses = []
    for start in range(0, len(row), POSITIONS):
        part = slice(start, start + POSITIONS)
        logits = states[row[part], position[part]]
        logits = F.log_softmax(model.lm_head(logits) if headed else logits, axis=-1)  # [n, V]
        losses.append(to_numpy(-F.gather(logits, target[part, None], axis=-1).data[:, 0]))
    return np.concatenate(losses) if losses else np.zeros(0)
