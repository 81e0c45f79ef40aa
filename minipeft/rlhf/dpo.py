"""Direct preference optimization: preferences become a policy without a reward model or samples.

The policy that maximizes reward minus β KL is π*(y|x) ∝ π_ref(y|x) exp(r(x, y) / β), so every policy is the optimum of
the reward β log(π / π_ref). Put into Bradley-Terry, that reward gives a loss of the policy itself:

    L = -log σ(β [log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l)])

Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7. The losses that came after it, IPO, KTO, ORPO and SimPO, stand
beside it in preference_losses.py; here is what all of them need to be trained, and what is recorded of a run, held out
as "eval_...", by TRL's names:

    logps/chosen, logps/rejected       log-probability of a whole answer: nats. Why the first may fall: preference_losses.py
    rewards/chosen, rewards/rejected   what the loss takes for a reward: β log(π / π_ref); without a reference, ORPO and
                                       SimPO, β times the mean log-probability of the answer's tokens
    rewards/margins                    the first less the second
    rewards/accuracies                 share of pairs with a margin above 0 (equal rewards count one half)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..autograd.tensor import Tensor
from ..backend import Array, Rng
from ..nn.module import Module
from ..text.examples import PreferencePair, UnpairedExample
from ..train.batches import Batch, check_examples, collate
from ..train.evaluation import Statistics, example_losses
from ..train.parallel import in_precision
from ..train.rates import with_learning_rate
from ..train.trainer import Trainer, TrainingArguments
from .config import OPTIONS_OF_LOSS, DPOConfig
from .kto import kto_trainer
from .logprobs import completion_lengths, prompt_length, sequence_logprobs
from .preference_losses import dpo_loss, ipo_loss, orpo_loss, simpo_loss


class ReferencedPair(NamedTuple):
    """A preference pair and what the reference policy makes of it: log-probabilities of the two completions."""

    pair: PreferencePair
    ref_chosen: float
    ref_rejected: float


def collate_pairs(pairs: Sequence[PreferencePair]) -> Batch:
    """Pairs as one batch for `dpo_objective`: the chosen texts, then the rejected ones, padded on the right."""
    batch = collate([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
    return Batch(batch.arguments | {"first": prompt_length(batch.arguments["labels"])}, len(pairs), batch.tokens)


def collate_referenced(pairs: Sequence[ReferencedPair]) -> Batch:
    """`collate_pairs`, with the reference's log-probabilities."""
    batch = collate_pairs([p.pair for p in pairs])
    reference = {
        name: np.array([getattr(p, name) for p in pairs], np.float32) for name in ("ref_chosen", "ref_rejected")
    }
    return batch._replace(arguments=batch.arguments | reference)


def dpo_objective(
    model: Module, input_ids: Array, labels: Array, attention_mask: Array | None, ref_chosen: Array | None = None,
    ref_rejected: Array | None = None, loss_type: str = "sigmoid", beta: float = 0.1, gamma: float = DPOConfig.gamma,
    first: int | None = None, rng: Rng | None = None,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """A loss of pairs for a batch whose first half are the chosen completions, and its statistics: for the Trainer.

    input_ids, labels, attention_mask [2 · pairs, T], and `first` of them as in `sequence_logprobs`; ref_chosen,
    ref_rejected [pairs], None for "orpo" and "simpo".
    `rng` is not used: dropout would act on the policy and not on the reference (and TRL's trainers turn it off). Raises
    ValueError for a loss_type that needs a reference where there is none, and for one that has no use for it.
    """
    if ref_chosen is None:
        losses, given = {"orpo": orpo_loss, "simpo": partial(simpo_loss, gamma=gamma)}, "without"
    else:
        losses, given = {"sigmoid": dpo_loss, "ipo": ipo_loss}, "with"
    if loss_type not in losses:
        wanted = " or ".join(map(repr, losses))
        raise ValueError(f"{given} ref_chosen and ref_rejected, loss_type must be {wanted}, got {loss_type!r}")
    sums = sequence_logprobs(model, input_ids, labels, attention_mask, first)  # [2 · pairs]
    n = sums.shape[0] // 2
    if ref_chosen is None:
        means = sums / completion_lengths(labels)
        loss = losses[loss_type](means[:n], means[n:], beta)
        chosen, rejected = beta * means.data[:n], beta * means.data[n:]
    else:
        loss = losses[loss_type](sums[:n], sums[n:], ref_chosen, ref_rejected, beta)
        chosen, rejected = beta * (sums.data[:n] - ref_chosen), beta * (sums.data[n:] - ref_rejected)
    return loss, {
        "logps/chosen": sums.data[:n],
        "logps/rejected": sums.data[n:],
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected) + 0.5 * (chosen == rejected),
    }


def completion_logprobs(model: Module, pairs: Sequence[PreferencePair], batch_size: int = 32) -> np.ndarray:
    """log π(completion | prompt) of each pair's (chosen, rejected), without gradients: [n, 2], in host memory."""
    nll, _ = example_losses(model, [example for pair in pairs for example in pair], 2 * batch_size)
    return -nll.reshape(-1, 2)


def with_reference(model: Module, pairs: Sequence[PreferencePair], batch_size: int = 32) -> list[ReferencedPair]:
    """The pairs with the log-probabilities that `model`, as it is now, gives them: the reference of the training."""
    logprobs = completion_logprobs(model, pairs, batch_size)
    return [ReferencedPair(pair, *map(float, row)) for pair, row in zip(pairs, logprobs)]


def dpo_trainer(
    policy: Module, pairs: Sequence[PreferencePair] | Sequence[UnpairedExample],
    eval_pairs: Sequence[PreferencePair] | Sequence[UnpairedExample] | None = None, args: TrainingArguments | None = None,
    **options: Any,
) -> Trainer:  # fmt: skip
    """A Trainer that fine-tunes `policy` (a model, or a PeftModel) on preferences, by DPO or a loss beside it.

        rlhf.dpo_trainer(policy, pairs, held_out, args, loss_type="simpo", beta=2.5).train()

    `options` are those of `DPOConfig`. loss_type="kto" takes pairs, whose answers it looks at one by one, or
    `UnpairedExample`s (see kto.py).

    The reference is the policy as it is now. Its log-probabilities are computed here, once, so no second model is held,
    `reference_batch_size` pairs at a time. They are part of the examples, and their last bits depend on that number: a
    run is resumed with the same one, from the policy that it began with. "orpo" and "simpo" have none. Where `args` give
    no learning rate it is a tenth of the method's usual one (`train.rates`).

    Raises ValueError as `DPOConfig` does, for what is no pair or unpaired example, for unpaired examples where pairs are
    wanted, for an answer without a label that counts, and for a policy with virtual tokens or merged adapters.
    """
    if getattr(policy, "virtual_tokens", 0):
        raise ValueError("preferences train no virtual tokens, which this policy has: use LoRA, or another adapter inside")
    if hasattr(policy, "peft_config"):  # the losses read the backbone, not the PeftModel's own loss
        policy.check_unmerged()
    for what, given in (("training", pairs), ("evaluation", eval_pairs or ())):
        for i, one in enumerate(given):
            if not isinstance(one, (PreferencePair, UnpairedExample)):
                made = f"{what} example {i} is a {type(one).__name__}, not a PreferencePair or an UnpairedExample"
                raise ValueError(f"{made}: encode records with minipeft.text.examples.encode_preferences")
        for field, answer in (("chosen", "chosen "), ("rejected", "rejected "), ("example", "")):
            check_examples([getattr(e, field) for e in given if hasattr(e, field)], answer + what)
    c, args = DPOConfig(**options), with_learning_rate(args or TrainingArguments(), policy, share=1 / 10)
    if c.loss_type == "kto":
        return kto_trainer(policy, pairs, eval_pairs, args, c)
    if any(isinstance(example, UnpairedExample) for given in (pairs, eval_pairs or ()) for example in given):
        raise ValueError(f"loss_type={c.loss_type!r} compares the two answers of a pair; unpaired ones are for 'kto'")
    names = OPTIONS_OF_LOSS[c.loss_type]
    own = {name: getattr(c, name) for name in names if name != "reference_batch_size"}
    objective = partial(dpo_objective, loss_type=c.loss_type, **own)
    if "reference_batch_size" not in names:
        return Trainer(policy, pairs, eval_pairs, args, collate=collate_pairs, loss=objective)
    with in_precision(args.precision):  # in which the policy will be computed
        train = with_reference(policy, pairs, c.reference_batch_size)
        held_out = None if eval_pairs is None else with_reference(policy, eval_pairs, c.reference_batch_size)
    return Trainer(policy, train, held_out, args, collate=collate_referenced, loss=objective)
