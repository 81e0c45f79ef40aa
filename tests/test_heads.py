"""Heads: where they read, what they learn, and what building them leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from models import build, dialects, sgd_steps, tokens, traced

import minipeft as mp
from minipeft.autograd.gradcheck import check_parameters
from minipeft.backend import to_numpy
from minipeft.nn.heads import SequenceClassifier, ValueModel, head_only
from minipeft.nn.transformer import Transformer, TransformerConfig


def frozen_bytes(model):
    return {path: to_numpy(p.data).tobytes() for path, p in model.named_parameters()}


# --------------------------------------------------------------------------------------------------- classification


@dialects
def test_logits_are_read_at_the_last_real_token_on_either_side_of_padding(dialect, xp, rng):
    classifier = SequenceClassifier(build(dialect, xp), num_labels=3, seed=2)
    ids = tokens(rng, 1, 5)
    ids[0, -1] = 0  # the padding id itself: a real token all the same
    alone = to_numpy(classifier(xp.asarray(ids)).data)
    hidden = to_numpy(classifier.backbone(xp.asarray(ids)).data)
    np.testing.assert_allclose(alone, hidden[:, -1] @ to_numpy(classifier.score.weight.data).T, atol=1e-12)
    padded, mask = np.zeros((3, 9), np.int64), np.zeros((3, 9), np.int64)
    for row, left in enumerate((0, 2, 4)):
        padded[row, left : left + 5], mask[row, left : left + 5] = ids[0], 1
    logits = to_numpy(classifier(xp.asarray(padded), xp.asarray(mask)).data)
    np.testing.assert_allclose(logits, np.repeat(alone, 3, axis=0), atol=1e-12)


@dialects
def test_the_last_token_is_found_behind_a_prefix_too(dialect, xp, rng):
    classifier, cache = SequenceClassifier(build(dialect, xp), num_labels=3), mp.KVCache()
    ids, mask = tokens(rng, 2, 7), np.array([[1] * 7, [1] * 5 + [0] * 2])
    classifier.backbone(xp.asarray(ids[:, :3]), past_key_values=cache)
    behind = classifier(xp.asarray(ids[:, 3:]), xp.asarray(mask), past_key_values=list(cache))
    whole = classifier(xp.asarray(ids), xp.asarray(mask))
    np.testing.assert_allclose(to_numpy(behind.data), to_numpy(whole.data), atol=1e-12)


@pytest.mark.parametrize("num_labels", [1, 3])
@dialects
def test_loss_and_its_gradients(dialect, num_labels, xp, rng):
    classifier = SequenceClassifier(build(dialect, xp, num_hidden_layers=1), num_labels=num_labels, seed=2)
    ids, mask = tokens(rng, 4, 6), np.array([[1] * 6, [1] * 4 + [0] * 2, [0] * 3 + [1] * 3, [1] + [0] * 5])
    labels = np.array([0.3, -1.0, 2.0, 0.0]) if num_labels == 1 else np.array([0, 2, 1, 2])
    ids, mask, targets = xp.asarray(ids), xp.asarray(mask), xp.asarray(labels)
    logits = to_numpy(classifier(ids, mask).data)
    loss = classifier.loss(ids, targets, mask)
    if num_labels == 1:
        assert loss.item() == pytest.approx(((logits[:, 0] - labels) ** 2).mean(), rel=1e-12)
    else:
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert loss.item() == pytest.approx(-log_p[np.arange(4), labels].mean(), rel=1e-12)
    checked = check_parameters(lambda: classifier.loss(ids, targets, mask), dict(classifier.named_parameters()))
    assert [error for *_, error in checked if error] == []


@dialects
def test_module_tree_is_that_of_hugging_face(dialect):
    base = build(dialect)
    names = [path for path, _ in SequenceClassifier(base, 3).named_parameters()]
    root = "model" if dialect == "llama" else "transformer"
    assert names == [f"{root}.{path}" for path in base.backbone.state_dict()] + ["score.weight"]
    assert SequenceClassifier(base, 3).score.weight.shape == (3, 16) and SequenceClassifier(base).num_labels == 2


def test_head_weights_come_from_the_seed_and_the_initial_range():
    base = build("llama", hidden_size=64, initializer_range=0.05)
    first, again, other = (SequenceClassifier(base, 50, seed=s).score.weight.data for s in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert first.std() == pytest.approx(0.05, rel=0.05) and first.dtype == np.float32


@dialects
def test_training_a_classifier_leaves_the_base_as_it_was(dialect, rng):
    base = build(dialect)
    before = frozen_bytes(base)
    classifier = SequenceClassifier(base, 2)
    ids, labels = tokens(rng, 6, 5), np.array([0, 1] * 3)
    start = classifier.loss(ids, labels).item()
    sgd_steps(classifier, lambda: classifier.loss(ids, labels), steps=30, lr=0.05)
    assert classifier.loss(ids, labels).item() < 0.5 * start
    assert frozen_bytes(base) == before and all(p.grad is None for p in base.parameters())


def test_a_frozen_base_is_shared_and_a_trainable_one_copied():
    base = build("llama")

    def shares(model):
        return [np.shares_memory(p.data, q.data) for p, q in zip(model.backbone.parameters(), base.parameters())]

    assert not any(shares(SequenceClassifier(base)))
    frozen = SequenceClassifier(base.copy(share=True).requires_grad_(False))
    assert all(shares(frozen)) and [p for p, q in frozen.named_parameters() if q.requires_grad] == ["score.weight"]
    assert all(p.requires_grad for p in base.parameters())


def test_an_unallocated_classifier_is_counted_and_loaded(rng):
    big = TransformerConfig.llama(vocab_size=32000, hidden_size=4096, num_hidden_layers=32, intermediate_size=11008)
    with traced() as memory:
        counted = sum(p.size for p in SequenceClassifier(Transformer(big, seed=None), 1, seed=None).parameters())
        assert memory()[1] < 8e6
    assert counted == 6_738_415_616 - 32000 * 4096 + 4096  # Llama-2 7B, its head taken off, a score put on
    trained = SequenceClassifier(Transformer(build("gpt2").config, seed=3), 3, seed=4)
    loaded = SequenceClassifier(Transformer(trained.config, seed=None), 3, seed=None)
    loaded.load_state_dict(trained.state_dict())
    ids = tokens(rng, 2, 5)
    assert np.array_equal(loaded(ids).data, trained(ids).data)


def test_surgery_and_copies_work_on_a_classifier(rng):
    classifier, ids = SequenceClassifier(build("llama")), tokens(rng, 2, 5)
    twin = classifier.copy(share=True)
    twin.replace("model.layers.0.mlp.down_proj", mp.nn.Linear(twin.config.intermediate_size, 16, seed=9))
    assert not np.allclose(twin(ids).data, classifier(ids).data)
    assert np.array_equal(classifier.copy()(ids).data, classifier(ids).data)


# ------------------------------------------------------------------------------------------------------------ values


@dialects
def test_values_start_at_zero_for_every_position_and_learn(dialect, xp, rng):
    base = build(dialect, xp)
    before = frozen_bytes(base)
    model, ids = ValueModel(base), xp.asarray(tokens(rng, 3, 6))
    assert model(ids).shape == (3, 6) and not to_numpy(model(ids).data).any()
    assert [path for path, _ in model.named_parameters()][-2:] == ["v_head.weight", "v_head.bias"]
    target = xp.asarray(rng.standard_normal((3, 6)))
    sgd_steps(model, lambda: ((model(ids) - target) ** 2).mean(), steps=40, lr=0.02)
    assert ((model(ids) - target) ** 2).mean().item() < 0.6 * (target**2).mean().item()
    assert frozen_bytes(base) == before


def test_a_value_sees_its_past_alone(rng):
    model, ids = ValueModel(build("llama")), tokens(rng, 1, 6)
    model.v_head.weight.data = rng.standard_normal((1, 16))
    changed = ids.copy()
    changed[0, 4] = (ids[0, 4] + 1) % 40
    before, after = model(ids).data, model(changed).data
    assert np.array_equal(before[:, :4], after[:, :4]) and not np.allclose(before[:, 4:], after[:, 4:])


# --------------------------------------------------------------------------------------------------------- head only


@pytest.mark.parametrize("tied", [True, False])
@dialects
def test_head_only_trains_an_untied_head_and_shares_the_rest(dialect, tied, rng):
    base, ids = build(dialect, tie_word_embeddings=tied), tokens(rng, 2, 6)
    before = frozen_bytes(base)
    model = head_only(base)
    assert np.array_equal(model(ids).data, base(ids).data)
    assert [path for path, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert all(
        np.shares_memory(p.data, q.data) for p, q in zip(model.backbone.parameters(), base.backbone.parameters())
    )
    assert not np.shares_memory(model.lm_head.weight.data, base.lm_head.weight.data)
    start = model.loss(ids, ids).item()
    sgd_steps(model, lambda: model.loss(ids, ids), steps=20)
    assert model.loss(ids, ids).item() < start
    assert frozen_bytes(base) == before and all(p.requires_grad for p in base.parameters())
    assert model.config.tie_word_embeddings is model.backbone.config.tie_word_embeddings is False
    assert base.config.tie_word_embeddings is base.backbone.config.tie_word_embeddings is tied


def test_head_only_holds_no_activations_of_the_frozen_backbone(rng):
    model = head_only(Transformer(build("llama", num_hidden_layers=6).config, seed=0))
    assert model.backbone(tokens(rng, 2, 6))._node is None


@pytest.mark.parametrize(
    "build_head, names",
    [
        (lambda base: SequenceClassifier(base, 2), ["score.weight"]),
        (ValueModel, ["v_head.weight", "v_head.bias"]),
    ],
)
def test_head_only_knows_the_other_heads(build_head, names):
    model = build_head(build("gpt2"))
    trained = head_only(model)
    assert [path for path, p in trained.named_parameters() if p.requires_grad] == names
    for name in names:
        assert not np.shares_memory(trained.state_dict()[name], model.state_dict()[name])


# ------------------------------------------------------------------------------------------------------------ errors


def test_what_does_not_fit_says_why(xp, rng):
    base = build("llama", xp)
    classifier, ids = SequenceClassifier(base, 3), xp.asarray(tokens(rng, 2, 4))
    assert SequenceClassifier(base, np.int64(3)).num_labels == 3
    with pytest.raises(ValueError, match="num_labels must be a positive integer, not 0"):
        SequenceClassifier(base, 0)
    with pytest.raises(ValueError, match="num_labels must be a positive integer, not True"):
        SequenceClassifier(base, True)
    with pytest.raises(TypeError, match="is built on a Transformer, not on a Linear"):
        SequenceClassifier(mp.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="this Linear has none of them"):
        head_only(mp.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="marks no token as real in some row"):
        classifier(ids, xp.asarray([[1, 1, 1, 1], [0, 0, 0, 0]]))
    with pytest.raises(ValueError, match=r"an attention_mask \[batch, seq\], not one of shape \(2, 1, 4, 4\)"):
        classifier(ids, xp.ones((2, 1, 4, 4), bool))
    with pytest.raises(ValueError, match=r"labels must have the shape \(2,\), one per sequence, not \(2, 4\)"):
        classifier.loss(ids, ids)
    with pytest.raises(IndexError, match=r"target 3 is out of range; class ids must lie in 0\.\.2"):
        classifier.loss(to_numpy(ids), np.array([0, 3]))
