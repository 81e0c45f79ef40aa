"""What PPO, RLOO and GRPO have in common: a policy answers prompts, is told how well, and is moved a little.

    for update:   prompts ─► rollout ─► scores, log-probabilities of policy and reference ─► advantages
                  for epoch, minibatch:   loss ─► gradients ─► clip ─► Adam

An update is one turn of the outer loop, an optimizer step one of the inner. A method says how scores become advantages
(`prepare`) and what is minimized (`loss`). Everything that an update does depends on (seed, update) and the weights
alone, so a run resumed from a checkpoint ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..autograd.tensor import Tensor, is_grad_enabled, no_grad
from ..backend import Array, Rng, asarray, to_numpy, xp_of
from ..nn.module import Parameter
from ..options import check, configuration, option
from ..train.batches import epoch_order
from ..train.checkpoint import (
    CheckpointError,
    check_identity,
    fingerprint,
    frozen_fingerprint,
    last_checkpoint,
    load_checkpoint,
    pack_optimizer,
    remove_leftovers,
    save_checkpoint,
    unpack_optimizer,
)
from ..train.metrics import Metrics
from ..train.optim import Adam, NonFiniteGradient, clip_grad_norm
from ..train.schedule import SCHEDULES
from .advantages import masked_mean
from .logprobs import entropy, frozen_copy, response_hidden, response_logprobs, token_logprobs
from .reward import RewardModel
from .rollout import Rollout, distinct_n, rollout

RewardFunction = Callable[[Rollout], np.ndarray]  # scores [B] of a rollout's responses, in host memory


class RLHFError(RuntimeError):
    """The optimization went wrong in a way that more of it would not mend; the message says how, and what helps."""


@configuration(kw_only=True)
class OnlineConfig:
    """How to train on one's own samples: what PPO, RLOO and GRPO have in common.

    Where a default departs from the papers', it is what was measured on the shipped base, a model of about a million
    parameters, whose updates take a second or two. An adapter wants about ten times the rate.

    Raises ValueError, naming the option, for a value that makes no sense.
    """

    output_dir: str | os.PathLike | None = option(None, "directory of metrics.jsonl and of the checkpoints")
    steps: int = option(40, "updates, each on batch_size fresh responses", least=1)
    # OpenAI's lm-human-preferences samples 512 an update, TRL 64: an update of 32 is the noisier one, and there are more.
    batch_size: int = option(32, "responses an update", least=1)
    mini_batch_size: int = option(16, "responses an optimizer step", least=1)
    # OpenAI's lm-human-preferences and TRL make 4 passes over 4 minibatches. The ratio is clipped earlier with each.
    num_epochs: int = option(4, "passes over an update's responses", least=1, flag="--epochs")
    # Ziegler et al. 2019 take 1.41e-5 for 124M parameters, TRL 3e-6 for 1B: small models take larger rates.
    learning_rate: float = option(5e-5, "learning rate of Adam", above=0, flag="--lr", metavar="RATE")
    lr_scheduler_type: str = option("linear", "how the rate changes over the updates", choices=SCHEDULES)
    max_grad_norm: float | None = option(1.0, "gradients of a larger 2-norm are scaled down to it", above=0)
    response_length: int = option(24, "tokens that a response has at most", least=1)
    temperature: float = option(1.0, "of sampling, and of every log-probability", above=0, metavar="T")
    stop_token_ids: tuple[int, ...] | None = option(None, "what ends a response; None: the model's EOS", least=0)
    # OpenAI replaces the score by -1, TRL's missing_eos_penalty defaults to None. A policy that was never taught to end
    # its answers, as the shipped base, would have -1 for each of them, and nothing to learn from.
    missing_eos_score: float | None = option(None, "score of a response that no stop token ended, such as -1")
    missing_eos_penalty: float | None = option(None, "or: what such a response loses of its score")
    cliprange: float = option(0.2, "ε: how far from 1 a ratio counts", above=0)
    max_kl: float = option(100.0, "KL from the reference, nats a response, above which the run stops with an error", above=0)
    stop_kl: float | None = option(
        None, "end the run after the first update that samples above this KL; that update still trains", above=0
    )
    max_equal_updates: int = option(
        20, "updates in a row without two different scores to compare, after which the run stops with an error", least=1
    )
    save_steps: int | None = option(None, "updates between checkpoints", least=1)
    save_total_limit: int = option(2, "checkpoints that are kept", least=1)
    seed: int = option(0, "seed of the order of the prompts, the responses and the minibatches", least=0)

    def __post_init__(self) -> None:
        check(self)
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"batch_size must be a multiple of mini_batch_size, {self.mini_batch_size}, got {self.batch_size}"
            )
        if self.missing_eos_score is not None and self.missing_eos_penalty is not None:
            raise ValueError(
                "a missing EOS either replaces the score (missing_eos_score) or takes something off it "
                "(missing_eos_penalty): set one of them to None"
            )
        if self.save_steps is not None and self.output_dir is None:
            raise ValueError("save_steps needs an output_dir to save to")


# What may differ between a run and the one that resumes it: it changes no byte of what an update does.
_FREE = {"output_dir", "save_steps", "save_total_limit", "max_kl", "max_equal_updates"}


class Outputs(NamedTuple):
    """What the policy makes of responses of n tokens: every array is [B, n]."""

    logprobs: Tensor
    entropy: Array | None  # of the distribution at every position; None without gradients, where nothing reads it
    values: Tensor | None = None


def missing_eos(
    scores: np.ndarray, ended: np.ndarray, score: float | None = None, penalty: float | None = None
) -> np.ndarray:
    """Scores [B] where a response that nothing ended has `score` in place of its own, or `penalty` less.

    ended [B] is boolean. Without either, a policy learns that never ending costs nothing. Sources: replacing the score,
    by -1, is OpenAI's lm-human-preferences' (Huang et al. 2024, arXiv:2403.17031, calls it the EOS trick); the penalty
    is TRL's `missing_eos_penalty`. Raises ValueError where both are given.
    """
    if score is not None and penalty is not None:
        raise ValueError(f"a missing EOS either gets the score {score} or loses {penalty}: give one of them")
    if score is not None:
        return np.where(ended, scores, score)
    return scores if penalty is None else scores - penalty * ~ended


class OnlineTrainer(ABC):
    """Trains a policy, in place, on its own samples. Subclasses: PPOTrainer, RLOOTrainer, GRPOTrainer.

    Args:
        policy: a Transformer or a PeftModel; what requires gradients is trained.
        reward: a RewardModel, or a function of a `Rollout` that gives scores [B].
        prompts: token ids, one sequence a prompt. They are taken in an order that depends on the seed, again and again.
        config: the method's configuration.
        watch: functions like rewards, by name, whose means over an update's responses are logged as "watch/<name>".
            They are asked before the update trains. A mean that is no finite number is logged as None (null in the
            file): nothing that is only watched stops a run.

    The reference is the policy as it is now: what is frozen is shared with it, what is trained is copied.

    Raises ValueError for arguments that make no sense: no prompts, a prompt that with its response is longer than the
    policy's positions, a policy without an EOS token or a trained parameter, or one whose adapter takes part in the
    training loop (AdaLoRA).
    """

    def __init__(
        self,
        policy: Any,
        reward: RewardModel | RewardFunction,
        prompts: Sequence[Sequence[int]],
        config: Any,
        watch: Mapping[str, RewardFunction] | None = None,
    ):
        self.policy, self.config, self.watch = policy, config, dict(watch or {})
        self.prompts = [list(map(int, prompt)) for prompt in prompts]
        if not self.prompts or not all(self.prompts):
            raise ValueError("there are no prompts" if not self.prompts else "a prompt must have at least one token")
        limit = policy.config.max_position_embeddings
        for i, prompt in enumerate(self.prompts):
            if len(prompt) + config.response_length > limit:
                raise ValueError(
                    f"prompts[{i}] has {len(prompt)} tokens; with response_length={config.response_length} at most "
                    f"{limit - config.response_length} fit the policy's {limit} positions"
                )
        check_adapters(policy, "policy")
        self._reward_model = reward if isinstance(reward, RewardModel) else None
        self.reward: RewardFunction = learned_reward(reward) if isinstance(reward, RewardModel) else reward
        stops = config.stop_token_ids
        if stops is None:
            eos = policy.config.eos_token_id
            stops = () if eos is None else tuple(np.atleast_1d(eos).tolist())
        self.stop_token_ids = tuple(stops)
        if not self.stop_token_ids and (config.missing_eos_score, config.missing_eos_penalty) != (None, None):
            raise ValueError("the model names no EOS token: give stop_token_ids, or set missing_eos_score to None")
        self.trainable: dict[str, Parameter] = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ValueError("no parameter of the policy requires gradients, so there is nothing to train")
        self._xp = xp_of(*[p.data for p in self.trainable.values()])
        self.reference = frozen_copy(policy)
        self.trainable |= self.extra_parameters()
        self.optimizer = Adam(self.trainable.items(), lr=config.learning_rate, eps=1e-5)
        self.updates = 0
        self.history: list[dict[str, Any]] = []

    # ------------------------------------------------------------------------------------------ what a method says

    def extra_parameters(self) -> dict[str, Parameter]:
        """What is trained beside the policy, by name."""
        return {}

    @abstractmethod
    def prepare(
        self, roll: Rollout, old: dict[str, Array], ref_logprobs: Array, scores: np.ndarray
    ) -> tuple[dict[str, Array], dict[str, float]]:
        """(arrays [B, ...] that the loss needs, statistics) of a rollout.

        `old` holds the outputs of the policy that sampled, as arrays: "logprobs", and "values" where there are some.
        `ref_logprobs` are [B, n], `scores` [B].
        """

    @abstractmethod
    def loss(self, batch: dict[str, Array], new: Outputs) -> tuple[Tensor, dict[str, float]]:
        """(what is minimized, statistics) of a minibatch; `batch` holds rows of what `prepare` gave.

        The statistics name "policy/clipfrac", the share of the ratios at which clipping acted.
        """

    @property
    def responses_per_prompt(self) -> int:
        """How many responses to one prompt lie beside each other in a batch."""
        return 1

    def state(self) -> dict[str, Any]:
        """What the method remembers from update to update, as JSON values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        return None

    def outputs(self, input_ids: Array, attention_mask: Array, length: int) -> Outputs:
        """The policy's outputs for the last `length` tokens, from a full forward pass: never from the cache."""
        return self._outputs_of(response_hidden(self.policy, input_ids, attention_mask, length), input_ids)

    def _outputs_of(self, hidden: Tensor, input_ids: Array) -> Outputs:
        logits = self.policy.lm_head(hidden) / self.config.temperature  # [B, n, V]
        spread = entropy(logits.data) if is_grad_enabled() else None
        return Outputs(token_logprobs(logits, input_ids[:, -hidden.shape[1] :]), spread)

    # ---------------------------------------------------------------------------------------------------- an update

    def step(self) -> dict[str, Any]:
        """One update: sample, score, train. Returns its statistics, which are also added to `history`.

        Of the responses, before anything is trained on them (π is the policy that sampled, y_t are the real tokens):

            step                        the number of the update, from 1
            objective/kl                mean over responses of Σ_t log π(y_t) - log π_ref(y_t): nats a response
            objective/entropy           mean over responses of -Σ_t log π(y_t): nats a response
            objective/raw_scores        mean score, as the reward gave it
            objective/scores            mean score that is trained on: after `missing_eos`
            objective/non_score_reward  what KL takes off the reward, -β objective/kl; GRPO, whose KL is in the loss: 0
            objective/rlhf_reward       objective/scores + objective/non_score_reward
            objective/kl_coef           β of this update
            num_eos                     how many responses a stop token ended
            text/length                 mean tokens of a response, its stop token included
            text/distinct_2             distinct bigrams over all bigrams (`distinct_n`)
            text/ref_loss               mean of -log π_ref(y_t) over all tokens: nats a token
            watch/<name>                mean of a watcher's scores; None where that is no finite number

        Of the training, means over the minibatches of all epochs (ρ is the ratio π_new(y_t) / π(y_t)):

            loss/policy                 PPO, RLOO: the clipped objective; GRPO: with β loss/kl
            loss/value                  PPO: before vf_coef
            loss/kl                     GRPO: k3, nats a token, before β
            policy/approxkl             mean of (log ρ)² / 2: nats a token
            policy/clipfrac             share of tokens (RLOO: responses) at whose ratio clipping acted
            policy/entropy              mean entropy of the whole distribution at a position: nats a token
            val/ratio                   mean ρ over tokens
            val/ratio_max               largest ρ of any minibatch, not a mean
            val/ratio_deviation         largest |ρ - 1| of any minibatch, not a mean
            val/clipfrac                PPO: share of values at which clipping acted
            grad_norm                   2-norm of all gradients before it is clipped
            learning_rate               of this update

        Raises RLHFError, naming the update and what helps, for a score that is NaN or infinite, for scores that are all
        equal (in every group, where a method compares answers to one prompt), a KL above max_kl, a loss or a gradient
        that is NaN or infinite, and where `check_first_minibatch` does. FloatingPointError where the policy's logits
        are NaN while it samples; ValueError where a reward or a watcher does not give one number a response, and for a
        policy whose hidden states cannot be read, as one with virtual tokens.
        """
        c, u = self.config, self.updates
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate * SCHEDULES[c.lr_scheduler_type](u, 0, c.steps)
        with np.errstate(all="ignore"):  # NaN and infinity are looked for below
            # [seed, u] names the random numbers; token t of row i is drawn with [seed, u, i, t].
            roll = rollout(
                self.policy, self._prompts(u), c.response_length, c.temperature, self.stop_token_ids, Rng(c.seed, u)
            )
            old, ref_logprobs = self._before(roll)
            raw, ended = self._scores(self.reward, roll, "the reward"), to_numpy(roll.ended)
            self._check_finite(raw)
            scores = missing_eos(raw, ended, c.missing_eos_score, c.missing_eos_penalty)
            self._check_spread(scores, ended)
            record = self._record(roll, old["logprobs"], ref_logprobs, raw, scores)
            self._check_kl(record["objective/kl"])
            arrays, stats = self.prepare(roll, old, ref_logprobs, scores)
            arrays |= {"input_ids": roll.input_ids, "attention_mask": roll.attention_mask, "mask": roll.mask}
            arrays |= {"old_logprobs": old["logprobs"], "ref_logprobs": ref_logprobs}
            record |= stats | self._optimize(arrays, roll.length)
        record["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.updates += 1
        self.history.append(record)
        return record

    def _record(
        self, roll: Rollout, logprobs: Array, ref_logprobs: Array, raw: np.ndarray, scores: np.ndarray
    ) -> dict[str, Any]:
        """The statistics of an update's responses, before anything is trained on them."""
        size, responses = self.config.batch_size, roll.responses()
        watched = {name: float(self._scores(f, roll, f"watch {name!r}").mean()) for name, f in self.watch.items()}
        return {
            "step": self.updates + 1,
            "objective/kl": float(((logprobs - ref_logprobs) * roll.mask).sum().item()) / size,
            "objective/entropy": -float((logprobs * roll.mask).sum().item()) / size,
            "objective/scores": float(scores.mean()),
            "objective/raw_scores": float(raw.mean()),
            "num_eos": int(roll.ended.sum().item()),
            "text/length": float(np.mean([len(r) for r in responses])),
            "text/distinct_2": distinct_n(responses, 2),
            "text/ref_loss": -float(masked_mean(ref_logprobs, roll.mask).item()),
            **{f"watch/{name}": mean if math.isfinite(mean) else None for name, mean in watched.items()},
        }

    def _prompts(self, update: int) -> list[list[int]]:
        k, n = self.responses_per_prompt, len(self.prompts)
        each = self.config.batch_size // k
        places = range(update * each, (update + 1) * each)
        orders = {epoch: epoch_order(n, self.config.seed, epoch) for epoch in {place // n for place in places}}
        return [self.prompts[orders[place // n][place % n]] for place in places for _ in range(k)]

    def _before(self, roll: Rollout) -> tuple[dict[str, Array], Array]:
        """(outputs of the policy that sampled, the reference's log-probabilities [B, n]), as arrays, 0 at padding."""
        xp, size, old, ref = self._xp, self.config.mini_batch_size, {}, []
        with no_grad():
            for i in range(0, self.config.batch_size, size):
                ids, mask, real = (a[i : i + size] for a in (roll.input_ids, roll.attention_mask, roll.mask))
                out = self.outputs(ids, mask, roll.length)
                for name, x in out._asdict().items():
                    if isinstance(x, Tensor):
                        old.setdefault(name, []).append(xp.where(real != 0, x.data, 0))
                logprobs = response_logprobs(self.reference, ids, mask, roll.length, self.config.temperature)
                ref.append(xp.where(real != 0, logprobs.data, 0))
        return {name: xp.concatenate(parts) for name, parts in old.items()}, xp.concatenate(ref)

    def _optimize(self, arrays: dict[str, Array], length: int) -> dict[str, float]:
        """The epochs of an update, an optimizer step a minibatch; the means of the minibatches' statistics."""
        c, xp = self.config, self._xp
        seen: list[dict[str, float]] = []
        for epoch in range(c.num_epochs):
            # A SeedSequence pads with zeros: this stream is [seed, u, epoch, 0], with which `rollout` drew the first
            # token of row `epoch`. Order and token share bits but no meaning, and a longer path would change every run.
            order = np.random.default_rng([c.seed, self.updates, epoch]).permutation(c.batch_size)
            for i in range(0, c.batch_size, c.mini_batch_size):
                rows = asarray(order[i : i + c.mini_batch_size], xp)
                batch = {name: array[rows] for name, array in arrays.items()}
                new = self.outputs(batch["input_ids"], batch["attention_mask"], length)
                loss, own = self.loss(batch, new)
                stats = {**own, **self._ratio_statistics(batch, new)}
                if not seen:
                    check_first_minibatch(stats)
                if not math.isfinite(loss.item()):
                    raise RLHFError(f"update {self.updates + 1}: the loss is {loss.item():g}; {self._advice()}")
                loss.backward()
                try:
                    norm = clip_grad_norm(self.trainable.items(), c.max_grad_norm or math.inf)
                except NonFiniteGradient as error:
                    raise RLHFError(f"update {self.updates + 1}: {error}; {self._advice()}") from error
                self.optimizer.step()
                self.optimizer.zero_grad()
                seen.append({**stats, "grad_norm": norm})
        over = {name: np.max if name in ("val/ratio_max", "val/ratio_deviation") else np.mean for name in seen[0]}
        return {name: float(over[name]([s[name] for s in seen])) for name in seen[0]}

    def _ratio_statistics(self, batch: dict[str, Array], new: Outputs) -> dict[str, float]:
        """How far the policy has gone from the one that sampled, over the real tokens."""
        xp, mask = self._xp, batch["mask"]
        change = xp.where(mask != 0, new.logprobs.data - batch["old_logprobs"], 0)
        ratio = xp.exp(change)
        return {
            "policy/approxkl": 0.5 * float(masked_mean(change**2, mask).item()),
            "policy/entropy": float(masked_mean(new.entropy, mask).item()),
            "val/ratio": float(masked_mean(ratio, mask).item()),
            "val/ratio_max": float((ratio * (mask != 0)).max().item()),
            "val/ratio_deviation": float(abs(ratio - 1).max().item()),
        }

    # ------------------------------------------------------------------------------------------- what may go wrong

    def _scores(self, function: RewardFunction, roll: Rollout, what: str) -> np.ndarray:
        scores = np.asarray(function(roll), np.float64)
        if scores.shape != (self.config.batch_size,):
            raise ValueError(f"{what} must give one score a response, ({self.config.batch_size},), not {scores.shape}")
        return scores

    def _check_finite(self, scores: np.ndarray) -> None:
        bad = int((~np.isfinite(scores)).sum())
        if bad:
            raise RLHFError(
                f"update {self.updates + 1}: the reward is NaN or infinite for {bad} of {len(scores)} responses; look "
                "at the reward, nothing can be learned from it"
            )

    def _check_spread(self, scores: np.ndarray, ended: np.ndarray) -> None:
        k = self.responses_per_prompt if self.responses_per_prompt > 1 else len(scores)
        groups = scores.reshape(-1, k)
        if k > 1 and (groups == groups[:, :1]).all():
            why = ": none ended with a stop token; raise response_length" if not ended.any() else ""
            what = "all responses" if k == len(scores) else "in every group all responses"
            raise RLHFError(
                f"update {self.updates + 1}: {what} have the same score ({scores[0]:g}), so there is nothing to "
                f"prefer{why}"
            )

    def _check_kl(self, kl: float) -> None:
        if not abs(kl) <= self.config.max_kl:
            raise RLHFError(
                f"update {self.updates + 1}: the policy is {kl:.4g} nats a response from its reference, beyond max_kl="
                f"{self.config.max_kl:g}; {self._advice()}"
            )

    def _advice(self) -> str:
        return f"lower learning_rate (it is {self.config.learning_rate:g}), raise the KL coefficient, or stop earlier"

    # ---------------------------------------------------------------------------------------------------- the whole

    def train(
        self,
        resume_from_checkpoint: bool = False,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """All updates (or until stop_kl); returns their statistics. `on_step` is told each update's.

        `resume_from_checkpoint=True` goes on from the last checkpoint in output_dir, of a run with the same policy,
        prompts and configuration; CheckpointError says otherwise. To resume, build the trainer from the policy that the
        run began with, for that is its reference; the checkpoint then puts in what was trained. (output_dir,
        save_steps, save_total_limit and max_kl may differ, so a run that max_kl stopped can go on with a higher one.) A
        fresh run refuses an output_dir with checkpoints. Other errors are those of `step`.
        """
        c, directory, position = self.config, None, 0
        if c.output_dir is not None:
            directory = Path(c.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
        if resume_from_checkpoint:
            position = self._resume(directory)
        elif directory and (found := last_checkpoint(directory)):
            raise ValueError(f"{found} is of an earlier run: resume from it, or choose another output_dir")
        if directory:
            remove_leftovers(directory)
        metrics = Metrics(directory and directory / "metrics.jsonl", position)
        self.history = list(metrics.history)
        try:
            while self.updates < c.steps and not self._reached_stop():
                record = self.step()
                metrics.write(record)
                if on_step:
                    on_step(record)
                last = self.updates == c.steps or self._reached_stop()
                if c.save_steps and (last or self.updates % c.save_steps == 0):
                    self._save(directory, metrics)
        finally:
            metrics.close()
        return self.history

    def _reached_stop(self) -> bool:
        return (
            bool(self.history)
            and self.config.stop_kl is not None
            and self.history[-1]["objective/kl"] > self.config.stop_kl
        )

    # --------------------------------------------------------------------------------------------------- checkpoints

    def _identity(self) -> dict[str, Any]:
        settings = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in _FREE}
        identity: dict[str, Any] = {"method": type(self).__name__}
        identity |= {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        identity["trainable parameters"] = {n: f"{p.dtype} {list(p.shape)}" for n, p in self.trainable.items()}
        identity["prompts"] = fingerprint((str(i), np.asarray(p, np.int64)) for i, p in enumerate(self.prompts))
        identity["reference policy"] = frozen_fingerprint(self.reference)
        if self._reward_model is not None:
            model = self._reward_model
            identity["reward model"] = fingerprint((n, p.data) for n, p in model.named_parameters())
            identity["calibration"] = [model.mean, model.std]
        return identity

    def _save(self, directory: Path, metrics: Metrics) -> None:
        moments, optimizer = pack_optimizer(self.optimizer)
        arrays = {"model": {n: to_numpy(p.data) for n, p in self.trainable.items()}, "optimizer": moments}
        content = {
            "rlhf": self.state(),
            "optimizer": optimizer,
            "metrics_bytes": metrics.position(),
            "identity": self._identity(),
        }
        save_checkpoint(directory, self.updates, arrays, content, self.config.save_total_limit)

    def _resume(self, directory: Path | None) -> int:
        """Put policy and optimizer where the last checkpoint was; the length of the metrics file then."""
        if directory is None:
            raise ValueError("resume_from_checkpoint needs the output_dir of the run that is to be resumed")
        path = last_checkpoint(directory)
        if path is None:
            raise CheckpointError(f"{directory}: holds no checkpoint to resume from")
        step, arrays, content = load_checkpoint(path)
        if not {"rlhf", "optimizer", "metrics_bytes", "identity"} <= set(content) or "model" not in arrays:
            raise CheckpointError(f"{path}: was not written by a {type(self).__name__}")
        check_identity(path, self._identity(), content["identity"])
        unpack_optimizer(self.optimizer, arrays["optimizer"], content["optimizer"])
        for name, p in self.trainable.items():
            p.data[...] = asarray(arrays["model"][name], self._xp)
        self.load_state(content["rlhf"])
        self.updates = step
        return content["metrics_bytes"]


def learned_reward(model: RewardModel) -> RewardFunction:
    """A reward for the trainers: the model's calibrated reward [B] of prompt and response, float64 in host memory.

    It is read at the last real token of the response.
    """

    def scores(roll: Rollout) -> np.ndarray:
        with no_grad():
            return to_numpy(model.rewards(roll.input_ids, roll.attention_mask).data).astype(np.float64)

    return scores


def check_adapters(model: Any, what: str) -> None:
    """ValueError for a PeftModel that trains an adapter whose method takes part in the training loop: AdaLoRA."""
    for name in getattr(model, "active_adapters", ()):
        config = model.peft_config[name]
        if config.averages and any(p.requires_grad for _, part in model.parts(name) for p in part.parameters()):
            raise ValueError(
                f"the {what}'s adapter {name!r} is {config.peft_type}, which adds a penalty to the model's own loss "
                "and prunes after every optimizer step; this trainer does neither: take another method, such as LoRA"
            )


def check_first_minibatch(stats: dict[str, float]) -> None:
    """Before an update's first optimizer step the policy is the one that sampled: |ρ - 1| < 1e-4, no KL, no clipping.

    `stats` are a minibatch's "val/ratio_deviation", "policy/approxkl" and "policy/clipfrac" (see `OnlineTrainer.step`).
    Raises RLHFError otherwise, since then the log-probabilities of two forward passes differ: dropout is on, the
    temperatures differ, or the positions of padded prompts do.
    """
    if not stats["val/ratio_deviation"] < 1e-4 or not stats["policy/approxkl"] < 1e-8 or stats["policy/clipfrac"]:
        raise RLHFError(
            "before the first optimizer step of an update the policy already differs from the one that sampled: "
            f"|ratio - 1| = {stats['val/ratio_deviation']:.3g}, approxkl = {stats['policy/approxkl']:.3g}, clipfrac = "
            f"{stats['policy/clipfrac']:.3g}; is something random in its forward pass, or its weights shared and "
            "trained?"
        )
