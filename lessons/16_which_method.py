# %% [markdown]
# # Lesson 16 · Which method, when?
#
# You have met eight ways to change what a model does: full fine-tuning, LoRA, adapters, prompt tuning, prefix tuning,
# QLoRA, instruction tuning, RLHF. Which one should you take? It depends on what is scarce: examples, disk, memory,
# time, the patience of whoever waits for an answer, or what the model could do before. This lesson fills a table with
# all of that, every cell measured, and lets the table decide.
#
# You need Lessons 3 to 11, 14 and 15. Run it with `python lessons/16_which_method.py` (half a minute on two cores), or
# open it as a notebook. It measures the costs on *your* machine now, once, and reads the table that decides, of three
# measurements and three seeds, from `lessons/results/16_which_method.jsonl`. `python lessons/16_which_method.py --full`
# (in a notebook `!python lessons/16_which_method.py --full`) first computes those of the 48 rows that are missing there
# (all of them: about ten minutes), and goes on with the lesson. For your own data, `minipeft compare --data my.jsonl
# --report DIR` writes such a table, with plots, as one HTML page.
#
# Environment: `MINIPEFT_REDUCED=1` measures less; `MINIPEFT_LESSONS_OUT` is where the picture goes (`lessons/out`).

# %%
import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import decision
from experiments.decision import TITLES, Costs

import minipeft as mp
from minipeft.accounting import count_parameters
from minipeft.experiments import shipped
from minipeft.experiments.rows import complete, read_rows
from minipeft.experiments.seeds import below, spread
from minipeft.experiments.sweep import sweep
from minipeft.peft.methods import METHODS

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else next(p for p in (Path.cwd(), Path("lessons")) if (p / "results").exists())
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "16_which_method.jsonl"

if "--full" in sys.argv:
    sweep(decision.run, decision.RUNS, executor=1, store=RESULTS)
rows, SEEDS = complete(read_rows(RESULTS), decision.RUNS)
T = {method: decision.cells(rows, method) for method in TITLES}  # method -> quantity -> values over the seeds
base, tokenizer = mp.load_base()
N = sum(p.size for p in base.parameters())
task_before, general_before = shipped.before()
print(f"{len(rows)} rows, seeds {SEEDS}; the base: {N:,} parameters, task loss {task_before:.3f}, general loss {general_before:.3f}")

# %% [markdown]
# ## 1 · Eight ways, and what each needs
#
# | | trains | learns from |
# |---|---|---|
# | full | every weight | examples of the task |
# | LoRA | $BA$ beside each matrix | the same |
# | adapters | small layers in between | the same |
# | prompt tuning | 20 vectors before the input | the same |
# | prefix tuning | 20 keys and values in every layer | the same |
# | QLoRA | LoRA on four-bit weights | the same |
# | instruction tuning | every weight | examples of many tasks, each asked for in words |
# | RLHF (PPO) | every weight, after full | its own answers, and a score for each |
#
# The first six are the same job done with different parameters. Instruction tuning is another job: one model that does
# what it is asked. RLHF is a third: there need not be right answers, only a judge. Here the judge is a rule, how many
# words an answer has in common with the reference; Lesson 9 learns one from comparisons.
#
# ## 2 · What it costs on this machine
#
# Trained parameters follow from shapes, and so do the stored ones, $n$: the same numbers, but for prefix tuning, which
# trains a small network that computes its prefixes, and stores only these. For $k$ tasks that is $4Nk$ bytes on the
# disk for full fine-tuning of $N$ parameters, and $4N + 4nk$ for the others, with one base for all. Memory and time
# have to be measured.

# %%
chosen = ["full", "lora"] if REDUCED else list(TITLES)
now = sweep(decision.run, [Costs(method, steps=2 if REDUCED else 8) for method in chosen], executor=1)
print("\nnow, on this machine:         peak memory MB (predicted)    s/step    ms a token: as it is, merged")
for row in now:
    after = "cannot be" if row["latency_merged"] is None else f"{1e3 * row['latency_merged']:9.2f}"
    print(f"  {TITLES[row['method']]:22s} {row['memory_measured'] / 1e6:15.1f} {row['memory_predicted'] / 1e6:12.1f} {row['seconds_per_step']:11.3f} {1e3 * row['latency']:15.2f} {after:>14s}")
    assert abs(row["memory_measured"] / row["memory_predicted"] - 1) < 0.1, "the ledger predicts it"
for method in ("lora", "bottleneck", "prompt", "prefix"):
    counts = count_parameters(base.config, METHODS[method].config())
    assert 4 * counts.stored == T[method]["storage"][0], "what is stored is what the formula says"
    assert (counts.stored < counts.trainable) == (method == "prefix")

# %% [markdown]
# (An update of PPO samples, scores and goes over its samples twice, so it is no step like the others.)
#
# ## 3 · The table
#
# All methods saw 640 examples in 40 steps (PPO: and then 12 updates of 16 answers), each at a rate from its own grid.
# Everyone is judged on the same 96 answers, in nats a token; instruction tuning is asked for them by an instruction, so
# its loss starts higher, and "learned" is by how much it fell.

# %%
def learned(method):
    """By how much the task's loss fell, over the seeds; from what it was when asked for in this way."""
    start = T[method].get("task_before", task_before)
    return start - T[method]["task_loss"]


COLUMNS = {
    "trained %": lambda m: 100 * T[m]["trainable"] / T[m]["parameters"],
    "MB a task": lambda m: T[m]["storage"] / 1e6,
    "peak MB": lambda m: T[m]["memory_measured"] / 1e6,
    "s a step": lambda m: T[m]["seconds_per_step"],
    "ms a token": lambda m: 1e3 * T[m]["latency"],
    "merged": lambda m: None if T[m]["latency_merged"] is None else 1e3 * T[m]["latency_merged"],
    "task loss": lambda m: T[m]["task_loss"],
    "learned": learned,
    "forgotten": lambda m: T[m]["forgotten"],
}
TABLE = {m: {name: column(m) for name, column in COLUMNS.items()} for m in TITLES}
print("\n" + " " * 20 + "".join(f"{name:>15s}" for name in COLUMNS))
for m, values in TABLE.items():
    texts = ("cannot be" if v is None else spread(v, 2 if name in ("trained %", "MB a task", "ms a token", "merged") else 1 if name == "peak MB" else 3) for name, v in values.items())
    print(f"{TITLES[m]:20s}" + "".join(f"{text:>15s}" for text in texts))
mean = {m: {name: np.nan if v is None else float(v.mean()) for name, v in values.items()} for m, values in TABLE.items()}
for m in TITLES:
    assert abs(T[m]["memory_measured"].mean() / T[m]["memory_predicted"].mean() - 1) < 0.1
    assert mean[m]["learned"] > 0, "each learned something"
imitators = [m for m in TITLES if m not in ("instructions", "feedback")]
for m in ("lora", "bottleneck", "prompt", "prefix"):
    assert mean[m]["trained %"] < 10 and mean[m]["MB a task"] < mean["full"]["MB a task"] / 10

# %% [markdown]
# ## 4 · Let the table decide
#
# A decision is a wish under a condition: *the smallest file that still learns 90 % of what full fine-tuning learns.*
# Each line below is that: a column to make small, and what has to hold, under every seed. Methods that are not clearly
# worse than the best, by Lesson 14's rule, are named beside it, and so are those for which the condition holds under
# some seeds only. Change the lines to yours.

# %%
def learns(share):
    """A condition: method -> for each seed, whether it learns this share of what full fine-tuning does."""
    return lambda m: learned(m) > share * learned("full")


def decide(wish, smallest, condition, among=imitators):
    """The methods with the least of a column, of those for which a condition holds under every seed; the best first."""
    holds = {m: np.all(condition(m)) for m in among if TABLE[m][smallest] is not None}
    able = sorted((m for m in holds if holds[m]), key=lambda m: mean[m][smallest])
    best = [m for m in able if not below(TABLE[able[0]][smallest], TABLE[m][smallest])]
    unsure = [m for m in holds if not holds[m] and np.any(condition(m))]
    told = f"{' or '.join(TITLES[m] for m in best)} ({mean[best[0]][smallest]:.3g} {smallest})" if best else "none"
    print(f"{wish:62s} {told}" + "".join(f"; {TITLES[m]}: under some seeds only" for m in unsure))
    return best


full = mean["full"]
print()
ablest = decide("the best at the task, whatever it costs", "task loss", lambda m: True)
lean = decide("the smallest file a task that learns 90 % of what full does", "MB a task", learns(0.9))
light = decide("the least memory that learns 90 %", "peak MB", learns(0.9))
kind = decide("the least forgotten that learns 90 %", "forgotten", learns(0.9))
decide("the least forgotten that learns 75 %", "forgotten", learns(0.75))
fast = decide("the fastest step that learns 75 %", "s a step", learns(0.75))
is_small = lambda m: mean[m]["MB a task"] < full["MB a task"] / 10  # noqa: E731
merged = decide("the fastest answer, merged, with a file under a tenth of full's", "merged", is_small)
print("\ndisk for many tasks, MB:" + "".join(f"{k:>10d}" for k in (1, 10, 100)))
for m in imitators:
    per = mean[m]["MB a task"]
    totals = [per * k if m == "full" else 4 * N / 1e6 + per * k for k in (1, 10, 100)]
    print(f"  {TITLES[m]:22s}" + "".join(f"{total:10.1f}" for total in totals))
assert set(ablest) == {"full", "lora", "qlora"} and set(lean) == set(merged) == {"lora", "qlora"}
assert light == ["qlora"] and kind == ["lora"] and fast == ["bottleneck"]
share = learned("bottleneck") / learned("full")
assert share.min() < 0.9 < share.max(), "adapters: 90 % under some seeds"

# %% [markdown]
# At the task itself full fine-tuning, LoRA and QLoRA cannot be told apart, so what is scarce decides: LoRA forgets
# least, QLoRA takes the least memory in training, and once merged both answer as fast as full does. Adapters make the
# fastest step, and learn just about 90 %, more or less by the seed.
#
# ## 5 · And the other two jobs
#
# Instruction tuning sees the verses as one task of seven: a seventh of the examples. RLHF starts where full fine-tuning
# ends.

# %%
score, before = T["feedback"]["score"], T["feedback"]["score_before"]
print(f"\ninstruction tuning: its loss on the task fell by {spread(learned('instructions'))}, full fine-tuning's by {spread(learned('full'))}; and it was asked in words")
print(f"RLHF: the score of its answers went from {spread(before)} to {spread(score)}, a change of {spread(score - before)}; {spread(T['feedback']['kl'], 2)} nats an answer from where it started")
moved = T["feedback"]["task_loss"] - T["full"]["task_loss"]
print(f"      its loss on the references changed by {spread(moved)}, since PPO never asks for it; general text by {spread(T['feedback']['forgotten'] - T['full']['forgotten'])}")
assert np.abs(moved).max() < learned("full").min(), "what PPO does to the loss is small beside what imitation did"
imitation, feedback = 40 * full["s a step"], 12 * mean["feedback"]["s a step"]
print(f"      its 12 updates took {feedback:.0f} s, after {imitation:.0f} s for the 40 steps of imitation")
verdict = {True: "a clear gain", False: "a clear loss", None: "no clear change"}[below(before, score)]
print(f"      the score changed by {', '.join(f'{x:+.4f}' for x in score - before)} under the three seeds: {verdict}, by Lesson 14's rule")
assert imitation < feedback and below(before, score) is None, "more time, for no clear gain"

# %% [markdown]
# PPO took half as long again as all of the imitation before it, and whether its score rose at all three seeds cannot
# say: twice it went up, once it stayed where it was. (With Lesson 10's score it rises under every seed.) So if you have
# answers, imitate them first. A score is for what you cannot write down, but know when you see it.
#
# ## The picture: the table, in colors
#
# Each cell is colored by its distance from the best of its column: green is as good; red is ten times as much, of the
# first two columns a thousand times, of the last two half a nat.

# %%
shown = ["trained %", "MB a task", "peak MB", "s a step", "ms a token", "merged", "task loss", "forgotten"]
values = np.array([[mean[m][name] for name in shown] for m in TITLES])  # [methods, columns]
shades = np.empty_like(values)
for j, name in enumerate(shown):
    column = values[:, j]
    least = np.nanmin(column)
    decades = 3 if name in ("trained %", "MB a task") else 1
    shades[:, j] = (column - least) / 0.5 if name in ("task loss", "forgotten") else np.log10(column / least) / decades
figure, axis = plt.subplots(figsize=(12, 5.6), layout="constrained")
axis.imshow(np.ma.masked_invalid(shades), cmap="RdYlGn_r", aspect="auto", alpha=0.65, vmin=0, vmax=1)
for i, m in enumerate(TITLES):
    for j, name in enumerate(shown):
        v = TABLE[m][name]
        text = "cannot be" if v is None else f"{v.mean():.3g}\n± {v.std(ddof=len(SEEDS) > 1):.1g}"
        axis.text(j, i, text, ha="center", va="center", fontsize=9)
axis.set_xticks(range(len(shown)), shown)
axis.set_yticks(range(len(TITLES)), TITLES.values())
axis.tick_params(length=0, labeltop=True, labelbottom=False)
axis.set_title(f"Which method? Means of {len(SEEDS)} seeds ± standard deviation; green is as good as the best of its column", pad=24)
axis.spines[:].set_visible(False)
figure.savefig(OUT / "16_which_method.png", dpi=120)
print("picture:", OUT / "16_which_method.png")

# %% [markdown]
# ## Break it: decide by one column
#
# Advertisements name one number. "Trains 0.2 % of the parameters!" Sort the methods by it, then by two others, and see
# what you would get.

# %%
def ranks(name):
    return np.argsort(np.argsort([mean[m][name] for m in imitators]))


print("\ndecided by one column alone:")
alone = {}
for name in ("trained %", "forgotten", "s a step"):
    best = alone[name] = min(imitators, key=lambda m: mean[m][name])
    print(f"  least {name:10s} {TITLES[best]:20s} learns {mean[best]['learned'] / full['learned']:.0%} of what full does, with {mean[best]['peak MB'] / full['peak MB']:.0%} of its memory")
for name in ("peak MB", "s a step", "ms a token"):
    agreement = np.corrcoef(ranks("trained %"), ranks(name))[0, 1]
    print(f"  rank correlation of the trained share with {name}: {agreement:+.2f}")
fewest = alone["trained %"]
assert 16 * N / 1e6 < full["peak MB"] / 3, "weights, gradients and Adam's moments are less than a third of full's memory"
assert mean[fewest]["learned"] < 0.7 * full["learned"] and alone["forgotten"] == "lora"
assert mean[fewest]["trained %"] / full["trained %"] < 0.05 < mean[fewest]["peak MB"] / full["peak MB"], "few parameters is not little memory"
print(f"  and the least forgotten of all is the base itself: {0:.3f}, as it has learned nothing")

# %% [markdown]
# The trained share misleads: prompt tuning trains least, learns two thirds, and takes 85 % of the memory. The memory of
# a small model's step is mostly activations, which every method has to keep; the share of trained parameters says, but
# for prefixes, what is on the *disk*. (For 65 billion parameters it is the other way round: Lesson 7.) The other two
# columns do not mislead here: what forgets least is LoRA, which learns 99 %, and the fastest step is that of adapters,
# with 90 %. But that is luck, as the last line says: nothing forgets as little as a model that learns nothing.
#
# ## Exercises
#
# 1. **Your table.** `minipeft compare --data my.jsonl --report report` with your own data. Which decisions of section 4
#    come out differently, and is the spread over the seeds small enough to say so?
# 2. **A bigger model.** Multiply: for a model of 7 billion parameters (Lesson 12's ledger), which columns of the table
#    grow with the parameters, which with the batch? Which decision turns?
# 3. **Half the examples.** Run section 3 again with 20 steps. Does the order in "learned" stay?
