"""Predict the memory of training a model, or of using it, line by line: nothing is allocated.

The ledger is the moment at which the sum is largest. Activations are read off the model's own code run on shapes, for
the families that this package builds (GPT-2, Llama, Mistral, Qwen2). For others, or without --seq, the ledger holds the
weights, gradients and optimizer states. "Fits" takes a GB as 10^9 bytes; code and an allocator's rounding come on top.

  precision                 weights  gradients  moments  master copy    bytes a trained parameter with Adam
  float32 (default)               4          4        8            -    16
  mixed                           2          2        8            4    16, as in ZeRO
  mixed-float32-gradients         2          4        8            4    18, as in DeepSpeed
  bfloat16                        2          2        8            -    12, as in QLoRA
  float16-base              4 (frozen: 2)    4        8            -    16

examples:
  minipeft memory llama-65b --precision bfloat16
  minipeft memory llama-65b --method qlora -r 64 --batch 1 --seq 512 --precision bfloat16 --checkpointing
  minipeft memory gpt2 --method lora --batch 8 --seq 1024 --optimizer sgd
  minipeft memory llama-7b --precision bfloat16 --optimizer adamw_8bit
  minipeft memory llama3-8b --generate 256 --batch 4 --seq 2048 --precision bfloat16
  minipeft memory smollm2-135m --method lora --ppo 24 --batch 64 --mini-batch 16 --seq 32
  minipeft memory path/to/model --inference --batch 1 --seq 512 --json
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from .. import accounting
from ..accounting.precision import OPTIMIZERS, PRECISIONS
from .arguments import positive_int
from .bars import bar, grid, size
from .method_options import add_method, add_model_name, architecture_of, flag, method_of
from .report import console

DEVICES = (8, 16, 24, 48, 80)  # GB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_name(parser)
    add_method(parser, "frozen")
    group = parser.add_argument_group("the step")
    add = group.add_argument
    add("--batch", type=positive_int, metavar="N", help="sequences at a time (default: 1)")
    add("--seq", type=positive_int, metavar="N", help="tokens of each (of a prompt); without it, states only")
    add("--precision", choices=PRECISIONS, default="float32", help="default: float32, what is computed here")
    add("--optimizer", choices=OPTIMIZERS, help="default: adamw")
    add("--checkpointing", action="store_true", help="keep the inputs of blocks only")
    add("--quantization", choices=("nf4", "fp4", "int4"), help="store linear layers in four bits (qlora does: nf4)")
    add("--plain-scales", action="store_true", help="four bits without double quantization")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--inference", action="store_true", help="a forward pass without gradients, instead of training")
    what.add_argument("--generate", type=positive_int, metavar="N", help="N tokens after a prompt, with a cache")
    what.add_argument("--ppo", type=positive_int, metavar="N", help="PPO on responses of N tokens: four models")
    add("--mini-batch", type=positive_int, metavar="N", help="with --ppo: rows of a gradient (default: --batch)")
    add("--value-model", action="store_true", help="with --ppo: a value model of its own, not a head")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    arch, (name, method) = architecture_of(args.model), method_of(args)
    config, quantization = method.config(), args.quantization or ("nf4" if method.quantized else None)
    _check(args, quantization)
    ledger = _ledger(args, arch, config, quantization)
    fits = [gb for gb in DEVICES if ledger.total <= gb * 1e9]
    if args.json:
        record = {
            "model": arch.name, "method": name, "lines": dict(ledger.lines), "held": dict(ledger.held),
            "activations_per_layer": list(ledger.activations_per_layer),
            "total": ledger.total, "fits_gb": fits,
        }  # fmt: skip
        print(json.dumps(record, indent=1))
        return 0
    out = console()
    out.print(f"{arch.name} ({arch.model_type}), {name}: {_step(args)}\n", style="bold")
    out.print(_table(ledger))
    if ledger.activations_per_layer and max(ledger.activations_per_layer):
        layers = ledger.activations_per_layer
        out.print(f"\nkept for the backward pass: {size(max(layers))} a layer, in {len(layers)} layers")
    out.print("", bar(ledger.lines, size), "", _verdict(ledger.total, fits), sep="\n")
    return 0


def _check(args: argparse.Namespace, quantization: str | None) -> None:
    """Raises ValueError for an option that does nothing in this mode."""
    mode = next((m for m in ("inference", "generate", "ppo") if getattr(args, m)), "training")
    if args.seq is None and mode != "training":
        raise ValueError("--inference, --generate and --ppo are about sequences: give their length, --seq")
    if args.plain_scales and quantization is None:
        raise ValueError("--plain-scales is about weights in four bits: give --quantization or --method qlora")
    without = {  # options -> why they do nothing
        "mini_batch value_model": mode != "ppo" and "belongs to --ppo",
        "optimizer checkpointing": mode not in ("training", "ppo") and f"is for training, and --{mode} trains nothing",
        "batch checkpointing": args.seq is None and "is about sequences: give their length, --seq",
    }
    for names, reason in without.items():
        for name in names.split():
            if reason and getattr(args, name):
                raise ValueError(f"{flag(name)} {reason}")


def _ledger(args: argparse.Namespace, arch: Any, config: Any, quantization: str | None) -> Any:
    options = dict(
        optimizer=args.optimizer or "adamw", precision=args.precision, checkpointing=args.checkpointing,
        quantization=quantization, double_quantization=not args.plain_scales,
    )  # fmt: skip
    batch = args.batch or 1
    if args.ppo:
        options |= {"mini_batch": args.mini_batch, "value_model": args.value_model}
        return accounting.ppo_ledger(arch, config, batch, args.seq, args.ppo, **options)
    if args.inference or args.generate:
        options |= {"mode": "generate" if args.generate else "evaluate", "max_new_tokens": args.generate}
        config = "frozen" if config is None else config
    return accounting.memory_ledger(arch, config, batch, args.seq, **options)


def _step(args: argparse.Namespace) -> str:
    if args.seq is None:
        return f"model states in {args.precision}; give --seq for what the batch needs"
    what = f"batch {args.batch or 1} x {args.seq} tokens, {args.precision}"
    if args.ppo:
        return f"an update of PPO, {what}, responses of {args.ppo}"
    if args.generate:
        return f"generating {args.generate} tokens, {what}"
    if args.inference:
        return f"a forward pass, {what}"
    return f"a training step, {what}{', checkpointing' if args.checkpointing else ''}, {args.optimizer or 'adamw'}"


def _table(ledger: Any) -> Any:
    """The lines at the peak; beside them, what they come to in full where that is another moment's."""
    table = grid("at the peak", "bytes", "", "share", "in full")
    for line, n in ledger.lines.items():
        full = ledger.held.get(line, n)
        table.add_row(line, f"{n:,}", size(n), f"{100 * n / ledger.total:.1f}%", size(full) if full > n else "")
    for line, n in ledger.held.items():
        if n and line not in ledger.lines:
            table.add_row(line, "0", "", "", size(n))
    table.add_row("sum", f"{ledger.total:,}", size(ledger.total), "", "", style="bold")
    return table


def _verdict(total: int, fits: list[int]) -> str:
    if not fits:
        times = f"{total / 1e9 / DEVICES[-1]:.1f} times {DEVICES[-1]} GB"
        return f"fits on: none of {', '.join(map(str, DEVICES))} GB (the sum is {times})"
    text = f"fits on: {', '.join(f'{gb} GB' for gb in fits)}"
    rest = [gb for gb in DEVICES if gb not in fits]
    return text + (f"; not on {', '.join(f'{gb} GB' for gb in rest)}" if rest else "")
