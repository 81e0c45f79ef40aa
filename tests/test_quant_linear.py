"""Linear4bit and the surgery that puts it into a model: what it computes, what it holds, and that the model stays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from models import traced

from minipeft import functional as F
from minipeft import nn, quant
from minipeft.accounting import memory_ledger
from minipeft.accounting.memory import measure_peak
from minipeft.autograd.cases import op_cases
from minipeft.autograd.tensor import AutogradError, Tensor, no_grad
from minipeft.backend import to_numpy
from minipeft.nn.transformer import Transformer, TransformerConfig
from minipeft.quant import cases  # noqa: F401
from minipeft.quant.kernels import Tiles

SHAPE = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
IDS = np.arange(12).reshape(2, 6)
both_dialects = pytest.mark.parametrize("model_type", ["llama", "gpt2"])


def small(model_type="llama", seed=1, **changes):
    if model_type == "llama":
        changes = {"intermediate_size": 48, **changes}
    return Transformer(getattr(TransformerConfig, model_type)(**{**SHAPE, **changes}), seed=seed)


def layer_of(rng, *shape, dtype="float32", **options):
    """A layer of normal weights [out, in]."""
    return quant.Linear4bit(*quant.quantize_4bit(rng.standard_normal(shape).astype(dtype), **options))


# ----------------------------------------------------------------------------------------------------------- the product


@pytest.mark.parametrize("case", op_cases(["linear_4bit"]), ids=lambda c: c.label.replace(" ", "_"))
def test_the_gradient_of_the_input_and_the_bias(case):
    assert case.check() < 1e-9


@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [((600, 40), 32), ((3, 64), 32), ((1, 1), 32), ((257, 33), 32), ((64, 100), 32), ((513, 576), 64), ((9, 4096), 2048)],
)
@pytest.mark.parametrize("nested", [False, True])
def test_value_and_gradients_are_those_of_the_dequantized_weight(xp, rng, shape, blocksize, nested):
    W = xp.asarray(rng.standard_normal(shape).astype(np.float32))
    packed, state = quant.quantize_4bit(W, blocksize, compress_statistics=nested)
    dense = quant.dequantize_4bit(packed, state)
    x, b = rng.standard_normal((2, 5, shape[1])).astype(np.float32), rng.standard_normal(shape[0]).astype(np.float32)
    g = xp.asarray(rng.standard_normal((2, 5, shape[0])).astype(np.float32))
    found = []
    for call in (lambda x, b: quant.linear_4bit(x, packed, state, b), lambda x, b: F.linear(x, dense, b)):
        tx, tb = Tensor(xp.asarray(x), requires_grad=True), Tensor(xp.asarray(b), requires_grad=True)
        y = call(tx, tb)
        y.backward(g)
        found.append([to_numpy(a) for a in (y.data, tx.grad, tb.grad)])
    for ours, expected in zip(*found):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_tiles_cover_the_weight_and_none_is_more_than_half_of_it(rng):
    for shape in ((600, 40), (5, 100), (2, 7), (513, 33), (30, 192)):
        layer = layer_of(rng, *shape)
        rows, tiles = [(s, w.copy()) for s, w in layer.tiles()], Tiles(layer.weight.data, layer.quant_state)
        assert np.array_equal(np.concatenate([w for _, w in rows]), layer.dequantize())
        assert max(w.shape[0] for _, w in rows) <= math.ceil(shape[0] / 2)
    columns = [w.copy() for _, w in tiles.columns(slice(0, 192 // tiles.column_unit))]
    assert np.array_equal(np.concatenate(columns, axis=1), layer.dequantize())
    assert max(w.shape[1] for w in columns) <= 192 / 2


def test_no_float_copy_of_the_weight_exists_in_forward_or_backward(rng, threads):
    threads(1)  # how many of them hold a decoded tile at the same moment is the scheduler's affair
    layer = layer_of(rng, 2048, 1024, compress_statistics=True)
    x = Tensor(rng.standard_normal((4, 1024)).astype(np.float32), requires_grad=True)

    def step():
        layer(x).sum().backward()

    step()
    assert measure_peak(step) < 0.25 * 4 * 2048 * 1024


def test_the_graph_keeps_no_more_than_the_layer_holds(rng):
    layer = layer_of(rng, 512, 512, compress_statistics=True)
    x = Tensor(rng.standard_normal((8, 512)).astype(np.float32), requires_grad=True)
    layer(x)
    with traced() as memory:
        y = layer(x)
        held, _ = memory()
    assert held < y.data.nbytes + 4000


def test_the_weight_gets_no_gradient_and_an_input_that_does_not_fit_is_refused(rng):
    layer = layer_of(rng, 8, 8)
    x = Tensor(rng.standard_normal((2, 8)).astype(np.float32), requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in layer.parameters())
    with pytest.raises(TypeError, match="only floating-point tensors can require gradients"):
        nn.Parameter(layer.weight.data)
    with pytest.raises(ValueError, match=r"input \(2, 7\) does not match the quantized weight \(8, 8\)"):
        layer(x[:, :7])
    with pytest.raises(ValueError, match="input must be floating-point, not int64"):
        layer(np.ones((2, 8), np.int64))
    layer.weight.requires_grad = True
    with pytest.raises(AutogradError, match="no derivative"):
        layer(x)


def test_float16_weights_are_multiplied_in_the_inputs_dtype(rng):
    layer = layer_of(rng, 6, 64, dtype="float16")
    x = rng.standard_normal((2, 64)).astype(np.float32)
    assert layer.dequantize().dtype == np.float16
    y = layer(Tensor(x)).data
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, x @ layer.dequantize().astype(np.float32).T, atol=0.02)


# ----------------------------------------------------------------------------------------------------------- the surgery


@both_dialects
def test_a_quantized_model_computes_what_its_dequantized_weights_do(model_type):
    model = small(model_type)
    twin = quant.quantize_model(model)
    np.testing.assert_allclose(twin(IDS).data, quant.dequantize_model(twin)(IDS).data, rtol=1e-4, atol=1e-4)
    linear = [m for _, m in twin.named_modules() if isinstance(m, quant.Linear4bit)]
    assert len(linear) == {"llama": 14, "gpt2": 8}[model_type]
    assert 0 < np.abs(twin(IDS).data - model(IDS).data).max() < 0.5 * np.abs(model(IDS).data).max()


@both_dialects
def test_the_model_stays_as_it_was_and_shares_what_is_not_quantized(model_type):
    model = small(model_type)
    before = {name: (p.data.tobytes(), p.requires_grad) for name, p in model.named_parameters()}
    twin = quant.quantize_model(model)
    assert {name: (p.data.tobytes(), p.requires_grad) for name, p in model.named_parameters()} == before
    dense, packed = dict(model.named_parameters()), dict(twin.named_parameters())
    shared = [name for name in dense if packed[name].data is dense[name].data]
    assert set(dense) - set(shared) == {name for name, p in packed.items() if p.dtype == np.uint8 and name in dense}
    assert not any(p.requires_grad for p in packed.values())


def test_a_conv1d_is_quantized_along_its_inputs(rng):
    conv = nn.Conv1D(64, 96, seed=3)
    layer = quant.Linear4bit.from_linear(conv)
    assert (layer.in_features, layer.out_features) == (64, 96)
    packed, _ = quant.quantize_4bit(np.ascontiguousarray(conv.weight.data.T), compress_statistics=True)
    assert np.array_equal(layer.weight.data, packed)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_allclose(layer(Tensor(x)).data, x @ layer.dequantize().T + conv.bias.data, rtol=1e-5, atol=1e-5)


def test_what_is_skipped_keeps_its_floats():
    twin = quant.quantize_model(small(), skip=("lm_head", "layers.1", "o_proj"))
    found = {path for path, m in twin.named_modules() if isinstance(m, quant.Linear4bit)}
    assert found == {f"model.layers.0.{p}" for p in "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj mlp.down_proj".split()}


def test_what_cannot_be_quantized_is_named_and_nothing_is_changed():
    model = small(tie_word_embeddings=True)
    for skip, message in (
        (("lm_head", "k_porj"), "skip: no module is called 'k_porj'; nearest: .*k_proj"),
        (("lm_head", "model"), "there is no Linear or Conv1D layer to quantize"),
        ((), "lm_head shares its weight with model.embed_tokens.weight"),
    ):
        with pytest.raises(quant.QuantError, match=message):
            quant.quantize_model(model, skip=skip)
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 3] = np.nan
    with pytest.raises(quant.QuantError, match=r"model.layers.1.mlp.up_proj: .* NaN or infinity"):
        quant.quantize_model(model)
    for blocksize in (100, 64.0):
        with pytest.raises(quant.QuantError, match="blocksize"):
            quant.quantize_model(small(), blocksize=blocksize)


def test_a_layer_with_two_paths_stays_one_there_and_back():
    layer = nn.Linear(32, 32, seed=1)
    there = quant.quantize_model(nn.Sequential(layer, layer))
    back = quant.dequantize_model(there)
    assert there[0] is there[1] and back[0] is back[1] and type(back[0]) is nn.Linear


def test_the_lm_head_can_be_quantized_where_it_is_asked_for():
    model = small(tie_word_embeddings=False)
    twin = quant.quantize_model(model, skip=())
    assert isinstance(twin.get_submodule("lm_head"), quant.Linear4bit)
    assert abs(twin.loss(IDS, IDS).item() - model.loss(IDS, IDS).item()) < 0.2
    assert twin.generate(IDS, max_new_tokens=3).shape == (2, 9)


@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_is_bitsandbytes_and_loads_into_another_quantized_model(nested):
    model = quant.quantize_model(small(), compress_statistics=nested)
    state = model.state_dict()
    entries = {name.removeprefix("model.layers.0.mlp.up_proj.") for name in state if "layers.0.mlp.up_proj." in name}
    assert entries == {"weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"} | (
        {"weight.nested_absmax", "weight.nested_quant_map"} if nested else set()
    )
    other = quant.quantize_model(small(seed=2), compress_statistics=nested)
    assert not np.array_equal(other(IDS).data, model(IDS).data)
    other.load_state_dict(state)
    assert np.array_equal(other(IDS).data, model(IDS).data)


def test_copies_are_independent_and_move_between_devices(xp):
    layer = quant.Linear4bit.from_linear(nn.Linear(32, 8, seed=1))
    twin = layer.copy().to(xp)
    assert np.array_equal(to_numpy(twin.dequantize()), layer.dequantize())
    layer.weight.data[...] = 0
    assert not np.array_equal(to_numpy(twin.dequantize()), layer.dequantize())


def test_the_ledger_predicts_the_memory_of_a_forward_pass(threads):
    threads(1)
    model = quant.quantize_model(small(hidden_size=256, intermediate_size=512, seed=0))
    ids = np.zeros((2, 32), np.int64)
    ledger = memory_ledger(model, batch=2, seq_len=32, mode="evaluate")
    held = sum(p.data.nbytes for p in model.parameters())
    with no_grad():
        model.loss(ids, ids)
        peak = measure_peak(lambda: model.loss(ids, ids))
    assert abs(ledger.total - held - peak) < 0.1 * peak


# ------------------------------------------------------------------------------------------------------- small promises


def test_a_layer_says_what_it_is_double_quantizes_unless_told_and_trains_its_bias_at_most():
    layer = quant.Linear4bit.from_linear(nn.Linear(64, 8, seed=1))
    assert layer.quant_state.nested and ", bias [8]" in repr(layer)
    assert "bias" not in repr(quant.Linear4bit.from_linear(nn.Linear(64, 8, bias=False, seed=1)))
    assert layer.requires_grad_().bias.requires_grad and not layer.weight.requires_grad
    read = quant.Linear4bit.from_state_dict({name: p.data for name, p in layer.all_named_parameters()})
    assert not read.bias.requires_grad


def test_what_does_not_match_a_quantized_weight_is_refused():
    packed, state = quant.quantize_4bit(np.ones((4, 8), np.float32))
    with pytest.raises(ValueError, match=r"input \(\) does not match the quantized weight \(4, 8\)"):
        quant.linear.linear_4bit(Tensor(np.float32(1)), Tensor(packed), state)
    packed, state = quant.quantize_4bit(np.ones((2, 4, 8), np.float32))
    with pytest.raises(ValueError, match=r"does not match the quantized weight \(2, 4, 8\)"):
        quant.linear.linear_4bit(Tensor(np.ones((3, 4), np.float32)), Tensor(packed), state)


def test_a_dequantized_model_is_frozen_and_shares_what_was_not_quantized():
    model = quant.quantize_model(nn.Sequential(nn.Linear(64, 8, seed=1), nn.Linear(8, 4, seed=2)), skip=["1"])
    dense = quant.dequantize_model(model)
    assert not any(p.requires_grad for p in dense.parameters())
    assert np.shares_memory(dict(dense.named_parameters())["1.weight"].data, dict(model.named_parameters())["1.weight"].data)


def test_pieces_cover_a_part_wherever_it_starts():
    for start, stop, most in ((0, 10, 3), (10, 20, 4), (7, 8, 5), (5, 5, 2)):
        pieces = list(quant.kernels._pieces(slice(start, stop), most))
        assert [i for s in pieces for i in range(s.start, s.stop)] == list(range(start, stop))
        assert len(pieces) == -(-(stop - start) // most) and all(s.stop - s.start <= most for s in pieces)


def test_the_papers_definition_has_blocks_of_64_unless_told(rng):
    x = rng.standard_normal(300).astype(np.float32)
    codes, c = quant.nf4.quantize(x)
    assert c.shape == (5,) and np.array_equal(codes, quant.nf4.quantize(x, 64, "nf4")[0])
    q = quant.codebooks.nf4_code()
    assert np.array_equal(quant.nf4.dequantize(codes, c, q), quant.nf4.dequantize(codes, c, q, 64))
    assert quant.nf4.storage_bytes(4000) == 2000 + 4 * 63 + 4 * 16 + 256  # codes, scales, book, description
    assert quant.nf4.book_bytes() == 64


def test_blocks_have_one_of_bitsandbytes_sizes(rng):
    x = rng.standard_normal(5000).astype(np.float32)
    for size in (2**i for i in range(4, 14)):
        if 32 <= size <= 4096:
            assert quant.quantize_4bit(x, size)[1].absmax.shape == (-(-5000 // size),)
        for wrong in {size, size - 1, size + 1} - {2**i for i in range(5, 13)}:
            with pytest.raises(quant.QuantError, match="blocksize must be one of 32, 64, 128"):
                quant.quantize_4bit(x, wrong)
