"""Soft prompts: what they equal, what they count, and the context that they take."""

from __future__ import annotations

from typing import Any

import numpy as np

import minipeft as mp

from .. import accounting
from ..accounting.parameters import elements, trained_parameters
from ..autograd import ops as F
from ..autograd.tensor import no_grad
from ..backend import asarray, to_numpy, xp_of
from ..evaluation.intervals import mean
from ..peft.config import PeftError
from ..peft.methods import METHODS
from .inputs import BASE, SIZES, base, batch
from .register import Experiment, Number, Verdict, claim, graded, those

P = 10


def _difference(a: Any, b: Any) -> float:
    """The largest difference of two arrays, over the largest value."""
    a, b = to_numpy(a), to_numpy(b)
    return float(np.abs(a - b).max() / np.abs(a).max())


def _ids(rows: int = 4, length: int = 16) -> Any:
    return asarray(batch(rows, length), xp_of(base()[0].parameters()[0].data))


def _prompt_sides() -> float:
    """Logits with a soft prompt of P vectors against the base's on [p_1 ... p_P, E(x)]: their difference."""
    model, ids = base()[0], _ids()
    tuned = mp.get_peft_model(model, mp.PromptTuningConfig(num_virtual_tokens=P))
    with no_grad():
        vectors = tuned.prompts["default"].vectors()
        embedded = model.backbone.embed(ids)
        front = F.broadcast_to(vectors, (len(ids), *vectors.shape))
        plain = model(inputs_embeds=F.cat([front, embedded], axis=1)).data[:, P:]
        return _difference(tuned(ids).data, plain)


def _prefix_sides() -> tuple[float, int]:
    """Logits behind a prefix of the keys and values that the base has computed of P tokens, against the base's behind these
    tokens: their difference; and the number of layers that have a prefix."""
    model, ids = base()[0], _ids(1, 16 + P)
    tuned = mp.get_peft_model(model, mp.PrefixTuningConfig(num_virtual_tokens=P))
    with no_grad():
        cache = mp.KVCache()
        model(ids[:, :P], past_key_values=cache)
        pairs = [part[0].swapaxes(0, 1) for layer in cache for part in layer]  # keys and values of each layer, [P, H, D]
        stacked = xp_of(ids).stack(pairs, axis=1)
        tuned.prompts["default"].prompt_embeddings.data[...] = stacked.reshape(P, -1)
        return _difference(tuned(ids[:, P:]).data, model(ids).data[:, P:]), len(pairs) // 2


@claim("soft-1", lesson="06_soft_prompts.py", section="1 · Vectors in front of the input")
def prompt() -> Verdict:
    """Holds if the model with a soft prompt computes the base's logits on [p_1, ..., p_P, E(x)], to 1e-4; does not hold here
    otherwise."""
    difference = _prompt_sides()
    return Verdict(
        graded({"": difference < 1e-4}),
        f"The logits on both sides differ by at most {difference:.0e} of the largest, with P = {P}.",
        Number("largest difference of the two sides, over the largest logit", difference, "times"),
        base=BASE,
        task="4 x 16 tokens",
    )


@claim("soft-2", lesson="06_soft_prompts.py", section="2 · Keys and values in front of every layer's own")
def prefix() -> Verdict:
    """Holds if a prefix of the keys and values that the base computes of ten tokens, in each layer, gives the logits that the
    base has behind these tokens, to 1e-4; does not hold here otherwise."""
    difference, own = _prefix_sides()
    layers = base()[0].config.num_hidden_layers
    return Verdict(
        graded({"": difference < 1e-4 and own == layers}),
        f"{own} of {layers} layers have keys and values of their own. Behind those that the base computes of {P} real tokens "
        f"the logits differ by at most {difference:.0e} of the largest from those behind the tokens themselves.",
        Number("largest difference of the two sides, over the largest logit", difference, "times"),
        [Number("layers with a prefix", own), Number("layers", layers)], base=BASE, task="4 x 16 tokens",
    )  # fmt: skip


@claim("soft-3", lesson="06_soft_prompts.py", section="3 · The count")
def count() -> Verdict:
    """Holds if a built prompt of 100 vectors of 1024 trains P d numbers, 102K when rounded; does not hold here otherwise."""
    config = mp.TransformerConfig.llama(hidden_size=1024, num_hidden_layers=2, num_attention_heads=16, vocab_size=1000)
    model = mp.PeftModel(mp.Transformer(config, seed=None), mp.PromptTuningConfig(num_virtual_tokens=100), seed=None)
    built = model.get_nb_trainable_parameters()[0]
    return Verdict(
        graded({"": built == 100 * 1024 and round(built / 1e3) == 102}),
        f"The built prompt trains {built:,} numbers, P d is {100 * 1024:,}.",
        Number("numbers of the built prompt", built),
        [Number("P d", 100 * 1024)],
    )


@claim("soft-4", lesson="06_soft_prompts.py", section="3 · The count")
def fewest() -> Verdict:
    """Holds if a prompt of 20 and of 100 vectors trains fewer numbers than every method that is no soft prompt, with its usual
    options, on the base, at 7B and at 70B; holds if in some of these cases; does not hold here if in none."""
    models = {size: accounting.architecture(model) for size, model in {"the base": base()[0].config, **SIZES}.items()}
    cases, evidence, least = {}, [], {}
    for size, model in models.items():
        others = {}
        for name, method in METHODS.items():
            if name in ("prompt", "prefix", "p-tuning"):
                continue
            try:
                others[method.title] = elements(trained_parameters(model, method.config()))
            except ValueError:  # BitFit, of a model without biases
                continue
        least[size] = min(others, key=others.get)
        evidence.append(Number(f"{size}: fewest of another method, {least[size]}", others[least[size]]))
        for n in (20, 100):
            mine = elements(trained_parameters(model, mp.PromptTuningConfig(num_virtual_tokens=n)))
            cases[f"P = {n} on {size}"] = mine < others[least[size]]
            evidence.append(Number(f"{size}: prompt P={n}", mine))
    ratio = evidence[4].value / evidence[3].value
    return Verdict(
        graded(cases),
        f"Beside every method that is no soft prompt it is so for {those(cases)}, and not for {those(cases, False)}, "
        f"where {least['the base']} trains fewer: a prompt has P vectors, {least['the base']} two of them a layer.",
        Number(f"7B: prompt P=20 over {least['7B']}", ratio, "times"), evidence,
    )  # fmt: skip


@claim("soft-5", lesson="06_soft_prompts.py", section="2 · Keys and values in front of every layer's own")
def architecture() -> Verdict:
    """Holds if a soft prompt equals input embeddings and a prefix a cache, to 1e-4, and the modules of the base are the same
    with either; holds if one of these is so; does not hold here otherwise."""
    model = base()[0]

    def modules(m: Any) -> list[tuple[str, str]]:
        return [(path, type(module).__name__) for path, module in m.named_modules()]

    prompted = mp.get_peft_model(model, mp.PromptTuningConfig(num_virtual_tokens=P)).base_model
    prefixed = mp.get_peft_model(model, mp.PrefixTuningConfig(num_virtual_tokens=P)).base_model
    lora = mp.get_peft_model(model, METHODS["lora"].config()).base_model
    sides = _prompt_sides(), _prefix_sides()[0]
    same = [modules(m) == modules(model) for m in (prompted, prefixed)]
    changed = sum(a != b for a, b in zip(modules(lora), modules(model)))
    cases = {"a soft prompt": sides[0] < 1e-4 and same[0], "a prefix": sides[1] < 1e-4 and same[1]}
    return Verdict(
        graded(cases),
        f"The base alone computes the same from embeddings in front of the input (to {sides[0]:.0e}) and from a cache (to "
        f"{sides[1]:.0e}); its {len(modules(model))} modules are as they were with {('neither', 'one of the two', 'both')[sum(same)]}, "
        "where LoRA replaces some by its own.",
        Number("largest difference of the two sides, over the largest logit", max(sides), "times"),
        [
            Number("a soft prompt", sides[0], "times"),
            Number("a prefix", sides[1], "times"),
            Number("modules that LoRA changes", changed),
        ],
        base=BASE,
        task="4 x 16 tokens",
    )


@claim("soft-6", lesson="04_lora.py", section="9 · One base, many tasks")
def mixed() -> Verdict:
    """Holds if, in a batch whose rows use two prompts, a prefix, LoRA, adapters and nothing, each row has the logits (to 1e-4)
    and the generated tokens that it has alone; holds if one of the two is so; does not hold here otherwise."""
    model, ids = base()[0], _ids(6, 12)
    configs = {
        "prompt": mp.PromptTuningConfig(num_virtual_tokens=5),
        "prompt_2": mp.PromptTuningConfig(num_virtual_tokens=9),
        "prefix": mp.PrefixTuningConfig(num_virtual_tokens=7),
        "lora": mp.LoraConfig(target_modules="all-linear", init_lora_weights=False),
        "adapters": mp.BottleneckConfig(bottleneck_size=8),
    }
    tuned = mp.get_peft_model(model, configs["prompt"], "prompt")
    for i, name in enumerate([*configs][1:], 1):
        tuned.add_adapter(name, configs[name], seed=i)
    rows = [*configs, "__base__"]
    with no_grad():
        together = tuned(ids, adapter_names=rows).data
        alone = [tuned(ids[i : i + 1], adapter_names=[name]).data[0] for i, name in enumerate(rows)]
    differences = [_difference(a, together[i]) for i, a in enumerate(alone)]
    generated = tuned.generate(ids, max_new_tokens=8, adapter_names=rows)
    by_row = [tuned.generate(ids[i : i + 1], max_new_tokens=8, adapter_names=[name])[0] for i, name in enumerate(rows)]
    equal = [bool((generated[i, : len(row)] == row).all()) for i, row in enumerate(by_row)]
    return Verdict(
        graded({"forward": max(differences) < 1e-4, "generation": all(equal)}),
        f"In a batch of {len(rows)} rows, each with a method of its own, logits differ by at most {max(differences):.0e} of "
        f"the largest from those of the row alone, and {sum(equal)} of {len(rows)} generated texts are the same.",
        Number("largest difference of a row in the batch from the row alone", max(differences), "times"),
        [Number(f"the same, {name}", d, "times") for name, d in zip(rows, differences)],
        items=len(rows),
        base=BASE,
        task="6 x 12 tokens",
    )


# --------------------------------------------------------------------------------------------------- the context it takes

CONTEXT, SCORED, BLOCKS = 256, 32, 512
LENGTHS = (0, 20, 50, 100, 200)


def context(taken: int) -> dict[str, Any]:
    """The row of a number of positions taken: of each block of general text, the loss on its last tokens, with what is left of
    the context before them."""
    from ..experiments.shipped import general_blocks

    model, tokenizer = base()
    whole = [e.input_ids for e in general_blocks(tokenizer, CONTEXT, BLOCKS + 1) if len(e.input_ids) == CONTEXT]
    blocks = np.stack(whole[:BLOCKS])  # the last of a text may be shorter
    ids = asarray(blocks[:, taken:], xp_of(model.parameters()[0].data))
    losses = []
    with no_grad():
        for part in (ids[i : i + 16] for i in range(0, len(ids), 16)):
            scores = F.log_softmax(model(part)[:, -SCORED - 1 : -1]).data
            losses += to_numpy(
                -np.take_along_axis(to_numpy(scores), to_numpy(part)[:, -SCORED:, None], 2)[..., 0].mean(1)
            ).tolist()
    return {"losses": [round(loss, 5) for loss in losses]}


LOST = Experiment("lost_context", context, lambda: mp.grid(taken=list(LENGTHS)))


@claim("soft-7", lesson="06_soft_prompts.py", section="5 · The lost context", experiment=LOST)
def context_lost(rows: list[dict[str, Any]]) -> Verdict:
    """Holds if a prompt of P vectors refuses more than the context less P, and each number of lost positions clearly raises
    the base's loss, without a prompt, on the last 32 tokens of a context of 256 (95 %, over blocks of text); holds if only
    some do; does not hold here if none does. (Nothing is trained: the one seed is the base's own.)"""
    model = base()[0]
    limit = model.config.max_position_embeddings
    tuned = mp.get_peft_model(model, mp.PromptTuningConfig(num_virtual_tokens=P))

    def fits(length: int) -> bool:
        try:
            with no_grad():
                tuned(_ids(1, length))
            return True
        except (PeftError, ValueError):
            return False

    takes = fits(limit - P) and not fits(limit - P + 1)
    losses = {row["taken"]: np.array(row["losses"]) for row in rows}
    found = {taken: mean(own - losses[0]) for taken, own in losses.items() if taken}
    evidence = [
        Number(f"{taken} of {CONTEXT} positions lost: rise of the loss", e.value, "nats a token", e.low, e.high)
        for taken, e in found.items()
    ]
    cases = {f"{taken}": takes and e.low > 0 for taken, e in found.items()}
    return Verdict(
        graded(cases),
        f"With {P} vectors the model takes {limit - P if takes else limit} of its {limit} positions. What lost positions cost "
        f"was tried without a prompt, by cutting texts of {CONTEXT} tokens: the base's loss on the last {SCORED} rises clearly "
        f"where the first {those(cases)} are cut, and not clearly for {those(cases, False)}: by {found[max(found)].value:.3f} nats for "
        f"{max(found)}, by {found[min(found)].value:.3f} for {min(found)}.",
        evidence[-1],
        evidence,
        seeds=1,
        items=len(losses[0]),
        base=BASE,
        task="general text, without what the prompt itself would teach",
    )
