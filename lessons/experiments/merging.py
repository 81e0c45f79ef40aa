"""Adapters of two tasks merged with each other, and an adapter trained beside four-bit weights merged into either base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft.backend import asarray, to_numpy
from minipeft.experiments import shipped
from minipeft.peft.combine import Combination
from minipeft.peft.loftq import get_loftq_model
from minipeft.quant import dequantize_model, quantize_4bit, quantize_model
from minipeft.text.examples import Example, encode_examples
from minipeft.train import evaluate

from . import items

TASKS = ("rewrite", "define")
EVERYTHING = (*TASKS, "general")
CONFIG = mp.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
WEIGHTS = (0.375, 0.5, 0.75, 1.0, 1.5, 2.0)  # of both adapters, one of which the validation records choose
SCALES = (0.25, 0.5, 0.75, 1.0)  # of an adapter alone, and of both in a sum
NEGATIVE = (0.1, 0.25, 0.5)  # how much of an adapter is subtracted
PARTS = (1.0, 0.5, 0.25)  # of an update that is merged into four-bit weights
DENSITIES = (0.5, 0.2, 0.1)
MASKS = 1000  # this plus a run's seed draws what DARE drops
BLOCK = 32  # tokens of a block of general text
RULES = {  # name -> (which adapter "define", options of add_weighted_adapter)
    "cat": ("define", {"combination_type": "cat"}),
    "svd": ("define", {"combination_type": "svd"}),
    "linear": ("define", {"combination_type": "linear"}),
    "linear, same start": ("same", {"combination_type": "linear"}),
    "ties": ("define", {"combination_type": "ties", "density": 0.2}),
    "ties_svd": ("define", {"combination_type": "ties_svd", "density": 0.2}),
    "ties, whole matrices": ("define", {"combination_type": "ties_svd", "density": 0.2, "svd_rank": 128}),
    "dare_linear": ("define", {"combination_type": "dare_linear", "density": 0.5}),
    "dare, whole matrices": ("define", {"combination_type": "dare_linear_svd", "density": 0.5, "svd_rank": 128}),
    "dare_ties": ("define", {"combination_type": "dare_ties", "density": 0.5}),
    "magnitude_prune": ("define", {"combination_type": "magnitude_prune", "density": 0.5}),
}  # fmt: skip
Deltas = Mapping[str, np.ndarray]  # path of a layer -> what is added to its weight [out, in]


@dataclass(frozen=True)
class Merge:
    """What is trained, and how much it is tested on; the seed chooses training and validation records, where A starts,
    and what DARE drops.

    what   "tasks": the adapters of two tasks, merged with each other; "bases": one adapter, merged into either base
    test   records of each task, and blocks of general text; the same under all seeds
    """

    what: str = "tasks"
    steps: int = 40
    batch_size: int = 8
    validation: int = 64  # records of each task
    test: int = items.TEST
    seed: int = 0


RUNS = [Merge(what, seed=seed) for seed in range(5) for what in ("tasks", "bases")]


def records(name: str, split: str, n: int, seed: int) -> list[Example]:
    """`n` short records of a task, chosen by the seed."""
    all_of_it, tokenizer = shipped.short(name, split), shipped.base()[1]
    chosen = np.random.default_rng(seed).permutation(len(all_of_it))[:n]
    return encode_examples([all_of_it[i] for i in chosen], tokenizer, 2 * shipped.LENGTH).examples


def train(model: Any, s: Merge, *names: str) -> Any:
    """The model, trained on one task, or on several at once: in each step as many records of each, on average."""
    examples = [example for name in names for example in records(name, "train", s.steps * s.batch_size, s.seed)]
    arguments = mp.TrainingArguments(
        learning_rate=3e-3, max_steps=s.steps, per_device_train_batch_size=s.batch_size * len(names),
        lr_scheduler_type="cosine", warmup_ratio=0.05, weight_decay=0.0, seed=s.seed, progress=False,
    )  # fmt: skip
    mp.Trainer(model, examples, args=arguments, pad_token_id=shipped.base()[1].pad_token_id).train()
    return model


def adapters(s: Merge) -> Any:
    """A model with an adapter for each task, and with "same": again "define", begun at the A of "rewrite"."""
    model = mp.get_peft_model(shipped.base()[0], CONFIG, "rewrite", seed=s.seed)
    for name, seed in (("define", 100 + s.seed), ("same", s.seed)):
        model.add_adapter(name, CONFIG, seed=seed)
    for name, task in (("rewrite", "rewrite"), ("define", "define"), ("same", "define")):
        model.set_adapter(name)
        train(model, s, task)
    return model


def tested_on(task: str, n: int) -> list[Example]:
    """The test records of a task, or of "general" text of the base's own domain."""
    return shipped.general_blocks(shipped.base()[1], BLOCK, n, "test") if task == "general" else items.test(task, n)


def losses(model: Any, s: Merge, tasks: Iterable[str] = TASKS) -> dict[str, list[float]]:
    """The nats of each test record of tasks."""
    return {name: items.nats(model, tested_on(name, s.test), 2 if name == "general" else 1) for name in tasks}


def validated(model: Any, s: Merge) -> float:
    """The sum of the tasks' losses on validation records, in nats per token."""
    lists = (records(name, "validation", s.validation, s.seed) for name in TASKS)
    pad = shipped.base()[1].pad_token_id
    return sum(evaluate(model, sorted(examples, key=lambda e: len(e.input_ids)), 32, pad) for examples in lists)


def merged(model: Any, names: list[str], weights: list[float], **how: Any) -> Any:
    """A plain model: the base with the adapters that `add_weighted_adapter` combines."""
    model.add_weighted_adapter(names, weights, "merged", **how)
    plain = model.merge_and_unload(["merged"])
    model.delete_adapter("merged")
    return plain


def thinned(model: Any, name: str, rule: str, density: float, seed: int) -> Deltas:
    """What an adapter adds, of which a rule of `Combination` keeps a density, on the factors or, for _svd, on whole matrices.

    Not by `add_weighted_adapter`: as in PEFT, of one adapter alone it takes nothing away.
    """
    how, made = Combination(rule, 128 if rule.endswith("svd") else None, density, seed=MASKS + seed), {}
    for path, part in model.parts(name):
        A, B = (to_numpy(factor.data) for factor in part.factors())
        A, B = how.factors(path, (A,), (B,), (part.scaling,), (1.0,))
        made[path] = B @ A
    return made


def deltas(model: Any, name: str) -> Deltas:
    """What an adapter adds to each weight."""
    return {path: to_numpy(part.delta_weight()) for path, part in model.parts(name)}


def plus(base: Any, update: Deltas, t: float = 1.0) -> Any:
    """A new model: base + t · update."""
    made = base.copy()
    for path, delta in update.items():
        weight = made.get_submodule(path).weight
        weight.data = weight.data + asarray(np.float32(t) * delta)
    return made


def as_much(Q: Any, update: Deltas, seed: int) -> dict[str, Deltas]:
    """An equal part of an update U, in three ways: "passed" is those elements that have another code in NF4(Q + U), "scaled" all of
    them times one number, "random" as many as make up for it, at random. Equal is <part, U> / <U, U>. And "jumped", those that
    have another code by as much as NF4(Q + U) moves them."""
    rounded = four_bits(plus(Q, update))
    was, is_ = ({path: to_numpy(model.get_submodule(path).weight.data) for path in update} for model in (Q, rounded))
    changed = {path: codes(was[path] + u) != codes(was[path]) for path, u in update.items()}
    passed = {path: u * changed[path] for path, u in update.items()}
    share = sum(float((passed[path] * u).sum()) for path, u in update.items()) / sum(float((u**2).sum()) for u in update.values())
    rng = np.random.default_rng(seed)
    return {
        "passed": passed,
        "jumped": {path: (is_[path] - was[path]) * changed[path] for path in update},
        "scaled": {path: np.float32(share) * u for path, u in update.items()},
        "random": {path: u * (rng.random(u.shape) < share) for path, u in update.items()},
    }


def codes(weight: np.ndarray) -> np.ndarray:
    """The number of each weight's point in NF4's code book."""
    packed, _ = quantize_4bit(weight)
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(weight.shape)


def at_random(update: Deltas, seed: int) -> Deltas:
    """Random matrices of the rank and the norms of an update."""
    draw = np.random.default_rng(seed).standard_normal
    made = {path: draw((d.shape[0], CONFIG.r)) @ draw((CONFIG.r, d.shape[1])) for path, d in update.items()}
    return {path: (d * np.linalg.norm(update[path]) / np.linalg.norm(d)).astype(np.float32) for path, d in made.items()}


def four_bits(model: Any) -> Any:
    """A dense model, rounded to NF4 and back."""
    return dequantize_model(quantize_model(model))


def with_each_other(s: Merge) -> dict[str, Any]:
    """Nats of the two adapters, merged by every rule; the weight of both is chosen on validation records."""
    base, model = shipped.base()[0], adapters(s)
    joint = train(mp.get_peft_model(base, CONFIG, seed=s.seed), s, *TASKS)
    found: dict[str, Any] = {"base": losses(base, s, EVERYTHING), "joint": losses(joint.merge_and_unload(), s)}
    sums = {t: merged(model, list(TASKS), [t, t], combination_type="cat") for t in SCALES}
    found |= {f"sum {t}": losses(m, s) for t, m in sums.items()}
    for name in TASKS:  # on the other task only where the lesson asks it
        found |= {f"{name} {t}": losses(plus(base, deltas(model, name), t), s, TASKS if t in (0.25, 1) else (name,)) for t in SCALES}
    rewriting = deltas(model, "rewrite")
    for t in NEGATIVE:
        found[f"minus rewrite {t}"] = losses(plus(base, rewriting, -t), s, EVERYTHING)
        found[f"random {t}"] = losses(plus(base, at_random(rewriting, s.seed), t), s, EVERYTHING)
    for density in DENSITIES:
        for rule in ("dare_linear", "dare_linear_svd", "magnitude_prune_svd"):
            found[f"{rule} {density}"] = losses(plus(base, thinned(model, "rewrite", rule, density, s.seed)), s, ["rewrite"])
    chosen = {}
    for name, (other, how) in RULES.items():
        tried = {w: merged(model, ["rewrite", other], [w, w], **how, seed=MASKS + s.seed) for w in WEIGHTS}
        scores = {w: validated(m, s) for w, m in tried.items()}
        chosen[name] = min(scores, key=scores.get)
        found[name] = losses(tried[chosen[name]], s)
    return {"losses": found, "weights": chosen}


def into_a_base(s: Merge) -> dict[str, Any]:
    """Nats of adapters of "rewrite" that were trained beside W, beside NF4(W) and from LoftQ's start, on each base."""
    W = shipped.base()[0]
    Q = four_bits(W)
    beside = {
        "LoRA": mp.get_peft_model(W, CONFIG, seed=s.seed),
        "QLoRA": mp.get_peft_model(quantize_model(W), CONFIG, seed=s.seed),
        "LoftQ": get_loftq_model(W, CONFIG, seed=s.seed),
    }
    found = {"W": W, "Q": Q}
    for name, model in beside.items():
        train(model, s, "rewrite")
        update, own = deltas(model, "default"), dequantize_model(model.unload())
        if name == "QLoRA":
            found |= {f"{part} on Q": plus(own, some) for part, some in as_much(own, update, s.seed).items()}
        for t in PARTS if name == "QLoRA" else (1.0,):
            part = f"{name} {t}"
            for place, onto in {"W": W, "Q": Q if name == "LoRA" else own}.items():  # of LoftQ, Q is its own
                sum_ = plus(onto, update, t)
                found |= {f"{part} on {place}": sum_, f"NF4({part} on {place})": four_bits(sum_)}
    return {"losses": {name: losses(model, s, ["rewrite"]) for name, model in found.items()}}


def run(s: Merge) -> dict[str, Any]:
    """The row of a run: the nats of each test record, by the name of the model and the task."""
    return shipped.rounded(with_each_other(s) if s.what == "tasks" else into_a_base(s))


# ----------------------------------------------------------------------------------------------------------- pictures

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def sum_picture(curves, joint):
    """Test loss over 0 and `SCALES` {(task, "alone" or "in a sum"): losses}, beside that of joint training {task: loss}."""
    figure, axis = plt.subplots(figsize=(6, 4.4), layout="constrained")
    colors = dict(zip(TASKS, (BLUE, ORANGE)))
    for (task, kind), values in curves.items():
        width = 1 if kind == "alone" else 3
        axis.plot([0, *SCALES], values, "o-", color=colors[task], lw=width, ms=4, label=f"{task}, {kind}")
    for task, level in joint.items():
        axis.axhline(level, color=colors[task], lw=1, ls=":")
        axis.text(0.2, level, "joint training", color=colors[task], va="bottom", fontsize=8)
    axis.set(xlabel="scale of the adapters", ylabel="test loss, nats a token", title="Added to each other: the gap is interference")
    axis.legend(fontsize=8)
    return figure


def density_picture(curves, base):
    """Test loss over a density of 1 and `DENSITIES` {rule: losses}, beside the base's."""
    figure, axis = plt.subplots(figsize=(6, 4.4), layout="constrained")
    names = {"magnitude_prune_svd": "largest kept", "dare_linear_svd": "DARE, whole matrices", "dare_linear": "DARE, factors"}
    for (rule, name), color in zip(names.items(), (GREEN, BLUE, ORANGE)):
        axis.plot([1, *DENSITIES], curves[rule], "o-", color=color, label=name)
    axis.axhline(base, color=GREY, lw=1, ls=":")
    axis.text(1, base, "base", color=GREY, va="bottom", ha="right", fontsize=9)
    axis.set_xscale("log")
    axis.set_xticks([1, *DENSITIES], [f"{d:g}" for d in (1, *DENSITIES)])
    axis.minorticks_off()
    axis.set(xlabel="density: the share that is kept", ylabel="test loss of rewrite", title="Dropped and rescaled")
    axis.legend(fontsize=8)
    return figure


def bits_picture(parts, share):
    """The share of an update that arrives in four bits, over its size {merged into Q: shares}."""
    figure, axis = plt.subplots(figsize=(6, 4.4), layout="constrained")
    for on_codes, name, color in ((False, "merged into W", GREEN), (True, "merged into Q, which stands on its codes", ORANGE)):
        axis.plot(parts, share[on_codes], "o-", color=color, label=name)
    axis.axhline(1, color=GREY, lw=1, ls=":")
    axis.set_xscale("log", base=2)
    axis.set_xticks(parts, [f"{t:g}" for t in parts])
    axis.set(xlabel="size of the update, U = 1", ylabel="share of it that arrives", title="Merged, and rounded to four bits", ylim=(-0.05, 1.3))
    axis.legend(fontsize=8, loc="center left")
    return figure
