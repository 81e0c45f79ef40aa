"""Several LoRA adapters combined into one, with weights.

    cat     Σ w_i s_i B_i A_i exactly: the factors side by side, rank Σ r_i
    svd     the best approximation of that sum of rank `svd_rank`
    linear  A = Σ sqrt(w_i s_i) A_i,  B = Σ sqrt(w_i s_i) B_i: cheap, but its product has cross terms B_i A_j
    ties    of trimmed factors, number by number, the mean of those w_i t_i whose t_i has the elected sign
            Yadav et al. 2023, arXiv:2306.01708, algorithm 1
    dare_linear, dare_ties   the same on factors of which a random part is dropped and the rest rescaled
                             Yu et al. 2023, arXiv:2311.03099, section 3.2
    magnitude_prune          linear on trimmed factors

`ties`, `dare_linear`, `dare_ties` and `magnitude_prune` may end in `_svd`: then the products s_i B_i A_i are combined,
and the result is decomposed. These are PEFT's names and rules. The new adapter has scaling 1, whatever the scalings
of its parts, so that one adapter with weight 1 gives itself (also with rsLoRA).
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from ..backend import one_blas_thread, to_numpy
from ..options import check, configuration, option
from .config import PeftError
from .layer import TrainedCopy
from .targets import listed
from .weights import fill

RULES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = ("cat", "svd", *RULES, *(f"{rule}_svd" for rule in RULES[1:]))
SIGNS = ("total", "frequency")
Arrays = tuple[np.ndarray, ...]


@configuration
class Combination:
    """How adapters are combined. Raises PeftError for options that do not go together."""

    combination_type: str = option("svd", "one of the names above (dare is dare_linear)", choices=COMBINATIONS)
    svd_rank: int | None = option(None, "rank of svd and types that end so; None: the largest of the parts'", least=1)
    density: float | None = option(None, "part of the values that trimming or dropping keeps", above=0, most=1)
    majority_sign_method: str = option("total", "ties: the sign of the sum, or that most values have", choices=SIGNS)
    seed: int = option(0, "of what dare drops", least=0)

    def __post_init__(self) -> None:
        self.combination_type = "dare_linear" if self.combination_type == "dare" else self.combination_type
        check(self, PeftError)
        kind = self.combination_type
        if kind in ("cat", "svd", "linear") and self.density is not None:
            raise PeftError(f"{kind} keeps all values: it has no density")
        if kind not in ("cat", "svd", "linear") and self.density is None:
            raise PeftError(f"{kind} needs a density in (0, 1], the part of the values to keep")
        if self.svd_rank is not None and not kind.endswith("svd"):
            raise PeftError(f"{kind} has no svd_rank; svd and the types that end in _svd have")
        self.generator = np.random.default_rng(self.seed)

    def factors(self, path: str, A: Arrays, B: Arrays, scalings: tuple, weights: tuple) -> Arrays:
        """(A [r, in], B [out, r]) of one layer, from each adapter's A_i [r_i, in], B_i [out, r_i], s_i and w_i.

        Raises PeftError for a rank Σ r_i that the matrix does not have (cat), and for different r_i (`RULES`).
        """
        kind = self.combination_type
        if kind == "cat":  # A = [w_1 s_1 A_1; w_2 s_2 A_2; ...], B = [B_1, B_2, ...]
            r, full = sum(map(len, A)), min(A[0].shape[1], B[0].shape[0])
            if r > full:
                raise PeftError(f"cat gives {path} a rank of {r}, but its matrix has one of {full} at most; use svd")
            A = tuple(a * np.float32(w * s) for a, w, s in zip(A, weights, scalings))
            return np.concatenate(A), np.concatenate(B, axis=1)
        if kind in RULES:  # each with sqrt(w_i s_i), the A with its sign
            if len({a.shape for a in A}) > 1:
                raise PeftError(f"{kind} adds factors, but at {path} the ranks are {[*map(len, A)]}; use cat or svd")
            ws = [w * s for w, s in zip(weights, scalings)]
            roots = [math.sqrt(abs(w)) for w in ws]
            return self.combine(A, [math.copysign(r, w) for r, w in zip(roots, ws)]), self.combine(B, roots)
        total = self.combine([np.float32(s) * (b @ a) for a, b, s in zip(A, B, scalings)], weights)
        rank = min(self.svd_rank or max(map(len, A)), *total.shape)
        with one_blas_thread():
            U, S, Vt = np.linalg.svd(total, full_matrices=False)
        return Vt[:rank], U[:, :rank] * S[:rank]

    def combine(self, tensors: Any, weights: Any) -> np.ndarray:
        """Σ w_i t_i of tensors of one shape, trimmed or thinned; ties: the mean over those of the elected sign."""
        rule = self.combination_type.removesuffix("_svd")
        t = np.stack([self.thin(rule, x) for x in tensors])  # [n, ...]
        weighted = t * np.float32(weights).reshape(-1, *[1] * (t.ndim - 1))
        if not rule.endswith("ties"):
            return weighted.sum(axis=0)
        votes = t if self.majority_sign_method == "total" else np.sign(t)
        agree = np.sign(t) == np.where(votes.sum(axis=0) >= 0, 1, -1)
        return ((weighted * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)).astype(np.float32)

    def thin(self, rule: str, t: np.ndarray) -> np.ndarray:
        """t [...] with its int(density * size) largest |values| alone; dare: with random ones alone, rescaled."""
        if rule.startswith("dare"):
            return t * (self.generator.random(t.shape, np.float32) < self.density) / np.float32(self.density)
        if rule not in ("ties", "magnitude_prune"):
            return t
        size, n = np.abs(t).reshape(-1), int(self.density * t.size)
        least = np.partition(size, t.size - n)[t.size - n] if n else np.inf
        kept = size > least
        kept[np.flatnonzero(size == least)[: n - kept.sum()]] = True  # of equal ones the first
        return t * kept.reshape(t.shape)


def add_weighted_adapter(
    model: Any, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "svd", **more: Any
) -> None:
    """Add to a PeftModel the adapter `adapter_name` that combines others. It is not active yet.

    Args:
        adapters, weights: which, and with what weight each; weights may be negative.
        combination_type, and further options: see `Combination`.

    Raises PeftError for adapters that cannot be combined so: other methods than LoRA, DoRA, differing ranks (linear and
    ties, which add factors elementwise), ranks whose sum is larger than a matrix has (cat); and for an option that the
    type does not have. Of one adapter nothing is taken away, as in PEFT: density and svd_rank do not count then.
    """
    how, adapters, weights = Combination(combination_type, **more), listed("adapters", adapters), [float(w) for w in weights]
    if len(adapters) == 1 and combination_type != "svd":
        how = Combination("linear")  # of one nothing is taken away
    if not adapters or len(adapters) != len(weights):
        raise PeftError(f"{len(adapters)} adapters were given {len(weights)} weights; each needs one")
    if not all(math.isfinite(w) for w in weights):
        raise PeftError(f"the weights must be finite, not {weights}")
    for name in adapters:
        model._known(name)
        config = model.peft_config[name]
        beside = ("modules_to_save", "trainable_token_indices", "use_dora")
        used = [n for n in beside if getattr(config, n)] if config.peft_type == "LORA" else [config.peft_type]
        used += ["modules_to_save"] * any(isinstance(part, TrainedCopy) for _, part in model.parts(name))
        if used:
            raise PeftError(f"only plain LoRA adapters can be combined; {name!r} uses {used[0]}")
    combined: dict[str, Arrays] = {}
    for path, layer in model.layers.items():
        mine = [(layer.adapters[n], w) for n, w in zip(adapters, weights) if n in layer.adapters]
        parts = [(*(to_numpy(f.data) for f in a.factors()), a.scaling, w) for a, w in mine]
        if parts:
            combined[path] = how.factors(path, *zip(*parts))
    ranks = {path: A.shape[0] for path, (A, _) in combined.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != r}
    config = model.peft_config[adapters[0]].replace(  # scaling 1 everywhere
        r=r, lora_alpha=r, rank_pattern=others, alpha_pattern=dict(others), target_modules=sorted(ranks),
        exclude_modules=None, layers_to_transform=None, layers_pattern=None, use_rslora=False, enable_lora=None,
        init_lora_weights=True,
    )  # fmt: skip
    model.add_adapter(adapter_name, config, seed=None)
    for path, adapter in model.parts(adapter_name):
        for parameter, values in zip(adapter.trained().values(), combined[path]):
            fill(parameter, values)
    model.mark_start(adapter_name)
