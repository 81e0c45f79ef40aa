# %% [markdown]
# # Lesson 7 · QLoRA: a frozen weight needs only four bits
#
# LoRA leaves the base alone: its weights are read, and never written. A number that is only read need not be stored
# with the precision that training needs. This lesson stores each weight of the base in four bits, one of sixteen values,
# chooses the sixteen values well, counts every bit, trains a LoRA on top, and asks what is lost, where.
#
# You need the lessons on full fine-tuning and LoRA. Run it with `python lessons/07_qlora.py`, or open it as a notebook.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where the picture goes (`lessons/out`).

# %%
import os
from pathlib import Path
from statistics import NormalDist

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft import diagrams
from minipeft.accounting import architecture, count_parameters
from minipeft.peft.loftq import get_loftq_model, merge_and_requantize
from minipeft.quant.codebooks import fp4_code, int4_code, nf4_code
from minipeft.text.examples import encode_examples
from minipeft.text.tasks import task

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)

base, tokenizer = mp.load_base()
weights = {path: m.weight.numpy() for path, m in base.named_modules() if isinstance(m, mp.nn.Linear) and path != "lm_head"}
W = np.concatenate([w.reshape(-1) for w in weights.values()])
print(f"the base has {len(weights)} weight matrices in its layers: {W.size:,} numbers")

# %% [markdown]
# Violet is what four bits will hold: all weight matrices of the blocks, and neither the embedding nor the norms.

# %%
diagrams.block(base.config, "4bit").savefig(OUT / "07_qlora_block.png")

# %% [markdown]
# ## 1 · A block, its largest, and sixteen points
#
# Cut the weights into blocks of 64. Of each block keep the largest magnitude, and for each weight the nearest of sixteen
# points $q_0 < \dots < q_{15}$ in $[-1, 1]$:
#
# $$m = \max_i |w_i|, \qquad c_i = \arg\min_k \left|\frac{w_i}{m} - q_k\right|, \qquad \hat w_i = m \, q_{c_i}.$$
#
# The code $c_i$ takes four bits, and the 32 bits of $m$ are shared by 64 weights: $4 + 32/64 = 4.5$ bits a weight. Here
# it is by hand, for one matrix; the library's packs two codes into a byte, and gives the same numbers.

# %%
matrix = weights["model.layers.0.mlp.up_proj"]
blocks = matrix.reshape(-1, 64)
m = np.abs(blocks).max(axis=1, keepdims=True)
codes = np.abs((blocks / m)[:, :, None] - nf4_code()).argmin(axis=2)  # [blocks, 64]
by_hand = m * nf4_code()[codes]

packed, state = mp.quant.quantize_4bit(matrix)
print(f"one matrix: {matrix.nbytes:,} bytes as float32, {packed.nbytes:,} of codes and {state.absmax.nbytes:,} of scales")
assert np.array_equal(packed.reshape(-1) >> 4, codes.reshape(-1)[::2])
assert np.array_equal(mp.quant.dequantize_4bit(packed, state).reshape(-1, 64), by_hand)
assert 8 * (packed.nbytes + state.absmax.nbytes) / matrix.size == 4.5

# %% [markdown]
# ## 2 · Which sixteen points?
#
# Evenly spaced ones (int4) are the obvious choice, and those of a tiny float (FP4) the hardware's. But most weights are
# small: trained matrices are close to normal, so most of their weights crowd around zero. **NormalFloat** puts the points
# where the weights are: at the quantiles of the normal distribution $\Phi$, so that each code is used about equally often:
#
# $$q_k \propto \Phi^{-1}(p_k), \qquad p_k \text{ evenly spaced between } 1 - p \text{ and } p = 0.9677083 .$$
#
# There are eight steps on the positive side and seven on the negative one, so that zero is exactly a point.

# %%
p, quantile = 0.9677083, NormalDist().inv_cdf
points = [quantile(0.5 + (p - 0.5) * i / 8) for i in range(1, 9)]
points += [-quantile(0.5 + (p - 0.5) * i / 7) for i in range(8)]
ours = np.sort(points) / max(points) + 0.0  # adding zero makes -0 a 0
print("NF4:", " ".join(f"{q:.4f}" for q in ours))
assert np.abs(ours - nf4_code()).max() < 2e-7, "the library's are the published ones, to the last bit of float32"

books = {"NF4": ("nf4", nf4_code()), "FP4": ("fp4", fp4_code()), "int4": ("int4", int4_code())}


def back(w, **options):
    """The weights after a trip through their codes."""
    return mp.quant.dequantize_4bit(*mp.quant.quantize_4bit(w, **options))


def error(w, **options):
    """||w - w_hat|| / ||w||."""
    return float(np.linalg.norm(back(w, **options) - w) / np.linalg.norm(w))


def bits_used(quant_type):
    """The entropy of the codes, of at most 4 bits: how evenly the sixteen are used."""
    packed, _ = mp.quant.quantize_4bit(W, quant_type=quant_type)
    share = np.bincount(np.concatenate([packed >> 4, packed & 15]).reshape(-1), minlength=16) / W.size
    return -sum(s * np.log2(s) for s in share if s)


errors = {name: error(W, quant_type=kind) for name, (kind, _) in books.items()}
entropy = {name: bits_used(kind) for name, (kind, _) in books.items()}
for name in books:
    print(f"{name:5s} error {errors[name]:.4f}, codes worth {entropy[name]:.2f} bits")
assert errors["NF4"] == min(errors.values()), "as in QLoRA's table 2, whose measure is perplexity"
assert entropy["NF4"] == max(entropy.values())

# %% [markdown]
# A point that is seldom used is wasted. NF4's codes carry the most information, and its error is the least. (Of the other
# two, int4 is better here, by the error of the weights; in QLoRA's table 2, by the perplexity of large models, FP4 is.)
#
# ## 3 · Smaller blocks cost bits
#
# One large weight stretches its whole block. Smaller blocks contain the damage, and pay with more scales: $32 / B$ bits
# a weight.

# %%
sizes = [32, 64, 128, 256, 512, 1024, 2048, 4096]
by_size = [error(W, blocksize=size) for size in sizes]
for size, e in zip(sizes, by_size):
    print(f"blocks of {size:4d}: {4 + 32 / size:.3f} bits, error {e:.4f}")
assert by_size == sorted(by_size)

# %% [markdown]
# ## 4 · Double quantization: the scales are numbers too
#
# Half a bit a weight for scales is an eighth of everything. So quantize *them*: 256 scales at a time, to eight bits each,
# after taking off their mean, as they are all positive:
#
# $$4 + \frac{8}{64} + \frac{32}{64 \cdot 256} = 4.127 \text{ bits, which saves } 0.373 .$$

# %%
_, nested = mp.quant.quantize_4bit(W, compress_statistics=True)
plain_bits = 32 * mp.quant.quantize_4bit(W)[1].absmax.size / W.size
nested_bits = (8 * nested.absmax.size + 32 * nested.state2.absmax.size) / W.size
single, double = error(W), error(W, compress_statistics=True)
print(f"scales: {plain_bits:.3f} bits a weight, doubly quantized {nested_bits:.3f}: saved {plain_bits - nested_bits:.3f} (published: 0.373)")
print(f"error: {single:.5f} before, {double:.5f} after")
assert abs(plain_bits - nested_bits - 0.373) < 0.001
assert abs(double - single) < 0.01 * single, "almost free"

# %% [markdown]
# ## 5 · 65 billion parameters on one GPU
#
# QLoRA's headline: fine-tuning LLaMA-65B takes more than 780 GB in 16 bits, and less than 48 GB so. Both are sums of
# bytes per parameter. Training all weights in bfloat16 with Adam costs 2 (weight) + 2 (gradient) + 8 (moments) = 12; with
# a float32 master copy 16. In four bits, a frozen weight costs 4.127 / 8 bytes, and only the adapter is trained.

# %%
llama = architecture("llama-65b")
lora = mp.LoraConfig(r=64, target_modules="all-linear")
total = sum(int(np.prod(shape)) for shape in llama.values())
linear = sum(int(np.prod(shape)) for name, shape in llama.items() if len(shape) == 2 and "layers" in name)
adapter = count_parameters(llama, lora).trainable
frozen = linear * 4.127 / 8 + (total - linear) * 2  # embeddings, head and norms stay in bfloat16
print(f"LLaMA-65B: {total / 1e9:.2f} billion parameters, of which {linear / total:.1%} can be packed; LoRA r=64 adds {adapter / 1e6:.0f} million")
print(f"  all trained, 12 bytes each: {12 * total / 1e9:.0f} GB;  16 bytes each: {16 * total / 1e9:.0f} GB")
for each in (12, 16):
    print(f"  QLoRA, {each} bytes for each adapter weight: {frozen / 1e9:.1f} + {each * adapter / 1e9:.1f} = {(frozen + each * adapter) / 1e9:.1f} GB")
assert 12 * total > 780e9
assert frozen + 16 * adapter < 48e9, "what is left of 48 GB is for activations, one block's at a time"
assert (0.5 - 0.127) / 8 * linear > 2.9e9, "double quantization: 3 GB of it"

# %% [markdown]
# > `qlora-3` models of 65B and more on one GPU: **holds if**. 65B takes 53 GB with a PyTorch loop's usual settings and
# > 41 GB with the paper's (without four bits 154), so 48 GB are enough for 65B with the paper's settings on 48 GB and
# > 70B with the paper's settings on 48 GB, and 80 GB for 4 of 4 cases; measured runs of 70B on one card took up to 68
# > GB. (2 test items)

# %% [markdown]
# ## 6 · Train
#
# `quantize_model` replaces every linear layer but the output head by a `Linear4bit`, which multiplies by dequantizing a
# few rows at a time: $y = x \hat W^\top$, and in the backward pass $\bar x = \bar y \hat W$. No gradient goes to the
# codes. LoRA is put on it as on any linear layer. The task is Lesson 3's: from King James English to plain English.

# %%
def pairs(split, n):
    records = [r for r in task("rewrite", split) if len(r.prompt + r.completion) <= 190]
    records = [records[i] for i in np.random.default_rng(0).permutation(len(records))[:n]]
    return encode_examples(records, tokenizer, max_length=96, on_overflow="truncate").examples


train_examples, test_examples = pairs("train", 640), pairs("validation", 16 if REDUCED else 64)
STEPS = 3 if REDUCED else 20


def evaluate(model):
    judge = mp.Trainer(model, train_examples, args=mp.TrainingArguments(per_device_eval_batch_size=32))
    return judge.evaluate(test_examples)


def fine_tune(model, rate=3e-3):
    arguments = mp.TrainingArguments(
        learning_rate=rate, max_steps=STEPS, per_device_train_batch_size=16, warmup_steps=3, progress=False
    )
    mp.Trainer(model, train_examples, args=arguments).train()
    return model


def megabytes(model):
    return sum(p.data.nbytes for p in model.parameters()) / 1e6


quantized = mp.quant.quantize_model(base)
config = mp.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
start = {"base": evaluate(base), "base in NF4": evaluate(mp.get_peft_model(quantized, config))}  # an adapter starts as zero
print(f"\nbefore training: base {start['base']:.3f} ({megabytes(base):.1f} MB), in four bits {start['base in NF4']:.3f} ({megabytes(quantized):.1f} MB)")
models = {
    "full": fine_tune(base.copy(), 1e-3),
    "LoRA": fine_tune(mp.get_peft_model(base, config)),
    "QLoRA": fine_tune(mp.get_peft_model(quantized, config)),
    "QLoRA, LoftQ start": fine_tune(get_loftq_model(base, config)),
}
losses = {name: evaluate(model) for name, model in models.items()}
for name, model in models.items():
    trained = sum(p.size for p in model.parameters() if p.requires_grad)
    print(f"{name:20s} held-out loss {losses[name]:.3f}, {trained:9,} trained parameters, weights {megabytes(model):.1f} MB")
assert abs(start["base in NF4"] - start["base"]) < 0.2, "four bits cost little before training"
assert losses["QLoRA"] < start["base in NF4"], "it learns"
assert abs(losses["QLoRA"] - losses["LoRA"]) < 0.1, "QLoRA's claim: what four bits took, the adapter gives back"
changed = [n for n, p in quantized.named_parameters() if p.data is not dict(models["QLoRA"].named_parameters()).get(n, p).data]
assert not changed, "the quantized base was only read"

# %% [markdown]
# > `qlora-1` base in 4 bits, adapters in 16 or 32 bits, train the adapters only: **holds**. It trains with adapters in
# > float32 and bfloat16: the loss falls by 2.81 (float32) and 2.81 nats (bfloat16) in 4 steps, all on a base with 42
# > layers in four bits, which keeps its bytes.
#
# > `qlora-4` training a little slower (dequantization): **holds if**. A step takes 1.23 (width 128), 1.20 (width 256),
# > 1.23 (width 512) and 1.29 (width 1024) times as long: clearly more, and at most 1.25 times, at width 128, width 256
# > and width 512. (6 seeds)

# %% [markdown]
# The embedding is not packed, and in a model this small it is most of what is left. LLaMA-65B's is less than one percent.
#
# ## 7 · Merging, and what is lost on the way back
#
# $\hat W + sBA$ is a dense matrix, and exact. Wanting four bits again, one may round it to codes once more; but the
# update is small against the gaps between the points, and most of the weights fall back to the code they had.

# %%
qlora = models["QLoRA"]
dense = qlora.merge_and_unload()
again, lost = merge_and_requantize(qlora)
merged = {
    "adapter": losses["QLoRA"],
    "dense merge": evaluate(dense.requires_grad_()),
    "merged, quantized again": evaluate(mp.get_peft_model(again, config)),
}
for name, loss in merged.items():
    print(f"{name:24s} held-out loss {loss:.4f}")
middle = {field: float(np.median([getattr(e, field) for e in lost.values()])) for field in ("dense", "requantized", "of_update", "codes")}
print(f"over the layers, median: the dense merge is off by {middle['dense']:.0e} of the output, the requantized one by {middle['requantized']:.3f},")
print(f"which is {middle['of_update']:.2f} of what the adapter changed; {middle['codes']:.0%} of the bytes differ from before")
assert abs(merged["dense merge"] - merged["adapter"]) < 1e-4
assert middle["dense"] < 1e-5 < middle["requantized"]
if not REDUCED:
    assert merged["merged, quantized again"] > merged["adapter"], "rounding after training is not repaired by it"

# %% [markdown]
# So an adapter over four bits is best kept as an adapter, or merged into a dense model.
#
# ## 8 · Break it: one outlier
#
# Everything rests on the block's largest weight being like the others. Make one weight in a block fifty times too large:
# the other 63 now share what little is left around zero. How far does the damage reach? As far as the block does.

# %%
hurt = matrix.copy().reshape(-1)
victim = 1000
hurt[victim] = 50 * np.abs(hurt).max()
damage = {}
for size in (32, 64, 4096):
    others = np.arange(hurt.size) != victim
    off = np.abs(back(hurt, blocksize=size) - hurt)[others] > np.abs(hurt)[others] * 0.999  # rounded to zero, or worse
    usual = np.abs(back(matrix.reshape(-1), blocksize=size) - matrix.reshape(-1))[others] > np.abs(hurt)[others] * 0.999
    damage[size] = int(off.sum() - usual.sum())
    print(f"blocks of {size:4d}: {damage[size]:5,} weights more are rounded to zero")
assert damage[32] < 32 and damage[64] < 64 and damage[4096] > 2000

# %% [markdown]
# Now break it yourself: which matrix of the base has the largest ratio of largest weight to standard deviation, and is
# its error under NF4 the largest, too?

# %%
figure, axes = plt.subplots(2, 2, figsize=(11, 8))
scaled = (W.reshape(-1, 64) / np.abs(W.reshape(-1, 64)).max(axis=1, keepdims=True)).reshape(-1)
axes[0, 0].hist(scaled, bins=101, range=(-1, 1), density=True, color="0.8")
for y, (name, (_, book)) in zip((0.12, 0.32, 0.52), books.items()):
    inside = book[np.abs(book) <= 1]
    axes[0, 0].plot(inside, np.full(inside.size, y), "|", markersize=14, markeredgewidth=2, label=f"{name}, error {errors[name]:.3f}")
axes[0, 0].set(title="Weights of the base over their block's largest", xlabel="w / max |w|", yticks=[])
axes[0, 0].legend(fontsize=8)
axes[0, 1].plot([4 + 32 / s for s in sizes], by_size, "o-")
for s, e in zip(sizes, by_size):
    axes[0, 1].annotate(str(s), (4 + 32 / s, e), textcoords="offset points", xytext=(6, 4), fontsize=8)
axes[0, 1].plot([4.127], [double], "*", markersize=14, label="64, doubly quantized")
axes[0, 1].set(title="Block size", xlabel="bits a weight", ylabel="relative error")
axes[0, 1].legend(fontsize=8)
bars = start | losses
axes[1, 0].barh(list(bars)[::-1], list(bars.values())[::-1], color=["C0"] * len(losses) + ["0.7"] * len(start))
axes[1, 0].set(title=f"Held-out loss, {STEPS} steps", xlabel="nats a token", xlim=(min(bars.values()) * 0.9, max(bars.values()) * 1.02))
axes[1, 1].barh(list(merged)[::-1], list(merged.values())[::-1], color="C2")
axes[1, 1].set(title="QLoRA, merged", xlabel="nats a token", xlim=(min(merged.values()) * 0.98, max(merged.values()) * 1.01))
figure.tight_layout()
figure.savefig(OUT / "07_qlora.png", dpi=120)

# %% [markdown]
# > `qlora-6` needs a careful implementation (bitsandbytes): **holds if**. These go wrong: no mean taken off the scales
# > and zero blocks; the error is 1.28 times as large with blocks of 4096 and 2.5 times (of the scales) without their
# > mean, a merge back into four bits loses 0.5% of the 2.91 nats that training gained, and a block of zeros gives nan
# > when divided by its largest.

# %% [markdown]
# ## Quiz
#
# **1.** Why does a weight in blocks of 64 take 4.5 bits, and not 4?
#
# <details><summary>Answer</summary>
#
# The block's largest magnitude has to be stored, 32 bits that 64 weights share: half a bit each.
#
# </details>
#
# **2.** Why are NF4's points not evenly spaced?
#
# <details><summary>Answer</summary>
#
# Most weights are small. The points stand at quantiles of the normal distribution, so they are dense where the weights
# are; a point that is seldom used is wasted. Of the three code books its codes carry the most information here, and its
# error is the least.
#
# </details>
#
# **3.** What does double quantization quantize, and what does it save?
#
# <details><summary>Answer</summary>
#
# The scales, 256 at a time to eight bits each, after taking off their mean: 0.373 bits a weight, almost free in error.
#
# </details>
#
# **4.** Does any gradient reach the codes while a LoRA is trained on them?
#
# <details><summary>Answer</summary>
#
# No. The backward pass computes $\bar x = \bar y \hat W$ from dequantized weights; the quantized base is only read.
#
# </details>
#
# **5.** One weight of a block becomes fifty times too large. Which weights suffer, and why?
#
# <details><summary>Answer</summary>
#
# Those of the same block: the others share what little is left around zero. So smaller blocks contain the damage.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("07.1", value)`, or at the terminal with
# `minipeft exercise 07.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 07.2 FILE.py`.
#
# **07.1 Bits of small blocks.** How many bits does a weight take in blocks of 32 with double quantization: scales in
# eight bits, 256 of them sharing 32 bits? To four digits behind the point.
#
# **07.2 There and back.** Write `round_trip(w, points, blocksize)`: the weights after a trip through their codes, in
# the shape of `w`, for any code book `points` and consecutive blocks. A block may be all zeros.
#
# **07.3 Three bits.** Write `normal_float(bits)`: the $2^{bits}$ points of a NormalFloat, built as NF4 is in section 2,
# with the same $p$: half of the points above zero, and one fewer below. Then quantize `W` by hand with its eight
# points: how much larger is the error for one bit less?
#
# Further, without a checker:
#
# - **The best sixteen.** Start from NF4's points and run a few rounds of k-means on `scaled`. How much smaller does the
#   error get, and is the new code book still a good one for another model's weights?
# - **Another base.** `get_loftq_model(base, config, iterations=5)` begins nearer to the base. Does it end better, after
#   `STEPS` steps, than with one turn? Measure the distance at the start as well.
#
# <details><summary>Solution of 07.1</summary>
#
# The codes, the scales, and the scales of the scales.
#
# ```python
# check("07.1", 4 + 8 / 32 + 32 / (32 * 256))
# ```
#
# </details>
#
# <details><summary>Solution of 07.2</summary>
#
# A block of zeros is divided by 1, and stays.
#
# ```python
# def round_trip(w, points, blocksize):
#     blocks = w.reshape(-1, blocksize)
#     m = abs(blocks).max(axis=1, keepdims=True)
#     scaled = blocks / np.where(m == 0, 1, m)
#     codes = abs(scaled[:, :, None] - points).argmin(axis=2)
#     return (m * points[codes]).reshape(w.shape)
#
# check("07.2", round_trip)
# ```
#
# </details>
#
# <details><summary>Solution of 07.3</summary>
#
# With $n = 2^{bits - 1}$ steps above, $n - 1$ below, and zero.
#
# ```python
# from statistics import NormalDist
#
# def normal_float(bits):
#     n, quantile = 2 ** (bits - 1), NormalDist().inv_cdf
#     up = [quantile(0.5 + 0.4677083 * i / n) for i in range(1, n + 1)]
#     down = [-quantile(0.5 + 0.4677083 * i / (n - 1)) for i in range(n)]
#     return np.sort([*down, *up]) / max(up)
#
# check("07.3", normal_float)
# ```
#
# </details>
