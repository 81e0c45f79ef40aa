"""Predict the memory of training or using a model.

Line by line; nothing is allocated. The ledger is the moment at which the sum is largest. Activations are read off the
model's own code run on shapes, for the families that this package builds (GPT-2, Llama, Mistral, Qwen2). For others, or
without --seq, the ledger holds the weights, gradients and optimizer states. "Fits" takes a GB as 10^9 bytes; code and
an allocator's rounding come on top.

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
  minipeft memory llama-7b --method lora --seq 512 --timeline step.html        op by op, with what-ifs
  minipeft memory path/to/model --method lora --seq 128 --timeline step.json --measure
"""

from __future__ import annotations

from typing import Any

from .. import accounting
from ..accounting.precision import OPTIMIZERS, PRECISIONS
from ..options import configuration, option
from . import timeline
from .arguments import Arguments, Parser
from .bars import bar, console, grid, print_json, size
from .method_options import add_shapes, architecture_of, method_of

DEVICES = (8, 16, 24, 48, 80)  # GB


@configuration(kw_only=True)
class StepOptions:
    """What is done with the model, and how."""

    batch: int = option(1, "sequences at a time", least=1)
    seq: int | None = option(None, "tokens of each (of a prompt); without it, states only", least=1)
    precision: str = option("float32", "of the numbers; float32 is what is computed here", choices=PRECISIONS)
    optimizer: str = option("adamw", "whose states are held", choices=OPTIMIZERS)
    checkpointing: bool = option(False, "keep the inputs of blocks only")
    quantization: str | None = option(None, "of linear layers; qlora's is nf4", choices=("nf4", "fp4", "int4"))
    plain_scales: bool = option(False, "four bits without double quantization")
    inference: bool = option(False, "a forward pass without gradients, instead of training; or")
    generate: int | None = option(None, "N tokens after a prompt, with a cache; or", least=1)
    ppo: int | None = option(None, "PPO on responses of N tokens: four models", least=1)
    mini_batch: int | None = option(None, "with --ppo: rows of a gradient (default: --batch)", least=1)
    value_model: bool = option(False, "with --ppo: a value model of its own, not a head")


def add_arguments(parser: Parser) -> None:
    add_shapes(parser)
    parser.options(StepOptions, group="the step")
    parser.options(timeline.TimelineOptions, group="its course")


def run(args: Arguments) -> None:
    args.only_one("inference", "generate", "ppo")
    mode = next((mode for mode in ("inference", "generate", "ppo") if mode in args.given), "training")
    arch, (name, method) = architecture_of(args), method_of(args)
    quantization = args.quantization or ("nf4" if method.quantized else None)
    timeline.check(args, mode)
    if args.seq is None and mode != "training":
        raise ValueError(f"--{mode} is about sequences: give their length, --seq")
    if args.seq is None:
        args.refuse(("batch", "checkpointing"), "without --seq, the length of the sequences")
    if mode != "ppo":
        args.refuse(("mini_batch", "value_model"), "without --ppo")
    if mode in ("inference", "generate"):
        args.refuse(("optimizer", "checkpointing"), f"with --{mode}, which trains nothing")
    if quantization is None:
        args.refuse(("plain_scales",), "without weights in four bits, --quantization or --method qlora")
    ledger = _ledger(args, mode, arch, method.config(), quantization)
    fits = [gb for gb in DEVICES if ledger.total <= gb * 1e9]
    title = f"{arch.name} ({arch.model_type}), {name}: {_step(args, mode)}"
    course = args.timeline and timeline.write(args, title, arch, method.config(), _options(args, quantization))
    if args.json:
        return print_json({
            "model": arch.name, "method": name, "lines": dict(ledger.lines), "held": dict(ledger.held),
            "activations_per_layer": list(ledger.activations_per_layer),
            "total": ledger.total, "fits_gb": fits, **({"timeline": timeline.record(args, course)} if course else {}),
        })  # fmt: skip
    out = console()
    out.print(f"{title}\n", style="bold")
    out.print(_table(ledger))
    layers = ledger.activations_per_layer
    if layers and max(layers):
        out.print(f"\nkept for the backward pass: {size(max(layers))} a layer, in {len(layers)} layers")
    out.print("", bar(ledger.lines, size), "", _verdict(ledger.total, fits), sep="\n")
    if course:
        out.print("", timeline.sentences(args, course), sep="\n")


def _options(args: Arguments, quantization: str | None) -> dict[str, Any]:
    options = {name: getattr(args, name) for name in ("optimizer", "precision", "checkpointing")}
    return options | {"quantization": quantization, "double_quantization": not args.plain_scales}


def _ledger(args: Arguments, mode: str, arch: Any, config: Any, quantization: str | None) -> Any:
    options = _options(args, quantization)
    if mode == "ppo":
        options |= {"mini_batch": args.mini_batch, "value_model": args.value_model}
        return accounting.ppo_ledger(arch, config, args.batch, args.seq, args.ppo, **options)
    if mode != "training":
        options |= {"mode": "generate" if mode == "generate" else "evaluate", "max_new_tokens": args.generate}
        config = "frozen" if config is None else config
    return accounting.memory_ledger(arch, config, args.batch, args.seq, **options)


def _step(args: Arguments, mode: str) -> str:
    if args.seq is None:
        return f"model states in {args.precision}; give --seq for what the batch needs"
    what, more = {
        "ppo": ("an update of PPO", f", responses of {args.ppo}"),
        "generate": (f"generating {args.generate} tokens", ""),
        "inference": ("a forward pass", ""),
        "training": ("a training step", f"{', checkpointing' * args.checkpointing}, {args.optimizer}"),
    }[mode]
    return f"{what}, batch {args.batch} x {args.seq} tokens, {args.precision}{more}"


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
    yes, no = (", ".join(f"{gb} GB" for gb in DEVICES if (gb in fits) is side) for side in (True, False))
    return f"fits on: {yes}{no and f'; not on {no}'}"
