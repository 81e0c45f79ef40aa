"""Predict the memory, the time and the cost of training or using a model.

Line by line; nothing is allocated. There are two ledgers. By default, what one GPU of a standard PyTorch loop holds
(transformers, PEFT), at the moment of a step at which that is most, for every family of which there is a table; what it
assumes is printed, with the option that changes it. With --engine minipeft, what this package's own engine holds, read
off the model's own code run on shapes, for the families that it builds (GPT-2, Llama, Mistral, Qwen2). Without --seq, a
ledger holds the weights, gradients and optimizer states. "Fits" takes a GB as 10^9 bytes.

  --precision               weights  gradients  moments  master copy    bytes a trained parameter with Adam
  bfloat16                        2          2        2            -    8 (in minipeft 12: moments in float32, as in QLoRA)
  mixed                           2          2        8            4    16, as in ZeRO
  mixed-float32-gradients         2          4        8            4    18, as in DeepSpeed
  autocast                        4          4        8            -    16, and 16-bit copies while they are used
  float32                         4          4        8            -    16
  float16-base              4 (frozen: 2)    4        8            -    16, of minipeft alone

examples:
  minipeft memory llama3-70b --method qlora --seq 4096 --batch 4
  minipeft memory llama3-8b --method lora -r 16 --target q_proj v_proj --seq 2048 --fit 24
  minipeft memory llama-7b --seq 2048 --gpus 8 --sharding zero3
  minipeft memory llama3-8b --method lora --seq 2048 --batch 8 --tokens 50e6 --card h100 --price 2.50
  minipeft memory llama-7b --optimizer adamw_8bit --seq 1024 --attention eager
  minipeft memory llama3-8b --generate 256 --batch 4 --seq 2048 --cache-bits 8
  minipeft memory gpt2 --engine minipeft --method lora --batch 8 --seq 1024 --optimizer sgd
  minipeft memory smollm2-135m --method lora --ppo 24 --batch 64 --mini-batch 16 --seq 32
  minipeft memory path/to/model --inference --batch 1 --seq 512 --json
  minipeft memory gpt2 --method lora --seq 512 --timeline step.html
  minipeft memory path/to/model --method lora --seq 128 --timeline step.json --measure
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .. import accounting
from ..accounting.cards import CARDS
from ..accounting.loop import (
    ATTENTION,
    CONTEXT,
    LOGITS,
    LOOP_OPTIMIZERS,
    LOOP_PRECISIONS,
    SHARDING,
    WORKSPACE,
    Loop,
)  # fmt: skip
from ..accounting.precision import OPTIMIZERS
from ..options import configuration, option
from . import timeline
from .arguments import Arguments, Parser
from .bars import bar, console, grid, print_json, size
from .method_options import add_shapes, architecture_of, counted_of

DEVICES = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB
MINIPEFT = ("adamw", "float32", False)  # its optimizer, precision and checkpointing where none is given


@configuration(kw_only=True)
class StepOptions:
    """What is done with the model, and how."""

    engine: str | None = option(None, "whose ledger; None: pytorch (of --ppo and --timeline minipeft)", choices=("pytorch", "minipeft"))
    batch: int = option(1, "sequences at a time, on one GPU", least=1)
    seq: int | None = option(None, "tokens of each (of a prompt); without it, states only", least=1)
    precision: str | None = option(
        None, "of weights and gradients; None: bfloat16, minipeft's float32", choices=(*LOOP_PRECISIONS, "float16-base")
    )
    optimizer: str | None = option(
        None, "whose states are held; None: adamw", choices=tuple(dict.fromkeys((*OPTIMIZERS, *LOOP_OPTIMIZERS)))
    )
    checkpointing: bool | None = option(None, "keep the inputs of blocks only; None: yes, minipeft no")
    quantization: str | None = option(None, "of linear layers; qlora's is nf4", choices=("nf4", "fp4", "int4"))
    plain_scales: bool = option(False, "four bits without double quantization")
    inference: bool = option(False, "a forward pass without gradients, instead of training; or")
    generate: int | None = option(None, "N tokens after a prompt, with a cache; or", least=1)
    ppo: int | None = option(None, "PPO on responses of N tokens: four models", least=1)
    mini_batch: int | None = option(None, "with --ppo: rows of a gradient (default: --batch)", least=1)
    value_model: bool = option(False, "with --ppo: a value model of its own, not a head")


@configuration(kw_only=True)
class LoopOptions:
    """The settings of a PyTorch loop; see `accounting.Loop`."""

    adapters: str = option("float32", "of a method's parameters", choices=("float32", "bfloat16"), flag="--adapter-dtype")
    attention: str = option("flash", "eager keeps softmax, s squared", choices=ATTENTION)
    logits: str = option("float32", "how the loss computes them", choices=tuple(LOGITS))
    accumulation: int = option(1, "backward passes for one step", least=1)
    upcast: bool = option(False, "what is not in four bits in float32 (prepare_model_for_kbit_training)")
    pack_experts: bool = option(False, "experts that are one array in four bits, too")
    gpus: int = option(1, "GPUs", least=1)
    sharding: str = option("ddp", "what they share; zero3 is FSDP", choices=SHARDING)
    reentrant: bool = option(False, "with zero3: checkpoints as in transformers before 5")
    offload: bool = option(False, "states on the host, and what zero3 shards")
    cache_bits: int = option(16, "with --generate: of a key's or value's number", choices=(4, 8, 16))
    headroom: float = option(5.0, "percent for an allocator's fragments", least=0)
    fit: float | None = option(None, "GB: the longest sequence, or with --seq the largest batch, that fits", above=0)
    card: str = option("a100", "for the time of a step", choices=tuple(CARDS))
    utilization: float = option(0.4, "share of the card's peak rate", above=0, most=1)
    tokens: float | None = option(None, "of a data set: hours on --gpus", above=0)
    price: float | None = option(None, "of a GPU hour, in your money, with --tokens", above=0)


OF_LOOP = (
    "adapters", "attention", "logits", "accumulation", "upcast", "pack_experts", "gpus", "sharding", "reentrant", "offload",
    "headroom",
)  # fmt: skip
BY_TERMS = ("LORA", "BITFIT", "LN_TUNING")  # methods of which `accounting.activations` has all that a block keeps
OF_TIME = ("card", "utilization", "tokens", "price")


def add_arguments(parser: Parser) -> None:
    add_shapes(parser)
    parser.options(StepOptions, group="the step")
    parser.options(LoopOptions, group="the PyTorch loop (of --engine pytorch)")
    parser.options(timeline.TimelineOptions, group="its course (of --engine minipeft)")


def run(args: Arguments) -> None:
    args.only_one("inference", "generate", "ppo")
    mode = next((mode for mode in ("inference", "generate", "ppo") if mode in args.given), "training")
    engine = args.engine or ("minipeft" if mode == "ppo" or args.timeline else "pytorch")
    name, config, quantized = counted_of(args, arch := architecture_of(args))
    quantization = args.quantization or ("nf4" if quantized else None)
    timeline.check(args, mode)
    _check(args, mode, engine, quantization)
    if args.pack_experts and not arch.experts:
        raise ValueError(f"--pack-experts is of experts in one array, and {arch.name} has none: leave it out")
    from ..accounting.counted import COUNTED

    if (args.seq or args.fit) and (kind := getattr(config, "peft_type", None)) in COUNTED:
        what = "weights, gradients and states are known here, and not what it keeps of a sequence"
        raise ValueError(f"of {kind}, {what}: leave --seq and --fit out")
    if engine == "pytorch":
        return _pytorch(args, mode, arch, name, config, quantization)
    ledger = _ledger(args, mode, arch, config, quantization)
    fits = [gb for gb in DEVICES if ledger.total <= gb * 1e9]
    title = f"{arch.name} ({arch.model_type}), {name}, in minipeft: {_step(args, mode)}"
    course = args.timeline and timeline.write(args, title, arch, config, _options(args, quantization))
    if args.json:
        more = {"timeline": timeline.record(args, course)} if course else {}
        return print_json({"engine": "minipeft", **_record(arch, name, ledger, fits), **more})
    out = console()
    out.print(f"{title}\n", style="bold")
    out.print(_table(ledger))
    layers = ledger.activations_per_layer
    if layers and max(layers):
        out.print(f"\nkept for the backward pass: {size(max(layers))} a layer, in {len(layers)} layers")
    out.print("", bar(ledger.lines, size), "", _verdict(ledger.total, fits), sep="\n")
    if course:
        out.print("", timeline.sentences(args, course), sep="\n")


def _check(args: Arguments, mode: str, engine: str, quantization: str | None) -> None:
    """ValueError for an option that does nothing where it is given."""
    if args.seq is None and mode != "training":
        raise ValueError(f"--{mode} is about sequences: give their length, --seq")
    if args.seq is None and args.fit is None:
        args.refuse(("batch", "checkpointing"), "without --seq, the length of the sequences")
        args.refuse(("attention", "logits", *OF_TIME), "without --seq, the length of the sequences")
    if mode != "ppo":
        args.refuse(("mini_batch", "value_model"), "without --ppo")
    if engine == "pytorch" and (mode == "ppo" or args.timeline):
        flag = "--ppo" if mode == "ppo" else "--timeline"
        raise ValueError(f"{flag} is of this package's own engine: add --engine minipeft, or leave --engine out")
    if mode in ("inference", "generate"):
        args.refuse(("optimizer", "checkpointing"), f"with --{mode}, which trains nothing")
        of_training = ("adapters", "logits", "accumulation", "reentrant", "offload", *OF_TIME)
        args.refuse(of_training, f"with --{mode}, which trains nothing")
    if args.method == "frozen":
        of_training = ("optimizer", "accumulation", *OF_TIME)
        args.refuse(of_training, "with --method frozen, which trains nothing")
    method = args.method or "full"
    if mode == "training" and method in ("full", "head", "frozen"):
        args.refuse(("adapters",), f"with --method {method}, which has no adapter")
    if mode != "generate":
        args.refuse(("cache_bits",), "without --generate, which has a cache")
    if quantization is None:
        of_four_bits = ("plain_scales", "upcast", "pack_experts")
        args.refuse(of_four_bits, "without weights in four bits, --quantization or --method qlora")
    if args.price is not None and args.tokens is None:
        raise ValueError("--price is of an hour: give --tokens too, the size of the data set")
    if args.sharding != "zero3" or args.checkpointing is False:
        args.refuse(("reentrant",), "without --sharding zero3 and checkpoints")
    if engine == "minipeft":
        args.refuse((*OF_LOOP, "fit", "cache_bits", *OF_TIME), "with --engine minipeft")


# --------------------------------------------------------------------------------------------------- the PyTorch loop


def _pytorch(args: Arguments, mode: str, arch: Any, name: str, config: Any, quantization: str | None) -> None:
    settings = {field: getattr(args, field) for field in (*OF_LOOP, "cache_bits")}
    settings |= {field: value for field in ("precision", "optimizer") if (value := getattr(args, field))}
    checkpointing = args.checkpointing is not False
    loop = Loop(
        **settings, checkpointing=checkpointing, quantization=quantization, double_quantization=not args.plain_scales,
        dropout=getattr(config, "lora_dropout", 0.0),
    )  # fmt: skip
    what = {"inference": "evaluate", "generate": "generate"}.get(mode, "train")
    more = {"mode": what, "max_new_tokens": args.generate}
    ledger_of = partial(accounting.pytorch_ledger, arch, config, loop=loop, **more)
    answer, batch, seq = _fit(args, arch, config, ledger_of) if args.fit is not None else ("", args.batch, args.seq)
    ledger = ledger_of(batch, seq)
    fits = [gb for gb in DEVICES if ledger.total <= gb * 1e9]
    assumed = list(_assumptions(args, mode, loop, arch, name, config, seq))
    time = _time(args, arch, config, batch, seq, loop) if mode == "training" and seq else {}
    if args.json:
        return print_json({
            "engine": "pytorch", **_record(arch, name, ledger, fits), "batch": batch, "seq": seq, "peak": ledger.peak,
            "moments": {moment: sum(lines.values()) for moment, lines in ledger.moments.items()},
            "assumptions": [{"what": what, "options": flags.split()} for what, flags in assumed], **time,
        })  # fmt: skip
    out = console()
    step = {"inference": "a forward pass", "generate": f"generating {args.generate} tokens"}.get(mode, "training")
    gpu = "a GPU" if loop.gpus == 1 else f"each of {loop.gpus} GPUs"
    shape = f", batch {batch} x {seq} tokens" if seq else "; model states: give --seq for what the batch needs"
    out.print(f"{arch.name} ({arch.model_type}), {name}, in PyTorch: {step} on {gpu}{shape}\n", style="bold")
    table = grid(f"at the peak: {ledger.peak}" if seq else "all the time", "bytes", "", "share")
    for line, n in ledger.lines.items():
        table.add_row(line, f"{n:,}", size(n), f"{100 * n / ledger.total:.1f}%")
    table.add_row("sum", f"{ledger.total:,}", size(ledger.total), "", style="bold")
    out.print(table)
    others = [f"  {moment}: {size(sum(lines.values()))}" for moment, lines in ledger.moments.items() if moment != ledger.peak]
    if others:
        out.print("\nat other moments:", *others, sep="\n")
    out.print("", bar(ledger.lines, size), "", "assumed, and changed by:", sep="\n")
    for what, flags in assumed:
        out.print(textwrap.fill(f"{what} ({flags})", 80, initial_indent="  ", subsequent_indent="    "))
    out.print("", *_time_text(args, time, loop), _verdict(ledger.total, fits), *([answer] if answer else []), sep="\n")


def _assumptions(
    args: Arguments, mode: str, loop: Loop, arch: Any, name: str, config: Any, seq: int | None
) -> Iterator[tuple[str, str]]:
    """(what a ledger takes for granted, the options that change it)."""
    training, is_method = mode == "training", hasattr(config, "parameter_shapes")
    narrow = LOOP_PRECISIONS[loop.precision].frozen == 2
    numbers = "16 bits" if narrow else "32 bits"
    whole = training and config is None
    more = {
        "bfloat16": ", gradients and states alike", "mixed": ", a master copy and states in 32",
        "mixed-float32-gradients": ", gradients, a master copy and states in 32",
        "autocast": ", computing in 16", "float32": ", and everything else",
    }[loop.precision]  # fmt: skip
    yield f"weights in {numbers}{more if whole else ''}", "--precision"
    if loop.quantization:
        scales = "scales quantized too" if loop.double_quantization else "scales in float32"
        rest = ", the rest in float32" if loop.upcast else f", the rest in {numbers}"
        yield f"linear layers in {loop.quantization}, {scales}{rest}", "--quantization --plain-scales --upcast"
        if arch.experts:
            packed = f"in {loop.quantization}, too, as bitsandbytes.nn.parametrize packs them"
            alone = f"in {'32 bits' if loop.upcast else numbers}, as transformers packs linear layers alone"
            yield f"experts, which are one array, {packed if loop.pack_experts else alone}", "--pack-experts"
    if is_method:
        targets = getattr(config, "target_modules", None)
        targets = " ".join(targets) if isinstance(targets, (list, tuple)) else targets or "its usual modules"
        rank = f"rank {config.r} on " if hasattr(config, "r") else ""
        yield f"{rank}{targets}", "-r --target"
        if training:
            yield f"adapters, their gradients and states in {loop.adapters}", "--adapter-dtype"
        if seq and (config.peft_type not in BY_TERMS or getattr(config, "use_dora", False)):
            yield f"of what {name} itself keeps of a sequence, no more than LoRA's terms", "--engine minipeft"
    if training:
        yield f"{loop.optimizer}{', all parameters at once (foreach)' * LOOP_OPTIMIZERS[loop.optimizer][1]}", "--optimizer"
    if training and seq:
        again = "blocks keep their inputs, and are computed again" if loop.checkpointing else "blocks keep what they need"
        yield again, "--no-checkpointing" if loop.checkpointing else "--checkpointing"
    if seq:
        yield f"{loop.attention} attention", "--attention"
    if training and seq:
        yield {
            "float32": "logits in float32, with their gradient", "held": "logits in float32, with their gradient, held by the loop",
            "shifted": "logits in 16 bits, in float32, copied shifted and as log-probabilities",
            "bfloat16": "logits in 16 bits, with their gradient", "held-bfloat16": "logits in 16 bits, with their gradient, held by the loop",
            "in-place": "logits in float32, the gradient in their place",
            "chunked": "logits in 16 bits, a few tokens at a time", "fused": "logits never all there",
        }[loop.logits], "--logits"  # fmt: skip
    if training:
        passes = "one backward pass a step" if loop.accumulation == 1 else f"{loop.accumulation} backward passes a step"
        yield passes, "--accumulation"
    shares = {"ddp": "each with everything", "zero1": "sharing states", "zero2": "sharing states and gradients"}
    gpus = "one GPU" if loop.gpus == 1 else f"{loop.gpus} GPUs, {shares.get(loop.sharding, 'sharing all (FSDP)')}"
    yield f"{gpus}, {'states' if loop.offload else 'nothing'} on the host", "--gpus --sharding --offload"
    if training and seq and is_method and loop.sharding == "zero3" and loop.checkpointing:
        kept = "kept until the end of the pass" if loop.reentrant else "freed block by block"
        yield f"frozen blocks' inputs and their gradients {kept}", "--reentrant"
    if mode == "generate":
        yield f"a cache of {loop.cache_bits} bits a number", "--cache-bits"
    measured = f"CUDA's context {size(CONTEXT)} and cuBLAS {size(2 * WORKSPACE)}, as measured by others"
    yield f"{measured}; {loop.headroom:g} % for an allocator's fragments", "--headroom"
    if training and seq:
        yield f"{args.utilization:.0%} of the {args.card}'s {CARDS[args.card][1]} TFLOP/s", "--card --utilization"


def _fit(args: Arguments, arch: Any, config: Any, ledger_of: Callable[..., Any]) -> tuple[str, int, int]:
    """(the answer of --fit, its batch, its length)."""
    from ..accounting.parameters import virtual_tokens
    from ..accounting.pytorch_loop import largest, positions_of

    room, most = args.fit * 1e9, positions_of(arch) - sum(virtual_tokens(config))
    if args.seq is not None and "batch" in args.given:
        raise ValueError("--fit looks for the batch or for the length: leave --batch or --seq out")
    if args.seq is not None:
        n = largest(lambda b: ledger_of(b, args.seq).total <= room)
        found, batch, seq = f"the largest batch at {args.seq} tokens is {n}", n, args.seq
    else:
        n = largest(lambda s: ledger_of(args.batch, s).total <= room, most=most)
        found, batch, seq = f"the longest sequence at batch {args.batch} is {n:,} tokens", args.batch, n
        if n == most:
            found += ", all positions that the model has"
    if not n:
        least = ledger_of(1 if args.seq else args.batch, args.seq or 1)
        raise ValueError(f"not even one fits in {args.fit:g} GB: {size(least.total)} are needed at least ({least.peak})")
    return f"in {args.fit:g} GB, {found}", batch, seq


def _time(args: Arguments, arch: Any, config: Any, batch: int, seq: int, loop: Loop) -> dict[str, float]:
    """FLOPs, seconds and tokens a second of a step; hours and money of a data set."""
    if config == "frozen":
        return {}
    flops = accounting.step_flops(arch, config, batch, seq, loop.checkpointing)
    seconds = flops.seconds(args.card, args.utilization)
    rate = loop.gpus * batch * seq / seconds
    found = {"flops": flops.total, "forward_flops": flops.forward, "seconds": seconds, "tokens_per_second": rate}
    if args.tokens is not None:
        found["hours"] = args.tokens / rate / 3600
    if args.price is not None:
        found["cost"] = found["hours"] * loop.gpus * args.price
    return found


def _time_text(args: Arguments, time: dict[str, float], loop: Loop) -> Iterator[str]:
    if time:
        each = " on each GPU" if loop.gpus > 1 else ""
        yield f"a step: {time['flops']:.3g} FLOPs{each}, {time['seconds']:.3g} s; {time['tokens_per_second']:,.0f} tokens/s"
    if "hours" in time:
        money = f", {loop.gpus * time['hours']:,.3g} GPU hours at {args.price:g}: {time['cost']:,.2f}" if "cost" in time else ""
        yield f"{args.tokens:,.0f} tokens: {time['hours']:,.3g} hours{money}"


# ---------------------------------------------------------------------------------------------------- minipeft's own


def _record(arch: Any, name: str, ledger: Any, fits: list[int]) -> dict[str, Any]:
    return {
        "model": arch.name, "method": name, "lines": dict(ledger.lines), "held": dict(ledger.held),
        "activations_per_layer": list(ledger.activations_per_layer),
        "total": ledger.total, "fits_gb": fits,
    }  # fmt: skip


def _options(args: Arguments, quantization: str | None) -> dict[str, Any]:
    optimizer, precision, checkpointing = MINIPEFT
    return {
        "optimizer": args.optimizer or optimizer, "precision": args.precision or precision,
        "checkpointing": checkpointing if args.checkpointing is None else args.checkpointing,
        "quantization": quantization, "double_quantization": not args.plain_scales,
    }  # fmt: skip


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
    optimizer, precision, _ = MINIPEFT
    precision = args.precision or precision
    if args.seq is None:
        return f"model states in {precision}; give --seq for what the batch needs"
    checkpointing = ", checkpointing" if args.checkpointing else ""
    what, more = {
        "ppo": ("an update of PPO", f", responses of {args.ppo}"),
        "generate": (f"generating {args.generate} tokens", ""),
        "inference": ("a forward pass", ""),
        "training": ("training", f"{checkpointing}, {args.optimizer or optimizer}"),
    }[mode]
    return f"{what}, batch {args.batch} x {args.seq} tokens, {precision}{more}"


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
    yes, no = (", ".join(str(gb) for gb in DEVICES if (gb in fits) is side) for side in (True, False))
    return f"fits on: {yes} GB{no and f'; not on {no} GB'}"
