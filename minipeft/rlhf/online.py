"""What PPO, RLOO and GRPO have in common: a policy answers prompts, gets a score for each answer, and is moved a little.

    for update:   prompts ─► rollout ─► scores, log-probabilities of policy and reference ─► advantages
                  for epoch, minibatch:   loss ─► gradients ─► clip ─► Adam

An update is one turn of the outer loop, an optimizer step one of the inner; each method writes its `update` down in full
from the parts that stand here. Everything that an update does depends on (seed, update) and the weights alone, so a run
resumed from a checkpoint ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..autograd.tensor import Tensor, is_grad_enabled, no_grad
from ..backend import Array, Rng, asarray, to_numpy, xp_of
from ..nn.module import Module, Parameter
from ..options import check, configuration, option
from ..train.callbacks import Callback, Callbacks
from ..train.checkpoint import fingerprint, frozen_fingerprint
from ..train.optim import Adam, NonFiniteGradient, clip_grad_norm
from ..train.run import Run
from ..train.schedule import SCHEDULES
from .logprobs import entropy, frozen_copy, response_hidden, token_logprobs
from .reward import RewardModel
from .rollout import Rollout, rollout
from .statistics import RLHFError, check_first_minibatch, of_responses, of_scores

RewardFunction = Callable[[Rollout], np.ndarray]  # scores [B] of a rollout's responses, in host memory


@configuration(kw_only=True)
class OnlineConfig:
    """How to train on one's own samples: what PPO, RLOO and GRPO have in common.

    batch_size, num_epochs, cliprange and response_length are those of OpenAI's lm-human-preferences (`PpoHParams`, the
    books task); TRL has 4 epochs, too. learning_rate and steps suit the shipped base of 1.4 million parameters, where
    lm-human-preferences takes 1e-5 for 124 million: VADER's score of its answers rose from 0.09 to 0.33 at a KL of 1.9
    nats (two seeds), and clipping acted on 18% of the ratios of the first update; at 1e-4 it acts on 31%. An adapter
    takes about ten times the rate.

    Raises ValueError, naming the option, for a value that makes no sense.
    """

    output_dir: str | os.PathLike | None = option(
        None, "where metrics and checkpoints go", flag="--output", metavar="DIR"
    )
    steps: int = option(40, "updates, each on batch_size fresh responses", least=1)
    batch_size: int = option(64, "responses an update", least=1)
    mini_batch_size: int = option(16, "responses an optimizer step", least=1)
    num_epochs: int = option(4, "passes over an update's responses", least=1, flag="--epochs")
    learning_rate: float = option(5e-5, "learning rate of Adam", above=0, flag="--lr", metavar="RATE")
    lr_scheduler_type: str = option("linear", "learning-rate schedule, over updates", choices=SCHEDULES, flag="--schedule")
    max_grad_norm: float | None = option(1.0, "clip the gradient to this 2-norm; 0 or None does not", least=0)
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
    progress: bool = option(True, "a progress bar on stderr, if that is a terminal")

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
_FREE = {"output_dir", "save_steps", "save_total_limit", "progress", "max_kl", "max_equal_updates"}


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


class Outputs(NamedTuple):
    """What the policy makes of responses of n tokens: every array is [B, n]."""

    logprobs: Tensor
    values: Tensor | None = None
    entropy: Array | None = None  # of the distribution at every position; None without gradients, where nothing reads it


# ------------------------------------------------------------------------------------------------- parts of an update

# Every use of random numbers has a stream of its own. Token t of row i of update u is drawn with the path [seed, u, i, t]
# (`rollout`). The two orders add a purpose as their spawn key, a number that is no token's position: their paths are
# shorter, NumPy pads a path with zeros, and [seed, u, epoch] alone would be the stream of the token [seed, u, epoch, 0].
PROMPTS, MINIBATCHES = 1 << 31, (1 << 31) + 1


def order(purpose: int, n: int, *path: int) -> np.ndarray:
    """A permutation of n that depends on the purpose and the path [seed, ...] alone."""
    return np.random.default_rng(np.random.SeedSequence(path, spawn_key=(purpose,))).permutation(n)


def minibatches(config: OnlineConfig, update: int, xp: ModuleType = np) -> Iterator[Array]:
    """The rows of each minibatch of an update, epoch after epoch: [mini_batch_size]."""
    for epoch in range(config.num_epochs):
        rows = order(MINIBATCHES, config.batch_size, config.seed, update, epoch)
        for i in range(0, config.batch_size, config.mini_batch_size):
            yield asarray(rows[i : i + config.mini_batch_size], xp)


def policy_outputs(policy: Module, hidden: Tensor, input_ids: Array, temperature: float) -> Outputs:
    """Log-probabilities and entropies of the last n tokens of input_ids [B, T], from the `response_hidden` [B, n, d]."""
    logits = policy.lm_head(hidden) / temperature  # [B, n, V]
    spread = entropy(logits.data) if is_grad_enabled() else None
    return Outputs(token_logprobs(logits, input_ids[:, -hidden.shape[1] :]), entropy=spread)


def forward_only(function: Callable[..., Iterable[Tensor | None]], roll: Rollout, size: int) -> list[Array]:
    """What function(input_ids, attention_mask, n) gives for a rollout's responses, without gradients, `size` rows at a time.

    Every Tensor that it gives is [B, n]; they come back as arrays that are 0 at padding.
    """
    xp, parts = xp_of(roll.mask), []
    with no_grad():
        for i in range(0, len(roll.mask), size):
            ids, attention_mask, real = (a[i : i + size] for a in (roll.input_ids, roll.attention_mask, roll.mask))
            given = function(ids, attention_mask, roll.length)
            parts.append([xp.where(real != 0, x.data, 0) for x in given if x is not None])
    return [xp.concatenate(rows) for rows in zip(*parts)]


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
        beside: parameters that are trained beside the policy's, by name; a subclass gives them.

    The reference is the policy as it is now: what is frozen is shared with it, what is trained is copied.

    Raises ValueError for arguments that make no sense: no prompts, a prompt that with its response is longer than the
    policy's positions, a policy without an EOS token (where its absence costs something) or a trained parameter.
    """

    def __init__(
        self,
        policy: Any,
        reward: RewardModel | RewardFunction,
        prompts: Sequence[Sequence[int]],
        config: Any,
        watch: Mapping[str, RewardFunction] | None = None,
        beside: Mapping[str, Parameter] | None = None,
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
        self._reward_model = reward if isinstance(reward, RewardModel) else None
        self.reward: RewardFunction = learned_reward(reward) if isinstance(reward, RewardModel) else reward
        stops = config.stop_token_ids
        if stops is None:
            eos = policy.config.eos_token_id
            stops = () if eos is None else np.atleast_1d(eos).tolist()
        self.stop_token_ids = tuple(stops)
        if not self.stop_token_ids and (config.missing_eos_score, config.missing_eos_penalty) != (None, None):
            raise ValueError("the model names no EOS token: give stop_token_ids, or set missing_eos_score to None")
        self.trainable: dict[str, Parameter] = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ValueError("no parameter of the policy requires gradients, so there is nothing to train")
        self._xp = xp_of(*[p.data for p in self.trainable.values()])
        self.reference = frozen_copy(policy)
        self.trainable |= beside or {}
        # eps as in OpenAI's lm-human-preferences (utils/core.py, `minimize`), PyTorch's default is 1e-8
        self.optimizer = Adam(self.trainable.items(), lr=config.learning_rate, eps=1e-5)
        self._callbacks: Callbacks | None = None
        self.updates = 0
        self.history: list[dict[str, Any]] = []

    @abstractmethod
    def update(self) -> dict[str, Any]:
        """Sample, score and train once; the record of it (see statistics.py), but for its number and learning rate."""

    def outputs(self, input_ids: Array, attention_mask: Array, length: int) -> Outputs:
        """The policy's outputs for the last `length` tokens, from a full forward pass: never from the cache."""
        hidden = response_hidden(self.policy, input_ids, attention_mask, length)
        return policy_outputs(self.policy, hidden, input_ids, self.config.temperature)

    def step(self) -> dict[str, Any]:
        """One update. Returns its statistics (see statistics.py), which are also added to `history`.

        Raises RLHFError, naming the update and what helps, for a score that is NaN or infinite, a KL above max_kl, a
        loss or a gradient that is NaN or infinite, and where `check_first_minibatch` does. FloatingPointError where the
        policy's logits are NaN while it samples; ValueError where a reward or a watcher does not give one number a
        response, and for a policy whose hidden states cannot be read, as one with virtual tokens.
        """
        rate = self.config.learning_rate * SCHEDULES[self.config.lr_scheduler_type](self.updates, 0, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with np.errstate(all="ignore"):  # NaN and infinity are looked for where they matter
            record = {"step": self.updates + 1, **self.update(), "learning_rate": rate}
        self.updates += 1
        self.history.append(record)
        return record

    # ------------------------------------------------------------------------------------------- parts of an update

    def rollout(self, group: int = 1) -> Rollout:
        """The policy's answers to the prompts of this update, `group` to each: batch_size responses."""
        c, prompts = self.config, self.prompts_of(self.updates, group)
        stream = Rng(c.seed, self.updates)
        return rollout(self.policy, prompts, c.response_length, c.temperature, self.stop_token_ids, stream)

    def prompts_of(self, update: int, group: int = 1) -> list[list[int]]:
        """An update's prompts, each `group` times in a row; all are taken once, then all again in another order."""
        n, each = len(self.prompts), self.config.batch_size // group
        places = range(update * each, (update + 1) * each)
        orders = {epoch: order(PROMPTS, n, self.config.seed, epoch) for epoch in {place // n for place in places}}
        return [self.prompts[orders[place // n][place % n]] for place in places for _ in range(group)]

    def score(
        self, roll: Rollout, logprobs: Array, ref_logprobs: Array, kl: Array, group: int
    ) -> tuple[Array, dict[str, Any]]:
        """(scores [B] of the responses, on the device; the record so far). `group` responses in a row are compared.

        logprobs, ref_logprobs and kl (`token_kl`) are [B, n].
        """
        c = self.config
        raw = self._asked(self.reward, roll, "the reward")
        bad = int((~np.isfinite(raw)).sum())
        if bad:
            raise self._error(
                f"the reward is NaN or infinite for {bad} of {len(raw)} responses; look at the reward, nothing can be "
                "learned from it"
            )
        scores = missing_eos(raw, to_numpy(roll.ended), c.missing_eos_score, c.missing_eos_penalty)
        watched = {name: self._asked(function, roll, f"watch {name!r}") for name, function in self.watch.items()}
        record = of_scores(raw, scores, group) | of_responses(roll, logprobs, ref_logprobs, kl, watched)
        if not abs(record["objective/kl"]) <= c.max_kl:
            raise self._error(
                f"the policy is {record['objective/kl']:.4g} nats a response from its reference, beyond max_kl="
                f"{c.max_kl:g}; {self._advice()}"
            )
        return asarray(scores.astype(np.float32), self._xp), record

    def _asked(self, function: RewardFunction, roll: Rollout, what: str) -> np.ndarray:
        scores = np.asarray(function(roll), np.float64)
        if scores.shape != (self.config.batch_size,):
            raise ValueError(f"{what} must give one score a response, ({self.config.batch_size},), not {scores.shape}")
        return scores

    def descend(self, loss: Tensor, stats: dict[str, float], seen: list[dict[str, float]]) -> bool:
        """One optimizer step: gradients of the loss, clipping, Adam. True where a callback asks for the end of the run.

        `stats` are the minibatch's; with "grad_norm" they are added to `seen`, those of the update's minibatches.
        """
        c = self.config
        if not seen:
            check_first_minibatch(stats)
        if not math.isfinite(loss.item()):
            raise self._error(f"the loss is {loss.item():g}; {self._advice()}")
        loss.backward()
        number = self.updates * c.num_epochs * (c.batch_size // c.mini_batch_size) + len(seen) + 1
        if self._callbacks is None:  # an own loop over `step`
            self._callbacks = self._gathered()
        self._callbacks.before_step(self.policy, number)
        try:
            norm = clip_grad_norm(self.trainable.items(), c.max_grad_norm or math.inf)
        except NonFiniteGradient as error:
            raise self._error(f"{error}; {self._advice()}") from error
        self.optimizer.step()
        seen.append({**stats, "grad_norm": norm})
        self._callbacks.after_step(self.policy, number, {"step": number, **seen[-1]})
        self.optimizer.zero_grad()
        return self._callbacks.stopped

    def _error(self, what: str) -> RLHFError:
        return RLHFError(f"update {self.updates + 1}: {what}")

    def _advice(self) -> str:
        return f"lower learning_rate (it is {self.config.learning_rate:g}), raise the KL coefficient, or stop earlier"

    # ---------------------------------------------------------------------------------------------------- the whole

    def train(
        self,
        resume_from_checkpoint: bool | str | os.PathLike = False,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> list[dict[str, Any]]:
        """All updates (or until stop_kl); returns their statistics. `on_step` is given each update's.

        The `callbacks` (see `Callback`) come after the policy's own, and are called around every *optimizer step*, which
        are numbered through the run; one that asks for the end ends the update, too.

        `resume_from_checkpoint=True` goes on from the last checkpoint in output_dir, of a run with the same policy,
        prompts and configuration; CheckpointError says otherwise. To resume, build the trainer from the policy that the
        run began with, for that is its reference; the checkpoint then puts in what was trained. (output_dir,
        save_steps, save_total_limit, progress, max_kl and max_equal_updates may differ, so a run that one of the last
        two stopped can go on with a higher one.) A fresh run refuses an output_dir with checkpoints.

        Raises RLHFError after max_equal_updates in a row in which no score differed from those that it is compared
        with, and, given an output_dir, saves a checkpoint before. Other errors are those of `step`.
        """
        c, self._callbacks = self.config, self._gathered(callbacks)
        run = Run(
            c, c.steps, self.trainable, self.optimizer, self._callbacks, identity=self._identity, state=self.state,
            load_state=self.load_state, show={"objective/scores": "reward {:.3f}", "objective/kl": "KL {:.2f}"},
            unit="update", progress=c.progress,
        )  # fmt: skip
        with run.start(resume_from_checkpoint):
            self.updates = run.step = max(run.step, self.updates)
            self.history = list(run.history)
            for _ in run:
                record = self.step()
                run.record(record)
                if on_step:
                    on_step(record)
                run.stopped = c.stop_kl is not None and record["objective/kl"] > c.stop_kl
                last = [r["objective/scores_equal"] == 1 for r in self.history[-c.max_equal_updates :]]
                if run.step < c.steps and len(last) == c.max_equal_updates and all(last):
                    raise self._nothing_to_prefer(run)
        return self.history

    def _nothing_to_prefer(self, run: Run) -> RLHFError:
        c, record, kept = self.config, self.history[-1], ""
        if run.directory:
            run.save()
            kept = f"; checkpoint-{run.step} keeps the run, which goes on with a higher max_equal_updates"
        why = ": none ended with a stop token; raise response_length" if not record["num_eos"] else ""
        return RLHFError(
            f"update {run.step}: no response has scored better or worse than those it is compared with for "
            f"{c.max_equal_updates} updates (the last mean: {record['objective/scores']:g}), so there is nothing to "
            f"prefer{why}{kept}"
        )

    def _gathered(self, callbacks: Iterable[Callback] = ()) -> Callbacks:
        return Callbacks(self.policy, callbacks)

    def state(self) -> dict[str, Any]:
        """What the method remembers from update to update, as JSON values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        return None

    def _identity(self) -> dict[str, Any]:
        settings = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in _FREE}
        identity = {
            "method": type(self).__name__, **settings,
            "trainable parameters": {n: f"{p.dtype} {list(p.shape)}" for n, p in self.trainable.items()},
            "prompts": fingerprint((str(i), np.asarray(p, np.int64)) for i, p in enumerate(self.prompts)),
            "reference policy": frozen_fingerprint(self.reference),
        }  # fmt: skip
        if (model := self._reward_model) is not None:
            identity["reward model"] = fingerprint((n, p.data) for n, p in model.named_parameters())
            identity["calibration"] = [model.mean, model.std]
        return identity


def learned_reward(model: RewardModel) -> RewardFunction:
    """A reward for the trainers: the model's calibrated reward [B] of prompt and response, float64 in host memory.

    It is read at the last real token of the response.
    """

    def scores(roll: Rollout) -> np.ndarray:
        with no_grad():
            return to_numpy(model.rewards(roll.input_ids, roll.attention_mask).data).astype(np.float64)

    return scores
