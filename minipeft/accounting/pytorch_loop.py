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

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .activations import Block, block_terms, blocks_of, first_trained, head_of
from .architectures import Architecture, Shape, architecture
from .loop import CONTEXT, LOGITS, LOOP_OPTIMIZERS, LOOP_PRECISIONS, WORKSPACE, Loop
from .memory import MemoryLedger, check_step, states_from_shapes
from .parameters import elements, trained_name, trained_parameters, virtual_tokens
from .precision import Precision


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
        mode, max_new_tokens: as in `memory_ledger`; but "evaluate" is the forward pass alone, without what a loss makes
            of its logits.

    Raises ValueError for what `memory_ledger` refuses, but for families that this package does not build.
    """
    loop = loop or Loop()
    check_step(mode, batch, seq_len, max_new_tokens)
    arch = model if isinstance(model, Architecture) else architecture(model)
    before_input, before_keys = virtual_tokens(config)
    virtual, new, limit = before_input + before_keys, (max_new_tokens or 1) - 1, positions_of(arch)
    if seq_len is not None and virtual + seq_len + new > limit:
        left = f": {virtual} virtual tokens leave {max(0, limit - virtual) or 'none'} of them" if virtual else ""
        fed = f" + {new} of max_new_tokens={max_new_tokens} (the last is not fed back) = {seq_len + new}" if new else ""
        raise ValueError(f"{arch.name} has {limit} positions{left}, and seq_len={seq_len}{fed} is more")
    if loop.quantization and config is None and mode == "train":
        raise ValueError("weights in four bits are frozen, so not all can be trained: give a method's config")
    config = "frozen" if config is None and mode != "train" else config
    trained = trained_parameters(arch, config)
    states = _states(arch, config, trained, loop, mode == "train")
    if seq_len is None:
        return _ledger(states, {"model states": states.gradients}, {}, loop)
    seq_len += before_input
    blocks = blocks_of(arch, trained)
    if not blocks:
        raise ValueError(f"activations need the shapes of blocks; {arch.name} has none: leave seq_len out")
    if mode != "train" or not trained:
        moments = _use(arch, blocks, batch, seq_len, before_keys, new, loop, "generate" if mode == "generate" else "evaluate")
        return _ledger(states, moments, {}, loop)
    return _ledger(states, *_train(arch, config, trained, blocks, states, batch, seq_len, loop), loop)


# ------------------------------------------------------------------------------------------- what is there all the time


class _States(NamedTuple):
    """What does not depend on the batch: bytes by line.

    p          bytes of a number, by what it is for; stream: of a number of the hidden states
    always     weights, states, CUDA's own
    gradients  all of them; step: what the optimizer makes beside them
    whole      of the weights before they are shared out
    """

    p: Precision
    stream: int
    always: dict[str, int]
    gradients: dict[str, int]
    step: dict[str, int]
    whole: int


def _states(arch: Architecture, config: Any, trained: Mapping[str, Shape], s: Loop, training: bool) -> _States:
    p, is_method = LOOP_PRECISIONS[s.precision], hasattr(config, "parameter_shapes")
    if is_method:  # what is trained is the method's own
        wide = 4 if s.adapters == "float32" else 2
        p = replace(p, trained=wide, gradients=wide, states=wide, master=0)
    frozen = 4 if s.upcast else p.frozen
    kept = replace(p, frozen=frozen)
    four_bits = (s.quantization, s.double_quantization, s.pack_experts)
    weights, sizes, averaged = states_from_shapes(arch, config, kept, *four_bits, trained)
    n = sum(sizes) * training
    states, weight, gradient = (s.gpus if s.sharding >= level else 1 for level in ("zero1", "zero3", "zero2"))
    if s.accumulation > 1 and s.sharding == "zero3":
        gradient = 1  # FSDP's no_sync "accumulates the full model gradients (instead of gradient shards)"
    kinds, prompts = arch.kinds, (".prompt_embeddings", ".e")  # which are an nn.Embedding in PEFT
    embeddings = {name for name in trained if kinds.get(trained_name(name)) == "embedding" or name.endswith(prompts)}
    hosted = s.offload and s.sharding == "zero3"
    paged = s.offload or s.optimizer.startswith("paged")
    gradients = {"gradients": 0 if hosted else n * p.gradients // gradient}
    always = {line: 0 if hosted else size // weight for line, size in weights.items()} | {
        "master copies": 0 if paged else n * p.master // states,
        "optimizer states": 0 if paged or not n else optimizer_bytes(s.optimizer, trained, p, embeddings) // states,
        "running averages": averaged * p.states * training,
        "gradient buckets": n * p.gradients * (s.gpus > 1 and s.sharding == "ddp"),  # gradient_as_bucket_view=False
        "cuBLAS workspaces": 2 * WORKSPACE, "CUDA context": CONTEXT,
    }  # fmt: skip
    temporary = 0 if s.offload else LOOP_OPTIMIZERS[s.optimizer][1] * n * p.states // states
    # an embedding in float32 makes a stream in float32, but where FSDP's MixedPrecision gathers it in 16 bits
    stream = 2 if _gathered_in_16_bits(s) else p.trained if config is None else frozen
    return _States(p, stream, always, gradients, {"optimizer's temporary": temporary}, sum(weights.values()))


def optimizer_bytes(optimizer: str, trained: Mapping[str, Shape], p: Precision, embeddings: Container[str] = ()) -> int:
    """Bytes of an optimizer's states of trained parameters of these shapes; `embeddings` are the names of tables.

    In 8 bits (bitsandbytes): two bytes and a float32 scale of 256 numbers; float32 under 4,096 numbers, and for an
    embedding, tied or not, where transformers' Trainer makes the optimizer (it registers optim_bits=32).
    """
    sizes = [math.prod(shape) for shape in trained.values()]
    if optimizer == "adafactor":  # float32 for each row and each column of a matrix, also of several in one; all of a vector
        factored = ((s[:-1], (*s[:-2], s[-1])) if len(s) > 1 else (s,) for s in trained.values())
        return 4 * sum(math.prod(shape) for shapes in factored for shape in shapes)
    if "8bit" in optimizer:
        wide = [n < 4096 or name in embeddings for name, n in zip(trained, sizes)]
        return sum(8 * n if float32 else 2 * (n + 4 * -(-n // 256)) for float32, n in zip(wide, sizes))
    return LOOP_OPTIMIZERS[optimizer][0] * p.states * sum(sizes)


# ------------------------------------------------------------------------------------------- what the batch adds


def _train(
    arch: Architecture, config: Any, trained: Mapping[str, Shape], blocks: list[Block], states: _States, batch: int,
    seq_len: int, s: Loop,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:  # fmt: skip
    """(the lines of each moment, what is kept in full)."""
    p, stream, t, h, V = states.p, states.stream, batch * seq_len, blocks[0].h, _words(arch)
    float32_adapters = hasattr(config, "parameter_shapes") and s.adapters == "float32"
    autocast = s.precision == "autocast" or s.upcast or (float32_adapters and p.frozen == 2)
    c, four_bits = 2 if autocast else stream, s.quantization is not None
    if four_bits and autocast and not blocks[0].norms[0].rms:
        stream = 4  # autocast makes a layer norm's values float32, and bitsandbytes' Linear4bit returns its input's dtype

    # Activations: of each block from the first that gradients reach, all that it keeps, or its input alone.
    options = {"weights": stream, "autocast": autocast, "adapters": p.trained, "attention": s.attention}
    options |= {"dropout": s.dropout, "packed_inputs": four_bits and s.packed_inputs}
    reached, _ = first_trained(arch, blocks, trained)
    kept = [round(t * sum(term.bytes for term in block_terms(block, seq_len, **options))) for block in blocks]
    kept[:reached] = [0] * min(reached, len(blocks))
    activations = {"activations": stream * t * h * (len(blocks) - reached) if s.checkpointing else sum(kept)}

    # The loss: logits; the last norm's input in float32, and its output twice where norm and head are trained.
    a_word, stays = LOGITS[s.logits]
    chunk = {"fused": 1024, "chunked": 128}.get(s.logits, 0)
    loss = {"logits": V * (a_word * t + 12 * min(t, chunk)), "last norm and head": t * h * (4 + 2 * stream * (config is None))}
    after = {"logits": V * stays * t}

    # One block in the backward pass: gradients of activations, its weights in 16 bits. bitsandbytes' MatMul4Bit.backward
    # widens the whole weight (F.dequantize_4bit(B, ...)), and its scales in float32 before.
    block = blocks[top := max(range(len(blocks)), key=kept.__getitem__)]
    widest = _widest(block, s)
    widened = four_bits * (2 * widest + widest // 64 * 4 * s.double_quantization)
    narrowed = block.parameters if s.checkpointing else sum(b.parameters for b in blocks)
    weights = {
        "weights in 16 bits": 2 * narrowed * (autocast and stream == 4 and not four_bits),
        "gathered weights": sum(_gathered(arch, blocks, states.whole, s)),
    }  # fmt: skip
    work = {"dequantized weight": widened, "working memory": t * _backward_bytes(block, c, seq_len, s.attention)}
    inside = weights | work | after
    before = states.gradients if s.accumulation > 1 else {}
    outside = sum(map(math.prod, trained.values())) - sum(b.trained for b in blocks)
    first = {"gradients": min((outside + block.trained) * p.gradients, states.gradients["gradients"])}

    last = min(reached, len(blocks) - 1)
    inputs = {"activations": stream * t * h if s.checkpointing else kept[last]}
    if s.reentrant and s.checkpointing and s.sharding == "zero3" and not any(layer.trained for layer in block.layers):
        inputs = activations | {"gradients of blocks' inputs": stream * t * h * (len(blocks) - 1 - last)}

    def one(i: int) -> dict[str, int]:
        return {"recomputed block": kept[i]} if s.checkpointing else {}

    moments = {
        "the loss": activations | loss | weights | before,
        "backward, last block": activations | inside | one(top) | (before or first),
        "backward, first block": inside | states.gradients | one(last) | inputs,
        "optimizer step": after | states.gradients | states.step,
    }  # fmt: skip
    if s.sharding == "zero3" and config is None:  # FSDP's root unit: its parameters' gradients, and all of them in one
        root = {"gathered weights": _gathered(arch, blocks, states.whole, s)[1]}
        root["gradient of what is in no block"] = 2 * outside * (2 if _gathered_in_16_bits(s) else p.gradients)
        moments["the end of the backward pass"] = after | states.gradients | root
    if s.holds_outputs:
        arrays = [{layer.array: layer.n_in for layer in block.layers} for block in blocks]
        packed = sum(sum(widths.values()) for widths in arrays) if options["packed_inputs"] else 0
        moments["the end of the forward pass"] = activations | after | before | {"last pass": t * (V * stays + c * packed)}
    return moments, {"kept": kept, "held": activations | {"logits": loss["logits"]}}


def _ledger(
    states: _States, moments: Mapping[str, Mapping[str, float]], found: Mapping[str, Any], loop: Loop
) -> LoopLedger:
    """The largest moment, with a margin on all but CUDA's own."""
    full = {}
    for name, lines in moments.items():
        lines = {line: round(size) for line, size in {**states.always, **lines}.items() if round(size)}
        margin = sum(size for line, size in lines.items() if line != "CUDA context") * loop.headroom / 100
        full[name] = lines | ({"headroom": round(margin)} if margin else {})
    peak = max(full, key=lambda name: sum(full[name].values()))
    held = states.always | states.gradients | found.get("held", {})
    return LoopLedger(full[peak], held, tuple(found.get("kept", ())), None, full, peak)


def _widest(block: Block, loop: Loop) -> int:
    """Numbers of the largest matrix in four bits; experts are widened one by one."""
    return max((layer.size for layer in block.layers if loop.pack_experts or layer.share == 1.0), default=0)


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


def _gathered_in_16_bits(loop: Loop) -> bool:
    """FSDP's MixedPrecision: shards in float32, of which 16 bits are gathered to compute."""
    return loop.precision == "autocast" and loop.sharding == "zero3"


def _gathered(arch: Architecture, blocks: list[Block], whole: int, loop: Loop) -> tuple[int, int]:
    """FSDP has a block whole while it runs and the next on its way, and what is in no block (its root) from the start."""
    if loop.sharding != "zero3":
        return 0, 0
    size = LOOP_PRECISIONS[loop.precision].frozen
    outside = (elements(arch.shapes) - sum(b.parameters for b in blocks)) * size
    narrower = size // 2 if _gathered_in_16_bits(loop) else 1
    return 2 * (whole - outside) // len(blocks) // narrower, outside // narrower


def _words(arch: Architecture) -> int:
    """V, of a language model's head; of another, 0."""
    head = head_of(arch)
    return arch[head[1]][0] if head else 0


def positions_of(arch: Architecture) -> int:
    """The positions of text that a model has a table of; without one, far more than fit anywhere."""
    named = {name: shape for name, shape in arch.items() if arch.kinds[name] == "embedding" and "vision_tower" not in name}
    tables = [shape[0] for name, shape in named.items() if re.search("wpe|position", name)]
    unused = 2 if arch.model_type in ("opt", "roberta", "xlm-roberta") else 0  # the first rows, for padding
    return min(tables, default=2**24) - unused


def _use(
    arch: Architecture, blocks: list[Block], batch: int, seq_len: int, past: int, new: int, loop: Loop, mode: str
) -> dict[str, dict[str, float]]:
    """A forward pass, or generation with a cache, in which the prompt's pass needs most working memory.

    `past` keys and values of a prefix are in the cache before the prompt's, and `new` are added after them.
    """
    t, c, block = batch * seq_len, LOOP_PRECISIONS[loop.precision].frozen, max(blocks, key=lambda b: b.inner)
    work = c * (block.h * 2 + max(3 * block.inner, block.queries + 2 * block.keys))
    if loop.attention == "eager":
        work = max(work, (4 + c) * block.a * (past + seq_len))
    lines = {
        "working memory": t * work,
        "dequantized weight": 2 * _widest(block, loop) if loop.quantization else 0,
        "logits": _words(arch) * (t * c if mode == "evaluate" else batch * (c + 4)),  # the last position alone, widened
    }
    if mode == "evaluate":
        return {"forward pass": lines}
    bits = loop.cache_bits + (0 if loop.cache_bits == 16 else 2 * 16 / 64)
    number = c if loop.cache_bits == 16 else bits / 8
    prompt, positions = past + seq_len, past + seq_len + new
    cache = 2 * sum(b.keys * b.attentions for b in blocks) * batch * number
    growing = cache / len(blocks) * positions  # torch.cat: a layer's old and new keys and values at once
    last = lines | {"KV cache": cache * positions, "working memory": growing}
    return {"the prompt": lines | {"KV cache": cache * prompt}, "the last token": last}


def largest(fits: Any, most: int = 2**24) -> int:
    """The largest number up to `most` for which `fits(number)`, of which larger ones fit never; 0 where not even 1 does."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
