"""Parameter-efficient fine-tuning in general: what it stores, and what it holds in memory."""

from __future__ import annotations

import math

import minipeft as mp

from ..accounting.flops import step_flops
from ..accounting.memory import memory_ledger
from ..accounting.parameters import count_parameters
from ..experiments import costs
from ..peft.lora import LoraConfig
from ..peft.methods import METHODS
from .inputs import BASE, SIZES, base, bytes_on_disk, examples
from .register import Number, Verdict, claim, graded, listed, those


@claim("peft-1", lesson="04_lora.py", section="9 · One base, many tasks")
def storage() -> Verdict:
    """Holds if, for 1, 10 and 100 tasks, one base and LoRA's files take fewer bytes than a model for each task, here on disk
    and at 7B and 70B; holds if only from some number of tasks on; does not hold here if for none of these numbers."""
    model, _ = base()
    config = METHODS["lora"].config()
    sizes = {"the base": (
        bytes_on_disk(lambda path: mp.save_pretrained(model, path)),
        bytes_on_disk(lambda path: mp.get_peft_model(model, config).save_pretrained(path)),
    )}  # fmt: skip
    for size, name in SIZES.items():
        sizes[size] = 2 * count_parameters(name).stored, 2 * count_parameters(name, config).stored
    ratios = {(size, n): n * whole / (whole + n * small) for size, (whole, small) in sizes.items() for n in (1, 10, 100)}
    cases = {f"{n} task{'s' * (n > 1)}": all(ratios[size, n] > 1 for size in sizes) for n in (1, 10, 100)}
    least = max(math.floor(whole / (whole - small)) + 1 if whole > small else math.inf for whole, small in sizes.values())
    return Verdict(
        graded(cases),
        f"There are {least:g} tasks or more: the base itself is stored, too, so that one task takes "
        f"{1 / ratios['the base', 1]:.2f} times a tuned model's bytes, and 100 tasks take {ratios['the base', 100]:.0f} "
        f"times less (at 7B {ratios['7B', 100]:.0f} times).",
        Number("100 models over one base and 100 files of LoRA r=8, on disk", ratios["the base", 100], "times"),
        [
            *(
                Number(f"{size}, number of tasks {n}: models over base and files", ratio, "times")
                for (size, n), ratio in ratios.items()
            ),
            *(Number(f"{size}: a task's file", small, "bytes") for size, (_, small) in sizes.items()),
        ],
        base=BASE,
    )


@claim("peft-2", lesson="04_lora.py", section="6 · Where the saved memory comes from")
def memory() -> Verdict:
    """Holds if LoRA's step takes less memory than full fine-tuning's, as measured on the base, and the gradients are more than
    half of what it saves at 7B and 70B, by the ledger; holds if only with what is made of the gradients, the optimizer's
    states, counted among them; does not hold here otherwise."""
    model, tokenizer = base()
    peaks = {name: costs.memory(METHODS[name], model, list(examples()), 8, tokenizer.pad_token_id) for name in ("full", "lora")}
    evidence = [Number(f"a step on the base, {name}: measured peak", peak, "bytes") for name, (_, peak) in peaks.items()]
    evidence += [Number(f"the same by the ledger, {name}", predicted, "bytes") for name, (predicted, _) in peaks.items()]
    methods = {"all linear layers": METHODS["lora"].config(), "q, v": LoraConfig(r=8, target_modules=["q_proj", "v_proj"])}
    share: dict[tuple[str, str, str], float] = {}
    for size, name in SIZES.items():
        full, *held = (
            memory_ledger(name, config, 1, 512, precision="bfloat16", checkpointing=False).held
            for config in (None, *methods.values())
        )
        for where, lines in zip(methods, held):
            saved = {line: full[line] - lines[line] for line in ("gradients", "optimizer states", "activations")}
            for line, n in saved.items():
                share[size, where, line] = n / sum(saved.values())
                evidence.append(Number(f"{size}, LoRA on {where}: saved of {line}", n, "bytes"))
            evidence.append(
                Number(
                    f"{size}, LoRA on {where}: saved of all activations", 100 * saved["activations"] / full["activations"], "%"
                )
            )
    work = (
        step_flops(SIZES["7B"], methods["all linear layers"], 1, 512, False).total
        / step_flops(SIZES["7B"], None, 1, 512, False).total
    )
    evidence.append(Number("7B, LoRA on all linear layers: FLOPs of its step over full fine-tuning's", work, "times"))
    less = peaks["lora"][1] < peaks["full"][1]
    alone = min(n for (_, _, line), n in share.items() if line == "gradients")
    states = min(n for (_, _, line), n in share.items() if line == "optimizer states")
    cases = {"the gradients alone": less and alone > 0.5, "gradients and states together": less and alone + states > 0.5}
    activations = [f"{100 * share['7B', where, 'activations']:.1f} % ({where})" for where in methods]
    alone_too = "" if all(cases.values()) else f", not {those(cases, False)}"
    return Verdict(
        graded(cases),
        f"More than half of what is saved are {those(cases)}{alone_too}: at 7B the gradients are {share['7B', 'q, v', 'gradients']:.0%} "
        f"of it, the optimizer's states {share['7B', 'q, v', 'optimizer states']:.0%} and the inputs of frozen layers "
        f"{listed(activations)}; a step on the base, all linear layers, takes {peaks['lora'][1] / peaks['full'][1]:.2f} times the memory, and "
        f"{work:.2f} times the FLOPs at 7B.",
        Number("gradients, of the memory that LoRA saves at 7B", 100 * share["7B", "q, v", "gradients"], "%"),
        evidence,
        base=BASE,
        task="on the base: 8 sentences, float32; 7B and 70B: 1 x 512 tokens, bfloat16, AdamW, by the ledger",
    )
