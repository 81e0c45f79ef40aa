"""Prompt tuning, prefix tuning, P-tuning: virtual tokens in front of the input, their masks, positions and budget."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_peft import IDS, PROMPTS, base, train

import minipeft as mp
from minipeft.backend import to_numpy
from minipeft.files import read_safetensors, write_safetensors
from minipeft.nn import Linear
from minipeft.nn.transformer import KVCache
from minipeft.peft.config import PeftError

P, LIMIT = 5, 32
METHODS = PROMPTS
both = [(dialect, method) for dialect in ("gpt2", "llama") for method in METHODS]


def adapted(dialect="llama", method="prompt", xp=np, **fields):
    """A model whose virtual tokens have been trained a little."""
    return train(mp.get_peft_model(base(dialect, xp, **fields), METHODS[method]), xp)


@pytest.mark.parametrize(("dialect", "method"), both)
def test_padding_on_either_side_changes_nothing(dialect, method, xp):
    prompted = adapted(dialect, method, xp)
    alone = to_numpy(prompted(xp.asarray(IDS[1:2, :4])).data)[0]
    for left, mask in ((True, [0, 0, 0, 1, 1, 1, 1]), (False, [1, 1, 1, 1, 0, 0, 0])):
        ids, mask = IDS.copy(), np.stack([np.ones(7, int), np.array(mask), np.ones(7, int)])
        ids[1] = np.concatenate([[9, 9, 9], IDS[1, :4]] if left else [IDS[1, :4], [9, 9, 9]])
        logits = to_numpy(prompted(xp.asarray(ids), attention_mask=xp.asarray(mask)).data)
        np.testing.assert_allclose(logits[1, 3:] if left else logits[1, :4], alone, atol=1e-5)
        np.testing.assert_allclose(logits[0], to_numpy(prompted(xp.asarray(IDS)).data)[0], atol=1e-5)


def test_the_loss_takes_label_smoothing():
    for method in ("prompt", "prefix"):
        prompted = adapted(method=method)
        labels = np.where(np.arange(7) > 0, IDS, -100)  # the first token, which only a prompt predicts
        logits = prompted(IDS)
        expected = mp.functional.cross_entropy(logits[:, :-1], IDS[:, 1:], label_smoothing=0.2).item()
        assert prompted.loss(IDS, labels, label_smoothing=0.2).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("dialect", "method"), both)
def test_a_boolean_mask_and_positions_for_packing(dialect, method):
    """Two texts packed into one row, neither seeing the other, are the two alone behind the same virtual tokens."""
    prompted = adapted(dialect, method)
    a, b = IDS[:1, :4], IDS[1:2, :3]
    packed = np.concatenate([a, b], axis=1)
    text = np.array([0, 0, 0, 0, 1, 1, 1])
    mask = (text[:, None] == text[None, :])[None, None]  # [1, 1, 7, 7]; causality holds in any case
    positions = np.array([[0, 1, 2, 3, 0, 1, 2]])
    logits = prompted(packed, attention_mask=mask, position_ids=positions).data
    np.testing.assert_allclose(logits[:, :4], prompted(a).data, atol=1e-5)
    np.testing.assert_allclose(logits[:, 4:], prompted(b).data, atol=1e-5)


@pytest.mark.parametrize(("dialect", "method"), both)
def test_generation_with_and_without_a_cache_and_padded(dialect, method, xp):
    prompted = adapted(dialect, method, xp)
    mask = np.ones_like(IDS)
    mask[1, :3] = 0
    cached = prompted.generate(IDS, attention_mask=mask, max_new_tokens=6)
    np.testing.assert_array_equal(
        cached, prompted.generate(IDS, attention_mask=mask, max_new_tokens=6, use_cache=False)
    )
    alone = prompted.generate(IDS[1:2, 3:], max_new_tokens=6)
    np.testing.assert_array_equal(cached[1, 7:], alone[0, 4:])
    with prompted.disable_adapter():
        np.testing.assert_array_equal(
            prompted.generate(IDS, max_new_tokens=6), base(dialect, xp).generate(IDS, max_new_tokens=6)
        )


@pytest.mark.parametrize("method", METHODS)
def test_input_is_checked_as_the_base_checks_it(method):
    prompted = adapted("llama", method)
    embeds = prompted.base_model.backbone.embedding(IDS)
    for error, match, given in (
        (ValueError, "give either input_ids or inputs_embeds", {}),
        (ValueError, "give either input_ids or inputs_embeds", dict(input_ids=IDS, inputs_embeds=embeds)),
        (TypeError, "input_ids must be an integer array, not a list", dict(input_ids=IDS.tolist())),
        (ValueError, r"must have the shape \[batch, seq\]", dict(input_ids=IDS[0])),
    ):
        with pytest.raises(error, match=match):
            prompted(**given)
    assert prompted(IDS[:, :0]).shape[:2] == (len(IDS), 0)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_cache_holds_the_virtual_positions_once(method):
    prompted, cache = adapted("llama", method), KVCache()
    whole = prompted(IDS).data
    parts = [prompted(IDS[:, i : i + 2], past_key_values=cache).data for i in range(0, 7, 2)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
    assert len(cache) == P + 7
    with pytest.raises(PeftError, match="past_key_values hold 2 positions; the 5 virtual tokens cannot be among them"):
        k = np.zeros((3, 2, 2, 4), np.float32)
        prompted(IDS, past_key_values=[(k, k), (k, k)])


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_in_place_of_ids(method):
    prompted = adapted("llama", method)
    embeds = prompted.base_model.backbone.embedding(IDS)
    np.testing.assert_array_equal(prompted(inputs_embeds=embeds).data, prompted(IDS).data)


def test_soft_tokens_are_what_the_tokens_are_that_they_equal():
    """Soft tokens with the embeddings of real ones: the logits of the input with those tokens in front."""
    for dialect in ("gpt2", "llama"):
        model = base(dialect)
        text = [7, 3, 3, 21]
        config = mp.PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="TEXT", prompt_tuning_init_ids=text)
        whole = np.concatenate([np.tile(text, (3, 1)), IDS], axis=1)
        np.testing.assert_allclose(mp.get_peft_model(model, config)(IDS).data, model(whole).data[:, 4:], atol=1e-5)
        labels = whole.copy()
        labels[:, :4] = -100  # the last of them predicts the first token of the input
        ours = mp.get_peft_model(model, config).loss(IDS, IDS).item()
        assert ours == pytest.approx(model.loss(whole, labels).item(), rel=1e-5)


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_a_prefix_is_what_the_keys_and_values_are_that_it_equals(dialect):
    """A prefix with the keys and values of real tokens: the logits of the input behind those tokens."""
    model, text = base(dialect), np.array([[7, 3, 3, 21]])
    cache = KVCache()
    model(text, past_key_values=cache)
    prompted = mp.get_peft_model(model, mp.PrefixTuningConfig(num_virtual_tokens=4))
    flat = [
        x[0].transpose(1, 0, 2).reshape(4, -1) for pair in cache for x in pair
    ]  # of each layer [P, H D], k before v
    prompted.prompts["default"].prompt_embeddings.data = np.concatenate(flat, axis=1)
    whole = np.concatenate([np.tile(text, (3, 1)), IDS], axis=1)
    np.testing.assert_allclose(prompted(IDS).data, model(whole).data[:, 4:], atol=1e-5)


@pytest.mark.parametrize("method", ["prefix", "prefix by an MLP"])
def test_a_folded_prefix_is_a_plain_cache_for_the_base(method, xp):
    prompted = adapted("llama", method, xp)
    model, ids = base("llama", xp), xp.asarray(IDS)
    cache = prompted.prompts["default"].key_values(3)
    assert [k.shape for k, _ in cache] == 2 * [(3, 2, P, 4)]  # two of the four heads have keys
    np.testing.assert_allclose(
        to_numpy(model(ids, past_key_values=cache).data), to_numpy(prompted(ids).data), atol=1e-5
    )
    np.testing.assert_array_equal(
        model.generate(IDS, max_new_tokens=5, past_key_values=cache), prompted.generate(IDS, max_new_tokens=5)
    )


@pytest.mark.parametrize(("dialect", "method"), both)
def test_counts_trained_and_stored(dialect, method):
    model, d, layers, kv = base(dialect), 16, 2, 8 if dialect == "llama" else 16
    stored = P * 2 * layers * kv if "prefix" in method else P * d
    networks = {"p-tuning": P * d + (d * 6 + 6) + (6 * 6 + 6) + (6 * d + d)}
    networks["prefix by an MLP"] = P * kv + (kv * 6 + 6) + (6 * 2 * layers * kv + 2 * layers * kv)
    counted = mp.accounting.count_parameters(mp.accounting.architecture(model.config), METHODS[method])
    assert (counted.trainable, counted.stored) == (networks.get(method, stored), stored)


def test_published_counts():
    count = mp.accounting.count_parameters
    assert count("t5v1.1-xxl", mp.PromptTuningConfig(num_virtual_tokens=100)).trainable == 409_600
    assert count("gpt2-m", mp.PrefixTuningConfig(num_virtual_tokens=10)).trainable == 10 * 2 * 24 * 1024


@pytest.mark.parametrize(("dialect", "method"), both)
def test_a_file_holds_what_is_computed(dialect, method, tmp_path):
    adapted(dialect, method).save_pretrained(tmp_path)
    arrays = read_safetensors(tmp_path / "adapter_model.safetensors")[0]
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(arrays) == ["prompt_embeddings"] and len(arrays["prompt_embeddings"]) == P
    assert (options["task_type"], options["num_virtual_tokens"], "target_modules" in options) == ("CAUSAL_LM", P, False)


def test_a_file_of_other_shapes_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    write_safetensors(tmp_path / "adapter_model.safetensors", {"prompt_embeddings": np.zeros((P, 8), np.float32)}, {})
    with pytest.raises(PeftError, match=r"prompt_embeddings has the shape \(5, 8\); this model needs \(5, 16\)"):
        mp.PeftModel.from_pretrained(base(), tmp_path)


def test_named_prompts_on_one_base_and_with_lora():
    prompted = adapted()
    first = prompted(IDS).data
    prompted.add_adapter("other", mp.PrefixTuningConfig(num_virtual_tokens=3), seed=1)
    prompted.add_adapter("lora", mp.LoraConfig(r=2))
    prompted.set_adapter("other")
    assert prompted.virtual_tokens == 3
    assert np.abs(prompted(IDS).data - first).max() > 1e-2
    prompted.set_adapter(["default", "lora"])
    np.testing.assert_array_equal(prompted(IDS).data, first)  # LoRA starts at zero
    with pytest.raises(PeftError, match="at most one of the active adapters can change the input"):
        prompted.set_adapter(["default", "other"])
    for merge in (prompted.merge_and_unload, prompted.merge_adapter):
        with pytest.raises(PeftError, match="changes the input; no plain model equals it"):
            merge()
    np.testing.assert_array_equal(prompted(IDS, adapter_names=["__base__"] * 3).data, prompted.unload()(IDS).data)
    mixed = prompted(IDS, adapter_names=["default", "lora", "other"]).data  # test_peft_rows.py has the mixtures
    np.testing.assert_allclose(mixed[0], first[0], atol=1e-5)


@pytest.mark.parametrize("config", [mp.PrefixTuningConfig, mp.PromptEncoderConfig])
@pytest.mark.parametrize("frozen", [False, True])
def test_folded_trains_the_vectors_themselves_and_inference_mode_only_freezes(config, frozen):
    options = {"prefix_projection": True} if config is mp.PrefixTuningConfig else {}
    network = config(num_virtual_tokens=4, inference_mode=frozen, **options)
    model = mp.get_peft_model(base("llama"), network)
    assert "prompt_embeddings" not in dict(model.prompts["default"].named_parameters())
    assert (model.get_nb_trainable_parameters()[0] == 0) == frozen
    folded = mp.get_peft_model(base("llama"), network.replace(folded=True))
    assert folded.prompts["default"].prompt_embeddings.data.std() > 0.5
    counted = mp.accounting.count_parameters(mp.accounting.architecture(model.config), network.replace(folded=True))
    assert folded.get_nb_trainable_parameters()[0] == (not frozen) * counted.trainable
    assert counted.trainable == counted.stored == folded.prompts["default"].prompt_embeddings.size


def test_the_same_seed_gives_the_same_start():
    for method in METHODS.values():
        a, b, c = (mp.get_peft_model(base(), method, seed=s)(IDS).data for s in (3, 3, 4))
        assert (a == b).all() and not (a == c).all()


# ------------------------------------------------------------------------------------------------ the context's budget


@pytest.mark.parametrize("method", METHODS)
def test_the_positions_that_are_left(method):
    prompted = adapted("gpt2", method)
    assert f"{P} virtual tokens in front of the input, which leave {LIMIT - P} of {LIMIT} positions" in repr(prompted)
    full = np.zeros((1, LIMIT - P), int)
    assert prompted(full).shape[1] == LIMIT - P
    longer = np.zeros((1, LIMIT - P + 1), int)
    message = rf"{P} virtual tokens leave {LIMIT - P} of .* {LIMIT} positions, but the input reaches {LIMIT - P + 1}"
    for call in (lambda: prompted(longer), lambda: prompted.loss(longer, longer)):
        with pytest.raises(PeftError, match=message):
            call()
    padded = np.ones_like(longer)
    padded[0, 0] = 0
    assert prompted(longer, attention_mask=padded).shape[1] == LIMIT - P + 1  # padding uses no position
    with pytest.raises(ValueError, match=r"max_new_tokens=8 make 28, but 5 virtual tokens leave 27 .* at most 7"):
        prompted.generate(np.zeros((1, 20), int), max_new_tokens=8)
    assert prompted.generate(np.zeros((1, 20), int), max_new_tokens=7).shape == (1, 27)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("PromptTuning", {"num_virtual_tokens": None}, "num_virtual_tokens must be an integer of at least 1, got None"),
        ("PromptTuning", {"num_virtual_tokens": LIMIT}, "num_virtual_tokens=32 leaves no position for the input"),
        ("PrefixTuning", {"num_virtual_tokens": 99}, "num_virtual_tokens=99 leaves no position for the input"),
        ("PromptTuning", {"token_dim": 8}, "token_dim=8, but .* needs 16"),
        ("PrefixTuning", {"token_dim": 16}, "token_dim=16, but .* needs 8"),
        ("PrefixTuning", {"num_layers": 3}, "num_layers=3, but .* needs 2"),
        ("PromptTuning", {"target_modules": ["q_proj"]}, "it has no target_modules"),
        ("PromptTuning", {"task_type": "SEQ_CLS"}, "task_type='CAUSAL_LM', not 'SEQ_CLS'"),
        ("PromptTuning", {"prompt_tuning_init": "ZERO"}, "RANDOM, SAMPLE_VOCAB, TEXT, got 'ZERO'"),
        ("PromptTuning", {"prompt_tuning_init": "TEXT"}, "needs prompt_tuning_init_ids, or"),
        ("PromptTuning", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_ids": [40]}, "token ids outside of 0..39"),
        (
            "PromptTuning",
            {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "none"},
            "no tokenizer.json is there",
        ),
        ("PrefixTuning", {"init_weights": "ones"}, "init_weights must be one of None, zero, got 'ones'"),
        ("PrefixTuning", {"encoder_hidden_size": 0}, "encoder_hidden_size must be an integer of at least 1, or None"),
        ("PromptEncoder", {"encoder_reparameterization_type": "LSTM"}, "'LSTM' is not built for training"),
        ("PromptEncoder", {"encoder_reparameterization_type": "GRU"}, "must be one of MLP, LSTM, got 'GRU'"),
    ],
)
def test_what_does_not_fit_is_a_clear_error(method, options, message):
    with pytest.raises(PeftError, match=message):
        mp.get_peft_model(base("llama"), getattr(mp, f"{method}Config")(**{"num_virtual_tokens": 2, **options}))


def test_arguments_that_do_not_fit_are_named():
    prompted = adapted()
    with pytest.raises(PeftError, match=r"shape \(3, 7\) or .*, not \(3, 12\): the 5 virtual tokens are added"):
        prompted(IDS, attention_mask=np.ones((3, 7 + P), int))
    with pytest.raises(ValueError, match=r"attention_mask is 1 \(or true\)"):  # which ones in front would hide
        prompted(IDS, attention_mask=np.zeros(IDS.shape, np.float32))
    with pytest.raises(PeftError, match="past_key_values cannot be given"):
        prompted.generate(IDS, past_key_values=[1])
    with pytest.raises(PeftError, match="PromptTuningConfig needs a Transformer; this is a Linear"):
        mp.get_peft_model(Linear(3, 3), METHODS["prompt"])
    with pytest.raises(ValueError, match="labels"):
        prompted.loss(IDS, IDS[:, 1:])
    for call in (lambda **given: prompted(IDS, **given), lambda **given: prompted.loss(IDS, IDS, **given)):
        with pytest.raises(TypeError, match="unexpected keyword argument 'attention_masks'"):
            call(attention_masks=np.ones_like(IDS))
    with pytest.raises(TypeError):
        prompted(IDS, None, None, None, None, None, 3)
