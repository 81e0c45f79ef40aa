"""Logits, the loss and every parameter's gradient against transformers, on the same random weights.

In float64 to a few roundings. transformers computes the loss and Llama's norms and rotations in float32 whatever the
model's dtype, so there the loss is PyTorch's, the norm PyTorch's RMSNorm, and the angles are float64's. In float32 the
twin and its loss are transformers' own.
"""

import numpy as np
import pytest

from minipeft.hub.configuration import to_hugging_face
from minipeft.nn.transformer import KVCache, Transformer, TransformerConfig

torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'oracles'")

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


class Angles(torch.nn.Module):
    """Llama's cos and sin, [B, T, D], in float64."""

    def __init__(self, config):
        super().__init__()
        half = config.head_dim // 2
        self.frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)

    def forward(self, x, position_ids, *_):
        angle = position_ids[..., None].double() * self.frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()


def in_float64(twin, config):
    twin.double()
    if config.model_type == "llama":
        twin.model.rotary_emb = Angles(config)
        for module in twin.modules():
            for name, child in module.named_children():
                if type(child).__name__ == "LlamaRMSNorm":
                    norm = torch.nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=torch.float64)
                    norm.weight = child.weight
                    setattr(module, name, norm)
    return twin


def pair(case, dtype):
    """(our model, transformers' with the same weights): every weight random, the norms' and the biases' too."""
    config = TransformerConfig(max_position_embeddings=140, **CONFIGS[case])
    theirs = transformers.AutoConfig.for_model(**to_hugging_face(config, "float32"))
    twin = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="sdpa").eval()
    model = Transformer(config, seed=None)
    generator = np.random.default_rng(1)
    named = dict(twin.named_parameters())
    assert named.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        values = generator.standard_normal(parameter.shape) * 0.3 + (parameter.ndim == 1 and name.endswith("weight"))
        parameter.data = values.astype("float32").astype(dtype)
        with torch.no_grad():
            named[name].copy_(torch.tensor(values.astype("float32")))
    return model, in_float64(twin, config) if dtype == "float64" else twin


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


@every_case
@both
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(case, dtype, side):
    """transformers' generate counts positions like this; its forward needs them as an argument."""
    lengths, T = (9, 5, 1, 7), 9
    mask = np.array([[0] * (T - n) + [1] * n if side == "left" else [1] * n + [0] * (T - n) for n in lengths])
    ids = np.where(mask, tokens(4, T), 0)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    labels = np.where(mask, ids, -100)
    # where no earlier position is real the loss would depend on what each side makes of a row that sees nothing
    labels[np.arange(4), mask.argmax(axis=1)] = -100
    ours = dict(attention_mask=mask)
    compare(case, dtype, ids, labels, ours, dict(attention_mask=mask, position_ids=positions), mask.astype(bool))


@dialects
@both
def test_padding_in_the_middle_across_blocks(case, dtype):
    mask = np.ones((2, 130), np.int64)
    mask[0, 20:90], mask[1, :70] = 0, 0
    ids = np.where(mask, tokens(2, 130), 0)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
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
    # and each text gives what it gives alone
    model, _ = pair(case, dtype)
    packed = model(ids, same, positions).data
    alone = model(ids[:1, 5:75]).data
    np.testing.assert_allclose(packed[:1, 5:75], alone, rtol=0, atol=TOLERANCE[dtype] * np.abs(alone).max())


@dialects
@both
def test_checkpointed_gradients(case, dtype):
    ids = tokens(2, 12)
    model, twin = pair(case, dtype)
    model.gradient_checkpointing_enable()
    model.loss(ids, ids).backward()
    twin_loss(twin(torch.tensor(ids)).logits, ids).backward()
    for name, parameter in twin.named_parameters():
        close(dict(model.named_parameters())[name].grad, parameter.grad, dtype, f"gradient of {name}")


@dialects
@both
def test_inputs_embeds(case, dtype):
    model, twin = pair(case, dtype)
    ids = tokens(2, 8)
    embeds = model.backbone.embedding(ids)
    close(model(inputs_embeds=embeds).data, twin(torch.tensor(ids)).logits, dtype, "logits")


@dialects
@both
def test_cache(case, dtype):
    """One position after another, each from the keys and values that were kept, gives the logits of all at once."""
    model, twin = pair(case, dtype)
    ids, cache = tokens(2, 70), KVCache()
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    steps = [
        model(ids[:, i:j], mask[:, :j], past_key_values=cache).data for i, j in ((0, 5), (5, 6), (6, 69), (69, 70))
    ]
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    expected = twin(torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)).logits
    close(np.concatenate(steps, axis=1)[mask != 0], expected[torch.tensor(mask != 0)], dtype, "logits")
