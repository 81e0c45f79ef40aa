"""Foretell the memory of training a model, or of using it, line by line: nothing is allocated.

The ledger is the moment at which the sum is largest. Activations are read off the model's own code run on shapes, for
the families that this package builds (GPT-2, Llama, Mistral, Qwen2); of others, or without --seq, it tells the weights,
gradients and optimizer states. "Fits" takes a GB as 10^9 bytes; code and an allocator's rounding come on top.

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
  minipeft memory llama3-8b --generate 256 --batch 4 --seq 2048 --precision bfloat16
  minipeft memory smollm2-135m --method lora --ppo 24 --batch 64 --mini-batch 16 --seq 32
  minipeft memory path/to/model --inference --batch 1 --seq 512 --json
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from .arguments import positive_int
from .method_options import add_method_options, architecture_of, configuration

DEVICES = (8, 16, 24, 48, 80)  # GB
PRECISIONS = ("float32", "mixed", "mixed-float32-gradients", "bfloat16", "float16-base")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_method_options(parser)
    group = parser.add_argument_group("the step")
    group.add_argument("--batch", type=positive_int, default=1, metavar="N", help="sequences at a time (default: 1)")
    group.add_argument(
        "--seq", type=positive_int, metavar="N", help="tokens of each (of a prompt); without it, states only"
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="default: float32, what is computed here"
    )
    group.add_argument(
        "--optimizer", choices=("adamw", "adam", "momentum", "sgd"), default="adamw", help="default: adamw"
    )
    group.add_argument("--checkpointing", action="store_true", help="keep the inputs of blocks only")
    group.add_argument(
        "--quantization", choices=("nf4", "fp4", "int4"), help="store linear layers in four bits (qlora does: nf4)"
    )
    group.add_argument("--plain-scales", action="store_true", help="four bits without double quantization")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--inference", action="store_true", help="a forward pass without gradients, instead of training")
    what.add_argument("--generate", type=positive_int, metavar="N", help="N tokens after a prompt, with a cache")
    what.add_argument("--ppo", type=positive_int, metavar="N", help="PPO on responses of N tokens: four models")
    group.add_argument(
        "--mini-batch", type=positive_int, metavar="N", help="with --ppo: rows of a gradient (default: --batch)"
    )
    group.add_argument("--value-model", action="store_true", help="with --ppo: a value model of its own, not a head")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from ..accounting import memory_ledger, ppo_ledger

    arch = architecture_of(args.model)
    config, packed = configuration(args)
    if (args.generate or args.inference or args.ppo) and args.seq is None:
        raise ValueError("--inference, --generate and --ppo are about sequences: give their length, --seq")
    if not args.ppo and (args.mini_batch or args.value_model):
        raise ValueError(f"{'--mini-batch' if args.mini_batch else '--value-model'} belongs to --ppo")
    quantization = args.quantization or ("nf4" if packed else None)
    if args.plain_scales and quantization is None:
        raise ValueError("--plain-scales is about weights in four bits: give --quantization or --method qlora")
    if args.generate or args.inference:
        config = "frozen" if config is None else config
    common = dict(
        optimizer=args.optimizer, precision=args.precision, checkpointing=args.checkpointing, quantization=quantization,
        double_quantization=not args.plain_scales,
    )  # fmt: skip
    if args.ppo:
        ledger = ppo_ledger(
            arch,
            config,
            args.batch,
            args.seq,
            args.ppo,
            mini_batch=args.mini_batch,
            value_model=args.value_model,
            **common,
        )
    else:
        mode = "generate" if args.generate else "evaluate" if args.inference else "train"
        ledger = memory_ledger(
            arch, config, args.batch, args.seq, mode=mode, max_new_tokens=args.generate or 1, **common
        )
    fits = [gb for gb in DEVICES if ledger.total <= gb * 1e9]
    if args.json:
        record = {
            "model": arch.name, "method": args.method, "lines": dict(ledger.lines), "held": dict(ledger.held),
            "activations_per_layer": list(ledger.activations_per_layer), "total": ledger.total,
            "fits_gb": fits,
        }  # fmt: skip
        print(json.dumps(record, indent=1))
        return 0
    from .bars import bar, size
    from .report import console

    out = console()
    out.print(f"{arch.name} ({arch.model_type}), {args.method}: {_step(args)}\n", style="bold")
    out.print(_table(ledger))
    if ledger.activations_per_layer and max(ledger.activations_per_layer):
        layers = ledger.activations_per_layer
        out.print(f"\nkept for the backward pass: {size(max(layers))} a layer, in {len(layers)} layers")
    out.print()
    out.print(bar(ledger.lines, size))
    out.print()
    out.print(_verdict(ledger.total, fits))
    return 0


def _step(args: argparse.Namespace) -> str:
    if args.seq is None:
        return f"model states in {args.precision}; give --seq for what the batch needs"
    what = f"batch {args.batch} x {args.seq} tokens, {args.precision}"
    if args.ppo:
        return f"an update of PPO, {what}, responses of {args.ppo}"
    if args.generate:
        return f"generating {args.generate} tokens, {what}"
    if args.inference:
        return f"a forward pass, {what}"
    return f"a training step, {what}{', checkpointing' if args.checkpointing else ''}, {args.optimizer}"


def _table(ledger: Any) -> Any:
    """The lines at the peak; beside them, what they come to in full where that is another moment's."""
    from rich.table import Table

    from .bars import size

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("at the peak")
    for heading in ("bytes", "", "share", "in full"):
        table.add_column(heading, justify="right", no_wrap=True)
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
