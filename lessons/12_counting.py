# %% [markdown]
# # Lesson 12 · Counting: where 4.7 million, 780 GB and 0.1 % come from
#
# Papers state numbers of trainable parameters, and of bytes of memory. Nearly all of them follow from a model's shapes
# and a method's options. This lesson recomputes the famous ones: from a formula, and again from a model that is built
# (for 175 billion parameters without giving it memory) or, where this package builds none, as of T5, from the shapes of
# its modules. Then it audits the literature, finds three slips, and predicts, line by line, the memory of three ways
# to fine-tune, which it measures as well.
#
# You need the lessons on LoRA and QLoRA. Run it with `python lessons/12_counting.py`, or open it as a notebook. What it
# does is also at the terminal: `minipeft count`, `minipeft memory` and `minipeft audit`. It takes a quarter of a minute
# on two cores.
#
# Environment: `MINIPEFT_REDUCED=1` measures a smaller model; `MINIPEFT_LESSONS_OUT` is where the picture goes
# (`lessons/out`).

# %%
import os
import tracemalloc
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft.accounting import architecture, count_parameters, measure_peak, memory_ledger
from minipeft.accounting.published import audit, tally

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)


def built(model, *configs):
    """Trained parameters of a model that is built: its modules, its adapters, all but the memory for the numbers."""
    return sum(mp.PeftModel(model, config, seed=None).get_nb_trainable_parameters()[0] for config in configs)


def shapes(name):
    """The model of a published architecture, unallocated."""
    return mp.Transformer(architecture(name).config, seed=None)


# %% [markdown]
# ## 1 · One matrix
#
# Training a matrix $W$ of $d \times k$ numbers trains $dk$ numbers. LoRA trains $B$ of $d \times r$ and $A$ of
# $r \times k$ in its place:
#
# $$d k \quad\text{against}\quad r\,(d + k), \qquad \frac{dk}{r(d+k)} = \frac{d}{2r} \text{ for } d = k .$$
#
# The textbook's example is $d = k = 4096$, $r = 8$: "16.7 million against 65 thousand, 256 times fewer".

# %%
d, r = 4096, 8
layer = mp.nn.Sequential(mp.nn.Linear(d, d, bias=False, seed=None))
whole, adapter = d * d, r * (d + d)
print(f"one matrix: {whole:,} numbers; LoRA r=8: {adapter:,}; {whole / adapter:.0f} times fewer")
assert sum(p.size for p in layer.parameters()) == whole == 16_777_216
assert built(layer, mp.LoraConfig(r=r, target_modules=["0"])) == adapter == 65_536
assert whole / adapter == d / (2 * r) == 256

# %% [markdown]
# ## 2 · An adapter and a prompt
#
# A bottleneck of width $m$ after a sublayer of width $d$ has $2dm$ weights, and $m + d$ biases that summaries like to
# forget: "131K an adapter, 1.6M in 12 layers" for $1024 \to 64$. A prompt of $P$ virtual tokens has $Pd$ numbers,
# whatever the model above it: "102K" for $100 \times 1024$.

# %%
narrow = mp.TransformerConfig.llama(hidden_size=1024, num_hidden_layers=12, num_attention_heads=16, vocab_size=1000)
one = 2 * 1024 * 64
twelve = built(mp.Transformer(narrow, seed=None), mp.BottleneckConfig(placement="pfeiffer", bottleneck_size=64))
biases = 12 * (64 + 1024)
print(f"an adapter 1024 -> 64 -> 1024: {one:,}; in 12 layers {12 * one:,}, with biases {twelve:,}")
assert (one, 12 * one) == (131_072, 1_572_864)
assert twelve == 12 * one + biases == count_parameters(narrow, mp.BottleneckConfig(bottleneck_size=64)).trainable
prompt = mp.PromptTuningConfig(num_virtual_tokens=100)
print(f"a prompt of 100 tokens: {built(mp.Transformer(narrow, seed=None), prompt):,}")
assert built(mp.Transformer(narrow, seed=None), prompt) == 100 * 1024 == 102_400

# %% [markdown]
# ## 3 · LoRA's grid for GPT-3
#
# GPT-3 has $L = 96$ layers of width $d = 12288$, whose query, key, value and output matrices are all $d \times d$. With
# $n$ of them adapted in each layer, LoRA trains
#
# $$2 \, n L d \, r \quad\text{numbers.}$$
#
# That is the whole of Table 15's LoRA rows (Hu et al. 2021). GPT-2's code fuses query, key and value into one `c_attn`;
# `enable_lora` says which of the three are adapted.

# %%
gpt3 = shapes("gpt3")
qv = lambda r: [mp.LoraConfig(r=r, target_modules=["c_attn"], enable_lora=[True, False, True])]  # noqa: E731
qkvo = lambda r: [  # noqa: E731
    mp.LoraConfig(r=r, target_modules=["c_attn"], enable_lora=[True, True, True]),
    mp.LoraConfig(r=r, target_modules=["attn.c_proj"]),
]
grid = [  # matrices a layer, configurations, rank, published (in millions)
    ("q, v", 2, qv, 1, 4.7), ("q, v", 2, qv, 2, 9.4), ("q, k, v, o", 4, qkvo, 1, 9.4), ("q, v", 2, qv, 4, 18.8),
    ("q, v", 2, qv, 8, 37.7), ("q, k, v, o", 4, qkvo, 4, 37.7), ("q, v", 2, qv, 64, 301.9),
    ("q, k, v, o", 4, qkvo, 64, 603.9),
]  # fmt: skip
print("\nGPT-3, LoRA on      r   2 n L d r        built        paper")
for where, n, configs, r, published in grid:
    formula, modules = 2 * n * 96 * 12288 * r, built(gpt3, *configs(r))
    print(f"  {where:14s} {r:4d} {formula:13,} {modules:13,} {published:8.1f}M")
    assert formula == modules == sum(count_parameters("gpt3", c).trainable for c in configs(r))
    assert 0 <= formula / 1e6 - published < 0.1, "the paper cuts digits off, and does not round"

# %% [markdown]
# ## 4 · Lester's table of prompts
#
# Prompt tuning trains $Pd$ numbers, so the share of the model falls as the model grows: the table that made the method
# famous (Lester et al. 2021, Table 4). T5's embedding and its output head are two tables of $V d$ numbers; the rest is
# counted from the module tree, as Hugging Face names it.

# %%
lengths = (1, 5, 20, 50, 100, 150)
sizes = {"small": 512, "base": 768, "large": 1024, "xl": 2048, "xxl": 4096}
print("\nprompt tokens " + "".join(f"{P:>12d}" for P in lengths) + "   share at 150")
table = {}
for size, width in sizes.items():
    for P in lengths:
        counted = count_parameters(f"t5v1.1-{size}", mp.PromptTuningConfig(num_virtual_tokens=P))
        assert counted.trainable == P * width
        table[size, P] = counted
    print(
        f"T5 v1.1 {size:6s}"
        + "".join(f"{table[size, P].trainable:12,}" for P in lengths)
        + f"   {table[size, 150].share:.5%}"
    )
c = dict(V=32128, d=4096, ff=10240, layers=24, inner=64 * 64, heads=64)  # T5 v1.1 XXL, by hand
encoder = 4 * c["d"] * c["inner"] + 3 * c["d"] * c["ff"] + 2 * c["d"]
decoder = encoder + 4 * c["d"] * c["inner"] + c["d"]
by_hand = 2 * c["V"] * c["d"] + c["layers"] * (encoder + decoder) + 2 * c["d"] + 2 * 32 * c["heads"]
print(f"T5 v1.1 XXL: {by_hand:,} parameters by hand, {architecture('t5v1.1-xxl').size:,} from the table of shapes")
assert by_hand == architecture("t5v1.1-xxl").size == 11_135_332_352  # Lester et al., Table 4, without the prompt
wide = mp.TransformerConfig.llama(hidden_size=4096, num_hidden_layers=1, num_attention_heads=32)
assert (
    built(mp.Transformer(wide, seed=None), mp.PromptTuningConfig(num_virtual_tokens=150)) == table["xxl", 150].trainable
)

# %% [markdown]
# ## 5 · From 16 bits to 4
#
# "Four times smaller": $16 / 4$. Almost: a block of 64 weights shares a scale, and scales are packed too (Lesson 7), so
# a weight takes 4.127 bits, and 3.88 times less. And only the linear layers are packed.

# %%
llama = architecture("llama-65b")
options = dict(precision="bfloat16", quantization="nf4")
linear = sum(int(np.prod(s)) for name, s in llama.items() if llama.kinds[name] == "linear" and name != "lm_head.weight")
stored = memory_ledger(llama, "frozen", **options).held["frozen weights"]
bits = 8 * (stored - 2 * (llama.size - linear)) / linear
print(
    f"\nLLaMA-65B: {linear / llama.size:.1%} of {llama.size:,} parameters are packed, "
    f"at {bits:.3f} bits: {16 / bits:.2f} times smaller"
)
assert 16 / 4 == 4
assert abs(bits - (4 + 8 / 64 + 32 / (64 * 256))) < 1e-3
small, config = mp.load_base()[0], mp.LoraConfig(r=8, target_modules="all-linear")
quantized = mp.quant.quantize_model(small)  # the same rule, on a model that is really there
assert memory_ledger(small.config, "frozen", quantization="nf4").held["frozen weights"] == sum(
    {id(p.data): p.data.nbytes for p in quantized.parameters()}.values()  # the code book is one array for all layers
)

# %% [markdown]
# ## 6 · The ledger of a GPU
#
# Training one parameter with Adam in 16 bits takes
#
# $$\underbrace{2}_{\text{weight}} + \underbrace{2}_{\text{gradient}} + \underbrace{4 + 4}_{\text{Adam's moments}} = 12
# \text{ bytes,} \qquad + \underbrace{4}_{\text{float32 copy of the weight}} = 16 .$$
#
# Both are in use. ZeRO (Rajbhandari et al. 2019, section 3.1) counts 16; QLoRA (Dettmers et al. 2023, section 1) counts
# 12, and gets "more than 780 GB" for 65B. A frozen parameter costs its storage alone: 2 bytes, or half a byte in NF4.
# That is nearly all there is to "65B on one GPU of 48 GB". The rest is the batch: what its forward pass keeps for
# backward. The ledgers below count with *checkpointing*: each block keeps its input alone, and backward computes the
# block once more.

# %%
lora = mp.LoraConfig(r=64, target_modules="all-linear")
step = dict(batch=1, seq_len=512, checkpointing=True)
ledgers = {
    "full, 16 bytes": memory_ledger(llama, None, precision="mixed", **step),
    "full, 12 bytes": memory_ledger(llama, None, precision="bfloat16", **step),
    "LoRA r=64": memory_ledger(llama, lora, precision="bfloat16", **step),
    "QLoRA r=64": memory_ledger(llama, lora, **options, **step),
}
names = ("weights", "master copies", "gradients", "optimizer states", "batch")


def grouped(lines):
    """A ledger's lines, in five groups."""
    group = {line: line if line in names else "batch" for line in lines}
    group |= dict.fromkeys(("frozen weights", "trained weights", "adapters"), "weights")
    return {name: sum(n for line, n in lines.items() if group[line] == name) for name in names}


print("\nLLaMA-65B, one sequence of 512 tokens, checkpointing; GB at the peak")
print("                 " + "".join(f"{name:>17s}" for name in names) + "     sum")
for title, ledger in ledgers.items():
    print(
        f"  {title:15s}"
        + "".join(f"{n / 1e9:17.2f}" for n in grouped(ledger.lines).values())
        + f"{ledger.total / 1e9:8.1f}"
    )
assert ledgers["full, 12 bytes"].model_states == 12 * llama.size > 780e9
assert ledgers["full, 16 bytes"].model_states == 16 * llama.size
assert ledgers["QLoRA r=64"].total < 48e9 < ledgers["LoRA r=64"].total
nominal = memory_ledger(1_500_000_000, precision="mixed").model_states
assert nominal == 24e9, "ZeRO, section 3.1: GPT-2's nominal 1.5 billion parameters take at least 24 GB"

# %% [markdown]
# ## 7 · Three slips
#
# The package ships 297 published figures with what is known of their options, and computes again those it has a rule
# for. Most follow. Five of these prove little: an option that nobody printed, such as a length, was solved for from the
# figure itself. Of those that do not follow, three come with a second witness that tells what happened.

# %%
findings = audit()
found = {f.row["id"]: f for f in findings}
summary = tally(findings)
solved = sum(f.solved and f.verdict == "reproduces" for f in findings)
print(
    f"\n{summary['rows']} published figures: {summary['reproduces']} follow "
    f"({solved} of them with an option solved from the figure), {summary['differs']} do not, "
    f"{summary['not covered']} are not covered"
)
assert (summary["rows"], summary["reproduces"], solved) == (297, 256, 5)


def witness(row):
    f = found[row]
    published, unit = float(f.row["published_value"]), f.row["unit"]
    print(f"    {f.row['source'].split(' (')[0]}, {f.row['table_or_path']}: {f.row['model']}, {f.row['hyperparameters']}:")
    print(f"        {published:.8g} {unit} published, {f.computed:.8g} computed: {f.verdict}")
    return f.verdict


print("1. two digits changed places: 20 x 512 is 10,240, and the share beside it was computed from that")
assert [witness(f"lester-small-20-{what}") for what in ("train", "total", "pct")] == [
    "differs",
    "differs",
    "reproduces",
]
assert 20 * 512 == 10_240 and found["lester-small-20-total"].computed - architecture("t5v1.1-small").size == 10_240
print("2. a rank is wrong, not its count: with the released script's r = 16, count and checkpoint agree")
assert [witness(f"lora-{what}") for what in ("debxxl-r8", "debxxl-r16", "file-debxxl")] == [
    "differs",
    "reproduces",
    "reproduces",
]
print("3. 0.35M is 0.1 % of GPT-2 medium, the label of another row; the released checkpoint holds 0.39M numbers")
assert [witness(f"lora-{what}") for what in ("gpt2m", "file-gpt2m")] == ["differs", "reproduces"]
assert 2 * 2 * 24 * 1024 * 4 == 393_216 and round(architecture("gpt2-m").size * 0.001 / 1e6, 2) == 0.35

# %% [markdown]
# ## 8 · Predicted and measured
#
# A ledger that nobody checks is a guess. Here is one that can be checked: full fine-tuning, LoRA and QLoRA of a model
# small enough for this machine. `memory_ledger` runs the model's own code on arrays without content and notes which are
# alive when; `tracemalloc` counts the bytes of the real ones. What they say is compared line by line.

# %%
width = 128 if REDUCED else 512
mine = mp.TransformerConfig.llama(
    vocab_size=2048, hidden_size=width, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4
)
BATCH, LENGTH = 2, 128
text = np.random.default_rng(0).integers(0, 2048, (BATCH, LENGTH))


def dense():
    """The model in host memory, whose arrays tracemalloc sees."""
    return mp.Transformer(mine, seed=0).to("numpy")


COUNTED = {
    "full": (None, {}, dense),
    "LoRA": (config, {}, lambda: mp.get_peft_model(dense(), config)),
    "QLoRA": (
        config, {"quantization": "nf4"},
        lambda: mp.get_peft_model(mp.quant.quantize_model(dense()), config),
    ),
}  # fmt: skip


def arrays():
    """Bytes of the NumPy arrays that are alive, of those made since tracemalloc was started."""
    domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([domain]).traces)


def apart(make):
    """The lines of a step, measured one after the other."""
    model = make()
    weights = arrays()
    loss = model.loss(text, text)
    kept = arrays() - weights
    loss.backward()
    del loss
    gradients = arrays() - weights
    optimizer = mp.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    return {
        "weights": weights,
        "kept for backward": kept,
        "gradients": gradients,
        "optimizer states": arrays() - weights - gradients,
    }


def peak(make):
    """The most of two training steps, beyond what the making of the model needed."""
    model = make()
    optimizer = mp.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def steps():
        for _ in range(2):
            model.loss(text, text).backward()
            optimizer.step()
            optimizer.zero_grad()

    return measure_peak(steps)


threads = mp.backend.get_num_threads()
mp.backend.set_num_threads(1)  # how many work at the same moment is the scheduler's affair; one measures the same again
bars = {}
print(f"\n{count_parameters(mine).total:,} parameters, {BATCH} x {LENGTH} tokens; MB predicted / measured")
for name, (method, how, make) in COUNTED.items():
    make().loss(text, text)  # whatever is made once is made
    ledger = memory_ledger(mine, method, BATCH, LENGTH, **how)
    held = ledger.held
    predicted = {
        "weights": held["frozen weights"] + held["trained weights"] + held["adapters"],
        "kept for backward": held["activations"] + held["logits"],
        "gradients": held["gradients"],
        "optimizer states": held["optimizer states"],
    }
    tracemalloc.start()
    measured = apart(make)
    tracemalloc.stop()
    predicted["peak"], measured["peak"] = ledger.total, measured["weights"] + peak(make)
    print(
        f"  {name:6s}"
        + "".join(f"  {line} {predicted[line] / 1e6:.1f} / {measured[line] / 1e6:.1f}" for line in predicted)
    )
    for line in predicted:
        assert abs(predicted[line] - measured[line]) < 0.1 * measured[line], line
    bars[name] = predicted, measured
mp.backend.set_num_threads(threads)
assert bars["QLoRA"][1]["peak"] < bars["LoRA"][1]["peak"] < bars["full"][1]["peak"]
assert bars["LoRA"][1]["optimizer states"] < bars["full"][1]["optimizer states"] / 10

# %% [markdown]
# LoRA removes gradients and optimizer states, QLoRA most of the weights. Neither removes the activations: in small
# models with long batches they are what is left, and checkpointing is the remedy.
#
# ## 9 · Break it
#
# **Count what is there.** The head of GPT-2 is its embedding. Counted as a matrix of its own it adds 39 million
# parameters that nobody stores. And a packed weight is half a byte: an array of bytes has half as many elements as the
# matrix.

# %%
gpt2 = architecture("gpt2")
twice = gpt2.size + int(np.prod(gpt2[gpt2.tied["lm_head.weight"]]))
print(f"\nGPT-2 has {gpt2.size:,} parameters; with the head counted again {twice:,}")
assert (gpt2.size, twice) == (124_439_808, 163_037_184)
naive = sum(p.size for p in quantized.parameters())
print(f"the shipped base has {count_parameters(small.config).total:,}; as arrays in four bits, {naive:,} elements")
assert naive < 0.75 * count_parameters(small.config).total
assert (
    mp.get_peft_model(quantized, config).get_nb_trainable_parameters()
    == mp.get_peft_model(small, config).get_nb_trainable_parameters()
)

# %% [markdown]
# **Forget the batch.** Model states alone say that QLoRA of a 7B model fits on a GPU of 8 GB, for any batch. Break it:
# how long may one sequence be, without checkpointing, and with it?

# %%
lengths7 = (256, 512, 1024, 2048)
seven = {}
for checkpointing in (False, True):
    for T in lengths7:
        seven[checkpointing, T] = memory_ledger(
            "llama-7b", config, 1, T, precision="bfloat16", quantization="nf4", checkpointing=checkpointing
        ).total
states = memory_ledger("llama-7b", config, precision="bfloat16", quantization="nf4").total
print(f"QLoRA of LLaMA-7B: states {states / 1e9:.1f} GB; with a sequence of")
for T in lengths7:
    print(f"  {T:5d} tokens {seven[False, T] / 1e9:6.1f} GB, checkpointed {seven[True, T] / 1e9:5.1f} GB")
assert states < 8e9 < seven[False, 2048] and seven[True, 2048] < 8e9

# %%
figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), gridspec_kw={"width_ratios": [1.35, 1, 1]})
colors = {"weights": "C0", "optimizer states": "C2", "batch": "C1"}
labels = {
    "weights": "weights",
    "optimizer states": "optimizer states",
    "batch": "activations, gradients, working memory",
}
for i, (predicted, measured) in enumerate(bars.values()):
    for shift, lines, alpha in ((-0.2, predicted, 0.5), (0.2, measured, 1.0)):
        parts = {"weights": lines["weights"], "optimizer states": lines["optimizer states"]}
        parts["batch"] = lines["peak"] - sum(parts.values())
        left = 0.0
        for part, n in parts.items():
            label = labels[part] if i == 0 and alpha == 1 else None
            axes[0].barh(i + shift, n / 1e6, 0.38, left=left, color=colors[part], alpha=alpha, label=label)
            left += n / 1e6
        axes[0].text(left, i + shift, f" {left:.0f}", va="center", fontsize=8)
axes[0].set_yticks(range(len(bars)), list(bars))
axes[0].invert_yaxis()
axes[0].margins(x=0.12)
axes[0].set(
    title=f"A step of {count_parameters(mine).total / 1e6:.1f}M parameters (pale: predicted, full: measured)",
    xlabel="MB",
)
axes[0].legend(fontsize=8, loc="lower right")

for i, ledger in enumerate(ledgers.values()):
    gigabytes = ledger.total / 1e9
    axes[1].barh(i, gigabytes, color=["0.6", "0.6", "C0", "C3"][i])
    axes[1].text(max(gigabytes, 48) * 1.06, i, f"{gigabytes:.0f} GB", va="center", fontsize=9)
axes[1].axvline(48, color="black", linestyle="--", linewidth=1)
axes[1].text(50, 3.52, "a GPU of 48 GB", fontsize=8)
axes[1].set_yticks(range(len(ledgers)), list(ledgers))
axes[1].invert_yaxis()
axes[1].set(title="LLaMA-65B, one sequence of 512", xlabel="GB (logarithmic)", xscale="log", xlim=(20, 4000))

for i, (size, width_of) in enumerate(sizes.items()):
    axes[2].plot(lengths, [P * width_of for P in lengths], color=f"C{i}", linewidth=1, label=f"T5 {size}")
for f in findings:
    if f.row["id"].startswith("lester") and f.row["id"].endswith("train"):
        P, slip = int(f.row["hyperparameters"].split()[-1]), f.verdict == "differs"
        axes[2].plot(P, float(f.row["published_value"]), "rX" if slip else "k.", markersize=10 if slip else 5)
axes[2].annotate(
    "10,420 printed:\n10,240 meant", (20, 10420), xytext=(28, 1500), fontsize=8, arrowprops={"arrowstyle": "->"}
)
axes[2].set(
    title="Lester's table: dots printed, lines P d",
    xlabel="virtual tokens P",
    ylabel="trained",
    xscale="log",
    yscale="log",
)
axes[2].legend(fontsize=8)
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(OUT / "12_counting.png", dpi=120)

# %% [markdown]
# ## Exercises
#
# 1. **Another slip.** LoRA's appendix E.4 gives 37.7M for "$r_q = r_k = r_v = r_o = 2$". Which rank is meant? Which
#    table of the same paper says so? (`minipeft audit --source LoRA --verdict differs` lists this one and more.)
# 2. **Your model.** `minipeft count path/to/config.json --method lora -r 16` and `minipeft memory ... --seq 1024`: what
#    is the longest sequence that your GPU takes with full fine-tuning, LoRA and QLoRA? Which line decides in each case?
# 3. **The other ledger.** DeepSpeed counts 18 bytes a parameter. Find the precision in
#    `minipeft.accounting.memory.PRECISIONS` that gives it, and say which two bytes it has more than ZeRO's 16.
