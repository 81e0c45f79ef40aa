# %% [markdown]
# # Lesson 1 · Autograd: how a number tells a million weights which way to move
#
# Training a language model means: compute one number, the loss $L$, and then ask of *every* weight how $L$ would change
# if that weight changed a little. This lesson derives the algorithm that answers for all weights at once, builds it in
# 25 lines, reads how the library writes its derivatives down, measures why frozen weights make training cheap, and
# learns how to tell a right derivative from a wrong one.
#
# You need NumPy and the chain rule from school. Run it with `python lessons/01_autograd.py`, or open it as a notebook.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where the picture goes (`lessons/out`).

# %%
import gc
import inspect
import os
import time
import tracemalloc
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft import diagrams
from minipeft.autograd.tensor import op

F = mp.functional
REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# A loss as a graph: each number is computed from those above it, and each orange number says how much the loss changes
# with it.

# %%
diagrams.scalar_graph().savefig(OUT / "01_autograd_graph.png")

# %% [markdown]
# ## 1 · One chain rule, and the pullback
#
# A computation is a chain of small steps. Take one of them, $y = f(x)$, somewhere in the middle, with $L$ a number that
# depends on $y$. Suppose somebody already knows $g = \partial L / \partial y$: an array of the shape of $y$ that says
# how much $L$ moves for each element of $y$. The chain rule hands it on to $x$:
#
# $$\frac{\partial L}{\partial x_i} = \sum_j \frac{\partial y_j}{\partial x_i} \, g_j
#   \qquad\text{that is}\qquad \bar x = J^\top g .$$
#
# The function $g \mapsto J^\top g$ is the **pullback** of $f$ at $x$: it pulls a sensitivity back through one step.
# The Jacobian $J$ is never built. For `y = a * b` the pullbacks are `g * b` and `g * a`; for `y = x @ w` they are
# `g @ w.T` and `x.T @ g`. If every step knows its pullbacks, the gradient of the whole is a walk from $L$ back to the
# weights: this is *reverse mode*, and that is all there is to it.
#
# Two things follow.
#
# - A value that is used twice receives two sensitivities, and they **add** (the sum over $j$ runs over all uses).
# - The walk costs about as much as the computation itself, however many weights there are.
#
# ## 2 · An engine in 25 lines

# %%
class Var:
    """A value, and for each thing it was made from: (that thing, the pullback towards it)."""

    def __init__(self, value, edges=()):
        self.value, self.edges, self.grad = np.asarray(value), edges, 0.0


def primitive(fn):
    def apply(*inputs):
        value, *pullbacks = fn(*[x.value for x in inputs])
        return Var(value, list(zip(inputs, pullbacks)))

    return apply


def backward(output):
    order, seen = [], set()

    def visit(v):  # after the call, everything v was made from stands before v in `order`
        if id(v) not in seen:
            seen.add(id(v))
            for parent, _ in v.edges:
                visit(parent)
            order.append(v)

    visit(output)
    output.grad = np.ones_like(output.value)
    for v in reversed(order):  # by the time v's turn comes, all its uses have reported
        for parent, pullback in v.edges:
            parent.grad = parent.grad + pullback(v.grad)


# %% [markdown]
# An operation is a function on plain arrays that returns its value and one pullback per input. Four are enough for a
# small regression, $L = \sum (\tanh(x w) - t)^2$, in which the error $e = \tanh(xw) - t$ is used twice.

# %%
matmul = primitive(lambda x, w: (x @ w, lambda g: g @ w.T, lambda g: x.T @ g))
sub = primitive(lambda a, b: (a - b, lambda g: g, lambda g: -g))
mul = primitive(lambda a, b: (a * b, lambda g: g * b, lambda g: g * a))
total = primitive(lambda x: (x.sum(), lambda g: np.broadcast_to(g, x.shape)))


@primitive
def tanh(x):
    y = np.tanh(x)
    return y, lambda g: g * (1 - y * y)


rng = np.random.default_rng(0)
x, w, t = rng.standard_normal((8, 5)), rng.standard_normal((5, 3)), rng.standard_normal((8, 3))

by_hand = Var(w)
error = sub(tanh(matmul(Var(x), by_hand)), Var(t))
backward(total(mul(error, error)))

library = mp.Tensor(w, requires_grad=True)
error = (x @ library).tanh() - t
loss = (error * error).sum()
graph = loss._node  # kept for the picture: backward empties it
walk = []


def describe(node, depth=0):
    """The library's graph, from the loss down: (depth, op, shapes of the inputs that need a gradient)."""
    walk.append((depth, node.op, [shape for _, _, shape, _ in node.edges]))
    for parent in {id(p): p for p, *_ in node.edges}.values():
        if not isinstance(parent, mp.Tensor):
            describe(parent, depth + 1)


describe(graph)
loss.backward()
print("largest difference between our 25 lines and minipeft:", np.abs(by_hand.grad - library.grad).max())
assert np.allclose(by_hand.grad, library.grad, rtol=1e-12, atol=1e-12)
print("the library's graph, walked from the loss:", " <- ".join(name for _, name, _ in walk))
assert [name for _, name, _ in walk] == ["sum", "mul", "sub", "tanh", "matmul"]

# %% [markdown]
# The library's engine (`minipeft/autograd/tensor.py`) is this one, with what practice demands. It sorts the graph
# without recursion, so depth costs no stack; it undoes NumPy's broadcasting in one place; it frees each step as soon as
# its pullbacks have run; and it drops pullbacks that nobody needs, which is the subject of section 4.
#
# How much does the gradient cost? One backward pass is a small multiple of one forward pass. Nudging the weights one
# by one would take one forward pass for each.

# %%
deep = Var(1.0)
for _ in range(3000):
    deep = mul(deep, Var(1.0))
try:
    backward(deep)
    raise AssertionError("a recursive walk of 3000 steps should not fit Python's stack")
except RecursionError:
    print("our recursive walk fails 3000 steps deep;", end=" ")
start = deep = mp.Tensor(1.0, requires_grad=True)
for _ in range(3000):
    deep = deep * 1.0
deep.backward()
print("minipeft's iterative one gives", start.grad)
assert start.grad == 1.0

config = mp.TransformerConfig.llama(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
model = mp.Transformer(config, seed=0)
ids = rng.integers(0, 256, (8, 64))


def seconds(fn, repeats=5):
    """The fastest of a few runs: the others waited for something else."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        fn()
        times.append(time.perf_counter() - begin)
    return min(times)


def forward_only():
    with mp.no_grad():
        model.loss(ids, ids)


n = sum(p.size for p in model.parameters())
ratio = seconds(lambda: model.loss(ids, ids).backward()) / seconds(forward_only)
print(f"a transformer of {n:,} weights: the loss and every gradient cost {ratio:.1f} forward passes,", end=" ")
print(f"nudging each weight {n + 1:,}")
assert ratio < n / 1000

# %% [markdown]
# Counting multiplications says 3: a matrix product forward becomes two products backward, one for the input and one for
# the weight. The rest is what a small model spends outside its products.
#
# ## 3 · The library's book of derivatives
#
# `minipeft/autograd/ops.py` holds every operation in the form we just used: *value, then one pullback per input*. Here
# is softmax, the library's own source:

# %%
print(inspect.getsource(F.softmax))

# %% [markdown]
# Derive it. With $y_i = e^{x_i} / \sum_k e^{x_k}$, differentiate the logarithm $\log y_i = x_i - \log \sum_k e^{x_k}$:
#
# $$\frac{\partial y_i}{\partial x_j} = y_i(\delta_{ij} - y_j), \qquad
#   \bar x_j = \sum_i g_i\, y_i(\delta_{ij} - y_j) = y_j \big(g_j - \textstyle\sum_i g_i y_i\big).$$
#
# A softmax cannot be moved by raising all $x$ together, and the formula knows: if all $g_i$ are equal, $\bar x = 0$.
# Remember this; it will fool a careless test in section 6.

# %%
z, g = rng.standard_normal(6), rng.standard_normal(6)
y, pullback = F.softmax.definition(z)  # the plain function under `@op`; `axis` has no derivative
jacobian = np.diag(y) - np.outer(y, y)
print("softmax:    pullback against the whole Jacobian:", np.abs(jacobian.T @ g - pullback(g)).max())
print("            pullback of a constant g:           ", np.abs(pullback(np.ones(6))).max())
assert np.allclose(jacobian.T @ g, pullback(g), atol=1e-15)
assert np.allclose(pullback(np.ones(6)), 0, atol=1e-15)

# %% [markdown]
# Layer norm, $y = \hat x \cdot w + b$ with $\hat x = (x - \mu)/\sigma$ over a row of $d$ numbers and
# $\sigma = \sqrt{\mathrm{var}(x) + \epsilon}$. Write $h = g \cdot w$ for what arrives at $\hat x$. A change of $x_j$
# moves $\hat x$ in three ways: directly, through $\mu$ (every element shifts by $1/d$), and through $\sigma$
# (since $\partial \sigma / \partial x_j = \hat x_j / d$). Collecting,
#
# $$\bar x = \frac{1}{\sigma}\Big(h - \mathrm{mean}(h) - \hat x \,\mathrm{mean}(h\,\hat x)\Big).$$
#
# The two subtracted terms take out of $h$ what a normalization ignores: a shift, and a scaling.

# %%
def layer_norm_pullback(x, weight, g, eps=1e-5):
    sigma = np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    normed = (x - x.mean(axis=-1, keepdims=True)) / sigma
    h = g * weight
    return (h - h.mean(axis=-1, keepdims=True) - normed * (h * normed).mean(axis=-1, keepdims=True)) / sigma


x, g = rng.standard_normal((4, 16)), rng.standard_normal((4, 16))
weight, bias = rng.standard_normal(16), rng.standard_normal(16)
_, dx, dweight, dbias = F.layer_norm.definition(x, weight, bias)
print("layer norm: our pullback against the library's: ", np.abs(layer_norm_pullback(x, weight, g) - dx(g)).max())
assert np.allclose(layer_norm_pullback(x, weight, g), dx(g), atol=1e-14)

# %% [markdown]
# ## 4 · What a frozen weight does not cost
#
# A pullback is a function that remembers arrays. For `y = x @ w.T` the pullback towards $x$ needs $w$, the pullback
# towards $w$ needs $x$. So *training a weight is what keeps its input alive* until the backward pass; if the weight is
# frozen, the engine drops that pullback the moment the product is computed, and the input with it.
#
# This one line of bookkeeping is where parameter-efficient fine-tuning gets its memory from. Measure it: a stack of
# linear layers, the bytes that the graph still holds when the forward pass is over (Python's `tracemalloc`, which
# NumPy reports to), and beside it what the argument above predicts.

# %%
LAYERS, ROWS, WIDTH = 8, 256, 512


def held_bytes(trainable_weights, trainable_input=True, activation=False):
    """Bytes alive after the forward pass beyond inputs, weights and the result; and after the backward pass."""
    source = np.random.default_rng(0)
    weights = [
        mp.Tensor(source.standard_normal((WIDTH, WIDTH), np.float32) / 23, requires_grad=trainable_weights)
        for _ in range(LAYERS)
    ]
    x = mp.Tensor(source.standard_normal((ROWS, WIDTH), np.float32), requires_grad=trainable_input)
    gc.collect()
    tracemalloc.start()
    y = x
    for w in weights:
        y = F.linear(y, w)
        if activation:
            y = F.gelu(y)
    held = tracemalloc.get_traced_memory()[0] - y.data.nbytes
    if y.requires_grad:
        y.backward(np.ones_like(y.data))
    for tensor in (x, *weights):
        tensor.grad = None
    freed = tracemalloc.get_traced_memory()[0] - y.data.nbytes
    tracemalloc.stop()
    return held, freed


gc.disable()  # nothing here waits for the garbage collector: the graph has no cycles
held_bytes(True, activation=True)  # the first call also starts threads
row = ROWS * WIDTH * 4  # one activation, float32
cases = [
    ("weights trained", held_bytes(True), (LAYERS - 1) * row, "the input of each layer but the first"),
    ("weights frozen, something below trained", held_bytes(False), 0, "nothing"),
    ("the same with a GELU after each", held_bytes(False, activation=True), LAYERS * row, "GELU's inputs"),
    ("nothing trained", held_bytes(False, False, True), 0, "nothing: no graph at all"),
]
gc.enable()
print(f"\n{LAYERS} layers {WIDTH} -> {WIDTH}, {ROWS} rows        held [MiB]  predicted")
for name, (held, freed), predicted, what in cases:
    print(f"  {name:42s} {held / 2**20:6.2f}  {predicted / 2**20:6.2f}   {what}")
    assert abs(held - predicted) < 0.02 * LAYERS * row, name
    assert freed < 0.05 * row, f"{name}: {freed} bytes survive"  # 10 KB are Python's, of the threads that computed

# %% [markdown]
# The third line is worth a second look: freezing makes *linear* layers free, but the pullback of a nonlinearity needs
# its own input whether or not anything around it is trained. What a fine-tuning method saves is a sum of such terms,
# and the lessons on memory count them one by one.
#
# After the backward pass nothing is left, with the garbage collector switched off: nodes never point back at the
# tensors they made, so plain reference counting frees the graph.
#
# ## 5 · Is a derivative right? Ask along a random direction, with a random cotangent
#
# The definition of the derivative is a test: $f(x + hv) - f(x - hv) \approx 2h\, Jv$. Comparing all of $J$ would take
# one evaluation per input. Instead choose a random direction $v$ *and* a random cotangent $g$ and compare two numbers:
#
# $$\Big\langle g,\ \frac{f(x + hv) - f(x - hv)}{2h} \Big\rangle \approx \langle g, Jv \rangle
#   = \langle J^\top g, v \rangle = \langle \mathrm{pullback}(g), v \rangle .$$
#
# If any element of the pullback is wrong, the two sides differ for almost every $v$ and $g$.
#
# How small should $h$ be? The difference quotient is wrong by the next Taylor term, which shrinks like $h^2$, and by
# rounding, which grows like $\epsilon / h$. Their sum is a V in a log-log plot, lowest near $h = \epsilon^{1/3}$, where
# the error is about $\epsilon^{2/3}$ ($\epsilon$ is the spacing of floating-point numbers at 1).

# %%
def f(x):
    """Something curved: layer norm, then softmax."""
    return F.softmax(F.layer_norm(x, mp.Tensor(weight.astype(x.dtype)), mp.Tensor(bias.astype(x.dtype))))


def difference_error(dtype, h, trial):
    """Relative error of the central difference <g, (f(x+hv) - f(x-hv)) / 2h>, against <pullback(g), v> in float64."""
    source = np.random.default_rng([7, trial])
    x, v, g = (source.standard_normal((4, 16)).astype(np.float32).astype(np.float64) for _ in range(3))
    v /= np.linalg.norm(v)
    leaf = mp.Tensor(x, requires_grad=True)
    f(leaf).backward(g)
    exact = (leaf.grad * v).sum()
    ahead, behind = ((x + s * h * v).astype(dtype) for s in (1, -1))
    with mp.no_grad():
        change = f(mp.Tensor(ahead)).data.astype(np.float64) - f(mp.Tensor(behind)).data
    return abs((g * change).sum() / (2 * h) - exact) / abs(exact)


TRIALS = 9 if REDUCED else 101
steps = 10.0 ** np.arange(-11, 0.26, 0.25)
curves = {
    dtype: np.array([np.median([difference_error(dtype, h, i) for i in range(TRIALS)]) for h in steps])
    for dtype in (np.float32, np.float64)
}
print("\ndtype      best h   eps^(1/3)   error there   eps^(2/3)   slope left   slope right")
for dtype, curve in curves.items():
    eps = np.finfo(dtype).eps
    best = steps[curve.argmin()]
    left = (steps > best / 1000) & (steps < best / 5)
    right = (steps > best * 5) & (steps < 0.2)
    slopes = [np.polyfit(np.log(steps[s]), np.log(curve[s]), 1)[0] for s in (left, right)]
    print(
        f"{dtype.__name__:8s}  {best:8.1e}    {eps ** (1 / 3):.1e}      {curve.min():.1e}     {eps ** (2 / 3):.1e}"
        f"       {slopes[0]:5.2f}         {slopes[1]:5.2f}"
    )
    assert 0.05 < best / eps ** (1 / 3) < 20
    assert curve.min() < 10 * eps ** (2 / 3)
    assert abs(slopes[0] + 1) < (0.35 if REDUCED else 0.15), "rounding error grows like 1/h"
    assert abs(slopes[1] - 2) < (0.35 if REDUCED else 0.15), "the Taylor remainder shrinks like h^2"

# %% [markdown]
# Hence the rules of `mp.gradcheck`: float64 always, a random direction and a random cotangent, and central differences
# (two of them, at $h$ and $2h$, combined so that the $h^2$ term cancels: Richardson's trick buys two more digits). In
# float32 even a perfect derivative agrees to only four or five digits, which is where a wrong one can hide.

# %%
print()
for fn, inputs in ((f, [rng.standard_normal((4, 16))]), (F.layer_norm, [x, weight, bias])):
    agreement = mp.gradcheck(fn, *inputs)  # raises GradcheckError if not
    print(f"mp.gradcheck of {fn.__name__}: {agreement.comparisons} comparisons, worst off by {agreement.deviation:.0e}")
    assert agreement.deviation < 1e-8

# %% [markdown]
# ## The picture
#
# Left: our regression as the library recorded it, drawn from the engine's own nodes. Values flow down; in the backward
# pass the sensitivities $g$ flow up the same lines, each of the shape of what it belongs to. `mul` reports twice to
# `sub`, because the error is used twice. The data `x` and `t` need no gradient, so no line leads to them.
# Right: the V of section 5.

# %%
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=[1, 1.5], layout="constrained")

rows = [("w", "leaf, requires_grad", w.shape)]
made = {"matmul": "x @ w", "tanh": "tanh(·)", "sub": "e = · - t", "mul": "e * e", "sum": "L = Σ"}
shapes = {"matmul": (8, 3), "tanh": (8, 3), "sub": (8, 3), "mul": (8, 3), "sum": ()}
rows += [(name, made[name], shapes[name]) for _, name, _ in reversed(walk)]
for i, (name, meaning, shape) in enumerate(rows):
    top = -1.25 * i
    left.text(
        0, top, f"{name}:  {meaning}" if i else "w", ha="center", va="center", fontsize=11,
        bbox={"boxstyle": "round,pad=0.45", "fc": "white" if i else "#CDE7F5", "ec": GREY},
    )  # fmt: skip
    left.text(1.15, top, f"{shape}" if shape else "scalar", va="center", fontsize=9, color=GREY)
    if i + 1 < len(rows):
        uses = len(walk[len(walk) - 1 - i][2])  # how many of the next op's inputs are this one
        for k in range(uses):
            shift = 0.16 * (2 * k - uses + 1)
            left.annotate(
                "", (-0.25 + shift, top - 0.92), (-0.25 + shift, top - 0.33),
                arrowprops={"arrowstyle": "->", "color": GREY, "lw": 1.4},
            )  # fmt: skip
            left.annotate(
                "", (0.45 + shift, top - 0.33), (0.45 + shift, top - 0.92),
                arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 1.8},
            )  # fmt: skip
left.text(-0.62, -0.62, "value", ha="right", va="center", color=GREY, fontsize=10)
left.text(0.72, -0.62, "g, the gradient", ha="left", va="center", color=ORANGE, fontsize=10)
left.set(xlim=(-1.6, 2.1), ylim=(-1.25 * (len(rows) - 1) - 0.5, 0.5), title="The graph of L = Σ (tanh(x w) - t)²")
left.axis("off")

for dtype, color, marker in ((np.float32, ORANGE, "o"), (np.float64, BLUE, "s")):
    right.loglog(steps, curves[dtype], marker, color=color, ms=4.5)
    best = curves[dtype].argmin()
    rounding = curves[dtype][best] * steps[best] / steps
    right.loglog(steps[: best + 4], np.where(rounding < 3, rounding, np.nan)[: best + 4], "--", color=color, lw=1)
anchor = np.argmin(np.abs(steps - 0.03))
taylor = curves[np.float64][anchor] * (steps / steps[anchor]) ** 2
right.loglog(steps, np.where(taylor > 1e-12, taylor, np.nan), "-", color="black", lw=1)
right.text(2e-4, 2e-2, "float32: rounding,\nslope -1", color=ORANGE, fontsize=10)
right.text(3e-9, 2e-6, "float64: rounding,\nslope -1", color=BLUE, fontsize=10)
right.text(2e-3, 3e-10, "Taylor remainder,\nslope +2", fontsize=10)
right.text(1e-11, 3, "x + hv rounds to x: the difference is 0, the error 100%", color=ORANGE, fontsize=9)
right.set(
    xlabel="step h", ylabel="relative error of the difference quotient", ylim=(1e-12, 30),
    title="A finite difference has a best step, and float64 a far better one",
)  # fmt: skip
right.grid(alpha=0.25)
fig.savefig(OUT / "01_autograd.png", dpi=130)
print("picture:", OUT / "01_autograd.png")

# %% [markdown]
# ## 6 · Break it: wrong pullbacks, and a check that does not notice
#
# Three mistakes that people really make, each written as an operation of the library:
#
# 1. a softmax whose backward pass returns zeros (say, a buffer that was never filled);
# 2. a softmax that takes only the diagonal of its Jacobian, $\bar x = g\, y (1 - y)$, as if it were a sigmoid;
# 3. a layer norm that forgets that $\mu$ and $\sigma$ depend on $x$.
#
# Two checks judge them. The careless one takes the gradient of `f(x).sum()`: a cotangent of ones. The careful one
# draws the cotangent at random.

# %%
@op
def softmax_of_zeros(x):
    return F.softmax.definition(x)[0], lambda g: np.zeros_like(g)


@op
def softmax_like_a_sigmoid(x):
    y = F.softmax.definition(x)[0]
    return y, lambda g: g * y * (1 - y)


@op
def layer_norm_with_constant_statistics(x):
    y, *_ = F.layer_norm.definition(x, weight, bias)
    return y, lambda g: g * weight / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)


def passes(fn, cotangent, h=1e-5):
    """Does the pullback of `fn` agree with a central difference along a random direction, for this cotangent?"""
    source = np.random.default_rng(3)
    x, v = source.standard_normal((2, 4, 16))
    leaf = mp.Tensor(x, requires_grad=True)
    y = fn(leaf)
    g = np.ones(y.shape) if cotangent == "ones" else source.standard_normal(y.shape)
    y.backward(g)
    with mp.no_grad():
        change = (fn(mp.Tensor(x + h * v)).data - fn(mp.Tensor(x - h * v)).data) / (2 * h)
    return bool(np.isclose((g * change).sum(), (leaf.grad * v).sum(), rtol=1e-6, atol=1e-8))


verdicts = {}
print("\n                                       cotangent of ones   random cotangent   mp.gradcheck")
for fn in (F.softmax, softmax_of_zeros, softmax_like_a_sigmoid, layer_norm_with_constant_statistics):
    try:
        mp.gradcheck(fn, rng.standard_normal((4, 16)))
        judged = True
    except mp.GradcheckError as complaint:
        judged, last_complaint = False, complaint
    verdicts[fn.__name__] = passes(fn, "ones"), passes(fn, "random"), judged
    words = ["right" if ok else "WRONG" for ok in verdicts[fn.__name__]]
    print(f"  {fn.__name__:38s} {words[0]:18s}  {words[1]:17s}  {words[2]}")
print("what mp.gradcheck says of the last one:", last_complaint)
assert verdicts["softmax"] == (True, True, True)
assert verdicts["softmax_of_zeros"] == (True, False, False), "a cotangent of ones is blind to a softmax of zeros"
assert verdicts["softmax_like_a_sigmoid"][1:] == (False, False)
assert verdicts["layer_norm_with_constant_statistics"][1:] == (False, False)

# %% [markdown]
# The careless check passes a backward pass that returns *nothing*: the outputs of a softmax always sum to one, so the
# derivative of their sum is zero, and zeros are exactly right. The test asked a question whose answer was no. Real
# libraries have shipped such tests.
#
# Now break it yourself: put a sign error, a missing factor or a swapped argument into one of the pullbacks of section 2
# and see what the difference to the library says.

# %% [markdown]
# ## Quiz
#
# **1.** Why does the engine add up the gradients that reach a value, and not take the last one?
#
# <details><summary>Answer</summary>
#
# The chain rule's sum over $j$ runs over all uses of the value. In the regression of section 2 the error is used twice
# by `mul`, so two sensitivities reach it, and its gradient is their sum.
#
# </details>
#
# **2.** A model of a million weights. How many forward passes does nudging the weights one by one take, and how many
# does the walk back cost?
#
# <details><summary>Answer</summary>
#
# One for each weight, and one more, against a small multiple of one: of multiplications alone it is three, as a matrix
# product forward becomes two backward.
#
# </details>
#
# **3.** A stack of linear layers is frozen, and something below it is trained. What does the graph hold after the
# forward pass, and what changes with a GELU after each layer?
#
# <details><summary>Answer</summary>
#
# Nothing: the pullback towards $x$ needs $w$, which is there anyway, and the one towards $w$, which needs $x$, has been
# dropped. With a GELU after each layer the inputs of the GELUs are held, since the pullback of a nonlinearity needs its
# input whether or not anything around it is trained.
#
# </details>
#
# **4.** In float64 a smaller $h$ than about $10^{-5}$ makes the central difference worse. Why?
#
# <details><summary>Answer</summary>
#
# The Taylor term shrinks like $h^2$, but rounding grows like $\epsilon / h$. They balance near $h = \epsilon^{1/3}$,
# which is $6 \cdot 10^{-6}$ in float64.
#
# </details>
#
# **5.** Why does a check with a cotangent of ones pass a softmax whose backward pass returns zeros?
#
# <details><summary>Answer</summary>
#
# It asks for the derivative of the sum of the outputs. That sum is always one, so its derivative is zero, and zeros are
# right. A random cotangent asks about each output.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("01.3", value)`, or at the terminal with
# `minipeft exercise 01.3 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 01.1 FILE.py`.
#
# **01.1 A gate.** Write `swish(x)`, $y = x\,\sigma(x)$, on plain arrays in the library's form: it returns the value and
# one pullback. (Make it an `@op` and let `mp.gradcheck` judge it, too; the checker takes either.) Which arrays does
# your pullback remember, and could it remember fewer?
#
# **01.2 A running sum.** What is the pullback of `np.cumsum`? Derive it from $\bar x_i = \sum_{j \ge i} g_j$ and write
# `cumsum_pullback(g)` for a vector, without a loop.
#
# **01.3 Time for memory.** `F.checkpoint(fn, x, parameters=...)` keeps only `x` and computes `fn` again in the backward
# pass. Wrap each layer-and-GELU of section 4 in it, with trained weights. How many MiB are held after the forward pass,
# counted as there? Predict, then measure.
#
# **01.4 One side.** A one-sided difference, $(f(x + hv) - f(x)) / h$, is wrong by a Taylor term that shrinks like $h$,
# and by rounding as before. Its best step is near $\epsilon^p$: what is $p$?
#
# <details><summary>Solution of 01.1</summary>
#
# With $s = \sigma(x)$ the derivative is $s + x s (1 - s)$. It remembers one array, the derivative itself.
#
# ```python
# def swish(x):
#     s = 1 / (1 + np.exp(-x))
#     slope = s + x * s * (1 - s)
#     return x * s, lambda g: g * slope
#
# check("01.1", swish)
# ```
#
# </details>
#
# <details><summary>Solution of 01.2</summary>
#
# A running sum from the other end.
#
# ```python
# check("01.2", lambda g: np.cumsum(g[::-1])[::-1])
# ```
#
# </details>
#
# <details><summary>Solution of 01.3</summary>
#
# The inputs of seven layers; that of the first is there anyway. Without checkpointing the eight inputs of the GELUs
# come on top: 7.5 MiB. It costs one more forward pass.
#
# ```python
# check("01.3", 7 * 256 * 512 * 4 / 2**20)
# ```
#
# </details>
#
# <details><summary>Solution of 01.4</summary>
#
# $h + \epsilon / h$ is least where its two terms are equal.
#
# ```python
# check("01.4", 0.5)
# ```
#
# </details>
