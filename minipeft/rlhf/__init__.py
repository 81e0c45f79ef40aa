"""Learning from human feedback: reward models, PPO and what came after it. One idea a file, each as its paper has it.

config.py      every option, and where its default comes from
reward.py      Bradley-Terry reward models            gold.py      a rater who follows VADER's rules, with noise
rollouts.py    sampling, where a response ends        ratings.py   real people's ratings, from the user's archive
advantages.py  shaped rewards, GAE, whitening         openings.py  prompts from the shipped novels
ppo.py         PPO, an update in numbered steps       logprobs.py  log-probabilities of tokens and of texts
group.py       RLOO, GRPO                             dpo.py       DPO
online.py      what PPO, RLOO and GRPO share          answers.py   a model's own answers as data
statistics.py  what an update reports                 curves.py    pictures of a run

A public name is imported when it is first used.
"""

from ..lazy import lazy

_HOMES = {
    "advantages": "gae masked_mean shaped_rewards whiten",
    "answers": "preference_pairs rankings sample_answers",
    "config": "DPOConfig GroupConfig OnlineConfig PPOConfig RewardConfig",
    "curves": "plot_calibration plot_run",
    "dpo": "dpo_loss dpo_trainer implicit_rewards with_reference",
    "gold": "gold_reward rank vader",
    "group": "GRPOTrainer RLOOTrainer grpo_advantages grpo_loss k3 rloo_advantages rloo_loss",
    "logprobs": "Outputs entropy frozen_copy response_logprobs sequence_logprobs token_logprobs",
    "online": "OnlineTrainer RewardFunction learned_reward missing_eos",
    "openings": "sentence_openings",
    "ppo": "KLController PPOTrainer policy_loss value_loss",
    "ratings": "human_preferences human_ratings",
    "reward": "Ranking RewardModel calibration_curve collate_rankings ranking_pairs reward_accuracy reward_loss",
    "rollouts": "Rollout distinct_n rollout truncate_response",
    "statistics": "RLHFError check_first_minibatch clip_fraction",
}

__getattr__, __dir__, __all__ = lazy(__name__, _HOMES)
