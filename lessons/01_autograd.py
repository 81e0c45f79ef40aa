# %% [markdown]
# # Lesson 1 · Autograd: how a number tells a million weights which way to move
#
# Training a language model means: compute one number, the loss $L$, and then ask of *every* weight how $L$ would change
# if that weight changed a little. This lesson derives the algorithm that answers for all weights at once, builds it in
# 22 lines, reads two of the library's derivatives, measures what a frozen weight saves, and tells a right derivative
# from a wrong one.
#
# You need Lesson 0 (loss, gradient, weight, softmax) and, from school, the derivative and the chain rule. Reading takes
# about 24 minutes (200 words or 25 lines of code a minute, up to the quiz). Run it with `python lessons/01_autograd.py`
# (under a minute), or open it as a notebook. Where a line begins with **Predict**, stop and write down your answer; the
# next cell computes it.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer trials; `MINIPEFT_LESSONS_OUT` is where the picture goes (`lessons/out`).

# %%
import gc
import inspect
import os
import sys
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
if REDUCED:
    print("REDUCED SETTING: 9 trials for 101 in section 5, so its curves are rough. All else is as in the full lesson.\n")

# %% [markdown]
# ## 1 · One chain rule, and the pullback
#
# ### Six numbers
#
# The product of a weight $w$ and an input $x$ should equal a target $t$. The error is $e$, the loss its square. Each
# result is made from numbers before it, so the computation is a **graph**: numbers are its nodes, and a line leads from
# each number to what is made from it. Here it is with values:

# %%
x, w, t = 2.0, 3.0, 4.0
diagrams.scalar_graph(x, w, t, backward=False).savefig(OUT / "01_autograd_values.png")

# %% [markdown]
# $$p = w x, \qquad e = p - t, \qquad L = e \cdot e .$$
#
# How fast does $L$ change with each? Begin at the end, where the answer is known, $\partial L / \partial L = 1$, and go
# back one step at a time. The chain rule says: take the gradient of the result, times the derivative of this one step.
# A number that is used twice gets a gradient from each use; the two **add**.
#
# **Predict:** with $x = 2$, $w = 3$, $t = 4$ the loss is 4. By how much does it change if $w$ rises by 0.001?

# %%
p = w * x
e = p - t
L = e * e  # down: 6, 2, 4
de = e + e  # up: from L = e * e, once for each e
dp, dt = de, -de  # from e = p - t
dw, dx = dp * x, dp * w  # from p = w * x
raised = ((w + 0.001) * x - t) ** 2
print(f"dL/dw = {dw:g}, times 0.001 is {0.001 * dw:.6f}; the loss really changes by {raised - L:.6f}")
assert (dw, dx, dt) == (8, 12, -4) and abs((raised - L) - 0.001 * dw) < 1e-5

# %% [markdown]
# By about $8 \cdot 0.001$. In the figure each value is computed on the way down and, in orange, its gradient on the way
# up.

# %%
diagrams.scalar_graph(x, w, t).savefig(OUT / "01_autograd_graph.png")

# %% [markdown]
# ### A product of matrices, by index
#
# A model's steps take arrays. Most of its arithmetic (Lesson 12, section 7) is $C = AB$, that is
#
# $$C_{ij} = \sum_k A_{ik} B_{kj} .$$
#
# Suppose the way back has reached $C$: for each of its elements we know $g_{ij} = \partial L / \partial C_{ij}$. Which
# elements of $C$ use $A_{ik}$? All of row $i$, and $C_{ij}$ changes $B_{kj}$ times as fast as $A_{ik}$. The gradients
# from all uses add. In the same way, all of column $j$ uses $B_{kj}$:
#
# $$\frac{\partial L}{\partial A_{ik}} = \sum_j g_{ij} B_{kj}, \qquad
#   \frac{\partial L}{\partial B_{kj}} = \sum_i A_{ik}\, g_{ij} .$$
#
# **Predict:** in the numbers below, what is $\partial L / \partial A_{01}$? (Two products and a sum.)

# %%
A, B = np.array([[1.0, 2], [3, 4]]), np.array([[5.0, 6], [7, 8]])
g = np.array([[1.0, 10], [100, 1000]])  # what has arrived at C: here L = 1 C_00 + 10 C_01 + 100 C_10 + 1000 C_11
dA, dB = np.zeros((2, 2)), np.zeros((2, 2))
for i in range(2):
    for j in range(2):
        for k in range(2):  # C_ij uses A_ik and B_kj once
            dA[i, k] += g[i, j] * B[k, j]
            dB[k, j] += A[i, k] * g[i, j]
nudged = A.copy()
nudged[0, 1] += 1  # L is linear in A: a whole 1 will do
print(f"dL/dA_01 = {g[0, 0]:g} x {B[1, 0]:g} + {g[0, 1]:g} x {B[1, 1]:g} = {dA[0, 1]:g};", end=" ")
print(f"by nudging A_01: {(g * (nudged @ B - A @ B)).sum():g}")
print("all of dL/dA:", dA.tolist(), "  all of dL/dB:", dB.tolist())
assert dA[0, 1] == 87 == (g * (nudged @ B - A @ B)).sum()
assert np.array_equal(dA, g @ B.T) and np.array_equal(dB, A.T @ g), "the same, in matrices"

# %% [markdown]
# ### The same in matrices, and for any step
#
# $\partial L / \partial A_{01}$ is 87: two elements of $C$ use $A_{01}$. A product sums over the last index of its
# first factor and the first of its second. In the first sum $j$ is the last index of both factors, so $B$ is transposed
# (its rows become columns); in the second sum $i$ is the first index of both, so $A$ is transposed:
#
# $$\frac{\partial L}{\partial A} = g B^\top, \qquad \frac{\partial L}{\partial B} = A^\top g .$$
#
# You need not remember this: a gradient has the shape of what it belongs to, and where the sizes differ only one
# product has that shape.
#
# Now any step $y = f(x)$. We write $\bar x$ for $\partial L / \partial x$, and $g$ for $\partial L / \partial y$. The
# derivatives of all $y_j$ by all $x_i$ are a table, the **Jacobian** $J_{ji} = \partial y_j / \partial x_i$: a row for
# each output, a column for each input. Forward it takes a small change of $x$ to that of $y$, $dy = J\,dx$. Backward
# the sum runs over the outputs, $J$'s first index, so $J$ is transposed:
#
# $$\bar x_i = \sum_j \frac{\partial y_j}{\partial x_i} \, g_j \qquad\text{that is}\qquad \bar x = J^\top g .$$
#
# The function $g \mapsto J^\top g$ is the **pullback** of $f$ at $x$: it pulls a gradient back through one step. $J$
# itself need not be built. If every step knows its pullbacks, one for each input, the gradient of the whole is a walk
# from $L$ back to the weights. This is *reverse mode* (Linnainmaa 1970; Baydin et al. 2018, arXiv:1502.05767, is a
# survey). *Forward mode* instead passes a change on, $J\,dx$, beside the values, and keeps nothing. But it needs a pass
# for each input, and reverse mode one for each output. Training has a million weights and one loss, so it goes
# backward, and pays in memory: each step must keep what its pullback needs until the walk comes back (section 4).
#
# ## 2 · An engine in 22 lines

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
# An operation is a function on plain arrays that returns its value and one pullback per input. Five are enough for a
# small regression, $L = \sum (\tanh(x w) - t)^2$, in which the error $e = \tanh(xw) - t$ is used twice. The library's
# `mp.Tensor` does the same under PyTorch's names: `requires_grad=True` asks for a gradient; `backward()` walks, and
# adds to each weight's `.grad`. So a training loop empties `.grad` after each step (`zero_grad`).

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
(error * error).sum().backward()
print("\nlargest difference between our 22 lines and minipeft:", np.abs(by_hand.grad - library.grad).max())
assert np.allclose(by_hand.grad, library.grad, rtol=1e-12, atol=1e-12)

# %% [markdown]
# The library's engine (`minipeft/autograd/tensor.py`) is this one, with what practice demands. It sorts the graph
# without recursion, so that a deep graph does not exceed Python's limit. It drops pullbacks that nobody needs (section
# 4). It frees each step as soon as its pullbacks have run, and so refuses to walk the same graph again (PyTorch keeps
# the graph with `retain_graph=True`). And it refuses a graph if an optimizer has since changed a weight that a pullback
# remembers, because the pullback would multiply by the new value.
#
# Sometimes a number should count as a constant, though it was computed from weights. `x.detach()` is the same array
# without the graph, so the walk stops there: $x \cdot \mathrm{detach}(x)$ has the value $x^2$ and the gradient $x$,
# half of the true one. Inside `mp.no_grad()` nothing at all is recorded.
#
# A copy is a use. Where NumPy broadcast an input, such as a bias that is added to every row, the input's gradient is
# the sum over the copies. A row of a table that was picked twice, as in Lesson 0, gets the sum of both gradients.
# (`d[ids] += g` would keep one of them; `np.add.at` adds both.)

# %%
start = deep = mp.Tensor(1.0, requires_grad=True)
for _ in range(3 * sys.getrecursionlimit()):
    deep = deep * 1.0
deep.backward()
assert start.grad == 1.0, "three times as deep as Python lets a function call itself"
held = mp.nn.Parameter(np.array(3.0))
(held * held.detach()).backward()
assert held.grad == 3.0
(held * held.detach()).backward()
assert held.grad == 6.0, "it adds"
with mp.no_grad():
    assert not (held * held).requires_grad
stale = held * held
mp.optim.SGD([held], lr=0.1).step()
for graph in (deep, stale):  # walked once; of a weight that has changed
    try:
        graph.backward()
        raise AssertionError("it refuses")
    except mp.AutogradError:
        pass
every_row = mp.Tensor(np.zeros(3), requires_grad=True)
(np.ones((5, 3)) + every_row).sum().backward()
assert every_row.grad.tolist() == [5, 5, 5], "five copies, five uses"

d, lost = np.zeros((2, 3))  # the gradient of three rows, of which row 1 was picked twice
np.add.at(d, [1, 1], 1.0)
lost[[1, 1]] += 1.0
assert d[1] == 2 and lost[1] == 1

# %% [markdown]
# What does the gradient cost? The simplest way to it is to **nudge**: change one weight a little, compute $L$ again.
#
# **Predict:** a model has 25 layers $y = \tanh(x w)$, of 40 x 40 weights each. How many forward passes does nudging
# take for all weights? And how many multiplications do the walk back's matrix products take, for each one of a
# forward pass?

# %%
multiplications = 0


def product(a, b):
    """a @ b, and the count goes up: a row of a times a column of b, for each pair."""
    global multiplications
    multiplications += a.shape[0] * a.shape[1] * b.shape[1]
    return a @ b


counted = primitive(lambda x, w: (product(x, w), lambda g: product(g, w.T), lambda g: product(x.T, g)))
layers = [Var(rng.standard_normal((40, 40)) / 6) for _ in range(25)]
y = Var(rng.standard_normal((10, 40)))
for layer in layers:
    y = tanh(counted(y, layer))
forward = multiplications
backward(total(y))
n = sum(layer.value.size for layer in layers)
print(f"\n{n:,} weights: nudging takes {n + 1:,} forward passes;", end=" ")
print(f"the walk back multiplies {(multiplications - forward) / forward:g} times as often as one")
assert n == 40_000 and multiplications == 3 * forward

# %% [markdown]
# Nudging takes a pass for each of the 40,000 weights, and one more. The walk back multiplies twice as often as one
# pass: a product forward becomes two backward, one for the input and one for the weight. So the loss and all gradients,
# that of the first layer's input included, cost three forward passes in products, however many weights there are. Steps
# such as tanh add a few operations for each number, each way.
#
# ## 3 · The library's book of derivatives
#
# `minipeft/autograd/ops.py` holds the operations in the form we just used: *value, then one pullback per input*. `@op`
# makes of each a function of Tensors, as `primitive` did; `.definition` is the plain function. Here is softmax (`xp` is
# NumPy, or CuPy where the arrays are on a GPU):

# %%
print(inspect.getsource(F.softmax))

# %% [markdown]
# Derive it. With $y_i = e^{x_i} / \sum_k e^{x_k}$, differentiate the logarithm $\ln y_i = x_i - \ln \sum_k e^{x_k}$
# ($\delta_{ij}$ is 1 for $i = j$, else 0):
#
# $$\frac{\partial y_i}{\partial x_j} = y_i(\delta_{ij} - y_j), \qquad
#   \bar x_j = \sum_i g_i\, y_i(\delta_{ij} - y_j) = y_j \big(g_j - \textstyle\sum_i g_i y_i\big).$$
#
# **Predict:** what does this pullback return if all $g_i$ are equal?

# %%
z, g = rng.standard_normal(6), rng.standard_normal(6)
y, pullback = F.softmax.definition(z)  # `axis` has no derivative
jacobian = np.diag(y) - np.outer(y, y)
print("softmax:    pullback against the whole Jacobian:", np.abs(jacobian.T @ g - pullback(g)).max())
print("            pullback of a constant g:           ", np.abs(pullback(np.ones(6))).max())
assert np.allclose(jacobian.T @ g, pullback(g), atol=1e-15) and np.allclose(pullback(np.ones(6)), 0, atol=1e-15)
onehot = np.eye(6)[2]
assert np.allclose(pullback(-onehot / y), y - onehot, atol=1e-15), "cross-entropy of target 2"
far = mp.Tensor(np.array([[0, -200]], np.float32), requires_grad=True)
F.cross_entropy(far, np.array([1])).backward()
assert F.softmax(far).data[0, 1] == 0 and far.grad.tolist() == [[1, -1]], "y_t is 0, the gradient is right"
y_far, pullback_far = F.softmax.definition(far.data[0])
with np.errstate(divide="ignore", invalid="ignore"):  # which would warn
    assert np.isnan(pullback_far(-np.eye(2)[1] / y_far)).all(), "and in two steps it is no number"
assert np.allclose(F.softmax.definition(z + 5)[0], y, atol=1e-15) and np.allclose(jacobian @ np.ones(6), 0, atol=1e-15)

# %% [markdown]
# Zero (up to rounding). Equal $g_i$ ask for the derivative of a multiple of $\sum_i y_i$, and that sum is always 1:
# $J^\top \mathbf 1 = 0$, with $\mathbf 1$ a vector of ones. This will fool a careless test in section 6. (That raising
# all $x$ together moves no $y$, as in Lesson 0, is $J \mathbf 1 = 0$.)
#
# Lesson 0's loss is $-\ln y_t$ of the target $t$. Its gradient $g$ by $y$ is $-1 / y_t$ at $t$ and 0 elsewhere, and the
# pullback makes of it $y_j - \delta_{jt}$: the probabilities, less 1 at the target. `F.cross_entropy` is one operation
# that returns this difference at once, because $y_t$ can round to zero. Then the two steps divide by zero, and infinity
# times zero is no number.
#
# *Layer norm* shifts and scales each row $x$ of $d$ numbers to mean 0 and variance 1, and then multiplies by trained
# weights $w$ and adds trained biases $b$ (Ba et al. 2016, arXiv:1607.06450): $y = \hat x \cdot w + b$ with $\mu$ the
# mean of $x$, $\hat x = (x - \mu)/\sigma$ and $\sigma = \sqrt{\mathrm{var}(x) + \epsilon}$, where a small $\epsilon$
# keeps $\sigma$ from zero. A change of $x_j$ moves $\hat x_i$ in three ways: directly if $i = j$, through $\mu$, which
# moves $1/d$ times as fast as $x_j$, and through $\sigma$. (The move of $\mu$ leaves $\sigma$ as it is, since all
# $x_i-\mu$ add up to 0. So $\sigma^2$ moves $2(x_j-\mu)/d$ times as fast as $x_j$. Its root $\sigma$ moves
# $1/(2\sigma)$ times as fast as $\sigma^2$, so $\hat x_j/d$ times as fast as $x_j$; and $\hat x_i$ moves
# $-\hat{x}_i/\sigma$ times as fast as $\sigma$.) With $u = g \cdot w$ for what arrives at $\hat x$,
#
# $$\frac{\partial \hat x_i}{\partial x_j} = \frac{1}{\sigma}\Big(\delta_{ij} - \frac1d - \hat x_i\, \frac{\hat x_j}{d}\Big),
#   \qquad \bar x_j = \sum_i u_i \frac{\partial \hat x_i}{\partial x_j}, \qquad\text{that is}$$
#
# $$\bar x = \frac{1}{\sigma}\Big(u - \mathrm{mean}(u) - \hat x \,\mathrm{mean}(u\,\hat x)\Big).$$
#
# The two subtracted terms take out of $u$ what a normalization ignores: a shift, and (but for $\epsilon$) a scaling.

# %%
def layer_norm_pullback(x, weight, g, eps=1e-5):
    sigma = np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    normed = (x - x.mean(axis=-1, keepdims=True)) / sigma
    u = g * weight
    return (u - u.mean(axis=-1, keepdims=True) - normed * (u * normed).mean(axis=-1, keepdims=True)) / sigma


x, g = rng.standard_normal((4, 16)), rng.standard_normal((4, 16))
weight, bias = rng.standard_normal(16), rng.standard_normal(16)
_, dx, dweight, dbias = F.layer_norm.definition(x, weight, bias)
print("layer norm: our pullback against the library's: ", np.abs(layer_norm_pullback(x, weight, g) - dx(g)).max())
assert np.allclose(layer_norm_pullback(x, weight, g), dx(g), atol=1e-14)

# %% [markdown]
# ## 4 · What a frozen weight does not cost
#
# A weight that is not trained is called **frozen**; most methods of this course freeze nearly all. What does that save?
# A pullback is a function that remembers arrays. For `y = x @ w.T` the pullback towards $x$ needs $w$, the pullback
# towards $w$ needs $x$. So *training a weight is what keeps its input alive* until the backward pass; if the weight is
# frozen, the engine drops that pullback the moment the product is computed, and with it the input, unless another
# pullback needs it.
#
# Measure it: a stack of linear layers, and the bytes that the graph still holds when the forward pass is over (Python's
# `tracemalloc`, which NumPy reports to). "Something below trained" means that the gradient must walk through all
# layers, to the stack's input. *GELU* (Hendrycks & Gimpel 2016, arXiv:1606.08415; here approximated by tanh) multiplies
# each number $x$ by the probability that a standard normal number is smaller. The result is nearly 0 for very negative
# $x$, nearly $x$ for large $x$.
#
# **Predict:** an input has 0.5 MiB, and there are 8 layers. How many MiB are held if all weights are trained? If all
# are frozen, but something below is trained? And if a GELU follows each frozen layer?

# %%
LAYERS, ROWS, WIDTH = 8, 256, 512


def held_bytes(trainable_weights, trainable_input=True, activation=False, walk=True):
    """Bytes alive after the forward pass beyond inputs, weights and the result; and after the backward pass, or without."""
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
    if not walk:
        y = y.detach()  # the last reference to the graph goes
    elif y.requires_grad:
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
    ("the same with a GELU after each", held_bytes(False, activation=True), LAYERS * row, "GELU's slopes"),
    ("nothing trained", held_bytes(False, False, True), 0, "nothing: no graph at all"),
]
assert held_bytes(True, activation=True, walk=False)[1] < 0.05 * row, "a graph that is not walked goes with its result"
gc.enable()
print(f"\n{LAYERS} layers {WIDTH} -> {WIDTH}, {ROWS} rows        held [MiB]  predicted")
for name, (held, freed), predicted, what in cases:
    print(f"  {name:42s} {held / 2**20:6.2f}  {predicted / 2**20:6.2f}   {what}")
    assert abs(held - predicted) < 0.02 * LAYERS * row, name
    assert freed < 0.05 * row, f"{name}: {freed} bytes survive"  # 10 KB are Python's, of the threads that computed

# %% [markdown]
# About 3.5, 0 and 4. The first layer's input is the stack's own, which is there anyway. Freezing makes *linear* layers
# hold nothing, but the pullback of a nonlinearity needs an array of its input's shape (the input, tanh's output, or the
# slopes of the library's GELU) wherever a gradient passes through it, whether the weights beside it are trained or not.
# A frozen weight also saves one of the two products backward. Lesson 12 counts both savings.
#
# After the backward pass nothing of the graph is left, as the engine freed each step on its way (section 2). A graph
# that is not walked goes with its result, though the garbage collector is switched off: nodes never point back at the
# tensors they made, so plain reference counting frees it.
#
# ## 5 · Is a derivative right? Ask along a random direction
#
# A **cotangent** is what a pullback takes: the $g$ that arrives at the output. For a step $h$ in a direction $v$ (of
# the shape of $x$), the definition of the derivative is a test: $f(x + hv) - f(x - hv) \approx 2h\, Jv$. Comparing all
# of $J$ would take two evaluations per input. Instead choose a random direction $v$ *and* a random cotangent $g$ and
# compare two numbers ($\langle a, b \rangle$ is the sum of products $\sum_i a_i b_i$):
#
# $$\Big\langle g,\ \frac{f(x + hv) - f(x - hv)}{2h} \Big\rangle \approx \langle g, Jv \rangle
#   = \langle J^\top g, v \rangle = \langle \mathrm{pullback}(g), v \rangle .$$
#
# If the pullback's $J^\top$ is off by $E$ at this $x$, the two sides differ by $\sum_{ij} v_i E_{ij}\, g_j$. The
# factors $v_i g_j$ are random, so the errors cancel exactly with probability 0, though small ones can hide in the
# rounding. (An op with branches needs an $x$ in each.)
#
# How small should $h$ be? With $f', f'', \dots$ the derivatives along $v$, Taylor's series is
#
# $$f(x \pm hv) = f \pm h f' + \frac{h^2}{2} f'' \pm \frac{h^3}{6} f''' + \dots$$
#
# In the difference the even powers cancel, and after division by $2h$ the first error is $\frac{h^2}{6} f'''$. But a
# value near 1 is rounded by about $\epsilon$, here the spacing of floating-point numbers at 1 ($2.2 \cdot 10^{-16}$ in
# float64, $1.2 \cdot 10^{-7}$ in float32), and the division makes that $\epsilon / h$. Up to the function's own
# constants, the two errors are equal at $h = \epsilon^{1/3}$, and their sum is there about $\epsilon^{2/3}$, and
# nowhere much lower. On logarithmic axes the sum looks like a V.
#
# **Predict:** in float64, which of $10^{-2}$, $10^{-5}$, $10^{-8}$ and $10^{-11}$ is the best $h$?

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
    return ((g * change).sum() / (2 * h) - exact) / exact


TRIALS = 9 if REDUCED else 101
steps = 10.0 ** np.arange(-11, 0.26, 0.25)
curves = {
    dtype: np.array([np.median([abs(difference_error(dtype, h, i)) for i in range(TRIALS)]) for h in steps])
    for dtype in (np.float32, np.float64)
}
print("\ndtype      best h   eps^(1/3)   error there   eps^(2/3)   slope left   slope right")
for dtype, curve in curves.items():
    eps = np.finfo(dtype).eps
    best = steps[curve.argmin()]
    left = (steps > best / 1000) & (steps < best / 5)
    right = (steps > best * 3) & (steps < 0.35)
    slopes = [np.polyfit(np.log(steps[s]), np.log(curve[s]), 1)[0] for s in (left, right)]
    print(
        f"{dtype.__name__:8s}  {best:8.1e}    {eps ** (1 / 3):.1e}      {curve.min():.1e}     {eps ** (2 / 3):.1e}"
        f"       {slopes[0]:5.2f}         {slopes[1]:5.2f}"
    )
    assert 0.05 < best / eps ** (1 / 3) < 20
    assert curve.min() < 10 * eps ** (2 / 3)
    assert abs(slopes[0] + 1) < (0.35 if REDUCED else 0.15), "rounding error grows like 1/h"
    assert abs(slopes[1] - 2) < (0.35 if REDUCED else 0.15), "the Taylor remainder shrinks like h^2"
assert curves[np.float64][[36, 24, 12, 0]].argmin() == 1, "of 1e-2, 1e-5, 1e-8, 1e-11"
assert 1e-5 < curves[np.float32].min() < 1e-4, "float32: 4 to 5 digits"
H = 3e-3
two = np.median([abs(4 * difference_error(np.float64, H, i) - difference_error(np.float64, 2 * H, i)) / 3 for i in range(TRIALS)])
print(f"float64, (4 D(h) - D(2h)) / 3 at h = {H:.1e}: error {two:.1e}")
assert two < curves[np.float64].min() / 20

# %% [markdown]
# Of the four, $10^{-5}$. Hence the rules of `mp.gradcheck`: float64 always, a random direction and a random cotangent,
# and two central differences, $D(h)$ of step $h$ and $D(2h)$ of step $2h$. In $(4 D(h) - D(2h)) / 3$ the $h^2$ term
# cancels, which allows a larger $h$ with less rounding. For `f` its error is over 20 times below one difference's best.
# In float32 even the right derivative of `f` agrees to only four or five digits at the best $h$, and a smaller mistake
# can hide. PyTorch's `torch.autograd.gradcheck` asks for float64 as well, with $h = 10^{-6}$; by default it compares
# every element of $J$, and with `fast_mode=True` a random combination of them (gradcheck mechanics, docs.pytorch.org).
#
# Draw $x$ away from kinks. ReLU, $\max(x, 0)$, has no derivative at 0; the library returns 0 there, as PyTorch does,
# and the central difference says $\frac12$.

# %%
kink = mp.Tensor(np.zeros(1), requires_grad=True)
F.relu(kink).backward()
assert kink.grad[0] == 0 and np.diff(F.relu(mp.Tensor(np.array([-1e-5, 1e-5]))).data)[0] / 2e-5 == 0.5
print()
for fn, inputs in ((f, [rng.standard_normal((4, 16))]), (F.layer_norm, [x, weight, bias])):
    agreement = mp.gradcheck(fn, *inputs)  # raises GradcheckError if not; off: of the sum of the absolute terms, not of the sum
    print(f"mp.gradcheck of {fn.__name__}: {agreement.comparisons} comparisons, worst off by {agreement.deviation:.0e}")
    assert agreement.deviation < curves[np.float64].min()

# %% [markdown]
# ## The picture
#
# The V of section 5, of the function `f` there: each point is the median of the trials.

# %%
BLUE, ORANGE = "#0072B2", "#D55E00"
fig, axis = plt.subplots(figsize=(8, 5), layout="constrained")
for dtype, color, marker in ((np.float32, ORANGE, "o"), (np.float64, BLUE, "s")):
    axis.loglog(steps, curves[dtype], marker, color=color, ms=4.5, label=dtype.__name__)
    best = curves[dtype].argmin()
    rounding = curves[dtype][best] * steps[best] / steps
    axis.loglog(steps[: best + 4], np.where(rounding < 3, rounding, np.nan)[: best + 4], "--", color=color, lw=1)
anchor = np.argmin(np.abs(steps - 0.03))
taylor = curves[np.float64][anchor] * (steps / steps[anchor]) ** 2
axis.loglog(steps, np.where(taylor > 1e-12, taylor, np.nan), "-", color="black", lw=1)
axis.text(2e-4, 2e-2, "float32: rounding,\nslope -1", color=ORANGE, fontsize=10)
axis.text(3e-9, 2e-6, "float64: rounding,\nslope -1", color=BLUE, fontsize=10)
axis.text(2e-3, 3e-10, "Taylor remainder,\nslope +2", fontsize=10)
axis.text(1e-11, 3, "x + hv rounds to x: the difference is 0, the error 100%", color=ORANGE, fontsize=9)
axis.set(
    xlabel="step h", ylabel="relative error of the difference quotient", ylim=(1e-12, 30),
    title="A finite difference has a best step; its error there is far smaller in float64",
)  # fmt: skip
axis.grid(alpha=0.25)
if REDUCED:
    fig.suptitle("reduced setting: medians of few trials")
fig.savefig(OUT / "01_autograd.png", dpi=130)
print("picture:", OUT / "01_autograd.png")

# %% [markdown]
# ## 6 · Break it: wrong pullbacks, and a check that does not notice
#
# Three mistakes, each written as an operation of the library:
#
# 1. a softmax whose backward pass returns zeros;
# 2. a softmax that takes only the diagonal of its Jacobian, $\bar x = g\, y (1 - y)$, as if it were a **sigmoid**,
#    $1 / (1 + e^{-x})$, of each number alone;
# 3. a layer norm that forgets that $\mu$ and $\sigma$ depend on $x$.
#
# Two checks judge them, and `mp.gradcheck`. The careless one takes the gradient of `f(x).sum()`: a cotangent of ones.
# The careful one draws the cotangent at random.
#
# **Predict:** which of the three does the careless one let pass?

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
assert verdicts["softmax_like_a_sigmoid"] == verdicts["layer_norm_with_constant_statistics"] == (False, False, False)

# %% [markdown]
# Only the first, a backward pass that returns *zeros*: the outputs of a softmax always sum to one, so the derivative of
# their sum is zero, and zeros are exactly right (section 3).
#
# Now write section 2's tanh under `@op`, with a sign error or without its factor $g$, and let `mp.gradcheck` judge it.

# %% [markdown]
# ## Quiz
#
# **1.** Why does the engine add up the gradients that reach a value, and not take the last one?
#
# <details><summary>Answer</summary>
#
# A change of the value moves the loss through each of its uses, and the chain rule adds these (section 1). In the
# regression of section 2 the error is used twice by `mul`, so two gradients reach it; its own is their sum.
#
# </details>
#
# **2.** A model of a million weights. How many forward passes does nudging the weights one by one take, and how many
# does the walk back cost?
#
# <details><summary>Answer</summary>
#
# A million and one; the walk back costs about two: a matrix product forward becomes two backward, one for its input and
# one for its weight.
#
# </details>
#
# **3.** A stack of linear layers is frozen, and something below it is trained. What does the graph hold after the
# forward pass, and what changes with a GELU after each layer?
#
# <details><summary>Answer</summary>
#
# Nothing: the pullback towards $x$ needs $w$, which is there anyway, and the one towards $w$, which needs $x$, has been
# dropped. With a GELU after each layer the slopes of the GELUs are held, since the pullback of a nonlinearity needs an
# array of its input's shape wherever a gradient passes, whether the weights beside it are trained or not.
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
# **01.1 A gate.** Write `swish(x)`, $y = x\,\sigma(x)$ with the sigmoid $\sigma$, on plain arrays in the library's
# form: it returns the value and one pullback. (Make it an `@op` and let `mp.gradcheck` judge it, too; the checker takes
# either.) Which arrays does your pullback remember, and could it remember fewer?
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
# The inputs of seven layers; that of the first is there anyway. Without checkpointing the slopes of the eight GELUs
# come on top: 7.5 MiB. Checkpointing costs one more forward pass.
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
