"""Attentions, activations and their gradients against transformers, whose attention is the eager one then."""

import numpy as np
import pytest
from models import build, dialects, tokens
from twins import torch, twin_of

# transformers takes Llama's softmax in float32, whatever the model's dtype
TOLERANCE = {"gpt2": 1e-11, "llama": 2e-6}


def close(found, expected, dialect):
    expected = expected.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dialect] * np.abs(expected).max())


@dialects
@pytest.mark.parametrize("padded", [False, True])
def test_attentions_and_their_gradients(dialect, padded, rng):
    model, ids, attentions = build(dialect), tokens(rng, 2, 6), []
    twin = twin_of(model)
    twin.set_attn_implementation("eager")
    mask = np.ones((2, 6), int)
    mask[1, 4:] = 1 - padded  # on the right, where every row still reads something
    places = np.arange(6)[None]  # transformers would count the padding
    given = {"attention_mask": torch.tensor(mask), "position_ids": torch.tensor(places)}
    out = twin(torch.tensor(ids), **given, output_attentions=True)
    for A in out.attentions:
        A.retain_grad()
    logits, found = model(ids, mask, places, output_attentions=True)
    close(logits.data, out.logits, dialect)
    assert len(found) == len(out.attentions)
    for P, A in zip(found, out.attentions):
        close(P.data, A, dialect)
    model.loss(ids, ids, attention_mask=mask, position_ids=places, attentions=attentions).backward()
    torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), torch.tensor(ids[:, 1:]).flatten()).backward()
    for P, A in zip(attentions, out.attentions):
        close(np.where(P.data == 0, 0, P.grad), torch.where(A == 0, 0.0, A.grad), dialect)


@dialects
def test_activations_and_their_gradients(dialect, rng):
    model, ids = build(dialect), tokens(rng, 2, 6)
    twin, kept = twin_of(model), {}
    for path, module in twin.named_modules():
        if path.endswith(".mlp"):
            module.register_forward_hook(
                lambda module, inputs, output, path=path: (output.retain_grad(), kept.update({path: output}))[0]
            )
    logits = twin(torch.tensor(ids)).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(ids[:, 1:]).flatten()).backward()
    with model.watch("*.mlp") as seen:
        model.loss(ids, ids).backward()
    assert seen.keys() == kept.keys() and len(seen) == 2
    for path, x in kept.items():
        close(seen[path].data, x, "gpt2")
        close(seen[path].grad, x.grad, "gpt2")
