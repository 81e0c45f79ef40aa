"""The ledger of a PyTorch loop against real steps of transformers and PEFT on a CPU, by live storages; and its FLOPs."""

from __future__ import annotations

import gc
import weakref

import pytest

from minipeft import LoraConfig
from minipeft.accounting import Loop, pytorch_ledger, step_flops
from minipeft.accounting.loop import CONTEXT, WORKSPACE

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
