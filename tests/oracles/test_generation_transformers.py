"""Generation, the limits on sampling, and the classifier against transformers, on the same random weights."""

import numpy as np
import pytest

from minipeft.nn.generation import token_probabilities
from minipeft.nn.heads import SequenceClassifier
from minipeft.nn.transformer import Transformer, TransformerConfig

torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'oracles'")

EOS, PAD = 2, 0
SHAPE = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)


def ours(dialect):
    grouped = dict(num_key_value_heads=2, intermediate_size=48) if dialect == "llama" else {}
    return Transformer(TransformerConfig(model_type=dialect, initializer_range=0.3, **SHAPE, **grouped), seed=5)


def theirs(model, task, state, **options):
    """The transformers model of that family and task with these weights, in float64."""
    c = model.config
    common = dict(vocab_size=c.vocab_size, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=1, tie_word_embeddings=True)
    if c.model_type == "gpt2":
        config = transformers.GPT2Config(
            n_embd=c.hidden_size, n_layer=c.num_hidden_layers, n_head=4, n_positions=64, **common, **options
        )
    else:
        names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
        names += ["max_position_embeddings", "rms_norm_eps"]
        config = transformers.LlamaConfig(**{n: getattr(c, n) for n in names}, **common, **options)
    family = "GPT2" if c.model_type == "gpt2" else "Llama"
    twin = getattr(transformers, family + task)(config).double().eval()
    missing, unexpected = twin.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return twin


def double(model):
    for p in model.parameters():
        p.data = p.data.astype("float64")
    return model


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_greedy_generation_with_left_padding_and_eos(dialect, rng):
    model = double(ours(dialect))
    twin = theirs(model, "LMHeadModel" if dialect == "gpt2" else "ForCausalLM", model.state_dict())
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
@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_classifier_logits_loss_and_gradients(dialect, num_labels, rng):
    model = double(SequenceClassifier(ours(dialect), num_labels, seed=6))
    twin = theirs(model, "ForSequenceClassification", model.state_dict(), num_labels=num_labels)
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
    # transformers' RMSNorm and rotary angles are float32 even in a float64 model
    tolerance = {"gpt2": 1e-9, "llama": 1e-5}[dialect]
    np.testing.assert_allclose(model(ids, mask).data, output.logits.detach().numpy(), rtol=tolerance, atol=tolerance)
    assert loss.item() == pytest.approx(output.loss.item(), rel=tolerance)
    gradients = {name: p.grad.numpy() for name, p in twin.named_parameters()}
    for path, p in model.named_parameters():
        np.testing.assert_allclose(p.grad, gradients[path], rtol=tolerance, atol=tolerance, err_msg=path)
