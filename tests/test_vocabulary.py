"""A vocabulary grows: new tokens, and rows of the embedding for them."""

from __future__ import annotations

import numpy as np
import pytest

import minipeft as mp
from minipeft.backend import to_numpy

TEXT = "It is <think> a truth </think> universally acknowledged."


@pytest.fixture
def tokenizer():
    return mp.load_base()[1]


def model(tied=True, family="llama", xp=np, **fields):
    make = getattr(mp.TransformerConfig, family)
    shape = dict(vocab_size=30, hidden_size=16, num_hidden_layers=1, tie_word_embeddings=tied, initializer_range=0.3)
    return mp.Transformer(make(**shape | fields), seed=1).to(xp)


def test_added_tokens_are_one_token_each_and_survive_a_directory(tokenizer, tmp_path):
    size, before = tokenizer.vocab_size, tokenizer.encode(TEXT)
    assert tokenizer.add_tokens(["<think>", "</think>", "<think>"]) == 2 and tokenizer.vocab_size == size + 2
    ids = tokenizer.encode(TEXT)
    assert len(ids) < len(before) and {size, size + 1} <= set(ids) and tokenizer.decode(ids) == TEXT
    assert tokenizer.add_tokens(["<think>"]) == 0
    tokenizer.save(tmp_path)
    assert mp.text.tokenizer.Tokenizer.load(tmp_path).encode(TEXT) == ids
    for wrong, error in ((["a", 3], TypeError), ("abc", TypeError), ([""], ValueError)):
        with pytest.raises(error, match="add"):
            tokenizer.add_tokens(wrong)


def test_special_tokens_stay_apart_from_text(tokenizer, tmp_path):
    size = tokenizer.vocab_size
    assert max(tokenizer.encode("a<sep>b", allow_special=True)) < size
    assert tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<sep>"]}) == 2
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", size)
    assert size + 1 not in tokenizer.encode("a<sep>b") and size + 1 in tokenizer.encode("a<sep>b", allow_special=True)
    assert tokenizer.decode([size + 1, *tokenizer.encode("ab")], skip_special_tokens=True) == "ab"
    tokenizer.save(tmp_path)
    again = mp.text.tokenizer.Tokenizer.load(tmp_path)
    assert (again.pad_token_id, again.vocab_size) == (size, size + 2)
    with pytest.raises(ValueError, match="not 'mask_token'"):
        tokenizer.add_special_tokens({"mask_token": "<mask>"})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_grows_and_keeps_what_it_computes(tied, family, xp):
    ours = model(tied, family, xp)
    shared = ours.copy(share=True)
    ids = xp.asarray(np.array([[3, 4, 29]]))
    before, old = to_numpy(ours(ids).data), to_numpy(ours.backbone.embedding.weight.data).copy()
    assert ours.resize_token_embeddings(33) is ours.backbone.embedding
    assert ours.config.vocab_size == ours.backbone.config.vocab_size == 33 == ours.lm_head.out_features
    assert (ours.lm_head.weight is ours.backbone.embedding.weight) is tied
    after = to_numpy(ours(ids).data)
    np.testing.assert_allclose(after[..., :30], before, atol=1e-6)
    np.testing.assert_allclose(after[..., 30:], before.mean(-1, keepdims=True).repeat(3, -1), atol=2e-3)
    rows = to_numpy(ours.backbone.embedding.weight.data)
    assert np.array_equal(rows[:30], old) and len({row.tobytes() for row in rows[30:]}) == 3
    np.testing.assert_array_equal(to_numpy(shared.backbone.embedding.weight.data), old)
    other, same = model(tied, family, xp), model(tied, family, xp)
    other.resize_token_embeddings(33, seed=1)
    same.resize_token_embeddings(33)
    assert np.array_equal(to_numpy(same.backbone.embedding.weight.data), rows)
    assert not np.array_equal(to_numpy(other.backbone.embedding.weight.data), rows)


def test_new_rows_have_the_mean_and_the_covariance_of_transformers():
    ours = model(vocab_size=200, hidden_size=4, num_attention_heads=2)
    W = ours.backbone.embedding.weight.data.astype(np.float64)
    ours.backbone.embedding.weight.data = W
    ours.resize_token_embeddings(20_200)
    new = ours.backbone.embedding.weight.data[200:]
    np.testing.assert_allclose(new.mean(0), W.mean(0), atol=1e-6)
    np.testing.assert_allclose(np.cov(new.T), 1e-9 * np.cov(W.T, bias=True), atol=6e-12)


def test_a_model_shrinks_saves_and_trains(tmp_path):
    ours = model()
    ours.resize_token_embeddings(40)
    ids = np.array([[3, 39, 4, 38]])
    args = mp.TrainingArguments(max_steps=60, learning_rate=1e-2, progress=False)
    assert mp.Trainer(ours, [(ids[0], ids[0])], args=args).train().history[-1]["loss"] < 0.5
    mp.save_pretrained(ours, tmp_path)
    again, _ = mp.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(ids).data, ours(ids).data)
    expected = ours(np.array([[3, 4]])).data[..., :10]
    ours.resize_token_embeddings(10)
    np.testing.assert_allclose(ours(np.array([[3, 4]])).data, expected, atol=1e-6)


def test_what_cannot_be_resized():
    with pytest.raises(ValueError, match="at least one token, got 0"):
        model().resize_token_embeddings(0)
    adapted = mp.get_peft_model(model(), mp.LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="before adapters or four bits come in; there is a AdaptedLayer"):
        adapted.resize_token_embeddings(40)
    on_attention = mp.get_peft_model(model(), mp.LoraConfig(r=2))
    on_attention.resize_token_embeddings(40)
    assert on_attention(np.array([[39]])).shape == (1, 1, 40)
    assert not on_attention.base_model.backbone.embedding.weight.requires_grad
