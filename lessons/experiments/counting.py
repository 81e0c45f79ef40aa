"""What Lesson 12 measures and draws: the arrays of a step, line by line, and its pictures."""

from __future__ import annotations

import textwrap
import tracemalloc
from collections import Counter

import numpy as np

import minipeft as mp
from minipeft.accounting import count_parameters, measure_peak, timeline, timeline_shown
from minipeft.accounting.footprints import WITHIN

from .drawing import one_plot


def witness(found, title, *rows):
    """Print published figures, by their rows' names, beside what is computed; the verdicts."""
    print(title)
    for f in (found[row] for row in rows):
        source, published, unit = f.row["source"].split(" (")[0], float(f.row["published_value"]), f.row["unit"]
        print(f"    {source}, {f.row['table_or_path']}: {f.row['model']}, {f.row['hyperparameters']}:")
        print(f"        {published:.8g} {unit} published, {f.computed:.8g} computed: {f.verdict}")
    return [found[row].verdict for row in rows]


def show_misses(misses):
    """Print runs whose prediction is too far off: predicted over measured, name, and the beginning of why."""
    for r in misses:
        print(f"  {r.ratio:.2f} {r.row['id']:16s} {textwrap.shorten(r.row['reason'], 96, placeholder=' ...')}")


def dense(config):
    """A model in host memory, whose arrays tracemalloc sees."""
    return mp.Transformer(config, seed=0).to("numpy")


def measured_lines(make, text):
    """Bytes of the arrays of a training step on `text`, by line; then the most that two steps had at once.

    make: gives the model, of arrays in host memory; what it makes once, for all models, must have been made before.
    """
    at, domain = [], tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)

    def look():
        at.append(sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([domain]).traces))

    def step(look=lambda: None):
        loss = model.loss(text, text)
        look()
        loss.backward()
        del loss
        look()
        optimizer.step()
        look()
        optimizer.zero_grad()

    tracemalloc.start()
    model = make()
    optimizer = mp.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    look()
    step(look)
    tracemalloc.stop()
    model = make()
    optimizer = mp.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return {
        "weights": at[0], "kept for backward": at[1] - at[0], "gradients": at[2] - at[0],
        "optimizer states": at[3] - at[2], "peak": at[0] + measure_peak(lambda: [step(), step()]),
    }  # fmt: skip


def stacked(axis, y, parts, height=0.8, alpha=1.0, labels=True, more=""):
    """A bar of parts {label: (color, length)}, with their sum behind it; more: what each label has in front."""
    left = 0.0
    for part, (color, n) in parts.items():
        axis.barh(y, n, height, left, color=color, alpha=alpha, label=more + part if labels else None)
        left += n
    axis.text(left, y, f"  {left:.0f}", va="center", fontsize=9)


def states_picture(states):
    """Bytes of weights, gradients and optimizer states of LLaMA-65B by method, beside a GPU's 48 GB."""
    figure, axis = one_plot((7.2, 3))
    for i, n in enumerate(states.values()):
        stacked(axis, i, {"": (["0.6", "0.6", "C0", "C3"][i], n / 1e9)}, labels=False)
    axis.axvline(48, color="black", linestyle="--", linewidth=1)
    axis.set(title="LLaMA-65B: weights, gradients, states (dashed: 48 GB)", xlabel="GB", xlim=(0, 1200))
    axis.set(yticks=range(len(states)), yticklabels=list(states), ylim=(3.6, -0.6))
    return figure


def over_time_picture(config, batch, seq_len):
    """What a step of full fine-tuning holds while it runs, op by op, from forward to the optimizer's step."""
    course = timeline(config, batch=batch, seq_len=seq_len)
    figure, axis = one_plot()
    timeline_shown.draw(axis, course)
    axis.set_title(f"What a step of full fine-tuning holds ({batch} x {seq_len} tokens; ▼ peak)", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    at_peak = ", ".join(f"{line} {n / 1e6:.1f}" for line, n in course.lines_at_peak.items())
    phases = ", ".join(phase for phase, *_ in course.phases())
    figure.alt = f"what a step of full fine-tuning holds, op by op, in {phases}; at its peak, in {course.at_peak}, in MB: {at_peak}."
    return figure


def step_picture(mine, bars):
    """What a step of `mine` takes by method, predicted and measured."""
    figure, axis = one_plot()
    for i, pair in enumerate(bars.values()):
        for shift, lines, alpha, more in ((-0.2, pair[0], 0.5, "predicted "), (0.2, pair[1], 1.0, "")):
            mb = {line: n / 1e6 for line, n in lines.items()}
            parts = {line: (color, mb[line]) for line, color in (("weights", "C0"), ("optimizer states", "C2"))}
            parts["activations, gradients, working memory"] = "C1", mb["peak"] - sum(n for _, n in parts.values())
            stacked(axis, i + shift, parts, 0.38, alpha, i == 0, more)
    axis.set(title=f"This engine: a step of {count_parameters(mine).total / 1e6:.1f}M parameters", ylim=(3.3, -0.6))
    axis.set(yticks=range(len(bars)), yticklabels=list(bars), xlabel="MB (pale: predicted, full: measured)", xlim=(0, 230))
    axis.legend(handles=axis.containers[3:6], fontsize=9, loc="lower right")  # of the first full bar
    return figure


def loops_picture(big):
    """Bytes of a step of QLoRA on Llama-3-70B in three loops, line by line, beside a GPU's 80 GB."""
    figure, axis = one_plot()
    colors = {
        "frozen weights": "C0", "adapters": "C9", "optimizer states": "C2", "activations": "C1", "logits": "C3",
        "recomputed block": "C4", "working memory": "C5", "the rest": "0.7",
    }  # fmt: skip
    for i, ledger in enumerate(big.values()):
        gb = Counter({line: 0.0 for line in colors})
        for line, n in ledger.lines.items():
            gb[line if line in colors else "the rest"] += n / 1e9
        stacked(axis, i, {line: (colors[line], n) for line, n in gb.items()}, labels=i == 0)
    axis.axvline(80, color="black", linestyle="--", linewidth=1)
    axis.set(yticks=range(len(big)), yticklabels=[title.replace(", ", ",\n") for title in big])
    axis.set(title="PyTorch: Llama-3-70B, QLoRA, 4 x 4,096 tokens (dashed: 80 GB)", xlabel="GB")
    axis.set(xlim=(0, 152), ylim=(4.2, -0.6))
    axis.legend(fontsize=9, ncols=3, loc="lower center")
    return figure


def published_picture(covered):
    """Runs of others: the ledger's prediction in what they measured."""
    figure, axis = one_plot()
    axis.axhspan(1 - WITHIN, 1 + WITHIN, color="0.92")
    axis.axhline(1, color="0.6", linewidth=1)
    for split, color in (("looked at", "C0"), ("held out", "C1")):
        for quantity, mark in {"allocated": "o", "states": "s", "reserved": "^", "used": "D"}.items():
            here = [r for r in covered if (r.row["quantity"], r.row["split"]) == (quantity, split)]
            x, y = [r.measured / 2**30 for r in here], [r.ratio for r in here]
            label = f"{quantity}, {split}" if here else None
            axis.plot(x, y, mark, color=color, markersize=5, alpha=0.8, label=label)
    close = sum(r.close for r in covered) / len(covered)
    axis.set(title=f"{len(covered)} published runs: {close:.0%} within 15 % (grey)", xlim=(0, None))
    axis.set(xlabel="GiB measured", ylabel="predicted / measured", ylim=(0.5, 1.5))
    axis.legend(fontsize=9, ncols=2, loc="upper right")
    return figure
