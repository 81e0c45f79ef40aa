"""A transformer from token ids to logits, one block of it in full, with the shape of every weight; and a method drawn in.

    token ids ─ embedding ─┬─► norm ─► attention ─(+)─┬─► norm ─► MLP ─(+)─► ... ─► norm ─► head ─► logits

What is drawn where follows from the names and shapes of the parameters: the model's own, and those that the method trains.
"""

from __future__ import annotations

import math
from typing import Any

from ..accounting import architecture, count_parameters
from ..accounting.parameters import trained_parameters
from ..nn.heads import HEADS
from .drawing import GREY, ORANGE, box, cut, line, sheet, words

STREAM, LEFT, RIGHT, GAP = 6.5, 13.5, 38.0, 1.3  # x of the residual stream and of the branches; between rows
BLOCKS = {  # by family: the first block, and its branches: linear layers, what has no weights between them, a linear layer
    "llama": ("model.layers.0.", (
        ("self_attn.", ("q_proj", "k_proj", "v_proj"), "attention", "o_proj"),
        ("mlp.", ("gate_proj", "up_proj"), "silu(gate) · up", "down_proj"),
    )),
    "gpt2": ("transformer.h.0.", (
        ("attn.", ("c_attn",), "attention", "c_proj"),
        ("mlp.", ("c_fc",), "gelu", "c_proj"),
    )),
}  # fmt: skip
TITLES = {
    "PLAIN": "From token ids to logits", "4BIT": "Four bits for the large matrices",
    "LORA": "LoRA: strips beside matrices", "BOTTLENECK": "Adapters: small networks in the path",
    "PROMPT_TUNING": "A soft prompt: vectors in the input", "PREFIX_TUNING": "A prefix: keys, values in each block",
}  # fmt: skip


def block(config: Any, method: Any = None) -> Any:
    """A figure of the model that `config`, a TransformerConfig, describes.

    method: None; the configuration of LoRA, bottleneck adapters, prompt or prefix tuning, whose parameters are drawn in
    orange; or "4bit": the linear layers as `mp.quant.quantize_model` stores them.

    Raises ValueError for another family or method, and for one that is not the same in all blocks.
    """
    if config.model_type not in BLOCKS:
        raise ValueError(f"block draws {' and '.join(BLOCKS)}, not {config.model_type!r}")
    return _Block(config, method).draw()


class _Block:
    def __init__(self, config: Any, method: Any):
        self.config, self.method = config, method
        self.first, self.branches = BLOCKS[config.model_type]
        self.arch = architecture(config)
        self.four_bits = method == "4bit"
        self.name = "4BIT" if self.four_bits else "PLAIN" if method is None else getattr(method, "peft_type", "")
        if self.name not in TITLES:
            raise ValueError(f"block draws a configuration of {', '.join(list(TITLES)[2:])}, or '4bit', not {method!r}")
        if getattr(method, "placement", None) == "parallel":
            raise ValueError("block draws adapters behind a sublayer, and a parallel one stands beside it")
        self.trained = {} if method is None or self.four_bits else dict(trained_parameters(self.arch, method))
        sizes = {name: math.prod(shape) for name, shape in self.trained.items()}
        drawn = config.num_hidden_layers * sum(n for name, n in sizes.items() if name.startswith(self.first))
        if self.name in ("LORA", "BOTTLENECK") and drawn != sum(sizes.values()):
            raise ValueError("block draws what a method trains in every block alike, and this one trains others, too")
        self.kind = "plain" if method is None else "frozen"
        self.y = 5.0

    def draw(self) -> Any:
        """The figure, from top to bottom."""
        self.axes = sheet()
        d, V = self.config.hidden_size, self.config.vocab_size
        begin = self.y
        self._on_stream("token ids", "[T]", "plain")
        self._on_stream("embedding", f"[{V}, {d}]", self.kind)
        self._prompt(d)
        above = self.y + 3.6
        self.y = above + 1.2
        line(self.axes, [(STREAM, begin + 3.8), (STREAM, begin + 5)])
        line(self.axes, [(STREAM, begin + 8.8), (STREAM, above)], head=False)
        for branch in self.branches:
            self._branch(*branch)
        box(self.axes, 1.5, above, 37.8, self.y - above, "", "plain", fc="none", ec=GREY, ls=(0, (4, 2)))
        words(self.axes, 38.4, self.y - 1.3, f"{self.config.num_hidden_layers} such blocks", ha="right", color=GREY)
        line(self.axes, [(STREAM, above), (STREAM, self.y + 1.6)])
        self.y += 1.6
        for name, shape in (("norm", f"[{d}]"), ("head", f"[{V}, {d}]")):
            self._on_stream(name, shape, self.kind)
            line(self.axes, [(STREAM, self.y - 1.2), (STREAM, self.y)])
        self._on_stream("logits", f"[T, {V}]", "plain")
        if self.config.tie_word_embeddings:
            words(self.axes, STREAM + 6.2, self.y - 8.1, "the embedding's own numbers", ha="left", color=GREY)
        return cut(self.axes, self.y, TITLES[self.name], self._alt(self._legend()))

    def _alt(self, counted: str) -> str:
        """What the method adds where, and how much it is (`counted`); of a model without a method, the path and its shapes."""
        d, V, n = self.config.hidden_size, self.config.vocab_size, self.config.num_hidden_layers
        if self.name == "PLAIN":
            first, second = (
                ", ".join(f"{name} {list(self._shape(place + name))}" for name in (*into, out)) for place, into, _, out in self.branches
            )
            return (
                f"token ids [T] pass the embedding [{V}, {d}], {n} blocks, a norm and the head [{V}, {d}] to logits [T, {V}]. Each block adds to "
                f"the stream [T, {d}] what attention makes of its norm ({first}), and then what an MLP makes of its norm ({second})."
            )
        if self.name == "PROMPT_TUNING":
            (P,) = {shape[0] for shape in self.trained.values()}
            return f"{P} trained virtual tokens [{P}, {d}] stand before the embedded text on the way into {n} blocks. {counted}."
        added: dict[str, list[str]] = {}
        for name in (place + name for place, into, _, out in self.branches for name in (*into, out)):
            text = "4 bits" if self.four_bits else self._strip(name).removeprefix("+ ") or self._adapter(name)
            added.setdefault(text, []).append(name.rpartition(".")[2])
        added.pop("", None)
        places = "; ".join(f"{text} at {', '.join(names)}" for text, names in added.items())
        return f"each of {n} blocks has {places}. {counted}."

    def _on_stream(self, name: str, shape: str, kind: str) -> None:
        box(self.axes, STREAM - 5, self.y, 10, 3.8, f"{name}\n{shape}", kind)
        self.y += 5

    def _prompt(self, d: int) -> None:
        """What runs along the stream; in prompt tuning, the trained vectors that join it."""
        shape = f"[T, {d}]"
        if self.name == "PROMPT_TUNING":
            (P,) = {shape[0] for shape in self.trained.values()}
            box(self.axes, 15, self.y - 5, 23, 3.8, f"{P} virtual tokens\n[{P}, {d}]", "trained")
            way = [(15, self.y - 3.1), (13, self.y - 3.1), (13, self.y + 0.6), (STREAM, self.y + 0.6)]
            line(self.axes, way, color=ORANGE, lw=1.4)
            shape = f"[{P} + T, {d}]"
        if positions := self.arch.get("transformer.wpe.weight"):
            shape += f" + positions {list(positions)}"
        words(self.axes, STREAM + 1, self.y + 2.1, shape, ha="left", color=GREY)

    def _branch(self, place: str, into: tuple[str, ...], middle: str, out: str) -> None:
        """norm, linear layers side by side, what has no weights, a linear layer; and back onto the stream."""
        d, centre = self.config.hidden_size, (LEFT + RIGHT) / 2
        line(self.axes, [(STREAM, self.y + 1.4), (LEFT, self.y + 1.4)])
        box(self.axes, LEFT, self.y, RIGHT - LEFT, 2.8, f"norm [{d}]", self.kind)
        self.y += 2.8 + GAP
        width = (RIGHT - LEFT - 0.7 * (len(into) - 1)) / len(into)
        height = 4.4 + 2.6 * any(self._strip(place + name) for name in into)
        for i, name in enumerate(into):
            x = LEFT + i * (width + 0.7)
            middle_of_it, below = x + width / 2, self.y + (height if self._strip(place + name) else 4.4)
            line(self.axes, [(middle_of_it, self.y - GAP), (middle_of_it, self.y)])
            self._linear(place + name, x, width, tall=True)
            line(self.axes, [(middle_of_it, below), (middle_of_it, self.y + height + GAP)])
        self.y += height + GAP
        if middle == "attention":
            H, K, D = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
            text = f"softmax(q·k / √{D}) v\n{H} heads of {D}" + (f"; k, v: {K} heads" if K != H else "")
            if self.config.model_type == "llama":
                turned = "q, k, not Pk," if self._strip(place + "k_proj").startswith("Pk") else "q, k"
                text = f"turn {turned} by their position\n{text}"
            self._row(1.4 + 1.6 * len(text.split("\n")), text, "plain")
        else:
            self._row(4.4, f"{middle}\n[T, {self._shape(place + out)[0 if self.config.model_type == 'gpt2' else 1]}]", "plain")
        self._linear(place + out, LEFT, RIGHT - LEFT, tall=False)
        self.y += 2.8
        if adapter := self._adapter(place + out):
            line(self.axes, [(centre, self.y), (centre, self.y + GAP)])
            self.y += GAP
            box(self.axes, LEFT, self.y, RIGHT - LEFT, 2.8, adapter, "trained")
            self.y += 2.8
        join = self.y + 1.5
        line(self.axes, [(centre, self.y), (centre, join), (STREAM + 1.1, join)])
        self.axes.plot(STREAM, join, "o", ms=11, mfc="white", mec=GREY, zorder=5)
        words(self.axes, STREAM, join, "+", fontsize=10, zorder=6)
        self.y = join + 2.4

    def _row(self, height: float, text: str, kind: str) -> None:
        """A box as wide as the branch, and an arrow to the next."""
        box(self.axes, LEFT, self.y, RIGHT - LEFT, height, text, kind)
        centre = (LEFT + RIGHT) / 2
        line(self.axes, [(centre, self.y + height), (centre, self.y + height + GAP)])
        self.y += height + GAP

    def _linear(self, name: str, x: float, width: float, tall: bool) -> None:
        """A linear layer, and what is trained beside it: under it, or at its right end where it is not `tall`."""
        kind = "4bit" if self.four_bits else self.kind
        short, shape = name.rpartition(".")[2], str(list(self._shape(name)))
        if tall:
            box(self.axes, x, self.y, width, 4.4, f"{short}\n{shape}", kind)
            if strip := self._strip(name):
                box(self.axes, x, self.y + 4.4, width, 2.6, strip, "trained")
        else:
            strip = self._strip(name)
            box(self.axes, x, self.y, width - 8.2 * bool(strip), 2.8, f"{short} {shape}", kind)
            if strip:
                box(self.axes, x + width - 8.2, self.y, 8.2, 2.8, strip, "trained")

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.arch[f"{self.first}{name}.weight"]

    def _here(self, name: str) -> dict[str, tuple[int, ...]]:
        """What the method trains at a layer of the first block: the parameter's own name -> shape."""
        here = f"{self.first}{name}."
        return {key.removeprefix(here): shape for key, shape in self.trained.items() if key.startswith(here)}

    def _strip(self, name: str) -> str:
        """LoRA's B A at a layer, or the prefix's keys or values behind it."""
        if self.name == "PREFIX_TUNING":
            which = {"k_proj": "Pk", "v_proj": "Pv", "c_attn": "Pk and Pv"}.get(name.rpartition(".")[2])
            (shape,) = self.trained.values()
            return f"{which} [{shape[0]}, {shape[1] // (2 * self.config.num_hidden_layers)}]" if which else ""
        shape = self._here(name).get("lora_A.weight")
        return f"+ BA, r {shape[0]}" if shape else ""

    def _adapter(self, name: str) -> str:
        shape = self._here(name).get("down_weight")
        return f"adapter {shape[1]} → {shape[0]} → {shape[1]}" if shape else ""

    def _legend(self) -> str:
        """Draw and return how many numbers are trained; or, in four bits, how many are stored so."""
        if self.method is None:
            return ""
        total = self.arch.size
        if self.four_bits:
            packed = sum(math.prod(shape) for name, shape in self.arch.items() if self._packed(name))
            text, kind = f"{_count(packed)} of {_count(total)} in 4 bits", "4bit"
        else:
            count = count_parameters(self.config, self.method)
            text, kind = f"{_count(count.trainable)} trained, {_count(total)} frozen", "trained"
        box(self.axes, 13.2, self.y - 3.2, 1.8, 1.8, "", kind)
        words(self.axes, 15.7, self.y - 2.2, text, ha="left")
        return text

    def _packed(self, name: str) -> bool:
        layer = name.removesuffix(".weight").rpartition(".")[2]
        return self.arch.kinds[name] in ("linear", "conv1d") and layer not in HEADS


def _count(n: int) -> str:
    """1,443,456, or 41.9M and 8.03B where a sheet is too narrow for all digits."""
    return f"{n:,}" if n < 1e7 else f"{n / 1e6:.1f}M" if n < 1e9 else f"{n / 1e9:.2f}B"
