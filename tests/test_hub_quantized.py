"""Models in four bits as directories: exact round trips, and refusals by name."""

from __future__ import annotations

import json

import numpy as np
import pytest

import minipeft as mp
from minipeft.files import read_safetensors, write_safetensors
from minipeft.hub.configuration import HubError
from minipeft.quant import Linear4bit, quantize_model

IDS = np.arange(14).reshape(2, 7)


def model(dialect, **options):
    config = getattr(mp.TransformerConfig, dialect)(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16
    )
    return quantize_model(mp.Transformer(config, seed=1), **options)


@pytest.mark.parametrize("dialect", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, dict(compress_statistics=False, quant_type="fp4"), dict(blocksize=128)])
def test_a_quantized_model_comes_back_bit_for_bit(tmp_path, dialect, options):
    before = model(dialect, **options)
    mp.save_pretrained(before, tmp_path)
    after, _ = mp.from_pretrained(tmp_path)
    assert {k: v.tobytes() for k, v in after.state_dict().items()} == {k: v.tobytes() for k, v in before.state_dict().items()}
    assert np.array_equal(after(IDS).data, before(IDS).data)
    assert sum(isinstance(m, Linear4bit) for _, m in after.named_modules()) > 0
    options = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert options["quant_method"] == "bitsandbytes" and options["load_in_4bit"] and options["llm_int8_skip_modules"] == ["lm_head"]


def test_the_floats_are_stored_in_the_dtype_that_is_asked_for_and_the_codes_as_they_are(tmp_path):
    before = model("llama")
    mp.save_pretrained(before, tmp_path, dtype="float16")
    arrays, _ = read_safetensors(tmp_path / "model.safetensors")
    assert {a.dtype.name for n, a in arrays.items() if ".weight." not in n and "proj" not in n} == {"float16"}
    after, _ = mp.from_pretrained(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    assert np.array_equal(after.get_submodule(name).dequantize(), before.get_submodule(name).dequantize())


def test_a_directory_whose_quantized_layers_do_not_fit_is_refused(tmp_path):
    mp.save_pretrained(model("llama"), tmp_path)
    arrays, _ = read_safetensors(tmp_path / "model.safetensors")
    arrays = {name: array.copy() for name, array in arrays.items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    other = {k.replace("layers.0.self_attn.q_proj", "layers.0.self_attn.x_proj"): v for k, v in arrays.items()}
    for damaged, message in (
        (arrays | {name: arrays[name][:-3]}, "q_proj: 4-bit codes of the shape .* the packed buffer holds 509"),
        ({k: v for k, v in arrays.items() if k != f"{name}.nested_absmax"}, "q_proj: a quantization state lacks nested_absmax"),
        (arrays | {f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8)}, "q_proj: .*no JSON object"),
        (other, "x_proj is quantized, but the configuration has no linear layer there"),
    ):
        write_safetensors(tmp_path / "model.safetensors", damaged)
        with pytest.raises(HubError, match=message):
            mp.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "model.safetensors", arrays)
    with pytest.raises(HubError, match="unexpected"):
        mp.from_pretrained(tmp_path)


def test_int4_is_not_saved(tmp_path):
    with pytest.raises(HubError, match="int4 cannot be saved"):
        mp.save_pretrained(model("llama", quant_type="int4"), tmp_path / "here")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_what_was_in_four_bits_and_is_dense_again_is_saved_as_its_family_stores_it(tmp_path, dialect):
    quantized = model(dialect)
    adapted = mp.get_peft_model(quantized, mp.LoraConfig(r=2, init_lora_weights=False))
    ids = np.arange(8)[None]
    for name, dense in {"merged": adapted.merge_and_unload(), "dequantized": mp.quant.dequantize_model(quantized)}.items():
        mp.save_pretrained(dense, tmp_path / name)
        np.testing.assert_allclose(mp.from_pretrained(tmp_path / name)[0](ids).data, dense(ids).data, atol=1e-5)
