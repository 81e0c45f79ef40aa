"""DPO, IPO, KTO, ORPO and SimPO, from token ids to gradients of the weights, against the papers' equations in PyTorch.

The model is transformers' Llama with our weights; its log-probabilities, the losses and their gradients are PyTorch's.
"""

from __future__ import annotations

import numpy as np
import pytest
from twins import twin_of

import minipeft as mp
from minipeft import rlhf
from minipeft.rlhf.dpo import collate_pairs, collate_referenced, dpo_objective, with_reference
from minipeft.rlhf.kto import collate_answers, kto_objective
from minipeft.rlhf.kto import with_reference as with_mismatches
from minipeft.text.examples import Example, PreferencePair, UnpairedExample

torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")
logsigmoid = torch.nn.functional.logsigmoid

BETA, GAMMA = 0.4, 0.7


@pytest.fixture(scope="module")
def models():
    shape = dict(vocab_size=24, hidden_size=16, num_hidden_layers=2, max_position_embeddings=32, initializer_range=0.3)
    policy, reference = (mp.Transformer(mp.TransformerConfig.llama(**shape), seed=s) for s in (1, 2))
    for model in (policy, reference):
        for p in model.parameters():
            p.data = p.data.astype(np.float64)
    return policy, reference


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)

    def example(prompt):
        ids = np.concatenate([prompt, rng.integers(2, 24, rng.integers(1, 6))])
        return Example(ids, np.where(np.arange(len(ids)) < len(prompt), -100, ids))

    prompts = [rng.integers(2, 24, rng.integers(1, 5)) for _ in range(4)]
    return [PreferencePair(example(prompt), example(prompt)) for prompt in prompts]


def logprobs(twin, examples):
    """(log π of each answer, its number of tokens), an example at a time: no padding, no batch."""
    sums, lengths = [], []
    for ids, labels in examples:
        logp = twin(torch.tensor(ids[None])).logits[0, :-1].log_softmax(-1)
        taken = logp.gather(1, torch.tensor(ids[1:, None]))[:, 0][torch.tensor(labels[1:] != -100)]
        sums.append(taken.sum())
        lengths.append(len(taken))
    return torch.stack(sums), torch.tensor(lengths)


def compare(policy, twin, loss, want):
    loss.backward()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=2e-6)  # the reference is kept in float32
    theirs = dict(twin.named_parameters())
    for name, p in policy.named_parameters():
        np.testing.assert_allclose(p.grad, theirs[name].grad, atol=2e-6, err_msg=name)
    policy.zero_grad()


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "orpo", "simpo"])
def test_losses_of_pairs(models, pairs, loss_type):
    policy, reference = models
    twin, frozen = twin_of(policy), twin_of(reference)
    (w, n_w), (l, n_l) = (logprobs(twin, [p[i] for p in pairs]) for i in (0, 1))
    with torch.no_grad():
        ref_w, ref_l = (logprobs(frozen, [p[i] for p in pairs])[0] for i in (0, 1))
    log_odds = lambda logp: logp - torch.log(1 - logp.exp())  # noqa: E731
    want = {
        "sigmoid": lambda: -logsigmoid(BETA * (w - ref_w) - BETA * (l - ref_l)),
        "ipo": lambda: (w - l - (ref_w - ref_l) - 1 / (2 * BETA)) ** 2,
        "orpo": lambda: -w / n_w - BETA * logsigmoid(log_odds(w / n_w) - log_odds(l / n_l)),
        "simpo": lambda: -logsigmoid(BETA / n_w * w - BETA / n_l * l - GAMMA),
    }[loss_type]().mean()
    referenced = loss_type in ("sigmoid", "ipo")
    batch = collate_referenced(with_reference(reference, pairs)) if referenced else collate_pairs(pairs)
    loss, statistics = dpo_objective(policy, **batch.arguments, loss_type=loss_type, beta=BETA, gamma=GAMMA)
    compare(policy, twin, loss, want)
    np.testing.assert_allclose(statistics["logps/chosen"], w.detach(), atol=1e-9)
    np.testing.assert_allclose(statistics["logps/rejected"], l.detach(), atol=1e-9)


def test_trls_ipo_is_ours_of_means(rng):
    """TRL divides the log-ratio of each answer by its tokens: departure 1."""
    w, l, ref_w, ref_l = rng.standard_normal((4, 5))
    n_w, n_l = rng.integers(1, 9, (2, 5))
    theirs = (((w - ref_w) / n_w - (l - ref_l) / n_l - 1 / (2 * BETA)) ** 2).mean()
    ours = rlhf.ipo_loss(mp.Tensor(w / n_w), mp.Tensor(l / n_l), ref_w / n_w, ref_l / n_l, BETA)
    assert ours.item() == pytest.approx(theirs)


def test_kto(models, pairs):
    policy, reference = models
    twin, frozen = twin_of(policy), twin_of(reference)
    examples = [UnpairedExample(p[i], i == 0) for i in (0, 1) for p in pairs][:7]  # four liked, three not
    answers = with_mismatches(reference, examples, 2)
    own, mismatched = [a.example for a in answers], [a.mismatched for a in answers]
    policy_logps = logprobs(twin, own)[0]
    with torch.no_grad():
        ref, kl_policy, kl_ref = (
            logprobs(m, e)[0] for m, e in ((frozen, own), (twin, mismatched), (frozen, mismatched))
        )
        z = (kl_policy - kl_ref).mean().clamp(min=0)
    gain, liked = BETA * (policy_logps - ref - z), torch.tensor([a.desirable for a in answers])
    want = torch.where(liked, 1.5 * (1 - torch.sigmoid(gain)), 0.5 * (1 - torch.sigmoid(-gain))).mean()
    arguments = collate_answers(answers).arguments
    loss, statistics = kto_objective(policy, **arguments, beta=BETA, desirable_weight=1.5, undesirable_weight=0.5)
    compare(policy, twin, loss, want)
    assert statistics["kl"].mean() == pytest.approx((kl_policy - kl_ref).mean().item(), rel=1e-5)
