"""QLoRA: the procedure, what four bits save, what they cost, and what goes wrong without care."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

import minipeft as mp

from ..accounting.cards import CARDS
from ..accounting.footprints import footprints
from ..accounting.loop import Loop
from ..accounting.memory import memory_ledger
from ..accounting.parameters import count_parameters
from ..accounting.pytorch_loop import pytorch_ledger
from ..backend import asarray, synchronize, to_numpy, xp_of
from ..quant import eight_bits, nf4
from ..quant.codebooks import nf4_code
from ..quant.linear import Linear4bit
from ..quant.surgery import dequantize_model, quantizable_layers, quantize_model
from .decoding import random_model, repeats
from .inputs import BASE, SIZES, arrays, base, examples, moved, steps
from .register import Experiment, Number, Verdict, claim, graded, itemized, listed, measured, those
from .timing import in_turns, machine, where

LORA = mp.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
NEAR = 0.1  # of "4 times": within 10 %


@claim("qlora-1", lesson="07_qlora.py", section="6 · Train")
def procedure() -> Verdict:
    """Holds if, with adapters in float32 and in bfloat16, five steps lower the loss, move every array of the adapters and
    leave every byte of the four-bit base; holds if in one of the two; does not hold here otherwise."""
    from ..train.callbacks import WeightsIn

    small, cases, evidence = quantize_model(base()[0]), {}, []
    layers = sum(isinstance(module, Linear4bit) for _, module in small.named_modules())
    for dtype in ("float32", "bfloat16"):
        model = mp.get_peft_model(small, LORA)
        before = arrays(model)
        sixteen = dtype == "bfloat16"
        args = mp.TrainingArguments(max_steps=5, learning_rate=1e-2, lr_scheduler_type="constant", bf16=sixteen, progress=False)
        callbacks = [WeightsIn(model, dtype)] if sixteen else []
        losses = mp.Trainer(model, list(examples()), args=args, pad_token_id=0).train(callbacks=callbacks).losses()
        shares = moved(before, arrays(model))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        own = [share > 0 for name, share in shares.items() if name in trained]
        still = not any(share for name, share in shares.items() if name not in trained)
        cases[dtype] = still and all(own) and losses[-1][1] < losses[0][1]
        evidence += [
            Number(f"adapters in {dtype}: fall of the loss from the first to the last of 5 steps", losses[0][1] - losses[-1][1], "nats"),
            Number(f"adapters in {dtype}: arrays of adapters that moved, of {len(own)}", sum(own)),
        ]
    return Verdict(
        graded(cases),
        f"It trains with adapters in {those(cases)}: the loss on its 8 sentences falls by {evidence[0].value:.2f} (float32) and "
        f"{evidence[2].value:.2f} nats (bfloat16) from step 1 to 5, on a base with {layers} layers in four bits, which keeps "
        "its bytes.",
        evidence[0], evidence, base=BASE, task="8 sentences",
    )  # fmt: skip


@claim("qlora-2", lesson="12_counting.py", section="3 · Bytes of a parameter")
def smaller() -> Verdict:
    """Holds if the whole model, with what is not quantized, is within 10 % of 4 times smaller than in 16 bits, on the base, at
    7B and at 70B; holds if at some; does not hold here if at none. (NF4, blocks of 64, double quantization.)"""
    sizes, evidence, kept = {"the base": base()[0].config, **SIZES}, [], {}
    ratios = {}
    for size, model in sizes.items():
        total = count_parameters(model, "frozen").total
        four = memory_ledger(model, "frozen", precision="bfloat16", quantization="nf4").held["frozen weights"]
        linear = _quantized(model)
        ratios[size], kept[size] = 2 * total / four, (total - linear) / total
        bits = 8 * (four - 2 * (total - linear)) / linear
        evidence += [
            Number(f"{size}: 16 bits over 4 bits, the whole model", ratios[size], "times"),
            Number(f"{size}: not quantized", 100 * kept[size], "%"),
            Number(f"{size}: bits a quantized weight", bits, "bits"),
        ]
    packed = 16 / evidence[-1].value
    cases = {size: abs(ratio / 4 - 1) <= NEAR for size, ratio in ratios.items()}
    return Verdict(
        graded(cases),
        f"So for {those(cases)}: a quantized weight takes {evidence[-1].value:.3f} bits with its scales ({evidence[2].value:.3f} in the base, whose "
        f"matrices are small), {packed:.2f} times less, and embeddings, norms and head stay in 16, "
        f"{listed([f'{100 * share:.1f} % ({size})' for size, share in kept.items()])} of the numbers, so the model is "
        f"{listed([f'{ratio:.2f} ({size})' for size, ratio in ratios.items()])} times smaller.",
        Number("7B: 16 bits over 4 bits, the whole model", ratios["7B"], "times"),
        [*evidence, Number("a quantized weight, 16 bits over these", packed, "times")],
    )


def _quantized(model: Any) -> int:
    """How many numbers `quantize_model` puts into four bits."""
    config = mp.accounting.architecture(model).config if isinstance(model, str) else model
    return sum(layer.weight.size for layer in quantizable_layers(mp.Transformer(config, seed=None)).values())


MEASURED_70B = ("fms-a100-L94",)  # a 70B model with QLoRA on one A100 of 80 GB


@claim("qlora-3", lesson="07_qlora.py", section="5 · 65 billion parameters on one GPU")
def one_gpu() -> Verdict:
    """Holds if 65B and 70B with LoRA r = 64 on all linear layers, one sequence of 512 tokens, fit one card of 48 GB and of 80
    GB by the ledger of a PyTorch loop, with its usual settings and with those of the paper (states paged, adapters in 16
    bits); holds if in some of these cases; does not hold here if in none, or if measured 70B runs on one card are missed by
    more than 15 %."""
    lora = mp.LoraConfig(r=64, target_modules="all-linear")
    loops = {
        "usual settings": Loop(quantization="nf4"),
        "the paper's settings": Loop(quantization="nf4", adapters="bfloat16", optimizer="paged_adamw"),
    }
    needed = {
        f"{size} with {title}": pytorch_ledger(name, lora, 1, 512, loop).total
        for size, name in (("65B", "llama-65b"), ("70B", "llama2-70b")) for title, loop in loops.items()
    }  # fmt: skip
    plain = pytorch_ledger("llama-65b", lora, 1, 512, Loop()).total
    runs = footprints(MEASURED_70B)
    close = bool(runs) and all(run.close for run in runs)
    cards = 48, CARDS["a100"][0]
    fits = {gb: {case: close and n <= gb * 1e9 for case, n in needed.items()} for gb in cards}
    evidence = [Number(case, n / 1e9, "GB") for case, n in needed.items()] + [
        Number("65B with LoRA in 16 bits", plain / 1e9, "GB")
    ]
    for run in runs:
        evidence += [
            Number(f"{run.row['id']}, {run.row['model']}: measured", run.measured / 1e9, "GB"),
            Number(f"{run.row['id']}: by the ledger", (run.predicted or 0) / 1e9, "GB"),
        ]
    seen = ""
    if runs:
        biggest = max(runs, key=lambda run: run.measured)
        step = json.loads(biggest.row["options"])
        seen = f" On one card a run of 70B, with {step['batch']} sequences of {step['seq']} tokens, was measured at {biggest.measured / 1e9:.0f} GB."
    return Verdict(
        graded({f"{case} on {gb} GB": x for gb, of in fits.items() for case, x in of.items()}),
        f"65B takes {needed['65B with usual settings'] / 1e9:.0f} GB with a PyTorch loop's usual settings and "
        f"{needed['65B with the paper' + chr(39) + 's settings'] / 1e9:.0f} GB with the paper's (with LoRA on bfloat16 "
        f"weights {plain / 1e9:.0f}). A card of {cards[0]} GB is enough for {those(fits[cards[0]])}, one of {cards[1]} GB for "
        f"{sum(fits[cards[1]].values())} of these {len(needed)} cases.{seen}",
        evidence[0],
        evidence,
        base="LLaMA-65B and Llama-2-70B, as shapes",
        task="1 x 512 tokens, blocks computed again, flash attention",
    )


# ----------------------------------------------------------------------------------------------------------------- speed


ROWS, LENGTH = 4, 64  # of a step: the more tokens, the smaller is the share of dequantizing


def step_times(width: int, seed: int, layers: int = 4, rows: int = ROWS, length: int = LENGTH) -> dict[str, Any]:
    """The row of a repeat: seconds of a training step, forward and backward, with LoRA on a base in 32 and in 4 bits."""
    dense = random_model(width, layers, seed)
    models = {"lora": mp.get_peft_model(dense, LORA), "qlora": mp.get_peft_model(quantize_model(dense), LORA)}
    xp = xp_of(dense.parameters()[0].data)
    ids = asarray(np.random.default_rng(seed).integers(2, 2048, (rows, length)), xp)

    def step(model: Any) -> None:
        model.loss(ids, ids).backward()
        model.zero_grad()
        synchronize(xp)

    return in_turns({name: lambda model=model: step(model) for name, model in models.items()}) | machine()


STEPS = Experiment("dequantization", step_times, lambda: mp.grid(width=[128, 256, 512, 1024], seed=range(6)), timed=True)
LITTLE = 1.25


@claim("qlora-4", lesson="07_qlora.py", section="6 · Train", experiment=STEPS)
def slower(rows: list[dict[str, Any]]) -> Verdict:
    """Holds if, at each width, a QLoRA step takes clearly longer than LoRA's, and clearly at most 1.25 times as long (all of the 95 %
    interval over repeats lies between); holds if at some widths; does not hold here if at none."""
    found = {}
    for width in sorted({row["width"] for row in rows}):
        ratios = [row["qlora"] / row["lora"] for row in rows if row["width"] == width]
        found[f"width {width}"] = measured(f"width {width}: a QLoRA step over LoRA's", ratios, "times")
    cases = {case: n.low > 1 and n.high <= LITTLE for case, n in found.items()}
    told = [f"{n.value:.2f} ({case})" for case, n in found.items()]
    most = max(found.values(), key=lambda n: n.value)
    return Verdict(
        graded(cases),
        f"A step of {ROWS} x {LENGTH} tokens takes {listed(told)} times as long: clearly longer, and clearly at most {LITTLE:g} times, our "
        f"limit of a little, at {those(cases)}.",
        most,
        [*found.values()],
        seeds=repeats(rows),
        base="random models of 4 layers",
        task=f"{ROWS} x {LENGTH} tokens, float32 beside the 4 bits; {where(rows)}",
    )


# ----------------------------------------------------------------------------------------------------------------- traps


@claim("qlora-6", lesson="07_qlora.py", section="8 · Break it: one outlier")
def traps() -> Verdict:
    """Holds if each of four shortcuts goes wrong: blocks of 4096 in place of 64, if the error of the weights at least
    doubles, and scales quantized without taking off their mean, if the error of the scales does; the merged weight put back
    into four bits, if more than a tenth of what training gained is lost; zero blocks divided by their absmax, if the result
    is not a number; holds if some do; does not hold here if none does."""
    model = base()[0]
    W = np.concatenate([to_numpy(layer.weight.data).reshape(-1) for layer in quantizable_layers(model).values()])
    errors: dict[str, tuple[float, float]] = {}

    def error(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.sqrt(np.mean((x - y) ** 2)))

    def four_bits(x: np.ndarray, blocksize: int) -> np.ndarray:
        return mp.quant.dequantize_4bit(*mp.quant.quantize_4bit(x, blocksize))

    errors["large blocks"] = error(W, four_bits(W, 64)), error(W, four_bits(W, 4096))
    four, c = nf4.quantize(W)
    codes, c2, mean = nf4.quantize_scales(c)
    naive, scale = eight_bits.quantize(nf4.in_blocks(c, nf4.NESTED_BLOCKSIZE))
    q8 = eight_bits.dynamic_map(True)
    scales = nf4.dequantize_scales(codes, c2, mean, q8), nf4.dequantize(naive.reshape(-1)[: c.size], scale, q8, nf4.NESTED_BLOCKSIZE)
    errors["scales with their mean"] = error(c, scales[0]), error(c, scales[1])
    of_weights = [error(W, nf4.dequantize(four, each, nf4_code())) for each in scales]
    start = quantize_model(model)
    tuned = mp.get_peft_model(start, LORA)
    losses = steps(tuned, 5, lr=1e-2)
    merged = tuned.merge_and_unload()
    after = {name: steps(m, 0)[0] for name, m in (("merged", merged), ("again", dequantize_model(quantize_model(merged))))}
    errors["merging into four bits"] = abs(after["merged"] - losses[-1]), after["again"] - losses[-1]
    x = np.concatenate([np.zeros(64, np.float32), W[:64]])
    blocks = x.reshape(2, 64)
    with np.errstate(invalid="ignore"):
        divided = blocks / np.abs(blocks).max(1, keepdims=True)
    errors["zero blocks"] = error(x, four_bits(x, 64)), float("nan") if np.isnan(divided).any() else 0.0
    gained = losses[0] - losses[-1]
    cases = {trap: not broken < 2 * own for trap, (own, broken) in errors.items()}
    cases["merging into four bits"] = errors["merging into four bits"][1] > 0.1 * gained
    ratio = {trap: broken / own if own else float("inf") for trap, (own, broken) in errors.items()}
    lost = errors["merging into four bits"][1] / gained
    told = (
        f"blocks of 4096 make the error of the weights {ratio['large blocks']:.2f} times as large",
        f"scales that keep their mean make the error of the scales {ratio['scales with their mean']:.1f} times as large, that of the weights "
        f"{of_weights[1] / of_weights[0]:.3f} times",
        f"a merge back into four bits loses {lost:.1%} of the {gained:.2f} nats that training on 8 sentences gained there",
        f"a block of zeros that is divided by its largest number becomes {errors['zero blocks'][1]}",
    )
    return Verdict(
        graded(cases),
        f"{sum(cases.values())} of {len(cases)} shortcuts go wrong ({those(cases)}): {itemized(told)}",
        Number("shortcuts that go wrong, of 4", sum(cases.values())),
        [
            n
            for trap, (own, broken) in errors.items()
            for n in (Number(f"{trap}: error of the library", own), Number(f"{trap}: of the shortcut", broken))
        ]
        + [Number(f"scales with their mean: error of the weights, {x}", e) for x, e in zip(("library", "shortcut"), of_weights)],
        base=BASE,
    )
