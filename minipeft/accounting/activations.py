"""What a block keeps for its backward pass in PyTorch, term by term: bytes a token, as formulas.

    h  width of the hidden states      a  attention heads, of d numbers each      k  heads of keys and values
    f  width inside the MLP            s  tokens of a sequence                    r  rank of an adapter

    Korthikanti et al. 2022 (arXiv:2205.05198, eq. 1), a GPT in 16 bits with dropout:      34 h + 5 a s
    a Llama block today, fully trained in bfloat16 with flash attention:      16 h + 2 (2 a d + 2 k d) + 4 a + 8 f + 8

`megatron_terms` are the first, `block_terms` the second, for any model of which there is a table of parameters: which
layers a block has, and which of them are trained, is read off the table. A term says which op of PyTorch or of
transformers keeps the array; the tests hold them against what autograd packs (`saved_tensors_hooks`) in a model of
transformers and PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .architectures import Architecture, Shape
from .parameters import elements, trained_name

OUT = ("o_proj", "out_proj", "c_proj", "dense", "o")  # what families call the layer that reads attention's output
# families whose activation is gelu_new or its like: tanh GELU in Python, which keeps x, x / 2, tanh and 1 + tanh, not x alone
PYTHON_GELU = ("gpt2", "phi", "gptj", "mt5")
NARROW_SOFTMAX = ("gpt2", "bert", "roberta", "xlm-roberta", "deberta-v2")  # families whose eager softmax is not widened
DROPOUT = ("gpt2", "gpt_bigcode", "bert", "roberta", "xlm-roberta", "deberta-v2", "t5", "mt5", "opt")  # families with dropout of 0.1 by default


class Term(NamedTuple):
    """name: what is kept, and by which op; formula: bytes a token, in symbols; bytes: the number."""

    name: str
    formula: str
    bytes: float


class Layer(NamedTuple):
    """A linear layer of a block.

    size     numbers in its weight
    kind     of its input: "norm" (normed hidden states), "attention" (its output) or "mlp" (the inner values)
    array    a name of its input: layers that read the same array have the same
    share    how many of its kind a token goes to: k of a mixture's experts
    trained  whether its weight is; added: the shapes of the matrices that a method adds to it
    """

    n_in: int
    size: int
    kind: str
    array: str
    share: float
    trained: bool
    added: tuple[Shape, ...]


class Norm(NamedTuple):
    """A norm of a block: its width, whether it is an RMS norm, and whether its weight is trained."""

    width: int
    rms: bool
    trained: bool


@dataclass(frozen=True)
class Block:
    """What a block's table of parameters shows of it; `inner` is the width inside the MLP times the share of tokens."""

    h: int
    a: int
    queries: int  # a d
    keys: int  # k d
    layers: tuple[Layer, ...]
    norms: tuple[Norm, ...]
    attentions: int
    inner: float
    gated: bool
    model_type: str
    python_gelu: bool
    parameters: int  # numbers in the block
    trained: int  # numbers that are trained in it, a method's included


def blocks_of(arch: Architecture, trained: Mapping[str, Shape]) -> list[Block]:
    """The blocks of a model, in order; `trained` names what `trained_parameters` does."""
    groups: dict[str, tuple[dict[str, Shape], dict[str, Shape]]] = {}
    for name, shape in {**arch.shapes, **trained}.items():
        if found := re.match(r"(.*?\.\d+)\.", name):
            groups.setdefault(found[1], ({}, {}))[name not in arch][name] = shape
    copies = {trained_name(name) for name in trained}
    blocks = [_block(arch, shapes, trained, copies, extra) for shapes, extra in groups.values()]
    return [block for block in blocks if any(norm.width == block.h for norm in block.norms)]  # not an image encoder's


def _block(
    arch: Architecture, shapes: Mapping[str, Shape], trained: Mapping[str, Shape], copies: set[str], extra: Any
) -> Block:  # fmt: skip
    d = arch.dimensions
    h, heads, width = d["hidden_size"], d["num_attention_heads"], d["head_dim"]
    queries = heads * width
    norms = []
    for name, shape in shapes.items():
        if arch.kinds[name] == "norm" and name.endswith(".weight"):
            per_head = {"q_norm": heads, "k_norm": d["num_key_value_heads"]}.get(name.split(".")[-2], 1)
            n = shape[0] * (per_head if shape[0] == width else 1)
            norms.append(Norm(n, name[:-6] + "bias" not in shapes, name in copies))
    beside = sum(norm.width == h for norm in norms) == 1  # the MLP reads what attention reads
    layers, outs, inner, entering, made, first, stacked = [], 0, 0.0, 0.0, 0, "", set(arch.experts)
    for name, shape in shapes.items():
        experts = name in stacked
        if arch.kinds[name] not in ("linear", "conv1d") and not experts:
            continue
        *_, n_out, n_in = shape[::-1] if arch.kinds[name] == "conv1d" else shape
        path = name if experts else name.rpartition(".")[0]
        parent, _, leaf = path.rpartition(".")
        share = arch.experts_per_token if experts else 1.0
        kind, array = "norm", parent
        if "att" in parent.lower():
            if leaf in OUT:
                kind, array, outs = "attention", path, outs + 1
            elif array == (first := first or array):
                made += n_out
        elif n_out == h and n_in != h:
            kind, array, inner = "mlp", path, inner + n_in * share
        elif n_in == h:
            entering += n_out * share
            array = first if beside and first else array
        added = tuple(s for key, s in extra.items() if key.startswith(f"{path}.") and len(s) == 2 and min(s) > 1)
        mine = name in trained or f"{path}.modules_to_save.weight" in trained
        layers.append(Layer(n_in, n_in * n_out, kind, array, share, mine, added))
    keys = (made - queries) // 2  # q, k and v are all that attention's first layers make, together or apart
    keys = keys if 0 < keys <= queries else d["num_key_value_heads"] * width
    return Block(
        h, heads, queries, keys, tuple(layers), tuple(norms), max(1, outs), inner, entering > 1.5 * inner,
        arch.model_type, arch.model_type in PYTHON_GELU if arch.activation is None else arch.activation == "gelu_new",
        elements(shapes), elements(extra) + elements({n: s for n, s in shapes.items() if n in trained}),
    )  # fmt: skip


def head_of(arch: Architecture) -> tuple[str, str] | None:
    """(a language model's head, the matrix that it is: its own, or the embedding's table) by name; else None.

    The head is Whisper's proj_out, all others' lm_head.
    """
    owners = {name: arch.tied.get(name, name) for name in ("lm_head.weight", "proj_out.weight")}
    return next(((name, owner) for name, owner in owners.items() if owner in arch), None)


def first_trained(arch: Architecture, blocks: list[Block], trained: Mapping[str, Shape]) -> tuple[int, bool]:
    """(the first block that gradients reach, whether they reach its input): the number of blocks for none.

    They reach all blocks where something in front of them is trained, an embedding or a prompt.
    """
    head = ("lm_head", "proj_out", "score", "classifier", "pooler", "qa_outputs")
    behind = {name: shape for name, shape in trained.items() if name.startswith(head) or is_last_norm(arch, name)}
    if elements(trained) > elements(behind) + sum(block.trained for block in blocks):
        return 0, True
    return next((i for i, block in enumerate(blocks) if block.trained), len(blocks)), False


def is_last_norm(arch: Architecture, name: str) -> bool:
    """Whether a trained parameter is of the norm behind the last block."""
    weight = trained_name(name).rpartition(".")[0] + ".weight"
    return arch.kinds.get(weight) == "norm" and not re.search(r"\.\d+\.|embed", weight)


def block_terms(
    block: Block,
    s: int,
    *,
    weights: int = 2,
    autocast: bool = True,
    adapters: int = 4,
    attention: str = "flash",
    dropout: float = 0.0,
    packed_inputs: bool = False,
) -> Iterator[Term]:
    """The terms of a block that gradients flow through, as PyTorch runs it op by op.

    Args:
        s: tokens of a sequence; attention that is not flash keeps them squared.
        weights, adapters: bytes of a number of the model's, of a method's matrices.
        autocast: linear layers and attention compute in 16 bits, norms and softmax in float32 (torch.autocast).
        dropout: a method's own, of its matrices' inputs; packed_inputs: frozen layers keep theirs too.
    """
    a, queries, keys, n = block.a, block.queries, block.keys, block.attentions
    c = 2 if autocast else weights  # bytes of what linear layers read and make

    def term(name: str, factor: float, *sizes: float, formula: str = "") -> Term:
        return Term(name, formula or f"{factor:g} x {sum(sizes):,.0f}", factor * sum(sizes))

    # 1. Norms. transformers' RMS norm keeps a float32 copy of its input (hidden_states.to(torch.float32).pow(2)) and
    #    the reciprocal root; torch's layer norm its input, mean and rstd. A trained weight needs the normed array.
    rms, layer_norms = ([norm for norm in block.norms if norm.rms is kind] for kind in (True, False))
    normed = 4 if layer_norms and autocast else weights  # bytes of what a norm makes
    if rms:
        yield term("inputs of RMS norms in float32, and 1 / rms", 4, *(norm.width + 1 for norm in rms))
    if layer_norms:
        yield term("inputs of layer norms, mean and 1 / std", normed, *(norm.width + 8 / normed for norm in layer_norms))
    if any(norm.trained for norm in rms):
        yield term("normed arrays, for the norms' weights", weights, *(norm.width for norm in rms if norm.trained))

    # 2. The inputs of trained linear layers: an array that several read is kept once, but what has to be narrowed
    #    first is narrowed anew for each. Attention's output is attention's own, below.
    def came(layer: Layer) -> int:
        return normed if layer.kind == "norm" else c

    inputs = [layer for layer in block.layers if (layer.trained or packed_inputs) and layer.kind != "attention"]
    if inputs:
        arrays = {(layer.array, i if came(layer) != c else 0): layer for i, layer in enumerate(inputs)}
        yield term("inputs of linear layers", c, *(layer.n_in * layer.share for layer in arrays.values()))

    # 3. A method's matrices. PEFT casts x to the adapter's dtype, layer by layer, and autocast what it finds; without
    #    either and without dropout what is kept is the array itself.
    def copied(layer: Layer) -> bool:
        return dropout > 0 or came(layer) != adapters or (autocast and adapters != 2)

    added = [layer for layer in block.layers if layer.added]
    own = {layer.array for layer in inputs}
    outer = {
        (layer.array, i if copied(layer) else 0): layer.n_in * layer.share
        for i, layer in enumerate(added)
        if copied(layer) or (layer.kind != "attention" and layer.array not in own)
    }
    e = 2 if autocast else adapters
    if outer:
        copies = ", a copy for each" * any(map(copied, added))
        yield term(f"inputs of adapters{copies}", e, *outer.values())
    if added:
        inner = [shape[1] * layer.share for layer in added for shape in layer.added if shape[1] != layer.n_in]
        yield term("inner values of adapters", e, *inner)
    if outer and dropout:
        yield term("masks of the adapters' dropout", 1, *outer.values())

    # 4. Attention: what it multiplies after the rotation, and its softmax. Only flash attention takes fewer heads of
    #    keys and values than of queries as they are; for the others repeat_kv copies them.
    seen = keys if attention == "flash" else queries
    yield term("queries, keys and values", c * n, queries + 2 * seen)
    if attention != "eager":
        yield term("attention's output", c * n, queries)
        yield term("log-sum-exp of attention, in float32", 4 * n, a)
    else:
        wide = 4 if autocast or block.model_type not in NARROW_SOFTMAX else c
        yield term("softmax", wide * n, a * s, formula=f"{wide * n} a s")
        if wide != c:
            yield term("softmax as v is multiplied with", c * n, a * s, formula=f"{c * n} a s")
        if any(x.kind == "attention" and (x.trained or (x.added and not copied(x))) for x in block.layers):
            yield term("attention's output", c * n, queries)

    # 5. The MLP: a gate keeps act's input, act's value and the other factor; an activation alone its input. tanh GELU in
    #    Python keeps three arrays beside its input.
    if block.inner:
        arrays = (3 if block.gated else 1) + 3 * block.python_gelu
        yield term("gate, its activation, up" if block.gated else "input of the activation", c * arrays, block.inner)

    # 6. Dropout of the model's own, where its family has it: a byte for each value.
    if block.model_type in DROPOUT:
        yield term("masks of dropout", 1, 2 * block.h, formula="2 h")
        if attention == "eager":
            yield term("mask and result of attention's dropout", n * (1 + c), a * s, formula=f"{n * (1 + c)} a s")


def megatron_terms(s: int, h: int, a: int) -> Iterator[Term]:
    """Korthikanti et al. 2022, section 4.1: a block of a GPT in 16 bits, with dropout, without flash attention."""
    yield Term("layer norms' inputs", "4 h", 4 * h)
    yield Term("input of the query, key and value layers", "2 h", 2 * h)
    yield Term("queries and keys", "4 h", 4 * h)
    yield Term("values", "2 h", 2 * h)
    yield Term("softmax", "2 a s", 2 * a * s)
    yield Term("dropout's mask of attention", "a s", a * s)
    yield Term("dropout's result of attention", "2 a s", 2 * a * s)
    yield Term("input of the output layer", "2 h", 2 * h)
    yield Term("dropout's mask after attention", "h", h)
    yield Term("input of the MLP", "2 h", 2 * h)
    yield Term("GeLU's input", "8 h", 8 * h)
    yield Term("input of the MLP's second layer", "8 h", 8 * h)
    yield Term("dropout's mask after the MLP", "h", h)
