"""The ledger of a PyTorch loop against real steps of transformers and PEFT on a CPU, by live storages; and its FLOPs."""

from __future__ import annotations

import gc
import weakref

import pytest

from minipeft import LoraConfig
from minipeft.accounting import Loop, count_parameters, pytorch_ledger, step_flops
from minipeft.accounting.loop import CONTEXT, LOGITS, WORKSPACE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

B, S = 2, 256
SHAPE = dict(
    vocab_size=4000, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32, tie_word_embeddings=False,
)  # fmt: skip
TARGETS = ["q_proj", "v_proj", "down_proj"]


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, of a model's and of all that ops make inside, and the most at once."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakKeyDictionary()
        for p in model.parameters():
            self.count(p)

    def count(self, t):
        if (storage := t.untyped_storage()) not in self.seen:
            self.seen[storage] = n = storage.nbytes()
            self.now += n
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, n)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.count(t)
        return out

    def free(self, n):
        self.now -= n


def model_of(method, attention, checkpointing, **shape):
    config = transformers.LlamaConfig(**{**SHAPE, **shape}, attn_implementation=attention)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).train()
    if method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=TARGETS), autocast_adapter_dtype=False)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vocabulary", [32, 4000])  # the peak in the blocks, and at the loss
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_peak_of_a_real_step(method, attention, checkpointing, vocabulary):
    model = model_of(method, attention, checkpointing, vocab_size=vocabulary)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
    ids = torch.zeros(B, S, dtype=torch.long)
    with Live(model) as live:
        for _ in range(2):
            live.peak = live.now  # of the second step, which finds the optimizer's states
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
            gc.collect()
    config = LoraConfig(r=8, target_modules=TARGETS) if method == "lora" else None
    loop = Loop(
        headroom=0.0, adapters="bfloat16", checkpointing=checkpointing,
        attention="flash" if attention == "sdpa" else attention,
    )  # fmt: skip
    ledger = pytorch_ledger({"model_type": "llama", **SHAPE, "vocab_size": vocabulary}, config, B, S, loop)
    assert ledger.total - CONTEXT - 2 * WORKSPACE == pytest.approx(live.peak, rel=0.05), ledger.moments


@pytest.mark.parametrize("kind", ["float32", "shifted", "bfloat16"])
def test_the_bytes_of_a_loss(kind):
    """transformers' loss today; that of 4.46 to 4.48, while the model has its logits in 16 bits; and a model's own."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    V = 4000
    labels = torch.zeros(B, S, dtype=torch.long)

    def loss_of(logits):
        if kind == "float32":
            return ForCausalLMLoss(logits, labels, V)
        wide = logits.float() if kind == "shifted" else logits
        shifted = wide[..., :-1, :].contiguous()
        return torch.nn.functional.cross_entropy(shifted.view(-1, V), labels[..., 1:].reshape(-1))

    def forward():
        logits = hidden @ head  # alive until the model has returned
        return loss_of(logits)

    hidden, head = (
        torch.zeros(B, S, 8, dtype=torch.bfloat16, requires_grad=True),
        torch.zeros(8, V, dtype=torch.bfloat16),
    )
    with Live(torch.nn.Module()) as live:
        forward().backward()
    assert live.peak / (B * S * V) == pytest.approx(LOGITS[kind][0], rel=0.02)


@pytest.fixture
def fsdp():
    """Wraps a module as one unit of FSDP, in a group of one process, in which nothing is sharded but all hooks run."""
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    def leaf(module, recurse, nonwrapped_numel):
        weight = getattr(module, "weight", None)
        return recurse or (not list(module.children()) and weight is not None and weight.requires_grad)

    def unit(module, **options):
        where = {"device_id": torch.device("cpu"), "sharding_strategy": ShardingStrategy.NO_SHARD}
        return FullyShardedDataParallel(module, **where, **options)

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield lambda module, trained=False: unit(module, auto_wrap_policy=leaf) if trained else unit(module)
    distributed.destroy_process_group()


class Checkpointed(torch.nn.Module):
    """A block in a checkpoint, as transformers before 5 called it: FSDP's unit is inside."""

    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x, **more):
        from torch.utils.checkpoint import checkpoint

        return checkpoint(lambda x: self.block(x, **more), x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("wrapped", "reentrant", "arrays"), [(False, True, 1), (True, False, 1), (True, True, 2)])
def test_what_fsdp_keeps_of_each_frozen_block(fsdp, wrapped, reentrant, arrays):
    """With each block more: its input, and where hooks keep it the gradient of that, till all adapters have theirs."""

    def peak(layers):
        model = model_of("lora", "sdpa", False, num_hidden_layers=layers, vocab_size=32)
        model.enable_input_require_grads()
        blocks = model.base_model.model.model.layers
        for i, block in enumerate(blocks):
            blocks[i] = Checkpointed(fsdp(block, trained=True) if wrapped else block, reentrant)
        model = fsdp(model) if wrapped else model
        ids = torch.zeros(1, S, dtype=torch.long)
        with Live(model) as live:
            for _ in range(2):
                gc.collect()
                start = live.peak = live.now
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                model.zero_grad()
        return live.peak - start

    stream, config = 2 * S * SHAPE["hidden_size"], LoraConfig(r=8, target_modules=TARGETS)
    adapters = 2 * count_parameters({"model_type": "llama", **SHAPE}, config).trainable // 4 * (arrays == 2)
    assert (peak(5) - peak(2)) / 3 == pytest.approx(arrays * stream + adapters, rel=0.01)
    loop = Loop(adapters="bfloat16", gpus=2, sharding="zero3", reentrant=reentrant)
    found = pytorch_ledger({"model_type": "llama", **SHAPE}, config, 1, S, loop).moments["backward, first block"]
    assert found.get("gradients of blocks' inputs", 0) == (3 * stream if reentrant else 0)
    assert found["activations"] == (4 * stream if reentrant else stream)


@pytest.mark.filterwarnings("ignore")
def test_the_gradient_of_fsdps_root(fsdp):
    """From the second of several passes on: embedding and head each for itself, and both in the unit's one array."""
    model = model_of("full", "sdpa", False, vocab_size=20_000)
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = fsdp(block)
    model, ids = fsdp(model), torch.zeros(1, 16, dtype=torch.long)
    with Live(model) as live:
        for _ in range(2):
            start = live.peak = live.now
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    loop = Loop(gpus=2, sharding="zero3", accumulation=2, checkpointing=False)
    ledger = pytorch_ledger({"model_type": "llama", **SHAPE, "vocab_size": 20_000}, None, 1, 16, loop)
    line = ledger.moments["the end of the backward pass"]["gradient of what is in no block"]
    assert live.peak - start == pytest.approx(line, rel=0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_flops_of_a_real_step(method, checkpointing):
    """As torch counts them, with attention written as products; PyTorch's checkpointing runs blocks again."""
    from torch.utils.flop_counter import FlopCounterMode

    model = model_of(method, "eager", checkpointing)
    ids = torch.zeros(B, S, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    config = LoraConfig(r=8, target_modules=TARGETS) if method == "lora" else None
    ours = step_flops({"model_type": "llama", **SHAPE}, config, B, S, checkpointing, causal=False)
    # the first block: torch leaves out the gradient of its keys, which nothing trained makes; with checkpoints, PEFT
    # asks for that of its input, which nobody needs
    slack = 0.02 if method == "lora" else 0
    assert ours.total == pytest.approx(counter.get_total_flops(), rel=slack, abs=0)
