"""Bytes, code books and checkpoints against bitsandbytes on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra 'oracles'")

import bitsandbytes.functional as theirs  # noqa: E402

import minipeft as mp  # noqa: E402
from minipeft import quant  # noqa: E402
from minipeft.autograd.tensor import Tensor  # noqa: E402
from minipeft.files import read_safetensors, write_safetensors  # noqa: E402
from minipeft.nn import Parameter  # noqa: E402
from minipeft.quant import eight_bits, nf4  # noqa: E402
from minipeft.quant.checks import BLOCKSIZES  # noqa: E402
from minipeft.quant.codebooks import dynamic_map, fp4_code, nf4_code, thresholds  # noqa: E402

KINDS = ("nf4", "fp4")


def samples():
    """(name, array): every kind of number, on sizes around block and byte boundaries."""
    r = np.random.default_rng(0)
    for n in (1, 2, 31, 33, 64, 65, 129, 1000, 4097):
        normal = r.standard_normal(n).astype(np.float32)
        yield f"normal {n}", normal
        yield f"float16 {n}", normal.astype(np.float16)
        yield f"float16 denormal {n}", (normal * 1e-7).astype(np.float16)
        yield f"huge {n}", normal * np.float32(5e37)
        yield f"denormal {n}", normal * np.float32(1e-39)
        yield f"around the floor {n}", normal * np.float32(1e-38)
        yield f"zeros {n}", np.zeros(n, np.float32)
        yield f"half zeros {n}", normal * (np.arange(n) >= n // 2)
        yield f"integers {n}", r.integers(-7, 8, n).astype(np.float32)
        for kind in KINDS:  # exactly on the thresholds, where rounding decides
            yield f"{kind} thresholds {n}", np.resize(np.array([*thresholds(kind)[0], 1], np.float32), n) * np.float32(0.37)


SAMPLES = dict(samples())
plain_and_nested = pytest.mark.parametrize("nested", [False, True])


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def test_code_books_are_equal_to_the_last_bit():
    assert nf4_code().tobytes() == theirs.get_4bit_type("nf4", "cpu").numpy().tobytes()
    assert fp4_code().tobytes() == theirs.get_4bit_type("fp4", "cpu").numpy().tobytes()
    for signed in (True, False):
        assert dynamic_map(signed).tobytes() == theirs.create_dynamic_map(signed).numpy().tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_4_bit_codes_absmax_and_values_are_equal_byte_for_byte(sample, kind):
    x = SAMPLES[sample]
    for blocksize in BLOCKSIZES:
        packed, state = quant.quantize_4bit(x, blocksize, kind)
        packed2, state2 = theirs.quantize_4bit(torch.from_numpy(x), blocksize=blocksize, quant_type=kind)
        assert packed.shape == tuple(packed2.shape)
        assert packed.tobytes() == packed2.numpy().tobytes()
        assert state.absmax.tobytes() == state2.absmax.numpy().tobytes()
        if x.size % 2 == 0:  # their compiled path; they give a vector back as a column
            values = theirs.dequantize_4bit(packed2, state2).numpy().reshape(-1)
            assert np.array_equal(quant.dequantize_4bit(packed, state), values)
            assert state.dtype == values.dtype


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_matrix_comes_back_as_theirs_does(dtype):
    x = normal(1, 96, 192, dtype=dtype)
    for kind in KINDS:
        for blocksize in (32, 64):  # rows of whole blocks: elsewhere their AVX-512 kernel takes the wrong absmax
            packed, state = quant.quantize_4bit(x, blocksize, kind)
            packed2, state2 = theirs.quantize_4bit(torch.from_numpy(x), blocksize=blocksize, quant_type=kind)
            assert np.array_equal(packed, packed2.numpy())
            assert np.array_equal(quant.dequantize_4bit(packed, state), theirs.dequantize_4bit(packed2, state2).numpy())


@pytest.mark.parametrize("sample", SAMPLES)
def test_8_bit_codes_absmax_and_values_are_equal_byte_for_byte(sample):
    x = SAMPLES[sample]
    for blocksize in (64, 256, 4096):
        codes, absmax = eight_bits.quantize(nf4.in_blocks(x, blocksize))
        codes2, state2 = theirs.quantize_blockwise(torch.from_numpy(x), blocksize=blocksize)
        codes = codes.reshape(-1)[: x.size]
        assert codes.tobytes() == codes2.numpy().tobytes()
        assert absmax.tobytes() == state2.absmax.numpy().tobytes()
        values = nf4.dequantize(codes, absmax, dynamic_map(), blocksize).astype(x.dtype)
        assert np.array_equal(values, theirs.dequantize_blockwise(codes2, state2).numpy())


def test_8_bit_codes_of_a_million_numbers():
    x = normal(2, 1 << 20)
    codes, _ = eight_bits.quantize(x.reshape(-1, 256))
    assert codes.tobytes() == theirs.quantize_blockwise(torch.from_numpy(x), blocksize=256)[0].numpy().tobytes()


@pytest.mark.parametrize("n", [1000, 64 * 256, 64 * 1000 + 1])
def test_double_quantization(n):
    x = normal(n, n)
    packed, state = quant.quantize_4bit(x, compress_statistics=True)
    packed2, state2 = theirs.quantize_4bit(torch.from_numpy(x), blocksize=64, quant_type="nf4", compress_statistics=True)
    assert np.array_equal(packed, packed2.numpy())
    offset = np.float32(state2.offset.item())
    assert abs(np.float32(state.offset) - offset) <= np.spacing(offset)  # a sum in another order
    absmax = quant.quantize_4bit(x)[1].absmax
    codes, absmax2 = eight_bits.quantize(nf4.in_blocks(absmax - offset, nf4.NESTED_BLOCKSIZE))  # given the same offset
    assert np.array_equal(codes.reshape(-1)[: absmax.size], state2.absmax.numpy())
    assert np.array_equal(absmax2, state2.state2.absmax.numpy())
    assert np.array_equal(state.state2.code, state2.state2.code.numpy())


@plain_and_nested
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_read_both_ways(kind, nested):
    x = normal(4, 64, 128)
    packed, state = quant.quantize_4bit(x, 64, kind, nested)
    packed2, state2 = theirs.quantize_4bit(torch.from_numpy(x), blocksize=64, quant_type=kind, compress_statistics=nested)
    ours, other = state.as_dict(packed=True), state2.as_dict(packed=True)
    assert {k: (v.shape, str(v.dtype)) for k, v in ours.items() if "quant_state" not in k} == {
        k: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in other.items() if "quant_state" not in k
    }
    read = quant.QuantState.from_dict({k: v.numpy() for k, v in other.items()})
    assert np.array_equal(quant.dequantize_4bit(packed2.numpy(), read), theirs.dequantize_4bit(packed2, state2).numpy())
    read2 = theirs.QuantState.from_dict({k: torch.from_numpy(v.copy()) for k, v in ours.items()}, device="cpu")
    assert np.array_equal(theirs.dequantize_4bit(torch.from_numpy(packed), read2).numpy(), quant.dequantize_4bit(packed, state))


# ------------------------------------------------------------------------------------------------------- the layer


def their_linear(n_in, n_out, nested, seed=0):
    """bitsandbytes' Linear4bit with a random weight, quantized."""
    torch.manual_seed(seed)
    layer = bitsandbytes.nn.Linear4bit(
        n_in, n_out, bias=True, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
    )
    return layer.to("cpu") if layer.weight.bnb_quantized else layer._apply(lambda t: t.to("cpu"))


@plain_and_nested
def test_a_layers_checkpoint_value_and_gradient_are_theirs_in_both_directions(nested, tmp_path):
    from safetensors.torch import load_file, save_file

    theirs_layer = their_linear(128, 96, nested)
    assert theirs_layer.weight.dtype == torch.uint8
    save_file({k: v.contiguous() for k, v in theirs_layer.state_dict().items()}, tmp_path / "theirs.safetensors")
    arrays, _ = read_safetensors(tmp_path / "theirs.safetensors")
    ours = quant.Linear4bit.from_state_dict(arrays)
    x, g = normal(5, 7, 128), normal(7, 7, 96)
    mine, other = Tensor(x, requires_grad=True), torch.from_numpy(x).requires_grad_()
    y, expected = ours(mine), theirs_layer.train()(other)
    np.testing.assert_allclose(y.data, expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    y.backward(g)
    expected.backward(torch.from_numpy(g))
    np.testing.assert_allclose(mine.grad, other.grad.numpy(), rtol=1e-5, atol=1e-5)

    write_safetensors(tmp_path / "ours.safetensors", ours.state_dict())
    state = load_file(tmp_path / "ours.safetensors")
    assert set(state) == set(theirs_layer.state_dict())
    again = bitsandbytes.nn.Linear4bit(128, 96, bias=True, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested)
    stats = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    again.weight = bitsandbytes.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    again.bias.data = state["bias"]
    assert torch.equal(again.train()(torch.from_numpy(x)), theirs_layer(torch.from_numpy(x)))


# ---------------------------------------------------------------------------------------------- directories of models


@pytest.mark.parametrize("dialect", ["llama", "gpt2"])
def test_directories_of_quantized_models_are_read_by_transformers_and_read_from_it(dialect, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra 'oracles'")
    pytest.importorskip("accelerate", reason="transformers loads quantized models with accelerate, which peft of the extra 'oracles' brings")
    config = getattr(mp.TransformerConfig, dialect)(
        vocab_size=30, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16
    )
    dense = mp.Transformer(config, seed=1)
    model = quant.quantize_model(dense)
    ids = np.arange(14).reshape(2, 7)

    def logits(theirs_model):  # in training mode (its dropout off), where bitsandbytes multiplies in float32
        for module in theirs_model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return theirs_model(torch.from_numpy(ids)).logits.detach().numpy()

    mp.save_pretrained(model, tmp_path / "ours")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in read.modules()) == {"llama": 14, "gpt2": 8}[dialect]
    np.testing.assert_allclose(logits(read), model(ids).data, atol=1e-5)

    mp.save_pretrained(dense, tmp_path / "dense")
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    made = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=options, dtype=torch.float32, device_map="cpu"
    )
    made.save_pretrained(tmp_path / "theirs")
    back, _ = mp.from_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(back(ids).data, logits(made), atol=1e-5)
    ours, other = model.state_dict(), back.state_dict()
    assert ours.keys() == other.keys()
    assert all(np.array_equal(ours[n], other[n]) for n in ours if not n.endswith(("nested_absmax", "bitsandbytes__nf4")))


@pytest.mark.parametrize("options", [{"lr": 0.01, "betas": (0.9, 0.95)}, {"weight_decay": 0.1}])
def test_8_bit_moments_are_equal_byte_for_byte_after_each_of_120_steps(options):
    """Gradients over 24 decades, and rows of zeros; sizes around the block and around the smallest that has codes."""
    r = np.random.default_rng(4)
    ours = [Parameter(normal(i, *shape)) for i, shape in enumerate([(70, 100), (64, 64), (63, 65), (5,), (33, 1000)])]
    others = [torch.nn.Parameter(torch.tensor(p.data)) for p in ours]
    mine, peer = mp.optim.AdamW8bit(ours, **options), bitsandbytes.optim.AdamW8bit(others, **options)
    assert mine.defaults == {k: peer.defaults[k] for k in mine.defaults if k in peer.defaults} | {"min_8bit_size": 4096}
    for step in range(120):
        for p, q in zip(ours, others):
            spread = np.exp(3 * r.standard_normal(p.shape)) * 10.0 ** -(step % 25)
            p.grad = (r.standard_normal(p.shape) * spread).astype(np.float32)
            p.grad[0] *= step % 3 == 0
            q.grad = torch.tensor(p.grad)
        mine.step()
        peer.step()
        for p, q in zip(ours, others):
            state = {k: v for k, v in peer.state[q].items() if not k.startswith("qmap")}
            assert mine.state[p].keys() == state.keys() and mine.state[p]["step"] == state.pop("step")
            for k, v in state.items():
                assert mine.state[p][k].tobytes() == v.numpy().tobytes(), (step, p.shape, k)
            np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-6, atol=1e-6)
