"""How many numbers does fine-tuning need? Training in a random subspace, and the spectrum of the full update.

    w = w0 + P z            w, w0 [D] all weights and their start, z [d] what is trained, from 0; P [D, d] random, fixed
    P[i, h(i)] = s(i) / sqrt(n_h(i))       every weight i has one coordinate h(i) and a sign s(i); n_j weights share j
    d90 = the smallest d whose accuracy reaches 90 % of what full fine-tuning gains over the start

h cuts a random permutation of the weights into d parts whose sizes differ by one at most, so Pᵀ P = I exactly: a step in z
is as long as the step in w that it makes. Signs are independent, so E ||Pᵀ v||² = d/D ||v||² for every v: of a gradient
the subspace keeps, on average, the share of a dense Gaussian one. At d = D, P is a permutation with signs, under which Adam
is the same: the subspace is full fine-tuning. It takes D integers and D signs, where a dense P of 1.4M x 1000 takes 5.6 GB.

The update W - W0 of full fine-tuning has singular values s_1 ≥ s_2 ≥ ...; its rank at 90 % is the smallest r for which
Σ_{i ≤ r} s_i² ≥ 0.9 Σ s_i², against that of Gaussian noise of the same shape; and the accuracy where of each matrix only the
best approximation of rank r (Eckart and Young 1936) is added to W0.

Sources: Li et al. 2018, Measuring the Intrinsic Dimension of Objective Landscapes (arXiv:1804.08838); Aghajanyan,
Zettlemoyer and Gupta 2020, Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning
(arXiv:2012.13255). The projection: Li et al. 2025, Uni-LoRA (arXiv:2506.00799), with the signs of the count sketch
(Weinberger et al. 2009, Feature Hashing for Large Scale Multitask Learning).

Departures: P is sparse where theirs is dense or Fastfood; d90 is of the gain over the start, theirs of the accuracy
itself; no scale of each layer is learned (their SAID); d grows by factors of eight, and d90 is read between them on a
non-decreasing curve; the gradient is clipped by its norm before it is projected, equally for every d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import Array, asarray, to_numpy, xp_of
from ..evaluation.intervals import Estimate, mean
from ..experiments.rows import Row
from ..experiments.shipped import base, rounded
from ..nn.module import Parameter
from ..nn.transformer import Transformer
from ..peft.methods import FULL
from ..train.finite import Finite
from ..train.optim import Adam
from . import data
from .mechanisms import ByItem, accuracy, best_rate, curve, geometric, graded, judged, loss_on, steps_of, those, train
from .protocol import LEAST, SEEDS, TUNING
from .register import UNTESTABLE, Verdict, claim

SHARE = 0.9  # of a gain, of a squared norm
GRID = tuple(2**k for k in range(4, 20, 3))
RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # of the part of the update that is applied; 0: the norms' weights alone
LOW, RANK, NOISE = 1 / 100, 16, 1 / 2  # what is called low: d90 / D; a rank that learns the task; rank over the noise's


@dataclass(frozen=True)
class Subspace:
    """A cell: training in d dimensions from one start.

    start    "base", or "random": the same shape with weights drawn by the seed
    d        0: all D
    """

    start: str
    d: int = 0
    task: str = "source"
    examples: int = 500
    epochs: int = 4
    batch_size: int = 8
    validation: int = 256
    items: int = 768
    seeds: tuple[int, ...] = SEEDS


def runs() -> list[Subspace]:
    """All cells."""
    return [Subspace(start, d) for start in ("base", "random") for d in (*GRID, 0)]


# ----------------------------------------------------------------------------------------------------------- projection


class Projection:
    """P [D, d] of the docstring above: `up(z)` is P z, `down(v)` is Pᵀ v."""

    def __init__(self, D: int, d: int, seed: int, like: Array):
        if not 1 <= d <= D:
            raise ValueError(f"a subspace of {D} weights has between 1 and {D} dimensions, not {d}")
        rng, xp = np.random.default_rng(seed), xp_of(like)
        self.D, self.d, self.rows = D, d, -(-D // d)
        self.order = asarray(rng.permutation(D), xp)  # weight order[k] has the coordinate k mod d
        self.signs = asarray(rng.choice(np.float32([-1, 1]), D), xp)
        sizes = np.full(d, self.rows) - (np.arange(d) >= (D - 1) % d + 1)
        self.scale = asarray((1 / np.sqrt(sizes)).astype(np.float32), xp)

    def up(self, z: Array) -> Array:
        """[d] -> [D]."""
        w = xp_of(z).empty(self.D, z.dtype)
        w[self.order] = xp_of(z).tile(z * self.scale, self.rows)[: self.D]
        return w * self.signs

    def down(self, v: Array) -> Array:
        """[D] -> [d]."""
        padded = xp_of(v).zeros(self.rows * self.d, v.dtype)
        padded[: self.D] = (v * self.signs)[self.order]
        return padded.reshape(self.rows, self.d).sum(axis=0) * self.scale


class SubspaceAdam(Adam):
    """Adam on z [d], where the parameters are w0 + P z: their gradient g is taken to Pᵀ g, the step in z back to them."""

    def __init__(self, params: Sequence[Parameter], d: int, lr: float, seed: int = 0):
        super().__init__(params, lr)
        self.parameters = list(params)
        first = self.parameters[0].data
        self.projection = Projection(sum(p.size for p in self.parameters), d, seed, first)
        self.start = [p.data.copy() for p in self.parameters]
        self.z = Parameter(xp_of(first).zeros(d, first.dtype))
        self.inner = Adam([self.z], lr)

    def step(self, finite: Finite | None = None) -> None:
        """One step of Adam on z, then w = w0 + P z; none where the numbers of `finite` are not."""
        if finite is not None and not finite:
            return
        xp = xp_of(self.z.data)
        self.z.grad = self.projection.down(xp.concatenate([p.grad.reshape(-1) for p in self.parameters]))
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]  # which the schedule sets
        self.inner.step()
        moved, at = self.projection.up(self.z.data), 0
        for p, start in zip(self.parameters, self.start):
            p.data[...] = start + moved[at : at + p.size].reshape(p.shape)
            p._version += 1
            at += p.size


# -------------------------------------------------------------------------------------------------------------- spectra


def rank_at(singular: Sequence[float], share: float = SHARE) -> int:
    """The smallest r for which the first r singular values hold this share of the squared norm; 0 where all are 0."""
    squares = np.cumsum(np.square(np.asarray(singular, np.float64)))
    return 0 if squares[-1] == 0 else int(np.searchsorted(squares, share * squares[-1] * (1 - 1e-12))) + 1


def update_spectrum(before: Any, after: Any, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Of each matrix that changed: its shape, the rank that holds 90 % of the update's squared norm, and of noise's."""
    rng, old, found = np.random.default_rng(seed), before.state_dict(), {}
    for path, new in after.state_dict().items():
        if new.ndim == 2 and (update := to_numpy(new) - to_numpy(old[path])).any():
            noise = rng.standard_normal(update.shape)
            rank, other = (rank_at(np.linalg.svd(x, compute_uv=False)) for x in (update, noise))
            found[path] = {"shape": list(update.shape), "rank": rank, "noise": other}
    return found


def truncated(before: Any, after: Any, ranks: Sequence[int]) -> Iterator[Any]:
    """For each rank the model before, with the best approximation of that rank of each matrix's update; vectors as they are
    after."""
    old, new = before.state_dict(), after.state_dict()
    factors = {
        path: np.linalg.svd(to_numpy(w) - to_numpy(old[path]), full_matrices=False) for path, w in new.items() if w.ndim == 2
    }
    for r in ranks:
        model = before.copy()
        state = dict(new)
        for path, (U, s, V) in factors.items():
            start = to_numpy(old[path])
            state[path] = asarray((start + (U[:, :r] * s[:r]) @ V[:r]).astype(start.dtype), xp_of(new[path]))
        model.load_state_dict(state)
        yield model


# ------------------------------------------------------------------------------------------------------------------ run


def run(settings: Subspace) -> Row:
    """The row of a cell, by seed where it is a list.

    D, rate, rates       weights; the tuned rate, and [[rate, loss on validation], ...] of those tried
    before, accuracy     of the start, and of the trained model, on the test items; None where training diverged
    spectra, applied     of the full model: `update_spectrum`, and the accuracy of `truncated` at each of RANKS
    """
    s, (shipped, tokenizer) = settings, base()
    steps, pad = steps_of(s.examples, s.epochs, s.batch_size), tokenizer.pad_token_id
    validation = data.encode(data.asked(s.task, "validation", s.validation))

    def begin(seed: int) -> Any:
        return (shipped if s.start == "base" else Transformer(shipped.config, seed=seed)).copy().requires_grad_(True)

    def trained(rate: float, seed: int) -> Any:
        model = begin(seed)
        optimizer = SubspaceAdam(model.parameters(), s.d, rate, seed) if s.d else None
        found = train(
            model, data.drawn(s.task, s.examples, seed), rate, steps, s.batch_size, seed, pad_token_id=pad, optimizer=optimizer
        )
        return None if found is None else model

    def loss(rate: float) -> float | None:
        model = trained(rate, TUNING)
        return None if model is None else loss_on(model, validation, pad)

    D = sum(p.size for p in shipped.parameters())
    # a step of Adam in z moves each weight by rate / sqrt(D/d): the usual rate, scaled, on the lattice of powers of 2
    rate, tried = best_rate(loss, FULL * 2 ** round(math.log2(D / (s.d or D)) / 2), LEAST)
    row: Row = {"D": D, "rate": rate, "rates": curve(tried), "before": [], "accuracy": []}
    if not s.d:
        row |= {"spectra": [], "applied": []}
    for seed in s.seeds:
        model, start = trained(rate, seed), begin(seed)
        row["before"].append(accuracy(start, s.task, "test", s.items))
        row["accuracy"].append(None if model is None else accuracy(model, s.task, "test", s.items))
        if not s.d and model is not None:
            row["spectra"].append(update_spectrum(start, model, seed))
            row["applied"].append([accuracy(part, s.task, "test", s.items) for part in truncated(start, model, RANKS)])
    return {key: value if key in ("rate", "rates") else rounded(value) for key, value in row.items()}  # a rate may be small


# ----------------------------------------------------------------------------------------------------------- statistics


def non_decreasing(values: Sequence[float]) -> np.ndarray:
    """The closest non-decreasing sequence, in least squares: neighbors that violate are pooled (Ayer et al. 1955)."""
    blocks: list[list[float]] = []  # [mean, count]
    for value in values:
        blocks.append([float(value), 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    return np.concatenate([np.full(int(n), a) for a, n in blocks])


def log_size_at(sizes: Sequence[int], scores: Sequence[float], before: float, full: float, share: float = SHARE) -> float | None:
    """log2 of the size at which the scores reach `before` + share (`full` - `before`): straight lines in log2 size through
    their non-decreasing curve. The smallest size where it reaches already; None where nothing is gained or reached."""
    target, curve, logs = before + share * (full - before), non_decreasing(scores), np.log2(sizes)
    reached = np.flatnonzero(curve >= target - 1e-12)
    if full <= before or not reached.size:
        return None
    i = int(reached[0])
    if not i:
        return float(logs[0])
    return float(logs[i - 1] + (logs[i] - logs[i - 1]) * (target - curve[i - 1]) / (curve[i] - curve[i - 1]))


def d90(rows: Sequence[Mapping[str, Any]], start: str) -> list[float | None]:
    """log2 d90 of each seed."""
    mine = sorted((row for row in rows if row["start"] == start), key=lambda row: row["d"] or row["D"])
    sizes, found = [row["d"] or row["D"] for row in mine], []
    for i, before in enumerate(mine[-1]["before"]):
        scores = [before if row["accuracy"][i] is None else row["accuracy"][i] for row in mine]
        found.append(log_size_at(sizes, scores, before, scores[-1]))
    return found


EXPERIMENT = ByItem("intrinsic_dimension", run, runs, tolerance=0.1)


def sized(e: Estimate) -> str:
    """A number of dimensions, with its interval where it has one."""
    return f"{e.value:,.0f}" + (f" [{e.low:,.0f}, {e.high:,.0f}]" if e.low is not None else "")


@claim("lora-3", lesson="18_lora_questioned.py", section="1 · Is the update of low rank?", experiment=EXPERIMENT)
def verdict(rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """Holds if fine-tuning from the base is low in three senses: d90, the size of a random subspace that has 90 % of the gain, is below a
    hundredth of all weights (upper end of its interval); the best part of rank 16 of every update has 90 % of the gain (its mean
    rank's upper end); the rank that holds 90 % of an update's squared norm is below half of noise's, in the median matrix. Holds
    if in some of these; does not hold here if in none."""
    full = next(row for row in rows if row["start"] == "base" and not row["d"])
    found, D = {start: d90(rows, start) for start in ("base", "random")}, full["D"]
    if None in found["base"]:
        return Verdict(UNTESTABLE, "Full fine-tuning of the base gains nothing under some seed: there is no 90 % of it to reach.")
    numbers = {f"d90 from {start}": geometric(of) for start, of in found.items() if None not in of}
    # rank 0 is no power of two: it counts as half a rank
    ranks = [
        log_size_at([0.5, *RANKS[1:]], scores, before, after)
        for scores, before, after in zip(full["applied"], full["before"], full["accuracy"])
    ]
    ratios = [float(np.median([one["rank"] / one["noise"] for one in spectra.values()])) for spectra in full["spectra"]]
    ratio, rank = mean(ratios), geometric(ranks)
    effect, other = numbers["d90 from base"], numbers.get("d90 from random")
    cases = {
        "random subspaces": effect.high is not None and effect.high <= LOW * D,
        "the rank that the task needs": rank.high is not None and rank.high <= RANK,
        "the rank that holds the squared norm": ratio.high is not None and ratio.high <= NOISE,
    }
    because = (
        f"The update is of low dimension by {those(cases)}{'' if all(cases.values()) else f', and not by {those(cases, False)}'}: "
        f"d90 is {sized(effect)} of {D:,} from the base, "
        + (f"{sized(other)} from random weights" if other else "and from random weights nothing is gained under some seed")
        + f"; in the mean the {rank.value:.1f} strongest directions of each update have 90 % of the gain; 90 % of the squared norm needs {ratio.value:.0%} of the rank that noise needs."
    )
    ranks_of = {"times": {"rank over noise's, median matrix": ratio}, "directions": {"rank for 90 % of the gain": rank}}
    return judged(graded(cases), because, "d90 from base", effect, "numbers", {"numbers": numbers, **ranks_of}, full["items"], "source")
