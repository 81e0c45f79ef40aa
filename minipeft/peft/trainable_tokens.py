"""Trainable tokens: of the embedding W [V, d], only the rows of some tokens are trained, such as those of new tokens.

    W'_t = D_t for the tokens t that are trained, W_t for all others            D [n, d], at first those rows of W

A tied head shares D: of its logits, those of the trained tokens are D_t · h. `LoraConfig(trainable_token_indices=...)`
trains rows beside LoRA. Where several active adapters train one token, the last one's row is used; PEFT refuses that.

The method is Hugging Face PEFT's (tuners/trainable_tokens), and so are its files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Rng, asarray, to_numpy, xp_of
from ..nn.module import Module, Parameter
from ..options import configuration, option
from .config import PeftConfig, Seed, Shape
from .layer import Adapter, Inner
from .prompt_learning import TOKEN_EMBEDDINGS
from .targets import PeftError, kind_of, matches, shape_of
from .weights import dense_weight, fill, with_weight

DELTA = "trainable_tokens_delta"
ROWS = f"token_adapter.{DELTA}"  # what PEFT calls the rows of trainable_token_indices
EMBEDDINGS = {"gpt2": ["wte"], "llama": ["embed_tokens"]}  # model_type -> the embedding of its tokens
Tokens = list[int] | dict[str, list[int]] | None  # tokens of the embedding, or {end of a path: tokens}


class TokenRows(Adapter):
    """Rows of an embedding, or of a head (weight [V, d]), that are trained: one parameter [n, d]."""

    def __init__(self, tokens: list[int], key: str, layer: Module, seed: Seed, init_weights: bool = True):
        super().__init__({key: token_shape(tokens, shape_of(layer))}, layer, seed)
        self.tokens, self.name = tokens, key.partition(".")[0]
        if seed is not None and init_weights:
            fill(self.rows, to_numpy(dense_weight(layer)[asarray(np.array(tokens), xp_of(self.rows.data))]))
        elif seed is not None:
            fill(self.rows, np.random.default_rng(seed).standard_normal(self.rows.shape, np.float32))

    @property
    def rows(self) -> Parameter:
        """D [n, d]."""
        return getattr(self, self.name)

    def forward(self, x: Any, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """Token ids [...] -> [..., d] of an embedding; hidden states [..., d] -> logits [..., V] of a head."""
        xp, (V, _), n = xp_of(self.rows.data), shape_of(base), len(self.tokens)
        tokens, rows = asarray(np.array(self.tokens), xp), xp.arange(n)
        if kind_of(base) == "embedding":
            row = xp.full(V, -1)  # of D, by token
            row[tokens] = rows
            row = row[x]
            return F.where((row >= 0)[..., None], F.embedding(xp.maximum(row, 0), self.rows), inner(x))
        place = xp.zeros((n, V), self.rows.dtype)  # one-hot: the product is exact, and so is its gradient
        place[rows, tokens] = 1
        bias = None if base.bias is None else base.bias.data[tokens]
        return F.where(place.any(axis=0), F.linear(x, self.rows, bias) @ place, inner(x))

    def merge(self, layer: Module, base: Module) -> Module:
        """The layer with D among its rows."""
        weight = dense_weight(layer).copy()
        weight[asarray(np.array(self.tokens), xp_of(weight))] = self.rows.data.astype(weight.dtype)
        return with_weight(layer, weight)


def token_shape(tokens: list[int], shape: Shape) -> Shape:
    """[n, d] of n tokens of a weight [V, d]. Raises PeftError for a token that it lacks, or that is given twice."""
    if (last := max(tokens)) >= shape[0]:
        known = f"0 to {shape[0] - 1}"
        raise PeftError(f"the tokens are {known}, and {last} is to be trained; resize_token_embeddings first")
    if len(set(tokens)) < len(tokens):
        raise PeftError(f"a token is given twice among those to train: {tokens}")
    return len(tokens), shape[1]


def tokens_of(tokens: Tokens, path: str) -> list[int] | None:
    """Which tokens are trained in the module at a path; None: none."""
    if tokens is None:
        return None
    named = tokens if isinstance(tokens, Mapping) else dict.fromkeys(TOKEN_EMBEDDINGS, tokens)
    return next((own for name, own in named.items() if matches([name], path)), None) or None


def tied_heads(embeddings: dict[str, Module], modules: dict[str, Module]) -> dict[str, Module]:
    """{path: head} of the linear layers whose weight is that of one of the embeddings."""
    shared = {id(m.weight) for m in embeddings.values() if kind_of(m) == "embedding"}
    return {path: m for path, m in modules.items() if kind_of(m) == "linear" and id(m.weight) in shared}


def token_layers(tokens: Tokens, modules: dict[str, Module]) -> dict[str, Module]:
    """{path: module} of the embeddings and heads in which these tokens are trained, tied heads included."""
    kinds = TrainableTokensConfig.kinds
    found = {path: m for path, m in modules.items() if tokens_of(tokens, path) and kind_of(m) in kinds}
    return found | tied_heads(found, modules)


def token_rows(
    tokens: Tokens, key: str, layers: dict[str, Module], seeds: dict[str, Seed], init_weights: bool = True
) -> dict[str, TokenRows]:
    """{path: adapter} on embeddings and heads, of which tied ones share their rows; PeftError where those differ."""
    made: dict[str, TokenRows] = {}
    owners: dict[int, str] = {}  # id of a weight -> path of the embedding that has it
    for path, layer in sorted(layers.items(), key=lambda item: kind_of(item[1]) != "embedding"):
        own, owner = tokens_of(tokens, path), owners.setdefault(id(layer.weight), path)
        if owner == path:
            made[path] = TokenRows(own, key, layer, seeds[path], init_weights)
            continue
        if own and own != made[owner].tokens:
            raise PeftError(f"{path} is tied to {owner}, so the same tokens are trained there; got {own}")
        made[path] = TokenRows(made[owner].tokens, key, layer, None)
        setattr(made[path], made[path].name, made[owner].rows)
    return made


@configuration
class TrainableTokensConfig(PeftConfig):
    """Training the rows of some tokens and nothing else; options with PEFT's names."""

    token_indices: list[int] = option([], "ids of the tokens whose rows are trained", least=0)
    init_weights: bool = option(True, "start at the rows of the embedding; False: normal random numbers (for tests)")

    peft_type = "TRAINABLE_TOKENS"
    kinds = ("embedding", "linear")
    usual_targets = EMBEDDINGS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.token_indices:
            raise PeftError("token_indices names no token to train")

    def parameter_shapes(self, name: str, kind: str, shape: Shape) -> dict[str, Shape]:
        mine = kind in self.kinds and self.targets(name, kind)
        return {DELTA: token_shape(self.token_indices, shape)} if mine else {}

    def resolve(self, modules: dict[str, Module]) -> dict[str, Module]:
        found = super().resolve(modules)
        return found | tied_heads(found, modules)

    def adapters(self, layers: dict[str, Module], seeds: dict[str, Seed]) -> dict[str, Any]:
        tokens = dict.fromkeys(layers, self.token_indices)
        return token_rows(tokens, DELTA, layers, seeds, self.init_weights)


@configuration(kw_only=True)
class WithTokenRows(PeftConfig):
    """The configuration of a method beside which the rows of some tokens are trained."""

    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        None, "tokens whose rows of the embedding are trained, too; or {end of a path: tokens}", least=0
    )

    def parameter_shapes(self, name: str, kind: str, shape: Shape) -> dict[str, Shape]:
        tokens = tokens_of(self.trainable_token_indices, name) if kind in ("embedding", "linear") else None
        return {ROWS: token_shape(tokens, shape)} if tokens else super().parameter_shapes(name, kind, shape)

    def check_names(self, paths: Mapping[str, str], found: Iterable[str]) -> None:
        """As in `Targets`. Raises PeftError, too, for tokens of what is no embedding, or is trained otherwise."""
        super().check_names(paths, found)
        tokens, saved = self.trainable_token_indices, self.resolve_saved(paths)
        tables = [path for path, kind in paths.items() if kind in ("embedding", "linear") and tokens_of(tokens, path)]
        names = list(tokens) if isinstance(tokens, Mapping) else []
        if lost := [f" called {name!r}" for name in names if not any(matches([name], path) for path in tables)]:
            raise PeftError(f"trainable_token_indices: there is no embedding{lost[0]}")
        if tokens and not tables:
            raise PeftError("trainable_token_indices: there is no embedding")
        if both := [path for path in tables if path in saved or self.targets(path, paths[path])]:
            how = "trained whole (modules_to_save)" if both[0] in saved else "a target of the adapter"
            raise PeftError(f"{both[0]} is {how}, so its tokens cannot be trained beside it")

    def resolve(self, modules: dict[str, Module]) -> dict[str, Module]:
        """As in `Targets`. Raises PeftError, too, for tokens of a tied head that is a target."""
        targets, saved = super().resolve(modules), self.resolve_saved(modules)
        found = token_layers(self.trainable_token_indices, modules)
        if both := [path for path in found if path in targets]:
            raise PeftError(f"{both[0]} is a target of the adapter, so its tokens cannot be trained beside it")
        return targets | {path: m for path, m in found.items() if path not in saved}  # a tied head may be trained whole

    def adapters(self, layers: dict[str, Module], seeds: dict[str, Seed]) -> dict[str, Any]:
        trained = token_layers(self.trainable_token_indices, layers)
        rows = token_rows(self.trainable_token_indices, ROWS, trained, seeds)
        for path in tied_heads(trained, trained):
            rows[path].keys = []  # PEFT writes them once
        return super().adapters({path: m for path, m in layers.items() if path not in trained}, seeds) | rows
