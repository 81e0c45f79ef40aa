"""Layers: their equations, PyTorch's initializations, and which random stream they draw from."""

from __future__ import annotations

import numpy as np
import pytest

import minipeft as mp
from minipeft.autograd.gradcheck import check_parameters
from minipeft.backend import Rng, to_numpy
from minipeft.nn import Conv1D, Dropout, Embedding, LayerNorm, Linear, RMSNorm


def randomize(layer, rng, xp):
    """Random float64 parameters, and their host copies by name."""
    for p in layer.parameters():
        p.data = xp.asarray(rng.standard_normal(p.shape))
    return {name: to_numpy(p.data) for name, p in layer.named_parameters()}


@pytest.mark.parametrize(
    "layer, equation",
    [
        (Linear(4, 3), lambda x, weight, bias: x @ weight.T + bias),
        (Linear(4, 3, bias=False), lambda x, weight: x @ weight.T),
        (Conv1D(4, 3), lambda x, weight, bias: x @ weight + bias),
        (
            LayerNorm(4, eps=1e-3),
            lambda x, weight, bias: (
                (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * weight + bias
            ),
        ),
        (RMSNorm(4, eps=1e-3), lambda x, weight: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * weight),
    ],
    ids=["linear", "linear-no-bias", "conv1d", "layer-norm", "rms-norm"],
)
def test_a_layer_computes_its_equation_and_every_parameter_learns(layer, equation, xp, rng):
    layer = layer.copy().to(xp)
    parameters, x = randomize(layer, rng, xp), rng.standard_normal((2, 5, 4))
    y = layer(mp.Tensor(xp.asarray(x)))
    np.testing.assert_allclose(to_numpy(y.data), equation(x, **parameters), atol=1e-12)
    checked = check_parameters(lambda: layer(mp.Tensor(xp.asarray(x))), dict(layer.named_parameters()))
    assert [error for *_, error in checked if error] == []


def test_embedding_looks_up_rows_and_adds_gradients_of_repeated_ids(xp, rng):
    layer = Embedding(5, 3).to(xp)
    weight = to_numpy(layer.weight.data)
    ids = np.array([[4, 0, 4], [4, 1, 0]])
    y = layer(xp.asarray(ids))
    assert np.array_equal(to_numpy(y.data), weight[ids])
    y.sum().backward()
    assert np.array_equal(to_numpy(layer.weight.grad)[:, 0], [2, 1, 0, 0, 3])
    assert (layer.num_embeddings, layer.embedding_dim) == (5, 3)
    layer.weight.grad = None
    layer(xp.asarray(ids)[:, ::2]).sum().backward()  # ids that do not lie side by side
    assert np.array_equal(to_numpy(layer.weight.grad)[:, 0], [1, 0, 0, 0, 3])


def test_a_bias_more_precise_than_the_weight_beside_it_is_not_rounded(xp):
    x, weight, bias = (mp.Tensor(xp.asarray(np.ones(4, dtype))) for dtype in ("f", np.float16, "f"))
    for number in (1e5, 1 + 2**-12):
        y = mp.functional.layer_norm(x.reshape(1, 4), weight, bias * number)
        assert to_numpy(y.data).tolist() == [[np.float32(number)] * 4]


def test_orientation_and_sizes():
    assert Linear(4, 3).weight.shape == (3, 4) and Conv1D(4, 3).weight.shape == (4, 3)
    for layer in (Linear(4, 3), Conv1D(4, 3)):
        assert (layer.in_features, layer.out_features) == (4, 3) and layer.bias.shape == (3,)


def test_initial_weights_follow_pytorch():
    for layer, bound in ((Linear(100, 300), 0.1), (Conv1D(100, 300), 0.1)):
        w = layer.weight.data
        assert w.dtype == np.float32 and np.abs(w).max() <= bound
        assert w.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)  # of a uniform distribution
    assert np.abs(Linear(100, 300).bias.data).max() == pytest.approx(0.1, rel=0.05)
    assert not Conv1D(100, 300).bias.data.any()
    assert Embedding(200, 300).weight.data.std() == pytest.approx(1, rel=0.02)
    for norm in (LayerNorm(4), RMSNorm(4)):
        assert (norm.weight.data == 1).all()
    assert not LayerNorm(4).bias.data.any()


@pytest.mark.parametrize(
    "make", [lambda s: Linear(8, 8, seed=s), lambda s: Conv1D(8, 8, seed=s), lambda s: Embedding(8, 8, seed=s)]
)
def test_same_seed_same_bytes(make):
    first, again, other = (make(s).weight.data.tobytes() for s in (3, 3, 4))
    assert first == again != other
    with pytest.raises(ValueError, match="read-only"):
        make(None).weight.data[0, 0] = 1  # unallocated


def test_a_linear_layer_of_the_wrong_width_says_both_shapes():
    with pytest.raises(ValueError, match=r"input \(2, 5\) does not match weight \(3, 4\)"):
        Linear(4, 3)(mp.Tensor(np.zeros((2, 5))))
    with pytest.raises(ValueError, match=r"weight \(4,\) does not match the last axis of the input \(2, 5\)"):
        RMSNorm(4)(mp.Tensor(np.zeros((2, 5))))


def test_dropout_acts_only_with_a_stream_and_keeps_the_mean(xp):
    layer, x = Dropout(0.25), mp.Tensor(xp.ones((64, 100), "float32"))
    assert layer(x) is x and Dropout(0.0)(x, Rng(1)) is x
    y = to_numpy(layer(x, Rng(1)).data)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1) / np.float32(0.75)}
    assert y.mean() == pytest.approx(1, abs=0.03)
    assert np.array_equal(y, to_numpy(layer(x, Rng(1)).data)) and not np.array_equal(y, to_numpy(layer(x, Rng(2)).data))
    assert not np.array_equal(y[0], y[1])


@pytest.mark.parametrize("p", [1.0, -0.1, 2])
def test_a_dropout_probability_outside_its_range_is_an_error(p):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        Dropout(p)
