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

import importlib.util
import os
import statistics

import turns
from turns import in_turns, ratio, stepper

WHAT = ("codes", "step", "peers", "memory")


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
    times = in_turns(repeat, **calls)
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
    return stepper(lambda: model.loss(ids, ids), optimizer)


def step(width: int, repeat: int) -> None:
    import numpy as np

    ids = np.random.default_rng(0).integers(0, 1024, (4, 128))
    dense, quantized = our_models(width)
    times = in_turns(repeat, lora=our_step(dense, ids), qlora=our_step(quantized, ids))
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
    step = stepper(lambda: model(input_ids=tokens, labels=tokens).loss, optimizer)
    return {"steps": lambda n: [step() for _ in range(n)]}


def peers(width: int, repeat: int) -> None:
    workers = turns.both("--width", str(width))
    a, b = ([t / 5 for t in times] for times in turns.alternate(workers, repeat, "steps", 5)[0])  # as in training, without pauses
    print(
        f"width {width}, 512 tokens: minipeft {1e3 * statistics.median(a):.0f} ms, bitsandbytes + PEFT "
        f"{1e3 * statistics.median(b):.0f} ms, ratio {ratio(a, b):.2f} ({repeat} pairs of 5 steps); "
        f"{turns.memory(workers)}"
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

    train = stepper(lambda: model.loss(ids, ids), optimizer)
    train()  # the optimizer's moments are there
    ledger = memory_ledger(model, batch=1, seq_len=128)
    held = sum(p.data.nbytes for p in model.parameters()) + ledger.held["optimizer states"]
    peak = held + measure_peak(train)
    print(f"{count / 1e6:.1f}M parameters, 128 tokens: measured peak {peak / 1e6:.1f} MB, ledger {ledger.total / 1e6:.1f} MB, ratio {peak / ledger.total:.3f}")
    for line, n in ledger.lines.items():
        print(f"    {line:24s} {n / 1e6:8.1f} MB")


if __name__ == "__main__":
    options = turns.options(__doc__, WHAT, width=512, repeat=9)
    if options.serve:
        raise SystemExit(turns.serve({"ours": ours, "theirs": theirs}[options.serve](options.width)))
    for what in options.what:
        print(f"== {what}")
        {
            "codes": lambda: codes(options.repeat),
            "step": lambda: step(options.width, options.repeat),
            "peers": lambda: peers(options.width, options.repeat),
            "memory": memory,
        }[what]()
