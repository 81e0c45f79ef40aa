"""Code books against their published values, blockwise quantization against a plain loop, and what it refuses."""

from __future__ import annotations

import itertools
import json
import statistics
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft import backend, quant
from minipeft.backend import is_array, to_numpy
from minipeft.quant import eight_bits, nf4
from minipeft.quant.checks import BLOCKSIZES
from minipeft.quant.codebooks import CODES_4BIT, dynamic_map, fp4_code, int4_code, nf4_code

NF4 = [  # QLoRA (arXiv:2305.14314), appendix E; bitsandbytes
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]  # over 12; bitsandbytes
INT4 = [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]  # over 7
plain_and_nested = pytest.mark.parametrize("nested", [False, True])


def blocks_of_256(x):
    """8-bit codes [blocks, 256] of the dynamic map, and absmax [blocks]."""
    return eight_bits.quantize(nf4.in_blocks(x, 256))


# ---------------------------------------------------------------------------------------------------------- code books


@pytest.mark.parametrize(("code", "table", "over"), [(nf4_code, NF4, 1), (fp4_code, FP4, 12), (int4_code, INT4, 7)])
def test_code_books_are_the_published_tables_to_the_last_bit(code, table, over):
    assert code().tobytes() == (np.array(table) / over).astype(np.float32).tobytes()  # the sign of zero included


def test_nf4_gives_every_code_about_the_same_share_of_normal_weights():
    normal = statistics.NormalDist()
    sigma = 1 / normal.inv_cdf(0.9677083)  # the deviation at which the outermost point is the quantile it was made of
    shares = np.diff([0, *[normal.cdf((a + b) / 2 / sigma) for a, b in itertools.pairwise(NF4)], 1])
    assert shares.min() > 0.045 and shares.max() < 0.075  # 1/16 = 0.0625; FP4's least share is 0.004


def test_the_dynamic_map_covers_six_decades_with_255_distinct_signs_and_sizes():
    values = dynamic_map()
    assert values.shape == (256,) and (np.diff(values) > 0).all()
    assert values[-1] == 1 and 0 in values
    positive = values[(values > 0) & (values < 1)]
    assert np.array_equal(np.sort(-values[values < 0]), positive)
    per_decade = [int(((positive > 10.0**-k / 10) & (positive < 10.0**-k)).sum()) for k in range(7)]
    assert per_decade == [64, 32, 16, 8, 4, 2, 1]


@pytest.mark.parametrize(("signed", "bits", "checksum"), [(True, 6, 0x1B137AEB), (False, 7, 0xE871278F)])
def test_the_dynamic_map_is_its_definition_and_bitsandbytes_table_to_the_last_bit(signed, bits, checksum):
    """The checksum is that of the table that tests/oracles compares with bitsandbytes'."""
    fractions = [0.1 + 0.9 * (np.arange(n) + 0.5) / n for n in 2 ** np.arange(bits, bits - 7, -1)]
    positive = np.concatenate([f * 10.0**-k for k, f in enumerate(fractions)])
    values = dynamic_map(signed)
    np.testing.assert_allclose(values, np.sort([0, 1, *positive, *(-positive if signed else ())]), rtol=1e-6)
    assert zlib.crc32(values.tobytes()) == checksum


# ------------------------------------------------------------------------------------------------------------ four bits


def by_a_loop(x, blocksize, quant_type):
    """(codes, absmax) by a loop over blocks and a search of the nearest point, the lower of two at one distance."""
    code = CODES_4BIT[quant_type]()
    order = np.argsort(code, kind="stable")
    midpoints = (code[order][1:] + code[order][:-1]) / np.float32(2)
    codes, absmax = [], []
    for i in range(0, x.size, blocksize):
        block = x[i : i + blocksize]
        floor = max(np.float32(np.abs(block).max()), np.float32(1e-38))
        whole = block.size == blocksize
        absmax.append(np.abs(block).max() if whole else floor)
        codes += [order[sum(v > midpoints)] for v in (block * (np.float32(1) / floor) if whole else block / floor)]
    return np.array(codes, np.uint8), np.array(absmax, np.float32)


SAMPLES = {
    "normal": lambda r, n: r.standard_normal(n),
    "zeros": lambda r, n: np.zeros(n),
    "half zeros": lambda r, n: r.standard_normal(n) * (np.arange(n) >= n // 2),
    "huge": lambda r, n: r.standard_normal(n) * 5e37,
    "denormal": lambda r, n: r.standard_normal(n) * 1e-39,
    "small integers": lambda r, n: r.integers(-7, 8, n),
}


@pytest.mark.parametrize("quant_type", CODES_4BIT)
@pytest.mark.parametrize("sample", SAMPLES)
def test_quantize_4bit_and_its_definition_equal_the_plain_loop(xp, rng, sample, quant_type):
    plain = np if xp.__name__ == "cupy" and sample in ("huge", "denormal") else xp  # see `nf4._divide`, 3
    zero = 7 if quant_type == "nf4" else 0
    for n, blocksize in itertools.product((1, 2, 31, 33, 64, 65, 300), (32, 64, 256)):
        case = f"{n} numbers in blocks of {blocksize}"
        x = SAMPLES[sample](rng, n).astype(np.float32)
        codes, absmax = by_a_loop(x, blocksize, quant_type)
        defined, c = nf4.quantize(plain.asarray(x), blocksize, quant_type)
        assert np.array_equal(to_numpy(defined), codes) and np.array_equal(to_numpy(c), absmax), case
        packed, state = quant.quantize_4bit(xp.asarray(x), blocksize, quant_type)
        assert packed.shape == ((n + 1) // 2, 1) and packed.dtype == np.uint8, case
        assert np.array_equal(to_numpy(state.absmax), absmax), case
        odd = [zero] * (n % 2)  # the partner of a last odd one
        assert np.array_equal(np.stack([to_numpy(packed) >> 4, to_numpy(packed) & 15]).T.reshape(-1), [*codes, *odd]), case
        assert sample != "zeros" or set(codes) == {zero}, case
        expected = CODES_4BIT[quant_type]()[codes] * np.repeat(absmax, blocksize)[:n]
        assert np.array_equal(to_numpy(quant.dequantize_4bit(packed, state)), expected), case
        assert np.array_equal(to_numpy(nf4.dequantize(defined, c, plain.asarray(CODES_4BIT[quant_type]()), blocksize)), expected), case


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@plain_and_nested
def test_shape_and_dtype_come_back(xp, rng, dtype, nested):
    x = rng.standard_normal((5, 3, 7)).astype(dtype)
    y = to_numpy(quant.dequantize_4bit(*quant.quantize_4bit(xp.asarray(x), compress_statistics=nested)))
    assert y.shape == x.shape and y.dtype == x.dtype
    assert np.abs(y - x).max() < 0.16 * np.abs(x).max()  # the widest gap of NF4 is 0.304 absmax


@settings(max_examples=60)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=200),
    st.sampled_from([32, 64]),
    st.sampled_from(["nf4", "fp4", "int4"]),
)
def test_no_point_of_the_code_book_is_nearer(values, blocksize, quant_type):
    x = np.array(values, np.float32)
    y = quant.dequantize_4bit(*quant.quantize_4bit(x, blocksize, quant_type)).astype(np.float64)
    code = CODES_4BIT[quant_type]().astype(np.float64)
    for i in range(0, x.size, blocksize):
        block, top = x[i : i + blocksize].astype(np.float64), float(np.abs(x[i : i + blocksize]).max())
        best = np.abs(block[:, None] - code * top).min(axis=1)
        assert (np.abs(y[i : i + blocksize] - block) <= best + 1e-6 * top + 1e-38).all()


def test_threads_and_block_cuts_do_not_change_a_byte(rng):
    x = rng.standard_normal(3 * backend.BLOCK + 77).astype(np.float32)
    packed, state = quant.quantize_4bit(x)
    parts = [quant.quantize_4bit(x[i : i + 64 * 512]) for i in range(0, x.size, 64 * 512)]
    assert np.array_equal(packed, np.concatenate([p for p, _ in parts]))
    assert np.array_equal(state.absmax, np.concatenate([s.absmax for _, s in parts]))
    assert np.array_equal(quant.dequantize_4bit(packed, state), np.concatenate([quant.dequantize_4bit(p, s) for p, s in parts]))


def test_an_array_in_any_memory_order_is_quantized_in_c_order(rng):
    x = rng.standard_normal((40, 24)).astype(np.float32)
    for array in (np.asfortranarray(x), x.T):
        assert np.array_equal(quant.quantize_4bit(array)[0], quant.quantize_4bit(np.ascontiguousarray(array))[0])


# -------------------------------------------------------------------------------------------------- double quantization


@plain_and_nested
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_the_formula_of_the_bytes_is_what_a_layer_holds(rng, blocksize, nested):
    for shape in ((1, 1), (3, 5), (64, 64), (129, 130), (7, 4097), (300, 512)):
        for quant_type in CODES_4BIT:
            layer = quant.Linear4bit(*quant.quantize_4bit(rng.standard_normal(shape).astype(np.float32), blocksize, quant_type, nested))
            held = {name: p.data.nbytes for name, p in layer.named_parameters()}
            assert sum(held.values()) == nf4.storage_bytes(shape[0] * shape[1], blocksize, nested)
            assert sum(n for name, n in held.items() if "quant_map" in name) == nf4.book_bytes(nested)


@plain_and_nested
def test_double_quantization_stores_4_127_bits_a_weight_instead_of_4_5(nested):
    same_for_any_size = nf4.storage_bytes(0, 64, nested)
    bits = 8 * (nf4.storage_bytes(1024 * 1024, 64, nested) - same_for_any_size) / 1024**2
    assert bits == (4 + 8 / 64 + 32 / (64 * 256) if nested else 4.5)  # QLoRA section 3
    assert same_for_any_size < 1500


def test_what_is_quantized_on_one_device_shares_its_code_books(xp):
    first, second = (quant.quantize_4bit(xp.ones(64, np.float32), compress_statistics=True)[1] for _ in range(2))
    assert first.code is second.code and first.state2.code is second.state2.code


def test_double_quantization_changes_the_scales_by_less_than_the_map_allows(xp, rng):
    x = rng.standard_normal(64 * 700).astype(np.float32)
    _, plain = quant.quantize_4bit(xp.asarray(x))
    _, nested = quant.quantize_4bit(xp.asarray(x), compress_statistics=True)
    absmax, scales = to_numpy(plain.absmax), to_numpy(nested.scales())
    assert abs(nested.offset - absmax.mean()) < 1e-6
    step = np.diff(dynamic_map()).max()  # between adjacent points
    spread = to_numpy(nested.state2.absmax).repeat(256)[:700]
    assert (np.abs(scales - absmax) <= spread * (step / 2 + 1 / 65535) + 1e-6).all()
    assert np.array_equal(to_numpy(nested.absmax), to_numpy(blocks_of_256(plain.absmax - xp.float32(nested.offset))[0]).reshape(-1)[:700])


EDGES = {  # blocks that have no scale of their own, or one whose reciprocal, or whose products, are subnormal
    "blocks of zeros": lambda r: np.concatenate([np.zeros(64 * 300), r.standard_normal(64 * 300)]),
    "subnormal": lambda r: r.standard_normal(64 * 300) * 10.0 ** r.integers(-44, -36, 64 * 300),
    "huge": lambda r: r.uniform(-3.4e38, 3.4e38, 64 * 2 + 31),
    "quotients": lambda r: np.tile([1, 1e-39, -1e-39, 0, 1e9, 1e-30, -1e-30, 0], 16),
    "scales far apart": lambda r: r.standard_normal((600, 64)) * 10.0 ** r.integers(-40, 30, (600, 1)),
}


@plain_and_nested
@pytest.mark.parametrize("quant_type", CODES_4BIT)
@pytest.mark.parametrize("edge", EDGES)
def test_a_device_has_the_codes_and_the_numbers_of_the_cpu(xp, rng, edge, quant_type, nested):
    x = EDGES[edge](rng).astype(np.float32)
    if edge == "huge" and nested:
        with pytest.raises(quant.QuantError, match=r"too large for double quantization: their sum is above 3.4e38"):
            quant.quantize_4bit(xp.asarray(x), 64, quant_type, nested)
        return
    (packed, state), (mine, here) = (quant.quantize_4bit(lib.asarray(x), 64, quant_type, nested) for lib in (np, xp))
    assert np.array_equal(to_numpy(mine), packed)
    held = {k: to_numpy(v).tobytes() if is_array(v) else v for k, v in here.as_dict().items()}
    assert held == {k: v.tobytes() if is_array(v) else v for k, v in state.as_dict().items()}
    assert to_numpy(quant.dequantize_4bit(mine, here)).tobytes() == quant.dequantize_4bit(packed, state).tobytes()
    if edge == "blocks of zeros":
        assert not to_numpy(quant.dequantize_4bit(mine, here))[: 64 * 300].any()


def test_8_bit_blockwise_on_a_device_has_the_codes_of_the_cpu(xp, rng):
    for make in EDGES.values():
        x = make(rng).astype(np.float32)
        (codes, absmax), (mine, here) = (blocks_of_256(lib.asarray(x)) for lib in (np, xp))
        assert np.array_equal(to_numpy(mine), codes) and to_numpy(here).tobytes() == absmax.tobytes()


def test_8_bit_blockwise_takes_the_nearest_point_of_the_map(xp, rng):
    x = rng.standard_normal((30, 40)).astype(np.float32)
    codes, absmax = blocks_of_256(xp.asarray(x))
    assert codes.shape == (5, 256) and codes.dtype == np.uint8
    y, flat = to_numpy(nf4.dequantize(codes.reshape(-1), absmax, xp.asarray(dynamic_map()), 256))[: x.size], x.reshape(-1)
    for i in range(0, flat.size, 256):
        top = np.abs(flat[i : i + 256]).max()
        best = np.abs(flat[i : i + 256, None] - dynamic_map() * top).min(axis=1)
        assert (np.abs(y[i : i + 256] - flat[i : i + 256]) <= best + top * 2 / 65535).all()


# --------------------------------------------------------------------------------------------------------- the messages


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 70, 140])  # full blocks and the partial one at the end
def test_nan_and_infinity_are_refused_by_place(xp, value, at):
    x = np.ones((3, 50), np.float32)
    x.reshape(-1)[at] = value
    block = at // 64 * 64
    with pytest.raises(quant.QuantError, match=f"NaN or infinity among its elements {block} to {block + 63};"):
        quant.quantize_4bit(xp.asarray(x))


def test_what_cannot_be_quantized_or_dequantized_is_named(xp):
    x = xp.asarray(np.ones(64, np.float32))
    packed, state = quant.quantize_4bit(xp.asarray(np.ones((4, 33), np.float32)))
    for call, message in (
        (lambda: quant.quantize_4bit(x.astype("int32")), "takes float32 or float16, not int32"),
        (lambda: quant.quantize_4bit(x.astype("float64")), "takes float32 or float16, not float64"),
        (lambda: quant.quantize_4bit([1.0, 2.0]), "takes an array, not list"),
        (lambda: quant.quantize_4bit(x[:0]), "holds nothing"),
        (lambda: quant.quantize_4bit(x, blocksize=48), "blocksize must be one of 32, 64, .* not 48"),
        (lambda: quant.quantize_4bit(x, blocksize=8192), "not 8192"),
        (lambda: quant.quantize_4bit(x, quant_type="nf3"), "quant_type must be one of nf4, fp4, int4, not 'nf3'"),
        (lambda: quant.dequantize_4bit(packed[:-1], state), r"66 bytes of uint8; the packed buffer holds 65 of uint8"),
        (lambda: quant.dequantize_4bit(packed.astype("float32"), state), "holds 66 of float32"),
    ):
        with pytest.raises(quant.QuantError, match=message):
            call()


# ------------------------------------------------------------------------------------------------------ the state's form


@plain_and_nested
def test_a_state_survives_its_dictionary(xp, rng, nested):
    packed, state = quant.quantize_4bit(xp.asarray(rng.standard_normal((6, 80)).astype(np.float16)), 128, "fp4", nested)
    entries = state.as_dict(packed=True)
    keys = {"absmax", "quant_map", "quant_state.bitsandbytes__fp4"} | ({"nested_absmax", "nested_quant_map"} if nested else set())
    assert set(entries) == keys
    described = json.loads(bytes(to_numpy(entries["quant_state.bitsandbytes__fp4"])))
    assert described["shape"] == [6, 80] and described["dtype"] == "float16" and described["blocksize"] == 128
    again = quant.QuantState.from_dict(entries)
    assert np.array_equal(to_numpy(quant.dequantize_4bit(packed, again)), to_numpy(quant.dequantize_4bit(packed, state)))


def test_an_incomplete_or_damaged_state_is_named(rng):
    entries = quant.quantize_4bit(rng.standard_normal(640).astype(np.float32), compress_statistics=True)[1].as_dict()
    lost = [{k: v for k, v in entries.items() if k != name} for name in ("absmax", "shape", "nested_offset", "nested_quant_map")]
    for damaged, message in (
        *((left, f"lacks {next(k for k in entries if k not in left)}") for left in lost),
        ({"quant_state.bitsandbytes__nf4": np.frombuffer(b"{not json", np.uint8)}, "no JSON object"),
        ({**entries, "dtype": "int8"}, "dtype must be float32, float16 or bfloat16, not 'int8'"),
        ({**entries, "shape": [-10, -64]}, r"of positive integers, not \[-10, -64\]"),
        ({**entries, "shape": [0, 64]}, r"of positive integers, not \[0, 64\]"),
        ({**entries, "nested_blocksize": 0}, "nested_blocksize must be one of 32, .*, not 0"),
        *(({**entries, "nested_blocksize": n}, "nested_blocksize must be one of") for n in (256000768, 2**32, False)),
        ({**entries, "shape": 640}, "of positive integers, not 640"), ({**entries, "nested_offset": "x"}, "nested_offset must be a n"),
        ({**entries, "absmax": 5}, "absmax and the quant_map of a quantization state are arrays"),
        ({**entries, "nested_quant_map": 5}, "absmax and the quant_map of a quantization state are arrays"),
        ({"quant_state.bitsandbytes__nf4": np.frombuffer(b'{"quant_type": "fp4"}', np.uint8)}, "the state of another type: 'fp4'"),
        ({**entries, "quant_type": []}, "quant_type must be one of"),
        ({**entries, "absmax": entries["absmax"][:2]}, r"absmax must be \[10\] uint8 for the shape \(640,\) in blocks of 64, not \[2\]"),
        ({**entries, "nested_absmax": entries["nested_absmax"][:0]}, r"nested_absmax must be \[1\] float32"),
    ):
        with pytest.raises(quant.QuantError, match=message):
            quant.QuantState.from_dict(damaged)


def test_a_state_of_a_single_row_is_read(rng):
    packed, state = quant.quantize_4bit(rng.standard_normal((1, 64)).astype(np.float32))
    again = quant.QuantState.from_dict(state.as_dict())
    with pytest.raises(AttributeError):
        again.blocksize = 32  # it describes bytes that do not change with it
    assert again.shape == (1, 64) and np.array_equal(quant.dequantize_4bit(packed, again), quant.dequantize_4bit(packed, state))


def test_the_code_books_are_shared_and_so_cannot_be_written():
    for book in (*CODES_4BIT.values(), dynamic_map):
        with pytest.raises(ValueError, match="read-only"):
            book()[0] = 0


def test_8_bit_blockwise_keeps_the_largest_magnitude_to_the_last_bit(xp, rng):
    x = rng.standard_normal((40, 256)).astype(np.float32)
    assert np.array_equal(to_numpy(eight_bits.quantize(xp.asarray(x))[1]), np.abs(x).max(axis=1))
    assert np.array_equal(to_numpy(eight_bits.quantize(xp.asarray(x.reshape(-1, 1)))[1]), np.abs(x).reshape(-1))


def test_8_bit_blocks_too_small_for_a_reciprocal_have_two_codes():
    for largest in (2.0**-128, 2.0**-140):
        codes, absmax = eight_bits.quantize(np.array([[largest, largest / 2, 0, -largest]], np.float32))
        assert absmax[0] == np.float32(largest) and codes.tolist() == [[255, 255, 0, 0]]
    x = np.array([[1.5, 0.6, 0, -0.3]], np.float32)
    small, large = (eight_bits.quantize(x * np.float32(scale))[0].tolist() for scale in (2.0**-128, 1))
    assert small == large  # 1.5 times the least that has one


def test_what_describes_a_state_cannot_stand_in_for_its_arrays(rng):
    entries = quant.quantize_4bit(rng.standard_normal(640).astype(np.float32))[1].as_dict(packed=True)
    key = "quant_state.bitsandbytes__nf4"
    described = json.loads(bytes(entries[key])) | {"absmax": 5}
    state = quant.QuantState.from_dict({**entries, key: np.frombuffer(json.dumps(described).encode(), np.uint8)})
    assert np.array_equal(state.absmax, entries["absmax"])
