# %% [markdown]
# # Lesson 17 · Precision: sixteen bits, and what they lose
#
# Large models are trained in sixteen bits. They take half the bytes, and a GPU's *tensor cores*, its units for matrix
# products, multiply them many times faster (A100: 312 trillion operations a second, and 19.5 trillion in float32;
# NVIDIA A100 architecture whitepaper, 2020, Table 1). There are two formats, and each fails in its own way: in float16
# small gradients become zero, in bfloat16 small steps are lost (in float16 fewer are). This lesson makes both failures
# happen, measures them, and explains the remedies: *master weights*, *loss scaling*, *unscaling* and the *compute
# dtype*.
#
# You need Lessons 0, 3, 4, 7 and 12. Reading takes about 23 minutes (200 words or 25 lines of code a minute, up to the
# quiz). Where a line begins with **Predict**, write down your answer; the next cell computes it. Run it with `python
# lessons/17_precision.py` (about a minute on two cores), or open it as a notebook. It makes one run now, and reads the
# others, with five seeds each, from `lessons/results/17_precision.jsonl`. `python lessons/17_precision.py --full` (in
# a notebook `!python lessons/17_precision.py --full`) first computes those of the 85 runs that are missing there (all
# of them: about twenty minutes), and goes on with the lesson.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where the picture goes (`lessons/out`).

# %%
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import items, precision, sweep
from experiments.items import below, spread, within
from experiments.precision import CASES, FULL, trainer_of

import minipeft as mp
from minipeft import diagrams
from minipeft import functional as F
from minipeft.accounting import memory_ledger
from minipeft.autograd.autocast import FLOAT32, LOWER, rounded
from minipeft.claims.statistics import crossed
from minipeft.experiments.rows import complete, read_rows
from minipeft.experiments.seeds import over_seeds

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else next(p for p in (Path.cwd(), Path("lessons")) if (p / "results").exists())
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "17_precision.jsonl"
if REDUCED:
    print("REDUCED SETTING: the run of section 3 makes 2 steps for 40, on fewer verses, that of section 4 makes 3 for 8.")
    print("All comparisons are of the recorded runs, as in the full lesson.")

if "--full" in sys.argv:
    sweep(precision.run, precision.RUNS, RESULTS)
rows, SEEDS = complete(read_rows(RESULTS), precision.RUNS)
base, tokenizer = mp.load_base()
verses = items.test("rewrite")
tokens = items.tokens(verses)
# (what is trained, how) -> [seeds, verses]
LOSS = {case: items.per_token(over_seeds(rows, s, "nats"), tokens) for case, s in CASES.items()}
before_training = items.per_token([items.nats(base, verses)], tokens)
print(f"{len(rows)} runs were measured, with the seeds {SEEDS}; before training, the loss is {before_training.mean():.3f} nats a token")
assert (len(rows), len(SEEDS), len(verses)) == (85, 5, 512)


def beside(what, how, than="float32"):
    """The task loss of a case minus that of another, [seeds, verses]: above 0 it is worse."""
    return LOSS[what, how] - LOSS[what, than]


# %% [markdown]
# ## 1 · Two ways to spend sixteen bits
#
# A floating-point number has a sign, an exponent and a fraction. Here are the bits of three formats, each with its
# largest number and the distance from 1 to the next:

# %%
diagrams.number_formats().savefig(OUT / "17_precision_formats.png")

# %% [markdown]
# With the sign $s$, the exponent $e$ and the fraction $f$ of $p$ bits the number is
#
# $$x = (-1)^s \left(1 + \frac{f}{2^p}\right) 2^{e} .$$
#
# The exponent's bits buy *range*, the fraction's bits buy *resolution*: next to $x$ the numbers are $2^{e - p}$ apart.
# float32 has 8 exponent bits and 23 fraction bits. **bfloat16** has 8 and 7: the range of float32. **float16** has 5
# and 10: eight times the resolution, but its largest number is 65,504 and its lowest exponent $-14$. Below the lowest
# exponent the numbers of a format stay equally far apart, down to zero: they are called *subnormal*, and the smaller
# they are, the fewer correct bits they have. (Two relatives: TF32 has 8 and 10, and the A100's tensor cores can round
# float32 inputs to it, which PyTorch does for products only if `torch.backends.cuda.matmul.allow_tf32` is set; FP8 has
# 4 and 3 (E4M3) or 5 and 2 (E5M2), a range so short that each tensor needs a scale: Micikevicius et al. 2022,
# arXiv:2209.05433.)
#
# bfloat16 is the first half of a float32. To round to it, add half of the last place that stays, and cut. In the middle
# between two numbers the *even* one is taken, whose last bit is 0: so where that bit is 0 already, the code adds a
# little less than half.
#
# **Predict:** what becomes of 1.002, of 70,000 and of 0.00000001 in each of the two?

# %%
def to_bfloat16(x):
    """The nearest bfloat16 of float32 numbers, of two the even one."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    last = (bits >> 16) & 1  # of the bits that stay: a tie goes to where it is 0
    return ((bits + 0x7FFF + last) & 0xFFFF0000).view(np.float32)


def places(x, dtype):
    """How far from x, on the outside, the next number of a format is: 2^(e - p)."""
    lowest, p = {"bfloat16": (-126, 7), "float16": (-14, 10)}[dtype]
    e = np.maximum(np.frexp(np.abs(x))[1] - 1, lowest)  # not lower: subnormal
    return np.ldexp(1.0, e - p)


sample = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
assert np.array_equal(to_bfloat16(sample), rounded(sample, "bfloat16"))
assert np.array_equal(sample.astype(np.float16).astype(np.float32), rounded(sample, "float16"))
normal = sample[np.abs(sample) >= 2.0**-14]  # no subnormal number of float16
print("\n           1 + 1/500      70000      1e-8    relative error, at most")
for dtype in ("bfloat16", "float16"):
    values = rounded(np.float32([1 + 1 / 500, 70000, 1e-8]), dtype)
    worst = float(np.abs(rounded(normal, dtype) / normal - 1).max())
    print(f"{dtype:10s}", *(f"{v:10.6g}" for v in values), f"   {worst:.5f}")
    assert np.all(np.abs(rounded(sample, dtype) - sample) <= places(sample, dtype) / 2)
    assert worst < 0.004
assert rounded(np.float32([1 + 1 / 500]), "bfloat16") == 1
assert rounded(np.float32([70000, 1e-8]), "float16").tolist() == [math.inf, 0] and np.finfo(np.float16).max == 65504

# %% [markdown]
# bfloat16 rounds 1.002 to 1, and keeps the other two to within half a percent. float16 keeps 1.002 to within 0.0001,
# but 70,000 *overflows* to infinity and 0.00000001 *underflows* to zero.
#
# ## 2 · Mixed precision
#
# So not every operation is rounded. Inside `with mp.autocast("bfloat16"):` products round their inputs and their
# result, and sum in float32 in between, as tensor cores do. Mainly two kinds of operation stay in float32: sums of many
# numbers, because a running sum in sixteen bits soon stops growing, and exponentials, because they can leave float16's
# range. (`softmax` is in the list for its sum: it subtracts the largest logit first, Lesson 0, so its exponentials are
# at most 1.) The lists printed below are PyTorch's for a GPU, and minipeft's own operations that contain products, as
# `rotary_attention`. (In float32 are also `to`, an explicit change of dtype, and `inv`, of a matrix, which has no other
# form.) PyTorch's list for the CPU (`device_type="cpu"`) leaves far less in float32.

# %%
print("\nrounded:   ", ", ".join(sorted(LOWER)))
print("in float32:", ", ".join(sorted(FLOAT32["cuda"])))
running = np.float32(0)
for _ in range(1000):
    running = to_bfloat16(running + np.float32(1))
print(f"a thousand ones, summed one by one in bfloat16: {running:.0f};  e^12 in float16: {rounded(np.exp(np.float32([12])), 'float16')[0]}")
assert running == 256 and np.exp(11) < 65504 < np.exp(12)
x, w = mp.Tensor(sample[:4096].reshape(16, 256)), mp.Tensor(sample[4096:6144].reshape(8, 256))
with mp.autocast("bfloat16"):
    y = F.linear(x, w)
    wide = F.softmax(y)
once = rounded(rounded(x.data, "bfloat16") @ rounded(w.data, "bfloat16").T, "bfloat16")
assert np.array_equal(y.data, once) or np.abs(y.data - once).max() <= places(once, "bfloat16").max(), "inputs, then the sum, once"
assert not np.array_equal(wide.data, rounded(wide.data, "bfloat16"))

# %% [markdown]
# Now train Lesson 3's task for 40 steps, all weights, at the usual learning rate. *Task loss* is the loss on 512 verses
# of the test split, in nats a token (those of Lessons 3 to 6; with the prompt up to 260 characters, as only 200 of the
# split have at most 190, as in training); intervals are of 95 %, over seeds and verses together. No rate was tuned.
#
# **Predict:** float32 learns about one nat. How much of it does mixed precision lose?

# %%
print(f"\nall weights, rate 1e-3: float32 ends at {spread(LOSS['full', 'float32'])}; in mixed precision, minus that:")
for how in ("bf16", "fp16"):
    print(f"  {how}: {spread(beside('full', how), 4)}")
    assert within(beside("full", how), 0.001)
total = before_training - LOSS["full", "float32"]
print(f"of {spread(total)} that are learned")
assert 0.9 < crossed(total).low and crossed(total).high < 1.1

# %% [markdown]
# Less than a thousandth of a nat: both intervals lie within that. But both runs kept their weights in float32, and the
# float16 run scaled its loss. The next two sections take these away.
#
# ## 3 · Why a float32 master copy
#
# **Predict:** a weight is 1. A thousand steps take 0.001 from it each, in bfloat16. Where does it end?

# %%
weight = np.float32(1)
for _ in range(1000):
    weight = to_bfloat16(weight - np.float32(0.001))
print(f"\nafter a thousand steps of 0.001: {weight}")
assert weight == 1

# %% [markdown]
# At 1: it has not moved at all. A step is lost as a whole where it is smaller than half of the distance to the next
# number. With $2^e \le |w| < 2^{e+1}$ that distance is $2^{e-7}$. So a step is lost
#
# $$\text{where}\quad |\Delta w| < \tfrac12\, 2^{e - 7} = 2^{-9}\, 2^{e + 1}, \qquad\text{and surely where}\quad |\Delta w| < 2^{-9}\, |w| ,$$
#
# as $|w| < 2^{e+1}$. (From $|w| = 2^e$ itself toward zero the distance is half as large; then only the second holds.)
# 0.1 % of a weight is always lost, for $2^{-9}$ is 0.2 %. A *master copy* of the weights (*master weights*) in
# float32 adds the thousand steps up; each forward pass rounds it anew. In minipeft as in PyTorch's autocast, the
# parameters themselves are the master copy: a weight is cast to sixteen bits where it is used, and its gradient is cast
# back to float32. Two remedies without a float32 copy are *stochastic rounding* (exercise 17.1) and *Kahan summation*,
# which stores what was rounded away, in sixteen bits, and adds it to the next step (Zamirai et al. 2020,
# arXiv:2010.06192).
#
# Adam's step is about the learning rate in every weight, and less where its gradient shrinks or changes sign (Lesson 0,
# section 6). The share of weights that a step as long as the rate cannot move is known before training. Shorter steps
# lose as much or more:

# %%
weights = np.concatenate([p.numpy().ravel() for p in base.parameters()])


def stuck(rate, dtype, weights=weights):
    """The share of the weights that a step of this size cannot move."""
    return float((rate < places(rounded(weights, dtype), dtype) / 2).mean())


RATES = (1e-3, 1e-4, 3e-5, 1e-5)
print("\nweights that a step cannot move, by its size:", ", ".join(f"{rate:g}" for rate in RATES))
for dtype in ("bfloat16", "float16"):
    print(f"  {dtype:10s}", ", ".join(f"{stuck(rate, dtype):.1%}" for rate in RATES))
assert stuck(1e-3, "bfloat16") < 0.01 and stuck(3e-5, "bfloat16") > 0.9 and 0.4 < stuck(3e-5, "float16") < 0.5

# %%
GREY, BLUE, ORANGE, GREEN = "0.75", "#0072B2", "#D55E00", "#009E73"
figure, b = plt.subplots(figsize=(6, 4.4), layout="constrained")
grid = np.logspace(-6, -2, 40 if REDUCED else 400)
for dtype, color in (("bfloat16", ORANGE), ("float16", BLUE)):
    b.plot(grid, [stuck(rate, dtype, weights[::37]) for rate in grid], color=color, label=dtype)
for rate, text in ((1e-3, "usual rate"), (3e-5, "low rate")):
    b.axvline(rate, color="0.4", linestyle=":", linewidth=1)
    b.text(rate * 1.1, 0.5, text, rotation=90, va="center", fontsize=8, color="0.4")
b.set(xscale="log", title="Weights of the base that a step cannot move", xlabel="size of the step", ylabel="share")
b.legend(fontsize=8)
figure.savefig(OUT / "17_precision_steps.png", dpi=120)

# %% [markdown]
# A step of 0.001 is more than half of the last place of a weight below 0.5, as nearly all of this base are, so in
# bfloat16 it moves nearly every one; a step of 0.00003 moves hardly any (in float16 it moves over half). Train all
# weights at both rates, with a master copy and without. The run without one rounds its weights at the start and after
# every step, `mp.train.WeightsIn(model, "bfloat16")`, and changes nothing else. One of these runs is made now.
#
# **Predict:** what does the lack of a master copy cost at the rate 1e-3, and what at 3e-5?

# %%
case = replace(CASES["full, low rate", "bf16, no master"], **({"steps": 2, "test": 4} if REDUCED else {}))
trainer, callbacks = trainer_of(case)
before = {name: p.numpy().copy() for name, p in trainer.trainable.items()}
trainer.train(callbacks=callbacks)
same = sum(int((before[name] == p.numpy()).sum()) for name, p in trainer.trainable.items()) / weights.size
ended = sum(precision.tested(trainer, case.test)) / items.tokens(items.test("rewrite", case.test)).sum()
print(f"\nnow, rate 3e-5, no master copy: loss {ended:.3f} after {case.steps} steps; {same:.0%} of the weights are where they were")
assert same > 0.5
if not REDUCED:
    assert abs(ended - LOSS["full, low rate", "bf16, no master"][SEEDS.index(0)].mean()) < 0.01
print("\n                        with a master copy    without               difference")
for what, rate in (("full", 1e-3), ("full, low rate", 3e-5)):
    with_one, without = LOSS[what, "bf16"], LOSS[what, "bf16, no master"]
    print(f"  rate {rate:<8g}          {spread(with_one):22s}{spread(without):22s}{spread(without - with_one)}")
    assert below(with_one, without), "without it less is learned"
    _, low, high = crossed(without - with_one)
    assert {1e-3: 0.01, 3e-5: 0.4}[rate] < low and high < {1e-3: 0.03, 3e-5: 0.5}[rate], "about two hundredths; nearly half a nat"
learned = [before_training - LOSS["full, low rate", how] for how in ("bf16", "bf16, no master")]
kept = items.ratio(learned[1], learned[0])
print(f"at the low rate the run without one learns {spread(kept)} of what the other learns")
assert 0.13 < kept.low and kept.high < 0.15, "about a seventh"

# %% [markdown]
# At 1e-3 it costs about two hundredths of a nat. (A step of full size moves nearly every weight, but in whole places:
# it is rounded. And where a step is shorter, as the schedule lowers the rate to zero or as a gradient changes sign, it
# can be lost here, too. These runs do not tell which of the two costs more.) At 3e-5, where a full step moves under a
# tenth of the weights, it costs nearly half a nat, and about a seventh of the learning is left. No error is raised and
# the loss still falls, so the failure is easy to miss.
#
# ## 4 · Gradients on the way back, and the loss scale
#
# The backward pass rounds gradients, too. It goes from the loss through the *activations*, the outputs of the modules,
# to the weights. What goes through a gradient that becomes zero on the way is lost for the weights before it. float16's
# smallest number above zero is $2^{-24}$; what is smaller than half of that becomes zero: it is *flushed*. Below are
# the gradients, other than zero, of all activations of this model's blocks in one step.
#
# **Predict:** how many of them are flushed in float16, and what does it cost?

# %%
probe, _ = trainer_of(replace(FULL, steps=1))
whole = probe.collate(probe.train_examples)
batch = whole.arguments
with probe.model.watch("*layers*") as seen:
    probe.model.loss(**batch).backward()
G = np.concatenate([np.abs(mp.backend.to_numpy(t.grad)).ravel() for t in seen.values() if isinstance(t, mp.Tensor)])
G = G[G > 0]
SCALES = {"2^-10": 2.0**-10, "1": 1.0, "2^16": 2.0**16}
flushed = {name: float((S * G < 2.0**-25).mean()) for name, S in SCALES.items()}
finest = float((2.0**-10 * G < 2.0**-134).mean())
print(f"\n{whole.weight} tokens are learned from; {G.size:,} gradients of activations, "
      f"from {G.min():.1e} to {G.max():.1e}, half of them below {np.median(G):.1e}")
print("flushed by float16 when multiplied by " + ", ".join(f"{name}: {share:.1%}" for name, share in flushed.items()))
print(f"flushed by bfloat16 when multiplied by 2^-10: {finest:.1%}")
print(f"training in float16, no scale, minus float32: {spread(beside('full', 'fp16, S = 1'), 4)}")
assert flushed["1"] < 0.02 and flushed["2^-10"] > 0.5 and finest == 0
assert within(beside("full", "fp16, S = 1"), 0.001) and np.finfo(np.float16).smallest_subnormal == 2.0**-24

# %%
figure, a = plt.subplots(figsize=(6, 4.4), layout="constrained")
bins = np.arange(-45, 10, 1.0)
for (name, S), color in zip(SCALES.items(), (ORANGE, BLUE, GREEN)):
    share = np.histogram(np.log2(G * S), len(bins) - 1, (bins[0], bins[-1]))[0] / G.size
    text = name if name == "1" else f"$2^{{{math.log2(S):.0f}}}$"
    a.stairs(share, bins, color=color, fill=True, alpha=0.35, label=f"S = {text}: {flushed[name]:.1%} flushed")
a.set_ylim(0, 1.45 * a.get_ylim()[1])
a.axvspan(bins[0], -25, color="black", alpha=0.08)
a.axvline(-14, color="0.4", linestyle=":", linewidth=1)
a.text(-44.3, a.get_ylim()[1] * 0.94, "zero in float16", fontsize=9)
a.text(-24.6, a.get_ylim()[1] * 0.94, "subnormal", fontsize=9, color="0.4")
a.set(title="One step's gradients of activations, times S", xlabel="$\\log_2$ |gradient|", ylabel="share", xlim=(-45, 9), yticks=[])
a.legend(fontsize=8, loc="upper right")
figure.savefig(OUT / "17_precision_gradients.png", dpi=120)

# %% [markdown]
# About one in a hundred, and it costs less than a thousandth of a nat. But this step is small. The loss is a *mean*
# over the tokens of a step, so the gradient of each activation carries a factor of one over their number. Here these
# are a few hundred tokens; in GPT-3's training they are 3.2 million (Brown et al. 2020, arXiv:2005.14165, Table 2.1).
# Such a step is computed in parts whose gradients are added (*gradient accumulation*), and each part's
# loss is divided by the tokens of the whole step.
#
# We imitate the size of gradients in a step 1024 times as large as ours, and add no batches: the loss of our batch is
# multiplied by $S = 2^{-10}$. Before Adam uses them, the gradients of the *weights* are divided by $S$ in float32, so
# in exact arithmetic this run equals the one with $S = 1$. What differs is what float16 lost in between. Of the float32
# gradients above, times $S$, it would flush six in ten; the others, subnormal, lose bits.
#
# **Predict:** what does that cost in float16? And in bfloat16?

# %%
print("\nthe loss of each batch is that of a step 1024 times as large:")
for how in ("fp16, S = 2^-10", "bf16, S = 2^-10"):
    print(f"  {how}: minus float32 {spread(beside('full', how), 4)}; each seed", *(f"{x:+.4f}" for x in beside("full", how).mean(axis=1)))
lost, usual = (beside("full", f"fp16, S = {S}").mean(axis=1) for S in ("2^-10", "1"))
assert lost.min() > 100 * abs(usual).max(), "in every seed, over 100 times more"
assert 0.1 < crossed(beside("full", "fp16, S = 2^-10")).low and 0.15 < lost.min() and lost.max() < 0.55
assert np.array_equal(LOSS["full", "bf16, S = 2^-10"], LOSS["full", "bf16"]), "a power of two changes no fraction"
with mp.PrecisionReport(probe.model) as report, mp.autocast("float16"):
    (probe.model.loss(**batch) * SCALES["2^-10"]).backward()
first = report.first_flush
positions, lost = first.size // base.config.vocab_size, first.flushed / (whole.weight * base.config.vocab_size)
print(f"\n{report}\nof {positions} positions {whole.weight} are learned from; of their gradients of logits {lost:.1%} became zero")
assert first.op == "cross_entropy" and report.first_overflow is None and 0.99 < lost < 1 and positions > 2 * whole.weight
assert (2.0**-10 * G).max() < 2.0**-14, "all are subnormal"

# %% [markdown]
# float16 loses between 0.15 and 0.55 nats in each run, of about one that is learned. Here the scale is the cause: with
# all else the same, each loses more than a hundred times what any does at $S = 1$. The interval of the mean is wide,
# but above 0.1. bfloat16 loses nothing: it ends with the *same* loss as at $S = 1$, in every digit of the rows. A power
# of two changes only the exponent, and bfloat16's has room.
#
# `mp.PrecisionReport` names the operation and the module where the first gradient was flushed: here `cross_entropy`,
# whose gradient is that of the logits. (The six in ten leave it out: they are of the blocks alone.) Most tokens are
# improbable, so most of its numbers are tiny: over 99 % became zero where a token is learned from. The report's own
# share is smaller: it counts all positions, and most are not learned from, so their gradient was zero before.
#
# The remedy is *loss scaling* (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2: one of their networks diverges
# without it). Gradients are linear in the loss, so train on
#
# $$S \cdot L, \qquad \frac{\partial (S L)}{\partial w} = S\, \frac{\partial L}{\partial w},$$
#
# and divide the weights' gradients by $S$ at the end, in float32. $S$ should be so large that hardly anything is
# flushed, but nothing may exceed 65,504: no gradient of an activation or a weight, in any step. These limits are not
# known beforehand, so `mp.GradScaler` searches (*dynamic* loss scaling): it starts at $2^{16}$, skips a step whose
# gradients overflow and halves $S$; after 2,000 good steps in a row it doubles $S$. Here a skipped step still counts
# for the schedule of the learning rate; Hugging Face's `Trainer` does not advance the schedule then. We start too high
# on purpose:

# %%
trainer, _ = trainer_of(replace(FULL, compute="float16", steps=3 if REDUCED else 8))
trainer.scaler = mp.GradScaler(init_scale=2.0**22)
records = [record for record in trainer.train().history if "loss" in record]
print("\nstep   scale    norm of the gradient")
for record in records:
    norm = f"{record['grad_norm']:.3f}" if "grad_norm" in record else "overflow: no step"
    print(f"{record['step']:4d}    2^{math.log2(record['loss_scale']):.0f}    {norm}")
assert "grad_norm" not in records[0] and records[1]["loss_scale"] == records[0]["loss_scale"] / 2
assert trainer.scaler.get_scale() < 2.0**22
usual = mp.GradScaler().state_dict()
assert (usual["scale"], usual["backoff_factor"], usual["growth_factor"], usual["growth_interval"]) == (2.0**16, 0.5, 2, 2000)

# %% [markdown]
# ## 5 · "Unscale FP16 gradients"
#
# *Unscaling* is the division by $S$. `scaler.unscale_(optimizer)` divides the gradients of the parameters that the
# optimizer holds, once a step. Two mistakes are common.
#
# The first is about *clipping*: a gradient whose norm is larger than `max_grad_norm` is shortened to it. Before
# unscaling every gradient is $S$ times too long. If it is clipped then, it is divided by $S$ after that.
#
# **Predict:** how long is what is left, with `max_grad_norm` 1?

# %%
def clipped(unscale_first):
    """The norm of the gradient that the optimizer gets, at max_grad_norm = 1."""
    optimizer, scaler = mp.optim.SGD(probe.model.parameters(), lr=1e-3), mp.GradScaler()
    probe.model.zero_grad()
    with mp.autocast("float16"):
        loss = probe.model.loss(**batch)
    scaler.scale(loss).backward()
    if unscale_first:
        scaler.unscale_(optimizer)
    mp.optim.clip_grad_norm(probe.model.parameters(), 1.0)
    if not unscale_first:
        scaler.unscale_(optimizer)
    return mp.optim.clip_grad_norm(probe.model.parameters(), math.inf)


right, wrong = clipped(True), clipped(False)
print(f"\nunscale, then clip: {right:.3f};  clip, then unscale: {wrong:.2e} = 2^{math.log2(wrong):.1f}")
assert abs(right - 1) < 1e-3 and abs(wrong * 2**16 - 1) < 1e-3

# %% [markdown]
# $2^{-16}$: 65,536 times too short, and so is a step of SGD. Adam divides by the gradient's own size (Lesson 0), and so
# hides much of the mistake, not all: over this base's 1.4 million weights, a norm of $2^{-16}$ is $1.3 \cdot 10^{-8}$ a
# weight, near `eps`, the $10^{-8}$ that Adam adds there.
#
# The second mistake gives PyTorch's error *"Attempting to unscale FP16 gradients"* (PEFT's documentation explains it
# under Troubleshooting). The weights to be trained were loaded in float16 (`dtype=torch.float16`), and mixed precision
# was turned on (`fp16=True`). A parameter's gradient has the parameter's dtype, so it would be divided by $S$ in
# float16.
#
# **Predict:** with $S = 2^{16}$ nearly no gradient of a weight is flushed. What becomes of them when they are divided
# by $S$ in float16, and in float32?

# %%
probe.model.zero_grad()
with mp.autocast("float16"):
    loss = probe.model.loss(**batch)
(loss * 2.0**16).backward()
scaled = np.concatenate([np.abs(rounded(mp.backend.to_numpy(p.grad), "float16")).ravel() for p in probe.model.parameters()])
in_16, in_32 = rounded(scaled / np.float32(2**16), "float16"), scaled / np.float32(2**16)
low = float((in_16 < 2.0**-14).mean() - (in_16 == 0).mean())
print(f"\n{scaled.size:,} gradients of weights, half of them below {np.median(in_32):.1e}; zero as they arrive: {(scaled == 0).mean():.2%}")
print(f"unscaled in float16: {(in_16 == 0).mean():.1%} are zero and {low:.1%} subnormal;  in float32: {(in_32 == 0).mean():.2%} are zero")
assert (in_32 == 0).mean() == (scaled == 0).mean() < 0.001 and 0.01 < (in_16 == 0).mean() < 0.02 and 0.1 < low < 0.15
half = mp.nn.Parameter(np.ones(2, np.float32))
optimizer = mp.optim.SGD([half], lr=1.0)
half.data, half.grad = half.data.astype(np.float16), np.ones(2, np.float16)
try:
    mp.GradScaler().unscale_(optimizer)
    raise SystemExit("it should have been refused")
except ValueError as error:
    print(error)
    assert "Attempting to unscale FP16 gradients" in str(error)

# %% [markdown]
# In float32 nothing is lost. In float16 between one and two in a hundred become zero, and more than one in ten becomes
# subnormal and loses bits. The scale still helped on the way to the weights, but for these gradients the division takes
# back what it had saved. What that costs no run here measures. (Under Adam a tiny gradient need not be a tiny step: a
# steady one of $2^{-27}$, flushed here, makes over four tenths of a full step, even beside `eps` $= 10^{-8}$.) PyTorch
# refuses instead. The remedy is a master copy: load the weights that are trained in float32. With adapters those are
# few, and PEFT casts them to float32 itself (`autocast_adapter_dtype`), over a base in sixteen bits.
#
# ## 6 · Adapters, and QLoRA's compute dtype
#
# QLoRA *stores* its base in four bits, and *computes* in another dtype, `bnb_4bit_compute_dtype`: the weights are
# dequantized to it and multiplied in it.
#
# **Predict:** four bits change a matrix by 9 %, and bfloat16 by 0.2 %. What is the error of both?

# %%
matrix = base.model.layers[0].mlp.up_proj.weight.numpy()
back = mp.quant.dequantize_4bit(*mp.quant.quantize_4bit(matrix))
norm = np.linalg.norm(matrix)
four, then = np.linalg.norm(back - matrix) / norm, {d: np.linalg.norm(rounded(back, d) - matrix) / norm for d in ("bfloat16", "float16")}
print(f"\nrelative error of a matrix in four bits: {four:.5f}; rounded to bfloat16 after that {then['bfloat16']:.5f}, "
      f"to float16 {then['float16']:.5f}")
alone = np.linalg.norm(rounded(back, "bfloat16") - back) / norm
assert round(four, 2) == 0.09 and 0.0015 < alone < 0.0025 and max(then.values()) < 1.0002 * four
assert abs(np.hypot(four, alone) - then["bfloat16"]) < 1e-4
print(f"\nminus its own float32:       {'bf16':30s}{'fp16':30s}bf16, adapter held in bf16")
for what in ("LoRA", "QLoRA"):
    cells = [spread(beside(what, how), 5) for how in ("bf16", "fp16", "bf16, no master") if (what, how) in LOSS]
    print(f"  {what:6s} ({spread(LOSS[what, 'float32'])})", "".join(f"{cell:30s}" for cell in cells))
for what in ("LoRA", "QLoRA"):
    for how in ("bf16", "fp16"):
        assert within(beside(what, how), 0.001)
assert below(LOSS["LoRA", "float32"], LOSS["LoRA", "bf16, no master"]) and crossed(beside("LoRA", "bf16, no master")).high < 0.002
assert below(LOSS["LoRA", "bf16"], LOSS["LoRA", "bf16, no master"]), "a master copy of the adapter helps, a little"

# %%
precision.runs_picture({case: crossed(before_training - losses) for case, losses in LOSS.items()}).savefig(
    OUT / "17_precision_runs.png", dpi=120
)

# %% [markdown]
# Still 9 %: the two errors are as good as uncorrelated, so their squares add, and $\sqrt{0.092^2 + 0.002^2}$ is 0.092.
# In training each interval of the first two columns lies within 0.001 nats of 0. So here the compute dtype may be
# chosen for the GPU: bfloat16 where its tensor cores have it (NVIDIA's since the A100), float16 with a loss scale on
# older ones, where the forward pass stays below 65,504 (*Break it*). `BitsAndBytesConfig`'s default in transformers is
# float32, which does not use sixteen-bit tensor cores. A LoRA adapter that is itself held in bfloat16 ends with a
# clearly larger loss, by less than 0.002 nats, at its usual rate of 3e-3.
#
# ## 7 · The ledger beside
#
# In a ledger, *activations* are all that the forward pass keeps for the backward pass (Lesson 12), not outputs alone.
#
# **Predict:** mixed precision halves the bytes of a number. LLaMA-7B, all weights trained with Adam: how many of its
# bytes of weights, gradients and moments does it save?

# %%
print("\nLLaMA-7B, one sequence of 512, GB:")
print(f"{'':26s}{'weights':>9s}{'master':>8s}{'gradients':>11s}{'moments':>9s}{'states':>8s}{'a parameter':>13s}{'activations':>13s}")
parameters, states, kept = mp.accounting.architecture("llama-7b").size, {}, {}
qlora = mp.LoraConfig(r=8, target_modules="all-linear")
for name, config, options in (
    ("float32", None, {"precision": "float32"}),
    ("mixed", None, {"precision": "mixed"}),
    ("bfloat16, no master", None, {"precision": "bfloat16"}),
    ("QLoRA, computed in 16 bits", qlora, {"precision": "mixed", "quantization": "nf4"}),
):
    ledger = memory_ledger("llama-7b", config, batch=1, seq_len=512, **options)
    held, states[name], kept[name] = ledger.held, ledger.model_states, ledger.held["activations"]
    stored = sum(held.get(line, 0) for line in ("frozen weights", "trained weights", "adapters"))
    cells = (stored, held.get("master copies", 0), held["gradients"], held["optimizer states"], states[name])
    print(
        f"{name:26s}"
        + "".join(f"{c / 1e9:{w}.1f}" for c, w in zip(cells, (9, 8, 11, 9, 8)))
        + f"{states[name] / parameters:13.2f}{held['activations'] / 1e9:13.1f}"
    )
second = np.square(sample)  # stands for Adam's second moment; its gradient is now 0
assert np.array_equal(to_bfloat16(0.999 * to_bfloat16(second)), to_bfloat16(second)), "none falls"
steady, v = second[:1000], np.zeros(1000, np.float32)
for _ in range(2000):
    v = to_bfloat16(0.999 * v + 0.001 * steady)
assert 2.9 < (steady / v).min() < (steady / v).max() < 5, "each stops rising at a fifth to a third of it"
h, a, f = 4096, 32, 11008  # LLaMA-7B's width, heads and width of the MLP. A block keeps 24 h + 4 a + 8 f + 8 bytes (Lesson 12, k = h):
wide, narrow = 8 * h + 4 * a + 8, 16 * h + 8 * f  # in float32: the norms' inputs and 1/rms, and the softmax's sums; in 16 bits: all else
print(f"of its activations PyTorch keeps {(narrow + wide) / (2 * narrow + wide):.2f} times the bytes of float32")
assert 0.54 < (narrow + wide) / (2 * narrow + wide) < 0.56
assert rounded(np.float32([0.001 * 0.005**2]), "float16") == 0, "nothing is added"
assert states["mixed"] == states["float32"] == 16 * parameters and states["bfloat16, no master"] == 12 * parameters
assert states["QLoRA, computed in 16 bits"] < parameters and abs(kept["mixed"] / kept["float32"] - 1 / 2) < 0.01

# %%
figure, d = plt.subplots(figsize=(6, 3), layout="constrained")
left = np.zeros(3)
names = ("float32", "mixed", "bfloat16, no master")
for line, color, values in (
    ("weights", BLUE, (4, 2, 2)), ("master copy", ORANGE, (0, 4, 0)), ("gradients", GREEN, (4, 2, 2)), ("moments", GREY, (8, 8, 8)),
):  # fmt: skip
    d.barh(names[::-1], values[::-1], left=left, color=color, label=line)
    left += values[::-1]
d.set(title="Bytes a trained parameter, with Adam", xlabel="bytes", xticks=range(0, 17, 4), xlim=(0, 22))
d.legend(fontsize=8, loc="lower right")
figure.savefig(OUT / "17_precision_bytes.png", dpi=120)

# %% [markdown]
# None. It is sixteen bytes a parameter before (weight 4, gradient 4, moments 8) and after (2, 2, 8, and 4 for the
# master copy). (Autocast keeps $4 + 4 + 8$ as they are: the same sum. PyTorch's casts of the weights, two bytes each,
# come on top until the backward pass has used them.) Mixed precision buys the speed of tensor cores, and nearly half of
# the activations: the ledger counts two bytes for each number, but PyTorch keeps inputs of norms in float32, so a block
# of LLaMA-7B keeps 0.55 of the bytes (Lesson 12, section 4). Without a master copy a parameter takes 12; section 3's
# run had such weights, but gradients in float32. The moments are float32 in all of them. Adam's second one, $v$, moves
# by $0.001\, (g^2 - v)$ in a step ($\beta_2 = 0.999$). In bfloat16 it never falls, as 0.1 % of $v$ is lost (section 3):
# steps get too short. Nor does it reach a steady $g^2$: it stops where that move is half a place, $v/512$ to $v/256$,
# so at a fifth to a third of $g^2$, and steps, which go with $1/\sqrt v$, get about twice too long. (Which of the two
# prevails, no run here shows.) In float16 what a gradient below 0.005 adds, $0.001\, g^2$, is flushed. QLoRA trains few
# parameters, so it has few to copy.

# %% [markdown]
# ## Break it: too large for any scale
#
# A loss scale multiplies gradients. It cannot help a *forward* pass that exceeds 65,504. T5 was trained with
# activations in bfloat16 (google-research/text-to-text-transfer-transformer, issue 539), and in float16 one of its
# layers overflowed, at 66,246 (huggingface/transformers, issue 5651). Here two matrices of one layer are multiplied by
# 200.
#
# **Predict:** in which of the two formats is the loss still a number?

# %%
hot = base.copy()
for name in ("gate_proj", "up_proj"):
    getattr(hot.model.layers[2].mlp, name).weight.data *= 200
ends = {}
for dtype in ("float16", "bfloat16"):
    with np.errstate(all="ignore"), mp.PrecisionReport(hot) as report, mp.autocast(dtype), mp.no_grad():
        ends[dtype] = hot.loss(**batch).item()
    print(f"\n{dtype}: the loss is {ends[dtype]:.3f}; first overflow: {report.first_overflow or 'none'}")
    assert (report.first_overflow is not None) == (dtype == "float16")
    if report.first_overflow:
        assert report.first_overflow.module.startswith("model.layers.2.mlp")
exact = hot.loss(**batch).item()
assert not math.isfinite(ends["float16"]) and abs(ends["bfloat16"] / exact - 1) < 0.05

# %% [markdown]
# Only in bfloat16, and there it is within 5 % of float32's. In float16 the layer overflows, and the report names it.
#
# ## Quiz
#
# **1.** What does bfloat16 give up, and what float16?
#
# <details><summary>Answer</summary>
#
# bfloat16 keeps the range of float32, all 8 bits of the exponent, and has only 7 bits of the fraction: it rounds 1.002
# to 1. float16 has 10, but a far shorter range: 70,000 overflows and 0.00000001 underflows.
#
# </details>
#
# **2.** A weight of 1 is in bfloat16, and a thousand steps take 0.001 from it each. Where does it end, and what would
# have saved the steps?
#
# <details><summary>Answer</summary>
#
# At 1: each step is smaller than half of the last place and lost as a whole. A master copy in float32 adds them up
# first.
#
# </details>
#
# **3.** Why does the danger that float16 flushes gradients grow with the batch?
#
# <details><summary>Answer</summary>
#
# The loss is a mean over the tokens of a step, so every gradient of an activation carries a factor of one over their
# number.
#
# </details>
#
# **4.** What must be done first, clipping the gradient or unscaling it, and what happens otherwise?
#
# <details><summary>Answer</summary>
#
# Unscaling. Otherwise every gradient is $S$ times too long when it is clipped to `max_grad_norm`, and divided by $S$
# after that: a step of SGD is $S$ times too short. Adam hides the mistake where gradients stay large beside `eps`.
#
# </details>
#
# **5.** How many bytes of weights, gradients and moments does mixed precision save for a trained parameter?
#
# <details><summary>Answer</summary>
#
# None: $4 + 4 + 8$ before, $2 + 2 + 8 + 4$ after, as the master copy takes what weights and gradients gave. It buys
# speed, and nearly half of the activations.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("17.2", value)`, or at the terminal with
# `minipeft exercise 17.2 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 17.1 FILE.py`.
#
# **17.1 Stochastic rounding.** Round up or down at random, up with the probability of how far along $x$ lies between
# its two neighbors. Then a step of 0.001 moves a weight of 1 one time in four, by four times as much, and *on average*
# by 0.001: a master copy in the mean. Write `stochastic(x, generator)` for float32 numbers and bfloat16. (Hint: the
# sixteen bits that are cut off are that probability. Add a random number of sixteen bits, and cut.) Then put it into
# `WeightsIn`, and run the low rate.
#
# **17.2 The largest step that is lost.** A weight is 0.02, in bfloat16. Up to which size is a step lost as a whole?
#
# **17.3 How high can a scale be?** The largest gradient of a step is 0.013. Which is the largest scale $2^k$ with which
# it does not overflow float16? Give $k$.
#
# **17.4 Who moves?** A weight is 3, and a step takes 0.005 from it. In which format does it move: bfloat16, float16,
# both or neither?
#
# Projects, with no answer written down:
#
# - **How low can a scale be?** In section 4, $S = 1$ was enough and $2^{-10}$ was not. Find the largest $S$ that costs
#   0.1 nats, over five seeds, and the share of gradients that it flushes.
# - **Who needs float32?** Take `softmax` and `rms_norm` out of the list, with
#   `mp.autocast("bfloat16", device_type="cpu")`. Does the loss of the base move by more than its own rounding did?
#
# <details><summary>Solution of 17.1</summary>
#
# Add sixteen random bits, and cut. With it the weight of section 3 comes down as under a master copy, in the mean.
#
# ```python
# def stochastic(x, generator):
#     bits = np.asarray(x, np.float32).view(np.uint32)
#     return ((bits + generator.integers(0, 1 << 16, bits.shape, np.uint32)) & 0xFFFF0000).view(np.float32)
#
# check("17.1", stochastic)
# ```
#
# </details>
#
# <details><summary>Solution of 17.2</summary>
#
# 0.02 lies between $2^{-6}$ and $2^{-5}$, so the numbers are $2^{-6 - 7}$ apart, and half of that is rounded away.
#
# ```python
# check("17.2", 2.0 ** (-6 - 7) / 2)
# ```
#
# </details>
#
# <details><summary>Solution of 17.3</summary>
#
# $0.013 \cdot 2^{22}$ is 54,526; twice as much is more than 65,504.
#
# ```python
# check("17.3", np.floor(np.log2(65504 / 0.013)))
# ```
#
# </details>
#
# <details><summary>Solution of 17.4</summary>
#
# Next to 3 the numbers are $2^{1 - 10}$ apart in float16, about 0.002, and $2^{1 - 7}$ in bfloat16, about 0.016: 0.005
# is more than half of the first, and less than half of the second.
#
# ```python
# check("17.4", "float16")
# ```
#
# </details>
