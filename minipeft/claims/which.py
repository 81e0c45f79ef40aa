"""Which method, when: what counting alone decides."""

from __future__ import annotations

import minipeft as mp

from ..accounting.cards import CARDS
from ..accounting.loop import Loop
from ..accounting.pytorch_loop import pytorch_ledger
from .inputs import SIZES
from .register import Number, Verdict, claim, graded, those

CARD_SIZES = sorted({CARDS[name][0] for name in ("t4", "a10", "l40s", "a100")})


@claim("which-5", lesson="16_which_method.py", section="3 · The table")
def one_gpu() -> Verdict:
    """Holds if, at 7B and at 70B, there is a card of 16, 24, 48 or 80 GB on which QLoRA fits by the ledger, and neither LoRA in 16 bits nor
    full fine-tuning does; holds if at one of the sizes; does not hold here if at none."""
    lora = mp.LoraConfig(r=64, target_modules="all-linear")
    methods = {"full": (None, Loop()), "LoRA": (lora, Loop()), "QLoRA": (lora, Loop(quantization="nf4"))}
    needed = {
        (size, method): pytorch_ledger(name, config, 1, 512, loop).total
        for size, name in SIZES.items() for method, (config, loop) in methods.items()
    }  # fmt: skip
    alone = {
        size: [gb for gb in CARD_SIZES if needed[size, "QLoRA"] <= gb * 1e9 < min(needed[size, "full"], needed[size, "LoRA"])] for size in SIZES
    }
    cases = {size: bool(cards) for size, cards in alone.items()}
    told = [f"at {size} {' or '.join(map(str, cards))} GB" for size, cards in alone.items() if cards]
    sizes = "; ".join(f"{size}: " + ", ".join(f"{m} {needed[size, m] / 1e9:.0f}" for m in methods) for size in SIZES)
    return Verdict(
        graded(cases), f"On one card only QLoRA fits {', '.join(told) or 'nowhere'} (so for {those(cases)}); GB needed: {sizes}.",
        Number("70B: LoRA in 16 bits over QLoRA, memory", needed["70B", "LoRA"] / needed["70B", "QLoRA"], "times"),
        [Number(f"{size}, {method}", n / 1e9, "GB") for (size, method), n in needed.items()],
        task="1 x 512 tokens, r = 64 on all linear layers, a PyTorch loop's usual settings; quality is not judged",
    )  # fmt: skip
