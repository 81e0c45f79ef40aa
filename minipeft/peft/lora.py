"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), and what grew on it.

    W' = W + s B A        A [r, in] random, B [out, r] zero, s = lora_alpha / r            eq. 3

The forward pass never forms B A: y = W x + B (s (A x)), with r numbers per position in between. W is frozen, so it
keeps no activation for backward; A's gradient needs x, which is the same array for every projection that reads it.

    rsLoRA   s = lora_alpha / sqrt(r): the update's size does not shrink with r    Kalajdzievski 2023, arXiv:2312.03732
    DoRA     W' = m * (W + s B A) / ||W + s B A||, by rows, the norm a constant    Liu et al. 2024, arXiv:2402.09353
    PiSSA    A, B start as the r strongest singular directions of W                Meng et al. 2024, arXiv:2404.02948
    OLoRA    A, B start as the first r rows and columns of W's QR factors          Büyükakyüz 2024, arXiv:2406.01775
    fused    q and v alone of a fused projection: loralib's MergedLinear(enable_lora=[True, False, True])

PiSSA and OLoRA subtract their start from W. Here W stays as it is and the start (A0, B0) is kept beside the trained
pair: W - s B0 A0 + s B A is a LoRA of rank 2r, [B, -B0] [A; A0]. So the base stays shared, the adapter can be switched
off, and W is never copied.

Departure from PEFT: OLoRA on GPT-2's [in, out] layers factorises the matrix that is applied. PEFT's factorises its
transpose, and so does not start at the base (a square layer) or does not run. Such an adapter is saved as the plain one
of rank 2r that it equals, which PEFT reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, Rng, one_blas_thread, to_numpy, xp_of
from ..nn.module import Module, Parameter
from ..options import configuration, option
from ..quant.linear import Linear4bit
from .config import (
    QUERY_AND_VALUE,
    PeftConfig,
    PeftError,
    Seed,
    Shape,
    check_pattern,
    kind_of,
    pattern_value,
    shape_of,
)
from .layer import Adapter, dense_weight, fill, kaiming_uniform, out_in, with_weight

INITS = (True, False, "gaussian", "pissa", "olora")


@configuration
class LoraConfig(PeftConfig):
    """LoRA's options, with PEFT's names and defaults."""

    r: int = option(8, "rank", least=1)
    lora_alpha: float = option(8, "numerator of the scaling")
    lora_dropout: float = option(0.0, "probability of dropping an element of the adapter's input", least=0, below=1)
    use_rslora: bool = option(False, "divide lora_alpha by sqrt(r) in place of r")
    use_dora: bool = option(False, "train each row's length apart from its direction (DoRA)")
    init_lora_weights: bool | str = option(
        True,
        "True (A Kaiming-uniform, B zero), gaussian (A of deviation 1/r), pissa, olora, or False (A and B random: the "
        "start differs from the base; for tests)",
        choices=INITS,
    )
    rank_pattern: dict[str, int] = option({}, "{end of a path, or a regular expression: r there}", least=1)
    alpha_pattern: dict[str, float] = option({}, "{end of a path, or a regular expression: lora_alpha there}")
    enable_lora: list[bool] | None = option(
        None, "for layers that fuse several projections of the input's width: which are adapted"
    )
    fan_in_fan_out: bool = option(False, "accepted for PEFT's sake; the layer's own layout is what counts")

    peft_type: ClassVar[str] = "LORA"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding")
    usual_targets: ClassVar[dict[str, list[str]]] = QUERY_AND_VALUE
    stores_constants: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        super().__post_init__()
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                check_pattern(name, pattern)
        if self.init_lora_weights == "pissa":
            for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
                if alpha <= 0:
                    raise PeftError(f"PiSSA starts from W / s, so lora_alpha must be positive, got {alpha!r}")
        if self.enable_lora is not None:
            if not any(self.enable_lora):
                raise PeftError(f"enable_lora must name at least one projection to adapt, got {self.enable_lora}")
            if self.use_dora or self.init_lora_weights in ("pissa", "olora"):
                raise PeftError("enable_lora adapts parts of a matrix; DoRA, PiSSA and OLoRA are about whole ones")

    def rank(self, name: str) -> int:
        """r of the module at a path."""
        return pattern_value(self.rank_pattern, name, self.r)

    def scaling(self, name: str) -> float:
        """s of the module at a path."""
        r, alpha = self.rank(name), pattern_value(self.alpha_pattern, name, self.lora_alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def parameter_shapes(self, name: str, kind: str, shape: Shape) -> dict[str, Shape]:
        if kind not in self.kinds or not self.targets(name, kind):
            return {}
        n_out, n_in = shape if kind == "linear" else shape[::-1]
        r = self.rank(name)
        if r > min(n_in, n_out):
            raise PeftError(
                f"{name}: a rank of {r} is larger than the matrix [{n_out}, {n_in}]; "
                f"r must be at most {min(n_in, n_out)}"
            )
        if kind == "embedding":
            if self.init_lora_weights in ("pissa", "olora") or self.enable_lora:
                what = "enable_lora" if self.enable_lora else f"init_lora_weights={self.init_lora_weights!r}"
                raise PeftError(f"{name}: {what} is for linear layers, not for an embedding")
            shapes = {"lora_embedding_A": (r, n_in), "lora_embedding_B": (n_out, r)}
        elif self.enable_lora:
            parts, enabled = len(self.enable_lora), sum(self.enable_lora)
            if n_out != parts * n_in:
                raise PeftError(
                    f"{name}: enable_lora={self.enable_lora} needs a layer that fuses {parts} projections of width "
                    f"{n_in}; this one gives {n_out}"
                )
            shapes = {"lora_A.weight": (enabled * r, n_in), "lora_B.weight": (enabled * n_in, r)}
        else:
            shapes = {"lora_A.weight": (r, n_in), "lora_B.weight": (n_out, r)}
        if self.use_dora:
            shapes["lora_magnitude_vector"] = (n_out,)
        return shapes

    def constant_shapes(self, layers: dict[str, tuple[str, Shape]]) -> dict[str, Shape]:
        """Where PiSSA and OLoRA begin: a copy of both factors."""
        if self.init_lora_weights not in ("pissa", "olora"):
            return {}
        return {
            f"{name}.start_{factor}": self.parameter_shapes(name, *layer)[f"lora_{factor}.weight"]
            for name, layer in layers.items()
            for factor in "AB"
        }

    def adapters(self, layers: dict[str, Module], seeds: dict[str, Seed]) -> dict[str, Adapter]:
        found: dict[str, Adapter] = {}
        for name, layer in layers.items():
            shapes = self.parameter_shapes(name, kind_of(layer), shape_of(layer))
            build = LoraEmbedding if kind_of(layer) == "embedding" else LoraLinear
            found[name] = build(self, name, shapes, layer, seeds[name])
        if self.init_lora_weights == "olora" and any(kind_of(layer) == "conv1d" for layer in layers.values()):
            for part in found.values():
                part.saves_start = True
        return found

    def resolve(self, modules: dict[str, Module]) -> dict[str, Module]:
        found = super().resolve(modules)
        for what in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, what):
                if not any(pattern_value({pattern: True}, name, False) for name in found):
                    raise PeftError(
                        f"{what}: {pattern!r} matches none of the adapted modules, such as {', '.join(list(found)[:3])}"
                    )
        return found

    def saved_as(self, parts: list[Any]) -> LoraConfig:
        """That of the plain adapter of a higher rank which parts of a fused layer, or a saved start, equal."""
        start = any(getattr(part, "saves_start", False) for part in parts)
        times = 2 if start else sum(self.enable_lora or [True])
        factor = math.sqrt(times) if self.use_rslora else times  # keeps alpha/r, or alpha/sqrt(r)
        return self.replace(
            r=self.r * times,
            lora_alpha=self.lora_alpha * factor,
            rank_pattern={k: v * times for k, v in self.rank_pattern.items()},
            alpha_pattern={k: v * factor for k, v in self.alpha_pattern.items()},
            enable_lora=None,
            init_lora_weights=True if start else self.init_lora_weights,
        )

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "enable_lora"}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> LoraConfig:
        init = options.get("init_lora_weights", True)
        if init in ("eva", "orthogonal", "mica"):  # a start, of which a trained file holds nothing
            options = {**options, "init_lora_weights": True}
        elif init not in INITS:
            raise PeftError(
                f"the adapter was started with init_lora_weights={init!r}, "
                "which changes the base's weights in a way its file does not say"
            )
        return super().from_dict(options)


class LoraLinear(Adapter):
    """LoRA around a linear layer (Linear, GPT-2's Conv1D, or a quantized one).

    lora_A [r, in] and lora_B [out, r]; lora_magnitude_vector [out] with DoRA; with `enable_lora` of k parts lora_A
    [k r, in] and lora_B [k width, r].
    """

    frozen = ("start_A", "start_B")  # where PiSSA and OLoRA began
    saves_start = False  # whether the start goes into the file with the trained factors, as one adapter of rank 2r

    def __init__(self, config: LoraConfig, name: str, shapes: dict[str, Shape], layer: Module, seed: Seed):
        super().__init__(shapes, layer, seed)
        self.scaling, self.dropout = config.scaling(name), config.lora_dropout
        self.enable_lora = config.enable_lora
        A, B = self.lora_A, self.lora_B
        self.factorise = {"pissa": _pissa, "olora": _olora}.get(config.init_lora_weights)
        if self.factorise:
            self.start_A, self.start_B = (Parameter(p.data, requires_grad=False) for p in (A, B))
        if seed is None:
            return
        if self.factorise:
            self._begin(layer)
            A.data, B.data = self.start_A.data.copy(), self.start_B.data.copy()
        else:
            generator = np.random.default_rng(seed)
            if config.init_lora_weights == "gaussian":
                fill(A, generator.standard_normal(A.shape, np.float32) / np.float32(config.rank(name)))
            else:
                fill(A, kaiming_uniform(generator, A.shape))
            if config.init_lora_weights is False:
                fill(B, kaiming_uniform(generator, B.shape))
        if config.use_dora:
            self.lora_magnitude_vector.data = self._row_norms(layer)

    def _begin(self, base: Module) -> None:
        """Compute the start of PiSSA or OLoRA from the base."""
        W = to_numpy(out_in(base, dense_weight(base))).astype(self.lora_A.dtype)
        with one_blas_thread():  # thousands of small products, for each of which a second thread would only wait
            start = self.factorise(W, self.lora_A.shape[0], self.scaling)
        fill(self.start_A, start[0])
        fill(self.start_B, start[1])

    def loading(self, base: Module) -> None:
        """Compute the start once more, from the same base. Raises PeftError where PEFT's is not the one that is needed."""
        if self.saves_start:
            raise PeftError(
                "init_lora_weights='olora' on GPT-2's [in, out] layers: PEFT factorises the transposed weights there, and "
                "does not start at the base; only files that hold no such start are read"
            )
        if self.factorise:
            self._begin(base)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A [R, in], B [out, R]) with W' = W + s B A; R is r, 2r with a start, r per part of a fused layer."""
        A, B = self.lora_A, self.lora_B
        if "start_A" in self.__dict__:
            return F.cat([A, self.start_A], axis=0), F.cat([B, -self.start_B], axis=1)
        if self.enable_lora:
            return A, self._block_diagonal(B)
        return A, B

    def _block_diagonal(self, B: Tensor) -> Tensor:
        """B's parts [k * width, r], each in its projection's rows and in columns of its own: [parts * width, k * r]."""
        xp, r, k = xp_of(B.data), B.shape[1], sum(self.enable_lora)
        width, rows, i = B.shape[0] // k, [], 0
        for enabled in self.enable_lora:
            if not enabled:
                rows.append(Tensor(xp.zeros((width, k * r), B.dtype)))
                continue
            row = [
                Tensor(xp.zeros((width, i * r), B.dtype)),
                B[i * width : (i + 1) * width],
                Tensor(xp.zeros((width, (k - 1 - i) * r), B.dtype)),
            ]
            rows.append(F.cat(row, axis=1))
            i += 1
        return F.cat(rows, axis=0)

    def forward(self, x: Tensor, inner: Callable[[Any], Tensor], base: Module, rng: Rng | None) -> Tensor:
        """x [..., in] -> [..., out]."""
        A, B = self.factors()
        z = F.dropout(x, self.dropout, rng) if rng is not None and self.dropout else x
        h = F.linear(z, A)  # [..., R]
        delta = F.linear(h if self.scaling == 1 else h * self.scaling, B)  # [..., out]
        y = inner(x)
        if "lora_magnitude_vector" not in self.keys:
            return y + delta
        # DoRA (eq. 5): m/n (W z + s B A z), of which y already holds W x and the bias. As in PEFT, both terms see z.
        scale = self.lora_magnitude_vector / self._row_norms(base)
        bias = getattr(base, "bias", None)
        frozen = y if z is x else base(z)
        frozen = frozen if bias is None else frozen - bias
        return y + delta + (scale - 1) * (frozen + delta)  # of the two, backward keeps the sum alone

    def delta_weight(self) -> Array:
        """s B A, [out, in]."""
        A, B = self.factors()
        return (B.data @ A.data) * B.dtype.type(self.scaling)

    def _row_norms(self, base: Module) -> Array:
        """||W + s B A|| of each output, [out]: a constant, no gradient passes through it (DoRA, section 4.3)."""
        if isinstance(base, Linear4bit):  # a few rows at a time: the weight is never there as a whole
            (A, B), xp = self.factors(), xp_of(base.weight.data)
            tiles = ((rows, W + B.data[rows] @ (A.data * self.scaling)) for rows, W in base.tiles())
            return xp.concatenate([xp.sqrt((V * V).sum(axis=1)) for _, V in tiles])
        V = out_in(base, dense_weight(base)) + self.delta_weight()
        return xp_of(V).sqrt((V * V).sum(axis=1))

    def merge(self, layer: Module, base: Module) -> Module:
        """W' = W + s B A; with DoRA each row of it times m / ||W0 + s B A||, W0 being the base's weight."""
        W = out_in(layer, dense_weight(layer)) + self.delta_weight()
        if "lora_magnitude_vector" in self.keys:
            W *= (self.lora_magnitude_vector.data / self._row_norms(base))[:, None]
        return with_weight(layer, out_in(layer, W))

    def saved(self) -> dict[str, Parameter]:
        found = super().saved()
        if self.enable_lora or self.saves_start:
            A, B = self.factors()
            found |= {"lora_A.weight": Parameter(A.data), "lora_B.weight": Parameter(B.data)}
        return found


class LoraEmbedding(Adapter):
    """LoRA around an embedding: row i of W [V, d] becomes W_i + s (B A_i), with A_i the i-th column of A [r, V].

    As in PEFT, lora_dropout does not act here.
    """

    def __init__(self, config: LoraConfig, name: str, shapes: dict[str, Shape], layer: Module, seed: Seed):
        super().__init__(shapes, layer, seed)
        self.scaling = config.scaling(name)
        if seed is None:
            return
        A, B = self.lora_embedding_A, self.lora_embedding_B
        generator = np.random.default_rng(seed)
        fill(B, generator.standard_normal(B.shape, np.float32))  # A is zero, as in loralib: it is looked up
        if config.init_lora_weights is False:
            fill(A, generator.standard_normal(A.shape, np.float32))
        if config.use_dora:
            self.lora_magnitude_vector.data = self._row_norms(layer)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A [r, V], B [d, r])."""
        return self.lora_embedding_A, self.lora_embedding_B

    def forward(self, ids: Array, inner: Callable[[Any], Tensor], base: Module, rng: Rng | None) -> Tensor:
        """ids [...] -> [..., d]."""
        A, B = self.factors()
        delta = F.linear(F.embedding(ids, A.transpose()) * self.scaling, B)
        if "lora_magnitude_vector" not in self.keys:
            return inner(ids) + delta
        return (inner(ids) + delta) * (self.lora_magnitude_vector / self._row_norms(base))

    delta_weight = LoraLinear.delta_weight
    _row_norms = LoraLinear._row_norms
    merge = LoraLinear.merge


def _pissa(W: np.ndarray, r: int, scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """A = sqrt(S) Vᵀ, B = U sqrt(S) of the r largest singular values of W / s (PiSSA, eq. 2 and 3)."""
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    root = np.sqrt(S[:r] / S.dtype.type(scaling))
    return root[:, None] * Vt[:r], U[:, :r] * root


def _olora(W: np.ndarray, r: int, scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """A = R[:r], B = Q[:, :r] of W = Q R (OLoRA, section 3)."""
    Q, R = np.linalg.qr(W)
    return np.ascontiguousarray(R[:r]), np.ascontiguousarray(Q[:, :r])
