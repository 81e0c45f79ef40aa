"""Logits, the loss and every parameter's gradient against transformers, on the same random weights.

In float64 to a few roundings. transformers computes the loss in float32 whatever the model's dtype, so there it is
PyTorch's of the twin's logits.
"""

import numpy as np
import pytest
from twins import torch, twin_of

from minipeft.nn.transformer import Transformer, TransformerConfig

# largest difference over largest value, of logits and of each gradient, in units of rounding. Measured against float64,
# the worst gradient here is off by 75 units in our float32 and by 134 in transformers'.
TOLERANCE = {"float64": 256 * 2.0**-52, "float32": 256 * 2.0**-23}

LLAMA = dict(model_type="llama", vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
GPT2 = dict(model_type="gpt2", vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "gpt2": GPT2,
    "gpt2 untied": GPT2 | dict(tie_word_embeddings=False),
    "gpt2 one head": GPT2 | dict(num_attention_heads=1, hidden_size=7),
    "gpt2 odd sizes": GPT2
    | dict(vocab_size=31, hidden_size=15, num_attention_heads=3, intermediate_size=13, layer_norm_epsilon=1e-3),
    "gpt2 deep": GPT2 | dict(num_hidden_layers=4, num_attention_heads=2),
    "llama": LLAMA,
    "llama untied": LLAMA | dict(tie_word_embeddings=False),
    "llama grouped": LLAMA | dict(num_key_value_heads=2, rms_norm_eps=1e-3),
    "llama one key head": LLAMA | dict(num_key_value_heads=1),
    "llama biases": LLAMA | dict(attention_bias=True, mlp_bias=True, num_key_value_heads=2),
    "llama head_dim": LLAMA | dict(head_dim=10, num_key_value_heads=2),
    "llama odd sizes": LLAMA
    | dict(vocab_size=31, hidden_size=21, num_attention_heads=3, head_dim=2, intermediate_size=13),
    "llama theta": LLAMA | dict(rope_theta=500.0, num_key_value_heads=2),
    "llama deep": LLAMA | dict(num_hidden_layers=4, num_attention_heads=2, tie_word_embeddings=False),
}


def pair(case, dtype):
    """(our model, transformers' with the same weights): every weight random, the norms' and the biases' too."""
    model = Transformer(TransformerConfig(max_position_embeddings=140, **CONFIGS[case]), seed=None)
    generator = np.random.default_rng(1)
    for name, p in model.named_parameters():
        values = generator.standard_normal(p.shape) * 0.3 + (p.ndim == 1 and name.endswith("weight"))
        p.data = values.astype("float32").astype(dtype)
    return model, twin_of(model, dtype)


def close(found, expected, dtype, what):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape and found.dtype == expected.dtype == dtype, what
    difference = np.abs(found - expected).max(initial=0) / (np.abs(expected).max(initial=0) or 1)
    assert difference <= TOLERANCE[dtype], f"{what}: largest difference {difference:.2g} of the largest value"


def twin_loss(logits, labels):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(labels)[:, 1:].flatten())


def compare(case, dtype, ids, labels, ours, theirs, real=None):
    """Logits at the `real` positions, the loss and all gradients, called with each side's own arguments."""
    model, twin = pair(case, dtype)
    real = np.ones(ids.shape, bool) if real is None else real
    out = twin(torch.tensor(ids), labels=torch.tensor(labels), **{k: torch.tensor(v) for k, v in theirs.items()})
    close(model(ids, **ours).data[real], out.logits[torch.tensor(real)], dtype, "logits")
    loss, expected = model.loss(ids, labels, **ours), out.loss if dtype == "float32" else twin_loss(out.logits, labels)
    close(loss.data, expected, dtype, "loss")
    loss.backward()
    expected.backward()
    named = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        close(parameter.grad, named[name].grad, dtype, f"gradient of {name}")


def tokens(*shape, vocabulary=31, seed=3):
    return np.random.default_rng(seed).integers(0, vocabulary, shape)


def ignoring(labels):
    labels = labels.copy()
    labels[:, ::4] = -100
    return labels


both = pytest.mark.parametrize("dtype", ["float64", "float32"])
every_case = pytest.mark.parametrize("case", CONFIGS)
dialects = pytest.mark.parametrize("case", ["gpt2", "llama grouped"])


@every_case
@both
def test_logits_loss_and_gradients(case, dtype):
    ids = tokens(3, 9)
    compare(case, dtype, ids, ignoring(ids), {}, {})


@dialects
@both
# of two tokens only the first predicts, which sees itself alone: its query's gradient is zero, and rounding here and there
@pytest.mark.parametrize("shape", [(1, 3), (1, 9), (2, 64), (2, 65), (2, 130)])
def test_lengths_around_the_blocks_of_attention(case, dtype, shape):
    ids = tokens(*shape)
    compare(case, dtype, ids, ids, {}, {})


@dialects
@both
@pytest.mark.parametrize("shape", [(3, 1), (1, 2)])
def test_one_and_two_tokens(case, dtype, shape):
    model, twin = pair(case, dtype)
    ids = tokens(*shape)
    close(model(ids).data, twin(torch.tensor(ids)).logits, dtype, "logits")


lengths, place = np.array([[9], [5], [1], [7]]), np.arange(130)
MASKS = {
    "left": place[:9] >= 9 - lengths,
    "right": place[:9] < lengths,
    "in the middle, across blocks": (place < [[20], [0]]) | (place >= [[90], [70]]),
}
PADDED = [(case, side) for case in CONFIGS for side in ("left", "right")]
PADDED += [(case, "in the middle, across blocks") for case in ("gpt2", "llama grouped")]


@pytest.mark.parametrize(("case", "padding"), PADDED)
@both
def test_padding(case, dtype, padding):
    """transformers' generate counts positions like this; its forward needs them as an argument."""
    mask = MASKS[padding].astype(np.int64)
    ids = np.where(mask, tokens(*mask.shape), 0)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    # where no real position comes before, the loss would depend on what each side makes of a row that sees nothing
    labels = np.where(mask & np.roll(mask, 1, axis=1), ids, -100)
    ours = dict(attention_mask=mask)
    compare(case, dtype, ids, labels, ours, dict(attention_mask=mask, position_ids=positions), mask.astype(bool))


@dialects
@both
def test_position_ids(case, dtype):
    ids, positions = tokens(2, 9), np.array([[3, 4, 5, 9, 10, 11, 40, 41, 139], [0, 0, 0, 1, 1, 1, 2, 2, 2]])
    compare(case, dtype, ids, ids, dict(position_ids=positions), dict(position_ids=positions))


@dialects
@both
def test_packing(case, dtype):
    """Three texts in one row, each seeing itself alone: a block-diagonal mask, positions from zero in each."""
    segments = np.repeat([[0, 1, 2], [0, 1, 2]], [5, 70, 15], axis=1)
    segments[1] = np.repeat([0, 1, 2], [40, 1, 49])
    B, T = segments.shape
    same = segments[:, None, :, None] == segments[:, None, None, :]  # [B, 1, T, T]
    positions = np.array([[t - list(row).index(s) for t, s in enumerate(row)] for row in segments])
    ids = tokens(B, T)
    labels = np.where(positions == 0, -100, ids)
    allowed = same & np.tril(np.ones((T, T), bool))
    additive = np.where(allowed, 0, -np.inf).astype(dtype)
    ours, theirs = dict(attention_mask=same), dict(attention_mask=additive)
    compare(case, dtype, ids, labels, ours | dict(position_ids=positions), theirs | dict(position_ids=positions))
