"""Learning from human feedback: reward models, PPO and what came after it. One idea a file, each as its paper has it.

reward.py      Bradley-Terry reward models            gold.py      a rater who follows VADER's rules, with noise
rollout.py     sampling, where a response ends        ratings.py   real people's ratings, from the user's archive
advantages.py  shaped rewards, GAE, whitening         openings.py  prompts from the shipped novels
ppo.py         PPO                                    logprobs.py  log-probabilities of tokens and of texts
group.py       RLOO, GRPO                             dpo.py       DPO
curves.py      pictures of a run
answers.py     a model's own answers as data          online.py    the loop that PPO, RLOO and GRPO share
"""

from .advantages import gae, masked_mean, shaped_rewards, whiten
from .answers import preference_pairs, rankings, sample_answers
from .curves import plot_calibration, plot_run
from .dpo import DPOConfig, dpo_loss, dpo_trainer, implicit_rewards, with_reference
from .gold import gold_reward, rank, vader
from .group import (
    GroupConfig,
    GRPOTrainer,
    RLOOTrainer,
    grpo_advantages,
    grpo_loss,
    k3,
    rloo_advantages,
    rloo_loss,
)
from .logprobs import entropy, frozen_copy, response_logprobs, sequence_logprobs, token_logprobs
from .online import (
    OnlineConfig,
    OnlineTrainer,
    Outputs,
    RewardFunction,
    learned_reward,
    missing_eos,
)
from .openings import sentence_openings
from .ppo import KLController, PPOConfig, PPOTrainer, policy_loss, value_loss
from .ratings import human_preferences, human_ratings
from .reward import (
    Ranking,
    RewardConfig,
    RewardModel,
    calibration_curve,
    collate_rankings,
    ranking_pairs,
    reward_accuracy,
    reward_loss,
)
from .rollout import Rollout, distinct_n, rollout, truncate_response
from .statistics import RLHFError, check_first_minibatch, clip_fraction

__all__ = [
    "DPOConfig", "GRPOTrainer", "GroupConfig", "KLController", "OnlineConfig", "OnlineTrainer", "Outputs", "PPOConfig",
    "PPOTrainer", "RLHFError", "RLOOTrainer", "Ranking", "RewardConfig", "RewardFunction", "RewardModel", "Rollout",
    "calibration_curve", "check_first_minibatch", "clip_fraction", "collate_rankings", "distinct_n", "dpo_loss",
    "dpo_trainer", "entropy", "frozen_copy", "gae", "gold_reward", "grpo_advantages", "grpo_loss",
    "human_preferences", "human_ratings", "implicit_rewards", "k3", "learned_reward", "masked_mean", "missing_eos",
    "plot_calibration", "plot_run", "policy_loss", "preference_pairs", "rank", "ranking_pairs", "rankings",
    "response_logprobs", "reward_accuracy", "reward_loss", "rloo_advantages", "rloo_loss", "rollout",
    "sample_answers", "sentence_openings", "sequence_logprobs", "shaped_rewards", "token_logprobs",
    "truncate_response", "vader", "value_loss", "whiten", "with_reference",
]  # fmt: skip
