"""Some rows of an embedding are trained, alone or beside LoRA; a tied head follows."""

from __future__ import annotations

import numpy as np
import pytest

import minipeft as mp
from minipeft.backend import asarray, to_numpy, xp_of
from minipeft.peft import PeftError

IDS = np.array([[3, 7, 5, 9, 3, 11]])
TOKENS = [7, 3]
CONFIGS = {
    "alone": mp.TrainableTokensConfig(token_indices=TOKENS),
    "beside LoRA": mp.LoraConfig(r=2, trainable_token_indices=TOKENS),
}


def base(tied=True, family="llama", xp=np):
    make = getattr(mp.TransformerConfig, family)
    shape = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    return mp.Transformer(make(**shape, tie_word_embeddings=tied, initializer_range=0.3), seed=1).to(xp)


def trained(model, config, steps=5):
    adapted = mp.get_peft_model(model, config)
    optimizer = mp.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
    ids = asarray(IDS, xp_of(model.lm_head.weight.data))
    for _ in range(steps):
        adapted.zero_grad()
        adapted.loss(ids, ids).backward()
        optimizer.step()
    return adapted, ids


@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_only_these_rows_move_and_merging_keeps_what_is_computed(tied, family, how, xp, tmp_path):
    model = base(tied, family, xp)
    for p in model.parameters():
        p.data = p.data.astype(np.float64)
    weights = {name: to_numpy(p.data).copy() for name, p in model.named_parameters()}
    start = mp.get_peft_model(model, CONFIGS[how])
    adapted, ids = trained(model, CONFIGS[how])
    np.testing.assert_allclose(to_numpy(start(ids).data), to_numpy(model(ids).data), rtol=0, atol=1e-12)
    assert all(np.array_equal(to_numpy(p.data), weights[name]) for name, p in model.named_parameters())
    mp.peft.assert_learning(adapted)
    merged = adapted.merge_and_unload()
    np.testing.assert_allclose(to_numpy(merged(ids).data), to_numpy(adapted(ids).data), rtol=0, atol=1e-12)
    before, after = (to_numpy(m.backbone.embedding.weight.data) for m in (model, merged))
    moved = (before != after).any(axis=1)
    assert moved.nonzero()[0].tolist() == sorted(TOKENS)
    assert (merged.lm_head.weight is merged.backbone.embedding.weight) is tied is merged.config.tie_word_embeddings
    heads = [to_numpy(m.lm_head.weight.data) for m in (model, merged)]
    assert (heads[0] != heads[1]).any() == tied, "an untied head is left alone, as in PEFT"
    adapted.save_pretrained(tmp_path)
    again = mp.PeftModel.from_pretrained(model, tmp_path)
    assert np.array_equal(to_numpy(again(ids).data), to_numpy(adapted(ids).data))


def test_a_new_token_is_taught_and_everything_else_stays():
    model, tokenizer = mp.load_base()
    old = model.copy()
    tokenizer.add_tokens(["<name>"])
    model.resize_token_embeddings(tokenizer.vocab_size)
    new = tokenizer.token_to_id("<name>")
    adapted = mp.get_peft_model(model, mp.TrainableTokensConfig(token_indices=[new]))
    assert adapted.get_nb_trainable_parameters()[0] == model.config.hidden_size
    text = np.array(tokenizer.encode("It was <name> , and <name> smiled at <name> ."))
    args = mp.TrainingArguments(max_steps=8, learning_rate=3e-2, progress=False)
    losses = [loss for _, loss in mp.Trainer(adapted, [(text, text)], args=args).train().losses()]
    assert losses[-1] < losses[0] - 0.2
    plain = np.array([tokenizer.encode("It is a truth universally acknowledged")])
    np.testing.assert_allclose(adapted(plain).data[..., :new], old(plain).data, atol=1e-4)


def test_adapters_switch_mix_and_stack():
    model = base()
    adapted, _ = trained(model, CONFIGS["alone"])
    adapted.add_adapter("other", mp.TrainableTokensConfig(token_indices=[3, 9], init_weights=False), seed=5)
    one, plain = adapted(IDS).data, model(IDS).data
    adapted.set_adapter("other")
    other = adapted(IDS).data
    mixed = adapted(np.repeat(IDS, 3, axis=0), adapter_names=["default", "__base__", "other"]).data
    np.testing.assert_allclose(mixed, np.concatenate([one, plain, other]), atol=1e-5)
    adapted.set_adapter(["default", "other"])
    rows = adapted.merge_and_unload().backbone.embedding.weight.data
    delta = adapted.layers["model.embed_tokens"].adapters["other"].rows.data
    np.testing.assert_array_equal(rows[[3, 9]], delta)  # of two that train token 3, the last
    with adapted.disable_adapter():
        np.testing.assert_array_equal(adapted(IDS).data, plain)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", CONFIGS)
def test_counts_come_from_shapes_and_from_the_model(how, tied):
    model = base(tied)
    counted = mp.accounting.count_parameters(mp.accounting.architecture(model.config), CONFIGS[how])
    adapted = mp.get_peft_model(model, CONFIGS[how])
    assert (counted.trainable, counted.total) == adapted.get_nb_trainable_parameters()


def test_a_dictionary_names_the_modules():
    config = mp.LoraConfig(r=2, trainable_token_indices={"embed_tokens": [3], "lm_head": [4, 5]})
    adapted, ids = trained(base(tied=False), config)
    merged = adapted.merge_and_unload()
    np.testing.assert_allclose(merged(ids).data, adapted(ids).data, atol=2e-6)
    moved = (merged.lm_head.weight.data != base(tied=False).lm_head.weight.data).any(axis=1)
    assert moved.nonzero()[0].tolist() == [4, 5]


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("names no token", lambda: mp.TrainableTokensConfig()),
        ("an integer of at least 0", lambda: mp.TrainableTokensConfig(token_indices=[-1])),
        ("the tokens are 0 to 19, and 20 is to be trained", lambda: mp.TrainableTokensConfig(token_indices=[20])),
        ("a token is given twice", lambda: mp.TrainableTokensConfig(token_indices=[3, 3])),
        ("and 99 is to be trained", lambda: mp.LoraConfig(trainable_token_indices=[99])),
        ("no embedding called 'wte'", lambda: mp.LoraConfig(trainable_token_indices={"wte": [3]})),
        (
            "model.embed_tokens is a target of the adapter",
            lambda: mp.LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[3]),
        ),
        (
            "lm_head is a target of the adapter",
            lambda: mp.LoraConfig(target_modules=["lm_head"], trainable_token_indices=[3]),
        ),
        (
            r"model.embed_tokens is trained whole \(modules_to_save\)",
            lambda: mp.LoraConfig(modules_to_save=["embed_tokens"], trainable_token_indices=[3]),
        ),
        (
            "lm_head is tied to model.embed_tokens, so the same tokens",
            lambda: mp.LoraConfig(trainable_token_indices={"embed_tokens": [3], "lm_head": [4]}),
        ),
        ("target_modules: 'model.norm' is a RMSNorm", lambda: mp.TrainableTokensConfig(token_indices=[3], target_modules=["norm"])),
    ],
)  # fmt: skip
def test_what_cannot_be_trained(message, make):
    with pytest.raises(PeftError, match=message):
        mp.get_peft_model(base(), make())


def test_lora_with_trained_rows_is_not_combined():
    adapted = mp.get_peft_model(base(), CONFIGS["beside LoRA"])
    with pytest.raises(PeftError, match="uses trainable_token_indices"):
        adapted.add_weighted_adapter(["default"], [1.0], "sum")
