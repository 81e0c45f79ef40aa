"""The options of PPO, RLOO, GRPO, DPO and reward models, and where their defaults come from."""

from __future__ import annotations

import os

from ..options import check, configuration, option
from ..train.schedule import SCHEDULES


@configuration(kw_only=True)
class OnlineConfig:
    """How to train on one's own samples: what PPO, RLOO and GRPO have in common.

    batch_size, num_epochs and cliprange are the defaults of OpenAI's lm-human-preferences (`PpoHParams`; its books task
    has batches of 512), response_length is that of its books task; TRL has 4 epochs, too. learning_rate and steps suit
    the shipped base of 1.4 million parameters, where lm-human-preferences takes 1e-5 for 124 million. Measured on the
    base as it was after 3,600 of its 8,400 steps: at 5e-5, a twentieth of the usual rate of full fine-tuning, VADER's
    score of its answers rose from 0.09 to 0.33 at a KL of 1.9 nats (two seeds), and clipping acted on 18% of the ratios
    of the first update; at 1e-4 it acts on 31%. Adapters take a sixth of theirs: LoRA at 5e-4 went from 0.14 to 0.30 at
    a KL of 2.1, while at a twentieth, 1.5e-4, the KL came to 0.2 and the score did not rise (one seed).

    Raises ValueError, naming the option, for a value that makes no sense.
    """

    output_dir: str | os.PathLike | None = option(None, "for metrics and checkpoints", flag="--output", metavar="DIR")
    steps: int = option(40, "updates, each on batch_size fresh responses", least=1)
    batch_size: int = option(64, "responses an update", least=1)
    mini_batch_size: int = option(16, "responses an optimizer step", least=1)
    num_epochs: int = option(4, "passes over an update's responses", least=1, flag="--epochs")
    learning_rate: float | None = option(
        None, "learning rate of Adam; None: a twentieth of the usual one (`train.rates`), of adapters a sixth",
        above=0, flag="--lr", metavar="RATE",
    )  # fmt: skip
    lr_scheduler_type: str = option("linear", "schedule, over updates", choices=SCHEDULES, flag="--schedule")
    max_grad_norm: float | None = option(1.0, "clip the gradient to this 2-norm; 0 or None does not", least=0)
    response_length: int = option(24, "tokens that a response has at most", least=1)
    temperature: float = option(1.0, "of sampling, and of every log-probability", above=0, metavar="T")
    stop_token_ids: tuple[int, ...] | None = option(None, "what ends a response; None: the model's EOS", least=0)
    # OpenAI replaces the score by -1; TRL's missing_eos_penalty is None by default. A policy that was never taught to
    # end its answers, as the shipped base, would have -1 for nearly all of them, and nothing to learn from.
    missing_eos_score: float | None = option(None, "score of a response that no stop token ended, such as -1")
    missing_eos_penalty: float | None = option(None, "or: what such a response loses of its score")
    bf16: bool = option(False, "policy and reference in bfloat16 (see `mp.autocast`), sampling too")
    cliprange: float = option(0.2, "ε: how far from 1 a ratio counts", above=0)
    max_kl: float = option(100.0, "stop with an error above this KL from the reference, in nats a response", above=0)
    stop_kl: float | None = option(None, "end after the first update that samples above this KL", above=0)
    max_equal_updates: int = option(20, "stop with an error after N updates whose scores are all equal", least=1)
    save_steps: int | None = option(None, "updates between checkpoints; None: no checkpoints", least=1)
    save_total_limit: int = option(2, "how many checkpoints are kept, the newest", least=1)
    seed: int = option(0, "seed of the order of the prompts, the responses and the minibatches", least=0)
    progress: bool = option(True, "say on stderr how far it is: a bar, or in a log file a line every 10 s")

    def __post_init__(self) -> None:
        check(self)
        if self.batch_size % self.mini_batch_size:
            wanted = f"a multiple of mini_batch_size, {self.mini_batch_size}"
            raise ValueError(f"batch_size must be {wanted}, got {self.batch_size}")
        if self.missing_eos_score is not None and self.missing_eos_penalty is not None:
            raise ValueError("missing_eos_score replaces, missing_eos_penalty lowers a score: set one of them to None")
        if self.save_steps is not None and self.output_dir is None:
            raise ValueError("save_steps needs an output_dir to save to")


@configuration(kw_only=True)
class PPOConfig(OnlineConfig):
    """PPO's options beside OnlineConfig's. γ, λ, vf_coef and both clip ranges are OpenAI's (Huang et al. 2024)."""

    kl_coef: float = option(0.05, "β, the price of KL from the reference", least=0, metavar="B")  # TRL's
    kl_target: float | None = option(
        None, "ppo: move β so that the KL comes to this, nats a response", above=0, metavar="KL"
    )
    kl_horizon: int = option(10000, "responses over which such a β may move by a fifth", least=1)
    gamma: float = option(1.0, "γ, the discount of later rewards", least=0, most=1)
    lam: float = option(0.95, "λ of generalized advantage estimation", least=0, most=1)
    cliprange_value: float = option(0.2, "ε of the values: how far a value may move in an update", above=0)
    vf_coef: float = option(0.1, "weight of the value loss", least=0)
    whiten_rewards: bool = option(False, "rescale the shaped rewards to variance 1, keeping their mean")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_target is not None and not 5 * self.kl_horizon > self.batch_size:
            wanted = f"above batch_size / 5, {self.batch_size / 5:g}, or β would not stay above 0"
            raise ValueError(f"kl_horizon must be {wanted}, got {self.kl_horizon}")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target multiplies kl_coef up and down, so kl_coef must not start at 0")


@configuration(kw_only=True)
class GroupConfig(OnlineConfig):
    """RLOO's and GRPO's options beside those of OnlineConfig.

    0.05 is TRL's β for PPO and RLOO, and PPOConfig's; GRPO's paper has 0.04. It is not one price: PPO and RLOO multiply
    by it a response's KL, in units of the score; GRPO a k3 per token in the loss, beside standardized advantages.
    """

    num_generations: int = option(4, "rloo, grpo: responses to each prompt", least=2, flag="--generations", metavar="K")
    kl_coef: float = option(0.05, "β, the price of KL from the reference", least=0, metavar="B")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.num_generations:
            wanted = f"a multiple of num_generations, {self.num_generations}"
            raise ValueError(f"batch_size must be {wanted}, got {self.batch_size}")


@configuration(kw_only=True)
class RewardConfig:
    """What the loss of a reward model asks beside TrainingArguments."""

    # 0.01 is what TRL recommends
    center: float = option(0.0, "weight of (r_chosen + r_rejected)², which keeps rewards near 0", least=0, metavar="C")


# Loss -> the options that it has. Those with a reference compute its log-probabilities once, in batches.
OPTIONS_OF_LOSS = {
    "sigmoid": ("beta", "reference_batch_size"),
    "ipo": ("beta", "reference_batch_size"),
    "kto": ("beta", "desirable_weight", "undesirable_weight", "reference_batch_size"),
    "orpo": ("beta",),
    "simpo": ("beta", "gamma"),
}


@configuration(kw_only=True)
class DPOConfig:
    """What a loss of preferences asks beside TrainingArguments: see preference_losses.py for the equations.

    β is what leaving the reference costs: 0.1 in Rafailov et al., appendix B, and in TRL. ORPO's β is the weight λ of
    its odds ratio, 0.1 in the paper. SimPO's scales a reward per token and is 2, with γ = 1, for the paper's
    Llama-3-Base; its authors recommend γ / β = 0.5 to begin with.

    Raises ValueError, naming the option, for a value that makes no sense or an option that the loss does not have.
    """

    loss_type: str = option("sigmoid", "of preferences; sigmoid is DPO's", choices=OPTIONS_OF_LOSS, flag="--loss")
    beta: float | None = option(None, "β of the loss (default: 0.1; simpo: 2)", above=0, metavar="B")
    gamma: float = option(1.0, "simpo: γ, by how much the chosen answer should lead", least=0, metavar="G")
    desirable_weight: float = option(1.0, "kto: λ_D, weight of the desirable answers", above=0, metavar="W")
    undesirable_weight: float = option(1.0, "kto: λ_U, weight of the undesirable answers", above=0, metavar="W")
    reference_batch_size: int = option(32, "pairs at a time whose reference log-probabilities are computed", least=1)

    def __post_init__(self) -> None:
        check(self)
        for name in ("gamma", "desirable_weight", "undesirable_weight", "reference_batch_size"):
            value, default = getattr(self, name), getattr(type(self), name)
            if value != default and name not in OPTIONS_OF_LOSS[self.loss_type]:
                raise ValueError(f"{name} is not an option of loss_type={self.loss_type!r}; got {value}")
        if self.beta is None:
            self.beta = 2.0 if self.loss_type == "simpo" else 0.1
