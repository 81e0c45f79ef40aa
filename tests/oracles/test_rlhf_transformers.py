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


@pytest.fixture
def numbers(rng):
    mask = np.arange(6) < np.array([6, 1, 4, 5])[:, None]
    draw = lambda scale: np.where(mask, rng.standard_normal((4, 6)) * scale, 0)  # noqa: E731
    return {"mask": mask, "old": draw(1) - 1, "change": draw(0.3), "ref": draw(1) - 1, "a": rng.standard_normal(4)}


def test_grpo_is_autograds(numbers):
    n = numbers
    ours = mp.Tensor(n["old"] + n["change"], requires_grad=True)
    loss = rlhf.grpo_loss(ours, n["old"], n["ref"], n["a"], n["mask"], 0.2, 0.04)
    loss.backward()
    new = torch.tensor(n["old"] + n["change"], requires_grad=True)
    old, ref, a, mask = (torch.tensor(n[k]) for k in ("old", "ref", "a", "mask"))
    ratio = (new - old).exp()
    surrogate = torch.min(a[:, None] * ratio, a[:, None] * ratio.clamp(0.8, 1.2))
    kl = (ref - new).exp() - (ref - new) - 1
    want = -(((surrogate - 0.04 * kl) * mask).sum(1) / mask.sum(1)).mean()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    np.testing.assert_allclose(ours.grad, new.grad, atol=1e-14)


def test_rloo_is_autograds(numbers):
    n = numbers
    ours = mp.Tensor(n["old"] + n["change"], requires_grad=True)
    loss = rlhf.rloo_loss(ours, n["old"], n["a"], n["mask"], 0.2)
    loss.backward()
    new = torch.tensor(n["old"] + n["change"], requires_grad=True)
    old, a, mask = (torch.tensor(n[k]) for k in ("old", "a", "mask"))
    ratio = ((new - old) * mask).sum(1).exp()
    want = torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.2)).mean()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    np.testing.assert_allclose(ours.grad, new.grad, atol=1e-14)
    assert torch.allclose(
        torch.nn.functional.logsigmoid(a), torch.tensor(mp.functional.logsigmoid(mp.Tensor(n["a"])).numpy())
    )
