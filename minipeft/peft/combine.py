"""Several LoRA adapters combined into one, with weights.

    cat     Σ w_i s_i B_i A_i exactly: the factors side by side, rank Σ r_i
    svd     the best approximation of that sum of rank `svd_rank`
    linear  A = Σ sqrt(w_i s_i) A_i,  B = Σ sqrt(w_i s_i) B_i: cheap, but its product has cross terms B_i A_j
    ties    the same on trimmed factors, adding only what agrees with the sign that wins
            Yadav et al. 2023, arXiv:2306.01708, algorithm 1
    dare_linear, dare_ties   the same on factors of which a random part is dropped and the rest rescaled
                             Yu et al. 2023, arXiv:2311.03099, section 3.2
    magnitude_prune          linear on trimmed factors

`ties`, `dare_linear`, `dare_ties` and `magnitude_prune` may end in `_svd`: then the products s_i B_i A_i are combined,
and the result is factorised. These are PEFT's names and rules. The new adapter has scaling 1, whatever the scalings
of its parts, so that one adapter with weight 1 gives itself (also with rsLoRA).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import one_blas_thread, to_numpy
from .config import PeftError
from .weights import fill

RULES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = ("cat", "svd", *RULES, *(f"{rule}_svd" for rule in RULES[1:]))


def add_weighted_adapter(
    model: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
) -> None:
    """Add to a PeftModel the adapter `adapter_name` that combines others. It is not active yet.

    Args:
        adapters, weights: which, and with what weight each; weights may be negative.
        combination_type: one of the names above ("dare" is "dare_linear").
        svd_rank: of the result of svd and the types that end so; by default the largest of the parts' ranks.
        density: the part of the values that trimming or dropping keeps (ties, dare, magnitude_prune), in (0, 1].
        majority_sign_method: "total" (the sign of the sum) or "frequency" (of the most values) wins in ties.
        seed: of what dare drops.

    Raises PeftError for adapters that cannot be combined so: other methods than LoRA, DoRA, differing ranks (linear and
    ties, which add factors elementwise), ranks whose sum is larger than a matrix has (cat); and for an option that the
    type does not have.
    """
    kind = "dare_linear" if combination_type == "dare" else combination_type
    _check(model, adapters, weights, kind, svd_rank, density, majority_sign_method)
    rule, generator = kind.removesuffix("_svd"), np.random.default_rng(seed)

    def combine(tensors: list[np.ndarray], ws: list[float]) -> np.ndarray:
        return _combine(rule, tensors, ws, density, majority_sign_method, generator)

    combined: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for path, layer in model.layers.items():
        parts = [(layer.adapters[n], w) for n, w in zip(adapters, weights) if n in layer.adapters]
        if not parts:
            continue
        A, B = ([to_numpy(a.factors()[i].data) for a, _ in parts] for i in (0, 1))
        scalings, ws = [a.scaling for a, _ in parts], [w for _, w in parts]
        if kind == "cat":
            combined[path] = _side_by_side(path, A, B, scalings, ws)
        elif kind in RULES:
            combined[path] = _factors(kind, path, A, B, scalings, ws, combine)
        else:
            combined[path] = _products(A, B, scalings, ws, combine, svd_rank)
    _add(model, adapter_name, model.peft_config[adapters[0]], combined)


def _check(
    model: Any, adapters: list[str], weights: list[float], kind: str, svd_rank: Any, density: Any, majority: str
) -> None:
    """Raises PeftError for what `add_weighted_adapter` cannot do."""
    if kind not in COMBINATIONS:
        raise PeftError(f"combination_type must be one of {', '.join(COMBINATIONS)}, not {kind!r}")
    if not adapters or len(adapters) != len(weights):
        raise PeftError(f"{len(adapters)} adapters were given {len(weights)} weights; each needs one")
    if not all(math.isfinite(w) for w in weights):
        raise PeftError(f"the weights must be finite, not {weights}")
    if kind.removesuffix("_svd") in ("cat", "svd", "linear"):
        if density is not None:
            raise PeftError(f"{kind} keeps all values: it has no density")
    elif density is None or not 0 < density <= 1:
        raise PeftError(f"{kind} needs a density in (0, 1], the part of the values to keep, not {density}")
    if svd_rank is not None and not kind.endswith("svd"):
        raise PeftError(f"{kind} has no svd_rank; svd and the types that end in _svd have")
    if svd_rank is not None and (type(svd_rank) is not int or svd_rank < 1):
        raise PeftError(f"svd_rank must be a positive integer, not {svd_rank!r}")
    if majority not in ("total", "frequency"):
        raise PeftError(f"majority_sign_method must be 'total' or 'frequency', not {majority!r}")
    for name in adapters:
        model._known(name)
        config, what = model.peft_config[name], ""
        if config.peft_type != "LORA":
            what = config.peft_type
        elif config.modules_to_save:
            what = "modules_to_save"
        elif config.use_dora:
            what = "DoRA"
        if what:
            raise PeftError(f"only plain LoRA adapters can be combined; {name!r} uses {what}")


Factors = tuple[np.ndarray, np.ndarray]  # A [r, in], B [out, r]
Combine = Callable[[list[np.ndarray], list[float]], np.ndarray]


def _side_by_side(
    path: str, A: list[np.ndarray], B: list[np.ndarray], scalings: list[float], weights: list[float]
) -> Factors:
    """A = [w_1 s_1 A_1; w_2 s_2 A_2; ...], B = [B_1, B_2, ...]."""
    r, full = sum(a.shape[0] for a in A), min(A[0].shape[1], B[0].shape[0])
    if r > full:
        raise PeftError(
            f"cat gives {path} a rank of {r}, but its matrix has one of {full} at most; svd gives one of svd_rank"
        )
    return np.concatenate([a * np.float32(w * s) for a, w, s in zip(A, weights, scalings)]), np.concatenate(B, axis=1)


def _factors(
    kind: str,
    path: str,
    A: list[np.ndarray],
    B: list[np.ndarray],
    scalings: list[float],
    weights: list[float],
    combine: Combine,
) -> Factors:
    """The A combined and the B combined, each with sqrt(w_i s_i); the A with its sign."""
    if len({a.shape for a in A}) > 1:
        raise PeftError(
            f"{kind} adds factors elementwise, but at {path} the ranks are {[a.shape[0] for a in A]}; use cat or svd"
        )
    ws = [w * s for w, s in zip(weights, scalings)]
    roots = [math.sqrt(abs(w)) for w in ws]
    return combine(A, [math.copysign(r, w) for r, w in zip(roots, ws)]), combine(B, roots)


def _products(
    A: list[np.ndarray],
    B: list[np.ndarray],
    scalings: list[float],
    weights: list[float],
    combine: Combine,
    svd_rank: int | None,
) -> Factors:
    """A = Vᵀ and B = U S of the largest singular values of the s_i B_i A_i combined."""
    total = combine([np.float32(s) * (b @ a) for a, b, s in zip(A, B, scalings)], weights)
    rank = min(svd_rank or max(a.shape[0] for a in A), *total.shape)
    with one_blas_thread():
        U, S, Vt = np.linalg.svd(total, full_matrices=False)
    return Vt[:rank], U[:, :rank] * S[:rank]


def _add(model: Any, adapter_name: str, like: Any, factors: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Add an adapter that holds these factors (A, B) by path, with scaling 1."""
    ranks = {path: A.shape[0] for path, (A, _) in factors.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != r}
    config = like.replace(
        r=r, lora_alpha=r, rank_pattern=others, alpha_pattern=dict(others), target_modules=sorted(ranks),
        exclude_modules=None, layers_to_transform=None, layers_pattern=None, use_rslora=False, enable_lora=None,
        init_lora_weights=True,
    )  # fmt: skip
    model.add_adapter(adapter_name, config, seed=None)
    for path, adapter in model.parts(adapter_name):
        for parameter, values in zip(adapter.trained().values(), factors[path]):
            fill(parameter, values)
    model.mark_start(adapter_name)


def _combine(
    rule: str,
    tensors: list[np.ndarray],
    weights: list[float],
    density: float | None,
    majority: str,
    generator: np.random.Generator,
) -> np.ndarray:
    """Σ w_i t_i of trimmed or thinned tensors; in ties the mean over those that agree with the winning sign."""
    thin: Callable[[np.ndarray], np.ndarray] = lambda t: t  # noqa: E731
    if rule in ("ties", "magnitude_prune"):
        thin = lambda t: _trim(t, density)  # noqa: E731
    elif rule in ("dare_linear", "dare_ties"):
        thin = lambda t: t * (generator.random(t.shape, np.float32) < density) / np.float32(density)  # noqa: E731
    t = np.stack([thin(x) for x in tensors])  # [n, ...]
    weighted = t * np.float32(weights).reshape(-1, *[1] * (t.ndim - 1))
    if not rule.endswith("ties"):
        return weighted.sum(axis=0)
    elected = np.where((t if majority == "total" else np.sign(t)).sum(axis=0) >= 0, 1, -1)
    agree = np.sign(t) == elected
    return ((weighted * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)).astype(np.float32)


def _trim(t: np.ndarray, density: float) -> np.ndarray:
    """t with all but its int(density * size) largest values, by magnitude, set to zero."""
    kept = np.zeros(t.size, bool)
    kept[np.argsort(-np.abs(t).reshape(-1), kind="stable")[: int(density * t.size)]] = True
    return t * kept.reshape(t.shape)
