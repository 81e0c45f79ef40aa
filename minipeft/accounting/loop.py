"""How a PyTorch training loop is set: what each setting's values mean in bytes, and the defaults that are practised."""

from __future__ import annotations

from dataclasses import dataclass

from .precision import PRECISIONS, QUANT_TYPES, Precision, check_positive, named

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
    # the same in transformers 4.46 to 4.48: those in 16 bits, in float32, their shifted copy and log_softmax
    "shifted": (14, 0),
    # the same in a loop whose variable keeps the outputs, whose logits were float32 too before transformers 4.46
    "held": (16, 4),
    # in 16 bits throughout, as a model's own loss without autocast: logits, their shifted copy, log_softmax
    "bfloat16": (6, 0),
    # the same, and the loop's variable keeps the logits themselves
    "held-bfloat16": (8, 2),
    # a kernel that writes the gradient over the logits: those in float32 and their shifted copy (Unsloth, Liger)
    "in-place": (8, 0),
    # logits made and scored a few tokens at a time, in 16 bits; logits and log-probabilities stay (lit-gpt)
    "chunked": (4, 2),
    # scored in the kernel that makes them, a chunk at a time, and never all there (Liger, cut cross-entropy)
    "fused": (0, 0),
}
ATTENTION = ("eager", "sdpa", "flash")
SHARDING = ("ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Loop:
    """How the loop is set, with the defaults that are practised.

    Args:
        precision: of the weights, their gradients and states; a key of LOOP_PRECISIONS.
        adapters: of a method's parameters; PEFT makes float32 of 16 bits (autocast_adapter_dtype), and autocast computes.
        optimizer: a key of LOOP_OPTIMIZERS. A paged one's states lie in unified memory, which gives way;
            an 8-bit one's of embeddings are in float32, as transformers' Trainer has it.
        checkpointing: blocks keep their inputs only; reentrant: as torch.utils.checkpoint first did it, transformers'
            default before 5. FSDP's hooks on a block that trains nothing itself then keep its input and the gradient
            of that until the pass ends (torch.autograd.graph.register_multi_grad_hook, in a cycle with the input).
        attention: "flash", "sdpa" (keys and values repeated to all heads) or "eager" (softmax kept, s squared).
        logits: how the loss is computed; a key of LOGITS.
        accumulation: backward passes for one step; from the second on, gradients are there from the start.
        dropout: of adapters' inputs.
        quantization, double_quantization: as in `memory_ledger`; upcast: what is not in four bits in float32
            (prepare_model_for_kbit_training); pack_experts: experts in one array too, as layers that they were before
            transformers 5, or by bitsandbytes.nn.parametrize.
        packed_inputs: layers in four bits keep their inputs, as bitsandbytes before 0.43.2 had it (its pull request 1270).
        holds_outputs: the loop's variable keeps the outputs of the last pass until the next forward pass is done: its
            logits, and through them its graph, to which packed_inputs belong (they are attributes, which backward leaves).
        gpus, sharding: "ddp" keeps everything on each; "zero1" shards states, "zero2" gradients too, "zero3" (FSDP's
            FULL_SHARD) weights too, of which two blocks are whole at a time, and what is in no block; with
            precision="autocast" they are gathered in 16 bits (its MixedPrecision, to which accelerate adds float32 shards).
        offload: states on the host, and sharded weights and gradients too.
        cache_bits: of a number in the cache of keys and values; 8 and 4 have a scale and a zero for 64 numbers.
        headroom: percent added for an allocator's fragments; a margin, not a measurement.
    """

    precision: str = "bfloat16"
    adapters: str = "float32"
    optimizer: str = "adamw"
    checkpointing: bool = True
    reentrant: bool = False
    attention: str = "flash"
    logits: str = "float32"
    accumulation: int = 1
    dropout: float = 0.0
    quantization: str | None = None
    double_quantization: bool = True
    upcast: bool = False
    pack_experts: bool = False
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
        elif self.upcast or self.pack_experts:
            raise ValueError("upcast and pack_experts are of weights in four bits: give quantization, too")
        if self.cache_bits not in (4, 8, 16):
            raise ValueError(f"cache_bits must be 4, 8 or 16, not {self.cache_bits!r}")
        if self.gpus == 1 and self.sharding != "ddp":
            raise ValueError(f"sharding={self.sharding!r} needs several GPUs: give gpus, the number of them")
