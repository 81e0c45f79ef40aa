"""Which method, when: what counting decides, and what is decided by experiments of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import minipeft as mp

from ..accounting.cards import CARDS
from ..accounting.flops import step_flops
from ..accounting.loop import Loop
from ..accounting.parameters import count_parameters
from ..accounting.pytorch_loop import pytorch_ledger
from . import components, following
from .inputs import SIZES
from .register import Number, Verdict, claim, graded, those

Rows = Sequence[Mapping[str, Any]]
CARD_SIZES = sorted({CARDS[name][0] for name in ("t4", "a10", "l40s", "a100")})


@claim("which-4", lesson="16_which_method.py", section="3 · The table")
def limited() -> Verdict:
    """Holds if, at 7B, a prompt of 20 vectors needs less than LoRA r = 8 on queries and values of each resource: bytes a task
    on disk, memory of a step (by at least 10 %), FLOPs of a step (by at least 10 %); holds if of some; does not hold here if
    of none."""
    name, prompt = SIZES["7B"], mp.PromptTuningConfig(num_virtual_tokens=20)
    lora = mp.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    needs = {
        title: {
            "bytes a task": 4 * count_parameters(name, config).stored, "memory": pytorch_ledger(name, config, 1, 512).total,
            "computation": step_flops(name, config, 1, 512).total,
        }
        for title, config in (("prompt", prompt), ("LoRA", lora))
    }  # fmt: skip
    ratios = {what: needs["prompt"][what] / n for what, n in needs["LoRA"].items()}
    cases = {
        "bytes a task": ratios["bytes a task"] < 1,
        "memory": ratios["memory"] < 0.9,
        "computation": ratios["computation"] < 0.9,
    }
    return Verdict(
        graded(cases),
        f"What is limited is {those(cases)}: at 7B, a prompt of 20 vectors takes {ratios['bytes a task']:.3f} of the bytes a "
        f"task of LoRA (r = 8, q and v), but {ratios['memory']:.2f} of its memory and {ratios['computation']:.2f} of its computation, as the whole model runs "
        "forward and backward for either.",
        Number("bytes a task: prompt over LoRA", ratios["bytes a task"], "times"),
        [
            Number(f"{title}: {what}", n, "FLOPs" if what == "computation" else "bytes")
            for title, found in needs.items()
            for what, n in found.items()
        ],
        base="LLaMA-7B, as shapes",
        task="512 tokens and 20 virtual ones, a PyTorch loop's usual settings (AdamW's states in 16 bits); quality is not judged",
    )


@claim("which-5", lesson="16_which_method.py", section="3 · The table")
def one_gpu() -> Verdict:
    """Holds if, at 7B and at 70B, there is a card of 16, 24, 48 or 80 GB on which QLoRA (r = 64, all linear layers) fits by
    the ledger, and neither such a LoRA in 16 bits nor full fine-tuning does; holds if at one of the sizes; does not hold here if at none."""
    lora = mp.LoraConfig(r=64, target_modules="all-linear")
    methods = {"full": (None, Loop()), "LoRA": (lora, Loop()), "QLoRA": (lora, Loop(quantization="nf4"))}
    needed = {
        (size, method): pytorch_ledger(name, config, 1, 512, loop).total
        for size, name in SIZES.items()
        for method, (config, loop) in methods.items()
    }
    alone = {
        size: [gb for gb in CARD_SIZES if needed[size, "QLoRA"] <= gb * 1e9 < min(needed[size, "full"], needed[size, "LoRA"])]
        for size in SIZES
    }
    cases = {size: bool(cards) for size, cards in alone.items()}
    told = [f"of {' or '.join(map(str, cards))} GB at {size}" for size, cards in alone.items() if cards]
    sizes = "; ".join(f"{size}: " + ", ".join(f"{m} {needed[size, m] / 1e9:.0f}" for m in methods) for size in SIZES)
    return Verdict(
        graded(cases),
        f"Of full fine-tuning, LoRA and QLoRA only the last fits on one card {', '.join(told) or 'nowhere'} (so for {those(cases)}); GB needed with r = 64 on all linear layers, 512 tokens: {sizes}.",
        Number("70B: LoRA in 16 bits over QLoRA, memory", needed["70B", "LoRA"] / needed["70B", "QLoRA"], "times"),
        [Number(f"{size}, {method}", n / 1e9, "GB") for (size, method), n in needed.items()],
        task="1 x 512 tokens, r = 64 on all linear layers, a PyTorch loop's usual settings (AdamW's states in 16 bits); quality is not judged",
    )


@claim("which-3", lesson="16_which_method.py", section="1 · Eight ways, and what each needs", experiment=components.EXPERIMENT)
def for_components(rows: Rows) -> Verdict:
    """Holds if adapters of two tasks, trained apart on one base, are components in three senses: swapped, the first computes
    what it did before the second was trained, bit for bit; removed, they leave the base, bit for bit; together in use, each
    task is not worse (interval above -0.02) than with its adapter alone. Holds if in some of these; does not hold here if in none. LoRA stands beside them; how
    long a swap takes is adapter-5's."""
    return components.verdict(rows)


@claim(
    "which-6",
    lesson="16_which_method.py",
    section="5 · And the other two jobs",
    experiment=following.experiment("base", "few-shot", "bare", "tuned"),
)
def for_instructions(rows: Rows) -> Verdict:
    """Holds if, asked about new inputs, in new words, and for new tasks, the base tuned on instructions clearly gives more
    right answers than each other way to be answered: the base, the base with three answered questions in its prompt, and the
    base tuned on the same inputs and answers without instructions. Holds if in some of these nine comparisons; does not hold
    here if in none."""
    return following.verdict(rows, *(("answers", other) for other in ("base", "few-shot", "bare")))
