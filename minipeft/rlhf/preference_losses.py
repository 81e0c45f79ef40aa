"""Five losses that turn preferences into a policy, without a reward model and without samples, side by side.

    y_w, y_l        the chosen and the rejected answer to a prompt x, of |y| tokens;   σ: the logistic function
    Δ(y)            log π(y|x) - log π_ref(y|x), of the whole answer: how far the policy has left the reference
    p(y)            π(y|x)^(1/|y|), the geometric mean of the probabilities of an answer's tokens

    DPO     -log σ(β [Δ(y_w) - Δ(y_l)])                                           Rafailov et al. 2023, 2305.18290, eq. 7
    IPO     (Δ(y_w) - Δ(y_l) - 1 / 2β)²                                           Azar et al. 2023, 2310.12036, eq. 17
    KTO     λ_D [1 - σ(β [Δ(y) - z])] for a desirable answer,                     Ethayarajh et al. 2024, 2402.01306v1, eq. 7
            λ_U [1 - σ(β [z - Δ(y)])] for an undesirable one; z = max(0, KL(π, π_ref)), a constant
    ORPO    -log p(y_w) - β log σ(log odds p(y_w) - log odds p(y_l))              Hong et al. 2024, 2403.07691, eqs. 6, 7
    SimPO   -log σ(β [log p(y_w) - log p(y_l)] - γ)                               Meng et al. 2024, 2405.14734, eq. 6

What each of them adds: DPO wants the difference ever larger, and most where the pair is still in the wrong order; IPO
wants it to be 1 / 2β and no larger, so that it does not overfit pairs that are always in one order; KTO needs no pairs;
ORPO and SimPO need no reference, ORPO learns to write the chosen answer at the same time.

The log-probability of the *chosen* answer often falls. In DPO, IPO and SimPO nothing but the difference of the two is
trained, and what lowers the rejected answer lowers the chosen one, too, as far as the two are alike; the loss is
content as long as the rejected one falls faster (Razin et al. 2024, 2410.08847). ORPO's first term holds it up.

Names are Hugging Face TRL's (loss_type "sigmoid", "ipo", "kto", "simpo"; its ORPO is a trainer, and β is
ORPO's λ). TRL differs in four places:

1. IPO: TRL divides each Δ(y) by the answer's tokens, so that its 1 / 2β is a difference of nats a token. Here Δ is that
   of the whole answer, as in the paper. Give `ipo_loss` means to have TRL's.
2. KTO: TRL estimates z from each prompt with the answer before it in its batch, and takes the batches in the order of
   the data. Here it is the last answer before it, in the data, to another prompt, so that batches may be drawn (kto.py).
3. ORPO: TRL's first term is a mean over all tokens of a batch, prompts included. Here it is, as in the paper, the mean
   over an answer's tokens, and then over the pairs, so that the loss does not depend on how a step is cut into batches.
4. SimPO: TRL's CPOTrainer adds `cpo_alpha` (1 by default) times the chosen answers' cross-entropy; here as with 0. β and γ
   are by default 2 and 1, those of the paper's Llama-3-Base, and not TRL's 0.1 and 0.5.
"""

from __future__ import annotations

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Array, ref_rejected: Array, beta: float = 0.1
) -> Tensor:
    """Mean of -log σ(β [Δ_w - Δ_l]), of the log-probabilities [pairs] of whole answers: a scalar."""
    return -F.logsigmoid(beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))).mean()


def ipo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Array, ref_rejected: Array, beta: float = 0.1
) -> Tensor:
    """Mean of (Δ_w - Δ_l - 1 / 2β)², of the log-probabilities [pairs] of whole answers: a scalar; β is the paper's τ."""
    return ((((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)) - 1 / (2 * beta)) ** 2).mean()


def kto_loss(
    policy: Tensor, ref: Array, desirable: Array, kl: Array | float, beta: float = 0.1, desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """Mean of λ_D [1 - σ(β [Δ - z])] over desirable and λ_U [1 - σ(β [z - Δ])] over undesirable answers: a scalar.

    policy, ref: log-probabilities [n] of whole answers; desirable: boolean [n]; kl: z, a scalar of at least 0.
    """
    gain = beta * (policy - ref - kl)
    good, bad = desirable_weight * F.sigmoid(-gain), undesirable_weight * F.sigmoid(gain)
    return F.where(desirable, good, bad).mean()


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p <= 0, in its shape: as log σ(log p) - log tanh(-log p / 2), which is exact near p = 0 and p = 1.

    For 1 - p = (1 + p) tanh(-log p / 2). At p above 1 - 1e-6 the value is that of 1 - 1e-6, and the gradient 0.
    """
    logp = F.clip(logp, maximum=-1e-6)
    return F.logsigmoid(logp) - F.log(F.tanh(-logp / 2))


def orpo_loss(mean_chosen: Tensor, mean_rejected: Tensor, beta: float = 0.1) -> Tensor:
    """Mean of -log p_w - β log σ(log odds p_w - log odds p_l), of the means [pairs] of tokens' log-probabilities."""
    return -(mean_chosen + beta * F.logsigmoid(log_odds(mean_chosen) - log_odds(mean_rejected))).mean()


def simpo_loss(mean_chosen: Tensor, mean_rejected: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Mean of -log σ(β [log p_w - log p_l] - γ), of the means [pairs] of tokens' log-probabilities: a scalar."""
    return -F.logsigmoid(beta * (mean_chosen - mean_rejected) - gamma).mean()
