"""Bottleneck adapters: their equation and counts, and what serving them costs."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from typing import Any

import numpy as np

import minipeft as mp

from ..backend import to_numpy
from ..peft.config import PeftConfig
from ..peft.methods import METHODS
from . import units
from .comparison import better, told
from .decoding import DECODING, TOKENS, decode, repeats, slowdown
from .full import method_lines
from .inputs import BASE, arrays, base, batch, moved, steps
from .register import HOLDS, IF, NOT, UNTESTABLE, Experiment, Number, Verdict, claim, graded, measured, those
from .timing import in_turns, machine, where

BY_HAND = {
    "relu": lambda z: np.maximum(z, 0), "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
}  # fmt: skip


@claim("adapter-1", lesson="05_adapters.py", section="1 · Down, bend, up")
def equation() -> Verdict:
    """Holds if h + W_up f(W_down h + b_down) + b_up, by hand, is what the library's adapter computes for ReLU, GELU and SiLU,
    and adapters stand between the blocks; holds if they stand inside the blocks; does not hold here if the sides differ by
    more than 1e-5."""
    d, m, errors = 64, 16, {}
    rng = np.random.default_rng(0)
    layer = mp.nn.Sequential(mp.nn.Linear(d, d)).to("numpy")
    x = rng.standard_normal((4, d)).astype(np.float32)
    h = x @ layer[0].weight.data.T + layer[0].bias.data
    for name, f in BY_HAND.items():
        model = mp.get_peft_model(
            layer, mp.BottleneckConfig(target_modules=["0"], bottleneck_size=m, non_linearity=name, scaling=1.0)
        )
        a = model.layers["0"].adapters["default"]
        a.up_weight.data = rng.standard_normal((d, m)).astype(np.float32)
        y = h + f(h @ a.down_weight.data.T + a.down_bias.data) @ a.up_weight.data.T + a.up_bias.data
        errors[name] = float(np.abs(y - model(mp.Tensor(x)).data).max() / np.abs(y).max())
    places = {
        p: list(mp.get_peft_model(base()[0], mp.BottleneckConfig(placement=p)).layers)
        for p in ("houlsby", "pfeiffer", "parallel")
    }
    blocks = base()[0].config.num_hidden_layers
    inside = all(path.count(".") > 2 for paths in places.values() for path in paths)  # model.layers.0 is a block
    right = max(errors.values()) < 1e-5
    return Verdict(
        graded({"the equation": right, "between the blocks": right and not inside}),
        f"The two sides agree to {max(errors.values()):.0e} for {', '.join(errors)}, but an adapter stands inside its block, "
        f"behind a sublayer, {len(places['houlsby']) // blocks} a block (Houlsby) or "
        f"{len(places['pfeiffer']) // blocks} (Pfeiffer).",
        Number("largest difference of the two sides, over the largest value", max(errors.values()), "times"),
        [
            *(Number(f"the same, {name}", error, "times") for name, error in errors.items()),
            *(Number(f"adapters a block, {name}", len(paths) // blocks) for name, paths in places.items()),
        ],
        task=f"a layer {d} x {d}, m = {m}",
    )  # fmt: skip


@claim("adapter-2", lesson="05_adapters.py", section="4 · Learning a task")
def only_adapters() -> Verdict:
    """Holds if two steps leave every number of the base as it was, bit for bit, and move every array of the adapters; does not
    hold here otherwise."""
    model = mp.get_peft_model(base()[0], METHODS["bottleneck"].config())
    before = arrays(model)
    steps(model)
    shares = moved(before, arrays(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = [share for name, share in shares.items() if name not in trained]
    own = [share for name, share in shares.items() if name in trained]
    right = max(frozen) == 0 and min(own) > 0
    numbers, total = model.get_nb_trainable_parameters()
    return Verdict(
        graded({"": right}),
        f"Two steps move {sum(s > 0 for s in own)} of the adapters' {len(own)} arrays and {sum(s > 0 for s in frozen)} of "
        f"the base's {len(frozen)}; the adapters are {numbers:,} of {total:,} numbers. Houlsby et al. train the layer norms, "
        "too, which this leaves.",
        Number("arrays of the base that moved", sum(s > 0 for s in frozen)),
        [Number("trained numbers", numbers), Number("of all", total)], base=BASE, task="8 sentences",
    )  # fmt: skip


@claim("adapter-3", lesson="05_adapters.py", section="2 · The count")
def count() -> Verdict:
    """Holds if the built adapters of 12 layers, d = 1024 and m = 64, have 1.6M numbers to the digits printed, with their
    biases and for each placement; holds if for some; does not hold here if for none."""
    d, m, layers = 1024, 64, 12
    config = mp.TransformerConfig.llama(hidden_size=d, num_hidden_layers=layers, num_attention_heads=16, vocab_size=1000)
    model = mp.Transformer(config, seed=None)
    built = {
        placement: mp.PeftModel(
            model, mp.BottleneckConfig(placement=placement, bottleneck_size=m), seed=None
        ).get_nb_trainable_parameters()[0]
        for placement in ("pfeiffer", "parallel", "houlsby")
    }
    weights, biases = layers * 2 * d * m, layers * (m + d)
    cases = {placement: round(n / 1e5) == 16 == round(weights / 1e5) for placement, n in built.items()}
    return Verdict(
        graded(cases),
        f"It is so for {those(cases)}: 2 d m is {2 * d * m:,} a layer and {weights:,} in {layers}, with biases "
        f"{built['pfeiffer']:,}; {those(cases, False)}, with two adapters a layer, has {max(built.values()):,}.",
        Number("12 layers with their biases, an adapter each", built["pfeiffer"]),
        [
            Number("2 d m", 2 * d * m), Number("12 layers, without biases", weights), Number("biases", biases),
            *(Number(f"built, {placement}", n) for placement, n in built.items()),
        ],
    )  # fmt: skip


def own_options(config: type) -> int:
    """How many options a configuration has that not every method has."""
    return len(dataclasses.fields(config)) - len(dataclasses.fields(PeftConfig))


@claim("adapter-4", lesson="05_adapters.py", section="1 · Down, bend, up", experiment=units.EXPERIMENT)
def simple_and_interpretable(rows: list[dict[str, Any]]) -> Verdict:
    """Holds if adapters are simple beside LoRA, with fewer lines of code and fewer options, and can be read unit by unit: the
    unit that on validation tells best which book a sentence is from, tells it on test clearly better than one direction of
    LoRA and than one unit before training, and removing it costs clearly more right answers than removing none, and than
    removing LoRA's direction. Holds if some of these six are so; does not hold here if none is. What people call simple, and
    what they understand, no run tests."""
    lines = {name: method_lines()[name] for name in ("bottleneck", "lora")}
    options = {name: own_options(config) for name, config in (("bottleneck", mp.BottleneckConfig), ("lora", mp.LoraConfig))}
    simple = {"fewer lines": lines["bottleneck"] < lines["lora"], "fewer options": options["bottleneck"] < options["lora"]}
    found = units.besides(rows)
    if found is None:
        return Verdict(UNTESTABLE, "A training diverged under one of the seeds, tuned as it is.")
    read = told(found, better, "source")
    verdict = graded(simple | {"read": read.verdict in (HOLDS, IF)})
    if verdict in (HOLDS, NOT):  # so far as it is read
        verdict = read.verdict
    counts = [Number(f"{what}, {name}", n) for what, of in (("lines", lines), ("options", options)) for name, n in of.items()]
    return dataclasses.replace(
        read, verdict=verdict, evidence=[*read.evidence, *counts],
        because=f"Simpler than LoRA by {those(simple)}: {lines['bottleneck']} lines of code to {lines['lora']}, "
        f"{options['bottleneck']} options to {options['lora']}. {units.whole(rows)} {read.because}",
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- serving


def swap(seed: int) -> dict[str, Any]:
    """The row of a repeat: seconds to change from one trained adapter to another in memory and from the disk, and of a
    token."""
    model, tokenizer = base()
    config = METHODS["bottleneck"].config()
    alone = []
    for i in range(2):
        one = mp.get_peft_model(model, config, seed=2 * seed + i)
        steps(one, 5, lr=1e-2)
        alone.append(one)
    with tempfile.TemporaryDirectory() as directory:
        both = mp.PeftModel.from_pretrained(model, _saved(alone[0], f"{directory}/0"), adapter_name="a")
        both.load_adapter(_saved(alone[1], f"{directory}/1"), "b")
        mp.save_pretrained(model, f"{directory}/model", tokenizer)
        ids, difference = batch(4, 16), 0.0
        for name, one in zip("ab", alone):
            both.set_adapter(name)
            difference = max(difference, float(abs(to_numpy(both(ids).data) - to_numpy(one(ids).data)).max()))
        names = iter("ab" * 1000)
        seconds = in_turns({
            "set": lambda: [both.set_adapter(next(names)) for _ in range(10)], "tokens": lambda: decode(both, 1),
            "load_adapter": lambda: mp.PeftModel.from_pretrained(model, f"{directory}/1"),
            "load_model": lambda: mp.from_pretrained(f"{directory}/model"),
        })  # fmt: skip
    seconds["set"] /= 10
    seconds["token"] = seconds.pop("tokens") / TOKENS
    held = {"adapter_bytes": sum(p.data.nbytes for _, p in alone[0].named_parameters() if p.requires_grad)}
    held["model_bytes"] = sum(p.data.nbytes for p in model.parameters())
    return seconds | held | {"difference": difference} | machine()


def _saved(model: Any, directory: str) -> str:
    model.save_pretrained(directory)
    return directory


SWAP = Experiment("adapter_swap", swap, lambda: mp.grid(seed=range(6)), timed=True)


@claim("adapter-5", lesson="04_lora.py", section="9 · One base, many tasks", experiment=SWAP)
def swapped(rows: list[dict[str, Any]]) -> Verdict:
    """Holds if, after a swap, the model computes what the model with that adapter alone does (to 1e-5), and the swap takes
    less than a tenth of a generated token; holds if less than the token; does not hold here otherwise."""
    tokens = measured("a swap in memory over a generated token", [row["set"] / row["token"] for row in rows], "times")
    disk = measured(
        "loading an adapter over loading a model", [row["load_adapter"] / row["load_model"] for row in rows], "times"
    )
    same = max(row["difference"] for row in rows) < 1e-5
    cases = {"less than a tenth": same and tokens.high < 0.1, "less than one": same and tokens.high < 1}
    first = rows[0]
    return Verdict(
        graded(cases),
        f"A swap takes {1e6 * statistics.mean(row['set'] for row in rows):.0f} microseconds, {tokens.value:.2f} of a "
        f"generated token, and the outputs are those of the adapter alone (to {max(row['difference'] for row in rows):.0e}); "
        f"from the disk it takes {1e3 * statistics.mean(row['load_adapter'] for row in rows):.0f} ms; an adapter has "
        f"{first['adapter_bytes'] / first['model_bytes']:.1%} of the model's bytes.",
        tokens,
        [
            tokens,
            disk,
            Number("an adapter", first["adapter_bytes"], "bytes"),
            Number("the model", first["model_bytes"], "bytes"),
        ],
        seeds=repeats(rows),
        base=BASE,
        task=where(rows),
    )


@claim("adapter-7", lesson="05_adapters.py", section="5 · The price: latency", experiment=DECODING)
def latency(rows: list[dict[str, Any]]) -> Verdict:
    """Holds if, at each width and batch size, decoding with adapters (Houlsby, m = 16) takes clearly longer than the base's,
    over repeats; holds if at some; does not hold here if at none."""
    found = slowdown(rows, "adapters")
    cases = {case: n.low is not None and n.low > 1 for case, n in found.items()}
    most, least = (choose(found, key=lambda case: found[case].value) for choose in (max, min))
    return Verdict(
        graded(cases),
        f"With m = 16, in models of 6 layers, decoding takes {found[most].value:.2f} times as long at {most} and {found[least].value:.2f} times at {least}; "
        f"clearly longer at {those(cases) if not all(cases.values()) else 'all widths and batch sizes'}.",
        found[most], [*found.values()], seeds=repeats(rows), base="random models of 6 layers", task=where(rows),
    )  # fmt: skip
