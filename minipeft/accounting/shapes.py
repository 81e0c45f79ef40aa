"""A model run on shapes alone: which arrays live when, in a step of training that is never computed.

    with Meter() as meter:
        loss = model.loss(ids, labels)      the model's own code and the engine's own graph, on arrays without content
        meter.backward(loss)                the engine's own walk
    meter.peak, meter.at_peak               bytes

An array here is a NumPy array of the right shape and dtype over a single element. It holds a `Buffer`, which counts the
bytes that the array stands for, from its creation until reference counting frees it, as it would free the real array.

The rules below state the memory of each op of `minipeft.autograd.ops`: the arrays that it makes, what each pullback
keeps, and how many bytes both work in. Nothing else is needed: the engine drops a frozen weight's pullback, and what
that pullback kept is freed with it. An op of your own gets its rule from `rule`; without one it counts as keeping its
inputs, its value and what its pullbacks captured, which is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..autograd.kernels import QUERY_BLOCK, TILE
from ..autograd.tensor import REGISTRY, Tensor, Term, evaluated_by, is_grad_enabled, pull_back, together
from ..backend import BLOCK, SPLIT, Array, get_num_threads

Shape = tuple[int, ...]


class Buffer:
    """The bytes of one array, counted in a meter's line from creation to deletion.

    shape, event    of an array (None: what an op works in); the meter's `event` in which it was made
    """

    __slots__ = ("event", "line", "meter", "nbytes", "op", "shape")

    def __init__(self, meter: Meter, nbytes: int, op: str = "", shape: Shape | None = None):
        self.meter, self.nbytes, self.line, self.op = meter, nbytes, meter.line, op
        self.shape, self.event = shape, meter.event
        meter.count(self, nbytes)

    def move(self, line: str, nbytes: int | None = None) -> None:
        """Count these bytes, or as many as they are from now on, in another line."""
        self.meter.count(self, -self.nbytes)
        self.line, self.nbytes = line, self.nbytes if nbytes is None else nbytes
        self.meter.count(self, self.nbytes)

    def __del__(self) -> None:
        self.meter.count(self, -self.nbytes)


class Meter:
    """Evaluates ops on shapes, on this thread, inside `with`; counts the bytes of the arrays alive, by line and by op.

    line, current, lines, ops   the line that new arrays are counted in; bytes now, their sum and by line and op
    peak, at_peak               the largest sum since `take_peak`, and the bytes by line at that moment
    event                       which op runs, where somebody counts them

    Args:
        itemsize: bytes of a floating-point activation, whatever its dtype here (2 in half precision).
        gradients: bytes of an element of a leaf's gradient; None: as many.

    Raises ValueError for an op that no rule is for and that does not run on shapes.
    """

    def __init__(self, itemsize: int = 4, gradients: int | None = None):
        self.itemsize, self.gradients, self.threads = itemsize, gradients or itemsize, get_num_threads()
        self.line, self.event = "activations", 0
        self.lines: dict[str, int] = {}
        self.ops: dict[str, int] = {}
        self.current = self.peak = 0
        self.at_peak: dict[str, int] = {}

    def __enter__(self) -> Meter:
        self._evaluation = evaluated_by(self._evaluate)
        self._evaluation.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._evaluation.__exit__(*error)

    def _evaluate(self, name: str, form: Any, *arrays: Any, **options: Any) -> tuple:
        return RULES.get(name, _without_rule)(_Op(self, name), *arrays, **options)

    def count(self, buffer: Buffer, nbytes: int) -> None:
        """Add bytes of a buffer, or subtract them when negative."""
        self.lines[buffer.line] = self.lines.get(buffer.line, 0) + nbytes
        self.ops[buffer.op] = self.ops.get(buffer.op, 0) + nbytes
        self.current += nbytes
        if self.current > self.peak:
            self.peak, self.at_peak = self.current, dict(self.lines)

    def take_peak(self) -> dict[str, int]:
        """The largest sum by line so far, which is then looked for anew."""
        seen = self.at_peak
        self.peak, self.at_peak = self.current, {line: n for line, n in self.lines.items() if n}
        return seen

    def backward(self, loss: Tensor) -> None:
        """The backward pass: what it makes counts as "working memory", and as "gradients" once a leaf has it."""
        self.line = "working memory"

        def deliver(leaf: Tensor, g: Array | Term, owned: bool) -> None:
            if leaf.grad is not None:
                return  # added in place
            if isinstance(g, Term):
                g, owned = ShapeArray.new(self, leaf.shape, leaf.dtype), True
            leaf.grad = g if owned else g.copy()
            leaf.grad.buffer.move("gradients", leaf.grad.buffer.nbytes // self.itemsize * self.gradients)

        if loss._node is not None:
            pull_back(loss._node, ShapeArray.new(self, loss.shape, loss.dtype), deliver)


class ShapeArray(np.ndarray):
    """An array that has a shape, a dtype and a buffer, and no content. Views share the buffer."""

    buffer: Buffer | None
    owner = False

    @classmethod
    def over(cls, buffer: Buffer, shape: Shape, dtype: Any) -> ShapeArray:
        """A view of a buffer."""
        array = np.ndarray.__new__(cls, shape, dtype, np.zeros(1, dtype), 0, (0,) * len(shape))
        array.buffer = buffer
        return array

    @classmethod
    def new(cls, meter: Meter, shape: Shape, dtype: Any = np.float32, op: str = "") -> ShapeArray:
        """An array that counts as allocated."""
        dtype = np.dtype(dtype)
        itemsize = min(dtype.itemsize, meter.itemsize) if dtype.kind == "f" else dtype.itemsize
        array = cls.over(Buffer(meter, math.prod(shape) * itemsize, op, shape), shape, dtype)
        array.owner = True
        return array

    @classmethod
    def uncounted(cls, meter: Meter, shape: Shape, dtype: Any = np.float32) -> ShapeArray:
        """An array whose bytes are counted elsewhere (a weight's); what is made from it counts."""
        return cls.over(Buffer(meter, 0), shape, dtype)

    def __array_finalize__(self, source: Any) -> None:
        self.buffer = getattr(source, "buffer", None)

    @property
    def base(self) -> Array | None:
        """None for the array that a buffer was made for, as for any array that is not a view."""
        return None if self.owner else self

    def _like(self, shape: Shape, dtype: Any = None) -> ShapeArray:
        return ShapeArray.new(self.buffer.meter, shape, self.dtype if dtype is None else dtype, self.buffer.op)

    def copy(self, order: str = "C") -> ShapeArray:
        """Another allocation."""
        return self._like(self.shape)

    def astype(self, dtype: Any, *args: Any, copy: bool = True, **kwargs: Any) -> ShapeArray:
        """Another allocation where the dtype differs."""
        return self if not copy and np.dtype(dtype) == self.dtype else self._like(self.shape, dtype)

    def __setitem__(self, index: Any, value: Any) -> None:
        """There is no content to set."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        if out is not None:
            return out[0]
        source = next(x for x in inputs if isinstance(x, ShapeArray))
        if method == "reduce":
            return source._like(_reduced(self, options.get("axis", 0), options.get("keepdims", False)))
        if method != "__call__":
            return None  # in place
        if ufunc is np.matmul:
            a, b = inputs
            return source._like((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]))
        return source._like(np.broadcast_shapes(*[np.shape(x) for x in inputs]))

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        if function in (np.zeros_like, np.empty_like, np.ones_like):
            return args[0]._like(kwargs.get("shape") or args[0].shape)
        if function is np.concatenate:
            source = next(x for x in args[0] if isinstance(x, ShapeArray))
            return source._like(_joined(args[0], kwargs.get("axis", 0)))
        return super().__array_function__(function, types, args, kwargs)


class _Op:
    """One application of an op: what its rule makes arrays and pullbacks with."""

    __slots__ = ("meter", "name")

    def __init__(self, meter: Meter, name: str):
        self.meter, self.name = meter, name

    def new(self, shape: Shape, dtype: Any = np.float32) -> ShapeArray:
        """An array of this op."""
        return ShapeArray.new(self.meter, shape, dtype, self.name)

    def slope(self, shape: Shape) -> ShapeArray | None:
        """What a pullback multiplies the gradient into, and returns; none is made where no graph is recorded."""
        return self.new(shape) if is_grad_enabled() else None

    def view(self, source: Array, shape: Shape) -> Array:
        """`source` in another shape, without memory of its own; of a plain array, a plain array."""
        if not isinstance(source, ShapeArray):
            return np.broadcast_to(np.zeros((), source.dtype), shape)
        return ShapeArray.over(source.buffer, shape, source.dtype)

    def works_in(self, nbytes: int) -> None:
        """Bytes that the op needs and frees before it returns."""
        if nbytes:
            Buffer(self.meter, nbytes, self.name)

    def pull(self, shape: Shape, *kept: Any, work: int = 0) -> Callable[[Array], Array]:
        """A pullback that makes a gradient of `shape`, working in `work` bytes; it keeps `kept` alive."""

        def pullback(g: Array, kept: Any = kept) -> Array:
            made = self.new(shape)
            self.works_in(work)
            return made

        return pullback

    def blocks(self, size: int, arrays: int) -> int:
        """Bytes of the temporaries of work over `size` elements in blocks: `arrays` of them on each thread."""
        return arrays * self.meter.itemsize * (size if size < SPLIT else min(size, BLOCK * self.meter.threads))


RULES: dict[str, Callable[..., tuple]] = {}


def rule(name: str) -> Callable[[Callable[..., tuple]], Callable[..., tuple]]:
    """Register what an op of this name keeps: `fn(op, *arrays, **options) -> (value, *pullbacks)`, the op's arguments.

        @rule("log")
        def log(op, x):                                 # y = log x, of which backward needs x alone
            return op.new(x.shape), op.pull(x.shape, x)

    `op.new(shape, dtype)` is an array that the op makes, `op.view(array, shape)` one without memory of its own,
    `op.pull(shape, *kept, work=bytes)` a pullback that keeps arrays and works in some bytes beside its gradient, and
    `op.works_in(bytes)` what the op itself needs for a moment.
    """

    def register(fn: Callable[..., tuple]) -> Callable[..., tuple]:
        RULES[name] = fn
        return fn

    return register


def _without_rule(op: _Op, *arrays: Any, **options: Any) -> tuple:
    """What an op is taken to keep that no rule is for: all its inputs, its value, and what its pullbacks have captured.

    The op's definition runs on arrays of the inputs' shapes that count as nothing, which says the shape of the value.
    """
    twins = [
        ShapeArray.over(Buffer(op.meter, 0, op.name), a.shape, a.dtype) if isinstance(a, ShapeArray) else a for a in arrays
    ]
    try:
        value, *pullbacks = REGISTRY[op.name].definition(*twins, **options)
    except Exception as error:
        raise ValueError(
            f"the op {op.name!r} does not run on shapes alone ({error}), so its memory is not known: register what it "
            f'keeps, with @minipeft.accounting.rule("{op.name}")'
        ) from error
    counted = isinstance(value, ShapeArray) and value.buffer.nbytes  # not a view of an input
    y = value if counted else op.new(np.shape(value), getattr(value, "dtype", np.float32))
    kept = (*arrays, y, *pullbacks)
    return y, *[pullback and op.pull(np.shape(a), *kept) for a, pullback in zip(arrays, pullbacks)]


def _through(g: Array) -> Array:
    """The pullback that returns the gradient itself."""
    return g


# ------------------------------------------------------------------------------------- elementwise ops and reductions

# For each input, what its pullback keeps: the inputs a and b, the value y, nothing (-); g: it returns its gradient;
# 0: it has none (the condition of `where`, an input named a here).
_ELEMENTWISE = {
    "add": "g g", "sub": "g -", "mul": "b a", "div": "b by", "neg": "-", "pow": "a", "maximum": "ab ab",
    "minimum": "ab ab", "clip": "a", "exp": "y", "log": "a", "sqrt": "y", "abs": "a", "tanh": "y", "relu": "y",
    "sigmoid": "y", "softplus": "a", "logsigmoid": "a", "softmax": "y", "log_softmax": "y",
    "where": "0 a a",
}  # fmt: skip


def _elementwise(keeps: list[str]) -> Callable[..., tuple]:
    def evaluate(op: _Op, *arrays: Any, **options: Any) -> tuple:
        operands = arrays[: len(keeps)]
        shape = np.broadcast_shapes(*[np.shape(a) for a in operands])
        named = {**dict(zip("ab", operands)), "y": op.new(shape)}
        fixed = {"g": _through, "0": None}
        pulls = [fixed[k] if k in fixed else op.pull(shape, *[named[x] for x in k.strip("-")]) for k in keeps]
        return named["y"], *pulls, *[None] * (len(arrays) - len(pulls))

    return evaluate


RULES.update({name: _elementwise(keeps.split()) for name, keeps in _ELEMENTWISE.items()})


@rule("silu")
def _silu(op, x):
    y, slope = op.new(x.shape), op.slope(x.shape)
    op.works_in(op.blocks(x.size, 1))
    return y, lambda g: slope


@rule("swiglu")
def _swiglu(op, gate, up):
    y, dgate, dup = op.new(gate.shape), op.slope(gate.shape), op.slope(up.shape)
    op.works_in(op.blocks(gate.size, 1))
    return y, lambda g: dgate, lambda g: dup


@rule("gelu")
def _gelu(op, x):
    y, slope = op.new(x.shape), op.slope(x.shape)
    if slope is not None:
        op.works_in(op.blocks(x.size, 1))
    return y, lambda g: slope


@rule("dropout")
def _dropout(op, x, p, rng):
    if rng is None or p == 0:
        return x, _through, None, None
    uniform = op.new(x.shape)
    keep = op.new(x.shape, bool)
    del uniform
    return op.new(x.shape), op.pull(x.shape, keep), None, None


def _reduced(x: Array, axis: Any, keepdims: bool) -> Shape:
    axes = range(x.ndim) if axis is None else [a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)]
    return tuple(1 if i in axes else n for i, n in enumerate(x.shape) if i not in axes or keepdims)


def _joined(arrays: Sequence[Array], axis: int) -> Shape:
    shape = [*arrays[0].shape]
    shape[axis] = sum(a.shape[axis] for a in arrays)
    return tuple(shape)


@rule("sum")
def _sum(op, x, axis=None, keepdims=False):
    shape = x.shape
    return op.new(_reduced(x, axis, keepdims)), lambda g: op.view(g, shape), None, None


RULES["mean"] = _sum


@rule("max")
def _max(op, x, axis=None, keepdims=False):
    y = op.new(_reduced(x, axis, keepdims))
    return y, op.pull(x.shape, x, y), None, None


@rule("var")
def _var(op, x, axis=None, keepdims=False, correction=1):
    mean = op.new(_reduced(x, axis, True))
    centered = op.new(x.shape)
    op.works_in(op.meter.itemsize * x.size)  # its squares
    del mean
    return op.new(_reduced(x, axis, keepdims)), op.pull(x.shape, centered), None, None, None


@rule("logsumexp")
def _logsumexp(op, x, axis=-1, keepdims=False):
    e = op.new(x.shape)
    return op.new(_reduced(x, axis, keepdims)), op.pull(x.shape, e), None, None


# ----------------------------------------------------------------------------------------------------------- shapes


def _definition(name: str) -> Callable[..., tuple]:
    return lambda op, *arrays, **options: REGISTRY[name].definition(*arrays, **options)


RULES.update({name: _definition(name) for name in ("reshape", "transpose", "swapaxes", "to")})  # views, or a conversion


@rule("broadcast_to")
def _broadcast_to(op, x, shape):
    return op.view(x, shape), _through, None


@rule("getitem")
def _getitem(op, x, index):
    arrays = [i for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, (np.ndarray, list))]
    shape = np.broadcast_to(False, x.shape)[index].shape
    return op.new(shape) if arrays else op.view(x, shape), op.pull(x.shape, *arrays), None


@rule("gather")
def _gather(op, x, indices, axis=-1):
    return op.new(indices.shape), op.pull(x.shape, indices), None, None


@rule("_cat")
def __cat(op, *arrays, axis):
    return op.new(_joined(arrays, axis)), *[lambda g, shape=a.shape: op.view(g, shape) for a in arrays]


# -------------------------------------------------------------------------------------------------- matrix products


@rule("matmul")
def _matmul(op, a, b):
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    y = op.new(lead + a.shape[-2:-1] + (b.shape[-1:] if b.ndim > 1 else ()))
    return y, op.pull(lead + a.shape[-2:], b), op.pull(b.shape if b.ndim <= 2 else lead + b.shape[-2:], a)


@rule("inv")
def _inv(op, x):
    y = op.new(x.shape)
    return y, op.pull(x.shape, y, work=op.meter.itemsize * x.size)


@rule("linear")
def _linear(op, x, weight, bias=None, alpha=1.0):
    return _affine(op, x, weight, bias, alpha, weight.shape[0])


@rule("addmm")
def _addmm(op, bias, x, weight):
    y, dx, dw, db = _affine(op, x, weight, bias, 1, weight.shape[1])
    return y, db, dx, dw


def _affine(op: _Op, x: Array, weight: Array, bias: Array | None, alpha: float, n_out: int) -> tuple:
    made = 4 * weight.size if weight.dtype.itemsize == 2 or alpha != 1 else 0  # widened, or times α
    op.works_in(made)
    y = op.new((*x.shape[:-1], n_out))
    db = _through if bias is not None and bias.ndim > 1 else op.pull((n_out,))
    return y, op.pull(x.shape, weight, work=made), op.pull(weight.shape, x), db


@rule("linear_4bit")
def _linear_4bit(op, x, packed, state, bias=None):
    from ..quant.kernels import PIECE, tile_size

    (n_out, n_in), size = state.shape, state.blocksize
    blocks = -(-math.prod(state.shape) // size)
    threads = op.meter.threads if n_out * n_in * max(1, x.size // n_in // 64) >= SPLIT else 1
    absmax = 8 * blocks if state.nested else 0  # while they are made, twice

    def work(tile: int) -> int:  # each thread's tile; the indices of its bytes, a piece at a time
        return absmax + threads * 4 * (tile + size + min(tile, PIECE))

    y = op.new((*x.shape[:-1], n_out))
    rows = tile_size(n_out) * n_in
    op.works_in(work(rows))
    if n_in % size:
        back = work(rows) + op.meter.itemsize * x.size  # the product of one tile, before it is added
    else:
        back = work(tile_size(n_in) * n_out)
    return y, op.pull(x.shape, packed, state, work=back), None, None, op.pull((n_out,))


@rule("embedding")
def _embedding(op, ids, weight):
    n, d = ids.size, weight.shape[1]
    scatter = 4 * d * (n + 2 * min(n, weight.shape[0])) + 16 * n  # rows sorted, their sums, the sums added; their order
    return op.new((*ids.shape, d)), None, op.pull(weight.shape, ids, work=scatter)


# ---------------------------------------------------------------------------------------------------- normalization


@rule("layer_norm")
def _layer_norm(op, x, weight, bias, eps=1e-5):
    y, dx, dw = _rms_norm(op, x, weight)
    op.works_in(op.blocks(x.size, 1))
    return y, dx, dw, op.pull(bias.shape)


@rule("rms_norm")
def _rms_norm(op, x, weight, eps=1e-6):
    y, normed, rstd = op.new(x.shape), op.new(x.shape), op.new((*x.shape[:-1], 1))
    return y, op.pull(x.shape, weight, normed, rstd, work=op.blocks(x.size, 1)), op.pull(weight.shape, normed)


# -------------------------------------------------------------------------------------------------------- attention


@rule("rope")
def _rope(op, x, cos, sin):
    work = op.blocks(x.size, 1) + 4 * op.meter.itemsize * cos.size  # halves swapped; cosines and sines
    y = op.new(x.shape)
    op.works_in(work)
    return y, op.pull(x.shape, cos, sin, work=work), None, None


class _Tiles:
    """What attention keeps: q, k, v, the output, each tile's unnormalized weights and the inverse of their row sums.

    q [B, H, T, D], k and v [B, H, S, D]; a tile is a block of queries against the keys that it may see.
    """

    def __init__(self, op: _Op, q: Array, k: Array, v: Array, causal: bool):
        B, H, T, D = q.shape
        S = k.shape[2]
        self.inputs = q, k, v
        self.out = op.new((B, T, H, v.shape[3])).transpose(0, 2, 1, 3)
        threads = op.meter.threads
        rows = max(1, min(TILE // max(1, H * min(T, QUERY_BLOCK) * S), -(-B // threads)))
        block = min(QUERY_BLOCK, T) if causal else T
        self.weights = []
        for i in range(0, T, max(1, block)):
            t = min(i + block, T) - i
            n = max(0, S - T + i + t) if causal else S  # keys that the last query of the block may see
            if is_grad_enabled():
                self.weights += [op.new((B, H, t, n)), op.new((B, H, t, 1))]
        at_work = op.meter.itemsize * min(B, rows * threads)  # bytes of a number for each batch row at work
        tile, values = at_work * H * block, at_work * k.shape[1] * S * (v.shape[3] + 1)  # of its queries; values beside a 1
        made = 0 if is_grad_enabled() else S + 1  # weights that nobody keeps
        self.forward_work = tile * (2 * D + made)  # scaled queries and outputs
        self.backward_work = tile * (S + 3 * D) + values  # gradients of scores, outputs and queries, and queries

    def gradients(self, op: _Op, shapes: list[Shape]) -> list[ShapeArray]:
        """Empty gradients; the weights are freed while they are filled."""
        made = [op.new(shape) for shape in shapes]
        op.works_in(self.backward_work)
        self.weights.clear()
        return made


@rule("scaled_dot_product_attention")
def _scaled_dot_product_attention(op, q, k, v, attn_mask=None, is_causal=False, scale=None):
    tiles = _Tiles(op, q, k, v, is_causal)
    op.works_in(tiles.forward_work)
    pulls = together(3, lambda g: tiles.gradients(op, [a.shape for a in tiles.inputs]))
    return tiles.out, *pulls, None, None, None


@rule("packed_attention")
def _packed_attention(op, qkv, num_heads, attn_mask=None, is_causal=True):
    B, T, d3 = qkv.shape
    q = op.view(qkv, (B, num_heads, T, d3 // 3 // num_heads))
    tiles = _Tiles(op, q, q, q, is_causal)
    op.works_in(tiles.forward_work)
    return op.view(tiles.out, (B, T, d3 // 3)), lambda g: tiles.gradients(op, [(B, T, d3)])[0], None, None, None


@rule("rotary_attention")
def _rotary_attention(op, q, k, v, cos, sin, attn_mask=None, cache=None):
    (B, T, _), D = q.shape, 2 * cos.shape[2]
    heads = [op.view(a, (B, T, a.shape[2] // D, D)).swapaxes(1, 2) for a in (q, k, v)]
    (Q, turn, *_), (K, *_), V = *[_rope(op, x, cos, sin) for x in heads[:2]], heads[2]
    K, V = (K, V) if cache is None else [a[:, :, : cache[2] + T] for a in cache[:2]]
    tiles = _Tiles(op, Q, K, V, True)
    op.works_in(tiles.forward_work)

    def gradients(g: Array) -> list[Array]:
        dq, dk, dv = tiles.gradients(op, [a.shape for a in tiles.inputs])
        return [turn(dq), turn(dk), dv]

    shapes = q.shape, k.shape, v.shape
    pulls = [lambda g, p=p, s=s: op.view(p(g), s) for p, s in zip(together(3, gradients), shapes)]
    return op.view(tiles.out, q.shape), *pulls, None, None, None


# ------------------------------------------------------------------------------------------------------------ losses


@rule("mse_loss")
def _mse_loss(op, input, target):
    d = op.new(input.shape)
    op.works_in(op.meter.itemsize * input.size)  # its squares
    return op.new(()), op.pull(input.shape, d), op.pull(target.shape, d)


@rule("kl_div")
def _kl_div(op, input, target, log_target=False):
    p = op.new(target.shape) if log_target else target
    log_p = target if log_target else op.new(target.shape)
    gap = op.new(input.shape)
    op.works_in(op.meter.itemsize * input.size)
    del log_p
    return op.new(()), op.pull(input.shape, p), op.pull(target.shape, p, gap), None


@rule("nll_loss")
def _nll_loss(op, log_probs, targets, ignore_index=-100):
    onehot = op.new(log_probs.shape, bool)
    op.works_in(op.meter.itemsize * log_probs.size)
    return op.new(()), op.pull(log_probs.shape, onehot), None, None


@rule("cross_entropy")
def _cross_entropy(op, logits, targets, ignore_index=-100, label_smoothing=0.0):
    rows = [op.new((targets.size,), np.int64), *[op.new((targets.size,)) for _ in range(2)]]  # targets, counts, divisor
    e = op.slope(logits.shape)
    op.works_in(op.blocks(logits.size, 1) if e is None else 0)
    return op.new(()), lambda g, kept=rows: e, None, None, None


@rule("linear_cross_entropy")
def _linear_cross_entropy(op, hidden, weight, targets, ignore_index=-100, label_smoothing=0.0):
    n, (classes, width) = int((targets != ignore_index).sum()), weight.shape
    widened = 4 * weight.size if weight.dtype.itemsize == 2 else 0
    everything = n == targets.size
    h = hidden if everything else op.new((n, width))
    op.works_in(widened)
    logits = op.new((n, classes))
    logits.buffer.move("logits")
    which = op.new((n,), np.int64)
    rows = [op.new((n,), np.int64), *[op.new((n,)) for _ in range(2)]]  # targets, counts, divisor
    copied = 0 if everything else op.meter.itemsize * n * width  # the product, before it is spread over the rows
    dhidden = op.pull(hidden.shape, hidden, h, weight, logits, which, *rows, work=copied + widened)
    return op.new(()), dhidden, op.pull(weight.shape, h, logits, *rows), None, None, None
