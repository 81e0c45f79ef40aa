"""Optimizers: the equations, pieces that do not show, state, groups, what is refused (PyTorch: tests/oracles)."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest

import minipeft as mp
from minipeft.backend import to_numpy
from minipeft.nn import Parameter
from minipeft.quant.codebooks import dynamic_map
from minipeft.train import SGD, Adam, AdamW, AdamW8bit, NonFiniteGradient, clip_grad_norm
from minipeft.train.finite import Finite
from minipeft.train.kernels import pack

SHAPES = [(400, 330), (5,), (), (0, 3), (7, 2), (1,)]  # several pieces; a shared block; empty and size-one axes


def parameters(xp, rng, shapes=SHAPES, dtype=np.float32):
    return [Parameter(xp.asarray(rng.standard_normal(shape).astype(dtype))) for shape in shapes]


def give_gradients(xp, rng, params, *twins):
    """New gradients, and copies of them for each list of twins."""
    for i, p in enumerate(params):
        p.grad = xp.asarray(rng.standard_normal(p.shape).astype(np.float32)).astype(p.dtype)
        for twin in twins:
            twin[i].grad = p.grad.copy()


def values(params):
    return [to_numpy(p.data).copy() for p in params]


def assert_equal(params, others):
    for a, b in zip(values(params), values(others), strict=True):
        np.testing.assert_array_equal(a, b)


def adamw_by_hand(theta, grads):
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        theta = theta - 0.01 * 0.1 * theta
        m, v = 0.8 * m + (1 - 0.8) * g, 0.95 * v + (1 - 0.95) * g * g
        theta = theta - 0.01 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
    return theta


def sgd_by_hand(theta, grads):
    buffer = None
    for g in grads:
        g = g + 0.01 * theta
        buffer = g if buffer is None else 0.9 * buffer + 0.7 * g
        theta = theta - 0.1 * buffer
    return theta


@pytest.mark.parametrize(
    "kind, by_hand, options",
    [
        (AdamW, adamw_by_hand, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
        (SGD, sgd_by_hand, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ],
)
def test_an_optimizer_is_its_equation_for_every_shape_and_piece(xp, rng, kind, by_hand, options):
    params = parameters(xp, rng, dtype=np.float64)
    start, grads, optimizer = values(params), [], kind(params, **options)
    for _ in range(4):
        give_gradients(xp, rng, params)
        grads.append([to_numpy(p.grad).copy() for p in params])
        optimizer.step()
    for i, p in enumerate(params):
        expected = by_hand(start[i], [g[i] for g in grads])
        np.testing.assert_allclose(to_numpy(p.data), expected, rtol=1e-12, atol=1e-13)


def test_neither_threads_nor_the_cut_into_parameters_change_a_byte(xp, rng, threads):
    n, ends = 300_000, set()
    start, grad = (xp.asarray(x) for x in rng.standard_normal((2, n), np.float32))
    for count, cuts in ((1, [0, n]), (2, [0, n]), (3, [0, n]), (2, [0, 3, 20_000, 20_001, 120_000, n])):
        threads(count)
        whole = Parameter(start)
        whole.grad = grad.copy()
        norm, pieces = clip_grad_norm([whole], 1.0), [Parameter(start[a:b].copy()) for a, b in pairwise(cuts)]
        for p, (a, b) in zip(pieces, pairwise(cuts)):
            p.grad = whole.grad[a:b].copy()
        optimizer = AdamW(pieces)
        for _ in range(3):
            optimizer.step()
        ends.add((norm, np.concatenate(values(pieces)).tobytes()))
    assert len(ends) == 1


def test_blocks_cover_every_element_once():
    assert pack([0], 8) == [] and pack([0, 3], 8) == [[(1, 0, 3)]]
    blocks = pack([10, 0, 3, 4, 25, 1], 8)
    assert all(sum(stop - start for _, start, stop in block) <= 8 for block in blocks)
    seen = [(i, k) for block in blocks for i, start, stop in block for k in range(start, stop)]
    assert seen == [(i, k) for i, n in enumerate([10, 0, 3, 4, 25, 1]) for k in range(n)]


def test_only_parameters_that_require_gradients_and_have_one_are_written(xp, rng):
    moved, frozen, unused = params = parameters(xp, rng, [(4, 4)] * 3)
    frozen.requires_grad = False
    give_gradients(xp, rng, [moved, frozen])
    array, before = moved.data, values(params)
    optimizer = AdamW(params, weight_decay=0.5)
    optimizer.step()
    assert (values([moved])[0] != before[0]).all()
    np.testing.assert_array_equal(values([frozen, unused]), before[1:])
    assert moved.data is array, "the update is in place"
    assert set(optimizer.state) == {moved}


def test_a_parameter_that_joins_later_starts_at_its_own_first_step(xp, rng):
    early, late = parameters(xp, rng, [(3, 5)] * 2)
    alone = Parameter(late.data.copy())
    optimizer, reference = AdamW([early, late]), AdamW([alone])
    give_gradients(xp, rng, [early])
    optimizer.step()
    for _ in range(3):
        give_gradients(xp, rng, [late, early], [alone, early])
        optimizer.step()
        reference.step()
    assert_equal([late], [alone])
    assert [optimizer.state[p]["step"] for p in (early, late)] == [4, 3]


@pytest.mark.parametrize(
    "kind, options",
    [
        (AdamW, {"weight_decay": 0.1}), (Adam, {"weight_decay": 0.1}), (SGD, {"weight_decay": 0.1}), (AdamW8bit, {"min_8bit_size": 64}),
        (SGD, {"momentum": 0.9, "dampening": 0.2}), (SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)  # fmt: skip
def test_on_every_device_the_update_is_numpys(xp, rng, kind, options):
    """Of all parameters in one launch, and of those that none takes: of another step, dtype or layout, or without a gradient."""
    here = [*parameters(np, rng), *parameters(np, rng, [(4, 3)], np.float64), *parameters(np, rng, [(6, 5)] * 3)]
    here[-3].data, here[-2].requires_grad = here[-3].data.T, False
    there = [Parameter(xp.asarray(p.data.copy()), requires_grad=p.requires_grad) for p in here]
    there[-3].data = xp.asarray(here[-3].data.T.copy()).T
    optimizers = [kind(params, lr=0.01, **options) for params in (here, there)]
    for step in range(4):
        give_gradients(np, rng, here)
        here[-1].grad = None if step == 1 else here[-1].grad
        for p, twin in zip(here, there):
            twin.grad = None if p.grad is None else xp.asarray(p.grad.copy())
        norms = [clip_grad_norm(params, 5.0) for params in (here, there)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    for p, twin in zip(here, there):
        np.testing.assert_allclose(to_numpy(twin.data), p.data, rtol=2e-5, atol=2e-6)
    assert [s["step"] for s in optimizers[1].state.values()] == [s["step"] for s in optimizers[0].state.values()]


@pytest.mark.parametrize(
    "kind, options", [(AdamW, {}), (SGD, {}), (SGD, {"momentum": 0.9}), (AdamW8bit, {"min_8bit_size": 64})]
)
def test_a_step_whose_numbers_are_not_finite_changes_nothing(xp, rng, kind, options):
    """Neither in the first step nor in a later one; what follows is as if it had not been."""
    params, twins = parameters(xp, rng), parameters(xp, np.random.default_rng(0))
    for p, twin in zip(params, twins):
        twin.data = p.data.copy()
    optimizers = [kind(found, **options) for found in (params, twins)]
    for last in (3.0, np.nan, 4.0, np.inf, -np.inf, 5.0):
        give_gradients(xp, rng, params)
        before = values(params)
        finite = Finite([xp.asarray(n) for n in (1.0, last)], [xp.asarray([np.nan, 7])])
        optimizers[0].step(finite)
        assert bool(finite) == np.isfinite(last) and finite.numbers[2][1] == 7
        if finite:
            for p, twin in zip(params, twins):
                twin.grad = p.grad
            optimizers[1].step()
            assert any((a != b).any() for a, b in zip(values(params), before))
        for a, b in zip(values(params), values(twins)):
            np.testing.assert_array_equal(a, b)
    states = [{name: to_numpy(xp.asarray(v)) for s in o.state.values() for name, v in s.items()} for o in optimizers]
    for name, state in states[1].items():
        np.testing.assert_array_equal(states[0][name], state)


def test_a_parameter_whose_memory_is_transposed_is_updated_in_place(xp, rng):
    memory = rng.standard_normal((30, 20), np.float32)
    turned, plain = Parameter(xp.asarray(memory).T), Parameter(xp.asarray(memory.T.copy()))
    optimizers = AdamW([turned]), AdamW([plain])
    for _ in range(2):
        give_gradients(xp, rng, [plain])
        turned.grad = plain.grad.T.copy().T
        for p, optimizer in zip((turned, plain), optimizers):
            clip_grad_norm([p], 0.1)
            optimizer.step()
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


def test_options_may_be_numbers_of_numpy():
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


@pytest.mark.parametrize(
    "make", [lambda p: AdamW(p, lr=0.01), lambda p: AdamW8bit(p, lr=0.01), lambda p: SGD(p, lr=0.1, momentum=0.9)]
)
def test_state_goes_through_json_and_arrays_and_training_goes_on_with_the_same_bytes(xp, rng, make):
    first = parameters(xp, rng)
    optimizer = make(first)
    give_gradients(xp, rng, first)
    optimizer.step()
    saved = optimizer.state_dict()
    scalars = json.loads(json.dumps({**saved, "state": {i: {"step": e["step"]} for i, e in saved["state"].items()}}))
    for i, entry in saved["state"].items():
        scalars["state"][str(i)].update({k: to_numpy(v).copy() for k, v in entry.items() if k != "step"})
    twin = [Parameter(p.data.copy()) for p in first]
    other = make(twin)
    other.param_groups[0]["lr"] = 123.0
    other.load_state_dict(scalars)
    for _ in range(2):
        give_gradients(xp, rng, first, twin)
        optimizer.step()
        other.step()
    assert_equal(first, twin)


def test_a_state_of_other_parameters_is_refused(rng):
    one, other = parameters(np, rng, [(2, 3)]), parameters(np, rng, [(3, 2)])
    give_gradients(np, rng, one)
    optimizer = Adam(one)
    optimizer.step()
    for match, wrong in {
        r"exp_avg of parameter 0 has shape \(2, 3\), not \(3, 2\)": Adam(other),
        r"groups with \[1\] parameters, this optimizer has \[2\]": Adam([*one, *other]),
        "options": SGD(one),
    }.items():
        with pytest.raises(ValueError, match=match):
            wrong.load_state_dict(optimizer.state_dict())


def test_misuse_is_named():
    p, half = Parameter(np.zeros(3, np.float32)), Parameter(np.zeros((2, 2), np.float16))
    unloaded = Parameter(np.broadcast_to(np.float32(0), (4,)))
    for error, match, make in (
        (ValueError, "no parameters", lambda: AdamW([])),
        (TypeError, r"write \[parameter\]", lambda: AdamW(p)),
        (TypeError, "given a ndarray", lambda: AdamW([p.data])),
        (ValueError, "more than once", lambda: AdamW([p, p])),
        (ValueError, "more than once", lambda: AdamW([{"params": p}, {"params": [p]}])),
        (ValueError, "no option 'rate'; it has lr", lambda: AdamW([{"params": [p], "rate": 1}])),
        (ValueError, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)", lambda: AdamW([p], betas=(0.9, 1.0))),
        (ValueError, r"betas must be two numbers, got \(0.9,\)", lambda: AdamW([p], betas=(0.9,))),
        (ValueError, "betas must be two numbers, got 0.9", lambda: AdamW([p], betas=0.9)),
        (ValueError, "lr must not be negative, got -1", lambda: AdamW([p], lr=-1)),
        (ValueError, "lr must be a number, got None", lambda: AdamW([p], lr=None)),
        (ValueError, "a dictionary with 'params'; this one has lr", lambda: AdamW([{"lr": 1}])),
        (TypeError, "a set has none: give a list", lambda: AdamW({p})),
        (ValueError, "dampening must not be negative, got -1", lambda: SGD([p], dampening=-1)),
        (ValueError, "nesterov needs a momentum", lambda: SGD([p], nesterov=True)),
        (TypeError, r"head.weight of shape .* float16", lambda: AdamW([("head.weight", half)])),
        (ValueError, r"parameter 0 of group 0 .* not allocated", lambda: AdamW([unloaded])),
    ):
        with pytest.raises(error, match=match):
            make()
    p.grad = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"bias has the shape \(3,\), its gradient \(2,\)"):
        AdamW([("bias", p)]).step()


def test_eight_bit_moments_are_the_codes_nearest_to_adams(xp, rng):
    """After each step: m and v of the step, computed from the stored ones in float64, and the nearest of 256 points."""
    n = 3 * 65536 + 1000  # several pieces, the last block not full
    p = Parameter(xp.asarray(rng.standard_normal(n, np.float32)))
    optimizer, zero = AdamW8bit([p], lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1), np.zeros(n)
    m, v, expected = zero, zero, to_numpy(p.data).astype(np.float64)
    for t in (1, 2, 3):
        p.grad = xp.asarray(rng.standard_normal(n, np.float32) ** 3)
        g = to_numpy(p.grad).astype(np.float64)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        expected = (1 - 0.001) * expected - 0.01 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
        optimizer.step()
        np.testing.assert_allclose(to_numpy(p.data), expected, rtol=0, atol=1e-6)
        expected, state, moments = to_numpy(p.data).astype(np.float64), optimizer.state[p], []
        for x, k, q in ((m, 1, dynamic_map()), (v, 2, dynamic_map(signed=False))):
            codes, absmax = (to_numpy(state[f"{name}{k}"]) for name in ("state", "absmax"))
            blocks = np.pad(x, (0, -n % 256)).reshape(-1, 256)
            np.testing.assert_allclose(absmax, np.abs(blocks).max(axis=1), rtol=1e-6)
            values, c = q[codes].astype(np.float64), absmax.repeat(256)[:n]
            neighbors = np.stack([q[np.maximum(codes, 1) - 1], q[np.minimum(codes, 254) + 1]])
            grid = 2 / 65535  # which x / c is rounded to first
            assert (abs(values - x / c) <= abs(neighbors - x / c).min(axis=0) + grid).all()
            moments.append(values * c)
        m, v = moments


def test_eight_bits_train_as_well_as_thirty_two(rng):
    """Least squares: the way that both go, and where they end."""
    A, target, ends = rng.standard_normal((256, 128)).astype(np.float32), rng.standard_normal((256, 64)), {}
    for kind in (AdamW, AdamW8bit):
        p = Parameter(np.zeros((128, 64), np.float32))
        optimizer = kind([p], lr=0.01)
        for _ in range(150):
            residual = A @ p.data - target
            p.grad = (A.T @ residual).astype(np.float32)
            optimizer.step()
        ends[kind] = (residual**2).mean()
    best = ((A @ np.linalg.lstsq(A, target)[0] - target) ** 2).mean()
    assert ends[AdamW8bit] - best < 0.02 * (target**2).mean() and abs(ends[AdamW8bit] - ends[AdamW]) < 0.01


def test_eight_bit_states_take_two_bytes_a_number_and_small_ones_stay_float32(xp, rng):
    params = parameters(xp, rng, [(64, 66), (63, 65)])
    give_gradients(xp, rng, params)
    optimizer = AdamW8bit(params)
    optimizer.step()
    described = [{k: (a.dtype.name, a.shape) for k, a in optimizer.state[p].items() if k != "step"} for p in params]
    codes, scales, whole = ("uint8", (64, 66)), ("float32", (17,)), ("float32", (63, 65))
    assert described[0] == {"state1": codes, "state2": codes, "absmax1": scales, "absmax2": scales}
    assert described[1] == {"state1": whole, "state2": whole}
    whole = AdamW8bit([{"params": params, "min_8bit_size": 5000}])
    with pytest.raises(ValueError, match=r"the state of parameter 0 holds .*'absmax1'.*, not step, state1, state2$"):
        whole.load_state_dict({**whole.state_dict(), "state": optimizer.state_dict()["state"]})


def test_threads_change_no_byte_of_eight_bit_moments(rng, threads):
    start, grad, ends = *rng.standard_normal((2, 300_001), np.float32), set()
    for count in (1, 2, 3):
        threads(count)
        p = Parameter(start.copy())
        p.grad, optimizer = grad, AdamW8bit([p])
        for _ in range(3):
            optimizer.step()
        ends.add((p.data.tobytes(), *(a.tobytes() for k, a in optimizer.state[p].items() if k != "step")))
    assert len(ends) == 1


def test_a_gradient_that_is_nan_spreads_in_8_bits_as_far_as_its_block(rng, xp):
    """As in AdamW, whose element alone is NaN from then on; the block's scale is NaN, so its neighbors follow a step on."""
    start, grad = rng.standard_normal((2, 2048)).astype(np.float32), rng.standard_normal((2, 2048)).astype(np.float32)
    grad[0, 300] = np.nan
    found = {}
    for kind in (AdamW, AdamW8bit):
        p = Parameter(xp.asarray(start.copy()))
        optimizer, found[kind] = kind([p], lr=0.01), []
        for g in (grad, np.nan_to_num(grad)):
            p.grad = xp.asarray(g)
            optimizer.step()
            found[kind].append(np.flatnonzero(~np.isfinite(to_numpy(p.data))).tolist())
    assert found[AdamW] == [[300], [300]] and found[AdamW8bit] == [[300], list(range(256, 512))]


def test_loraplus_gives_b_a_rate_of_its_own(rng):
    model, _ = mp.load_base()
    saved = ["layers.0.mlp.up_proj", "layers.1.input_layernorm"]
    config = mp.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], modules_to_save=saved)
    adapted = mp.get_peft_model(model, config)
    groups = mp.optim.loraplus_groups(adapted, 1e-3, 16, weight_decay=0.1, loraplus_lr_embedding=1e-5)
    kinds = [(g["lr"], g["weight_decay"], {name.rsplit(".", 1)[1] for name, _ in g["params"]}) for g in groups]
    assert kinds == [
        (1e-3, 0.1, {"lora_A", "weight"}),
        (1e-5, 0.1, {"lora_embedding_A", "lora_embedding_B"}),
        (16e-3, 0.1, {"lora_B"}),
        (16e-3, 0.0, {"weight"}),
    ]
    held = [name for group in groups for name, _ in group["params"]]
    assert sorted(held) == sorted(n for n, p in adapted.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio is .* no lora_B of this model is trained"):
        mp.optim.loraplus_groups(model, 1e-3, 16)


def test_clipping_scales_to_the_norm_and_leaves_what_is_below(xp, rng):
    params = parameters(xp, rng)
    give_gradients(xp, rng, params)
    gradients = lambda: np.concatenate([to_numpy(p.grad).ravel() for p in params])  # noqa: E731
    flat = gradients()
    norm = float(np.sqrt((flat.astype(np.float64) ** 2).sum()))
    for limit in (math.inf, norm * 2):
        assert clip_grad_norm(params, limit) == pytest.approx(norm, rel=1e-6)
        np.testing.assert_array_equal(gradients(), flat)
    clip_grad_norm(params, 0.5)
    np.testing.assert_allclose(gradients(), flat * 0.5 / norm, rtol=1e-5)
    assert clip_grad_norm([Parameter(np.zeros(2, np.float32))], 1.0) == 0.0
    params[1].grad = xp.asarray(np.full(5, 1e25, np.float32))  # its square is beyond float32
    assert clip_grad_norm(params[1:2], 1.0) == pytest.approx(5**0.5 * 1e25, rel=1e-6)
    np.testing.assert_allclose(to_numpy(params[1].grad), 5**-0.5, rtol=1e-5)


def test_clipping_names_the_gradient_that_is_not_finite_and_scales_nothing(xp, rng):
    good, bad = parameters(xp, rng, [(3,), (2, 2)])
    give_gradients(xp, rng, [good, bad])
    bad.grad[0, 1] = math.nan
    before = to_numpy(good.grad).copy()
    with pytest.raises(NonFiniteGradient, match=r"the gradient of mlp.weight has 1 of 4 elements") as error:
        clip_grad_norm([("mlp.bias", good), ("mlp.weight", bad)], 1e-3)
    assert error.value.name == "mlp.weight"
    np.testing.assert_array_equal(to_numpy(good.grad), before)
