"""Generation: the right tokens, with and without the cache, alone and in a batch, on every device."""

from __future__ import annotations

import math

import models
import numpy as np
import pytest
from models import dialects

import minipeft as mp
from minipeft.autograd.tensor import is_grad_enabled
from minipeft.backend import Rng, to_numpy
from minipeft.nn.generation import generate, generate_stream, next_tokens, token_probabilities
from minipeft.nn.transformer import KVCache


def build(dialect, xp=np, **fields):
    return models.build(dialect, xp, **(dict(max_position_embeddings=48) | fields))


def left_padded(prompts, fill=0):
    """(ids, mask) of prompts of different lengths."""
    T = max(map(len, prompts))
    ids = np.array([[fill] * (T - len(p)) + list(p) for p in prompts])
    return ids, np.array([[0] * (T - len(p)) + [1] * len(p) for p in prompts])


PROMPTS = [[3, 17, 5, 9, 30], [8], [21, 2, 39]]
SAMPLING = dict(temperature=1.3, top_k=20, top_p=0.95)


# ------------------------------------------------------------------------------------------------------- the tokens


@dialects
def test_greedy_takes_the_most_probable_token_of_the_full_forward(dialect, xp):
    model, ids = build(dialect, xp), np.array([[3, 17, 5], [8, 8, 1]])
    expected = ids
    for _ in range(12):
        logits = to_numpy(model(xp.asarray(expected)).data)[:, -1]
        expected = np.concatenate([expected, logits.argmax(axis=-1)[:, None]], axis=1)
    for given in (ids, ids.tolist(), ids.astype(np.int32), xp.asarray(ids)):
        found = model.generate(given, max_new_tokens=12)
        assert found.dtype == np.int64 and np.array_equal(found, expected)
    assert len({tuple(row) for row in expected[:, 3:]}) == 2 and len(set(expected[0, 3:])) > 2  # not one token repeated


@pytest.mark.parametrize("options", [{}, SAMPLING, SAMPLING | dict(eos_token_id=[4, 5, 6, 7, 8, 9])])
@dialects
def test_cached_and_uncached_tokens_are_the_same_with_left_padding(dialect, options, xp):
    model, (ids, mask) = build(dialect, xp), left_padded(PROMPTS)
    cached, uncached = (
        model.generate(ids, mask, max_new_tokens=15, use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert np.array_equal(cached, uncached)


@pytest.mark.parametrize("options", [{}, SAMPLING | dict(eos_token_id=[4, 5, 6, 7, 8, 9])])
@dialects
def test_a_row_does_not_depend_on_its_neighbours_nor_on_its_padding(dialect, options):
    model, (ids, mask) = build(dialect), left_padded(PROMPTS, fill=33)
    batch = model.generate(ids, mask, max_new_tokens=15, seed=4, pad_token_id=0, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate([prompt], max_new_tokens=15, seed=Rng(4, first_row=row), pad_token_id=0, **options)
        new = alone[0, len(prompt) :]
        assert np.array_equal(batch[row, 5 : 5 + len(new)], new)
        assert not batch[row, 5 + len(new) :].any()


def test_the_prompt_comes_back_as_it_was_and_zero_tokens_are_none():
    model, (ids, mask) = build("llama"), left_padded(PROMPTS, fill=33)
    assert np.array_equal(model.generate(ids, mask, max_new_tokens=4)[:, :5], ids)
    assert np.array_equal(model.generate(ids, mask, max_new_tokens=0), ids)


def test_same_seed_same_tokens_other_seed_other_tokens(xp):
    model = build("llama", xp)
    first, again, other = (model.generate([[3, 4]] * 3, temperature=1.0, seed=s) for s in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len({tuple(row) for row in first}) == 3  # equal prompts in a batch draw their own numbers
    assert np.array_equal(first, build("llama").generate([[3, 4]] * 3, temperature=1.0, seed=5))  # and on any device


# ---------------------------------------------------------------------------------------------------------- stopping


def test_a_row_stops_at_eos_and_is_padded_on_the_right():
    model = build("llama")
    free = model.generate([[3, 17], [8, 1]], max_new_tokens=10)[:, 2:]
    eos = int(free[0, 3])
    ends = [list(row).index(eos) if eos in row else 9 for row in free]
    found = model.generate([[3, 17], [8, 1]], max_new_tokens=10, eos_token_id=eos, pad_token_id=39)[:, 2:]
    assert found.shape[1] == max(ends) + 1  # and not a step longer
    for row, end in enumerate(ends):
        assert np.array_equal(found[row, : end + 1], free[row, : end + 1])  # EOS itself is kept
        assert (found[row, end + 1 :] == 39).all()
    assert min(ends) < max(ends)


def test_each_row_its_own_ends():
    model = build("llama")
    options = dict(max_new_tokens=9, pad_token_id=39, **SAMPLING)
    prompts, ends = [[3, 17], [8, 1], [5, 5]], [[1, 2, 3, 4, 5, 6, 7], [], [20, 21, 22, 23, 24, 25, 26, 27]]
    found = model.generate(prompts, eos_token_id=ends, **options)
    for row, (prompt, own) in enumerate(zip(prompts, ends)):
        alone = model.generate([prompt], eos_token_id=own, seed=Rng(0, first_row=row), **options)[0]
        assert np.array_equal(found[row, : len(alone)], alone) and (found[row, len(alone) :] == 39).all()
    with pytest.raises(ValueError, match="eos_token_id has lists for 2 rows, but there are 3 prompts"):
        model.generate(prompts, eos_token_id=ends[:2], **options)


def test_eos_and_pad_come_from_the_configuration_unless_given():
    free = build("gpt2").generate([[3, 17], [8, 1]], max_new_tokens=8)
    eos = int(free[0, 4])
    model = build("gpt2", eos_token_id=eos)
    stopped = model.generate([[3, 17], [8, 1]], max_new_tokens=8)
    end = list(free[0, 2:]).index(eos) + 3
    assert (stopped[0, end:] == eos).all() and stopped.shape[1] > end  # padded with EOS where there is no padding id
    padded = build("gpt2", eos_token_id=eos, pad_token_id=11).generate([[3, 17], [8, 1]], max_new_tokens=8)
    assert (padded[0, end:] == 11).all()
    assert np.array_equal(model.generate([[3, 17], [8, 1]], max_new_tokens=8, eos_token_id=()), free)
    assert model.generate([[3, 17]], max_new_tokens=8).shape == (1, end)  # nobody is left: the loop ends


def test_the_stream_yields_the_columns_of_generate_and_leaves_gradients_on():
    model, (ids, mask) = build("llama"), left_padded(PROMPTS)
    options = dict(max_new_tokens=9, eos_token_id=[1, 2, 3, 4, 5, 6, 7], **SAMPLING)
    columns = []
    for column in generate_stream(model, ids, mask, **options):
        assert is_grad_enabled()
        columns.append(column)
    assert np.array_equal(np.stack(columns, axis=1), generate(model, ids, mask, **options)[:, 5:])


# ---------------------------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("use_cache", [True, False])
@dialects
def test_past_key_values_continue_and_are_never_changed(dialect, use_cache, xp):
    model, ids = build(dialect, xp), np.array([[3, 17, 5, 9], [8, 1, 2, 30], [4, 4, 6, 6]])
    options = dict(max_new_tokens=10, use_cache=use_cache, eos_token_id=[1, 2, 3, 4, 5, 6, 7], **SAMPLING)
    whole = model.generate(ids, **options)
    cache = KVCache()
    model(xp.asarray(ids[:, :3]), past_key_values=cache)
    before = [to_numpy(a).copy() for pair in cache for a in pair]
    for past in (cache, list(cache), [(mp.Tensor(k), mp.Tensor(v)) for k, v in cache]):
        assert np.array_equal(model.generate(ids[:, 3:], past_key_values=past, **options), whole[:, 3:])
    assert len(cache) == 3
    assert all(np.array_equal(a, to_numpy(b)) for a, b in zip(before, (a for p in cache for a in p)))


def test_anything_with_the_signature_of_the_model_generates():
    class Wrapped(mp.nn.Module):
        """A trained prefix of two positions before every prompt, as a method would add it."""

        def __init__(self, inner, prefix):
            self.inner, self.prefix = inner, prefix

        def forward(self, input_ids, attention_mask=None, past_key_values=None):
            B = input_ids.shape[0]
            if attention_mask is not None:
                attention_mask = np.concatenate([np.ones((B, 2), np.int64), attention_mask], axis=1)
            if len(past_key_values) == 0:
                self.inner(np.repeat(self.prefix, B, axis=0), past_key_values=past_key_values)
            return self.inner(input_ids, attention_mask=attention_mask, past_key_values=past_key_values)

    model, prefix = build("llama"), np.array([[6, 7]])
    ids, mask = left_padded(PROMPTS)
    found = generate(Wrapped(model, prefix), ids, mask, max_new_tokens=8)[:, 5:]
    for row, prompt in enumerate(PROMPTS):
        assert np.array_equal(found[row], model.generate([[6, 7, *prompt]], max_new_tokens=8)[0, 2 + len(prompt) :])


# -------------------------------------------------------------------------------------------------- the distribution


def test_temperature_top_k_and_top_p_restrict_as_defined():
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3]]))

    def expect(p, **options):
        np.testing.assert_allclose(token_probabilities(logits, **options), [p], atol=1e-12)

    expect([0.1, 0.4, 0.2, 0.3])
    expect(np.array([0.01, 0.16, 0.04, 0.09]) / 0.3, temperature=0.5)
    expect([0, 4 / 7, 0, 3 / 7], top_k=2)
    expect([0.1, 0.4, 0.2, 0.3], top_k=0)
    expect([0.1, 0.4, 0.2, 0.3], top_k=9)
    expect([0.1, 0.4, 0.2, 0.3], top_p=1.0)
    expect([0, 1, 0, 0], top_p=0.39)  # the first token alone suffices
    expect([0, 4 / 7, 0, 3 / 7], top_p=0.41)  # it does not: the next joins
    expect([0, 4 / 9, 2 / 9, 3 / 9], top_p=0.89)
    expect([0, 1, 0, 0], top_p=1e-9)  # never empty
    expect([0, 1, 0, 0], top_k=2, top_p=0.57)  # the nucleus is taken of what top_k left: 4/7 = 0.571
    expect([0, 4 / 7, 0, 3 / 7], top_k=2, top_p=0.58)
    expect([0, 1, 0, 0], temperature=0.5, top_p=0.53)  # after the temperature: 0.16 / 0.3 = 0.533


def test_equally_probable_tokens():
    even = np.zeros((1, 4))
    np.testing.assert_allclose(token_probabilities(even, top_k=2), [[0.25] * 4])  # as probable as the k-th: all stay
    np.testing.assert_allclose(token_probabilities(even, top_p=0.5), [[0.5, 0.5, 0, 0]])  # the lower ids fill it up


def test_masked_logits_and_extreme_temperatures_stay_numbers():
    p = token_probabilities(np.array([[-np.inf, 3.0, 1000.0, 999.0]], np.float32), temperature=1e-3, top_p=0.9)
    np.testing.assert_allclose(p, [[0, 0, 1, 0]])
    p = token_probabilities(np.array([[-np.inf, 3.0, 1000.0, 999.0]], np.float32), temperature=1e-308)
    assert p.tolist() == [[0, 0, 1, 0]]
    p = token_probabilities(np.array([[-np.inf, 3.0, 5.0]], np.float32), temperature=1e6)
    np.testing.assert_allclose(p, [[0, 0.5, 0.5]], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("temperature, top_k, top_p", [(0.0, None, None), (0.7, None, None), (1.0, 5, None), (1.5, None, 0.6), (1.0, 40, 0.9)])
def test_the_tokens_chosen_on_a_device_are_the_hosts(xp, rng, temperature, top_k, top_p, dtype):
    rows = np.arange(40)
    logits = (3 * rng.standard_normal((40, 77))).astype(dtype)
    logits[10:20] = logits[10:20].round()  # many are equal
    logits[20:30, ::3] = -np.inf
    logits[30] = 0.0
    options = temperature, top_k, top_p, Rng(3, 1), rows
    for step in range(3):
        host, found = next_tokens(logits, *options, step), next_tokens(xp.asarray(logits), *options, step)
        assert found.dtype == np.int64 and np.array_equal(to_numpy(found), host)
    logits[7, 5] = np.nan
    assert to_numpy(next_tokens(xp.asarray(logits), *options, 0))[7] == -1


def test_tokens_are_drawn_with_their_probabilities():
    model, n = build("llama", initializer_range=0.2), 4000
    for options in (dict(temperature=1.0), dict(temperature=0.7, top_k=8, top_p=0.8)):
        drawn = model.generate(np.full((n, 1), 7), max_new_tokens=1, seed=1, **options)[:, 1]
        p = token_probabilities(model(np.array([[7]])).data[0], **options)[0]
        frequency = np.bincount(drawn, minlength=40) / n
        assert not frequency[p == 0].any()
        assert (np.abs(frequency - p) <= 4.5 * np.sqrt(p * (1 - p) / n)).all()


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "input_ids, options, message",
    [
        ([[1, 2], [3]], {}, "rows differ in length; pad them on the left and give an attention_mask"),
        ([1, 2], {}, r"must have the shape \[batch, seq\], not \(2,\)"),
        ([[]], {}, "is empty; a prompt needs at least one token"),
        ([[1.5, 2.0]], {}, "must be integers, not float64"),
        ([[1, 2]], dict(attention_mask=[[1]]), r"attention_mask must have the shape \(1, 2\), not \(1, 1\)"),
        ([[1, 2]], dict(attention_mask=[[1, 0]]), "ends with padding in some row; to be continued, pad prompts on the left"),
        ([[1, 2]], dict(max_new_tokens=-1), "max_new_tokens must be a non-negative integer, not -1"),
        ([[1, 2]], dict(max_new_tokens=2.5), "max_new_tokens must be a non-negative integer, not 2.5"),
        ([[1, 2]], dict(temperature=-0.1), "temperature must be 0 .* not -0.1"),
        ([[1, 2]], dict(temperature=float("nan")), "temperature must be 0 .* not nan"),
        ([[1, 2]], dict(temperature="1"), "temperature must be 0 .* not '1'"),
        ([[1, 2]], dict(top_p="1"), r"top_p must lie in \(0, 1\], not '1'"),
        ([[1, 2]], dict(eos_token_id="12"), "eos_token_id must be a token id, an integer of 64 bits, not '12'"),
        ([[1, 2]], dict(eos_token_id=[2**70]), "eos_token_id must be a token id, an integer of 64 bits, not 11805"),
        ([[1, 2]], dict(pad_token_id=2**63), "pad_token_id must be a token id, an integer of 64 bits, not 92233"),
        ([[1, 2]], dict(top_p=0), r"top_p must lie in \(0, 1\], not 0"),
        ([[1, 2]], dict(top_p=1.1), r"top_p must lie in \(0, 1\], not 1.1"),
        ([[1, 2]], dict(top_k=-3), "top_k must be a positive integer.* not -3"),
        ([[1, 2]], dict(top_k=2.0), "top_k must be a positive integer.* not 2.0"),
        ([[1, 2]], dict(seed=-1), "seed must be a non-negative integer"),
        ([[1, 2]], dict(seed=None), "seed must be a non-negative integer"),
        ([[1, 2]], dict(max_new_tokens=47), "2 tokens and max_new_tokens=47 make 49, but this model has 48 positions"),
    ],
)
def test_arguments_that_make_no_sense_say_why(input_ids, options, message):
    with pytest.raises(ValueError, match=message):
        build("gpt2").generate(input_ids, **options)


@dialects
def test_the_last_position_can_be_used_and_padding_takes_none(dialect):
    model = build(dialect)
    assert model.generate([[1, 2]], max_new_tokens=46).shape == (1, 48)
    ids, mask = left_padded([[1, 2], [3]])
    wide = np.concatenate([np.zeros((2, 10), int), ids], axis=1), np.concatenate([np.zeros((2, 10), int), mask], axis=1)
    assert np.array_equal(model.generate(*wide, max_new_tokens=46)[:, 10:], model.generate(ids, mask, max_new_tokens=46))
    with pytest.raises(ValueError, match="generate at most 46"):
        model.generate(*wide, max_new_tokens=47)


def test_a_prefix_of_another_batch_size_and_unknown_ids_say_why():
    model, cache = build("llama"), KVCache()
    model(np.array([[1, 2]]), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values hold 1 rows, but there are 2 prompts"):
        model.generate([[1], [2]], past_key_values=cache)
    with pytest.raises(IndexError, match="token id 40 is out of range"):
        model.generate([[40]])


def test_logits_that_are_not_numbers_are_an_error():
    model = build("llama")
    model.lm_head.weight.data[3, 0] = np.nan
    with pytest.raises(FloatingPointError, match="NaN or infinite at generation step 0"):
        model.generate([[1, 2]])
    for temperature in (0.0, 1.0):
        for infinite in (math.inf, -math.inf):  # +inf - inf is NaN, of which no token can be drawn
            logits = np.full((1, 6), infinite)
            assert next_tokens(logits, temperature, None, None, Rng(0), np.arange(1), 0).tolist() == [-1]
    logits[0, 2] = 0
    assert next_tokens(logits, 1.0, None, None, Rng(0), np.arange(1), 0).tolist() == [2]
