"""A saved reward model is the same reward model in transformers; GRPO's and RLOO's gradients are autograd's."""

from __future__ import annotations

import numpy as np
import pytest

import minipeft as mp
from minipeft import rlhf

torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'oracles'")


@pytest.mark.parametrize(
    "model_type, name", [("llama", "LlamaForSequenceClassification"), ("gpt2", "GPT2ForSequenceClassification")]
)
def test_a_reward_model_loads_in_transformers(model_type, name, tmp_path, rng):
    config = mp.TransformerConfig(
        model_type=model_type, vocab_size=40, hidden_size=16, num_hidden_layers=2, max_position_embeddings=32,
        initializer_range=0.2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    ours = rlhf.RewardModel(mp.Transformer(config, seed=1), seed=2)
    texts = [rng.integers(2, 40, n) for n in (3, 7, 5)]
    ours.calibrate(texts)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == name and theirs.config.num_labels == 1
    with torch.no_grad():
        raw = np.array([theirs(torch.tensor(text[None])).logits.item() for text in texts])
    np.testing.assert_allclose(ours.score_texts(texts), (raw - ours.mean) / ours.std, atol=1e-5)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_loss_and_gradient_are_autograds(method, rng):
    mask = np.arange(6) < np.array([6, 1, 4, 5])[:, None]
    old, change, ref = (np.where(mask, rng.standard_normal((4, 6)) * s - m, 0) for s, m in ((1, 1), (0.3, 0), (1, 1)))
    a = rng.standard_normal(4)
    ours, new = mp.Tensor(old + change, requires_grad=True), torch.tensor(old + change, requires_grad=True)
    t_old, t_ref, t_a, t_mask = map(torch.tensor, (old, ref, a, mask))
    if method == "grpo":
        loss, ratio = rlhf.grpo_loss(ours, old, ref, a, mask, 0.2, 0.04), (new - t_old).exp()
        surrogate = torch.min(t_a[:, None] * ratio, t_a[:, None] * ratio.clamp(0.8, 1.2))
        kl = (t_ref - new).exp() - (t_ref - new) - 1
        want = -(((surrogate - 0.04 * kl) * t_mask).sum(1) / t_mask.sum(1)).mean()
    else:
        loss, ratio = rlhf.rloo_loss(ours, old, a, mask, 0.2), ((new - t_old) * t_mask).sum(1).exp()
        want = torch.max(-t_a * ratio, -t_a * ratio.clamp(0.8, 1.2)).mean()
    loss.backward()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    np.testing.assert_allclose(ours.grad, new.grad, atol=1e-14)
