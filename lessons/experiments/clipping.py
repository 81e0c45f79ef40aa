"""The picture of PPO's clip, for Lesson 10."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft.rlhf.ppo import clipped_objective


def clip_picture() -> Any:
    """The loss of a token over its ratio, for an advantage of each sign."""
    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    rho = np.linspace(0.4, 1.6, 241)
    for advantage, color in ((1.0, "C0"), (-1.0, "C3")):
        ax.plot(rho, clipped_objective(mp.Tensor(rho), advantage).data, color=color, label=f"A = {advantage:+.0f}")
    ax.axvspan(0.8, 1.2, color="grey", alpha=0.15, linewidth=0)
    ax.set(title="Each advantage has one flat side", xlabel="ratio (grey: within 20 %)", ylabel="loss of a token")
    ax.legend(frameon=False)
    return figure
