"""Generation, the limits on sampling, and the classifier against transformers, on the same random weights."""

import numpy as np
import pytest
from models import build, dialects, double
from twins import torch, transformers, twin_of

from minipeft.nn.generation import token_probabilities
from minipeft.nn.heads import SequenceClassifier

EOS, PAD = 2, 0


def ours(dialect):
    return build(dialect, vocab_size=60, max_position_embeddings=64, eos_token_id=EOS, pad_token_id=PAD)


@dialects
def test_greedy_generation_with_left_padding_and_eos(dialect, rng):
    model = ours(dialect)
    twin = twin_of(model)
    lengths, T, rows = [7, 3, 1, 5] * 4, 7, 16
    mask = np.array([[0] * (T - n) + [1] * n for n in lengths])
    ids = np.where(mask, rng.integers(3, 60, (rows, T)), PAD)
    free = model.generate(ids, mask, max_new_tokens=20, eos_token_id=())
    eos = int(np.bincount(free[:, T:].ravel()).argmax())  # a token that occurs, so that rows end at different steps
    expected = twin.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=PAD,
    ).numpy()
    found = model.generate(ids, mask, max_new_tokens=20, eos_token_id=eos, pad_token_id=PAD)
    assert np.array_equal(found, expected)
    ends = {int(np.argmax(row == eos)) for row in found[:, T:] if eos in row}
    assert len(ends) > 2


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 5, 60])
@pytest.mark.parametrize("top_p", [None, 0.2, 0.9, 0.999])
def test_sampling_distribution(temperature, top_k, top_p, rng):
    logits = rng.standard_normal((50, 60)) * 3
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p else []
    scores = transformers.LogitsProcessorList(warpers)(None, torch.tensor(logits))
    np.testing.assert_allclose(
        token_probabilities(logits, temperature, top_k, top_p), scores.softmax(dim=-1).numpy(), atol=1e-12
    )


@pytest.mark.parametrize("num_labels", [1, 3])
@dialects
def test_classifier_logits_loss_and_gradients(dialect, num_labels, rng):
    model = double(SequenceClassifier(ours(dialect), num_labels, seed=6))
    twin = twin_of(model, task="SequenceClassification", num_labels=num_labels)
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])
    ids = np.where(mask, rng.integers(3, 60, (3, 7)), PAD)  # no real token is PAD: transformers looks for the id
    labels = rng.standard_normal(3) if num_labels == 1 else np.array([2, 0, 1])
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)  # transformers counts them only in generate
    output = twin(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        position_ids=torch.tensor(positions),
        labels=torch.tensor(labels),
    )
    output.loss.backward()
    loss = model.loss(ids, labels, mask)
    loss.backward()
    tolerance = 1e-9
    np.testing.assert_allclose(model(ids, mask).data, output.logits.detach().numpy(), rtol=tolerance, atol=tolerance)
    assert loss.item() == pytest.approx(output.loss.item(), rel=tolerance)
    gradients = {name: p.grad.numpy() for name, p in twin.named_parameters()}
    for path, p in model.named_parameters():
        np.testing.assert_allclose(p.grad, gradients[path], rtol=tolerance, atol=tolerance, err_msg=path)
