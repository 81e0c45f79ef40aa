"""A grown vocabulary is the same in transformers: ids, files, and where the new rows lie."""

from __future__ import annotations

import numpy as np
import pytest

import minipeft as mp

torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'oracles'")

TEXTS = ["It is <think> a truth </think> universally", "<think>", "a</think>b<sep>c", " <think>  <sep> "]


def test_added_tokens_have_the_same_ids(tmp_path):
    model, tokenizer = mp.load_base()
    tokenizer.save(tmp_path / "before")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "before")
    for added, special in ((["<think>", "</think>"], False), (["<sep>"], True)):
        assert tokenizer.add_tokens(added, special_tokens=special) == theirs.add_tokens(added, special_tokens=special)
    assert tokenizer.add_special_tokens({"pad_token": "<pad>"}) == theirs.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.vocab_size == len(theirs) and tokenizer.pad_token_id == theirs.pad_token_id
    tokenizer.save(tmp_path / "after")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "after")
    for text in TEXTS:
        ids = tokenizer.encode(text, allow_special=True)
        assert ids == theirs(text, add_special_tokens=False).input_ids == loaded(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    model.resize_token_embeddings(tokenizer.vocab_size)
    mp.save_pretrained(model, tmp_path / "model", tokenizer)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = np.array([tokenizer.encode(TEXTS[0])])
    with torch.no_grad():
        np.testing.assert_allclose(model(ids).data, twin(torch.tensor(ids)).logits, atol=2e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_lie_where_transformers_draws_them(tied, tmp_path):
    shape = dict(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16)
    ours = mp.Transformer(mp.TransformerConfig.llama(**shape, tie_word_embeddings=tied, initializer_range=0.3), seed=1)
    mp.save_pretrained(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours.resize_token_embeddings(4300)
    torch.manual_seed(0)
    theirs.resize_token_embeddings(4300)
    assert theirs.config.vocab_size == ours.config.vocab_size
    assert (theirs.lm_head.weight is theirs.get_input_embeddings().weight) is tied
    for mine, other in (
        (ours.backbone.embedding, theirs.get_input_embeddings()), (ours.lm_head, theirs.get_output_embeddings())
    ):  # fmt: skip
        new, want = mine.weight.data[300:], other.weight.detach().numpy()[300:]
        np.testing.assert_allclose(new.mean(0), want.mean(0), atol=2e-6)
        np.testing.assert_allclose(np.cov(new.T), np.cov(want.T), atol=1.5e-11)
