"""Four bits: the speed of quantizing and dequantizing, of a QLoRA step, and its peak memory, against the peers.

    python tests/benchmarks/quantization.py [codes] [step] [peers] [memory] [--threads 2] [--width 512] [--repeat 9]

codes    GB/s of float32 read (or written), as a share of a plain copy, and against bitsandbytes where it is installed
step     a QLoRA step over the same LoRA step in float32: one transformer, 512 tokens a step
peers    a QLoRA step against bitsandbytes + PEFT + transformers, the same shape and adapter
memory   peak of a QLoRA step of a 135M-parameter model, measured, against the ledger

What is compared is timed in turns: in one process, or, for the peers, each library in its own (see `turns`). A figure is
the median of its turns, a ratio the median over pairs of turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time

import turns
from turns import ratio

WHAT = ("codes", "step", "peers", "memory")


def seconds(fn) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def alternate(repeat: int, **calls) -> dict[str, list[float]]:
    """{name: seconds of each turn}, one call of each after the other, after a turn that is not counted."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def codes(repeat: int) -> None:
    import numpy as np

    from minipeft import quant
    from minipeft.backend import parallel_rows, split_rows

    x = np.random.default_rng(0).standard_normal((2048, 4096)).astype(np.float32)
    out = np.empty_like(x)
    packed, state = quant.quantize_4bit(x)

    def copy():
        parallel_rows(np, lambda s: np.copyto(out[s], x[s]), x.shape[0], x.shape[1])

    def tiles():
        weight = quant.kernels.Tiles(packed, state)
        split_rows(lambda part: [None for _ in weight.rows(part)], x.shape[0], x.size)

    calls = {
        "copy": copy,
        "quantize": lambda: quant.quantize_4bit(x),
        "quantize nested": lambda: quant.quantize_4bit(x, compress_statistics=True),
        "dequantize": lambda: quant.dequantize_4bit(packed, state),
        "tiles": tiles,
    }
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes.functional as theirs
        import torch

        t = torch.from_numpy(x)
        packed2, state2 = theirs.quantize_4bit(t, quant_type="nf4")
        calls["bitsandbytes quantize"] = lambda: theirs.quantize_4bit(t, quant_type="nf4")
        calls["bitsandbytes dequantize"] = lambda: theirs.dequantize_4bit(packed2, state2)
    times = alternate(repeat, **calls)
    for name, found in times.items():
        line = f"{name:24s} {x.nbytes / statistics.median(found) / 1e9:6.2f} GB/s   {ratio(times['copy'], found):5.2f} of a copy"
        peer = f"bitsandbytes {name.split()[0]}"
        print(line + (f"   {ratio(times[peer], found):5.2f} times bitsandbytes' speed" if peer in times else ""))


def our_models(width: int, layers: int = 4):
    import minipeft as mp

    shape = dict(vocab_size=1024, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64)
    model = mp.Transformer(mp.TransformerConfig.llama(**shape, tie_word_embeddings=True), seed=0)
    return model, mp.quant.quantize_model(model)


def our_step(base, ids, r: int = 8, targets=("q_proj", "v_proj")):
    import minipeft as mp

    model = mp.get_peft_model(base, mp.LoraConfig(r=r, target_modules=list(targets)))
    optimizer = mp.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> float:
        loss = model.loss(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def step(width: int, repeat: int) -> None:
    import numpy as np

    ids = np.random.default_rng(0).integers(0, 1024, (4, 128))
    dense, quantized = our_models(width)
    times = alternate(repeat, lora=our_step(dense, ids), qlora=our_step(quantized, ids))
    middle = {name: 1e3 * statistics.median(found) for name, found in times.items()}
    print(f"width {width}, 512 tokens: LoRA {middle['lora']:.0f} ms, QLoRA {middle['qlora']:.0f} ms, ratio {ratio(times['qlora'], times['lora']):.2f}")


def ours(width: int) -> dict:
    import numpy as np

    _, quantized = our_models(width)
    step = our_step(quantized, np.random.default_rng(0).integers(0, 1024, (4, 128)))
    return {"steps": lambda n: [step() for _ in range(n)]}


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

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return {"steps": lambda n: [step() for _ in range(n)]}


def peers(width: int, repeat: int) -> None:
    workers = [turns.Worker("--serve", library, "--width", str(width)) for library in ("ours", "theirs")]
    a, b = ([t / 5 for t in times] for times in turns.alternate(workers, repeat, "steps", 5)[0])  # as in training, without pauses
    (ready, peak), (their_ready, their_peak) = (worker.ask("memory")[1] for worker in workers)
    print(
        f"width {width}, 512 tokens: minipeft {1e3 * statistics.median(a):.0f} ms, bitsandbytes + PEFT "
        f"{1e3 * statistics.median(b):.0f} ms, ratio {ratio(a, b):.2f} ({repeat} pairs of 5 steps); resident memory before and at the peak "
        f"{ready:.0f} and {peak:.0f} MB, {their_ready:.0f} and {their_peak:.0f} MB"
    )
    for worker in workers:
        worker.close()


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

    def train() -> None:
        model.loss(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    train()  # the optimizer's moments are there
    ledger = memory_ledger(model, batch=1, seq_len=128)
    held = sum(p.data.nbytes for p in model.parameters()) + ledger.held["optimizer states"]
    peak = held + measure_peak(train)
    print(f"{count / 1e6:.1f}M parameters, 128 tokens: measured peak {peak / 1e6:.1f} MB, ledger {ledger.total / 1e6:.1f} MB, ratio {peak / ledger.total:.3f}")
    for line, n in ledger.lines.items():
        print(f"    {line:24s} {n / 1e6:8.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"any of {', '.join(WHAT)} (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--serve", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        sys.exit(turns.serve({"ours": ours, "theirs": theirs}[options.serve](options.width)))
    unknown = [what for what in options.what if what not in WHAT]
    if unknown:
        parser.error(f"unknown: {unknown[0]!r} (choose from {', '.join(WHAT)})")
    os.environ["MINIPEFT_THREADS"] = os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for what in options.what or WHAT:
        print(f"== {what}")
        {
            "codes": lambda: codes(options.repeat),
            "step": lambda: step(options.width, options.repeat),
            "peers": lambda: peers(options.width, options.repeat),
            "memory": memory,
        }[what]()
