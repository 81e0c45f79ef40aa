# %% [markdown]
# # Lesson 4 · LoRA: a small detour around a frozen matrix
#
# Full fine-tuning (Lesson 3) ends with a whole model per task, and needs four times its weights in memory to get there.
# LoRA (Hu et al. 2021, arXiv:2106.09685) leaves every weight of the base as it is and learns a *correction* of
# low rank beside it. This lesson builds it from its equation, asks where the saved memory really comes from, looks for
# the low rank in a full fine-tune to see whether it is there, and then uses what the construction gives for free:
# merging, switching, many tasks on one base.
#
# You need Lesson 3. Run it with `python lessons/04_lora.py`, or open it as a notebook.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where the picture and two adapters go
# (`lessons/out`).

# %%
import os
import tracemalloc
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft import diagrams
from minipeft.accounting import count_parameters, measure_peak, memory_ledger
from minipeft.backend import one_blas_thread, to_numpy
from minipeft.files import read_json, write_json
from minipeft.text.examples import encode_examples
from minipeft.text.tasks import task

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# Blue is frozen and orange is trained: beside each matrix $W$ of a block stand two thin ones, $B$ and $A$.

# %%
diagrams.block(mp.load_base()[0].config, mp.LoraConfig(r=8, target_modules="all-linear")).savefig(OUT / "04_lora_block.png")
diagrams.low_rank(4096, 4096, r=8).savefig(OUT / "04_lora_strips.png")

# %% [markdown]
# ## 1 · One equation
#
# A linear layer computes $y = Wx$, with $W$ of shape $[d, k]$. Fine-tuning changes it to $(W + \Delta W)\,x$. LoRA's
# hypothesis: $\Delta W$ need not be any matrix, it may be a product of two thin ones,
#
# $$y = Wx + \frac{\alpha}{r} B A x, \qquad A\ [r, k], \quad B\ [d, r], \quad r \ll \min(d, k) .$$
#
# $W$ is frozen; $A$ and $B$ are trained. That is $r\,(d + k)$ numbers in place of $d \cdot k$. The textbook example has
# $d = k = 4096$, the width of a 7B model, and $r = 8$. By formula, and by building the layer and counting:

# %%
d = k = 4096
r = 8
layer = mp.nn.Sequential(mp.nn.Linear(k, d, bias=False))
adapted = mp.get_peft_model(layer, mp.LoraConfig(r=r, target_modules=["0"]))
trainable, total = adapted.get_nb_trainable_parameters()
W, BA = total - trainable, trainable
print(f"              formula       built\nW         {d * k:11,} {W:11,}\nA and B   {r * (d + k):11,} {BA:11,}")
print(f"ratio     {d * k / (r * (d + k)):11.0f} {W / BA:11.0f}")
assert d * k == W == 16_777_216  # "16.7M"
assert r * (d + k) == BA == 65_536  # "65K"
assert d * k == 256 * trainable
del layer, adapted

# %% [markdown]
# The paper's own example is GPT-3: LoRA on the query and value matrices of all 96 layers, of width 12,288. With $r = 1$
# the paper's Table 4 has 4.7M trained parameters. (GPT-2 and 3 fuse q, k and v into one matrix, `c_attn`;
# `enable_lora` adapts q and v of it.)

# %%
def gpt3_lora(r):
    return mp.LoraConfig(r=r, target_modules=["c_attn"], enable_lora=[True, False, True])


for r, published in ((1, "4.7M"), (2, "9.4M"), (4, "18.8M")):
    counted = count_parameters("gpt3", gpt3_lora(r)).trainable
    assert counted == 96 * 2 * r * (12288 + 12288)
    print(f"GPT-3, r = {r}: {counted:,} parameters; the paper: {published}")
assert count_parameters("gpt3", gpt3_lora(1)).trainable == 4_718_592

# %% [markdown]
# > `lora-1` W' = W + BA with B [d,r], A [r,k], r much smaller than d and k: **holds if**. So for alpha = r: the library
# > adds (alpha / r) BA, and for alpha = 2 r the two sides differ by 100% of BA; the change has rank 8 of 64.

# %% [markdown]
# ## 2 · The start is the base, exactly
#
# $A$ is random and $B$ is *zero*. So $BA = 0$, and the adapted model computes what the base does: not nearly, but bit
# for bit. Training starts from what was learned, without a bump.
#
# Our base is the small Llama of Lesson 3. Its layers are replaced by name, and nothing of it is changed: the new model
# shares its arrays.

# %%
base, tokenizer = mp.load_base()
untouched = [p.numpy().copy() for p in base.parameters()]  # compared at the very end
N = sum(p.size for p in base.parameters())

model = mp.get_peft_model(base, mp.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
print()
model.print_trainable_parameters()
print("\n".join(repr(model).split("\n")[:9]), "\n  ...")
ids = np.random.default_rng(0).integers(0, base.config.vocab_size, (4, 32))
assert np.array_equal(model(ids).numpy(), base(ids).numpy())
print("at the start, the logits are the base's, bit for bit: True")

# %% [markdown]
# One zero factor is harmless, and what it does to the first step is worth seeing. With $G = \partial L / \partial W$,
# the gradient that a full fine-tune would use, the chain rule gives
#
# $$\frac{\partial L}{\partial B} = \frac{\alpha}{r}\, G A^\top, \qquad
#   \frac{\partial L}{\partial A} = \frac{\alpha}{r}\, B^\top G .$$
#
# As $B = 0$, the first gradient of $A$ is zero: only $B$ moves. From the second step on both do. Here the right sides
# are computed from a full gradient and compared with what the library's backward pass leaves.

# %%
place = "model.layers.2.mlp.down_proj"
lora = model.layers[place].adapters["default"]
A, B = lora.lora_A, lora.lora_B  # [r, k], [d, r]
dense = base.copy()
dense.loss(ids, ids).backward()
G = to_numpy(dict(dense.named_parameters())[f"{place}.weight"].grad)  # [d, k]
model.loss(ids, ids).backward()
dA, dB = to_numpy(A.grad), to_numpy(B.grad)
print(f"\nfirst step: largest gradient of A {np.abs(dA).max():.1e}, of B {np.abs(dB).max():.1e}")
assert not dA.any() and dB.any()
assert np.allclose(dB, 16 / 8 * G @ A.numpy().T, rtol=1e-3, atol=1e-3 * np.abs(dB).max())

optimizer = mp.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)  # decay would move A even so
optimizer.step()
unmoved = model.unmoved()
print(f"after one step, unmoved: {len(unmoved)} of {2 * len(model.layers)} matrices, e.g. {unmoved[0]}")
assert len(unmoved) == len(model.layers) and all("lora_A" in name for name in unmoved)
optimizer.zero_grad()
model.loss(ids, ids).backward()
optimizer.step()
optimizer.zero_grad()
assert A.grad is None and not model.unmoved()

# %% [markdown]
# Now that both factors have moved, the forward pass, once by hand. The library never forms the matrix $BA$: it sends
# $x$ through $A$, which leaves $r$ numbers per position, and those through $B$.

# %%
x = np.random.default_rng(1).standard_normal((4, 32, A.shape[1])).astype(np.float32)  # [batch, seq, k]
W = dict(base.named_parameters())[f"{place}.weight"].numpy()
by_hand = x @ W.T + 16 / 8 * (x @ A.numpy().T) @ B.numpy().T
library = model.layers[place](mp.Tensor(mp.backend.asarray(x))).numpy()
difference = np.abs(by_hand - library).max()
print(f"W x + (alpha/r) B A x by hand and the library's: largest difference {difference:.1e}")
assert difference < 1e-5 and np.abs(library - x @ W.T).max() > 1e-3

# %% [markdown]
# > `lora-4` the layer as textbooks print it: randn A, zero B, scaling alpha/rank: **does not hold here**. As printed it
# > stops: name 'alpha' is not defined; given an alpha, it trains 69,888 numbers in place of 4,096, as building it does
# > not freeze W, and A of deviation 1.00 (the library's: 0.036) makes the gradient of B 28 times as large. (5 seeds)

# %% [markdown]
# ## 3 · Where the saved memory comes from
#
# A pullback that is needed keeps what it needs until backward (Lesson 1, section 4). For $y = Wx$ there are two:
#
# - towards the weight, $\bar W = \bar y\, x^\top$: needs the **input** $x$, and leaves a gradient of $W$'s size;
# - towards the input, $\bar x = W^\top \bar y$: needs $W$, which is there anyway.
#
# Freeze $W$ and the first is never asked for: no gradient, no optimizer state, no $x$ kept. But now put LoRA beside it:
# $\bar A$ needs the very same $x$ (and $\bar B$ the $r$ numbers per position of $Ax$). Measured on one layer, in bytes
# held after the forward pass, output not counted:

# %%
POSITIONS, WIDTH = 1024, 512
leaf = mp.Tensor(np.ones((POSITIONS, WIDTH), np.float32), requires_grad=True)


def held_after(fn):
    """(result, bytes that it keeps alive)."""
    before = tracemalloc.get_traced_memory()[0]
    result = fn()
    return result, tracemalloc.get_traced_memory()[0] - before


def kept_by(layer):
    """Bytes that the graph of one forward pass keeps, for an input that somebody else has no use for."""
    y, held = held_after(lambda: layer(leaf + 1.0))
    return held - y.data.nbytes


plain = mp.nn.Sequential(mp.nn.Linear(WIDTH, WIDTH, bias=False)).to("numpy")  # whose arrays tracemalloc sees
layers = {
    "trained": plain.copy(),
    "frozen": plain.copy().requires_grad_(False),
    "frozen, LoRA r = 8": mp.get_peft_model(plain, mp.LoraConfig(r=8, target_modules=["0"])),
}
tracemalloc.start()
for layer in layers.values():
    kept_by(layer)  # caches that are made once
kept = {name: kept_by(layer) for name, layer in layers.items()}
tracemalloc.stop()
x_bytes, h_bytes = 4 * POSITIONS * WIDTH, 4 * POSITIONS * 8
predicted = {"trained": x_bytes, "frozen": 0, "frozen, LoRA r = 8": x_bytes + h_bytes}
print(f"\none layer, {POSITIONS} positions x {WIDTH}       kept: predicted     measured   gradient and moments of")
for name, size in kept.items():
    states = sum(12 * p.size for p in layers[name].parameters() if p.requires_grad)
    print(f"  {name:22s}          {predicted[name]:15,} {size:12,}   {states:12,} bytes")
    assert abs(size - predicted[name]) < 20_000

# %% [markdown]
# So the usual sentence, "LoRA needs no activations of the frozen weights", is half of the truth. It is true of the
# layers that have *no* adapter. Beside an adapter, $x$ is kept after all; what is saved *there* is the gradient and the
# optimizer's two moments. (Once only: $q$, $k$ and $v$ read the same $x$.)
#
# Now a whole training step, each line predicted by `memory_ledger` from shapes and measured by taking the step apart.

# %%
BATCH, LENGTH = (4, 64) if REDUCED else (16, 64)
text = np.random.default_rng(0).integers(0, base.config.vocab_size, (BATCH, LENGTH))
on_cpu = base.copy().to("numpy")
VARIANTS = {
    "full": lambda: on_cpu.copy(),
    "LoRA, all-linear": lambda: mp.get_peft_model(on_cpu.copy(), mp.LoraConfig(r=8, target_modules="all-linear")),
    "LoRA, q and v": lambda: mp.get_peft_model(on_cpu.copy(), mp.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])),
}


def apart(make):
    """Bytes of the model, its activations and logits, its gradients, and the optimizer's states, as NumPy allocates."""
    model, weights = held_after(make)
    optimizer = mp.optim.AdamW(model.parameters())
    before = tracemalloc.get_traced_memory()[0]
    loss, activations = held_after(lambda: model.loss(text, text))
    loss.backward()
    gradients = tracemalloc.get_traced_memory()[0] - before
    _, states = held_after(optimizer.step)
    return {"weights": weights, "gradients": gradients, "optimizer": states, "activations": activations}


def two_steps(make):
    """Two whole steps: in the second the moments are there too."""
    model = make()
    optimizer = mp.optim.AdamW(model.parameters())
    for _ in range(2):
        model.loss(text, text).backward()
        optimizer.step()
        optimizer.zero_grad()


memory = {}
for name, make in VARIANTS.items():
    ledger = memory_ledger(make(), batch=BATCH, seq_len=LENGTH)
    held = ledger.held
    foreseen = {
        "weights": held["frozen weights"] + held["adapters"] + held["trained weights"], "gradients": held["gradients"],
        "optimizer": held["optimizer states"], "activations": held["activations"] + held["logits"],
    }  # fmt: skip
    two_steps(make)
    tracemalloc.start()
    found = apart(make)
    tracemalloc.stop()
    peak = measure_peak(lambda make=make: two_steps(make))
    memory[name] = foreseen | {"peak": ledger.total}, found | {"peak": peak}
print(f"\none step of {BATCH} x {LENGTH} tokens, MiB: predicted / measured")
print(f"{'':18s}" + "".join(f"{line:>17s}" for line in memory["full"][0]))
for name, (foreseen, found) in memory.items():
    pairs = (f"{foreseen[line] / 2**20:8.2f} /{found[line] / 2**20:6.2f}" for line in foreseen)
    print(f"{name:18s}" + "".join(f"{pair:>17s}" for pair in pairs))
    for line in foreseen:
        assert abs(found[line] - foreseen[line]) < 0.1 * foreseen[line] + 2**18, (name, line)
full, everywhere, q_and_v = (foreseen for foreseen, _ in memory.values())
assert everywhere["gradients"] + everywhere["optimizer"] < 0.1 * (full["gradients"] + full["optimizer"])
assert everywhere["activations"] > full["activations"] > q_and_v["activations"]

# %% [markdown]
# Gradients and moments, 12 bytes per parameter, nearly vanish. The activations do not: with adapters everywhere they
# are even a little more than before; with adapters on $q$ and $v$ alone, the inputs of the other projections go. (The
# peak of full fine-tuning is below the sum of its lines, because gradients are born while activations die.)
#
# How much that is in all depends on what dominates. Here it is the activations: a tiny model and many tokens. In a
# large model it is the states. For GPT-3 in mixed precision (16 bytes per trained parameter, 2 per frozen one):

# %%
print("\nGPT-3, model states in mixed precision")
for name, config in (("full fine-tuning", None), ("LoRA, q and v, r = 4", gpt3_lora(4))):
    states = memory_ledger("gpt3", config, precision="mixed").model_states
    print(f"  {name:22s} {states / 1e9:9,.1f} GB")
assert abs(states / 350e9 - 1) < 0.01

# %% [markdown]
# > `peft-2` memory: fewer gradients to compute and store: **holds if**. More than half of what is saved are gradients
# > and states together: at 7B the gradients are 20% of it, the optimizer's states 79% and the inputs of frozen layers
# > 0.0 % (all linear layers) and 0.7 % (q, v); a step on the base takes 0.60 times the memory, and 0.67 times the FLOPs
# > at 7B.

# %% [markdown]
# The paper says "from 1.2TB to 350GB" of GPU memory (section 4.2). The 350 are exactly the frozen weights at 2 bytes
# each: LoRA itself is lost in the rounding. How its 1.2 TB are composed the paper does not say; with the usual 16 bytes
# a parameter it would be more. Those 350 GB are what QLoRA attacks next, by storing the frozen weights in 4 bits.
#
# ## 4 · Training it
#
# The task is that of Lesson 3: a verse in King James English, to be written in plain English. The same 20 steps, once
# for all weights, once for the adapters.

# %%
STEPS, SIZE = (3, 4) if REDUCED else (20, 12)


def examples(name, split, n):
    """n short records of a task, encoded as (input_ids, labels)."""
    records = [r for r in task(name, split) if len(r.prompt + r.completion) <= 150]
    records = [records[i] for i in np.random.default_rng(0).permutation(len(records))[:n]]
    return encode_examples(records, tokenizer, max_length=96, on_overflow="truncate").examples, records


data = {name: examples(name, "train", STEPS * SIZE)[0] for name in ("rewrite", "define")}
held_out = {name: examples(name, "validation", 8 if REDUCED else 64) for name in data}


def loss_of(model, name="rewrite"):
    """The held-out loss of a task, in nats per token."""
    judge = mp.Trainer(model, data[name], args=mp.TrainingArguments(per_device_eval_batch_size=32))
    return judge.evaluate(held_out[name][0])


def train(model, rate=1e-2, name="rewrite", steps=STEPS):
    arguments = mp.TrainingArguments(
        learning_rate=rate, max_steps=steps, per_device_train_batch_size=SIZE, warmup_steps=3, progress=False
    )
    mp.Trainer(model, data[name], args=arguments).train()
    return model


def lora(r=8, alpha=16, targets="all-linear", name="default"):
    return mp.get_peft_model(base, mp.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets), adapter_name=name)


start = loss_of(base)
tuned = train(base.copy(), rate=1e-3)
end = loss_of(tuned)
adapted = train(lora(name="rewrite"))
adapted_end = loss_of(adapted)


def gain(loss):
    """The share of full fine-tuning's gain: 0 is the base, 1 the full fine-tune."""
    return (start - loss) / (start - end)


trainable, _ = adapted.get_nb_trainable_parameters()
print(f"\nheld-out loss: base {start:.3f}")
print(f"  full fine-tuning   {N:9,} parameters   {end:.3f}")
print(f"  LoRA, r = 8        {trainable:9,} parameters   {adapted_end:.3f}   {gain(adapted_end):.0%} of the gain")
mp.assert_learning(adapted)
if not REDUCED:
    assert start - end > 0.2
    assert gain(adapted_end) > 0.8, "a twelfth of the parameters, most of the gain"

# %% [markdown]
# Note the learning rates: $10^{-3}$ for the weights, $10^{-2}$ for the factors. LoRA usually wants some ten times more.
# A run as short as this one says who starts faster, not who ends better.
#
# ## 5 · Is the update of low rank?
#
# LoRA was motivated by a conjecture: "the change in weights during model adaptation also has a low *intrinsic rank*".
# We have a full fine-tune at hand, so look. Take $\Delta W$ of each of its 42 matrices apart into singular values
# $\sigma_1 \ge \sigma_2 \ge \dots$ and ask how much of its energy the first $r$ directions hold,
#
# $$E_r = \frac{\sum_{i \le r} \sigma_i^2}{\sum_i \sigma_i^2} ,$$
#
# beside the same for a random matrix of the same shape. 1 at $r = 8$ would be a matrix that LoRA could copy exactly.

# %%
RANKS = [1, 2, 4, 8, 16, 32, 64, 128]
originals = dict(base.named_parameters())


def svd(matrix):
    """U, s, Vt with matrix = U diag(s) Vt."""
    with one_blas_thread():  # thousands of tiny products: to wake a second thread for each takes far longer
        return np.linalg.svd(to_numpy(matrix), full_matrices=False)


updates = {
    name: svd(p.data - originals[name].data)
    for name, p in tuned.named_parameters() if "_proj" in name
}  # fmt: skip


def energy(sigma):
    """[E_r for r in RANKS]; beyond the smaller side of the matrix it is 1."""
    held = np.cumsum(sigma**2) / np.sum(sigma**2)
    return [held[min(r, len(held)) - 1] for r in RANKS]


noise = np.random.default_rng(0)
spectra = {
    group: np.mean([energy(s) for name, (_, s, _) in updates.items() if part in name], axis=0)
    for group, part in (("attention", "self_attn"), ("MLP", "mlp"))
}
chance = {
    group: np.mean(
        [energy(svd(noise.standard_normal(p.shape))[1])
         for name, p in originals.items() if part in name], axis=0)
    for group, part in (("attention", "self_attn.q_proj"), ("MLP", "mlp.up_proj"))
}  # fmt: skip

# %% [markdown]
# And the question that matters more: what are those directions *worth*? Cut every $\Delta W$ down to its first $r$
# directions, put that on the base (no other change: no norms, no embeddings), and measure how much of the task's gain
# is still there. Then the opposite: throw the first 8 directions away and keep all the others.

# %%
def cut(directions):
    """The base plus the given singular directions (a slice) of each update."""
    model = base.copy()
    for name, p in model.named_parameters():
        if name in updates:
            U, s, Vt = updates[name]
            p.data += mp.backend.asarray((U[:, directions] * s[directions]) @ Vt[directions])
    return model


worth = {r: gain(loss_of(cut(slice(0, r)))) for r in ([1, 8, 128] if REDUCED else RANKS)}
rest = gain(loss_of(cut(slice(8, None))))
print("\nenergy of the first r directions of the full fine-tune's update     task gain that they keep")
print("   r    attention (random)      MLP (random)")
for i, r in enumerate(RANKS):
    row = "".join(f"{spectra[g][i]:12.0%} ({chance[g][i]:6.0%})" for g in spectra)
    print(f"{r:4d} {row}        {worth[r]:12.0%}" if r in worth else f"{r:4d} {row}")
print(f"all but the first 8: {1 - spectra['MLP'][3]:.0%} of the MLP's energy, {rest:.0%} of the gain")
if not REDUCED:
    at = RANKS.index(8)
    assert all(spectra[g][at] > 2.5 * chance[g][at] for g in spectra), "far from random"
    assert spectra["MLP"][at] < 0.75, "and far from rank 8"
    assert worth[1] > 0.7 and worth[8] > 0.85 and 0.2 < rest < 0.4
    assert worth[128] - worth[8] < 0.05, "what the others add to the first 8"

# %% [markdown]
# So the conjecture in its literal form is **not** what we find. The update of a full fine-tune is far from random, but
# it is no low-rank matrix: about half of the MLP's energy lies outside of its 8 strongest directions. What is of
# low rank is the part that *suffices*. One direction per matrix carries most of the gain, 8 nearly all; the others hold
# much of the energy and add little to that, though alone they bring 30% of the gain. Low rank is a property of the task,
# and of what suffices for it; the full fine-tune had no reason to be thrifty.
#
# Where does the superfluous part come from? Partly from the optimizer. The gradient is nearer to low rank. Adam divides
# each element by its own size: its first step is $-\eta \cdot \mathrm{sign}(G)$, in which the small elements, noise and
# all, weigh as much as the large ones. Measured on one batch:

# %%
probe = base.copy()
probe.loss(**mp.train.collate(data["rewrite"][:SIZE], tokenizer.pad_token_id).arguments).backward()
print("\nenergy of 8 directions      gradient     sign of the gradient")
for group, part in (("attention", "self_attn"), ("MLP", "mlp")):
    grads = [to_numpy(p.grad) for name, p in probe.named_parameters() if part in name]
    raw, signed = (
        np.mean([energy(svd(g)[1])[3] for g in matrices])
        for matrices in (grads, [np.sign(g) for g in grads])
    )
    print(f"  {group:20s} {raw:12.0%} {signed:20.0%}")
    assert raw > signed + 0.1 and raw > spectra[group][3]

# %% [markdown]
# ## 6 · Which rank?
#
# If few directions suffice, the rank should hardly matter. Before we compare ranks, the role of $\alpha / r$. At the
# first step $B = 0$ and Adam moves each element of $B$ by $\eta$ against the sign of its gradient. To first order the
# loss then changes by
#
# $$\Delta L = -\eta \sum_{i,j} \left| \frac{\partial L}{\partial B_{ij}} \right|
#            = -\eta\, \frac{\alpha}{r} \sum_{i=1}^{d} \sum_{j=1}^{r} \left| (G A^\top)_{ij} \right| ,$$
#
# and the double sum has $r$ columns of the same size, whatever $r$ is. The factor $1/r$ cancels it: *with $\alpha$
# fixed, the first step is equally large at every rank*, and one learning rate serves all. That is why it is there.
# Leave it out (or raise $\alpha$ together with $r$, as in the popular rule $\alpha = 2r$) and the step grows with $r$.

# %%
def first_step(r, alpha):
    """|Delta L| / eta of the first step."""
    model = lora(r, alpha)
    model.loss(**mp.train.collate(data["rewrite"][:SIZE], tokenizer.pad_token_id).arguments).backward()
    return sum(abs(p.grad).sum().item() for p in model.parameters() if p.requires_grad)


print("\nsize of the first step, relative to r = 8:      r = 1        r = 64      (64 is the largest possible here)")
relative = {}
for label, alpha_of in (("alpha = 16", lambda r: 16), ("alpha = 2 r", lambda r: 2 * r)):
    relative[label] = [first_step(r, alpha_of(r)) / first_step(8, 16) for r in (1, 64)]
    print(f"  {label:38s} {relative[label][0]:12.3f} {relative[label][1]:13.3f}")
assert all(0.5 < ratio < 2 for ratio in relative["alpha = 16"])
assert relative["alpha = 2 r"][0] < 0.25 and relative["alpha = 2 r"][1] > 5

tried = [8, 16, 64] if REDUCED else [1, 4, 8, 16, 64]
by_rank = {r: adapted_end if r == 8 else loss_of(train(lora(r, 16))) for r in tried}
print(f"\nrank   parameters    held-out loss, alpha = 16     (base {start:.3f}, full {end:.3f})")
for r, loss in by_rank.items():
    print(f"{r:4d}   {14592 * r:10,}    {loss:.3f}   {gain(loss):4.0%} of the gain")
if not REDUCED:
    assert all(gain(loss) > 0.75 for loss in by_rank.values()), "even one direction does most of it"
    assert gain(by_rank[64]) - gain(by_rank[8]) < 0.15, "8 times the rank buys little"

# %% [markdown]
# ## 7 · Which layers?
#
# The same number of parameters can go into one kind of matrix with a high rank, or into many with a low one. The paper
# (section 7.1, Table 5) finds on GPT-3 that $q$ alone is clearly worse than $q$ and $v$ or all four of attention at the
# same budget; it left the MLPs alone. The QLoRA paper (section 4) finds that *all* linear layers are needed to match
# full fine-tuning. Here, with 43,008 parameters each (43,776 for all-linear), and for each the better of two rates:

# %%
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PLACES = {
    "q": (["q_proj"], 28), "q, v": (["q_proj", "v_proj"], 16), "q, k, v, o": (ATTENTION, 8),
    "gate, up": (["gate_proj", "up_proj"], 7), "all-linear": ("all-linear", 3),
}  # fmt: skip
by_place = {}
print("\nadapters on      r   parameters    held-out loss     of the gain")
for name, (targets, r) in list(PLACES.items())[:: 4 if REDUCED else 1]:
    model = lora(r, 16, targets)
    size, _ = model.get_nb_trainable_parameters()
    assert 43_008 <= size <= 43_776
    del model
    by_place[name] = min(loss_of(train(lora(r, 16, targets), rate)) for rate in ([1e-2] if REDUCED else [1e-2, 2e-2]))
    print(f"  {name:11s} {r:4d} {size:12,} {by_place[name]:16.3f} {gain(by_place[name]):15.0%}")
if not REDUCED:
    assert by_place["q"] > max(loss for name, loss in by_place.items() if name != "q") + 0.03
    assert min(by_place, key=by_place.get) == "q, k, v, o"

# %% [markdown]
# That $q$ alone is a poor use of the budget holds here as in the paper: several kinds of matrices with a low rank beat
# one kind with a high rank. Among the other places the order depends on the base and on the task (here all four of
# attention come first; this table was not the same for bases of different age): measure before you believe it. "$q$ and
# $v$" needs the least memory (section 3).
#
# ## 8 · Merge: the detour disappears
#
# $W + \frac{\alpha}{r} BA$ is a matrix of $W$'s shape. Add it in, and what remains is a plain model: no extra layer, no
# extra latency, the same names and shapes. Its logits are those of the adapted model, up to the rounding of float32
# (the sum is formed in another order). `merge_and_unload` makes a *new* model; the base is what it was, bit for bit.

# %%
merged = adapted.merge_and_unload()
want, got = adapted(ids).numpy(), merged(ids).numpy()
print(f"\nmerged against unmerged: largest difference of a logit {np.abs(want - got).max():.1e}", end=", ")
print(f"of logits up to {np.abs(want).max():.0f}")
assert np.abs(want - got).max() < 1e-4 * np.abs(want).max()
assert type(merged) is type(base)
assert [(n, p.shape) for n, p in merged.named_parameters()] == [(n, p.shape) for n, p in base.named_parameters()]
assert all(np.array_equal(p.numpy(), kept) for p, kept in zip(base.parameters(), untouched))

# %% [markdown]
# How large the rounding is depends on the numbers that the base is stored in. The same adapter, put on bases in other
# precisions and merged there: each merged weight is rounded to the base's own, which knows 53, 24 or 11 binary digits.

# %%
adapted.save_pretrained(OUT / "04_adapters")
errors = {}
for dtype in ("float64", "float32", "float16"):
    stored = base.copy()
    for p in stored.parameters():
        p.data = p.data.astype(dtype)
    beside = mp.PeftModel.from_pretrained(stored, OUT / "04_adapters" / "rewrite")
    errors[dtype] = np.abs(beside.merge_and_unload()(ids).numpy() - beside(ids).numpy()).max() / np.abs(want).max()
    print(f"  merged in {dtype}: largest difference {errors[dtype]:.0e} of the largest logit")
assert errors["float64"] < 1e-12 < errors["float32"] < 1e-5 < errors["float16"] < 1e-1

# %% [markdown]
# And back. The way of the paper (section 4.2) is to subtract $BA$ again. In exact arithmetic that is the base; in
# floating point $(W + D) - D$ is not quite $W$. The library keeps $W$ instead: `merge_adapter` computes with merged
# weights, `unmerge_adapter` drops them, and nothing has been rounded.

# %%
W, D = originals[f"{place}.weight"].numpy(), to_numpy(adapted.layers[place].adapters["rewrite"].delta_weight())
subtracted = (W + D) - D
adapted.merge_adapter()
assert np.array_equal(adapted(ids).numpy(), got)
adapted.unmerge_adapter()
assert np.array_equal(adapted(ids).numpy(), want)
with adapted.disable_adapter():
    assert np.array_equal(adapted(ids).numpy(), base(ids).numpy())
print(f"merged and subtracted again: {np.mean(subtracted != W):.0%} of the weights differ,", end=" ")
print(f"by up to {np.abs(subtracted - W).max():.0e}; unmerged from kept weights: none, bit for bit")
assert 0 < np.abs(subtracted - W).max() < 1e-6

# %% [markdown]
# > `lora-10` no extra latency after merging: **holds**. The merged model takes 1.01 times the base's time, from 0.98 to
# > 1.05, and is clearly slower at none; unmerged it takes 1.27 to 1.81 times. (8 seeds)

# %% [markdown]
# ## 9 · One base, many tasks
#
# A second adapter on the same base learns another task: explain a word, as a dictionary does. Which adapter is used is
# a matter of a name.

# %%
adapted.add_adapter("define", mp.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), seed=1)
adapted.set_adapter("define")
train(adapted, name="define")
adapted.set_adapter("rewrite")
assert np.array_equal(adapted(ids).numpy(), want), "training one adapter leaves the other alone"
table = {"none": [start, loss_of(base, "define")]}
for name in ("rewrite", "define"):
    adapted.set_adapter(name)
    table[name] = [loss_of(adapted, "rewrite"), loss_of(adapted, "define")]
print("\nheld-out loss of         rewrite      define")
for name, row in table.items():
    print(f"  with adapter {name:8s}" + "".join(f"{loss:12.3f}" for loss in row))
if not REDUCED:
    assert table["rewrite"][0] == min(row[0] for row in table.values())
    assert table["define"][1] == min(row[1] for row in table.values())

# %% [markdown]
# They need not even take turns. One batch, a name for each row: the base's product is computed as ever, and each row
# takes its own detour. This is how one GPU serves hundreds of customers from a single copy of a large model.

# %%
names = ["rewrite", "__base__", "define", "rewrite"]
mixed = adapted(ids, adapter_names=names).numpy()
difference = 0.0
for i, name in enumerate(names):
    if name == "__base__":
        alone = base(ids[i : i + 1]).numpy()
    else:
        adapted.set_adapter(name)
        alone = adapted(ids[i : i + 1]).numpy()
    difference = max(difference, np.abs(mixed[i] - alone[0]).max())
print("\na batch of", ", ".join(names), f"against each row alone: largest difference {difference:.1e}")
assert difference < 1e-4 * np.abs(mixed).max()
assert np.abs(mixed[0] - base(ids[:1]).numpy()[0]).max() > 0.1

# %% [markdown]
# On the disk a task is its adapter: two matrices per layer, and a small JSON file that says which layers, which $r$,
# and which $\alpha$. It is the format of Hugging Face PEFT.

# %%
folder = OUT / "04_adapters"
adapted.save_pretrained(folder)
size = (folder / "define" / "adapter_model.safetensors").stat().st_size
print(f"\n{'define/adapter_model.safetensors':34s} {size:12,} bytes; {trainable:,} parameters x 4 = {4 * trainable:,}")
print(f"{'a full fine-tune, float32':34s} {4 * N:12,} bytes: {4 * N / size:.0f} times as much")
assert 0 <= size - 4 * trainable < 20_000, "the file is the matrices and a small header"
again = mp.PeftModel.from_pretrained(base, folder / "rewrite")
assert np.array_equal(again(ids).numpy(), want)
adapter, whole = 2 * count_parameters("gpt3", gpt3_lora(4)).stored, 2 * count_parameters("gpt3").stored
print(f"GPT-3, r = 4, float16: {adapter / 1e6:.1f} MB a task; whole {whole / 1e9:.0f} GB: {whole / adapter:,.0f} times")
print(f"100 tasks: {(whole + 100 * adapter) / 1e9:.0f} GB, or {100 * whole / 1e12:.0f} TB")
assert 9_000 < whole / adapter < 10_000  # "roughly 10,000x", "from 350GB to 35MB"
assert round(100 * whole / 1e12) == 35  # footnote 4: 354GB instead of 35TB

# %% [markdown]
# > `peft-1` storage: one base and a small file per task: **holds if**. There are 2 tasks or more: the base itself is
# > stored, too, so that one task takes 1.08 times a tuned model's bytes, and 100 tasks take 11 times less (at 7B 77
# > times).
#
# > `lora-11` many adapters can share one base, at once: **holds**. It is so, and saves time, in generation and
# > training: a batch of 8 rows with 4 adapters takes 0.76 (generation) and 0.95 (training) times the time of the four
# > in turn, and 2.60 and 1.86 times a batch of one adapter; base and adapters take 0.33 times the bytes of four models;
# > rows differ from those alone by at most 1e-06. (10 seeds)
#
# > `adapter-5` easy to swap for different tasks: **holds**. A swap takes 132 microseconds, 0.03 of a generated token,
# > and the outputs are those of the adapter alone (to 0e+00); from the disk it takes 4 ms, and the file is 3.5% of the
# > model's. (6 seeds)
#
# > `soft-6` one model serves all tasks at the same time: **holds**. In a batch of 6 rows, each with a method of its
# > own, logits differ by at most 8e-07 of the largest from those of the row alone, and 6 of 6 generated texts are the
# > same. (6 test items)

# %% [markdown]
# ## 10 · Break it
#
# **Both factors zero.** If $B = 0$ is a good start, why not $A = 0$ too? Look at the two gradients of section 2: $B$'s
# contains $A$, and $A$'s contains $B$. With both at zero, both gradients are zero, and stay it. Nothing crashes; the
# loss wobbles, as the loss does when batches differ; it just never learns.

# %%
dead = lora()
for _, part in dead.parts("default"):
    part.lora_A.data[:] = 0
dead.mark_start("default")
train(dead, steps=3)
print(f"\nboth zero: held-out loss before {start:.4f}, after {loss_of(dead):.4f}")
assert np.array_equal(dead(ids).numpy(), base(ids).numpy())
try:
    mp.assert_learning(dead)
    complaint = ""
except AssertionError as error:
    complaint = str(error)
print("assert_learning says:", complaint[:90], "...")
assert complaint.startswith("84 adapter parameters never moved")
mp.assert_learning(adapted)  # the healthy one passes

# %% [markdown]
# **$\alpha / r$ forgotten in training.** Keep $\alpha / r = 2$ while $r$ grows, at the learning rate that was good for
# $r = 8$. More rank, more parameters, and from some rank on a worse model: the first steps are too large (section 6).

# %%
unscaled = {8: adapted_end} | {r: loss_of(train(lora(r, 2 * r))) for r in (16, 64)}
print("\nrank        alpha = 16       alpha = 2 r")
for r, loss in unscaled.items():
    print(f"{r:4d}     {by_rank[r]:6.3f} ({gain(by_rank[r]):4.0%})    {loss:6.3f} ({gain(loss):4.0%})")
if not REDUCED:
    assert gain(unscaled[64]) < gain(by_rank[64]) - 0.1
    assert gain(unscaled[64]) < gain(unscaled[8])

# %% [markdown]
# **$\alpha$ forgotten in the file.** The weights file holds $A$ and $B$; $\alpha$ stands in `adapter_config.json`. Say
# that a script which copies adapters writes the configuration anew, with the default $\alpha = 8$ instead of 16. Every
# shape fits, everything loads, and the model is the base plus *half* of what was learned. Not even the held-out loss need
# tell: here half of the update does as well as the whole. But it is another model than the one that was trained.

# %%
options = read_json(folder / "rewrite" / "adapter_config.json")
write_json(folder / "rewrite" / "adapter_config.json", options | {"lora_alpha": 8})
halved = mp.PeftModel.from_pretrained(base, folder / "rewrite", is_trainable=True)
write_json(folder / "rewrite" / "adapter_config.json", options)
print(f"\nheld-out loss: alpha as trained {adapted_end:.3f}, alpha halved {loss_of(halved):.3f}, base {start:.3f}")
ratio = to_numpy(halved.layers[place].adapters["default"].delta_weight()) / D
assert np.allclose(ratio, 0.5)
off = np.abs(halved(ids).numpy() - want).max()
print(f"largest difference of a logit from the model that was trained: {off:.1f}")
assert off > 0.01 * np.abs(want).max()
if not REDUCED:
    assert abs(loss_of(halved) - adapted_end) < 0.05, "the loss hardly changes"

# %% [markdown]
# And through all of this, on one base: two dozen adapters, trained, merged, switched, broken.

# %%
same = all(np.array_equal(p.numpy(), kept) for p, kept in zip(base.parameters(), untouched))
print("\nthe base is what it was when it was loaded, bit for bit:", same)
assert same

# %% [markdown]
# ## The picture
#
# Left: the full fine-tune's update, direction by direction. Its energy (thin) spreads far beyond a few directions; what
# it is worth (thick) does not. Dotted: random matrices of the same shapes. Middle: LoRA trained at each rank; with
# $\alpha$ fixed the rank hardly matters, without the $1/r$ a high rank spoils it. Right: the memory of one step line by
# line, predicted (pale) beside measured (strong), and the peak.

# %%
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
fig, (a, b, c) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
for group, color in (("attention", ORANGE), ("MLP", GREEN)):
    a.plot(RANKS, spectra[group], "-", color=color, lw=1.5)
    a.plot(RANKS, chance[group], ":", color=color, lw=1.2)
a.plot(list(worth), list(worth.values()), "o-", color=BLUE, lw=3)
a.text(1, 1.07, "what they are worth for the task", color=BLUE, weight="bold")
a.text(3.7, spectra["attention"][2] + 0.02, "attention", color=ORANGE, ha="right")
a.text(8.6, spectra["MLP"][3] - 0.04, "MLP", color=GREEN)
a.text(21, 0.24, "random matrices", color=GREY)
a.set(xlabel="directions kept, r", ylabel="share of the energy (thin), of the task's gain (thick)", ylim=(-0.02, 1.14))
a.set_title("What a full fine-tune's update is made of")
b.plot(list(by_rank), list(by_rank.values()), "o-", color=BLUE, lw=2, label=r"$\alpha$ = 16: the same first step")
b.plot(list(unscaled), list(unscaled.values()), "s--", color=ORANGE, label=r"$\alpha$ = 2r: a step that grows with r")
for level, name in ((start, "base"), (end, "full fine-tuning")):
    b.axhline(level, color=GREY, lw=1, ls=":")
    b.text(1, level, f"{name} ", va="bottom" if level == start else "top", fontsize=9, color=GREY)
b.set(xlabel="rank r of LoRA", ylabel="held-out loss (nats per token)", title=f"The same {STEPS} steps at each rank")
b.set_ylim(min(end, *by_rank.values()) - 0.12 * (start - end), max(start, *unscaled.values()) + 0.12 * (start - end))
b.legend(fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.84))
for panel, ranks in ((a, RANKS), (b, tried)):
    panel.set_xscale("log", base=2)
    panel.set_xticks(ranks, [str(r) for r in ranks])
    panel.minorticks_off()
    panel.grid(alpha=0.25)
colors = {"weights": GREY, "gradients": ORANGE, "optimizer": "#E69F00", "activations": BLUE}
for i, pair in enumerate(memory.values()):
    for x, values, strength in ((i - 0.2, pair[0], 0.5), (i + 0.2, pair[1], 1.0)):
        bottom = 0.0
        for line, color in colors.items():
            height = values[line] / 2**20
            label = line if (i, strength) == (0, 1.0) else None
            c.bar(x, height, 0.36, bottom=bottom, color=color, alpha=strength, label=label)
            bottom += height
        peak = values["peak"] / 2**20
        label = "peak" if (i, strength) == (0, 1.0) else None
        c.plot([x - 0.18, x + 0.18], [peak, peak], color="black", lw=2, label=label)
c.set_xticks(range(len(memory)), list(memory))
c.set(ylabel="MiB", title=f"One step of {BATCH} x {LENGTH} tokens: predicted | measured")
c.set_ylim(0, 1.35 * sum(memory["full"][1][line] for line in colors) / 2**20)
c.legend(fontsize=9, ncols=2, loc="upper right")
fig.savefig(OUT / "04_lora.png", dpi=130)
print("picture:", OUT / "04_lora.png")

# %% [markdown]
# ## Quiz
#
# **1.** $B$ starts at zero and $A$ at random. Which of the two has a gradient in the first step, and why are not both
# zero at the start?
#
# <details><summary>Answer</summary>
#
# Only $B$: its gradient contains $A$, and that of $A$ contains $B$, which is zero. With both at zero both gradients are
# zero for ever, nothing crashes, and it never learns.
#
# </details>
#
# **2.** "LoRA needs no activations of the frozen weights." Where is that true?
#
# <details><summary>Answer</summary>
#
# Of layers without an adapter. Beside an adapter the input $x$ is kept after all, as the gradient of $A$ needs it; what
# is saved there is the gradient and the two moments of $W$.
#
# </details>
#
# **3.** Is the update of a full fine-tune a matrix of low rank?
#
# <details><summary>Answer</summary>
#
# No: about half of the MLP's energy lies outside of its 8 strongest directions. But those 8 carry nearly all of the
# task's gain. Of low rank is the part that does something.
#
# </details>
#
# **4.** What does the factor $1/r$ in $\alpha / r$ do?
#
# <details><summary>Answer</summary>
#
# It cancels the number of columns that add to the first step, so that with $\alpha$ fixed the first step is equally
# large at every rank and one learning rate serves all.
#
# </details>
#
# **5.** An adapter was trained with $\alpha = 16$, and its configuration now says 8. Does loading fail? What is the
# model?
#
# <details><summary>Answer</summary>
#
# Everything loads, as every shape fits. The model is the base plus half of what was learned.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("04.1", value)`, or at the terminal with
# `minipeft exercise 04.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 04.2 FILE.py`.
#
# **04.1 Count it.** LoRA with $r = 16$ on the query and value matrices of LLaMA-7B: 32 layers, both matrices 4096 by
# 4096. How many parameters are trained?
#
# **04.2 The layer.** Write `lora(x, W, A, B, alpha)`: the output of a linear layer with its detour, for `x [n, k]`,
# without ever forming the matrix $BA$.
#
# **04.3 Two gradients.** Write `lora_gradients(G, A, B, alpha)`: from the gradient of the whole weight, `G [d, k]`,
# those of $A$ and $B$, in this order.
#
# **04.4 The same first step.** With $r = 8$ and $\alpha = 16$ a learning rate was found. Now $r = 64$ is to be tried.
# Which $\alpha$ makes the first step as large as it was (section 6)?
#
# Further, without a checker:
#
# - **Is $A$ needed?** Freeze $A$ at its random values and train $B$ alone (LoRA-FA, Zhang et al. 2023): section 3 says
#   what that saves, namely $x$. Use $r = 16$ to have as many trained parameters. How much of the gain is left?
# - **The same directions?** For one matrix, compare the 8 strongest left singular vectors of the full fine-tune's
#   $\Delta W$ with the columns of LoRA's $B$: how much of each column lies in their span, and how much of a random one
#   would ($8/d$)? Then compare two LoRAs of different seeds with each other (the paper's section 7.2).
# - **A thrifty optimizer.** Full fine-tuning with `optim="sgd"` and `learning_rate=1.0` learns this task too. Is its
#   update of lower rank than Adam's? Look at attention and at the MLPs, and after 5 steps as well as after 20.
#
# <details><summary>Solution of 04.1</summary>
#
# $r (d + k)$ for each of two matrices in 32 layers.
#
# ```python
# check("04.1", 32 * 2 * 16 * (4096 + 4096))
# ```
#
# </details>
#
# <details><summary>Solution of 04.2</summary>
#
# `A` has $r$ rows.
#
# ```python
# def lora(x, W, A, B, alpha):
#     return x @ W.T + alpha / len(A) * (x @ A.T) @ B.T
#
# check("04.2", lora)
# ```
#
# </details>
#
# <details><summary>Solution of 04.3</summary>
#
# The two equations of section 2.
#
# ```python
# def lora_gradients(G, A, B, alpha):
#     scale = alpha / len(A)
#     return scale * B.T @ G, scale * G @ A.T
#
# check("04.3", lora_gradients)
# ```
#
# </details>
#
# <details><summary>Solution of 04.4</summary>
#
# The same: the sum has eight times as many columns, and $1/r$ makes up for it.
#
# ```python
# check("04.4", 16)
# ```
#
# </details>
