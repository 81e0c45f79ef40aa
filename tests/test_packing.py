"""Packing: several examples in a row, whose loss and gradients are those of the same examples apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import counting, tiny_model, train, weights

import minipeft as mp
from minipeft.backend import asarray, to_numpy
from minipeft.train import collate, collate_packed, pack


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 30))
def test_rows_hold_every_example_once_and_no_two_rows_could_be_one(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = sorted(sum(lengths[i] for i in row) for row in rows)
    assert not used or used[-1] <= capacity
    assert len(used) < 2 or used[0] + used[1] > capacity


def test_the_best_fit_and_not_the_first():
    assert pack([5, 6, 3, 4], 10) == [[1, 3], [0, 2]]
    assert pack([7, 8, 2, 3], 10) == [[1, 2], [0, 3]]
    with pytest.raises(ValueError, match="example 1 has 11 tokens, more than the 10 of a row"):
        pack([3, 11], 10)


def test_a_packed_batch_to_the_letter():
    examples = [(np.array([1, 2, 3, 4]), np.array([-100, 2, 3, 4])), (np.array([5, 6, 7]), np.array([5, 6, 7]))]
    arguments, weight, tokens = collate_packed(examples, pad_token_id=9, capacity=8)
    assert arguments["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert arguments["labels"].tolist() == [[-100, 2, 3, 4, -100, 6, 7]]
    assert arguments["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    expected = np.zeros((7, 7), bool)
    expected[:4, :4] = expected[4:, 4:] = True
    np.testing.assert_array_equal(arguments["attention_mask"], expected[None, None])
    assert (weight, tokens) == (5, 7) and weight == collate(examples).weight

    examples.append((np.array([8, 8]), np.array([8, 8])))
    arguments, _, _ = collate_packed(examples, pad_token_id=9)  # rows as long as the longest: 4, and 3 beside 2 is 5
    assert arguments["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 9], [8, 8, 9, 9]]
    arguments, _, _ = collate_packed(examples, pad_token_id=9, capacity=6)
    assert arguments["input_ids"].tolist() == [[1, 2, 3, 4, 8, 8], [5, 6, 7, 9, 9, 9]]
    shorter, _, _ = collate_packed(examples, capacity=2)
    assert shorter["input_ids"].shape == (3, 4), "a row holds at least the longest example"
    assert not arguments["attention_mask"][1, :, 3:].any() and not arguments["attention_mask"][1, :, :, 3:].any()


def test_where_nothing_can_share_a_row_nothing_is_masked(rng):
    examples = counting(3, rng, shortest=6, longest=6)
    assert collate_packed(examples).arguments["attention_mask"] is None


def loss_and_gradients(model, batch, xp):
    loss = model.loss(**{k: asarray(v, xp) if v is not None else v for k, v in batch.arguments.items()})
    loss.backward()
    gradients = {n: to_numpy(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return loss.item(), gradients


@pytest.mark.parametrize("capacity", [None, 24])
@pytest.mark.parametrize("method", ["full", "lora", "prompt", "prefix"])
@pytest.mark.parametrize("dialect", ["llama", "gpt2"])
def test_packed_loss_and_gradients_are_the_unpacked_ones(xp, rng, dialect, method, capacity):
    """Against the padded batch, and against the mean over label tokens of examples taken one by one."""
    examples = counting(9, rng, prompt=3, shortest=4, longest=20)
    model = tiny_model(dialect=dialect).to(xp)
    if method != "full":
        lora = mp.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        prompt, prefix = (kind(num_virtual_tokens=3) for kind in (mp.PromptTuningConfig, mp.PrefixTuningConfig))
        model = mp.get_peft_model(model, {"lora": lora, "prompt": prompt, "prefix": prefix}[method])
    packed = collate_packed(examples, 0, capacity)
    assert len(packed.arguments["input_ids"]) < 9 and packed.arguments["attention_mask"].ndim == 4
    counts = np.array([collate([example]).weight for example in examples])
    for dtype, tolerance in ((np.float32, 2e-6), (np.float64, 1e-12)):
        for p in model.parameters():
            p.data = p.data.astype(dtype)
        loss, gradients = loss_and_gradients(model, packed, xp)
        padded_loss, padded = loss_and_gradients(model, collate(examples), xp)
        apart = [loss_and_gradients(model, collate([example]), xp) for example in examples]
        mean = float(np.dot([one for one, _ in apart], counts) / counts.sum())
        assert loss == pytest.approx(padded_loss, rel=tolerance) and loss == pytest.approx(mean, rel=tolerance)
    for name, gradient in gradients.items():  # in float64: what is left is not rounding
        one_by_one = sum(share[name] * (n / counts.sum()) for (_, share), n in zip(apart, counts))
        scale = np.abs(padded[name]).max()
        assert scale > 0
        np.testing.assert_allclose(gradient, padded[name], rtol=0, atol=1e-10 * scale, err_msg=name)
        np.testing.assert_allclose(gradient, one_by_one, rtol=0, atol=1e-10 * scale, err_msg=name)


@pytest.mark.parametrize("what", ["mask", "positions"])
def test_both_the_mask_and_the_positions_matter(rng, what):
    """Without either, the loss is another: the test above would see it."""
    examples, model = counting(6, rng, shortest=4, longest=12), tiny_model()
    model.model.layers[0].self_attn.q_proj.weight.data *= 30
    batch = collate_packed(examples, capacity=24)
    right = model.loss(**batch.arguments).item()
    arguments = {**batch.arguments, {"mask": "attention_mask", "positions": "position_ids"}[what]: None}
    moved = abs(model.loss(**arguments).item() - right)
    assert moved > 1e-5 if what == "mask" else moved < 1e-5  # rotary positions are relative: an offset changes nothing
    if what == "positions":
        learned = tiny_model(dialect="gpt2")
        given, omitted = (learned.loss(**a).item() for a in (batch.arguments, arguments))
        assert abs(given - omitted) > 1e-5


@pytest.mark.parametrize("dialect", ["llama", "gpt2"])
def test_a_run_with_packing_sees_the_same_tokens_and_ends_with_the_same_weights(rng, dialect):
    examples, ends = counting(40, rng, prompt=3, shortest=5, longest=20), {}
    for packing in (False, True, 40):
        trainer, result = train(
            tiny_model(dialect=dialect), examples[:32], examples[32:], learning_rate=0.05, optim="sgd", max_steps=12,
            per_device_train_batch_size=4, packing=packing, gradient_accumulation_steps=2, eval_steps=6,
        )  # fmt: skip
        ends[packing] = (weights(trainer.model), result)
    padded, without = ends[0]
    for packed, with_packing in (ends[True], ends[40]):
        assert without.losses("tokens") == with_packing.losses("tokens")
        for key in ("loss", "grad_norm", "eval_loss"):
            np.testing.assert_allclose(without.losses(key), with_packing.losses(key), rtol=1e-5)
        for name, array in padded.items():
            np.testing.assert_allclose(packed[name], array, rtol=0, atol=2e-6, err_msg=name)


def test_a_soft_prompt_learns_the_same_labels_however_examples_are_cut(rng):
    examples = [(ids, ids) for ids in (rng.integers(3, 20, n) for n in (3, 9, 12))]
    prompted = mp.get_peft_model(tiny_model(), mp.PromptTuningConfig(num_virtual_tokens=4), seed=1)
    one, two = (mp.train.evaluate(prompted, examples, batch_size=n) for n in (1, 3))
    packed = prompted.loss(**collate_packed(examples, capacity=24).arguments).item()
    nll, tokens = mp.train.example_losses(prompted, examples)
    np.testing.assert_allclose([two, packed, nll.sum() / tokens.sum()], one, rtol=1e-6)
