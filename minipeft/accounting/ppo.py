"""The memory of an update of PPO: four models, of which the policy and the reference share what is frozen.

    policy      base + what is trained ──────┐ one base          gradients, optimizer states
    reference   base + a copy of that ───────┘
    value       a head on the policy's hidden states, or a model of its own
    reward      a model of its own, or a function, which costs nothing

An update samples responses, computes their log-probabilities and values, scores them, and trains on them. The ledger is
the moment at which the sum is largest, read off `PPOTrainer`'s own code, run on shapes. Sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..autograd.tensor import no_grad
from ..nn.heads import ValueModel
from ..nn.module import Module
from ..nn.transformer import Transformer
from ..rlhf.ppo import PPOConfig, PPOTrainer
from ..rlhf.reward import RewardModel
from . import walk
from .memory import (
    MemoryLedger,
    at_step,
    kv_cache_bytes,
    optimizer_lines,
    states_and_model,
    states_of,
)
from .precision import OPTIMIZERS, PRECISIONS, Precision, check_positive, named
from .shapes import Meter


def ppo_ledger(
    model: Any,
    config: Any = None,
    batch: int = 64,
    prompt_len: int = 32,
    response_len: int = 24,
    *,
    mini_batch: int | None = None,
    reward_model: bool | Module = True,
    value_model: bool | Module = False,
    optimizer: str = "adam",
    precision: str | Precision = "float32",
    checkpointing: bool | None = None,
    quantization: str | None = None,
    double_quantization: bool = True,
) -> MemoryLedger:
    """The memory of one update: `batch` responses are sampled, and trained on in minibatches (of all, by default).

    Args:
        model, config, optimizer, precision, checkpointing, quantization, double_quantization: the policy, as in
            `memory_ledger`.
        prompt_len, response_len: tokens.
        reward_model: one of the policy's shape, a `RewardModel` as it is, or False for a function.
        value_model: one of the policy's shape, all of which is trained; a `ValueModel` as it is; or False for a head.

    Raises ValueError as `memory_ledger` does, and where nothing of the policy is trained.
    """
    p, optimizer = named("precision", precision, PRECISIONS), named("optimizer", optimizer, OPTIMIZERS)
    check_positive(batch=batch, prompt_len=prompt_len, response_len=response_len, mini_batch=mini_batch)
    rows = mini_batch or batch
    if batch % rows:
        raise ValueError(f"mini_batch must divide the batch, {batch}; got {rows}")
    (held, trained, averaged), build = states_and_model(model, config, p, quantization, double_quantization)
    policy = build()
    held["reference"] = sum(trained) * p.frozen
    if checkpointing is not None:
        walk.backbone_of(policy).gradient_checkpointing = checkpointing
    reward = _model(reward_model, partial(RewardModel, seed=None), policy.config)
    value = _model(value_model, ValueModel, policy.config)
    if reward is not None:
        reward.requires_grad_(False)
        held["reward model"] = _bytes(reward_model, reward, p.frozen, p)
    if value is None:
        extra = (policy.config.hidden_size, 1)  # weight and bias of the value head
        held["value model"] = sum(extra) * p.trained
    else:
        extra = tuple(q.size for q in value.parameters() if q.requires_grad)
        held["value model"] = _bytes(value_model, value, p.trained, p)
    held |= optimizer_lines(trained + extra, p, optimizer)
    held["running averages"] = averaged * p.states
    static = {line: n for line, n in held.items() if line != "gradients" and n}

    meter = Meter(p.activations, p.gradients)
    for other in (policy, reward, value):
        if other is not None:
            walk.onto_shapes(other, meter)
    settings = PPOConfig(batch_size=rows, mini_batch_size=rows, response_length=response_len, missing_eos_score=None)
    trainer = PPOTrainer(policy, reward or _nothing, [[0] * prompt_len], settings, value_model=value)
    walk.onto_shapes(trainer.reference, meter)
    walk.onto_shapes(trainer.v_head, meter)
    ids = np.zeros((batch, prompt_len + response_len), np.int64)
    ones = np.ones_like(ids)
    phases = []
    meter.take_peak()  # from here on

    # 1. The policy answers the prompts.
    positions = walk.continue_prompt(policy, ids[:, :prompt_len], response_len, meter, sampled=True)
    held["KV cache"] = kv_cache_bytes(policy.config, batch, positions, p.activations)
    phases.append(meter.take_peak())
    # 2. Log-probabilities and values of a minibatch, and 3. scores of all responses.
    with meter, no_grad():
        trainer.outputs(ids[:rows], ones[:rows], response_len)
        phases.append(meter.take_peak())
        if reward is not None:
            reward.rewards(ids, ones)
            phases.append(meter.take_peak())
    # 4. A minibatch's loss and backward pass, and the optimizer's step.
    with meter:
        names = ("advantages", "returns", "old_values", "old_logprobs", "ref_logprobs")
        minibatch = {name: np.zeros((rows, response_len), np.float32) for name in names}
        new = trainer.outputs(ids[:rows], ones[:rows], response_len)  # alive in the backward pass, as in the trainer
        loss, _ = trainer.loss(minibatch | {"mask": ones[:rows, -response_len:]}, new)
        held |= {line: meter.lines[line] for line in ("activations", "logits") if meter.lines.get(line)}
        meter.backward(loss)
        del loss, new
    phases.append(at_step(meter.at_peak, trained + extra, p, optimizer))
    most = max(phases, key=lambda lines: sum(lines.values()))
    return MemoryLedger({line: n for line, n in (static | dict(most)).items() if n}, held)


def _bytes(given: bool | Module, model: Module, size: int, p: Precision) -> int:
    """Bytes of a model: of a given one as it is stored, of another its elements times their size."""
    if isinstance(given, Module):
        return sum(states_of(model, p).lines.values())
    return size * sum(q.size for q in model.parameters())


def _nothing(roll: Any) -> Any:
    raise TypeError("a reward that is only counted gives no scores")


def _model(given: bool | Module, make: Callable[[Transformer], Module], config: Any) -> Any:
    """A given model as it is, one of the policy's shape (True), or None (False)."""
    if isinstance(given, Module):
        return given.copy(share=True)
    return make(Transformer(config, seed=None).requires_grad_(False)).requires_grad_(True) if given else None
