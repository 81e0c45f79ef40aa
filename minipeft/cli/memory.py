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

import json
from typing import Any

from .. import accounting
from ..accounting.precision import OPTIMIZERS, PRECISIONS
from ..options import configuration, option
from .arguments import Arguments, Common, Parser
from .bars import bar, grid, size
from .method_options import add_method, add_model_name, architecture_of, flag, method_of
from .report import console

DEVICES = (8, 16, 24, 48, 80)  # GB


@configuration(kw_only=True)
class StepOptions:
    """What is done with the model, and how."""

    batch: int | None = option(None, "sequences at a time (default: 1)", least=1)
    seq: int | None = option(None, "tokens of each (of a prompt); without it, states only", least=1)
    precision: str = option("float32", "of the numbers; float32 is what is computed here", choices=PRECISIONS)
    optimizer: str | None = option(None, "default: adamw", choices=(None, *OPTIMIZERS))
    checkpointing: bool = option(False, "keep the inputs of blocks only")
    quantization: str | None = option(
        None, "store linear layers in four bits (qlora does: nf4)", choices=(None, "nf4", "fp4", "int4")
    )
    plain_scales: bool = option(False, "four bits without double quantization")
    inference: bool = option(False, "a forward pass without gradients, instead of training; or")
    generate: int | None = option(None, "N tokens after a prompt, with a cache; or", least=1)
    ppo: int | None = option(None, "PPO on responses of N tokens: four models", least=1)
    mini_batch: int | None = option(None, "with --ppo: rows of a gradient (default: --batch)", least=1)
    value_model: bool = option(False, "with --ppo: a value model of its own, not a head")


def add_arguments(parser: Parser) -> None:
    add_model_name(parser)
    add_method(parser, "frozen")
    parser.options(StepOptions, group="the step")
    parser.options(Common, "json")


def run(args: Arguments) -> int:
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


def _check(args: Arguments, quantization: str | None) -> None:
    """Raises ValueError for an option that does nothing in this mode."""
    mode, *others = [m for m in ("inference", "generate", "ppo") if getattr(args, m)] or ["training"]
    if others:
        raise ValueError(f"--{mode} and --{others[0]} are two steps: give one of them")
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


def _ledger(args: Arguments, arch: Any, config: Any, quantization: str | None) -> Any:
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


def _step(args: Arguments) -> str:
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
