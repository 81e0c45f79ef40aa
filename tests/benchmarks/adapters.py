"""What an adapter that cannot be merged costs at inference: forward passes of the adapted model against the base's.

    python tests/benchmarks/adapters.py [--width 256] [--layers 6] [--repeats 30] [--threads 1]

The two are timed in turns in one process, and the figure is the ratio of their fastest runs: 1.00 is no latency.
"batch 1, 1 token" is a step of generation with a cache of 128 positions; "batch 8, 128 tokens" a prompt or an
evaluation. LoRA is timed unmerged and merged.
"""

from __future__ import annotations

import argparse

import numpy as np
from turns import in_turns

import minipeft as mp
from minipeft.backend import set_num_threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    set_num_threads(args.threads)
    config = mp.TransformerConfig.llama(
        vocab_size=512, hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=8,
        max_position_embeddings=512,
    )  # fmt: skip
    base = mp.Transformer(config, seed=0)
    m = args.width // 16
    lora = mp.get_peft_model(base, mp.LoraConfig(r=8, target_modules="all-linear"))
    models = {
        f"bottleneck, houlsby, m={m}": mp.get_peft_model(base, mp.BottleneckConfig(placement="houlsby")),
        f"bottleneck, pfeiffer, m={m}": mp.get_peft_model(base, mp.BottleneckConfig()),
        f"bottleneck, parallel, m={m}": mp.get_peft_model(base, mp.BottleneckConfig(placement="parallel")),
        "LoRA r=8, every layer": lora,
        "LoRA r=8, merged": lora.merge_and_unload(),
        "prompt, 20 tokens": mp.get_peft_model(base, mp.PromptTuningConfig(num_virtual_tokens=20)),
        "prefix, 20 tokens": mp.get_peft_model(base, mp.PrefixTuningConfig(num_virtual_tokens=20)),
    }
    rng = np.random.default_rng(0)
    prompt, long = rng.integers(0, 512, (1, 128)), rng.integers(0, 512, (8, 128))

    def step(model):
        """One token after a cache of 128 positions (and the virtual ones)."""
        cache = mp.KVCache()
        model(prompt, past_key_values=cache)
        return lambda: model(prompt[:, :1], past_key_values=mp.KVCache(cache))

    print(f"{'':30}{'batch 1, 1 token':>20}{'batch 8, 128 tokens':>22}")
    with mp.no_grad():
        for name, model in models.items():
            ratios = []
            for ours, theirs in (
                (step(model), step(base)),
                (lambda model=model: model(long), lambda: base(long)),
            ):
                times = in_turns(args.repeats, ours=ours, theirs=theirs)
                ratios.append(min(times["ours"]) / min(times["theirs"]))
            print(f"{name:30}{ratios[0]:20.2f}{ratios[1]:22.2f}", flush=True)


if __name__ == "__main__":
    main()
