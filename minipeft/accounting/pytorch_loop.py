"""What a standard PyTorch training loop holds, line by line: transformers and PEFT on GPUs.

    b  sequences of s tokens each, t = b s      h  width of the hidden states      L  blocks      V  words

    always      weights · adapters · optimizer states · what CUDA itself takes
    + at each moment of a step
    loss        inputs of the L blocks, c t h each (or all that the blocks keep) · logits: 12 t V bytes
    last block  inputs of the blocks · one block, computed again · its gradients of activations · a weight in 16 bits
    first block one block · all gradients
    step        all gradients · the optimizer's temporary

The peak is the largest of these. No constant here is fitted: each term is what the code named beside it allocates, and
two are measured, with their source (`CONTEXT`, `WORKSPACE`). What a block keeps stands in `activations`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .activations import ATTENTION, Block, block_terms, blocks_of, first_trained
from .architectures import Architecture, architecture
from .memory import QUANT_TYPES, MemoryLedger, check_positive, named, states_from_shapes
from .parameters import elements, trained_parameters
from .precision import PRECISIONS, Precision

CONTEXT = 426 * 2**20  # of a process: driver, kernels (github.com/unslothai/unsloth-zoo/pull/1053, RTX 6000 Ada)
WORKSPACE = 8_519_680  # of cuBLAS, a handle (discuss.pytorch.org/t/178671); forward and backward threads have one each

LOOP_PRECISIONS = {
    # torch.optim makes a state in its parameter's dtype (torch.zeros_like(p)), so Adam in bfloat16 costs 2 + 2 + 4
    "bfloat16": Precision(2, 2, 2, 2, activations=2),
    "mixed": PRECISIONS["mixed"],
    "mixed-float32-gradients": PRECISIONS["mixed-float32-gradients"],
    "autocast": Precision(),  # float32 weights, and linear layers in 16 bits
    "float32": Precision(),
}
# name -> (states a parameter, in its dtype; numbers that a step makes beside them). The default for a GPU is `foreach`,
# whose exp_avg_sq_sqrt = torch._foreach_sqrt(...) is as large as all parameters (torch/optim/adam.py); `fused` has none.
LOOP_OPTIMIZERS = {
    "adamw": (2, 1), "adam": (2, 1), "adamw_fused": (2, 0), "momentum": (1, 0), "sgd": (0, 0),
    "adamw_8bit": (2, 0), "paged_adamw": (2, 0), "paged_adamw_8bit": (2, 0), "adafactor": (0, 0),
}  # fmt: skip
# Bytes a token and word at the loss, and of them kept until the end of the backward pass, over the whole batch.
LOGITS = {
    # transformers' ForCausalLMLoss: logits.float(); log_softmax, its gradient and that of its input: 4 bytes each
    "float32": (12, 0),
    # the same in a loop whose variable keeps the outputs, whose logits were float32 too before transformers 4.46
    "held": (16, 4),
    # in 16 bits throughout, and the loop's variable keeps the logits themselves
    "bfloat16": (8, 2),
    # a kernel that writes the gradient over the logits: those in float32 and their shifted copy (Unsloth, Liger)
    "in-place": (8, 0),
    # logits made and scored a few tokens at a time, in 16 bits; logits and log-probabilities stay (lit-gpt)
    "chunked": (4, 2),
    # scored in the kernel that makes them, a chunk at a time, and never all there (Liger, cut cross-entropy)
    "fused": (0, 0),
}
SHARDING = ("ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Loop:
    """How the loop is set, with the defaults that are practised; each has an option of `minipeft memory`.

    Args:
        precision: of the weights, their gradients and states; a key of LOOP_PRECISIONS.
        adapters: of a method's parameters; PEFT makes float32 of 16 bits (autocast_adapter_dtype), and autocast computes.
        optimizer: a key of LOOP_OPTIMIZERS. A paged one's states lie in unified memory, which gives way.
        checkpointing: blocks keep their inputs only.
        attention: "flash", "sdpa" (keys and values repeated to all heads) or "eager" (softmax kept, s squared).
        logits: how the loss is computed; a key of LOGITS.
        accumulation: backward passes for one step; from the second on, gradients are there from the start.
        dropout: of adapters' inputs.
        quantization, double_quantization: as in `memory_ledger`; upcast: what is not in four bits in float32
            (prepare_model_for_kbit_training).
        packed_inputs: layers in four bits keep their inputs, as bitsandbytes before 0.43.2 had it (its pull request 1270).
        holds_outputs: the loop's variable keeps the outputs of the last pass until the next forward pass is done: its
            logits, and through them its graph, to which packed_inputs belong (they are attributes, which backward leaves).
        gpus, sharding: "ddp" keeps everything on each; "zero1" shards states, "zero2" gradients too, "zero3" (FSDP's
            FULL_SHARD) weights too, of which two blocks are whole at a time, and what is in no block.
        offload: states on the host, and sharded weights and gradients too.
        cache_bits: of a number in the cache of keys and values; 8 and 4 have a scale and a zero for 64 numbers.
        headroom: percent added for an allocator's fragments; a margin, not a measurement.
    """

    precision: str = "bfloat16"
    adapters: str = "float32"
    optimizer: str = "adamw"
    checkpointing: bool = True
    attention: str = "flash"
    logits: str = "float32"
    accumulation: int = 1
    dropout: float = 0.0
    quantization: str | None = None
    double_quantization: bool = True
    upcast: bool = False
    packed_inputs: bool = False
    holds_outputs: bool = False
    gpus: int = 1
    sharding: str = "ddp"
    offload: bool = False
    cache_bits: int = 16
    headroom: float = 5.0

    def __post_init__(self) -> None:
        named("precision", self.precision, LOOP_PRECISIONS)
        named("adapters", self.adapters, ("float32", "bfloat16"))
        named("optimizer", self.optimizer, LOOP_OPTIMIZERS)
        named("attention", self.attention, ATTENTION)
        named("logits", self.logits, LOGITS)
        named("sharding", self.sharding, SHARDING)
        check_positive(gpus=self.gpus, accumulation=self.accumulation)
        if self.quantization is not None:
            named("quantization", self.quantization, QUANT_TYPES)
        if self.cache_bits not in (4, 8, 16):
            raise ValueError(f"cache_bits must be 4, 8 or 16, not {self.cache_bits!r}")
        if self.gpus == 1 and self.sharding != "ddp":
            raise ValueError(f"sharding={self.sharding!r} needs several GPUs: give gpus, the number of them")


@dataclass(frozen=True)
class LoopLedger(MemoryLedger):
    """A ledger of a GPU; `moments` holds the lines at each moment of a step, and `peak` names the largest."""

    moments: Mapping[str, Mapping[str, int]] | None = None
    peak: str = ""


def pytorch_ledger(
    model: Any,
    config: Any = None,
    batch: int = 1,
    seq_len: int | None = None,
    loop: Loop | None = None,
    *,
    mode: str = "train",
    max_new_tokens: int | None = None,
) -> LoopLedger:
    """The bytes that one GPU of a standard PyTorch loop holds in the steady state, at the largest moment.

    Args:
        model, config: as in `memory_ledger`, by name or shapes; any family of which there is a table.
        batch, seq_len: sequences on one GPU and their length; without a length, the states alone.
        loop: the settings.
        mode, max_new_tokens: as in `memory_ledger`.

    Raises ValueError for what `memory_ledger` refuses, but for families that this package does not build.
    """
    loop = loop or Loop()
    named("mode", mode, ("train", "evaluate", "generate"))
    check_positive(batch=batch, seq_len=seq_len, max_new_tokens=max_new_tokens)
    arch = model if isinstance(model, Architecture) else architecture(model)
    if seq_len is not None and seq_len + (max_new_tokens or 1) - 1 > positions_of(arch):
        raise ValueError(f"{arch.name} has {positions_of(arch)} positions: give a seq_len of at most as many")
    if loop.quantization and config is None and mode == "train":
        raise ValueError("weights in four bits are frozen, so not all can be trained: give a method's config")
    config = "frozen" if config is None and mode != "train" else config
    p, is_method = LOOP_PRECISIONS[loop.precision], hasattr(config, "parameter_shapes")
    if is_method:  # what is trained is the method's own
        wide = 4 if loop.adapters == "float32" else 2
        p = replace(p, trained=wide, gradients=wide, states=wide, master=0)
    rest = replace(p, frozen=4) if loop.upcast and loop.quantization else p
    states, sizes, averaged = states_from_shapes(arch, config, rest, loop.quantization, loop.double_quantization)

    # What is there all the time.
    sizes = sizes if mode == "train" else ()
    n, s = sum(sizes), loop
    ranks = {name: s.gpus if s.sharding >= name else 1 for name in ("zero1", "zero2", "zero3")}
    if s.accumulation > 1 and s.sharding == "zero3":
        ranks["zero2"] = 1  # FSDP's no_sync "accumulates the full model gradients (instead of gradient shards)"
    weights = {line: size // ranks["zero3"] for line, size in states.items()}
    held = dict(weights)
    held["master copies"] = n * p.master // ranks["zero1"]
    held["gradients"] = n * p.gradients // ranks["zero2"]
    held["optimizer states"] = optimizer_bytes(s.optimizer, arch, trained_parameters(arch, config), sizes, p) // ranks["zero1"]
    held["running averages"] = averaged * p.states * (mode == "train")
    if s.offload or s.optimizer.startswith("paged"):
        held["optimizer states"] = held["master copies"] = 0
    if s.offload and s.sharding == "zero3":
        held |= dict.fromkeys([*states, "gradients"], 0)
    held["gradient buckets"] = n * p.gradients * (s.gpus > 1 and s.sharding == "ddp")  # gradient_as_bucket_view=False
    always = {line: size for line, size in held.items() if line != "gradients"}
    always |= {"CUDA context": CONTEXT, "cuBLAS workspaces": 2 * WORKSPACE}
    whole = {"gradients": held["gradients"]}
    step = {"optimizer's temporary": LOOP_OPTIMIZERS[s.optimizer][1] * n * p.states // ranks["zero1"]}
    step["optimizer's temporary"] *= not s.offload
    if seq_len is None or (mode == "train" and not sizes):
        return _ledger(always, held, {"model states": whole if mode == "train" else {}}, loop)

    trained = trained_parameters(arch, config)
    blocks = blocks_of(arch, trained)
    if not blocks:
        raise ValueError(f"activations need the shapes of blocks; {arch.name} has none: leave seq_len out")
    if mode != "train":
        moments = _use(arch, blocks, batch, seq_len, max_new_tokens, loop, p, mode)
        return _ledger(always, held, moments, loop)

    # What the batch adds. t tokens; `kept` is of each block.
    t, h = batch * seq_len, blocks[0].h
    autocast = s.precision == "autocast" or (is_method and s.adapters == "float32" and p.frozen == 2) or s.upcast
    stream = rest.frozen if config is not None else p.trained  # an embedding in float32 makes a stream in float32
    c = 2 if autocast else stream
    options = dict(weights=stream, autocast=autocast, adapters=p.trained, attention=s.attention, dropout=s.dropout)
    options["packed_inputs"] = bool(s.quantization) and s.packed_inputs
    kept = [t * sum(x.bytes for x in block_terms(block, seq_len, **options)) for block in blocks]
    reached, _ = first_trained(arch, blocks, trained)  # blocks before keep nothing
    kept = [size if i >= reached else 0 for i, size in enumerate(kept)]
    inputs = stream * t * h * (len(blocks) - reached)
    V = _words(arch)
    head = _head_bytes(arch, config, t, stream)
    per_word, stays = LOGITS[s.logits]
    chunk = min(t, 1024 if s.logits == "fused" else 128) if s.logits in ("chunked", "fused") else 0
    loss = {"logits": V * (per_word * t + 12 * chunk), "last norm and head": head}
    end = {"logits": V * stays * t}
    before = whole if s.accumulation > 1 else {}
    old = 0
    if s.holds_outputs:
        packed_arrays = [{layer.array: layer.n_in for layer in block.layers} for block in blocks if options["packed_inputs"]]
        old = t * (V * stays + c * sum(sum(arrays.values()) for arrays in packed_arrays))

    # One block in the backward pass: what it keeps, and the gradients that are there at once.
    top = max(range(len(blocks)), key=lambda i: kept[i])
    block = blocks[top]
    work = t * _backward_bytes(block, c, seq_len, s.attention)
    packed = 2 * block.largest if s.quantization else 0  # bnb's MatMul4Bit.backward: F.dequantize_4bit(B, ...).to(dtype)
    packed += block.largest // 64 * 4 if s.quantization and s.double_quantization else 0  # the scales, in float32
    cast = 2 * (sum(b.parameters for b in blocks) if not s.checkpointing else block.parameters)
    inside = {
        "working memory": work, "dequantized weight": packed,
        "gathered weights": _gathered(arch, blocks, states, loop),
        "weights in 16 bits": cast * (autocast and stream == 4 and not s.quantization),
    }  # fmt: skip
    gathered = {"gathered weights": inside["gathered weights"]}
    own = block.trained * p.gradients
    partly = {"gradients": (n * p.gradients - sum(b.trained for b in blocks) * p.gradients + own) // ranks["zero2"]}
    all_kept = {"activations": inputs if s.checkpointing else round(sum(kept))}
    moments = {
        **({"the end of the forward pass": all_kept | end | before | {"last pass": old}} if old else {}),
        "the loss": all_kept | loss | before | gathered | {"weights in 16 bits": inside["weights in 16 bits"]},
        "backward, last block": all_kept | inside | end | (before or partly),
        "optimizer step": whole | step | end,
    }
    if s.checkpointing:
        moments["backward, last block"] |= {"recomputed block": round(kept[top])}
        moments["backward, first block"] = inside | end | whole | {"activations": stream * t * h, "recomputed block": round(kept[min(reached, len(blocks) - 1)])}
    else:
        moments["backward, first block"] = inside | end | whole | {"activations": round(kept[min(reached, len(blocks) - 1)])}
    held |= all_kept | {"logits": loss["logits"]}
    return _ledger(always, held, moments, loop, tuple(map(round, kept)))


def _ledger(
    always: Mapping[str, int], held: Mapping[str, int], moments: Mapping[str, Mapping[str, int]], loop: Loop,
    per_layer: tuple[int, ...] = (),
) -> LoopLedger:  # fmt: skip
    """The largest moment, with a margin on all but CUDA's own."""
    full = {}
    for name, lines in moments.items():
        lines = {line: round(size) for line, size in {**always, **lines}.items() if round(size)}
        margin = sum(size for line, size in lines.items() if line != "CUDA context") * loop.headroom / 100
        full[name] = lines | ({"headroom": round(margin)} if margin else {})
    peak = max(full, key=lambda name: sum(full[name].values()))
    held = {line: round(size) for line, size in held.items()}
    return LoopLedger(full[peak], held, per_layer, None, full, peak)


def optimizer_bytes(optimizer: str, arch: Architecture, trained: Any, sizes: tuple[int, ...], p: Precision) -> int:
    """Bytes of an optimizer's states of trained parameters of these numbers of elements."""
    if optimizer == "adafactor":  # a row and a column of float32 for each matrix, all of a vector
        shapes = trained.values() if sizes else ()
        return sum(4 * (sum(shape) if len(shape) > 1 else shape[0]) for shape in shapes)
    if "8bit" in optimizer:  # bitsandbytes: two bytes, a float32 scale of 256 numbers; float32 under 4,096 numbers
        return sum(2 * (n + 4 * -(-n // 256)) if n >= 4096 else 8 * n for n in sizes)
    wide = 4 if optimizer.startswith("paged") else p.states  # bitsandbytes' states are float32
    return LOOP_OPTIMIZERS[optimizer][0] * wide * sum(sizes)


def _backward_bytes(block: Block, c: int, s: int, attention: str) -> float:
    """Bytes a token of the gradients that one block's backward pass has at once, beyond what it keeps.

    At the MLP, everything that the block keeps is still there, but for the input of a trained last layer: gradients of
    the product, of its factors, of the stream and the block's output. At eager attention, the MLP's arrays are gone,
    and softmax's gradient and that of its input are there in float32.
    """
    last = sum(layer.n_in * layer.share for layer in block.layers if layer.kind == "mlp" and layer.trained)
    mlp = c * ((3 if block.gated else 2) * block.inner + 2 * block.h - last)
    if attention != "eager":
        return mlp
    return max(mlp, (8 - c) * block.a * s - c * 3 * block.inner)


def _gathered(arch: Architecture, blocks: list[Block], states: Mapping[str, int], loop: Loop) -> int:
    """FSDP has a block whole while it runs and the next on its way, and what is in no block from the start."""
    if loop.sharding != "zero3":
        return 0
    total, inside = sum(states.values()), sum(b.parameters for b in blocks)
    outside = (elements(arch.shapes) - inside) * (LOOP_PRECISIONS[loop.precision].frozen)
    return 2 * (total - outside) // len(blocks) + outside


def _words(arch: Architecture) -> int:
    """V, of a language model's head; of another, 0."""
    owner = arch.tied.get("lm_head.weight", "lm_head.weight")
    return arch[owner][0] if owner in arch else 0


def positions_of(arch: Architecture) -> int:
    """The positions that a model has a table of; without one, far more than fit anywhere."""
    tables = [shape[0] for name, shape in arch.items() if arch.kinds[name] == "embedding" and re.search("wpe|position", name)]
    return min(tables, default=2**24)


def _head_bytes(arch: Architecture, config: Any, t: int, stream: int) -> int:
    """What the last norm keeps (its input in float32), and the head's input where it is trained."""
    h = arch.dimensions["hidden_size"]
    return t * h * (4 + 2 * stream * (config is None))


def _use(
    arch: Architecture, blocks: list[Block], batch: int, seq_len: int, new: int | None, loop: Loop, p: Precision, mode: str
) -> dict[str, dict[str, int]]:
    """A forward pass, or generation with a cache, in which the prompt's pass needs most working memory."""
    t, c, block = batch * seq_len, p.frozen if p.frozen == 2 else p.activations, max(blocks, key=lambda b: b.inner)
    work = c * (block.h * 2 + max(3 * block.inner, block.queries + 2 * block.keys))
    if loop.attention == "eager":
        work = max(work, (4 + c) * block.a * seq_len)
    lines = {
        "working memory": t * work,
        "dequantized weight": 2 * block.largest if loop.quantization else 0,
        "logits": _words(arch) * (t * c if mode == "evaluate" else batch * (c + 4)),  # the last position alone, widened
    }
    if mode == "evaluate":
        return {"forward pass": lines}
    bits = loop.cache_bits + (0 if loop.cache_bits == 16 else 2 * 16 / 64)
    number = c if loop.cache_bits == 16 else bits / 8
    positions = seq_len + (new or 1) - 1
    cache = 2 * sum(b.keys * b.attentions for b in blocks) * batch * number
    growing = cache / len(blocks) * positions  # torch.cat: a layer's old and new keys and values at once
    last = {"KV cache": cache * positions, "working memory": growing, "logits": lines["logits"]}
    return {"the prompt": lines | {"KV cache": cache * seq_len}, "the last token": last | {"dequantized weight": lines["dequantized weight"]}}


def largest(fits: Any, least: int = 1, most: int = 2**24) -> int:
    """The largest number for which `fits(number)`, of which larger ones fit never; 0 where not even `least` does."""
    if not fits(least):
        return 0
    low, high = least, least * 2
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
