"""What a PyTorch loop holds: the classical figures, the moments of a step, and what each setting changes."""

from __future__ import annotations

import pytest

from minipeft import BitFitConfig, LNTuningConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from minipeft.accounting import Loop, architecture, pytorch_ledger
from minipeft.accounting.activations import block_terms, blocks_of, megatron_terms
from minipeft.accounting.footprints import footprints, predict, summary
from minipeft.accounting.loop import CONTEXT, LOOP_PRECISIONS, WORKSPACE
from minipeft.accounting.parameters import trained_parameters
from minipeft.accounting.pytorch_loop import largest, optimizer_bytes

LORA = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
N = 6_738_415_616  # LLaMA-7B


def ledger(config=LORA, batch=1, seq=1024, model="llama-7b", **settings):
    return pytorch_ledger(model, config, batch, seq, Loop(**{"headroom": 0.0, **settings}))


@pytest.mark.parametrize(("settings", "bytes_each"), [
    ({"precision": "mixed"}, 16), ({"precision": "mixed-float32-gradients"}, 18), ({"precision": "float32"}, 16),
    ({"precision": "autocast"}, 16), ({}, 8), ({"optimizer": "sgd"}, 4), ({"optimizer": "momentum"}, 6),
    ({"optimizer": "paged_adamw"}, 4), ({"precision": "mixed", "optimizer": "sgd"}, 8),
])  # fmt: skip
def test_bytes_a_parameter_of_full_fine_tuning(settings, bytes_each):
    """16 and 18 are ZeRO's and DeepSpeed's; torch's Adam keeps its states in the weights' own 16 bits: 2 + 2 + 2 + 2."""
    assert ledger(None, seq=None, **settings).model_states == bytes_each * N
    assert ledger(None, seq=None, **settings).total == bytes_each * N + CONTEXT + 2 * WORKSPACE


def test_7b_in_mixed_precision_is_what_is_published():
    assert ledger(None, seq=None, precision="mixed").model_states == pytest.approx(107.8e9, rel=1e-3)  # to 112 of 7.0B


def test_qlora_of_65_billion_fits_48_gb():
    config = LoraConfig(r=64, target_modules="all-linear")
    found = ledger(config, 1, 512, "llama-65b", quantization="nf4", optimizer="paged_adamw")
    assert 40e9 < found.total < 48e9


def test_the_step_of_adam_needs_ten_bytes_a_parameter():
    """foreach makes the square roots of all second moments at once; fused does not."""
    assert ledger(None).lines["optimizer's temporary"] == 2 * N
    assert ledger(None).peak == "optimizer step"
    assert "optimizer's temporary" not in ledger(None, optimizer="adamw_fused").lines


def test_logits_in_float32_take_twelve_bytes_a_token_and_word():
    """Log-probabilities, their gradient and that of the logits: what transformers' loss holds at once."""
    t, V = 4 * 4096, 128_256
    found = ledger(LORA, 4, 4096, "llama3-8b")
    assert found.peak == "the loss" and found.lines["logits"] == 12 * t * V
    assert ledger(LORA, 4, 4096, "llama3-8b", logits="fused").held["logits"] == 12 * 1024 * V


def test_checkpoints_are_the_inputs_of_the_blocks():
    t, h, L = 1024, 4096, 32
    found = ledger()
    assert found.held["activations"] == 2 * t * h * L
    block = blocks_of(architecture("llama-7b"), trained_parameters(architecture("llama-7b"), LORA))[0]
    kept = t * sum(term.bytes for term in block_terms(block, t))
    assert found.activations_per_layer == (kept,) * L
    assert found.moments["backward, last block"]["recomputed block"] == kept
    assert ledger(checkpointing=False).held["activations"] == kept * L


def test_flash_attention_grows_with_the_length_and_eager_with_its_square():
    def per_token(attention, s):
        return ledger(None, 1, s, attention=attention, checkpointing=False).held["activations"] / s

    assert per_token("flash", 4096) == per_token("flash", 1024)
    assert per_token("eager", 2048) - per_token("eager", 1024) == 32 * 6 * 32 * 1024  # L x 6 a s: 4 and 2 bytes
    assert per_token("sdpa", 1024) == per_token("flash", 1024)  # no shared heads in LLaMA-7B
    sdpa, flash = (ledger(model="llama3-8b", attention=x).activations_per_layer[0] for x in ("sdpa", "flash"))
    assert sdpa - flash == 1024 * 2 * 2 * (4096 - 1024)  # eight heads of keys and values, repeated to 32


def test_a_block_by_the_formula_of_today():
    """bfloat16, all trained, flash: norms 4 + 2 bytes, inputs 2 + 2, attention 2 (a d + k d) 2 + 4 a, MLP 3 + 1 arrays."""
    arch = architecture("llama3-8b")
    h, a, kv, f = 4096, 32, 1024, 14336
    block = blocks_of(arch, arch.shapes)[0]
    expected = 2 * (4 * h + 4) + 2 * 2 * h + 2 * 2 * h + 2 * (h + 2 * kv) + 2 * h + 4 * a + 3 * 2 * f + 2 * f
    assert sum(term.bytes for term in block_terms(block, 2048, autocast=False)) == expected


def test_megatrons_formula():
    """Korthikanti et al. 2022, eq. 1: s b h L (34 + 5 a s / h)."""
    s, h, a = 2048, 12288, 96
    assert sum(term.bytes for term in megatron_terms(s, h, a)) == 34 * h + 5 * a * s
    gpt3 = architecture("gpt3")
    block = blocks_of(gpt3, gpt3.shapes)[0]
    ours = sum(term.bytes for term in block_terms(block, s, autocast=False, attention="eager"))
    gelu = 3 * 2 * 4 * h  # transformers writes it in Python, which keeps three arrays more
    assert ours - gelu == pytest.approx(34 * h + 5 * a * s, rel=0.001)


def test_gpus_share_what_the_kind_of_sharding_says():
    n = 4
    alone, ddp = ledger(None), ledger(None, gpus=n)
    assert ddp.held["gradient buckets"] == 2 * N and ddp.held["optimizer states"] == alone.held["optimizer states"]
    shared = {"zero1": ("optimizer states",), "zero2": ("optimizer states", "gradients")}
    shared["zero3"] = (*shared["zero2"], "trained weights")
    for sharding, lines in shared.items():
        found = ledger(None, gpus=n, sharding=sharding)
        for line in ("trained weights", "gradients", "optimizer states"):
            assert found.held[line] == alone.held[line] // (n if line in lines else 1), (sharding, line)
    outside = 2 * (2 * 32000 * 4096 + 4096)
    assert found.moments["the loss"]["gathered weights"] == 2 * (2 * N - outside) // 32 + outside
    off = ledger(None, gpus=n, sharding="zero3", offload=True)
    assert not off.held["optimizer states"] and not off.held["trained weights"] and off.total < found.total


def test_fsdps_mixed_precision_gathers_16_bits_of_shards_in_float32():
    """accelerate makes shards float32 then: 16 bytes a parameter, shared, and a stream of hidden states in 16 bits."""
    fsdp = {"gpus": 4, "sharding": "zero3", "logits": "in-place"}
    wide, narrow = (ledger(None, 4, 4096, precision=p, **fsdp) for p in ("autocast", "bfloat16"))
    assert sum(wide.held[line] for line in ("trained weights", "gradients", "optimizer states")) == 16 * N // 4
    for line in ("gathered weights", "activations", "logits"):
        assert wide.moments["the loss"][line] == narrow.moments["the loss"][line], line
    alone = ledger(None, 4, 4096, precision="autocast")
    assert alone.held["activations"] == 2 * wide.held["activations"]


def test_what_hooks_of_fsdp_keep_until_the_end_of_the_pass():
    """Of frozen blocks in reentrant checkpoints (`test_pytorch_loop_torch` watches torch do it)."""
    fsdp = {"gpus": 2, "sharding": "zero3", "reentrant": True}
    found = ledger(LORA, 2, 4096, **fsdp).moments["backward, first block"]
    stream = 2 * 2 * 4096 * 4096
    assert (found["activations"], found["gradients of blocks' inputs"]) == (32 * stream, 31 * stream)
    for other in ({"reentrant": False}, {"checkpointing": False}, {"gpus": 1, "sharding": "ddp"}):
        assert (
            "gradients of blocks' inputs" not in ledger(LORA, 2, 4096, **fsdp | other).moments["backward, first block"]
        )
    assert "gradients of blocks' inputs" not in ledger(None, 2, 4096, **fsdp).moments["backward, first block"]


def test_four_bit_layers_hand_on_the_float32_of_a_layer_norm():
    """Linear4bit returns its input's dtype: under autocast float32 behind a layer norm, 16 bits behind an RMS norm."""
    config = LoraConfig(r=8, target_modules=["c_attn"])
    four, plain = (ledger(config, 2, 512, "gpt2", quantization=q).held["activations"] for q in ("nf4", None))
    assert four == 2 * plain == 12 * 4 * 2 * 512 * 768
    llama = (ledger(LORA, 2, 512, quantization=q).held["activations"] for q in ("nf4", None))
    assert len(set(llama)) == 1


def test_a_last_norm_alone_reaches_no_block():
    """Whether it is tuned or trained as a copy beside LoRA in the last blocks."""
    for config in (LNTuningConfig(target_modules=["ln_f"]), BitFitConfig(target_modules=["ln_f"])):
        assert "activations" not in pytorch_ledger("gpt2", config, 1, 64, Loop(checkpointing=False)).lines
    last = dict(r=2, target_modules=["c_attn"], layers_to_transform=[11])
    lines = [
        pytorch_ledger("gpt2", LoraConfig(**last, modules_to_save=saved), 1, 64, Loop(checkpointing=False)).lines["activations"]
        for saved in (None, ["ln_f"])
    ]
    assert lines[0] == lines[1]


def test_gelu_in_one_op_keeps_its_input_alone():
    config = LoraConfig(r=8, target_modules=["q_proj"])
    python, one = (
        ledger(config, 1, 512, {"name": "phi-2", "hidden_act": act}, checkpointing=False).held["activations"]
        for act in ("gelu_new", "gelu_pytorch_tanh")
    )
    assert python - one == 32 * 512 * 3 * 2 * 4 * 2560
    assert python == ledger(config, 1, 512, "phi-2", checkpointing=False).held["activations"]


def test_gradients_of_several_passes_are_there_from_the_start():
    assert "gradients" not in ledger(None).moments["the loss"]
    assert ledger(None, accumulation=2).moments["the loss"]["gradients"] == 2 * N


def test_a_cache_in_fewer_bits_is_smaller():
    def cache(bits):
        return pytorch_ledger("llama3-8b", None, 4, 2048, Loop(cache_bits=bits), mode="generate", max_new_tokens=256)

    full = cache(16).moments["the last token"]["KV cache"]
    assert full == 2 * 32 * 8 * 128 * 2 * 4 * (2048 + 255)
    assert [cache(bits).moments["the last token"]["KV cache"] / full for bits in (8, 4)] == [8.5 / 16, 4.5 / 16]


def test_a_prefix_is_in_the_cache_from_the_start():
    one, many = (
        pytorch_ledger("llama-7b", PrefixTuningConfig(num_virtual_tokens=n), 2, 100, mode="generate", max_new_tokens=3).moments
        for n in (1, 1000)
    )
    position = 2 * 32 * 4096 * 2 * 2  # keys and values of two rows, two bytes each
    assert [m["the prompt"]["KV cache"] for m in (one, many)] == [101 * position, 1100 * position]
    assert [m["the last token"]["KV cache"] for m in (one, many)] == [103 * position, 1102 * position]


def test_what_is_not_in_four_bits_is_widened_when_asked():
    plain, wide = (ledger(quantization="nf4", upcast=upcast).held["frozen weights"] for upcast in (False, True))
    assert wide - plain == 2 * (2 * 32000 * 4096 + 65 * 4096)


def test_experts_are_packed_when_asked():
    """Mixtral's 45.1 billion weights of experts stay in 16 bits with transformers, whose layers alone are packed."""
    config = LoraConfig(r=8, target_modules=["q_proj"])
    plain, packed = (
        ledger(config, seq=None, model="mixtral-8x7b", quantization="nf4", pack_experts=p).held["frozen weights"]
        for p in (False, True)
    )
    experts = 32 * 8 * 3 * 4096 * 14336
    assert plain - packed == pytest.approx(experts * (2 - 4.127 / 8), rel=1e-3)


def test_every_family_of_which_there_is_a_table():
    for name in ("gpt2", "bert-base", "roberta-base", "deberta-v3-base", "t5-base", "bloom-560m", "opt-350m", "qwen2.5-3b"):
        found = ledger(None, 1, 128, name)
        assert min(found.lines.values()) > 0 and found.held["activations"] > 0, name
        assert ledger("frozen", 1, 128, name).total < found.total
    with pytest.raises(ValueError, match="bert-base has 512 positions"):
        ledger(None, 1, 513, "bert-base")


@pytest.mark.parametrize(("name", "positions"), [
    ("opt-125m", 2048), ("roberta-base", 512), ("xlm-roberta-base", 512), ("whisper-tiny", 448), ("gpt2", 1024),
])  # fmt: skip
def test_positions_are_those_of_text(name, positions):
    """OPT's and RoBERTa's tables have two rows more."""
    assert ledger(None, 1, positions, name).total
    with pytest.raises(ValueError, match=f"{name} has {positions} positions"):
        ledger(None, 1, positions + 1, name)


def test_an_image_encoders_positions_do_not_limit_the_text():
    assert ledger("frozen", 1, 8192, "gemma3-4b").total > ledger("frozen", 1, 4096, "gemma3-4b").total


def test_whispers_head_makes_logits():
    assert ledger(None, 1, 100, "whisper-tiny").moments["the loss"]["logits"] == 12 * 51865 * 100


def test_adafactor_keeps_rows_and_columns_of_each_matrix_of_a_stack():
    p = LOOP_PRECISIONS["bfloat16"]
    for shape, numbers in (((7,), 7), ((5, 7), 5 + 7), ((3, 5, 7), 3 * (5 + 7)), ((2, 3, 5, 7), 6 * (5 + 7))):
        assert optimizer_bytes("adafactor", {"w": shape}, p) == 4 * numbers


def test_embeddings_have_states_in_float32_beside_those_in_8_bits():
    """transformers' Trainer registers optim_bits=32 for each nn.Embedding, whose Parameter a tied head is."""
    p, n = LOOP_PRECISIONS["bfloat16"], 64 * 64
    assert optimizer_bytes("adamw_8bit", {"linear": (64, 64), "table": (64, 64)}, p, {"table"}) == 2 * (n + n // 64) + 8 * n
    arch = architecture("gpt2")  # with a tied head
    tables = {name for name in arch if arch.kinds[name] == "embedding"}
    assert len(tables) == 2
    states = ledger(None, seq=None, model="gpt2", optimizer="adamw_8bit").held["optimizer states"]
    assert states == optimizer_bytes("adamw_8bit", arch.shapes, p, tables) > 8 * (50257 + 1024) * 768
    for config in (LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"]), PromptTuningConfig(num_virtual_tokens=100)):
        trained = trained_parameters(arch, config)
        wide = {name for name in trained if "wte" in name}
        states = ledger(config, seq=None, model="gpt2", optimizer="adamw_8bit").held["optimizer states"]
        assert wide and states == optimizer_bytes("adamw_8bit", trained, p, wide)


@pytest.mark.parametrize(("arguments", "sentence"), [
    ({"max_new_tokens": 5}, "max_new_tokens has no effect with mode='train' and seq_len=8"),
    ({"mode": "evaluate", "max_new_tokens": 5000}, "max_new_tokens has no effect with mode='evaluate'"),
    ({"mode": "generate", "seq_len": None}, "mode='generate' needs seq_len"),
    ({"mode": "generate", "seq_len": 1020, "max_new_tokens": 20},
     r"gpt2 has 1024 positions, and seq_len=1020 \+ 19 of max_new_tokens=20 \(the last is not fed back\) = 1039 is more"),
    ({"config": PrefixTuningConfig(num_virtual_tokens=20), "seq_len": 1005}, "20 virtual tokens leave 1004 of them, and seq_len=1005"),
])  # fmt: skip
def test_what_memory_ledger_refuses_is_refused_here(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        pytorch_ledger("gpt2", **{"seq_len": 8, **arguments})


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"precision": "fp8"}, "precision must be one of bfloat16"), ({"attention": "ring"}, "attention must be one of eager"),
    ({"logits": "none"}, "logits must be one of float32"), ({"gpus": 0}, "gpus must be a positive integer"),
    ({"sharding": "zero2"}, "sharding='zero2' needs several GPUs"), ({"upcast": True}, "give quantization, too"), ({"pack_experts": True}, "give quantization, too"), ({"cache_bits": 3}, "cache_bits must be 4, 8 or 16"),
])  # fmt: skip
def test_nonsense_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        ledger(**settings)


def test_the_largest_number_that_fits():
    for most in (1, 7, 8, 100, 1500):
        for limit in (1, 2, 63, 64, 65, 1500):
            assert largest(lambda n, limit=limit: n <= limit, most=most) == min(limit, most)
    assert largest(lambda n: False) == 0


def test_published_footprints_are_predicted():
    """The published peaks of full fine-tuning are Adam's step to the third digit; the rest is reported as it is."""
    found = {f.row["id"]: f for f in footprints()}
    for row in ("fms-a100-L11", "fms-a100-L12"):
        assert found[row].ratio == pytest.approx(1, abs=0.001)
    assert found["hf-bert-2"].close and found["peft-mmq-lora-rank32-state"].close
    assert predict({"model": "llama-7b", "config": None, "measured": "states"}) == 8 * N
    counts = summary(list(found.values()))
    assert counts["looked at"]["runs"] + counts["held out"]["runs"] == len(found) == 91
    assert counts["of allocated memory"]["within 15 %"] >= 0.75 * counts["of allocated memory"]["predicted"] > 40
    assert 0.85 < counts["held out"]["median"] < 1.05
    assert all(f.close or f.row["reason"] for f in found.values())  # each miss says why, as far as that is known
