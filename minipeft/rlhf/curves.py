"""Pictures of a run: what is optimized beside what is only watched, and how far the policy has gone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..train.metrics import panels, save_png
from .baseline import BestOfN


def plot_run(history: Sequence[dict[str, Any]], path: str | os.PathLike, best_of: BestOfN | None = None) -> None:
    """Reward (and what was watched), KL from the reference, and the signs of trouble, over updates, as a PNG file.

    A line has a gap where a watched number is None. With `best_of`, of the policy at the start, also the reward over
    the KL: what training pays for it, and what sampling n answers does.
    """
    figure, axes = panels(4 if best_of else 3, 17.6 if best_of else 13.2, 3.6)
    steps = [record["step"] for record in history]
    watched = [key for key in history[0] if key.startswith("watch/")]
    _line(axes[0], steps, [r["objective/scores"] for r in history], "reward, optimized")
    for key in watched:
        _line(axes[0], steps, [r[key] for r in history], f"{key.removeprefix('watch/')}, watched")
    axes[0].set(title="Reward", xlabel="update")
    _line(axes[1], steps, [r["objective/kl"] for r in history], "KL")
    axes[1].set(title="KL from the reference", xlabel="update", ylabel="nats a response")
    for key, label in (("policy/clipfrac", "clipped ratios"), ("text/distinct_2", "distinct bigrams")):
        _line(axes[2], steps, [r[key] for r in history], label)
    axes[2].set(title="Shares", xlabel="update", ylim=(-0.02, 1.02))
    for ax in axes[:3]:
        ax.locator_params(axis="x", integer=True)
    if best_of:
        axes[3].plot(
            [r["objective/kl"] for r in history], [r["objective/raw_scores"] for r in history], ".", label="updates"
        )
        axes[3].plot(best_of.kl, best_of.expected, "-", label=f"best of 1 to {len(best_of.kl)} (held out)")
        axes[3].set(title="Reward over KL", xlabel="nats a response")
    for ax in (axes[0], *axes[2:]):
        ax.legend(frameon=False, fontsize=8)
    save_png(figure, path)


def plot_preferences(history: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """Loss, log-probabilities of chosen and rejected answers, and accuracy of a run of `dpo_trainer`, as a PNG file.

    Lines are training batches; points are held out.
    """
    figure, axes = panels(3, 13.2, 3.6)
    shown = (
        ("Loss", "", {"loss": "loss"}),
        ("Log-probability of an answer", "nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
        ("Accuracy", "", {"rewards/accuracies": "accuracy"}),
    )
    for ax, (title, unit, names) in zip(axes, shown):
        for key, label in names.items():
            if points := [(r["step"], r[key]) for r in history if key in r]:
                _line(ax, *zip(*points), label)
            if held_out := [(r["step"], r[f"eval_{key}"]) for r in history if f"eval_{key}" in r]:
                ax.plot(*zip(*held_out), "o", color=ax.lines[-1].get_color(), markersize=4)
        ax.set(title=f"{title} (points: held out)", xlabel="step", ylabel=unit)
        ax.locator_params(axis="x", integer=True)
    axes[1].legend(frameon=False, fontsize=8)
    axes[2].set(ylim=(-0.02, 1.02))
    save_png(figure, path)


def plot_calibration(
    predicted: np.ndarray, observed: np.ndarray, count: np.ndarray, losses: Sequence[tuple[int, float]], path: Any
) -> None:
    """A reward model's loss over steps, and its observed against its predicted preferences, as a PNG file.

    predicted, observed, count [bins] are those of `calibration_curve`; losses are (step, loss).
    """
    figure, axes = panels(2, 8.8, 3.6)
    _line(axes[0], [step for step, _ in losses], [loss for _, loss in losses], "loss")
    axes[0].axhline(np.log(2), color="grey", linestyle="--", linewidth=1)
    axes[0].set(title="Loss (dashed: a coin)", xlabel="step", ylabel="-log σ(r_chosen - r_rejected)")
    axes[0].locator_params(axis="x", integer=True)
    axes[1].plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    axes[1].plot(predicted, observed, "-", linewidth=1)
    axes[1].scatter(predicted, observed, s=10 + 90 * count / count.max())
    axes[1].set(title="Held-out preferences", xlabel="predicted", ylabel="observed", xlim=(0, 1), ylim=(0, 1))
    save_png(figure, path)


def _line(axes: Any, x: Sequence[float], y: Sequence[float | None], label: str) -> None:
    """The values, pale, and their running mean over a tenth of the run."""
    y = np.array(y, np.float64)  # None becomes NaN
    width = max(1, len(y) // 10)
    means = [np.mean(y[max(0, i + 1 - width) : i + 1]) for i in range(len(y))]
    (line,) = axes.plot(x, means, linewidth=1.8, label=label)
    axes.plot(x, y, color=line.get_color(), alpha=0.3, linewidth=0.8)
