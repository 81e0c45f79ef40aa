"""Mixed precision: what is rounded inside `autocast`, to what, and that nothing else changes."""

from __future__ import annotations

import threading

import models
import numpy as np
import pytest

import minipeft as mp
from minipeft import functional as F
from minipeft.autograd.autocast import DTYPES, _rounded, autocast, rounded
from minipeft.backend import to_numpy

dtypes = pytest.mark.parametrize("dtype", DTYPES)


def low(a, dtype):
    return rounded(to_numpy(a), dtype)


def leaf(xp, a, requires_grad=True):
    return mp.Tensor(xp.asarray(np.asarray(a, np.float32)), requires_grad=requires_grad)


def is_low(t, dtype):
    a = to_numpy(t.data)
    return np.array_equal(a, rounded(a, dtype))


@dtypes
def test_rounding_is_to_the_nearest_and_of_two_to_the_even_one(dtype, xp):
    place, x = {"bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype], []
    x += [1 + place / 2, 1 + 1.5 * place, 1 + 0.4999 * place, -1 - 1.5 * place, 0.0, -0.0, np.inf, -np.inf, np.nan]
    expected = [1, 1 + 2 * place, 1, -1 - 2 * place, 0.0, -0.0, np.inf, -np.inf, np.nan]
    if dtype == "float16":
        x += [65519.9, 65520, -1e6, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24, 3 * 2.0**-25]
        expected += [65504, np.inf, -np.inf, 2.0**-24, 0, 2 * 2.0**-24, 2 * 2.0**-24]
    got = to_numpy(rounded(xp.asarray(np.float32(x)), dtype))
    np.testing.assert_array_equal(got, np.float32(expected))
    assert np.array_equal(np.signbit(got[:6]), np.signbit(np.float32(x[:6])))


@dtypes
def test_every_library_rounds_to_the_same_bits(dtype, xp, rng):
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        expected = bits.astype(np.float16).astype(np.float32) if dtype == "float16" else _rounded(bits, dtype)
    got = to_numpy(rounded(xp.asarray(bits), dtype))
    np.testing.assert_array_equal(got, expected)
    pieces = xp.asarray(bits[:600].reshape(20, 30)).T  # not contiguous, and of no axes
    np.testing.assert_array_equal(to_numpy(rounded(pieces, dtype)), expected[:600].reshape(20, 30).T)
    one = rounded(xp.asarray(np.float32(1.001)), dtype)
    assert one.shape == () and one.dtype == np.float32


@dtypes
def test_a_product_is_rounded_once(dtype, xp, rng):
    x, w, b, g = (rng.standard_normal(s).astype(np.float32) for s in ((5, 16), (8, 16), (8,), (5, 8)))
    leaves = [leaf(xp, a) for a in (x, w, b)]
    with autocast(dtype):
        y = F.linear(*leaves)
    y.backward(xp.asarray(g))
    X, W, B, G = (low(a, dtype) for a in (x, w, b, g))
    exact = [X @ W.T + B, G @ W, G.T @ X, G.sum(axis=0)]
    for got, expected in zip([y.data, *(t.grad for t in leaves)], exact):
        got = to_numpy(got)
        assert got.dtype == np.float32 and np.array_equal(got, rounded(got, dtype))
        np.testing.assert_allclose(got, expected, rtol=2 ** (-7 if dtype == "bfloat16" else -10), atol=1e-5)
        assert not np.array_equal(got, expected)
    assert np.array_equal(to_numpy(leaves[1].data), w), "the weight itself is not"


@dtypes
def test_the_three_lists(dtype, xp, rng):
    x, w = leaf(xp, rng.standard_normal((4, 8))), leaf(xp, rng.standard_normal((8, 8)))
    with mp.autocast(dtype):
        h = F.linear(x, w)
        assert is_low(h, dtype) and is_low(F.silu(h), dtype) and is_low(h * h, dtype) and is_low(h * 1.1, dtype)
        assert is_low(F.reshape(h, (8, 4)) * h.reshape(8, 4), dtype)
        for wide in (F.softmax(h), F.exp(h), h.sum(axis=0), F.layer_norm(h, w[0], w[1]), h + x, F.silu(x), x * 1.1):
            assert not is_low(wide, dtype)
        assert not is_low(F.silu(F.to(h, "float32")), dtype) and is_low(F.silu(h), dtype)
        with mp.autocast(enabled=False):
            assert not is_low(F.linear(h, w), dtype)
        assert is_low(F.linear(h, w), dtype)
    with mp.autocast(dtype, device_type="cpu"):
        h = F.linear(x, w)
        assert is_low(F.softmax(h), dtype) and is_low(h.sum(axis=0), dtype) and not is_low(F.softmax(x), dtype)
    assert not is_low(F.silu(h), dtype) and not is_low(F.linear(x, w), dtype), "outside nothing is rounded"


def test_a_gradient_has_the_precision_of_its_array(xp, rng):
    """What a rounded array feeds is float32's, and yet the gradient that comes back is rounded: and here flushed."""
    x, w = leaf(xp, np.ones((2, 2))), leaf(xp, np.eye(2))
    for factor, expected in ((1e-9, 0.0), (2.0**-24, 2.0**-23)):
        x.grad = w.grad = None
        with autocast("float16"):
            loss = (F.linear(x, w).sum() * factor).sum()  # float32's: the sum's list
        loss.backward()
        assert to_numpy(w.grad).tolist() == [[expected, expected]] * 2
    with autocast("bfloat16"):
        loss = (F.linear(x, w).sum() * 1e-9).sum()
    x.grad = w.grad = None
    loss.backward()
    assert to_numpy(w.grad) == pytest.approx(2e-9, rel=0.01)


@dtypes
def test_attentions_of_padded_rows_are_numbers(dtype):
    model, ids = mp.Transformer(models.config("llama"), seed=1), models.tokens(np.random.default_rng(0), 2, 5)
    mask = np.array([[0, 0, 1, 1, 1], [1] * 5])
    with mp.no_grad(), autocast(dtype):
        logits, attentions = model(ids, mask, output_attentions=True)
    assert all(np.isfinite(P.data).all() for P in attentions) and np.isfinite(logits.data).all()


def test_a_choice_between_numbers_is_rounded_as_they_are():
    twos = mp.Tensor(np.full((2, 2), 2.0, "f"))
    with autocast("float16"):
        chosen = F.where(np.eye(2, dtype=bool), twos @ twos, -1e9)
        assert chosen.data.tolist() == [[8, -np.inf], [-np.inf, 8]]
    with autocast("bfloat16"):
        assert F.where(np.eye(2, dtype=bool), twos @ twos, 0.3).data.min() == np.float32(0.30078125)


def test_overflow_is_infinite_and_bfloat16s_range_is_float32s(xp):
    x, w = leaf(xp, [[300.0, 300.0]]), leaf(xp, [[300.0, 300.0]])
    with autocast("float16"):
        assert np.isinf(to_numpy(F.linear(x, w).data)).all()
    with autocast("bfloat16"):
        assert to_numpy(F.linear(x, w).data).item() == pytest.approx(180_000, rel=2**-8)


@dtypes
@pytest.mark.parametrize("dialect", models.DIALECTS)
def test_a_model_as_a_whole(dialect, dtype, xp, rng):
    """Loss and gradients are those of float32 up to rounding, and the head's fused loss is its two ops."""
    model = mp.Transformer(models.config(dialect), seed=1).to(xp)
    ids = xp.asarray(models.tokens(rng, 2, 8))
    exact = model.copy()
    exact.loss(ids, ids).backward()
    with autocast(dtype):
        loss = model.loss(ids, ids)
        logits = model(ids)
    loss.backward()
    assert is_low(logits, dtype)
    expected = F.cross_entropy(logits[:, :-1], to_numpy(ids)[:, 1:] if xp is np else ids[:, 1:])
    assert float(loss.item()) == pytest.approx(float(expected.item()), rel=1e-5)
    for (name, p), (_, q) in zip(model.named_parameters(), exact.named_parameters()):
        a, b = to_numpy(p.grad), to_numpy(q.grad)
        assert p.grad.dtype == np.float32
        assert 0 < np.linalg.norm(a - b) < (0.1 if dtype == "bfloat16" else 0.02) * np.linalg.norm(b), name


def test_gradient_checkpointing_rounds_again_in_backward(rng):
    """The blocks are computed again after the `with`: as they were inside, so the gradients have the same bits."""
    ids, found = models.tokens(rng, 2, 8), []
    for checkpointing in (False, True):
        model = mp.Transformer(models.config("llama"), seed=1)
        model.gradient_checkpointing_enable() if checkpointing else None
        with autocast("bfloat16"):
            loss = model.loss(ids, ids)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        np.testing.assert_array_equal(gradient, found[1][name], err_msg=name)


def test_a_broadcast_gradient_is_summed_and_then_rounded(rng):
    x, b = leaf(np, rng.standard_normal((64, 8))), leaf(np, rng.standard_normal(8))
    with autocast("bfloat16"):
        y = F.matmul(x, np.eye(8, dtype=np.float32)) + F.matmul(b, np.eye(8, dtype=np.float32))
    g = low(rng.standard_normal((64, 8)).astype(np.float32), "bfloat16")
    y.backward(g)
    np.testing.assert_array_equal(b.grad, low(low(g.sum(axis=0), "bfloat16"), "bfloat16"))
    np.testing.assert_array_equal(x.grad, g)


def test_the_two_inputs_of_a_sum_do_not_share_a_gradient(rng):
    """Each reader adds into the gradients that it owns: one array for both would be added to twice."""
    x, eye = leaf(np, rng.standard_normal((4, 4))), np.eye(4, dtype=np.float32)
    with autocast("float16"):
        a, b = F.matmul(x, eye), F.matmul(x * 2.0, eye)
        y = (a + b) + (a * 1.0) + (b * 1.0)
    y.backward(np.ones((4, 4), np.float32))
    np.testing.assert_array_equal(x.grad, np.full((4, 4), 6.0))


def test_float64_integers_and_other_threads_are_left_alone(rng):
    x, seen = rng.standard_normal((3, 3)), []
    with autocast("bfloat16"):
        assert np.array_equal(F.matmul(mp.Tensor(x), x).data, x @ x)
        assert F.matmul(mp.Tensor(np.arange(4).reshape(2, 2)), np.arange(4).reshape(2, 2)).dtype.kind == "i"
        thread = threading.Thread(target=lambda: seen.append(F.matmul(leaf(np, x), np.float32(x)).data))
        thread.start()
        thread.join()
    np.testing.assert_array_equal(seen[0], np.float32(x) @ np.float32(x))


def test_it_ends_with_its_block_even_by_an_error(rng):
    x = leaf(np, rng.standard_normal((3, 3)))
    with pytest.raises(ZeroDivisionError), autocast("float16"):
        1 / 0  # noqa: B018
    assert not is_low(F.matmul(x, x), "float16")

    @mp.autocast("float16")
    def product():
        return F.matmul(x, x)

    assert is_low(product(), "float16")


def test_wrong_names_are_refused():
    for arguments in (("int8",), ("float32",), ("bfloat16", True, "tpu")):
        with pytest.raises(ValueError, match="autocast takes a dtype of bfloat16, float16"), autocast(*arguments):
            pass
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, got 'half'"):
        rounded(np.ones(1, np.float32), "half")


def test_the_ledger_counts_as_before_inside():
    base, _ = mp.load_base()
    before = mp.accounting.memory_ledger(base, batch=1, seq_len=8).total
    with autocast("bfloat16"):
        assert mp.accounting.memory_ledger(base, batch=1, seq_len=8).total == before


@pytest.mark.parametrize("frozen", ["float32", "float16", "nf4"])
def test_adapters_in_either_dtype(frozen, rng):
    """LoRA, over a base stored in sixteen or four bits too: each product rounds, the adapter's gradients are float32.

    Their error is proportional to that of one rounding: bfloat16's, 2^-8, is eight times float16's.
    """
    base = mp.Transformer(models.config("llama", hidden_size=64, initializer_range=0.1), seed=1)
    base = mp.quant.quantize_model(base) if frozen == "nf4" else base
    for p in base.parameters() if frozen == "float16" else ():
        p.data = p.data.astype(np.float16)
    model = mp.get_peft_model(base, mp.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    batches, gradients = [models.tokens(rng, 2, 8) for _ in range(4)], {}
    for dtype in (None, *DTYPES):
        found = []
        for ids in batches:
            model.zero_grad()
            with autocast(dtype or "bfloat16", enabled=dtype is not None):
                model.loss(ids, ids).backward()
            found += [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g.dtype == np.float32 for g in found)
        gradients[dtype] = np.concatenate([g.ravel() for g in found])
    bfloat16, float16 = (np.linalg.norm(gradients[d] - gradients[None]) / np.linalg.norm(gradients[None]) for d in DTYPES)
    assert 2.0**-11 < float16 and 4 < bfloat16 / float16 < 16
