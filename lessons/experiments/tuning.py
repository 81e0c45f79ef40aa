"""What Lesson 8 draws, and how it reads and shows its rows."""

from __future__ import annotations

from dataclasses import replace
from statistics import mode

import matplotlib.pyplot as plt
import numpy as np

from minipeft.claims import following
from minipeft.claims.statistics import crossed
from minipeft.experiments.rows import read_rows
from minipeft.train.evaluation import example_losses

RATES, SEED = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), 5  # of which the best is taken, and the seed under which


def mean_loss(model, sets, pad_token_id):
    """The mean over sets of examples of the loss of an answer, in nats a token."""
    return float(np.mean([np.divide(*example_losses(model, of, 32, pad_token_id)).mean() for of in sets]))


def at_best(condition, store):
    """A condition at the lowest rate whose loss on validation is at most 0.002 above the best; it lies inside RATES."""
    tried, rows = [replace(condition, learning_rate=rate, seed=SEED) for rate in RATES], read_rows(store)
    losses = [row["validation"] for one in tried for row in rows if vars(one).items() <= row.items()]
    assert len(losses) == len(RATES), "rows of the rates are missing: --full computes them"
    best = next(i for i, loss in enumerate(losses) if loss <= min(losses) + 0.002)
    assert 0 < best < len(RATES) - 1, f"the best of {RATES} for {condition} is at the edge"
    return replace(condition, learning_rate=RATES[best])


def rows_of(rows, condition, seeds):
    """A condition's rows, one of each seed."""
    fields = vars(condition)
    return [row for seed in seeds for row in rows if (fields | {"seed": seed}).items() <= row.items()]


def losses(rows, new, tasks):
    """The losses [seeds, records] of some tasks in rows, where `new` is new."""
    return np.array([np.concatenate([row["loss"][new][name] for name in tasks]) for row in rows])


def over_constant(rows, task):
    """By how many right answers to a task's new inputs the tuned model of `inst-1` is ahead of one constant answer, the most frequent."""
    (row,) = (row for row in rows if row["arm"] == "tuned")
    asked = following.asked("tuned", "inputs", row["answered"])
    at = [i for i, question in enumerate(asked) if question.task == task]
    answers = [asked[i].answer for i in at]
    constant = [answer == mode(answers) for answer in answers]
    return crossed(np.array(row["answers"]["inputs"], float)[:, at] - constant)


def show_losses(table, at_start, names, base):
    """A line for the base {column: loss}, and one for each condition {condition: {column: losses [seeds, records]}}."""
    print(f"{'loss, nats a token':26}" + "".join(f"{title:>24}" for title in at_start))
    print(f"{base:26}" + "".join(f"{value:24.3f}" for value in at_start.values()))
    for condition, name in names.items():
        found = [crossed(values) for values in table[condition].values()]
        print(f"{name:26}" + "".join(f"{f'{e.value:.3f} ± {(e.high - e.low) / 2:.3f}':>24}" for e in found))


def packed_picture(batch):
    """Who sees whom in the row of a packed batch that has the most records."""
    begins = (batch.arguments["position_ids"] == 0) & batch.arguments["attention_mask"][:, 0].any(axis=1)  # [rows, T]
    row = begins.sum(axis=1).argmax()
    sees = np.tril(batch.arguments["attention_mask"][row, 0])
    figure, axis = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    axis.imshow(np.where(sees, np.cumsum(begins[row])[:, None], np.nan), cmap="tab10", vmin=1, vmax=10)
    axis.set(title=f"a packed row of {begins[row].sum()} records: who sees whom", xlabel="key", ylabel="query")
    return figure


def answers_picture(base, tuned, reduced):
    """The shares of answers that stop and that are right {"stopped", "right": {what is new: share}}, before and after."""
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    bars = (("stops, base", "stopped", base, "0.8"), ("stops, tuned", "stopped", tuned, "C0"),
            ("right, base", "right", base, "0.6"), ("right, tuned", "right", tuned, "C2"))  # fmt: skip
    for k, (label, what, of, color) in enumerate(bars):
        axis.bar(np.arange(3) + (k - 1.5) * 0.2, list(of[what].values()), 0.2, label=label, color=color)
    axis.set(xticks=range(3), xticklabels=[f"new {new}" for new in base["right"]], ylim=(0, 1.3), ylabel="share of answers")
    axis.set_title("reduced: too few steps" if reduced else "at new tasks answers end, and no checked one is right")
    axis.legend(frameon=False, ncols=2, loc="upper center")
    return figure


def bars(axis, place, found, width, **style):
    """Estimates as bars, with their intervals."""
    values, low, high = np.array([(e.value, e.low, e.high) for e in found]).T
    axis.bar(place, values, width, yerr=(values - low, high - values), capsize=3, ecolor="0.2", **style)


def tasks_picture(by_tasks, at_start):
    """Losses {column: {tasks trained: its estimate}} over the number of tasks, beside the base's {column: loss}."""
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for (title, of), color in zip(by_tasks.items(), ("C0", "C3")):
        value, low, high = np.array([(e.value, e.low, e.high) for e in of.values()]).T
        axis.axhline(at_start[title], color=color, linestyle=":", linewidth=1)
        axis.errorbar(list(of), value, (value - low, high - value), fmt="o-", markersize=4, capsize=3, color=color, label=title)
    axis.set(xlabel="tasks trained, for the same number of records", ylabel="loss, nats a token", xticks=list(of))
    axis.set_title("more tasks: rewrite worse, the new ones better in the mean")
    axis.legend(frameon=False, title="(dotted: the base)")
    return figure


def words_picture(more):
    """What conditions have more than the usual one {condition: {column: estimate}}, in nats a token."""
    figure, axis = plt.subplots(figsize=(8, 3.8), layout="constrained")
    for k, (name, of) in enumerate(more.items()):
        bars(axis, np.arange(len(of)) + (k - 1) * 0.26, of.values(), 0.26, color=f"C{(1, 2, 4)[k]}", alpha=0.6, label=name)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xticks=range(len(of)), xticklabels=[title.replace(", ", ",\n") for title in of])
    axis.set(ylabel="nats a token more", title="fewer phrasings, and learning the prompt: worse or better?")
    axis.legend(frameon=False, loc="lower left")
    return figure
