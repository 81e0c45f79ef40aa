"""A LoRA step and generation of a 135M-parameter Llama against `transformers` + `peft` on the CPU, in one run.

    python tests/benchmarks/real_llm.py [step] [generate] [--model DIR] [--repeat 7] [--tokens 48] [--threads 1,2] [--json FILE]

step       LoRA (r 8 on q_proj and v_proj), batch 4 x 128, AdamW, float32: seconds a step, and peak resident memory
generate   greedy, with the cache, batches of 1 and 8: tokens a second, a prompt of 32 tokens included

Both libraries read the same Hugging Face directory: --model, or SmolLM2-135M's shape with random weights (seed 0), which
cost the same to compute with. They take turns, each in its own process (see `turns`). They must agree on the loss before
training; whether they agree on the tokens is said.
"""

from __future__ import annotations

import os
import tempfile

import turns
from turns import Pair, stepper, trainers_step

WHAT = ("step", "generate")
BATCH, LENGTH, PROMPT = 4, 128, 32
SHAPE = dict(  # SmolLM2-135M
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True,
)  # fmt: skip


def ours(path: str) -> dict:
    import numpy as np

    import minipeft as mp

    model, _ = mp.from_pretrained(path)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (8, LENGTH))
    tuned = mp.get_peft_model(model, mp.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    optimizer = mp.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)
    step = trainers_step(tuned, optimizer, ids[:BATCH])

    def generate(batch: int, new: int) -> list:
        return model.generate(ids[:batch, :PROMPT], max_new_tokens=new, eos_token_id=()).tolist()

    return {"step": step, "generate": generate, "products": turns.numpy_products()}


def theirs(path: str) -> dict:
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, model.config.vocab_size, (8, LENGTH)))
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    train = None

    def step() -> float:
        nonlocal train
        if train is None:  # PEFT puts its layers into the model itself: not before generation is timed
            tuned = get_peft_model(model, lora).train()
            optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)
            train = stepper(lambda: tuned(input_ids=ids[:BATCH], labels=ids[:BATCH]).loss, optimizer)
        return train()

    def generate(batch: int, new: int) -> list:
        prompts = ids[:batch, :PROMPT]
        options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return model.eval().generate(prompts, attention_mask=torch.ones_like(prompts), **options).tolist()

    return {"step": step, "generate": generate, "products": turns.torch_products()}


def step(pair: Pair, config, repeat: int) -> dict:
    import minipeft as mp
    from minipeft.accounting import step_flops

    times, losses = pair.alternate(repeat, "step")
    if abs(losses[0] - losses[1]) > 1e-4 * losses[1]:
        raise SystemExit(f"the losses before training differ: {losses}")
    lora = mp.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    flops = step_flops(config, lora, BATCH, LENGTH, checkpointing=False).total
    row = pair.row(f"LoRA step, {name(config)}, {BATCH} x {LENGTH}", "transformers + peft", times)
    return pair.beside_products(row, turns.weights(config, BATCH * LENGTH), 2, flops)


def generate(pair: Pair, config, repeat: int, batch: int, new: int) -> dict:
    times, tokens = pair.alternate(repeat, "generate", batch, new)
    same = sum(x == y for x, y in zip(*tokens))
    print(f"{same} of {batch} rows of tokens are the same")
    row = pair.row(f"decode, {name(config)}, batch {batch}", "transformers", times, "tokens/s", batch * new)
    each = [[*shape, times * (new - 1)] for *shape, times in turns.weights(config, batch)]
    return pair.beside_products(row, turns.weights(config, batch * PROMPT, head=False) + each, 1)


def name(config) -> str:
    """135M Llama"""
    from minipeft.accounting import count_parameters

    return f"{count_parameters(config).total / 1e6:.0f}M {config.model_type.capitalize()}"


if __name__ == "__main__":
    options = turns.options(__doc__, WHAT, model=None, repeat=7, tokens=48)
    if options.serve:
        raise SystemExit(turns.serve({"ours": ours, "theirs": theirs}[options.serve](options.model)))
    import minipeft as mp

    with tempfile.TemporaryDirectory() as made:
        if not options.model:
            mp.save_pretrained(mp.Transformer(mp.TransformerConfig.llama(**SHAPE), seed=0), made)
        config = mp.from_pretrained(options.model or made)[0].config
        for threads in options.threads:
            if "step" in options.what:
                with Pair(threads, "--model", options.model or made) as pair:
                    turns.report(step(pair, config, options.repeat), options.json)
            for batch in (1, 8) if "generate" in options.what else ():
                with Pair(threads, "--model", options.model or made) as pair:
                    turns.report(generate(pair, config, options.repeat, batch, options.tokens), options.json)
