# %% [markdown]
# # Lesson 16 · Which method, when?
#
# You have met eight ways to change what a model does: full fine-tuning, LoRA, adapters, prompt tuning, prefix tuning,
# QLoRA, instruction tuning, RLHF. Which one should you take? It depends on what is scarce: disk, memory, training time,
# latency, or what the model could do before. This lesson measures all of that in one table, and lets the table decide.
# It asks which weights to train. If the model lacks *facts*, retrieval may be better than any of them: in Ovadia et al.
# 2023 (arXiv:2312.05934), retrieved text beat unsupervised fine-tuning, on facts seen in pretraining and on new ones.
# Training helped more where it met each fact in many wordings.
#
# You need Lessons 3 to 12, 14 and 15. Reading takes about 19 minutes (200 words or 25 lines of code a minute, up to the
# quiz). Where a line begins with **Predict**, write down your answer. Run it with `python lessons/16_which_method.py`
# (half a minute on two cores), or open it as a notebook. It measures the costs on *your* machine now, once, and reads
# the table that decides, of three measurements and three seeds, from `lessons/results/16_which_method.jsonl`. `python
# lessons/16_which_method.py --full` (in a notebook `!python lessons/16_which_method.py --full`) first computes those of
# the 48 rows that are missing there (all of them: about ten minutes), and goes on with the lesson. For your own data,
# `minipeft compare --data my.jsonl --report DIR` writes such a table, with plots, as one HTML page.
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

from experiments import decision, forgetting
from experiments.decision import TITLES, Costs

import minipeft as mp
from minipeft.accounting import Loop, architecture, count_parameters, pytorch_ledger
from minipeft.experiments import shipped
from minipeft.experiments.rows import complete, read_rows
from minipeft.experiments.seeds import below, interval, over_seeds, spread
from minipeft.experiments.shipped import Rewriting
from minipeft.experiments.sweep import sweep
from minipeft.peft.methods import METHODS
from minipeft.text.instructions import TASKS

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
# what it is asked. RLHF is a third: in general it needs no right answers, only a judge. (Both train every weight here,
# but can train LoRA as well.) Here a rule stands in for the judge, the share of words that an answer has in common with
# the right one; Lesson 9 learns a judge from comparisons. Where there are pairs of a better and a worse answer, DPO
# trains on them without a reward model (Lesson 20): it holds two models, the policy and its start, for PPO's four
# (Lesson 10). With a fresh LoRA the start is the policy with its adapter off, and takes no second copy of the weights.
# And there are smaller sets of weights than these: (IA)$^3$ trains three vectors a layer; with a few dozen examples it
# beat examples in the prompt (Liu et al. 2022, arXiv:2205.05638).
#
# In the first verdict of the register (Lesson 3) below, `ln_tuning` trains layer norms alone, `adalora` is LoRA with
# ranks that change, and *surgery* is the code that puts a method's layers into a model. In the second, `rewrite` and
# `source` are Lesson 3's tasks, learned by one adapter each; *alone* one of them is in use, *together* both are. Below
# 0 is worse, in nats a token of `rewrite` and in the share of right choices of `source`.

# %% [markdown]
# > `full-6` simple to implement: **holds**. The loop has 6 lines, and full fine-tuning adds none; a method's file adds
# > 27 (ln_tuning) to 169 (adalora), not counting the surgery that they share.
#
# > `which-3` adapters: modular components: **holds if**. Adapters are components in these senses: swapped and removed;
# > LoRA's in these: swapped and removed. Bottleneck together beside alone, rewrite: worse (-3.357 [-3.818, -2.897]);
# > bottleneck together beside alone, source: worse (-0.310 [-0.516, -0.104]). Lora together beside alone, rewrite:
# > worse (-0.527 [-0.648, -0.407]); lora together beside alone, source: worse (-0.244 [-0.356, -0.132]). (5 seeds, 256
# > test items)

# %% [markdown]
# ## 2 · What it costs on this machine
#
# Trained parameters follow from shapes, and so do the stored ones, $n$. The two are the same numbers but for prefix
# tuning, which trains a small network that computes its prefixes, and stores only these. For $k$ tasks that is $4Nk$
# bytes on the disk for full fine-tuning of $N$ parameters, and $4N + 4nk$ for the methods that freeze the base, one for
# all. Memory and time have to be measured. A small model's time is to a good part Python's, and its memory mostly
# activations, so these two columns do not carry over to 7 billion parameters, which section 3 counts.
#
# **Predict:** prompt tuning trains 20 vectors and nothing else. Is its peak memory nearer to a hundredth of full
# fine-tuning's, to a half, or to the whole?

# %%
chosen = ["full", "lora"] if REDUCED else list(TITLES)
now = sweep(decision.run, [Costs(method, steps=2 if REDUCED else 8) for method in chosen], executor=1)
print("\nnow, on this machine:         peak memory MB (predicted)    s/step    ms a token: as it is, merged")
for row in now:
    after = "cannot be" if row["latency_merged"] is None else f"{1e3 * row['latency_merged']:9.2f}"
    print(f"  {TITLES[row['method']]:22s} {row['memory_measured'] / 1e6:15.1f} {row['memory_predicted'] / 1e6:12.1f} {row['seconds_per_step']:11.3f} {1e3 * row['latency']:15.2f} {after:>14s}")
    if mp.backend.get_backend() is np:  # on a GPU CuPy's pool is measured, which takes more than its arrays use
        assert abs(row["memory_measured"] / row["memory_predicted"] - 1) < 0.1, "the ledger predicts it"
peak = {row["method"]: row["memory_measured"] for row in now}
assert REDUCED or mp.backend.get_backend() is not np or peak["prompt"] > 0.75 * peak["full"], "few parameters is not little memory"
for method in ("lora", "bottleneck", "prompt", "prefix"):
    counts = count_parameters(base.config, METHODS[method].config())
    assert 4 * counts.stored == T[method]["storage"][0], "what is stored is what the formula says"
    assert (counts.stored < counts.trainable) == (method == "prefix")

# %% [markdown]
# Nearer to the whole: prompt tuning takes more than three quarters of full fine-tuning's memory. It saves gradients and
# Adam's moments of the weights, but backward has to run through the whole model to reach the prompt, so most of the
# activations stay: those of attention, norms and nonlinearities. (The input of a frozen matrix goes, as only the
# gradient of the matrix needs it; LoRA's $A$ keeps it.) For the same reason a frozen base saves no more than a third of
# a step's operations, $4N$ a token for $6N$ (Lesson 12). The ledger of Lesson 12 predicts each peak to within a tenth.
# (An update of PPO samples, scores and goes over its samples twice, so it is no step like the others.)
#
# LoRA and QLoRA can be merged, and then an answer takes the base's products and no more. Unmerged, QLoRA has to turn
# its four-bit weights back into numbers for every product (Lesson 7), in training and in each token of an answer. A
# merged QLoRA is no longer in four bits (Lesson 7, section 7). Adapters, prompts and prefixes cannot be merged: the
# first have a nonlinearity, the others are positions for attention, and neither is a matrix to be added to $W$. So each
# answer goes on paying: for an adapter's products, or for 20 more places in every sequence's cache of keys and values,
# over which each new token attends. (A model that cannot be merged into anything, full's, is timed twice all the same:
# so far apart are two timings of one model here.) Merging serves one task: a server that answers many tasks in one
# batch keeps the LoRAs apart and computes them beside one base (S-LoRA, Sheng et al. 2023, arXiv:2311.03285).
#
# ## 3 · The table
#
# All methods saw 640 examples in 40 steps (PPO: and then 12 updates of 16 answers), each at its usual rate. Everyone is
# judged on the same 96 answers, in nats a token; instruction tuning is asked for them by an instruction, so its loss
# starts higher, and "learned" is by how much it fell. As in Lesson 14, ± is half of a 95 % interval: of costs, over
# three measurements on one machine. (Where the ± of a time is large, other programs were running there.) The table
# holds for 640 examples, 40 steps and this model. Prompts, for example, learn less than full fine-tuning here, but
# matched it in T5 models of billions of parameters (Lester et al. 2021, arXiv:2104.08691). A prefix only mixes vectors
# into what attention gives, by the share that it takes (Lesson 6, section 2): how a layer weighs the words of the text
# beside each other it cannot change. And LoRA, which learns about what full fine-tuning does here, fell behind it on 20
# billion tokens of code, and forgot less (Biderman et al. 2024, arXiv:2405.09673): there full fine-tuning's updates had
# 10 to 100 times the rank of usual LoRAs (Lessons 15 and 18). "Merged" is the time of a token after merging, and
# "forgotten" by how much the loss on general text rose.
#
# Where a verdict below the table names 7B or 70B, Lesson 12's ledger counts, and nothing is trained. It counts in
# bfloat16: full fine-tuning takes 10 bytes a parameter (weight, gradient, two moments, and a temporary of the step), a
# frozen one 2, or in four bits a little over a half. With a float32 copy of the weights and float32 moments, as mixed
# precision is usually counted, it would be 16 (Lesson 12).

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
assert below(TABLE["prompt"]["learned"], TABLE["full"]["learned"]), "prompts learn less here"
size, rank_64 = architecture("llama-7b").size, mp.LoraConfig(r=64, target_modules="all-linear")
frozen = [pytorch_ledger("llama-7b", rank_64, 1, 512, Loop(quantization=q)).held["frozen weights"] / size for q in (None, "nf4")]
assert 10 < pytorch_ledger("llama-7b", None, 1, 512, Loop()).total / size < 11 and np.allclose(frozen, [2, 0.57], atol=0.01)

# %% [markdown]
# > `which-4` prompt tuning: extremely limited resources, many tasks: **holds if**. What is limited is bytes a task: at
# > 7B, a prompt of 20 vectors takes 0.020 of the bytes a task of LoRA (r = 8, q and v), but 1.00 of its memory and 1.04
# > of its computation, as the whole model runs forward and backward for either.
#
# > `which-5` QLoRA: large models, one GPU: **holds**. On one card only QLoRA fits at 7B 16 GB, at 70B 80 GB (so for 7B
# > and 70B); GB needed with r = 64 on all linear layers, 512 tokens: 7B: full 71, LoRA 18, QLoRA 8; 70B: full 725, LoRA
# > 163, QLoRA 56.

# %% [markdown]
# ## 4 · Let the table decide
#
# A decision is a wish under a condition: *the smallest file that still learns 90 % of what full fine-tuning learns.*
# Each line below is that: a column to make small, and what has to hold, clearly, by Lesson 14's rule. What is chosen is
# a method *and a rate*: costs do not depend on it, and for the rest there are Lesson 15's rows. Beside the best stand
# those that are not clearly worse, and those with less, of which the condition is undecided. (Undecided is not equal:
# more seeds might tell them apart.) Change the lines to yours.
#
# Two things favor some choices. The table judges the rates on the same 96 answers that it reports, so the best of many
# looks a little better than it is; choose on a validation split and report on a test split. And full fine-tuning and
# LoRA had five rates each, adapters, prefixes and prompts two, QLoRA one.
#
# **Predict:** which method has the smallest file of those that learn nine tenths of what full fine-tuning learns?

# %%
rows += complete(read_rows(RESULTS.with_name("15_forgetting.jsonl")), forgetting.RUNS)[0]
CHOICES = {}
for m, rates in (forgetting.RATES | {"qlora": (3e-3,)}).items():
    for rate in rates:
        loss, forgotten = (over_seeds(rows, Rewriting(m, rate), key) for key in ("task_loss", "forgotten"))
        share = (task_before - loss) / learned("full")  # of what full fine-tuning learns at its usual rate
        CHOICES[f"{TITLES[m]} at {rate:g}"] = TABLE[m] | {"task loss": loss, "forgotten": forgotten, "share": share}


def learns(least):
    """A condition: whether a choice clearly learns more than this share (True), less (False), or neither (None)."""
    return lambda c: below(np.full(len(SEEDS), least), c["share"])


def decide(wish, column, condition=lambda c: True):
    """The choices with the least of a column, of those for which a condition holds; the best first."""
    held = {name: condition(c) for name, c in CHOICES.items() if c[column] is not None}
    least = {name: CHOICES[name][column].mean() for name in held}
    able = sorted((name for name in held if held[name]), key=least.get)
    best = [name for name in able if not below(CHOICES[able[0]][column], CHOICES[name][column])]
    unsure = [name for name in held if held[name] is None and least[name] < least[best[0]]]
    found, undecided = (", ".join(f"{name} (learns {spread(CHOICES[name]['share'], 2)})" for name in names) for names in (best, unsure))
    print(f"{wish} ({least[best[0]]:.3g} {column}): {found}" + f"; undecided: {undecided}" * bool(unsure))
    return best


full = mean["full"]
print()
best = decide("the best at the task, whatever it costs", "task loss")
small = decide("the smallest file a task that learns 90 % of what full does", "MB a task", learns(0.9))
little = decide("the least memory that learns 90 %", "peak MB", learns(0.9))
kind = decide("the least forgotten that learns 90 %", "forgotten", learns(0.9))
decide("the least forgotten that learns 75 %", "forgotten", learns(0.75))
decide("the fastest step that learns 75 %", "s a step", learns(0.75))
is_small = lambda c: c["MB a task"].mean() < full["MB a task"] / 10 and learns(0.9)(c)  # noqa: E731
decide("the fastest answer, merged, that learns 90 % from a file under a tenth of full's", "merged", is_small)
lora, qlora, usual, adapters = (CHOICES[f"{TITLES[m]} at {rate:g}"] for m, rate in (("lora", 3e-3), ("qlora", 3e-3), ("bottleneck", 3e-3), ("bottleneck", 1e-2)))
print("QLoRA minus LoRA: " + ", ".join(f"{spread(qlora[name] - lora[name])} {name}" for name in ("task loss", "forgotten", "peak MB", "merged")))
disk = {m: 100 * mean[m]["MB a task"] + (m != "full") * 4 * N / 1e6 for m in decision.IMITATING}
print("disk for 100 tasks, MB: " + ", ".join(f"{TITLES[m]} {total:.0f}" for m, total in disk.items()))
assert len(best) > 1 and small[0] == little[0] == f"{TITLES['bottleneck']} at 0.01" and kind == ["full at 0.0003"]
assert below(usual["share"], adapters["share"]) and below(usual["forgotten"], adapters["forgotten"]), "the rate decides"
assert below(qlora["peak MB"], lora["peak MB"])
assert all(below(lora[k], qlora[k]) for k in ("task loss", "forgotten")), "QLoRA learns less than LoRA and forgets more"
assert below(np.ones(len(SEEDS)), lora["share"]) is None and 12 < full["MB a task"] / mean["lora"]["MB a task"] < 13
for c in (lora, qlora):
    assert learns(0.9)(c), "of either it is clear that it learns 90 %"

# %% [markdown]
# Who is best at the task is undecided, so what is scarce decides, and the rate with it. Of what clearly learns 90 %,
# adapters at 1e-2 have the smallest file and take the least memory; at their usual 3e-3 they learn less and forget
# less. Of those, full fine-tuning at a third of its usual rate forgets least. (Lesson 15's L2-SP is not among the
# lines.) LoRA learns about what full does, in a twelfth of the file. QLoRA takes a little less memory, learns a little
# less and forgets a little more; its case is the larger model, where the frozen weights are most of the memory. Which
# step and which answer are the fastest, the printed intervals tell of the machine that measured and of what else it
# did; nothing is asserted of them.
#
# ## 5 · And the other two jobs
#
# Instruction tuning sees the verses as one task of seven. RLHF starts where full fine-tuning ends, with the rule of
# section 1 as its judge.
#
# **Predict:** which share of instruction tuning's examples are verses?

# %%
asked = [p.removesuffix(" {input}") for p in TASKS["rewrite"].phrasings]
seen = [sum(any(p in tokenizer.decode(e.input_ids) for p in asked) for e in decision.mixed(640, seed)) for seed in SEEDS]
print(f"\ninstruction tuning: {', '.join(map(str, seen))} verses in 640 examples; the loss fell by {spread(learned('instructions'))}")
drawn = decision.instructions(("rewrite",), "train", cap=200)
fit = len(decision.encode_examples(drawn, tokenizer, decision.LENGTH, on_overflow="drop").examples)
print(f"of {len(drawn)} verses, asked for by an instruction, {fit} fit into the mix's {decision.LENGTH} tokens")
before, imitation, feedback = T["feedback"]["score_before"], 40 * TABLE["full"]["s a step"], 12 * TABLE["feedback"]["s a step"]
print(f"RLHF: the score of its answers changed by {spread(T['feedback']['score'] - before)}, from {spread(before)}")
print(f"      its 12 updates took {feedback.mean():.0f} s, after {imitation.mean():.0f} s of imitation")
assert 0.01 < np.mean(seen) / 640 < 0.03 and fit < len(drawn) / 10 and below(before, T["feedback"]["score"]) is None
assert below(imitation, feedback), "PPO took longer"

# %% [markdown]
# About one example in fifty is a verse, since most do not fit into the mix. The loss fell all the same; how much of
# that the verses did, these rows do not say. PPO took longer than all of the imitation before it, and what it did to
# the score is undecided. So if you have answers, imitate them first. A score is for what you cannot write down, but can
# recognize. The first verdict below compares the base tuned on instructions (*tuned*) with the base, with three
# answered questions in its prompt (*few-shot*), and with tuning on the same pairs without instructions (*bare*). In the
# second, *SFT* is imitation of answers, the *gold* is the rater's score (Lesson 9), and *best of 16* takes the answer
# that the reward model likes best.

# %% [markdown]
# > `which-6` instruction tuning: to follow instructions: **holds if**. 6 of 9 comparisons are as stated:
# >
# > - right answers, tuned beside base, new inputs: better (+0.345 [+0.300, +0.390]).
# > - right answers, tuned beside few-shot, new inputs: better (+0.351 [+0.306, +0.396]).
# > - right answers, tuned beside bare, new inputs: better (+0.083 [+0.054, +0.112]).
# > - right answers, tuned beside base, new phrasings: better (+0.309 [+0.258, +0.361]).
# > - right answers, tuned beside few-shot, new phrasings: better (+0.309 [+0.258, +0.361]).
# > - right answers, tuned beside bare, new phrasings: better (+0.038 [+0.007, +0.070]).
# > - right answers, tuned beside base, new tasks: equal (+0.000 [+0.000, +0.000]).
# > - right answers, tuned beside few-shot, new tasks: equal (+0.000 [+0.000, +0.000]).
# > - right answers, tuned beside bare, new tasks: equal (+0.000 [+0.000, +0.000]).
# >
# > (5 seeds, 344 test items)
#
# > `which-7` RLHF: align with preferences and values: **holds if**. PPO has a gold of 0.42:
# >
# > - +0.42 [+0.36, +0.48] beside the base.
# > - +0.08 [+0.03, +0.13] beside SFT.
# > - +0.05 [+0.00, +0.10] beside SFT on the preferred answers.
# > - -0.07 [-0.12, -0.02] beside the best of 16.
# >
# > It is clearly above the base, SFT and SFT on the preferred answers, at a KL of 5.8 nats from SFT. (5 seeds, 256 test
# > items)

# %% [markdown]
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
        text = "cannot be" if v is None else f"{v.mean():.3g}\n± {interval(v)[1]:.2g}"
        axis.text(j, i, text, ha="center", va="center", fontsize=9)
axis.set_xticks(range(len(shown)), shown)
axis.set_yticks(range(len(TITLES)), TITLES.values())
axis.tick_params(length=0, labeltop=True, labelbottom=False)
axis.set_title(f"Which method? Means of {len(SEEDS)} seeds with 95 % intervals; green is as good as the best of its column", pad=24)
axis.spines[:].set_visible(False)
figure.savefig(OUT / "16_which_method.png", dpi=120)
print("picture:", OUT / "16_which_method.png")

# %% [markdown]
# ## Break it: decide by one column
#
# Methods are often praised by one number, such as "trains 0.2 % of the parameters". Choose by it, then by two others.
#
# **Predict:** which method is least in trained parameters, which in forgetting, and is either of use?

# %%
print("\ndecided by one column alone:")
for name in ("trained %", "forgotten", "s a step"):
    one, c = min(CHOICES.items(), key=lambda item: (item[1][name].mean(), item[1]["task loss"].mean()))
    memory = c["peak MB"].mean() / full["peak MB"]
    print(f"  least {name:10s} {one:28s} learns {spread(c['share'], 2)} of what full does, with {memory:.0%} of its memory")
    assert name == "s a step" or learns(0.9)(c) is False
    assert name != "trained %" or (c["trained %"].mean() < 1 and memory > 0.8), "few parameters is not little memory"
assert 16 * N / 1e6 < full["peak MB"] / 3, "weights, gradients and Adam's moments are less than a third of full's memory"

# %% [markdown]
# Neither is, if 90 % is to be learned. Prompt tuning trains least, learns clearly less, and takes more than 80 % of the
# memory. The memory of a small model's step is mostly activations, of which every method has to keep most; the share of
# trained parameters says, but for prefixes, what is on the *disk*. (For 65 billion parameters the weights are most of
# the memory: Lesson 7.) LoRA's lowest rate forgets least, and clearly learns too little; the base itself forgets
# nothing. The fastest step names a method without asking what it learned.

# %% [markdown]
# ## Quiz
#
# **1.** A method trains a thousandth of the parameters. Why does it not need a thousandth of the memory?
#
# <details><summary>Answer</summary>
#
# The frozen weights and, for a small model above all, the activations stay, whatever is trained. The share of trained
# parameters says what is on the disk.
#
# </details>
#
# **2.** What do $k$ tasks take on the disk with full fine-tuning, and with adapters of $n$ stored parameters?
#
# <details><summary>Answer</summary>
#
# $4Nk$ bytes against $4N + 4nk$, where the base is frozen: the base once, and a small file a task.
#
# </details>
#
# **3.** A table has many columns. How does one come to a decision?
#
# <details><summary>Answer</summary>
#
# A wish under a condition: one column to make small, and what has to hold, clearly. Whoever decides by one column alone
# may get what learns nothing.
#
# </details>
#
# **4.** Two methods are undecided at the task. May one say that they are equally good?
#
# <details><summary>Answer</summary>
#
# No. The interval says how far apart they may be; more seeds might tell them apart. But other columns may decide
# meanwhile.
#
# </details>
#
# **5.** For which job is RLHF, and not imitation?
#
# <details><summary>Answer</summary>
#
# Where there are no right answers to imitate, only a judge: what one cannot write down, but can recognize.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("16.1", value)`, or at the terminal with
# `minipeft exercise 16.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 16.4 FILE.py`.
#
# **16.1 A hundred tasks.** LLaMA-7B in 16 bits, and for each of 100 tasks a LoRA of rank 8 on all linear layers, in 16
# bits, too: `count_parameters("llama-7b", mp.LoraConfig(r=8, target_modules="all-linear")).stored` numbers each, and
# `architecture("llama-7b").size` of the base (both from `minipeft.accounting`). How many GB ($10^9$ bytes) on the disk?
#
# **16.2 What grows with the batch?** Twice the batch: which of `weights`, (optimizer) `states`, `activations`, `disk`
# doubles?
#
# **16.3 LoRA's step.** Which share of the FLOPs of a full step does a step with LoRA take, by the rule of Lesson 12,
# without checkpointing?
#
# **16.4 Let the table decide.** Write `decide(cost, learned, least)`: the index of the method with the least cost, of
# those that learn at least the share `least`.
#
# Further, without a checker:
#
# - **Your table.** `minipeft compare --data my.jsonl --report report` with your own data. Which decisions of section 4
#   come out differently, and is the spread over the seeds small enough to say so?
# - **A bigger model.** Multiply: for a model of 7 billion parameters (Lesson 12's ledger), which columns of the table
#   grow with the parameters, which with the batch? Which decision turns?
# - **Half the examples.** Run section 3 again with 20 steps. Does the order in "learned" stay?
#
# <details><summary>Solution of 16.1</summary>
#
# A hundred whole models would take 1,348 GB.
#
# ```python
# from minipeft.accounting import architecture, count_parameters
#
# stored = count_parameters("llama-7b", mp.LoraConfig(r=8, target_modules="all-linear")).stored
# check("16.1", 2 * (architecture("llama-7b").size + 100 * stored) / 1e9)
# ```
#
# </details>
#
# <details><summary>Solution of 16.2</summary>
#
# Weights and the optimizer's states are there once.
#
# ```python
# check("16.2", "activations")
# ```
#
# </details>
#
# <details><summary>Solution of 16.3</summary>
#
# $4N$ of $6N$: the gradients of the frozen weights are left out.
#
# ```python
# check("16.3", 4 / 6)
# ```
#
# </details>
#
# <details><summary>Solution of 16.4</summary>
#
# ```python
# def decide(cost, learned, least):
#     return int(np.where(learned >= least, cost, np.inf).argmin())
#
# check("16.4", decide)
# ```
#
# </details>
