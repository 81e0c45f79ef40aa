# %% [markdown]
# # Lesson 4 · LoRA: a small detour around a frozen matrix
#
# Full fine-tuning (Lesson 3) ends with a whole model per task, and takes, with Adam, at least four times the memory of
# its weights. LoRA (Hu et al. 2021, arXiv:2106.09685) leaves every weight of the base as it is. Beside a matrix it
# learns a *correction*, a product of two thin matrices. After this lesson you can write the layer from its equation,
# say where its memory saving comes from, merge it into the base, and serve many tasks from one base. Lesson 18 asks
# which rank, layers and $\alpha$, and whether full fine-tuning learns more.
#
# You need Lesson 3. Reading takes about 25 minutes (200 words or 25 lines of code a minute, up to the quiz). Run it
# with `python lessons/04_lora.py` (less than a minute), or open it as a notebook. At **Predict**, write down an answer.

# %%
import os
import sys
import tracemalloc
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import drawing

import minipeft as mp
from minipeft import diagrams
from minipeft.accounting import count_parameters, memory_ledger
from minipeft.backend import to_numpy
from minipeft.claims import data
from minipeft.claims.adapters import SWAP
from minipeft.claims.decoding import DECODING
from minipeft.claims.lora import LAYER, MIXED
from minipeft.claims.standings import Case, pairs, so_far, standings
from minipeft.claims.timing import where
from minipeft.files import read_json, write_json

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
if REDUCED:
    print("REDUCED SETTING: 3 steps of 2 verses for 20 of 12, 8 held-out verses for 64, and 4 rows for 16 in section 6:\n"
          "losses, and the memory of a step, say nothing.\n")

# %% [markdown]
# ## 1 · One equation
#
# A linear layer multiplies its input $x$ by a matrix $W$ of $d$ rows and $k$ columns. Beside $W$ LoRA puts two strips:
# $B$, as high as $W$ and $r$ wide, and $A$, $r$ high and as wide as $W$. In the picture blue is frozen, stored once for
# all tasks; orange is trained, stored for each task.

# %%
diagrams.low_rank(4096, 4096, r=8).savefig(OUT / "04_lora_strips.png")

# %% [markdown]
# Fine-tuning changes $W$ to $W + \Delta W$. LoRA's hypothesis: for $\Delta W$ the strips' product is enough. The
# product's **rank** is at most $r$, as its rows are combinations of the $r$ rows of $A$:
#
# $$y = Wx + \frac{\alpha}{r} B A x, \qquad A\ [r, k], \quad B\ [d, r], \quad r \ll \min(d, k) .$$
#
# We choose $r$ and $\alpha$ (section 3). Take $d = 2$, $k = 3$, $r = 1$, and read from the right: $A$ makes one number
# of the three in $x$, and $B$ two of that one. In this order the matrix $BA$ is never formed.
#
# **Predict:** for the numbers below, what are $Wx$, $Ax$, and $y$ with $\alpha / r = 2$?

# %%
W, x = np.array([[1, 0, 2], [0, 1, 1]]), np.array([1, 2, 3])
A, B = np.array([[1, -1, 0]]), np.array([[1], [2]])
y = W @ x + 2 * B @ (A @ x)
print(f"Wx = {W @ x}, Ax = {A @ x}, BAx = {B @ (A @ x)}, y = {y}; the same matrix by matrix: {(W + 2 * B @ A) @ x}")
assert y.tolist() == [5, 1] == ((W + 2 * B @ A) @ x).tolist()
assert np.linalg.matrix_rank(B @ A) == 1, "the second row of BA is twice the first"
assert np.array_equal((2 * B) @ (A / 2), B @ A)

# %% [markdown]
# For the output only the product counts: $2B$ and $A / 2$ make the same change. The $W + BA$ of `lora-1`, below, is the
# case $\alpha = r$; for $\alpha = 2r$ LoRA adds $BA$ twice.
#
# The strips have $r\,(d + k)$ numbers in place of $d \cdot k$. For $d = k = 4096$, the width of LLaMA-7B, and $r = 8$,
# by formula, and by building the layer:

# %%
d, k, r = 4096, 4096, 8
layer = mp.nn.Sequential(mp.nn.Linear(k, d, bias=False))
adapted = mp.get_peft_model(layer, mp.LoraConfig(r=r, target_modules=["0"]))
trainable, total = adapted.get_nb_trainable_parameters()
print(f"              formula       built\nW         {d * k:11,} {total - trainable:11,}")
print(f"A and B   {r * (d + k):11,} {trainable:11,}     {d * k / trainable:g} times fewer")
assert (d * k, r * (d + k)) == (total - trainable, trainable) == (16_777_216, 65_536)  # "16.7M", "65K"

# %% [markdown]
# > `lora-1` W' = W + BA with B [d,r], A [r,k], r much smaller than d and k: **holds if**. It is so for alpha = r; the
# > library adds (alpha / r) BA, and for alpha = 2 r the two sides differ by 100% of BA; the change has rank 8 of 64.

# %% [markdown]
# ## 2 · The start is the base, exactly
#
# $A$ starts at random, $B$ at *zero*. So $BA = 0$, and the adapted model computes what the base does, bit for bit. Our
# base is the small Llama of Lesson 3. In each block all seven matrices get their strips:

# %%
base, tokenizer = mp.load_base()
everywhere = mp.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
diagrams.block(base.config, everywhere).savefig(OUT / "04_lora_block.png")

# %% [markdown]
# `get_peft_model` replaces layers by name: an *adapter layer* takes the place of each, and wraps it (its *base layer*).
# What one configuration adds to the model is an *adapter*. The new model shares the base's arrays, and changes none.

# %%
untouched = [p.numpy().copy() for p in base.parameters()]  # compared at the end
N = sum(p.size for p in base.parameters())
model = mp.get_peft_model(base, everywhere)
model.print_trainable_parameters()
print("\n".join(repr(model).split("\n")[:9]), "\n  ...")
ids = np.random.default_rng(0).integers(0, base.config.vocab_size, (4, 32))
assert np.array_equal(model(ids).numpy(), base(ids).numpy())

# %% [markdown]
# Call $G = \partial L / \partial W$ the gradient that full fine-tuning would use. By Lesson 1's rule for a product of
# matrices,
#
# $$\frac{\partial L}{\partial B} = \frac{\alpha}{r}\, G A^\top, \qquad
#   \frac{\partial L}{\partial A} = \frac{\alpha}{r}\, B^\top G .$$
#
# **Predict:** the adapter has 84 matrices. How many of them move in the first step, and how many in the second?

# %%
place = "model.layers.2.mlp.down_proj"
A, B = (getattr(model.layers[place].adapters["default"], name) for name in ("lora_A", "lora_B"))  # [r, k], [d, r]
dense = base.copy()
dense.loss(ids, ids).backward()
G = to_numpy(dict(dense.named_parameters())[f"{place}.weight"].grad)  # [d, k]
optimizer = mp.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)  # decay would move A even so
for step in (1, 2):
    model.loss(ids, ids).backward()
    if step == 1:
        dA, dB = to_numpy(A.grad), to_numpy(B.grad)
        print(f"largest gradient of A {np.abs(dA).max():.1e}, of B {np.abs(dB).max():.1e}")
        assert not dA.any() and np.allclose(dB, 16 / 8 * G @ A.numpy().T, rtol=1e-3, atol=1e-3 * np.abs(dB).max())
    optimizer.step()
    optimizer.zero_grad()
    unmoved = model.unmoved()
    print(f"after step {step}, matrices that have never moved: {len(unmoved)}", unmoved[:1])
    assert len(unmoved) == (42 if step == 1 else 0) and all("lora_A" in name for name in unmoved)

# %% [markdown]
# First only the 42 $B$ move, as $A$'s gradient has the factor $B = 0$. In the second step all do. $A = 0$ and a random
# $B$ start at the base, too. Hayou et al. (2024, arXiv:2406.08447) find that this start ends worse on average; by their
# theory it allows only lower rates. Weight decay shrinks $A$ and $B$, and so pulls the model toward the base, not
# toward zero.
#
# ## 3 · What α / r does
#
# Why divide by $r$? In the first step $B = 0$, and Adam moves each element of $B$ by the learning rate $\eta$ against
# the sign of its gradient (Lesson 0, section 6). To first order the loss then changes by
#
# $$\Delta L = -\eta \sum_{i,j} \left| \frac{\partial L}{\partial B_{ij}} \right|
#            = -\eta\, \frac{\alpha}{r} \sum_{i=1}^{d} \sum_{j=1}^{r} \left| (G A^\top)_{ij} \right| .$$
#
# The double sum has $r$ columns of about the same size, and $1/r$ cancels their number. *With $\alpha$ fixed, the first
# step changes the loss about equally at every rank.* Here is $|\Delta L|$ over all layers, on a batch of Lesson 3's
# task, for $\alpha = 16$ and for another rule, $\alpha = 2r$.
#
# **Predict:** with $\alpha = 2r$, how many times larger is $\Delta L$ at $r = 64$ than at $r = 8$?

# %%
STEPS, SIZE = (3, 2) if REDUCED else (20, 12)
first_batch = mp.train.collate(data.drawn("rewrite", SIZE, seed=0), tokenizer.pad_token_id).arguments


def lora(r=8, alpha=16, targets="all-linear", name="default", seed=0):
    return mp.get_peft_model(base, mp.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets), name, seed=seed)


def first_step(r, alpha):
    """|Delta L| / eta of the first step, to first order."""
    model = lora(r, alpha)
    model.loss(**first_batch).backward()
    return sum(abs(p.grad).sum().item() for p in model.parameters() if p.requires_grad)


at_8 = first_step(8, 16)
print("Delta L, relative to r = 8, alpha = 16:         r = 1      r = 64")
for label, alphas in (("alpha = 16", (16, 16)), ("alpha = 2 r", (2, 128))):
    one, most = (first_step(r, alpha) / at_8 for r, alpha in zip((1, 64), alphas))
    print(f"  {label:38s} {one:12.3f} {most:11.3f}")
    assert (0.5 < one < 2 and 0.5 < most < 2) if label == "alpha = 16" else (0.06 < one < 0.25 and 5 < most < 12)

# %% [markdown]
# About eight times: a rate that was good at $r = 8$ may then be too high at 64 (section 11 tries it). At one rank,
# under Adam, twice the $\alpha$ acts as twice the rate of $B$. What counts is $\alpha B$: it starts at zero whatever
# $\alpha$ is, and moves by $\alpha \eta$ a step. ($A$'s gradient has the factor $\alpha$, too, but Adam cancels it.
# Clipping, Lesson 3, makes the rule approximate, and from a random $B$ it would not hold: $\alpha$ would change the
# start.) Hu et al. keep $\alpha$ fixed (their section 4.1).
#
# ## 4 · The layer as textbooks print it
#
# **Predict:** this PyTorch layer has three mistakes and an unusual start. Which?

# %%
print(LAYER)

# %% [markdown]
# First, `super().__init__()` is missing, and PyTorch refuses to assign a module before it. (The library's `Module`
# allows it: the verdict's layer, 256 by 256, stops at the second mistake.) Second, `alpha` is defined nowhere. Third,
# the comment says "frozen", and nothing freezes `W`, a new matrix where the pretrained one belongs. The start: `randn`
# has deviation 1, where minipeft and PEFT, Hugging Face's library for *parameter-efficient fine-tuning*, draw $A$
# uniformly in $\pm 1/\sqrt{k}$. $A$ is a factor of $B$'s gradient, and of $\Delta B\, A$, which a step adds to the
# product. Adam cancels $A$'s size in the gradient, but $\Delta B\, A$ grows with it: here about 28 times, the ratio of
# the deviations. (Not trained here.) All repaired:

# %%
class LoRALayer(mp.nn.Module):
    def __init__(self, W, rank, alpha, rng):
        d, k = W.shape
        self.W = mp.nn.Parameter(W, requires_grad=False)
        self.A = mp.nn.Parameter(rng.uniform(-1, 1, (rank, k)).astype(np.float32) / np.sqrt(np.float32(k)))
        self.B = mp.nn.Parameter(np.zeros((d, rank), np.float32))
        self.scaling = alpha / rank

    def forward(self, x):
        return x @ self.W.T + (x @ self.A.T @ self.B.T) * self.scaling


x = np.random.default_rng(1).standard_normal((4, 32, A.shape[1])).astype(np.float32)  # [batch, seq, k]
library = model.layers[place](mp.Tensor(mp.backend.asarray(x))).numpy()
W = dict(base.named_parameters())[f"{place}.weight"].numpy()
by_hand = LoRALayer(W, 8, 16, np.random.default_rng(0)).to("numpy")
by_hand.A.data, by_hand.B.data = A.numpy(), B.numpy()  # of section 2, where both have moved
difference = np.abs(by_hand(mp.Tensor(x)).numpy() - library).max()
trained = [name for name, p in by_hand.named_parameters() if p.requires_grad]
print(f"trained: {trained}; with the same A and B, against the library's layer: {difference:.1e}")
assert trained == ["A", "B"] and difference < 1e-5

# %% [markdown]
# > `lora-4` the layer as textbooks print it: randn A, zero B, scaling alpha/rank: **does not hold here**. As printed it
# > stops: name 'alpha' is not defined; given an alpha, it trains 69,888 numbers in place of 4,096, as building it
# > freezes neither W nor its bias, and A of deviation 1.00 (the library's: 0.036) makes the gradient of B 28 times as
# > large. (5 seeds)

# %% [markdown]
# ## 5 · Which layers
#
# `target_modules` says which layers get strips (the *targets*): names, a regular expression, or "all-linear", every
# linear layer but the head. The paper adapts attention alone, and mostly $q$ and $v$. The parameters that this costs
# follow from shapes:

# %%
print("adapters on, r = 8    layers   trained parameters")
for targets in (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"], "all-linear"):
    model = lora(targets=targets)
    name = targets if targets == "all-linear" else ", ".join(target[0] for target in targets)
    formula = sum(8 * (d + k) for d, k in (module.base_layer.weight.shape for module in model.layers.values()))
    print(f"  {name:20s} {len(model.layers):4d} {model.get_nb_trainable_parameters()[0]:14,}")
    assert model.get_nb_trainable_parameters()[0] == formula

# %% [markdown]
# The paper's own example is GPT-3: $q$ and $v$ of all 96 layers, of width 12,288. (GPT-2's code and the library's GPT-3
# have q, k and v in one matrix, `c_attn`, of which `enable_lora` adapts q and v.)
#
# **Predict:** GPT-3 has 175 billion parameters. How many are trained with $r = 1$?

# %%
def gpt3_lora(r):
    return mp.LoraConfig(r=r, target_modules=["c_attn"], enable_lora=[True, False, True])


for r, published in ((1, "4.7M"), (2, "9.4M"), (4, "18.8M")):  # 18.87, cut
    counted = count_parameters("gpt3", gpt3_lora(r)).trainable
    assert counted == 96 * 2 * r * (12288 + 12288)
    print(f"GPT-3, r = {r}: {counted:,} parameters; the paper's Table 15: {published}")

# %% [markdown]
# ## 6 · Where the saved memory comes from
#
# For $y = Wx$ there are two pullbacks, and each keeps what it needs until backward (Lesson 1, section 4). A bar marks a
# gradient, $\bar W = \partial L / \partial W$:
#
# - towards the weight, $\bar W = \bar y\, x^\top$ needs the **input** $x$, and leaves a gradient of $W$'s size;
# - towards the input, $\bar x = W^\top \bar y$ needs $W$, which is there anyway.
#
# Freeze $W$ and the first is never computed: no gradient, no optimizer state, no $x$ kept, and one of three products
# (forward and these two) less. The second stays, as adapters in lower layers need it. So LoRA's step has about 2/3 of
# the work (`peft-2`, below). For GPT-3 the paper measures 43.1 tokens a second in place of 32.5 (section 4.2), 3/4 of
# the time.
#
# **Predict:** put LoRA beside it. Is $x$ kept?

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
x_bytes, h_bytes = 4 * POSITIONS * WIDTH, 4 * POSITIONS * 8
layers = {
    "trained": (plain.copy(), x_bytes),
    "frozen": (plain.copy().requires_grad_(False), 0),
    "frozen, LoRA r = 8": (mp.get_peft_model(plain, mp.LoraConfig(r=8, target_modules=["0"])), x_bytes + h_bytes),
}
tracemalloc.start()
kept = {name: max(kept_by(layer) for _ in range(2)) for name, (layer, _) in layers.items()}
tracemalloc.stop()
print(f"one layer, {POSITIONS} positions x {WIDTH}       kept: predicted     measured   gradient and moments of")
for name, (layer, predicted) in layers.items():
    states = sum(12 * p.size for p in layer.parameters() if p.requires_grad)
    print(f"  {name:22s}          {predicted:15,} {kept[name]:12,}   {states:12,} bytes")
    assert abs(kept[name] - predicted) < 20_000

# %% [markdown]
# It is, as $\bar A$ needs it ($\bar B$ needs $Ax$, $r$ numbers a position). "LoRA needs no activations of the frozen
# weights" is true only of layers *without* an adapter. Beside an adapter, what is saved is $W$'s gradient and two
# moments. Now a whole step, each number asserted to be near `memory_ledger`'s prediction.
#
# **Predict:** with LoRA on all layers, do the activations take less memory than in full fine-tuning, or more?

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


memory = {}
for name, make in VARIANTS.items():
    held = memory_ledger(make(), batch=BATCH, seq_len=LENGTH).held
    predicted = {
        "weights": held["frozen weights"] + held["adapters"] + held["trained weights"], "gradients": held["gradients"],
        "optimizer": held["optimizer states"], "activations": held["activations"] + held["logits"],
    }  # fmt: skip
    apart(make)  # caches that are made once
    tracemalloc.start()
    memory[name] = apart(make)
    tracemalloc.stop()
    assert all(abs(memory[name][line] - n) < 0.1 * n + 2**18 for line, n in predicted.items()), name
print(f"one step of {BATCH} x {LENGTH} tokens, MiB" + "".join(f"{line:>13s}" for line in memory["full"]))
for name, lines in memory.items():
    print(f"  {name:32s}" + "".join(f"{size / 2**20:13.2f}" for size in lines.values()))
full, all_layers, q_and_v = memory.values()
assert all_layers["gradients"] + all_layers["optimizer"] < 0.1 * (full["gradients"] + full["optimizer"])
assert all_layers["activations"] > full["activations"] > q_and_v["activations"]
assert abs((all_layers["activations"] - full["activations"]) / 2**20 - (1.31 - 0.5) * BATCH / 16) < 0.25, "Ax, less the head's input"
assert REDUCED or 0.82 < sum(all_layers.values()) / sum(full.values()) < 0.86, "the sum of the four lines"

# %%
drawing.stacked(memory, f"One step of {BATCH} x {LENGTH} tokens, measured").savefig(OUT / "04_lora.png", dpi=130)

# %% [markdown]
# A little more: $42 \cdot 8$ numbers of $Ax$ a position, 1.31 MiB, less the input of the now frozen head, 0.5 MiB. With
# $q$ and $v$ alone, the inputs of the MLP's matrices go. (That of $o$ stays: attention's pullback keeps it.) Gradients
# and moments, 12 bytes per trained parameter, nearly vanish in both.
#
# Here activations dominate: a tiny model and many tokens. In a large model with few tokens the *states* do: weights,
# gradients and moments. In mixed precision with Adam, a trained parameter takes 16 bytes (Lesson 3; Rajbhandari et al.
# 2020, arXiv:1910.02054), and a frozen one the 2 of its weight.
#
# **Predict:** how many GB of states has GPT-3, 174.6 billion parameters, with LoRA?

# %%
for name, config in (("full fine-tuning", None), ("LoRA, q and v, r = 4", gpt3_lora(4))):
    states = memory_ledger("gpt3", config, precision="mixed").model_states
    print(f"GPT-3, states in mixed precision, {name:22s} {states / 1e9:9,.1f} GB")
assert abs(states / 350e9 - 1) < 0.01

# %% [markdown]
# About 350 GB, the frozen weights at 2 bytes each. The paper says "from 1.2TB to 350GB" (section 4.2), and not how its
# 1.2 TB are composed; 16 bytes a parameter are 2.8 TB.
#
# `peft-2`, below, is about two other steps. At 7B it is one of 512 tokens in bfloat16, by the ledger: a frozen
# parameter saves 2 bytes of gradient and 8 of moments, so the gradients are a fifth. (The 20 % and 79 % are with $q$
# and $v$.) On the base it is the measured peak of a step with 8 sentences. The step of the table above has more tokens,
# so activations weigh more: the four numbers of LoRA on all layers add up to 0.84 times those of full fine-tuning.

# %% [markdown]
# > `peft-2` memory: fewer gradients to compute and store: **holds if**. More than half of what is saved are gradients
# > and states together, not the gradients alone: at 7B the gradients are 20% of it, the optimizer's states 79% and the
# > inputs of frozen layers 0.0 % (all linear layers) and 0.7 % (q, v); a step on the base, all linear layers, takes
# > 0.57 times the memory, and 0.67 times the FLOPs at 7B.

# %% [markdown]
# ## 7 · Training it
#
# The training loop and the 64 held-out verses are Lesson 3's. A batch has 12 verses in place of 16, and the optimizer
# is given $A$ and $B$ alone.

# %%
TASKS, n_held_out = ("rewrite", "source"), 8 if REDUCED else 64
train_set = {name: data.drawn(name, STEPS * SIZE, seed=0) for name in TASKS}
held_out = {name: data.encode(data.asked(name, "validation", n_held_out)) for name in TASKS}


def loss_of(model, name="rewrite"):
    """The held-out loss of a task, in nats per token."""
    return mp.train.evaluate(model, held_out[name], batch_size=32, pad_token_id=tokenizer.pad_token_id)


def train(model, rate=1e-2, name="rewrite", steps=STEPS):
    """The rate grows to `rate` in 3 steps, and then falls in a line (Lesson 0, section 7)."""
    arguments = mp.TrainingArguments(
        learning_rate=rate, max_steps=steps, per_device_train_batch_size=SIZE, warmup_steps=3, progress=False
    )
    mp.Trainer(model, train_set[name], args=arguments).train()
    return model


start = loss_of(base)
adapted = train(lora(name="rewrite"))
adapted_end = loss_of(adapted)
trainable, _ = adapted.get_nb_trainable_parameters()
print(f"held-out loss: base {start:.3f}, with LoRA after {STEPS} steps {adapted_end:.3f}; {trainable:,} of {N:,} numbers trained")
mp.assert_learning(adapted)  # every matrix has moved
assert REDUCED or adapted_end < start - 0.2

# %% [markdown]
# The learning rate is $10^{-2}$; Lesson 3's best was $10^{-3}$. Does LoRA need another rate? In the first step full
# fine-tuning moves each weight by $\eta$. LoRA moves $W$ by $\frac{\alpha}{r} \Delta B\, A$. Element $(i, l)$ of
# $\Delta B\, A$ is a sum of $r$ terms $\pm \eta A_{jl}$, where $A$, uniform in $\pm 1/\sqrt{k}$, has the variance
# $1/(3k)$. If the signs are independent, the move's root mean square is $\frac{\alpha}{r} \sqrt{r / (3k)}\, \eta$. With
# $\alpha$ fixed it falls with the width, and with $r$, as the terms partly cancel. (In $\Delta L$, section 3, none do:
# each part of the step lowers the loss.)

# %%
stepped = lora()
stepped.loss(**first_batch).backward()
mp.optim.AdamW(stepped.parameters(), lr=1.0, weight_decay=0.0).step()  # 1 in place of eta
moves = {name: to_numpy(layer.adapters["default"].delta_weight()) for name, layer in stepped.layers.items()}
size = np.sqrt(np.mean([np.mean(move**2) for move in moves.values()]))
formula = 16 / 8 * np.sqrt(np.mean([8 / (3 * move.shape[1]) for move in moves.values()]))
print(f"a weight moves in the first step by: full fine-tuning 1 eta, LoRA {size:.2f} eta; by the formula {formula:.2f} eta")
assert abs(size / formula - 1) < 0.1 and size < 0.5

# %% [markdown]
# So at equal rates LoRA's first step in $W$ is smaller. How much higher its rate should be, only tuned runs say
# (section 10). Schulman et al. (2025, "LoRA Without Regret", thinkingmachines.ai/blog/lora) find about ten times.
#
# ## 8 · Merge: the detour disappears
#
# $W + \frac{\alpha}{r} BA$ is a matrix of $W$'s shape. Where it replaces $W$, a plain model with no extra layer
# remains. `merge_and_unload` makes it as a *new* model. (PEFT's writes into the base's own weights.)

# %%
merged = adapted.merge_and_unload()
want, got = adapted(ids).numpy(), merged(ids).numpy()
print(f"merged against unmerged: a logit differs by at most {np.abs(want - got).max():.1e} of {np.abs(want).max():.0f}")
assert np.abs(want - got).max() < 1e-4 * np.abs(want).max()
assert type(merged) is type(base)
assert [(n, p.shape) for n, p in merged.named_parameters()] == [(n, p.shape) for n, p in base.named_parameters()]

# %% [markdown]
# To undo it, the paper (section 4.1) and PEFT's `unmerge_adapter` subtract again.
#
# **Predict:** in float32, how many weights of a matrix are then what they were: all, most, or few?

# %%
D = to_numpy(adapted.layers[place].adapters["rewrite"].delta_weight())
subtracted = (W + D) - D
adapted.merge_adapter()
assert np.array_equal(adapted(ids).numpy(), got)
adapted.unmerge_adapter()
assert np.array_equal(adapted(ids).numpy(), want)
print(f"merged and subtracted again: {np.mean(subtracted != W):.0%} of the weights differ, by up to {np.abs(subtracted - W).max():.0e}")
assert 0 < np.mean(subtracted != W) < 0.5 and np.abs(subtracted - W).max() < 1e-6
assert {where(rows.rows()) for rows in (DECODING, MIXED, SWAP)} == {"AMD EPYC, cpu family 25, model 17, 1 thread, 2026-12-03"}

# %% [markdown]
# Most, not all: the sum is rounded, so the difference can miss $W$. The library keeps $W$ instead: `merge_adapter`
# computes with merged weights, and `unmerge_adapter` drops them. Two cases speak against merging: rows of one batch
# that need different adapters (section 9), and a $W$ in few bits, as the sum is rounded to as few (Lesson 7, section
# 7). In bfloat16 a change of less than 1/512 of a weight is lost (Lesson 17, section 3).
#
# The verdicts' times are of 2026-12-03, on one thread of an AMD EPYC.

# %% [markdown]
# > `lora-10` no extra latency after merging: **holds**. The merged model takes 1.01 times the base's time, from 0.99 to
# > 1.03 (the rule allows 1.10), and is clearly slower than both the base and a copy of it (itself 0.96 to 1.06 times
# > the base's) at none of the widths and batch sizes; unmerged it takes 1.19 times (width 512, batch 1) to 1.82 times
# > (width 128, batch 1). (8 seeds)

# %% [markdown]
# ## 9 · One base, many tasks
#
# A second adapter on the same base learns the league's other task, `source` (Lesson 3).

# %%
adapted.add_adapter("source", mp.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), seed=1)
adapted.set_adapter("source")
train(adapted, name="source")
adapted.set_adapter("rewrite")
assert np.array_equal(adapted(ids).numpy(), want), "training one adapter leaves the other alone"
table = {"none": [start, loss_of(base, "source")]}
for name in TASKS:
    adapted.set_adapter(name)
    table[name] = [loss_of(adapted, task) for task in TASKS]
print("held-out loss of         rewrite      source")
for name, row in table.items():
    print(f"  with adapter {name:8s}" + "".join(f"{loss:12.3f}" for loss in row))
assert REDUCED or all(table[name][i] == min(row[i] for row in table.values()) for i, name in enumerate(TASKS))
assert REDUCED or all(table[name][1 - i] > table["none"][1 - i] for i, name in enumerate(TASKS))

# %% [markdown]
# Each adapter is best at its own task, and worse than the base at the other. They need not take turns: in one batch
# each row names its adapter, the base's product is computed once for all rows, and each row has its own detour.

# %%
names = ["rewrite", "__base__", "source", "rewrite"]
mixed = adapted(ids, adapter_names=names).numpy()
alone = {"__base__": base(ids).numpy()}
for name in TASKS:
    adapted.set_adapter(name)
    alone[name] = adapted(ids).numpy()
difference = max(np.abs(mixed[i] - alone[name][i]).max() for i, name in enumerate(names))
print("a batch of", ", ".join(names), f"against one for all rows, each in turn: largest difference {difference:.1e}")
assert difference < 1e-4 * np.abs(mixed).max() and (REDUCED or np.abs(mixed[0] - alone["__base__"][0]).max() > 0.1)

# %% [markdown]
# On the disk a task is its adapter, in PEFT's format: two matrices per layer, and a small JSON file with the layers,
# $r$ and $\alpha$.

# %%
folder = OUT / "04_adapters"
adapted.save_pretrained(folder)
size = (folder / "source" / "adapter_model.safetensors").stat().st_size
print(f"{'source/adapter_model.safetensors':34s} {size:12,} bytes; {trainable:,} parameters x 4 = {4 * trainable:,}")
print(f"{'a full fine-tune, float32':34s} {4 * N:12,} bytes: {4 * N / size:.0f} times as much")
assert 0 <= size - 4 * trainable < 20_000, "the file is the matrices and a small header"
assert np.array_equal(mp.PeftModel.from_pretrained(base, folder / "rewrite")(ids).numpy(), want)
adapter, whole = 2 * count_parameters("gpt3", gpt3_lora(4)).stored, 2 * count_parameters("gpt3").stored
print(f"GPT-3, r = 4, float16: {adapter / 1e6:.1f} MB a task; whole {whole / 1e9:.0f} GB: {whole / adapter:,.0f} times")
assert 9_000 < whole / adapter < 10_000  # "roughly 10,000x", "from 350GB to 35MB"

# %% [markdown]
# An adapter has 8 % of the model's numbers, so 100 tasks take $1 + 100 \cdot 0.08 = 9$ models in place of 100
# (`peft-1`). In `lora-11` a mixed batch is faster than turns, and slower than one adapter for all rows, as each
# adapter's detours are separate operations. (`adapter-5` swaps adapters of Lesson 5; `soft-6` has those and Lesson 6's
# prompts among its methods.)

# %% [markdown]
# > `peft-1` storage: one base and a small file per task: **holds if**. There are 2 tasks or more: the base itself is
# > stored, too, so that one task takes 1.08 times a tuned model's bytes, and 100 tasks take 11 times less (at 7B 77
# > times).
#
# > `lora-11` many adapters can share one base, at once: **holds**. It is so, and saves time, in generation and
# > training: a batch of 8 rows with 4 adapters takes 0.81 (generation) and 0.95 (training) times the time of the four
# > in turn, two rows each (in the worst repeat 0.98), and 2.32 and 1.62 times a batch of one adapter; base and adapters
# > take 0.33 times the bytes of four models; rows differ from those alone by at most 0e+00. (10 seeds)
#
# > `adapter-5` easy to swap for different tasks: **holds**. A swap takes 112 microseconds, 0.05 of a generated token,
# > and the outputs are those of the adapter alone (to 0e+00); from the disk it takes 4 ms; an adapter has 3.5% of the
# > model's bytes. (6 seeds)
#
# > `soft-6` one model serves all tasks at the same time: **holds**. In a batch of 6 rows, each with a method of its
# > own, logits differ by at most 9e-07 of the largest from those of the row alone, and 6 of 6 generated texts are the
# > same. (6 test items)

# %% [markdown]
# ## 10 · The league so far
#
# One run at one rate says that LoRA learns; how well, the league (Lesson 3) says.

# %%
print(so_far(["full", "head", "lora"]))
for case, times, alike in (Case("rewrite", 500), 6, True), (Case("source", 500), 3, False):
    found = pairs(case, ["full", "lora"])["lora", "full"]
    tuned = {line.method: line.trial for line in standings(case, ["full", "lora"])}
    one, other = tuned["lora"], tuned["full"]
    print(f"{case.name}: LoRA over full {found.interval}, {found.word}; its rate is {one.rate / other.rate:.1f} times as high")
    assert found.clearly_better and round(one.rate / other.rate, 6) == times
    assert ((one.epochs, one.batch_size) == (other.epochs, other.batch_size)) is alike

# %% [markdown]
# With 500 examples and 8 % of the numbers LoRA is better than full fine-tuning, by 0.041 nats on `rewrite`, barely on
# `source` (1 point). (With 5,000 examples it falls behind on `rewrite`: Lesson 18, section 5.) Its tuned rate is 6
# times as high on `rewrite` and 3 times on `source`. (Equal first steps, section 7: $1 / 0.28 = 3.6$; Schulman et al.:
# ten.) These ratios are rough: a search doubles and halves the rate, under one seed, and on `source` epochs and batches
# differ, too.

# %% [markdown]
# ## 11 · Break it
#
# **Both factors zero.** If $B = 0$ is a good start, why not $A = 0$ too? By section 2 both gradients are then zero, and
# stay zero. Nothing crashes, and nothing is learned.

# %%
dead = lora()
for _, part in dead.parts("default"):
    part.lora_A.data[:] = 0
dead.mark_start("default")
train(dead, steps=3)  # `mp.assert_learning(dead)` would stop here
print(f"both zero: held-out loss {start:.4f} -> {loss_of(dead):.4f}; matrices that have never moved: {len(dead.unmoved())}")
assert np.array_equal(dead(ids).numpy(), base(ids).numpy()) and len(dead.unmoved()) == 84

# %% [markdown]
# **$\alpha$ raised with $r$, and the rate left as it was.** At $\alpha = 2r$, $\Delta L$ is about eight times as large
# at $r = 64$ as at 8 (section 3). Two seeds for $A$:

# %%
ends = {}
print(f"held-out loss of two seeds (base {start:.3f}; r = 8, alpha = 16, rate 1e-2: {adapted_end:.3f})")
for r, alpha, rate in (64, 16, 1e-2), (64, 128, 1e-2), (8, 128, 1e-2), (64, 128, 1.25e-3):
    seeds = (0,) if REDUCED else (0, 1)
    ends[r, alpha, rate] = [loss_of(train(lora(r, alpha, seed=seed), rate)) for seed in seeds]
    print(f"  r = {r:2d}, alpha = {alpha:3d}, rate {rate:7g}: " + ", ".join(f"{end:.3f}" for end in ends[r, alpha, rate]))
small, large, low_rank, slow = ends.values()
assert REDUCED or (max(small + slow) < adapted_end + 0.1 and max(small) + 0.3 < min(large + low_rank))

# %% [markdown]
# At $\alpha = 16$, 64 ends near 8. At 128 and this rate both ranks end over 0.3 nats higher: it is not the rank. At 64
# an eighth of the rate mends it.
#
# **$\alpha$ forgotten in the file.** The weights file holds $A$ and $B$; $\alpha$ stands in `adapter_config.json`.
# Suppose a script copies the adapter and writes a new configuration, with the default $\alpha = 8$ instead of 16.
#
# **Predict:** does it load? And what does the loaded model compute?

# %%
options = read_json(folder / "rewrite" / "adapter_config.json")
write_json(folder / "rewrite" / "adapter_config.json", options | {"lora_alpha": 8})
halved = mp.PeftModel.from_pretrained(base, folder / "rewrite", is_trainable=True)
write_json(folder / "rewrite" / "adapter_config.json", options)
print(f"held-out loss: alpha as trained {adapted_end:.3f}, alpha halved {loss_of(halved):.3f}, base {start:.3f}")
assert np.allclose(to_numpy(halved.layers[place].adapters["default"].delta_weight()), D / 2)
assert all(np.array_equal(p.numpy(), kept) for p, kept in zip(base.parameters(), untouched)), "after all this, the base"
off = np.abs(halved(ids).numpy() - want).max()
print(f"largest difference of a logit from the model that was trained: {off:.1f} of {np.abs(want).max():.0f}")
assert REDUCED or (off > 0.01 * np.abs(want).max() and start - loss_of(halved) > 0.8 * (start - adapted_end))

# %% [markdown]
# It loads, as every shape fits, and the model is the base plus *half* of the learned $\Delta W$. The loss need not
# tell: over four fifths of the gain are still there. But a logit differs by more than a hundredth of the largest.

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
# **3.** What does the factor $1/r$ in $\alpha / r$ do?
#
# <details><summary>Answer</summary>
#
# It cancels the number of columns that add to $\Delta L$, so that with $\alpha$ fixed the first step changes the loss
# about equally at every rank.
#
# </details>
#
# **4.** An adapter is merged in float32, and then $BA$ is subtracted again. Is the result the base?
#
# <details><summary>Answer</summary>
#
# Nearly: the sum and the difference are rounded, and some weights end as another number. The library keeps $W$ and
# drops the merged weights instead.
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
# `minipeft exercise 04.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file, `minipeft
# exercise 04.2 FILE.py`.
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
# Which $\alpha$ makes the first step change the loss as much as it did (section 3)?
#
# Projects, with no answer written down:
#
# - **Is $A$ needed?** Freeze $A$ at its random values and train $B$ alone (LoRA-FA, Zhang et al. 2023,
#   arXiv:2308.03303): section 6 says what that saves, namely $x$. Use $r = 16$ to have about as many trained
#   parameters. How much of what LoRA learns in section 7 is left, at the better of two rates each?
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
