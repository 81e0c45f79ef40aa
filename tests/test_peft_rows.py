"""One model serves all tasks at once: every row of a batch its own adapter, equal to the row alone."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from test_peft import base, train

import minipeft as mp
from minipeft.backend import Rng, to_numpy
from minipeft.nn.generation import generate_stream
from minipeft.nn.transformer import KVCache
from minipeft.peft.config import PeftError
from minipeft.quant import linear
from minipeft.train import Batch

ADAPTERS = {
    "lora": lambda d: mp.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False),
    "dora": lambda d: mp.LoraConfig(r=2, target_modules=FIRST[d], lora_dropout=0.2, use_dora=True),
    "tokens": lambda d: mp.LoraConfig(r=2, target_modules=[TOKENS[d], "lm_head"], lora_dropout=0.3),
    "ia3": lambda d: mp.IA3Config(),
    "norms": lambda d: mp.LNTuningConfig(),
    "loha": lambda d: mp.LoHaConfig(r=2, target_modules=FIRST[d], rank_dropout=0.3),
    "oft": lambda d: mp.OFTConfig(oft_block_size=4, target_modules=FIRST[d], module_dropout=0.3),
    "houlsby": lambda d: mp.BottleneckConfig(placement="houlsby", bottleneck_size=3),
    "pfeiffer": lambda d: mp.BottleneckConfig(placement="pfeiffer", bottleneck_size=3, ln_before=True),
    "parallel": lambda d: mp.BottleneckConfig(placement="parallel", bottleneck_size=3),
    "prompt": lambda d: mp.PromptTuningConfig(num_virtual_tokens=5),
    "p-tuning": lambda d: mp.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=6),
    "prefix": lambda d: mp.PrefixTuningConfig(num_virtual_tokens=3),
    "network": lambda d: mp.PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True),
}
FIRST = {"gpt2": ["c_attn"], "llama": ["q_proj", "down_proj"]}
TOKENS = {"gpt2": "wte", "llama": "embed_tokens"}
MIXTURES = {
    "every kind": ["prefix", "lora", "__base__", "houlsby", "prompt"],
    "inside": ["lora", "ia3", "dora", "lora", "__base__", "norms", "tokens", "oft", "loha"],
    "bottlenecks": ["houlsby", "parallel", "pfeiffer", "__base__"],
    "two prompts": ["prompt", "p-tuning", "prompt"],
    "two prefixes": ["network", "__base__", "prefix", "prefix"],
    "prompts and prefixes": ["p-tuning", "network", "prefix", "prompt", "tokens"],
    "one prompt": ["prompt", "prompt"],
    "one prefix": ["prefix", "prefix"],
    "none": ["__base__", "__base__"],
}
mixtures = pytest.mark.parametrize("rows", list(MIXTURES.values()), ids=list(MIXTURES))
dialects = pytest.mark.parametrize("dialect", ["gpt2", "llama"])
T = 6


def many(dialect="llama", xp=np, dtype=np.float64, quantized=False, **fields):
    """A model with all of the adapters, none of which computes nothing."""
    model = base(dialect, xp, dtype, tie_word_embeddings=False, **fields)
    model = mp.quant.quantize_model(model) if quantized else model
    adapted, generator = None, np.random.default_rng(5)
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        if quantized and name == "tokens":
            config = lambda d: mp.LoraConfig(r=2, target_modules=[TOKENS[d]])  # noqa: E731
        if adapted is None:
            adapted = mp.get_peft_model(model, config(dialect), name, seed)
        else:
            adapted.add_adapter(name, config(dialect), seed)
        for p in (p for _, part in adapted.parts(name) for p in part.trained().values()):
            p.data = p.data + xp.asarray((0.3 * generator.standard_normal(p.shape)).astype(p.dtype))
    return adapted


asked = cache(many)  # for tests that train nothing of it


def alone(adapted, name):
    adapted.set_adapter([] if name == "__base__" else name)
    return adapted


def batch(rows, xp=np):
    """(ids, mask with padding on the left of some rows), [B, T]."""
    ids, mask = np.random.default_rng(0).integers(0, 40, (len(rows), T)), np.ones((len(rows), T), np.int64)
    for i in range(1, len(rows), 2):
        mask[i, : 1 + i % 3] = 0
    return xp.asarray(ids), xp.asarray(mask)


@dialects
@mixtures
def test_logits(dialect, rows, xp):
    for dtype, tolerance in ((np.float32, 2e-5), (np.float64, 1e-10)):
        adapted, (ids, mask) = asked(dialect, xp, dtype), batch(rows, xp)
        for given in (None, mask, mask[:, ::-1].copy()):
            mixed = to_numpy(adapted(ids, attention_mask=given, adapter_names=rows).data)
            real = np.ones(ids.shape, bool) if given is None else to_numpy(given) > 0
            for i, name in enumerate(rows):
                own = None if given is None else given[i : i + 1]
                expected = to_numpy(alone(adapted, name)(ids[i : i + 1], attention_mask=own).data)[0]
                np.testing.assert_allclose(mixed[i, real[i]], expected[real[i]], rtol=tolerance, atol=tolerance)


def test_the_logits_at_the_end_alone():
    for rows in MIXTURES.values():
        adapted, (ids, mask) = asked(), batch(rows)
        mixed = adapted.last_logits(ids, attention_mask=mask, adapter_names=rows).data
        expected = adapted(ids, attention_mask=mask, adapter_names=rows).data[:, -1]
        np.testing.assert_allclose(mixed, expected, rtol=1e-12)


@dialects
@mixtures
def test_packed_texts_and_positions(dialect, rows):
    adapted, (ids, _) = asked(dialect), batch(rows)
    text = np.array([0, 0, 0, 1, 1, 1])
    mask = np.broadcast_to(text[:, None] == text[None, :], (len(rows), 1, T, T))
    positions = np.array([[0, 1, 2, 0, 1, 2]])
    for given in (
        {"attention_mask": mask, "position_ids": positions},
        {"attention_mask": mask},
        {"position_ids": positions},
    ):
        mixed = adapted(ids, **given, adapter_names=rows).data
        for i, name in enumerate(rows):
            own = {k: v[i : i + 1] if k == "attention_mask" else v for k, v in given.items()}
            expected = alone(adapted, name)(ids[i : i + 1], **own).data
            np.testing.assert_allclose(mixed[i : i + 1], expected, rtol=1e-10, atol=1e-10)


def gradients(adapted, loss):
    adapted.zero_grad()
    if loss.requires_grad:  # not of rows of the base alone
        loss.backward()
    return {n: 0 if p.grad is None else to_numpy(p.grad) for n, p in adapted.named_parameters() if p.requires_grad}


def compare_training(adapted, rows, xp, rng=None, tolerance=1e-10):
    """The loss of the mixed batch, and every adapter's gradient, against those of its rows one by one."""
    ids, mask = batch(rows, xp)
    labels = xp.where(mask == 0, -100, ids)
    labels[:, 3] = -100
    used = [name for name in dict.fromkeys(rows) if name != "__base__"]
    adapted.set_adapter([])
    adapted.set_requires_grad(list(ADAPTERS))
    loss = adapted.loss(ids, labels, attention_mask=mask, adapter_names=rows, rng=rng)
    found, value = gradients(adapted, loss), loss.item()
    value_alone, expected, counts = 0, dict.fromkeys(found, 0), []
    for i, name in enumerate(rows):
        first = 0 if name in ("prompt", "p-tuning") else 1  # whose last virtual token predicts the first of the input
        counts.append(int((labels[i, first:] != -100).sum().item()))
    for i, name in enumerate(rows):
        alone(adapted, name).set_requires_grad(list(ADAPTERS))
        stream = rng and Rng(*rng.path, first_row=rng.first_row + i)
        own = slice(i, i + 1)
        loss = adapted.loss(ids[own], labels[own], attention_mask=mask[own], rng=stream)
        value_alone += loss.item() * counts[i] / sum(counts)
        for n, g in gradients(adapted, loss).items():
            expected[n] = expected[n] + g * (counts[i] / sum(counts))
    assert value == pytest.approx(value_alone, rel=tolerance)
    for n, g in expected.items():
        scale = np.abs(g).max()
        np.testing.assert_allclose(found[n], g, rtol=0, atol=tolerance * max(scale, 1e-3), err_msg=n)
    reached = {name for name in ADAPTERS if any(np.any(found[n]) for n in found if f".{name}." in f".{n}")}
    assert reached == set(used)


@dialects
@mixtures
def test_the_loss_and_gradients_with_and_without_dropout(dialect, rows, xp):
    adapted = many(dialect, xp, dropout=0.2)
    for rng in (None, Rng(3, 1, first_row=2)):
        compare_training(adapted, rows, xp, rng)


@dialects
def test_checkpointing(dialect):
    adapted = many(dialect, dropout=0.2)
    adapted.gradient_checkpointing_enable()
    for rows in (MIXTURES["every kind"], MIXTURES["inside"], MIXTURES["prompts and prefixes"]):
        compare_training(adapted, rows, np, Rng(3))


@dialects
def test_a_base_in_four_bits(dialect, xp):
    adapted = many(dialect, xp, np.float32, quantized=True)
    for rows in (MIXTURES["every kind"], MIXTURES["prompts and prefixes"]):
        compare_training(adapted, rows, xp, Rng(3), tolerance=1e-4)


def test_a_layer_in_four_bits_is_decoded_once_for_the_whole_batch(monkeypatch):
    adapted, used = many(quantized=True, dtype=np.float32), []
    product = linear.linear_4bit
    monkeypatch.setattr(
        linear, "linear_4bit", lambda x, weight, *more: (used.append(weight), product(x, weight, *more))[1]
    )
    adapted(batch(range(4))[0], adapter_names=["lora", "__base__", "lora", "prefix"])
    assert len(used) == len({id(weight) for weight in used}) == 14


@dialects
@mixtures
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 20}], ids=["greedy", "sampled"])
def test_generation(dialect, rows, options, xp):
    """With and without a cache, of prompts of different lengths, some of which end early."""
    adapted, (ids, mask) = asked(dialect, xp), batch(rows)
    options = {"max_new_tokens": 5, "eos_token_id": [1, 2, 3, 4, 5, 6], "pad_token_id": 0, **options}
    mixed = adapted.generate(ids, mask, adapter_names=rows, seed=4, **options)
    np.testing.assert_array_equal(
        mixed, adapted.generate(ids, mask, adapter_names=rows, seed=4, use_cache=False, **options)
    )
    for i, name in enumerate(rows):
        own = slice(i, i + 1)
        expected = alone(adapted, name).generate(ids[own], mask[own], seed=Rng(4, first_row=i), **options)
        np.testing.assert_array_equal(mixed[i, : expected.shape[1]], expected[0])
        assert not mixed[i, expected.shape[1] :].any()
    if "temperature" in options:  # how a token is drawn has nothing to do with the mask
        return
    without = adapted.generate(ids, None, adapter_names=rows, seed=4, **options)
    for i, name in enumerate(rows):
        expected = alone(adapted, name).generate(ids[i : i + 1], seed=Rng(4, first_row=i), **options)
        np.testing.assert_array_equal(without[i, : expected.shape[1]], expected[0])


def test_rows_end_at_different_steps():
    """The test above would say little if all rows ran equally long."""
    rows = MIXTURES["every kind"]
    adapted, (ids, mask) = many(), batch(rows)
    tokens = adapted.generate(ids, mask, adapter_names=rows, max_new_tokens=7)[:, T:]
    ends = [int(tokens[0, 1]), int(tokens[3, 2])]
    out = adapted.generate(ids, mask, adapter_names=rows, max_new_tokens=7, eos_token_id=ends, pad_token_id=0)[:, T:]
    lengths = [next((k + 1 for k, t in enumerate(row) if t in ends), 7) for row in tokens]
    assert len(set(lengths)) > 2
    for i, n in enumerate(lengths):
        np.testing.assert_array_equal(out[i, :n], tokens[i, :n])


def test_a_cache_fed_in_parts_and_with_fewer_rows():
    rows = MIXTURES["prompts and prefixes"]
    adapted, (ids, _), cache = many(), batch(rows), KVCache()
    whole = adapted(ids, adapter_names=rows).data
    parts = [adapted(ids[:, i : i + 2], past_key_values=cache, adapter_names=rows).data for i in (0, 2)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole[:, :4], atol=1e-10)
    kept = np.array([1, 4])  # neither the longest prompt nor all of the prefixes
    cache.select(kept)
    twin = KVCache(cache)
    for one in (cache, twin):
        last = adapted(ids[kept, 4:], past_key_values=one, adapter_names=[rows[i] for i in kept]).data
        np.testing.assert_allclose(last, whole[kept, 4:], atol=1e-10)


def test_embeddings_in_place_of_ids():
    rows = MIXTURES["prompts and prefixes"][:4]
    adapted, (ids, mask) = many(), batch(rows)
    embeds = adapted.base_model.backbone.embedding.base_layer(ids)
    expected = adapted(ids, attention_mask=mask, adapter_names=rows).data
    for given in ({}, {"input_ids": None}):
        found = adapted(**given, inputs_embeds=embeds, attention_mask=mask, adapter_names=rows).data
        np.testing.assert_array_equal(found, expected)


def test_a_trainer_trains_several_adapters_in_one_run():
    """A collate function says which example is whose; what it does not name stays as it was."""
    adapted, (ids, _) = many(dtype=np.float32), batch(range(8))
    names = ["lora", "prompt", "prefix", "houlsby"] * 2
    adapted.set_adapter([])
    adapted.set_requires_grad(["lora", "prompt", "prefix", "houlsby", "ia3"])
    trained = {n: p.data.copy() for n, p in adapted.named_parameters() if p.requires_grad}

    def collate(examples):
        ids, rows = np.stack([i for i, _ in examples]), [name for _, name in examples]
        return Batch({"input_ids": ids, "labels": ids, "adapter_names": rows}, ids[:, 1:].size, ids.size)

    arguments = mp.TrainingArguments(max_steps=12, learning_rate=1e-2, per_device_train_batch_size=4)
    result = mp.Trainer(adapted, list(zip(ids, names)), args=arguments, collate=collate).train()
    losses = [loss for _, loss in result.losses()]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    moved = {n for n, p in adapted.named_parameters() if p.requires_grad and not np.array_equal(p.data, trained[n])}
    assert moved == {n for n in trained if ".ia3." not in n}


def test_training_callbacks_are_those_of_the_adapters_that_learn():
    adapted = mp.get_peft_model(base(), mp.AdaLoraConfig(total_step=50, target_modules=["q_proj"]), "a")
    adapted.add_adapter("b", mp.LoraConfig(r=2))
    adapted.set_adapter("b")
    assert adapted.training_callbacks() == []
    adapted.set_requires_grad("a")
    assert [callback.adapter_name for callback in adapted.training_callbacks()] == ["a"]
    adapted.set_requires_grad(["a"], False)
    assert adapted.training_callbacks() == []
    with pytest.raises(PeftError, match="there is no adapter 'c'"):
        adapted.set_requires_grad("c")


def test_merged_adapters_in_a_mixed_batch():
    adapted = many()
    rows = ["lora", "prefix", "lora", "__base__"]
    ids, mask = batch(rows)
    expected = adapted(ids, attention_mask=mask, adapter_names=rows).data
    adapted.merge_adapter(["lora"])
    np.testing.assert_allclose(adapted(ids, attention_mask=mask, adapter_names=rows).data, expected, atol=1e-10)


def test_what_does_not_fit_is_a_clear_error():
    adapted = many("gpt2")
    ids = np.zeros((3, T), int)
    for call in (adapted, lambda ids, **given: adapted.loss(ids, ids, **given)):
        with pytest.raises(PeftError, match="adapter_names has 2 names for an input of 3 rows"):
            call(ids, adapter_names=["lora", "prompt"])
        with pytest.raises(PeftError, match="there is no adapter 'lore'; there are lora, dora"):
            call(ids, adapter_names=["lora", "prompt", "lore"])
    for names in (["lora", "prompt"], []):
        with pytest.raises(ValueError, match=f"adapter_names has {len(names)} names for 3 prompts"):
            adapted.generate(ids, adapter_names=names)
    with pytest.raises(PeftError, match="there is no adapter 'lore'"):
        adapted.generate(ids, adapter_names=["lora", "prompt", "lore"])
    with pytest.raises(PeftError, match="past_key_values cannot be given"):
        adapted.generate(ids, adapter_names=["lora", "prompt", "lora"], past_key_values=[1])
    with pytest.raises(TypeError, match="adapter_names needs a model with named adapters; this is a Transformer"):
        next(generate_stream(base(), ids, adapter_names=["lora"] * 3))
    rows = ["lora", "prompt", "prefix"]
    long = np.zeros((3, 28), int)
    with pytest.raises(
        PeftError, match="5 virtual tokens leave 27 of this model's 32 positions, but the input reaches 28"
    ):
        adapted(long, adapter_names=rows)
    mask = np.ones_like(long)
    mask[1, :1] = 0  # the row with the longest prompt has room, and so have the others
    assert adapted(long, attention_mask=mask, adapter_names=rows).shape == (3, 28, 40)
    with pytest.raises(ValueError, match=r"a prompt of 27 tokens .* 5 virtual tokens leave 27 .* at most 0"):
        adapted.generate(long, mask, adapter_names=rows, max_new_tokens=1)
    mask[1, :5] = 0
    assert adapted.generate(long, mask, adapter_names=rows, max_new_tokens=1).shape == (3, 29)


def test_a_layer_of_several_inputs_refuses_what_changes_its_input():
    class Doubling(mp.peft.layer.Adapter):
        def __init__(self):
            self.keys = []

        def forward(self, x, inner, base, rng):
            return inner(x * 2)

    adapted = many()
    adapted.layers["model.layers.0.self_attn"].adapters["lora"] = Doubling()
    with pytest.raises(PeftError, match="'lora' changes the input of a LlamaAttention, which has several inputs"):
        adapted(batch(range(2))[0], adapter_names=["lora", "houlsby"])


def test_the_plain_path_is_as_it_was():
    """Training steps with one active adapter give the bytes they gave before: no row knows of other rows."""
    for name in ("lora", "prompt", "prefix"):
        a, b = (alone(many(dtype=np.float32), name) for _ in range(2))
        train(a, rng=Rng(1))
        train(b, rng=Rng(1))
        rows = [name] * 2
        ids, mask = batch(rows)
        np.testing.assert_allclose(
            a(ids, attention_mask=mask).data, b(ids, attention_mask=mask, adapter_names=rows).data, atol=1e-5
        )
