"""What PPO, RLOO and GRPO share: a policy answers prompts, gets a score for each answer, and is moved a little.

    for update:   prompts ─► rollout ─► scores, log-probabilities of policy and reference ─► advantages
                  for epoch, minibatch:   loss ─► gradients ─► clip ─► Adam

An update is one turn of the outer loop, an optimizer step one of the inner. Each method writes its `update` down, from
the parts that stand here. Everything random in an update depends on (seed, update) alone, and all else that it reads,
the weights, Adam's moments, β, is in a checkpoint; so a run resumed from one ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_type_hints

import numpy as np

from ..autograd.tensor import Tensor, no_grad
from ..backend import Array, Rng, asarray, to_numpy, xp_of
from ..nn.module import Module, Parameter
from ..train.callbacks import Callback, Callbacks
from ..train.checkpoint import adapter_options, fingerprint, frozen_fingerprint
from ..train.optim import Adam, NonFiniteGradient, clipped, gradients_of, read_norm
from ..train.parallel import in_precision
from ..train.rates import with_learning_rate
from ..train.run import Run
from ..train.schedule import SCHEDULES
from .advantages import token_kl
from .config import OnlineConfig
from .logprobs import Outputs, frozen_copy, outputs_of, response_hidden, response_logprobs
from .reward import RewardModel
from .rollouts import Rollout, check_prompts, rollout
from .statistics import RLHFError, check_first_minibatch, of_responses, of_scores, over_minibatches

RewardFunction = Callable[[Rollout], np.ndarray]  # scores [B] of a rollout's responses, in host memory


# What may differ between a run and the one that resumes it: it changes no byte of what an update does.
_FREE = {"output_dir", "save_steps", "save_total_limit", "progress", "max_kl", "max_equal_updates"}


def missing_eos(
    scores: np.ndarray, ended: np.ndarray, score: float | None = None, penalty: float | None = None
) -> np.ndarray:
    """Scores [B] where a response that nothing ended has `score` in place of its own, or `penalty` less.

    ended [B] is true where a stop token did. Without either, a policy learns that never ending costs nothing. Sources:
    replacing the score, by -1, is OpenAI's lm-human-preferences' (Huang et al. 2024, arXiv:2403.17031, calls it the EOS
    trick); the penalty is TRL's `missing_eos_penalty`. Raises ValueError where both are given.
    """
    if score is not None and penalty is not None:
        raise ValueError(f"a missing EOS either gets the score {score} or loses {penalty}: give one of them")
    if score is not None:
        return np.where(ended, scores, score)
    return scores if penalty is None else np.where(ended, scores, scores - penalty)


SHARE, ADAPTER_SHARE = 1 / 20, 1 / 6  # of the method's usual rate, where none is given; see `OnlineConfig`

# Every use of random numbers has streams of its own. Token t of row i of update u is drawn with the path
# [seed, u, i, t] (`rollout`). The two orders have shorter paths, which NumPy pads with zeros, so that [seed, u, epoch]
# alone would be the stream of the token [seed, u, epoch, 0]; they add a purpose as their spawn key, a number that is no
# token's position.
PROMPTS, MINIBATCHES = 1 << 31, (1 << 31) + 1


def order(purpose: int, n: int, *path: int) -> np.ndarray:
    """A permutation of n that depends on the purpose and the path [seed, ...] alone."""
    return np.random.default_rng(np.random.SeedSequence(path, spawn_key=(purpose,))).permutation(n)


class OnlineTrainer(ABC):
    """Trains a policy, in place, on its own samples. Subclasses: PPOTrainer, RLOOTrainer, GRPOTrainer.

    Args:
        policy: a Transformer or a PeftModel; what requires gradients is trained.
        reward: a RewardModel, or a function of a `Rollout` that gives scores [B].
        prompts: token ids, one sequence a prompt. They are taken in an order that depends on the seed, again and again.
        config: the method's configuration. `trainer.config` says the learning rate also where it was left None.
        watch: functions like rewards, by name, whose means over an update's responses are logged as "watch/<name>".
            They are asked before the update trains. A mean that is no finite number is logged as None (null in the
            file): nothing that is only watched stops a run.
        beside: modules that are trained beside the policy, by name; a subclass gives them.

    The reference is the policy as it is now: what is frozen is shared with it, what is trained is copied.

    Raises ValueError for arguments that make no sense: no prompts, a prompt that with its response is longer than the
    policy's positions, a policy without an EOS token (where its absence costs something) or a trained parameter,
    adapters that are merged or have virtual tokens; TypeError for the config of another trainer, prompts that are texts,
    and a reward that is no function of a rollout.
    """

    def __init__(
        self, policy: Any, reward: RewardModel | RewardFunction, prompts: Sequence[Sequence[int]], config: OnlineConfig,
        watch: Mapping[str, RewardFunction] | None = None, beside: Mapping[str, Module] | None = None,
    ):  # fmt: skip
        if not isinstance(config, needed := get_type_hints(type(self))["config"]):
            raise TypeError(f"{type(self).__name__} takes a {needed.__name__}, not a {type(config).__name__}")
        self.reward = reward_function(reward)
        config = with_learning_rate(config, policy, share=ADAPTER_SHARE if hasattr(policy, "peft_config") else SHARE)
        self.policy, self.config, self.watch = policy, config, dict(watch or {})
        self.prompts = [list(map(int, prompt)) for prompt in check_prompts(prompts)]
        if not self.prompts or not all(self.prompts):
            raise ValueError("there are no prompts" if not self.prompts else "a prompt must have at least one token")
        length, limit = config.response_length, policy.config.max_position_embeddings
        for i, prompt in enumerate(self.prompts):
            if len(prompt) + length > limit:
                room = f"with response_length={length} at most {limit - length} fit the policy's {limit} positions"
                raise ValueError(f"prompts[{i}] has {len(prompt)} tokens; {room}")
        self._reward_model = reward if isinstance(reward, RewardModel) else None
        eos = policy.config.eos_token_id
        own = () if eos is None else np.atleast_1d(eos).tolist()
        self.stop_token_ids = tuple(own if config.stop_token_ids is None else config.stop_token_ids)
        if not self.stop_token_ids and (config.missing_eos_score, config.missing_eos_penalty) != (None, None):
            raise ValueError("the model names no EOS token: give stop_token_ids, or set missing_eos_score to None")
        self.trainable: dict[str, Parameter] = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ValueError("no parameter of the policy requires gradients, so there is nothing to train")
        self._xp = xp_of(*[p.data for p in self.trainable.values()])
        if getattr(policy, "virtual_tokens", 0):
            raise ValueError("this trains no virtual tokens, which the policy has: use LoRA, or another adapter inside")
        self.reference = frozen_copy(policy)
        beside = beside or {}
        for name, module in beside.items():
            self.trainable |= {f"{name}.{n}": p for n, p in module.named_parameters() if p.requires_grad}
        # eps as in OpenAI's lm-human-preferences (utils/core.py, `minimize`); PyTorch's default is 1e-8
        self.optimizer = Adam(self.trainable.items(), lr=config.learning_rate, eps=1e-5)
        self.precision = "bfloat16" if config.bf16 else None
        self._modules = (policy, *beside.values())
        for module in self._modules:
            if hasattr(module, "peft_config"):  # the losses read the backbone, not the PeftModel's own loss
                module.check_unmerged()
        self._callbacks = Callbacks(*self._modules)
        self.updates, self.history = 0, []

    def __repr__(self) -> str:
        trained = f"{sum(p.size for p in self.trainable.values()):,} trainable parameters"
        done = f"{self.updates} of {self.config.steps} updates of {self.config.batch_size} responses"
        return f"{type(self).__name__}({type(self.policy).__name__}, {trained}, {len(self.prompts):,} prompts, {done})"

    @abstractmethod
    def update(self) -> dict[str, Any]:
        """Sample, score and train once; the record of it (see statistics.py), but for its number and learning rate."""

    @abstractmethod
    def loss(self, batch: dict[str, Array], new: Outputs) -> tuple[Tensor, dict[str, Array]]:
        """(scalar loss, statistics, on the device) of a minibatch: rows of an update's arrays, the policy's outputs for them."""

    def step(self) -> dict[str, Any]:
        """One update. Returns its statistics (see statistics.py), which are also added to `history`.

        Raises RLHFError, naming the update and what helps, for a score that is NaN or infinite, a KL above max_kl, a
        loss or a gradient that is NaN or infinite, and where `check_first_minibatch` does. FloatingPointError where the
        policy's logits are NaN while it samples; ValueError where a reward or a watcher does not give one number a
        response.
        """
        rate = self.config.learning_rate * SCHEDULES[self.config.lr_scheduler_type](self.updates, 0, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with np.errstate(all="ignore"):  # NaN and infinity are looked for where they matter
            record = {"step": self.updates + 1, **self.update(), "learning_rate": rate}
        self.updates += 1
        self.history.append(record)
        return record

    # --------------------------------------------------------------------------------------------- parts of an update

    def rollout(self, group: int = 1) -> Rollout:
        """The policy's answers to the prompts of this update, `group` to each: batch_size responses."""
        c, prompts = self.config, self.prompts_of(self.updates, group)
        stream = Rng(c.seed, self.updates)
        with in_precision(self.precision):
            return rollout(self.policy, prompts, c.response_length, c.temperature, self.stop_token_ids, stream)

    def prompts_of(self, update: int, group: int = 1) -> list[list[int]]:
        """An update's prompts, each `group` times in a row; all are taken once, then all again in another order."""
        n, each = len(self.prompts), self.config.batch_size // group
        places = range(update * each, (update + 1) * each)
        orders = {epoch: order(PROMPTS, n, self.config.seed, epoch) for epoch in {place // n for place in places}}
        return [self.prompts[orders[place // n][place % n]] for place in places for _ in range(group)]

    def outputs(self, input_ids: Array, attention_mask: Array, length: int) -> Outputs:
        """The policy's outputs for the last `length` tokens of input_ids [B, T], never from the cache."""
        hidden = response_hidden(self.policy, input_ids, attention_mask, length)  # [B, n, d]
        return outputs_of(self.policy, hidden, input_ids, self.config.temperature)

    def examine(self, roll: Rollout) -> dict[str, Array]:
        """What policy and reference make of the responses: the arrays of which minibatches are made.

        old_logprobs, ref_logprobs, kl (`token_kl`) and, where the policy gives values, old_values are [B, n], 0 at
        padding; input_ids, attention_mask and mask are the rollout's. Computed mini_batch_size rows at a time.
        """
        xp, c, parts = self._xp, self.config, []
        with no_grad(), in_precision(self.precision):
            for i in range(0, c.batch_size, c.mini_batch_size):
                rows = slice(i, i + c.mini_batch_size)
                given = roll.input_ids[rows], roll.attention_mask[rows], roll.length
                old, ref = self.outputs(*given), response_logprobs(self.reference, *given, c.temperature)
                found = {"old_logprobs": old.logprobs, "ref_logprobs": ref, "old_values": old.values}
                real = roll.mask[rows] != 0
                parts.append({name: xp.where(real, x.data, 0) for name, x in found.items() if x is not None})
        batch = {name: xp.concatenate([part[name] for part in parts]) for name in parts[0]}
        batch["kl"] = token_kl(batch["old_logprobs"], batch["ref_logprobs"], roll.mask)
        return batch | {"input_ids": roll.input_ids, "attention_mask": roll.attention_mask, "mask": roll.mask}

    def score(self, roll: Rollout, batch: dict[str, Array], group: int) -> tuple[Array, dict[str, Any]]:
        """(scores [B] of the responses, on the device; the record so far). `group` responses in a row are compared.

        Errors: see `step`.
        """
        c, raw = self.config, self._asked(self.reward, roll, "the reward")
        if bad := int((~np.isfinite(raw)).sum()):
            where = f"NaN or infinite for {bad} of {len(raw)} responses"
            raise self._error(f"the reward is {where}; look at the reward, nothing can be learned from it")
        scores = missing_eos(raw, to_numpy(roll.ended), c.missing_eos_score, c.missing_eos_penalty)
        watched = {name: self._asked(function, roll, f"watch {name!r}") for name, function in self.watch.items()}
        record = of_scores(raw, scores, group) | of_responses(roll, batch, watched)
        if not abs(kl := record["objective/kl"]) <= c.max_kl:
            where = f"{kl:.4g} nats a response from its reference, beyond max_kl={c.max_kl:g}"
            raise self._error(f"the policy is {where}; {self._advice()}")
        return asarray(scores.astype(np.float32), self._xp), record

    def _asked(self, function: RewardFunction, roll: Rollout, what: str) -> np.ndarray:
        scores = np.asarray(function(roll), np.float64)
        if scores.shape != (self.config.batch_size,):
            raise ValueError(f"{what} must give one score a response, ({self.config.batch_size},), not {scores.shape}")
        return scores

    def minibatches(self, batch: dict[str, Array]) -> Iterator[dict[str, Array]]:
        """mini_batch_size rows of every array [B, ...], num_epochs times all rows, each time in another order."""
        c = self.config
        for epoch in range(c.num_epochs):
            rows = order(MINIBATCHES, c.batch_size, c.seed, self.updates, epoch)
            for i in range(0, c.batch_size, c.mini_batch_size):
                part = asarray(rows[i : i + c.mini_batch_size], self._xp)
                yield {name: array[part] for name, array in batch.items()}

    def epochs(self, batch: dict[str, Array]) -> dict[str, float]:
        """Epochs of minibatches, each an optimizer step: loss, gradients, clipping, Adam. Returns their statistics.

        A callback that asks for the end of the run ends them. Errors: see `step`.
        """
        c = self.config
        seen: list[dict[str, float]] = []  # the statistics of the minibatches
        self.optimizer.zero_grad()  # of what an error has interrupted
        first = self.updates * c.num_epochs * (c.batch_size // c.mini_batch_size) + 1
        for number, part in enumerate(self.minibatches(batch), start=first):
            with in_precision(self.precision):
                new = self.outputs(part["input_ids"], part["attention_mask"], part["mask"].shape[1])
                loss, given = self.loss(part, new)
            loss.backward()
            self._callbacks.before_step(number)
            gradients = gradients_of(self.trainable.items())
            finite = clipped(gradients, c.max_grad_norm or math.inf, [loss.data], given.values())
            _, L, *numbers = map(float, finite.numbers)  # the minibatch's one wait
            stats = dict(zip(given, numbers))
            if not seen and not self.precision:  # in 16 bits, another place in a batch may round to another number
                check_first_minibatch(stats)
            if not math.isfinite(L):
                raise self._error(f"the loss is {L:g}; {self._advice()}")
            try:
                norm = read_norm(gradients, finite)
            except NonFiniteGradient as error:
                raise self._error(f"{error}; {self._advice()}") from error
            del gradients  # what holds them besides the parameters would hold them through the next backward pass
            self.optimizer.step()
            seen.append({**stats, "grad_norm": norm})
            self._callbacks.after_step(number, {"step": number, **seen[-1]})
            self.optimizer.zero_grad()
            if self._callbacks.stopped:
                break
        return over_minibatches(seen)

    def _error(self, what: str) -> RLHFError:
        return RLHFError(f"update {self.updates + 1}: {what}")

    def _advice(self) -> str:
        return f"lower learning_rate (it is {self.config.learning_rate:g}), raise the KL coefficient, or stop earlier"

    # ---------------------------------------------------------------------------------------------------- the whole

    def train(
        self, resume_from_checkpoint: bool | str | os.PathLike = False,
        callbacks: Iterable[Callback] = (),
    ) -> list[dict[str, Any]]:  # fmt: skip
        """All updates (or until stop_kl); returns their statistics.

        The `callbacks` (see `Callback`) come after the policy's own, and are called around every *optimizer step*,
        which are numbered through the run, and at the record of each update; one that asks for the end in a step ends
        the update, too.

        `resume_from_checkpoint=True` goes on from the last checkpoint in output_dir, of a run with the same policy,
        prompts and configuration; CheckpointError says otherwise. To resume, build the trainer from the policy that the
        run began with, for that is its reference; the checkpoint then puts in what was trained. (output_dir,
        save_steps, save_total_limit, progress, max_kl and max_equal_updates may differ, so a run that one of the last
        two stopped can go on with a higher one.) A fresh run refuses an output_dir with checkpoints.

        Raises RLHFError after max_equal_updates in a row in which no score differed from those that it is compared
        with, and, given an output_dir, saves a checkpoint before; DirectoryInUse where another process writes there. Other
        errors are those of `step`.
        """
        c, self._callbacks = self.config, Callbacks(*self._modules, more=callbacks)
        show = {"objective/scores": "reward {:.3f}", "objective/kl": "KL {:.2f}"}
        run = Run(self, c, c.steps, self._callbacks, show, unit="update")
        run.step = self.updates  # done before; a checkpoint has its own
        with run.start(resume_from_checkpoint, self.history):
            self.updates, self.history = run.step, list(run.history)
            for number in run:
                record = self.step()
                run.record(record)
                run.stopped = c.stop_kl is not None and record["objective/kl"] > c.stop_kl
                equal = [r.get("objective/scores_equal") == 1 for r in self.history[-c.max_equal_updates :]]
                if len(equal) == c.max_equal_updates and all(equal) and number < c.steps:
                    raise self._nothing_to_prefer(run)
        return self.history

    def _nothing_to_prefer(self, run: Run) -> RLHFError:
        record, n, kept = self.history[-1], self.config.max_equal_updates, ""
        if run.directory:
            run.save()  # now, not at the end of the step, which is not reached
            kept = f"; checkpoint-{run.step} keeps the run, which goes on with a higher max_equal_updates"
        why = ": none ended with a stop token; raise response_length" if not record["num_eos"] else ""
        return RLHFError(
            f"update {run.step}: no response has scored better or worse than those it is compared with for {n} updates "
            f"(the last mean: {record['objective/scores']:g}), so there is nothing to prefer{why}{kept}"
        )

    def state(self) -> dict[str, Any]:
        """What the method remembers from update to update, as JSON values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        return None

    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed, as JSON values by the names that an error message uses."""
        settings = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in _FREE}
        identity = {
            "method": type(self).__name__, **settings,
            "trainable parameters": {n: f"{p.dtype} {list(p.shape)}" for n, p in self.trainable.items()},
            "prompts": fingerprint((str(i), np.asarray(p, np.int64)) for i, p in enumerate(self.prompts)),
            "options of the adapters": adapter_options(self.policy),
            "reference policy": frozen_fingerprint(self.reference),
        }  # fmt: skip
        if (model := self._reward_model) is None:
            identity["reward"] = getattr(self.reward, "__qualname__", type(self.reward).__qualname__)
        else:
            identity["reward model"] = fingerprint((n, p.data) for n, p in model.named_parameters())
            identity["calibration"] = [model.mean, model.std]
        return identity


def reward_function(reward: RewardModel | RewardFunction) -> RewardFunction:
    """What scores a rollout. Raises TypeError for what does not."""
    if isinstance(reward, RewardModel):
        return learned_reward(reward)
    if hasattr(reward, "peft_config"):
        raise TypeError(f"the reward is a {type(reward).__name__}: merge its adapters into a RewardModel first")
    wanted = "the reward is a RewardModel or a function of a rollout"
    if not callable(reward):
        raise TypeError(f"{wanted}, not {reward!r}")
    try:
        arguments = inspect.signature(reward).parameters
    except ValueError:  # of a builtin, which does not say
        arguments = {}
    if "completions" in arguments:
        raise TypeError(f"{wanted}: rlhf.text_reward(function, tokenizer)")
    return reward


def learned_reward(model: RewardModel) -> RewardFunction:
    """A reward for the trainers: the model's calibrated reward [B] of prompt and response, float64 in host memory.

    It is read at the last real token of the response.
    """

    def scores(roll: Rollout) -> np.ndarray:
        with no_grad():
            return to_numpy(model.rewards(roll.input_ids, roll.attention_mask).data).astype(np.float64)

    return scores
