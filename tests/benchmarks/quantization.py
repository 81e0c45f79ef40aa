"""Four bits: the speed of quantizing and dequantizing, of a QLoRA step, and its peak memory, against the peers.

    python tests/benchmarks/quantization.py [codes] [lora] [step] [memory] [--width 512] [--repeat 9] [--threads 1,2] [--json FILE]

codes    GB/s of float32 read (or written): against bitsandbytes, and dequantizing in tiles, as a product does
lora     a QLoRA step against the same LoRA step in float32, both ours: one transformer, 512 tokens a step
step     a QLoRA step against bitsandbytes + PEFT + transformers, the same shape and adapter
memory   peak of a QLoRA step of a 135M-parameter model, measured, against the ledger

What is compared is timed in turns, each in a process of its own (see `turns`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import turns
from turns import Pair, stepper

WHAT = ("codes", "lora", "step", "memory")
CODES = ("quantize", "dequantize", "dequantize in tiles")  # bitsandbytes' counterpart of the last is the whole array
TIMES, STEPS = 20, 5  # calls, steps in a turn
NUMBERS = (2048, 4096)


def again(call: Callable) -> None:
    for _ in range(TIMES):
        call()


def our_codes() -> dict:
    import numpy as np

    from minipeft import quant
    from minipeft.backend import split_rows

    x = np.random.default_rng(0).standard_normal(NUMBERS).astype(np.float32)
    packed, state = quant.quantize_4bit(x)

    def tiles():
        weight = quant.kernels.Tiles(packed, state)
        split_rows(lambda part: [None for _ in weight.rows(part)], x.shape[0], x.size)

    calls = (lambda: quant.quantize_4bit(x), lambda: quant.dequantize_4bit(packed, state), tiles)
    return {name: partial(again, call) for name, call in zip(CODES, calls)}


def their_codes() -> dict:
    import bitsandbytes.functional as bnb
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    x = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(x, quant_type="nf4")
    calls = (lambda: bnb.quantize_4bit(x, quant_type="nf4"), *[lambda: bnb.dequantize_4bit(packed, state)] * 2)
    return {name: partial(again, call) for name, call in zip(CODES, calls)}


def codes(pair: Pair, repeat: int, path: str) -> None:
    amount = TIMES * 4 * NUMBERS[0] * NUMBERS[1] / 1e9
    for name in CODES:
        turns.report(pair.row(f"NF4, {name}", "bitsandbytes", pair.alternate(repeat, name)[0], "GB/s", amount), path)


def our_models(width: int, layers: int = 4):
    import minipeft as mp

    shape = dict(vocab_size=1024, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64)
    model = mp.Transformer(mp.TransformerConfig.llama(**shape, tie_word_embeddings=True), seed=0)
    return model, mp.quant.quantize_model(model)


def our_step(base, ids, r: int = 8, targets=("q_proj", "v_proj")):
    import minipeft as mp

    model = mp.get_peft_model(base, mp.LoraConfig(r=r, target_modules=list(targets)))
    optimizer = mp.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return stepper(lambda: model.loss(ids, ids), optimizer)


def ours(width: int, quantized: bool = True) -> dict:
    import numpy as np

    step = our_step(our_models(width)[quantized], np.random.default_rng(0).integers(0, 1024, (4, 128)))
    return {"steps": lambda n: [step() for _ in range(n)], "products": turns.numpy_products()}


def theirs(width: int) -> dict:
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    shape = dict(vocab_size=1024, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4, num_attention_heads=width // 64)
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    weights = {name: m.weight.data for name, m in dense.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    model = replace_with_bnb_linear(dense, modules_to_not_convert=["lm_head"], quantization_config=options)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        layer.weight = type(layer.weight)(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 1024, (4, 128)))
    step = stepper(lambda: model(input_ids=tokens, labels=tokens).loss, optimizer)
    return {"steps": lambda n: [step() for _ in range(n)], "products": turns.torch_products()}


def step(pair: Pair, work: str, peer: str, width: int, repeat: int) -> dict:
    import minipeft as mp
    from minipeft.accounting import step_flops

    config = our_models(width)[0].config
    flops = step_flops(config, mp.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), 4, 128, checkpointing=False).total
    row = pair.row(f"{work}, d {width}, 4 layers, 4 x 128", peer, pair.alternate(repeat, "steps", STEPS)[0], amount=STEPS)
    return pair.beside_products(row, turns.weights(config, 4 * 128), 2, flops)


def memory() -> None:
    import numpy as np

    import minipeft as mp
    from minipeft.accounting import memory_ledger
    from minipeft.accounting.memory import measure_peak

    config = mp.TransformerConfig.llama(  # SmolLM2-135M's shape
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True,
    )  # fmt: skip
    dense = mp.Transformer(config, seed=0)
    count = sum(p.size for p in dense.parameters())
    base = mp.quant.quantize_model(dense)
    del dense
    model = mp.get_peft_model(base, mp.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    ids = np.random.default_rng(0).integers(0, 49152, (1, 128))
    optimizer = mp.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    train = stepper(lambda: model.loss(ids, ids), optimizer)
    train()  # the optimizer's moments are there
    ledger = memory_ledger(model, batch=1, seq_len=128)
    held = sum(p.data.nbytes for p in model.parameters()) + ledger.held["optimizer states"]
    peak = held + measure_peak(train)
    print(f"{count / 1e6:.1f}M parameters, 128 tokens: measured peak {peak / 1e6:.1f} MB, ledger {ledger.total / 1e6:.1f} MB, ratio {peak / ledger.total:.3f}")
    for line, n in ledger.lines.items():
        print(f"    {line:24s} {n / 1e6:8.1f} MB")


if __name__ == "__main__":
    options = turns.options(__doc__, WHAT, ("ours", "theirs", "dense"), width=512, repeat=9)
    if options.serve:
        library, width = options.serve, options.width
        if options.what == ["codes"]:
            raise SystemExit(turns.serve(our_codes() if library == "ours" else their_codes()))
        raise SystemExit(turns.serve(theirs(width) if library == "theirs" else ours(width, library == "ours")))
    width, repeat, path = ("--width", str(options.width)), options.repeat, options.json
    for threads in options.threads:
        if "codes" in options.what:
            with Pair(threads, "codes") as pair:
                codes(pair, repeat, path)
        if "step" in options.what:
            with Pair(threads, *width) as pair:
                turns.report(step(pair, "QLoRA step", "bitsandbytes + peft", options.width, repeat), path)
        if "lora" in options.what:
            with Pair(threads, *width, libraries=("ours", "dense")) as pair:
                turns.report(step(pair, "QLoRA step", "minipeft's LoRA", options.width, repeat), path)
    if "memory" in options.what:
        memory()
