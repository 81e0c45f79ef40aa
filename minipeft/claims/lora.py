"""LoRA: its equation, the layer as it is printed, its counts, and what serving it costs."""

from __future__ import annotations

import json
import math
import statistics
from functools import cache
from typing import Any

import numpy as np

import minipeft as mp

from ..accounting.architectures import architecture
from ..accounting.parameters import count_parameters
from ..accounting.published import read_published, recompute
from ..backend import asarray, to_numpy, xp_of
from .decoding import DECODING, random_model, repeats, slowdown
from .inputs import SIZES
from .register import UNTESTABLE, Experiment, Number, Verdict, claim, graded, listed, measured, those
from .timing import in_turns, machine, steady, where

LAYER = """\
class LoRALayer(nn.Module):
    def __init__(self, in_features, out_features, rank):
        self.W = nn.Linear(in_features, out_features)  # frozen
        self.A = nn.Parameter(randn(rank, in_features))
        self.B = nn.Parameter(zeros(out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x):
        return self.W(x) + (x @ self.A.T @ self.B.T) * self.scaling
"""  # as textbooks print it


@claim("lora-1", lesson="04_lora.py", section="1 · One equation")
def equation() -> Verdict:
    """Holds if the library's merged weight is W + BA and its forward pass gives W'x, to float32's rounding, for each alpha;
    holds if so only with alpha = r, where its scaling alpha / r is 1; does not hold here otherwise."""
    d, k, r = 96, 64, 8
    rng, errors, ranks = np.random.default_rng(0), {}, set()
    layer = mp.nn.Sequential(mp.nn.Linear(k, d, bias=False)).to("numpy")
    x = rng.standard_normal((5, k)).astype(np.float32)
    for alpha in (r, 2 * r):
        model = mp.get_peft_model(layer, mp.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False))
        adapter = model.layers["0"].adapters["default"]
        BA = adapter.lora_B.data.astype(np.float64) @ adapter.lora_A.data
        W = layer[0].weight.data + BA
        merged, y = model.merge_and_unload()[0].weight.data, model(mp.Tensor(x)).data
        errors[alpha] = max(np.abs(merged - W).max() / np.abs(BA).max(), np.abs(y - x @ W.T).max() / np.abs(y).max())
        ranks.add(int(np.linalg.matrix_rank(merged - layer[0].weight.data, tol=1e-4)))
    cases = {f"alpha = {'r' if alpha == r else f'{alpha / r:g} r'}": bool(error < 1e-5) for alpha, error in errors.items()}
    return Verdict(
        graded(cases),
        f"It is so for {those(cases)}; the library adds (alpha / r) BA, and for {those(cases, False)} the two sides differ by "
        f"{max(errors.values()):.0%} of BA; the change has rank {max(ranks)} of {min(d, k)}.",
        Number("largest difference of the two sides, alpha = r, over the largest of BA", errors[r], "times"),
        [Number(f"the same, alpha = {alpha / r:g} r", e, "times") for alpha, e in errors.items()]
        + [Number("rank of W' - W", max(ranks))],
        task=f"a layer {d} x {k}, r = {r}",
    )


@claim("lora-4", lesson="04_lora.py", section="4 · The layer as textbooks print it")
def printed_layer() -> Verdict:
    """Holds if the printed layer runs as it stands, trains A and B alone, and has gradients within a factor of two of the
    library's layer; holds if some of the three are so; does not hold here if none is. (Given an alpha, where it lacks one.)"""
    d, k, r, alpha = 256, 256, 8, 16
    start = {
        "nn": mp.nn,
        "randn": lambda *shape: np.random.standard_normal(shape).astype(np.float32),
        "zeros": lambda *s: np.zeros(s, np.float32),
    }
    names: dict[str, Any] = dict(start)
    exec(LAYER, names)
    try:
        names["LoRALayer"](k, d, r)
        missing = ""
    except NameError as error:
        missing = str(error)
    trained, ratios, deviations = 0, [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        names = start | {"alpha": alpha, "randn": lambda *shape, rng=rng: rng.standard_normal(shape).astype(np.float32)}
        exec(LAYER, names)
        layer = names["LoRALayer"](k, d, r).to("numpy")
        base = mp.nn.Sequential(mp.nn.Linear(k, d)).to("numpy")
        base[0].weight.data, base[0].bias.data = layer.W.weight.data, layer.W.bias.data
        library = mp.get_peft_model(base, mp.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"]), seed=seed)
        adapter = library.layers["0"].adapters["default"]
        x = rng.standard_normal((32, k)).astype(np.float32)
        target = rng.standard_normal((32, d)).astype(np.float32)
        norms = []
        for model, B in ((layer, layer.B), (library, adapter.lora_B)):
            ((model(mp.Tensor(x)) - target) ** 2).mean().backward()
            norms.append(float(np.linalg.norm(B.grad)))
        ratios.append(norms[0] / norms[1])
        trained = sum(p.size for p in layer.parameters() if p.requires_grad)
        deviations.append((float(layer.A.data.std()), float(adapter.lora_A.data.std())))
    ratio = measured("gradient of B, printed over the library's, the first step", ratios, "times")
    cases = {
        "it runs": not missing,
        "A and B alone train": trained == r * (d + k),
        "its gradients are the library's": 0.5 < ratio.value < 2,
    }
    of_A = [statistics.mean(column) for column in zip(*deviations)]
    return Verdict(
        graded(cases),
        f"As printed it {'stops: ' + missing if missing else 'runs'}; given an alpha, it trains {trained:,} numbers in place "
        f"of {r * (d + k):,}, as building it freezes neither W nor its bias, and A of deviation {of_A[0]:.2f} (the library's: "
        f"{of_A[1]:.3f}) makes the gradient of B {ratio.value:.0f} times as large.",
        ratio,
        [
            Number("numbers that the printed layer trains", trained), Number("of A and B", r * (d + k)),
            Number("deviation of A, printed", of_A[0]), Number("deviation of A, the library's", of_A[1]), ratio,
        ],
        seeds=5, task=f"a layer {d} x {k}, r = {r}, alpha = {alpha}",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- counts


@cache
def published() -> list[dict[str, str]]:
    """The audited rows of LoRA's trainable parameters that have options."""
    return [
        row for row in read_published()
        if '"peft_type": "LORA"' in row["options"] and row["quantity"] == "trainable parameters"
        and "use_dora" not in row["options"] and "modules_to_save" not in row["options"]
    ]  # fmt: skip


@claim("lora-5", lesson="12_counting.py", section="1 · Parameters")
def count() -> Verdict:
    """Holds if r (d + k), summed over the adapted layers, is what the built model trains, for ranks 1 to 64 on 7B's layers,
    and most published counts follow from it; holds if only one of the two is so; does not hold here otherwise."""
    arch = architecture(SIZES["7B"])
    model, layers = (
        mp.Transformer(arch.config, seed=None),
        [n for n in arch if arch.kinds[n] == "linear" and n != "lm_head.weight"],
    )
    evidence, equal = [], True
    for r in (1, 8, 64):
        formula = sum(r * sum(arch[name]) for name in layers)
        built = mp.PeftModel(model, mp.LoraConfig(r=r, target_modules="all-linear"), seed=None).get_nb_trainable_parameters()[0]
        equal &= formula == built
        evidence += [Number(f"r = {r}: sum of r (d + k)", formula), Number(f"r = {r}: built", built)]
    whole = sum(math.prod(arch[name]) for name in layers)
    reduction = whole / evidence[2].value
    right = [abs(recompute(row) - float(row["published_value"])) <= float(row["tolerance"]) for row in published()]
    evidence += [Number("published counts looked at", len(right)), Number("of them, as counted", sum(right))]
    cases = {"the built model": equal, "what was published": 2 * sum(right) > len(right)}
    return Verdict(
        graded(cases),
        f"The sum of r (d + k) is {'what' if equal else 'not what'} a 7B model with LoRA on its {len(layers)} linear layers "
        f"trains at r = 1, 8 and 64 ({reduction:.0f} times fewer at r = 8), and {'most' if cases['what was published'] else 'few'} published counts, "
        f"{sum(right)} of {len(right)}, follow (`minipeft audit` says why the others do not).",
        Number("7B's linear layers, dk over r (d + k) at r = 8", reduction, "times"), evidence, items=len(right),
    )  # fmt: skip


@claim("lora-6", lesson="12_counting.py", section="1 · Parameters")
def example() -> Verdict:
    """Holds if the built layers have these counts, cut off or rounded to the printed digits, and their ratio is 256; does not
    hold here otherwise."""
    layer = mp.nn.Sequential(mp.nn.Linear(4096, 4096, bias=False, seed=None))
    full = sum(p.size for p in layer.parameters())
    lora = mp.PeftModel(layer, mp.LoraConfig(r=8, target_modules=["0"]), seed=None).get_nb_trainable_parameters()[0]
    printed = {"16.7M": (full / 1e5, 167), "65K": (lora / 1e3, 65)}
    right = all(n in (math.floor(x), round(x)) for x, n in printed.values()) and full / lora == 256
    cut = [name for name, (x, n) in printed.items() if n != round(x)]
    return Verdict(
        graded({"": right}),
        f"The matrix has {full:,} numbers, LoRA's two {lora:,}: {full / lora:g} times; {listed(cut)} "
        f"{'are' if len(cut) > 1 else 'is'} cut off, not rounded.",
        Number("numbers of the matrix over LoRA's", full / lora, "times"), [Number("d k", full), Number("r (d + k)", lora)],
    )  # fmt: skip


@claim("lora-9", lesson="12_counting.py", section="1 · Parameters")
def fewer() -> Verdict:
    """Holds if, in every published count that follows from its options, the adapted model has 10 to 10,000 times as many
    parameters, embeddings and LoRA's own among them, as are trained; holds if in more than half; does not hold here otherwise."""
    ratios: dict[str, float] = {}
    for row in published():
        if not row["status"].startswith("reproduces"):
            continue
        options = json.loads(row["options"])
        if "config" not in options or "sum" in options or "of" in options:
            continue
        share = recompute({**row, "unit": "1", "quantity": "share"})
        ratios[f"{row['model']}, {row['hyperparameters']} ({row['source'].partition(' (')[0]})"] = 1 / share
    inside = {name: x for name, x in ratios.items() if 10 <= x <= 10_000}
    order = sorted(ratios, key=ratios.get)
    nearest = {edge: min(ratios, key=lambda name: abs(math.log(ratios[name] / edge))) for edge in (10, 10_000)}
    cases = {"every": len(inside) == len(ratios) > 0, "most": 2 * len(inside) > len(ratios)}
    outside = [f"{name}: {ratios[name]:,.0f}" for name in order if name not in inside]
    more = f"; outside are {len(outside)}, from {outside[0]}, to {outside[-1]}" if outside else ""
    return Verdict(
        graded(cases),
        "All parameters, embeddings and LoRA's own too, are 10 to 10,000 times those trained: so in "
        f"{len(inside)} of {len(ratios)} published counts, no sample of the field{more}; nearest to 10 is "
        f"{nearest[10]}: {ratios[nearest[10]]:.0f}, to 10,000 {nearest[10_000]}: {ratios[nearest[10_000]]:,.0f}. Layers alone, "
        "of 12 d^2 numbers, have 6d / (nr) times what rank r on n of their matrices d x d trains.",
        Number(
            "parameters of the adapted model over those trained, the median",
            statistics.median(ratios.values()) if ratios else math.nan,
            "times",
        ),
        [Number(name, ratios[name], "times") for name in dict.fromkeys((order[0], nearest[10], nearest[10_000], order[-1]))]
        + [
            Number(
                f"{size}, r = {r}, {targets}", count_parameters(name).total / count_parameters(name, config).trainable, "times"
            )
            for size, name in SIZES.items()
            for r in (1, 8, 64)
            for targets, config in (
                ("q and v", mp.LoraConfig(r=r, target_modules=["q_proj", "v_proj"])),
                ("all linear layers", mp.LoraConfig(r=r, target_modules="all-linear")),
            )
        ],
        items=len(ratios),
    )


# -------------------------------------------------------------------------------------------------------------- serving


@claim("lora-10", lesson="04_lora.py", section="8 · Merge: the detour disappears", experiment=DECODING)
def merged(rows: list[dict[str, Any]]) -> Verdict:
    """Holds if the merged model's decoding takes less than 1.1 times the base's (the 95 % interval over all repeats), and is
    clearly slower than both the base and a copy of it at no width and batch size; holds if at some; does not hold here otherwise.
    Cannot be tested here if the interval is wider than 10 % to each side. (The copy runs the base's operations on other arrays:
    what it differs by is no latency.)"""
    found, unmerged, copied = (slowdown(rows, what) for what in ("merged", "unmerged", "copy"))
    beside_copy = slowdown(rows, "merged", "copy")
    overall = measured(
        "merged, all widths and batch sizes: time over the base's", [row["merged"] / row["base"] for row in rows], "times"
    )
    as_fast = {case: min(n.low, beside_copy[case].low) <= 1 for case, n in found.items()}
    cases = {case: overall.high < 1.1 and one for case, one in as_fast.items()}
    most, least = (choose(unmerged, key=lambda case: unmerged[case].value) for choose in (max, min))
    at_least, at_most = (choose(n.value for n in copied.values()) for choose in (min, max))
    return Verdict(
        graded(cases) if steady([overall]) else UNTESTABLE,
        f"The merged model takes {overall.value:.2f} times the base's time, from {overall.low:.2f} to {overall.high:.2f} "
        f"(the rule allows 1.10), and is clearly slower than both the base and a copy of it (itself {at_least:.2f} to {at_most:.2f} "
        f"times the base's) at {those(as_fast, False)} of the widths and batch sizes; unmerged it takes "
        f"{unmerged[least].value:.2f} times ({least}) to {unmerged[most].value:.2f} times ({most}).",
        overall,
        [overall, *found.values(), *beside_copy.values(), *copied.values(), *unmerged.values()],
        seeds=repeats(rows),
        base="random models of 6 layers",
        task=where(rows),
    )


def mixed_batch(phase: str, seed: int, rows: int = 8, length: int = 32, tokens: int = 16) -> dict[str, Any]:
    """The row of a repeat: seconds of 8 rows with 4 adapters at once, of the 4 adapters one after the other, of one adapter
    alone."""
    config = mp.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    model = mp.get_peft_model(random_model(128), config, "a0", seed=seed)
    names = [f"a{i}" for i in range(4)]
    for i, name in enumerate(names[1:], 1):
        model.add_adapter(name, config, seed=seed + i)
    xp = xp_of(model.parameters()[0].data)
    ids = asarray(np.random.default_rng(seed).integers(2, 2048, (rows, length)), xp)
    of_rows = [names[i % 4] for i in range(rows)]
    parts = {name: asarray(np.array([i for i in range(rows) if of_rows[i] == name]), xp) for name in names}

    def call(ids: Any, of: list[str]) -> Any:
        if phase == "training":
            model.loss(ids, ids, adapter_names=of).backward()
            return model.zero_grad()
        return model.generate(ids, max_new_tokens=tokens, adapter_names=of)

    alone = {i: model(ids[i : i + 1], adapter_names=[of_rows[i]]).data for i in range(rows)}
    together = model(ids, adapter_names=of_rows).data
    difference = max(float(abs(together[i] - alone[i][0]).max()) for i in alone) / float(abs(together).max())
    model.set_requires_grad(names, True)
    seconds = in_turns(
        {
            "mixed": lambda: call(ids, of_rows),
            "one_by_one": lambda: [call(ids[part], [name] * len(part)) for name, part in parts.items()],
            "single": lambda: call(ids, ["a0"] * rows),
        }
    )
    size = {"base_bytes": sum(to_numpy(p.data).nbytes for p in model.base_model.parameters() if not p.requires_grad)}
    size["adapter_bytes"] = sum(4 * p.size for _, p in model.named_parameters() if p.requires_grad) // 4
    return seconds | size | {"difference": difference} | machine()


MIXED = Experiment("mixed_batch", mixed_batch, lambda: mp.grid(phase=["training", "generation"], seed=range(10)), timed=True)


@claim("lora-11", lesson="04_lora.py", section="9 · One base, many tasks", experiment=MIXED)
def shared(rows: list[dict[str, Any]]) -> Verdict:
    """Holds if, in training and in generation, each row of a batch with four adapters is what it is alone (to 1e-4), and the
    batch takes less time than the four adapters one after the other; holds if in one of them; does not hold here otherwise."""
    evidence, cases, single = [], {}, {}
    for phase in sorted({row["phase"] for row in rows}):
        mine = [row for row in rows if row["phase"] == phase]
        number = measured(
            f"{phase}: a mixed batch over one adapter after the other", [r["mixed"] / r["one_by_one"] for r in mine], "times"
        )
        single[phase] = measured(
            f"{phase}: a mixed batch over one with a single adapter", [r["mixed"] / r["single"] for r in mine], "times"
        )
        cases[phase] = max(r["difference"] for r in mine) < 1e-4 and number.high < 1
        evidence += [number, single[phase]]
    first = rows[0]
    memory = (first["base_bytes"] + 4 * first["adapter_bytes"]) / (4 * first["base_bytes"])
    worst = max(row["difference"] for row in rows)
    return Verdict(
        graded(cases),
        f"It is so, and saves time, in {those(cases)}: a batch of 8 rows with 4 adapters takes "
        f"{listed([f'{n.value:.2f} ({n.name.partition(chr(58))[0]})' for n in evidence[::2]])} times the time of the four in "
        f"turn, two rows each (in the worst repeat {max(r['mixed'] / r['one_by_one'] for r in rows):.2f}), and {listed([f'{n.value:.2f}' for n in single.values()])} times a batch of one adapter; base and adapters "
        f"take {memory:.2f} times the bytes of four models; rows differ from those alone by at most {worst:.0e}.",
        max(evidence[::2], key=lambda n: n.value),
        [*evidence, Number("bytes of base and 4 adapters over 4 models", memory, "times")],
        seeds=repeats(rows),
        base="a random model of the base's shape",
        task=where(rows),
    )
