"""Optimizers: the equations, blocks that do not show, state, groups, what is refused (PyTorch: tests/oracles)."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from minipeft.backend import get_num_threads, set_num_threads, to_numpy
from minipeft.nn import Parameter
from minipeft.train import SGD, Adam, AdamW, NonFiniteGradient, clip_grad_norm
from minipeft.train.kernels import pack

SHAPES = [(400, 330), (5,), (), (0, 3), (7, 2), (1,)]  # several blocks; a shared block; empty and size-one axes


def parameters(xp, rng, shapes=SHAPES, dtype=np.float32):
    return [Parameter(xp.asarray(rng.standard_normal(shape).astype(dtype))) for shape in shapes]


def give_gradients(xp, rng, params):
    for p in params:
        p.grad = xp.asarray(rng.standard_normal(p.shape).astype(np.float32)).astype(p.dtype)


def values(params):
    return [to_numpy(p.data).copy() for p in params]


def adamw_by_hand(theta, grads, lr, b1, b2, eps, decay):
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        theta = theta - lr * decay * theta
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        theta = theta - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return theta


def test_adamw_is_its_equation_for_every_shape_and_block(xp, rng):
    params = parameters(xp, rng, dtype=np.float64)
    start, grads = values(params), []
    optimizer = AdamW(params, lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    for _ in range(4):
        give_gradients(xp, rng, params)
        grads.append([to_numpy(p.grad).copy() for p in params])
        optimizer.step()
    for i, p in enumerate(params):
        expected = adamw_by_hand(start[i], [g[i] for g in grads], 0.01, 0.8, 0.95, 1e-3, 0.1)
        np.testing.assert_allclose(to_numpy(p.data), expected, rtol=1e-12, atol=1e-13)


def test_sgd_is_its_equation(xp, rng):
    params = parameters(xp, rng, dtype=np.float64)
    optimizer = SGD(params, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01)
    theta, buffer = values(params)[0], None
    for _ in range(3):
        give_gradients(xp, rng, params)
        g = to_numpy(params[0].grad) + 0.01 * theta
        buffer = g if buffer is None else 0.9 * buffer + 0.7 * g
        theta = theta - 0.1 * buffer
        optimizer.step()
    np.testing.assert_allclose(to_numpy(params[0].data), theta, rtol=1e-12)


def test_one_large_parameter_and_its_pieces_get_the_same_bytes(xp, rng):
    whole = Parameter(xp.asarray(rng.standard_normal(140_000, np.float32)))
    cuts = [0, 3, 20_000, 20_001, 120_000, 140_000]
    pieces = [Parameter(whole.data[a:b].copy()) for a, b in pairwise(cuts)]
    one, many = AdamW([whole]), AdamW(pieces)
    for _ in range(3):
        give_gradients(xp, rng, [whole])
        for p, (a, b) in zip(pieces, pairwise(cuts)):
            p.grad = whole.grad[a:b].copy()
        one.step()
        many.step()
    np.testing.assert_array_equal(np.concatenate(values(pieces)), values([whole])[0])


def test_blocks_cover_every_element_once():
    blocks = pack([10, 0, 3, 4, 25, 1], 8)
    assert all(sum(stop - start for _, start, stop in block) <= 8 for block in blocks)
    seen = [(i, k) for block in blocks for i, start, stop in block for k in range(start, stop)]
    assert seen == [(i, k) for i, n in enumerate([10, 0, 3, 4, 25, 1]) for k in range(n)]


def test_the_number_of_threads_does_not_change_a_byte(rng):
    before, results = get_num_threads(), []
    start, grad = rng.standard_normal(300_000, np.float32), rng.standard_normal(300_000, np.float32)
    try:
        for threads in (1, 2, 3):
            set_num_threads(threads)
            p = Parameter(start.copy())
            p.grad = grad.copy()
            norm = clip_grad_norm([p], 1.0)
            AdamW([p]).step()
            results.append((norm, p.data.tobytes()))
    finally:
        set_num_threads(before)
    assert results[0] == results[1] == results[2]


def test_only_parameters_that_require_gradients_and_have_one_are_written(xp, rng):
    moved, frozen, unused = parameters(xp, rng, [(4, 4)] * 3)
    frozen.requires_grad = False
    give_gradients(xp, rng, [moved, frozen])
    arrays, before = [p.data for p in (moved, frozen, unused)], values([moved, frozen, unused])
    optimizer = AdamW([moved, frozen, unused], weight_decay=0.5)
    optimizer.step()
    after = values([moved, frozen, unused])
    assert (after[0] != before[0]).all()
    np.testing.assert_array_equal(after[1:], before[1:])
    assert moved.data is arrays[0], "the update is in place"
    assert set(optimizer.state) == {moved}


def test_a_parameter_that_joins_later_starts_at_its_own_first_step(xp, rng):
    early, late, alone = parameters(xp, rng, [(3, 5)] * 3)
    alone.data = late.data.copy()
    optimizer, reference = AdamW([early, late]), AdamW([alone])
    give_gradients(xp, rng, [early])
    optimizer.step()
    for _ in range(3):
        give_gradients(xp, rng, [early, late])
        alone.grad = late.grad.copy()
        optimizer.step()
        reference.step()
    np.testing.assert_array_equal(values([late]), values([alone]))
    assert [optimizer.state[p]["step"] for p in (early, late)] == [4, 3]


def test_a_parameter_whose_memory_is_transposed_is_updated_in_place(xp, rng):
    memory = rng.standard_normal((30, 20), np.float32)
    turned, plain = Parameter(xp.asarray(memory).T), Parameter(xp.asarray(memory.T.copy()))
    optimizer, reference = AdamW([turned]), AdamW([plain])
    for _ in range(2):
        give_gradients(xp, rng, [plain])
        turned.grad = plain.grad.T.copy().T
        clip_grad_norm([turned], 0.1)
        clip_grad_norm([plain], 0.1)
        optimizer.step()
        reference.step()
    np.testing.assert_allclose(to_numpy(turned.data), to_numpy(plain.data), rtol=1e-5, atol=1e-7)
    assert not turned.data.flags.c_contiguous


def test_groups_have_their_own_options(xp, rng):
    fast, slow = parameters(xp, rng, [(3,), (3,)])
    give_gradients(xp, rng, [fast, slow])
    before = values([fast, slow])
    optimizer = SGD([{"params": [fast], "lr": 0.5}, {"params": slow}], lr=0.25)
    optimizer.step()
    for p, old, lr in zip((fast, slow), before, (0.5, 0.25)):
        np.testing.assert_allclose(to_numpy(p.data), old - lr * to_numpy(p.grad), rtol=1e-6)
    optimizer.zero_grad()
    assert fast.grad is None and slow.grad is None


def test_options_may_be_numbers_of_numpy(rng):
    """Also those that a schedule of one's own writes into the groups: nothing becomes float64, all can be saved."""
    ends = []
    for kind in (float, np.float64, np.float32):
        p = Parameter(np.linspace(-1, 1, 6, dtype=np.float32))
        optimizer = AdamW([{"params": p, "lr": kind(0.25)}], betas=(kind(0.5), kind(0.75)), weight_decay=kind(0.125))
        json.dumps({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
        for step in range(2):
            optimizer.param_groups[0]["lr"] = kind(0.5**step)
            p.grad = np.linspace(3, 4, 6, dtype=np.float32)
            optimizer.step()
        ends.append(p.data.tobytes())
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.01), lambda p: SGD(p, lr=0.1, momentum=0.9)])
def test_state_goes_through_json_and_arrays_and_training_goes_on_with_the_same_bytes(xp, rng, make):
    first, twin = parameters(xp, rng), parameters(xp, rng)
    optimizer = make(first)
    give_gradients(xp, rng, first)
    optimizer.step()
    saved = optimizer.state_dict()
    scalars = json.loads(json.dumps({**saved, "state": {i: {"step": e["step"]} for i, e in saved["state"].items()}}))
    for i, entry in saved["state"].items():
        scalars["state"][str(i)].update({k: to_numpy(v).copy() for k, v in entry.items() if k != "step"})
    for p, q in zip(first, twin):
        q.data = p.data.copy()
    other = make(twin)
    other.param_groups[0]["lr"] = 123.0
    other.load_state_dict(scalars)
    for _ in range(2):
        give_gradients(xp, rng, first)
        for p, q in zip(first, twin):
            q.grad = p.grad.copy()
        optimizer.step()
        other.step()
    for a, b in zip(values(first), values(twin)):
        np.testing.assert_array_equal(a, b)


def test_a_state_of_other_parameters_is_refused(rng):
    one, other = parameters(np, rng, [(2, 3)]), parameters(np, rng, [(3, 2)])
    give_gradients(np, rng, one)
    optimizer = Adam(one)
    optimizer.step()
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(2, 3\), the parameter \(3, 2\)"):
        Adam(other).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"groups with \[1\] parameters, this optimizer has \[2\]"):
        Adam([*one, *other]).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="options"):
        SGD(one).load_state_dict(optimizer.state_dict())


def test_misuse_is_named(rng):
    p = Parameter(np.zeros(3, np.float32))
    half = Parameter(np.zeros((2, 2), np.float16))
    unloaded = Parameter(np.broadcast_to(np.float32(0), (4,)))
    with pytest.raises(ValueError, match="no parameters"):
        AdamW([])
    with pytest.raises(TypeError, match=r"write \[parameter\]"):
        AdamW(p)
    with pytest.raises(TypeError, match="given a ndarray"):
        AdamW([p.data])
    with pytest.raises(ValueError, match="more than once"):
        AdamW([p, p])
    with pytest.raises(ValueError, match="no option 'rate'; it has lr"):
        AdamW([{"params": [p], "rate": 1}])
    with pytest.raises(ValueError, match=r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"):
        AdamW([p], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="lr must not be negative, got -1"):
        AdamW([p], lr=-1)
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        SGD([p], nesterov=True)
    with pytest.raises(TypeError, match=r"head.weight of shape .* float16"):
        AdamW([("head.weight", half)])
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .* not allocated"):
        AdamW([unloaded])
    optimizer = AdamW([("bias", p)])
    p.grad = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"bias has the shape \(3,\), its gradient \(2,\)"):
        optimizer.step()


def test_clipping_scales_to_the_norm_and_leaves_what_is_below(xp, rng):
    params = parameters(xp, rng)
    give_gradients(xp, rng, params)
    flat = np.concatenate([to_numpy(p.grad).ravel().astype(np.float64) for p in params])
    norm = float(np.sqrt((flat**2).sum()))
    assert clip_grad_norm(params, math.inf) == pytest.approx(norm, rel=1e-6)
    assert clip_grad_norm(params, norm * 2) == pytest.approx(norm, rel=1e-6)
    np.testing.assert_array_equal(np.concatenate([to_numpy(p.grad).ravel() for p in params]), flat)
    clip_grad_norm(params, 0.5)
    clipped = np.concatenate([to_numpy(p.grad).ravel() for p in params])
    np.testing.assert_allclose(clipped, flat * 0.5 / norm, rtol=1e-5)
    assert clip_grad_norm([Parameter(np.zeros(2, np.float32))], 1.0) == 0.0


def test_clipping_names_the_gradient_that_is_not_finite_and_scales_nothing(xp, rng):
    good, bad = parameters(xp, rng, [(3,), (2, 2)])
    give_gradients(xp, rng, [good, bad])
    bad.grad[0, 1] = math.nan
    before = to_numpy(good.grad).copy()
    with pytest.raises(NonFiniteGradient, match=r"the gradient of mlp.weight has 1 of 4 elements") as error:
        clip_grad_norm([("mlp.bias", good), ("mlp.weight", bad)], 1e-3)
    assert error.value.name == "mlp.weight"
    np.testing.assert_array_equal(to_numpy(good.grad), before)


def test_a_norm_beyond_float32_is_still_a_norm(xp):
    p = Parameter(xp.asarray(np.zeros(4, np.float32)))
    p.grad = xp.asarray(np.full(4, 1e25, np.float32))
    assert clip_grad_norm([p], 1.0) == pytest.approx(2e25, rel=1e-6)
    np.testing.assert_allclose(to_numpy(p.grad), 0.5, rtol=1e-5)
