"""KTO: answers that were liked or not, one by one. No pair is needed, only a yes or a no to each answer.

    L = mean of λ_D [1 - σ(β [Δ(y) - z])] over desirable, λ_U [1 - σ(β [z - Δ(y)])] over undesirable answers
    Δ(y) = log π(y|x) - log π_ref(y|x)          z = max(0, mean of log π(y'|x) - log π_ref(y'|x))

The loss is a person's dissatisfaction by Kahneman and Tversky's account of it: gains and losses count from a reference
point z, and less the farther they are from it. z stands for KL(π, π_ref), estimated from mismatched pairs: y' is the
answer to another prompt, here that of the last example before this one whose prompt differs. The policy is not trained
through z. An estimate is a batch's own: batches of one have a noisy one.

Source: Ethayarajh et al. 2024, arXiv:2402.01306; departures from TRL's KTOTrainer: preference_losses.py. Recorded, by
TRL's names: logps/chosen, logps/rejected, rewards/chosen, rewards/rejected of desirable and of undesirable answers (see
dpo.py); kl: z is its mean, or 0 where that is negative; and, not TRL's, rewards/accuracies: the share of answers that
are on their side of z.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from ..autograd.tensor import Tensor, no_grad
from ..backend import Array, Rng, xp_of
from ..nn.module import Module
from ..text.examples import Example, PreferencePair, UnpairedExample
from ..train.batches import IGNORE, Batch, collate
from ..train.evaluation import Statistics, example_losses
from ..train.parallel import in_precision
from ..train.trainer import Trainer, TrainingArguments
from .config import DPOConfig
from .logprobs import prompt_length, sequence_logprobs
from .preference_losses import kto_loss


class ReferencedAnswer(NamedTuple):
    """An answer, the mismatched one to the same prompt, and log-probabilities of both by the reference policy."""

    example: Example
    mismatched: Example
    desirable: bool
    ref: float
    ref_mismatched: float


def unpaired(examples: Sequence[PreferencePair] | Sequence[UnpairedExample]) -> list[UnpairedExample]:
    """The answers one by one: of pairs, the chosen ones as desirable, and then the rejected ones as undesirable.

    Raises ValueError where some are pairs and some are not.
    """
    single = [isinstance(example, UnpairedExample) for example in examples]
    if all(single):
        return list(examples)
    if any(single):
        found = f"{sum(single)} of {len(single)} examples are single answers and the others pairs"
        raise ValueError(f"{found}: give one kind")
    chosen, rejected = zip(*examples)
    return [UnpairedExample(e, True) for e in chosen] + [UnpairedExample(e, False) for e in rejected]


def mismatch(examples: Sequence[Example], limit: int) -> list[Example]:
    """Each prompt with the completion, and its labels, of the last example before it of another prompt, cut to `limit` tokens.

    Before the first example stands the last one. Where all have one prompt, it is the completion of the example before.
    Raises ValueError for a single example.
    """
    if len(examples) < 2:
        raise ValueError("KTO estimates the KL from prompts with other prompts' answers: it takes at least 2 examples")
    starts = [int(np.argmax(labels != IGNORE)) for _, labels in examples]
    prompts = [tuple(example.input_ids[:start].tolist()) for example, start in zip(examples, starts)]
    mismatched, other = [], next((j for j in range(-1, -len(examples), -1) if prompts[j] != prompts[0]), -1)
    for i, start in enumerate(starts):
        other = i - 1 if i and prompts[i - 1] != prompts[i] else other  # the last one of another prompt
        j = other if prompts[other] != prompts[i] else i - 1  # all of one prompt
        prompt, answer = (a[:start] for a in examples[i]), (a[starts[j] :] for a in examples[j])  # of ids, and of labels
        mismatched.append(Example(*(np.concatenate(parts)[:limit] for parts in zip(prompt, answer))))
    return mismatched


def with_reference(model: Module, examples: Sequence[UnpairedExample], batch_size: int) -> list[ReferencedAnswer]:
    """The examples, mismatched ones, and the log-probabilities that `model`, as it is now, gives to both."""
    own = [e.example for e in examples]
    others = mismatch(own, model.config.max_position_embeddings)
    refs, other_refs = (-example_losses(model, texts, 2 * batch_size)[0] for texts in (own, others))
    return [
        ReferencedAnswer(e.example, o, e.label, float(r), float(s))
        for e, o, r, s in zip(examples, others, refs, other_refs)
    ]


def collate_answers(answers: Sequence[ReferencedAnswer]) -> Batch:
    """Answers as one batch for `kto_objective`."""
    own, other = collate([a.example for a in answers]), collate([a.mismatched for a in answers])
    given, kl = (batch.arguments | {"first": prompt_length(batch.arguments["labels"])} for batch in (own, other))
    arguments = given | {f"kl_{name}": value for name, value in kl.items()}
    arguments["desirable"] = np.array([a.desirable for a in answers], bool)
    arguments["ref"] = np.array([a.ref for a in answers], np.float32)
    arguments["kl_ref"] = np.array([a.ref_mismatched for a in answers], np.float32)
    return Batch(arguments, len(answers), own.tokens + other.tokens)


def kto_objective(
    model: Module, input_ids: Array, labels: Array, attention_mask: Array | None, kl_input_ids: Array, kl_labels: Array,
    kl_attention_mask: Array | None, desirable: Array, ref: Array, kl_ref: Array, beta: float = 0.1,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0, first: int | None = None, kl_first: int | None = None,
    rng: Rng | None = None,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """`kto_loss` of a batch of n answers and its statistics: for the Trainer.

    input_ids, labels, attention_mask [n, T]; the same with kl_ [n, T'], of mismatched answers; desirable, ref, kl_ref
    [n]; first and kl_first of either as in `sequence_logprobs`. `rng` is not used: dropout would act on the policy and
    not on the reference.
    """
    xp = xp_of(input_ids)
    with no_grad():
        kl = sequence_logprobs(model, kl_input_ids, kl_labels, kl_attention_mask, kl_first).data - kl_ref  # [n]
    z = xp.maximum(kl.mean(), 0)
    policy = sequence_logprobs(model, input_ids, labels, attention_mask, first)  # [n]
    loss = kto_loss(policy, ref, desirable, z, beta, desirable_weight, undesirable_weight)
    gain = policy.data - ref
    above = xp.where(desirable, gain - z, z - gain)  # how far on its own side of z
    statistics = {"kl": kl, "rewards/accuracies": (above > 0) + 0.5 * (above == 0)}
    for name, side in (("chosen", desirable), ("rejected", ~desirable)):
        statistics[f"logps/{name}"] = xp.where(side, policy.data, np.nan)
        statistics[f"rewards/{name}"] = xp.where(side, beta * gain, np.nan)
    return loss, statistics


def kto_trainer(
    policy: Module, examples: Sequence[PreferencePair] | Sequence[UnpairedExample],
    eval_examples: Sequence[PreferencePair] | Sequence[UnpairedExample] | None, args: TrainingArguments,
    config: DPOConfig,
) -> Trainer:  # fmt: skip
    """What `dpo_trainer(..., loss_type="kto")` returns; options and errors are described there."""
    with in_precision(args.precision):
        referenced = [
            None if given is None else with_reference(policy, unpaired(given), config.reference_batch_size)
            for given in (examples, eval_examples)
        ]
    names = ("beta", "desirable_weight", "undesirable_weight")
    objective = partial(kto_objective, **{name: getattr(config, name) for name in names})
    return Trainer(policy, *referenced, args, collate=collate_answers, loss=objective)
