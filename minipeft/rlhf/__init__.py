"""Learning from human feedback: reward models, PPO and what came after it. One idea a file, each as its paper has it.

config.py      every option, and where its default comes from
reward.py      Bradley-Terry reward models            gold.py      a rater who follows VADER's rules, with noise
rollouts.py    sampling, where a response ends        ratings.py   real people's ratings, from the user's archive
advantages.py  shaped rewards, GAE, whitening         openings.py  prompts from the shipped novels
ppo.py         PPO, an update in numbered steps       logprobs.py  log-probabilities of tokens and of texts
group.py       RLOO, GRPO                             answers.py   a model's own answers as data
online.py      what PPO, RLOO and GRPO share          curves.py    pictures of a run
statistics.py  what an update reports                 baseline.py  best of n, which trains nothing
reward_functions.py    own rewards, of texts
preference_losses.py   the equations of DPO, IPO, KTO, ORPO and SimPO; dpo.py trains on pairs, kto.py on single answers

A public name is imported when it is first used.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:  # the public names; each is imported when it is first used
    from .advantages import gae as gae, masked_mean as masked_mean, shaped_rewards as shaped_rewards, whiten as whiten
    from .answers import preference_pairs as preference_pairs, rankings as rankings, sample_answers as sample_answers
    from .baseline import (
        BestOfN as BestOfN, best_of_n as best_of_n, best_of_n_kl as best_of_n_kl, expected_best as expected_best,
    )  # fmt: skip
    from .config import (
        DPOConfig as DPOConfig, GroupConfig as GroupConfig, OnlineConfig as OnlineConfig, PPOConfig as PPOConfig,
        RewardConfig as RewardConfig,
    )  # fmt: skip
    from .curves import (
        plot_calibration as plot_calibration, plot_preferences as plot_preferences, plot_run as plot_run,
    )  # fmt: skip
    from .dpo import dpo_trainer as dpo_trainer, with_reference as with_reference
    from .gold import gold_reward as gold_reward, rank as rank, vader as vader
    from .group import (
        GRPOTrainer as GRPOTrainer, RLOOTrainer as RLOOTrainer, grpo_advantages as grpo_advantages,
        grpo_loss as grpo_loss, k3 as k3, rloo_advantages as rloo_advantages, rloo_loss as rloo_loss,
    )  # fmt: skip
    from .logprobs import (
        Outputs as Outputs, entropy as entropy, frozen_copy as frozen_copy, response_logprobs as response_logprobs,
        sequence_logprobs as sequence_logprobs, token_logprobs as token_logprobs,
    )  # fmt: skip
    from .online import (
        OnlineTrainer as OnlineTrainer, RewardFunction as RewardFunction, learned_reward as learned_reward,
        missing_eos as missing_eos,
    )  # fmt: skip
    from .openings import sentence_openings as sentence_openings
    from .ppo import (
        KLController as KLController, PPOTrainer as PPOTrainer, policy_loss as policy_loss, value_loss as value_loss,
    )  # fmt: skip
    from .preference_losses import (
        dpo_loss as dpo_loss, ipo_loss as ipo_loss, kto_loss as kto_loss, orpo_loss as orpo_loss,
        simpo_loss as simpo_loss,
    )  # fmt: skip
    from .ratings import human_preferences as human_preferences, human_ratings as human_ratings
    from .reward import (
        Ranking as Ranking, RewardModel as RewardModel, calibration_curve as calibration_curve,
        collate_rankings as collate_rankings, ranking_pairs as ranking_pairs, reward_accuracy as reward_accuracy,
        reward_loss as reward_loss,
    )  # fmt: skip
    from .reward_functions import text_reward as text_reward
    from .rollouts import (
        Rollout as Rollout, distinct_n as distinct_n, rollout as rollout, truncate_response as truncate_response,
    )  # fmt: skip
    from .statistics import (
        RLHFError as RLHFError, check_first_minibatch as check_first_minibatch, clip_fraction as clip_fraction,
    )  # fmt: skip
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
