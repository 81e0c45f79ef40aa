"""A stand-in for CuPy that needs no GPU: NumPy behind a wall, with CuPy's names and CuPy's rules, only stricter.

Code that runs on these arrays asks nothing of its array library that CuPy lacks and never moves data between host and
device unasked. What the wall enforces:

1. Host and device never meet silently. A NumPy array given to a device function, or a device array given to NumPy,
   raises TypeError. The only crossings are `asarray` / `array` (to the device) and `.get()`, `.item()`, `.tolist()`,
   `asnumpy` (to the host).
2. Nothing waits for the device silently: `float()`, `int()`, `bool()`, `if`, formatting raise TypeError (CuPy would
   copy and wait).
3. Reductions and integer indexing give 0-dimensional device arrays, never scalars.
4. Only functions, methods and keyword arguments that CuPy has exist here: the tables below are the whole namespace,
   and test_strict_device.py compares them with CuPy where CuPy is installed (a GPU is not needed for that).
5. What CuPy leaves undefined fails: `empty` is filled with NaN or the largest integer, an index out of range raises
   (CuPy wraps around), and so does assigning different values to one element through a repeated index.

The tables hold for CuPy 13 and 14. Deliberately absent although CuPy has them: complex numbers, file formats, raw
kernels, streams, DLPack.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

# ------------------------------------------------------------------------------------------------------- the tables
# One CuPy signature a line; `name=` is optional, what follows `*` is by keyword only.

FUNCTIONS = """
sum(a, axis=, dtype=, out=, keepdims=)
prod(a, axis=, dtype=, out=, keepdims=)
mean(a, axis=, dtype=, out=, keepdims=)
var(a, axis=, dtype=, out=, ddof=, keepdims=)
std(a, axis=, dtype=, out=, ddof=, keepdims=)
max(a, axis=, out=, keepdims=)
min(a, axis=, out=, keepdims=)
amax(a, axis=, out=, keepdims=)
amin(a, axis=, out=, keepdims=)
ptp(a, axis=, out=, keepdims=)
argmax(a, axis=, dtype=, out=, keepdims=)
argmin(a, axis=, dtype=, out=, keepdims=)
any(a, axis=, out=, keepdims=)
all(a, axis=, out=, keepdims=)
cumsum(a, axis=, dtype=, out=)
cumprod(a, axis=, dtype=, out=)
count_nonzero(a, axis=)
nansum(a, axis=, dtype=, out=, keepdims=)
nanmean(a, axis=, dtype=, out=, keepdims=)
nanmax(a, axis=, out=, keepdims=)
nanmin(a, axis=, out=, keepdims=)
median(a, axis=, out=, overwrite_input=, keepdims=)
quantile(a, q, axis=, out=, overwrite_input=, method=, keepdims=)
percentile(a, q, axis=, out=, overwrite_input=, method=, keepdims=)
average(a, axis=, weights=, returned=, *, keepdims=)
reshape(a, newshape, order=)
ravel(a, order=)
transpose(a, axes=)
swapaxes(a, axis1, axis2)
moveaxis(a, source, destination)
expand_dims(a, axis)
squeeze(a, axis=)
broadcast_to(array, shape)
broadcast_arrays(*arys)
atleast_1d(*arys)
atleast_2d(*arys)
flip(a, axis=)
roll(a, shift, axis=)
repeat(a, repeats, axis=)
tile(A, reps)
concatenate(tup, axis=, out=, *, dtype=, casting=)
stack(tup, axis=, out=, *, dtype=, casting=)
hstack(tup, *, dtype=, casting=)
vstack(tup, *, dtype=, casting=)
split(ary, indices_or_sections, axis=)
array_split(ary, indices_or_sections, axis=)
pad(array, pad_width, mode=, *, constant_values=)
take(a, indices, axis=, out=)
take_along_axis(a, indices, axis)
where(condition, x=, y=)
nonzero(a)
flatnonzero(a)
argwhere(a)
compress(condition, a, axis=, out=)
diagonal(a, offset=, axis1=, axis2=)
diag(v, k=)
tril(m, k=)
triu(m, k=)
trace(a, offset=, axis1=, axis2=, dtype=, out=)
fill_diagonal(a, val, wrap=)
copyto(dst, src, casting=, where=)
sort(a, axis=, kind=)
argsort(a, axis=, kind=)
partition(a, kth, axis=)
argpartition(a, kth, axis=)
searchsorted(a, v, side=, sorter=)
digitize(x, bins, right=)
unique(ar, return_index=, return_inverse=, return_counts=, axis=, *, equal_nan=)
bincount(x, weights=, minlength=)
isin(element, test_elements, assume_unique=, invert=)
dot(a, b, out=)
vdot(a, b)
inner(a, b)
outer(a, b, out=)
matmul(x1, x2, *, out=, dtype=, casting=)
tensordot(a, b, axes=)
einsum(*operands, dtype=, optimize=)
kron(a, b)
clip(a, a_min, a_max, out=)
round(a, decimals=, out=)
nan_to_num(x, copy=, nan=, posinf=, neginf=)
interp(x, xp, fp, left=, right=, period=)
diff(a, n=, axis=, prepend=, append=)
allclose(a, b, rtol=, atol=, equal_nan=)
isclose(a, b, rtol=, atol=, equal_nan=)
array_equal(a1, a2, equal_nan=)
packbits(a, axis=, bitorder=)
unpackbits(a, axis=, bitorder=)
zeros(shape, dtype=, order=)
ones(shape, dtype=, order=)
empty(shape, dtype=, order=)
full(shape, fill_value, dtype=, order=)
zeros_like(a, dtype=, order=, subok=, shape=)
ones_like(a, dtype=, order=, subok=, shape=)
empty_like(prototype, dtype=, order=, subok=, shape=)
full_like(a, fill_value, dtype=, order=, subok=, shape=)
arange(start, stop=, step=, dtype=)
linspace(start, stop, num=, endpoint=, retstep=, dtype=, axis=)
eye(N, M=, k=, dtype=, order=)
identity(n, dtype=)
tri(N, M=, k=, dtype=)
indices(dimensions, dtype=)
meshgrid(*xi, indexing=, sparse=, copy=)
tril_indices(n, k=, m=)
triu_indices(n, k=, m=)
ascontiguousarray(a, dtype=)
copy(a, order=)
"""

HOST_VALUED = """
ndim(a)
shape(a)
size(a, axis=)
result_type(*arrays_and_dtypes)
can_cast(from_, to, casting=)
promote_types(type1, type2)
issubdtype(arg1, arg2)
isscalar(element)
broadcast_shapes(*args)
broadcast(*arys)
shares_memory(a, b, max_work=)
may_share_memory(a, b, max_work=)
"""

LINALG = """
cholesky(a)
det(a)
eigh(a, UPLO=)
eigvalsh(a, UPLO=)
inv(a)
lstsq(a, b, rcond=)
matrix_rank(M, tol=)
norm(x, ord=, axis=, keepdims=)
pinv(a, rcond=)
qr(a, mode=)
slogdet(a)
solve(a, b)
svd(a, full_matrices=, compute_uv=)
"""

STRIDE_TRICKS = """
as_strided(x, shape=, strides=)
sliding_window_view(x, window_shape, axis=)
"""

METHODS = """
all(axis=, out=, keepdims=)
any(axis=, out=, keepdims=)
argmax(axis=, out=, dtype=, keepdims=)
argmin(axis=, out=, dtype=, keepdims=)
argpartition(kth, axis=)
argsort(axis=)
astype(dtype, order=, casting=, subok=, copy=)
clip(min=, max=, out=)
copy(order=)
cumprod(axis=, dtype=, out=)
cumsum(axis=, dtype=, out=)
diagonal(offset=, axis1=, axis2=)
dot(b, out=)
fill(value)
flatten(order=)
max(axis=, out=, keepdims=)
mean(axis=, dtype=, out=, keepdims=)
min(axis=, out=, keepdims=)
nonzero()
partition(kth, axis=)
prod(axis=, dtype=, out=, keepdims=)
ravel(order=)
repeat(repeats, axis=)
reshape(*shape, order=)
round(decimals=, out=)
searchsorted(v, side=, sorter=)
sort(axis=)
squeeze(axis=)
std(axis=, dtype=, out=, ddof=, keepdims=)
sum(axis=, dtype=, out=, keepdims=)
swapaxes(axis1, axis2)
take(indices, axis=, out=)
trace(offset=, axis1=, axis2=, dtype=, out=)
transpose(*axes)
var(axis=, dtype=, out=, ddof=, keepdims=)
view(dtype=)
"""

UFUNCS = """
add subtract multiply divide true_divide floor_divide remainder mod fmod power negative positive reciprocal
absolute abs fabs sign rint floor ceil trunc copysign hypot
exp exp2 expm1 log log2 log10 log1p logaddexp logaddexp2 sqrt cbrt square
sin cos tan arcsin arccos arctan arctan2 sinh cosh tanh arcsinh arccosh arctanh
maximum minimum fmax fmin isfinite isinf isnan signbit ldexp frexp modf nextafter
equal not_equal less less_equal greater greater_equal logical_and logical_or logical_xor logical_not
bitwise_and bitwise_or bitwise_xor bitwise_not invert left_shift right_shift
""".split()

HOST_NAMES = """
bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 int_ intp float16 float32 float64
dtype finfo iinfo generic number integer signedinteger unsignedinteger inexact floating
pi e inf nan newaxis
""".split()

# The element types CuPy's atomic operations take in every release from 13 on; other ufuncs have no `at`.
AT_TYPES = {
    "add": "efdiILQ",
    "subtract": "iI",
    "maximum": "fdiILQ",
    "minimum": "fdiILQ",
    "bitwise_and": "iIlLqQ",
    "bitwise_or": "iIlLqQ",
    "bitwise_xor": "iIlLqQ",
}

# Required parameters of these names are device arrays: no scalar, no list (CuPy's functions say so too). Other
# parameters (the bounds of clip, the branches of where) may also be scalars.
ARRAYS = frozenset(
    "a a1 a2 A ar array ary b bins condition dst element fp indices m M prototype test_elements v x x1 x2 xp".split()
)
LISTS = frozenset(["indices"])  # take(a, [0, 2], axis=0) is fine: a small list of Python integers is a constant
SEQUENCES = frozenset(["tup"])  # a sequence of device arrays

# ---------------------------------------------------------------------------------------------------------- the wall


def _is_scalar(x: object) -> bool:
    return isinstance(x, (bool, int, float)) or (isinstance(x, np.generic) and x.dtype.kind in "biuf")


def _refuse(x: object) -> TypeError:
    if isinstance(x, np.ndarray):
        return TypeError(
            "Unsupported type <class 'numpy.ndarray'>: move it to the device first, with xp.asarray(array)"
        )
    return TypeError(f"Unsupported type {type(x)}: a device function takes device arrays and scalars")


def _operand(x):
    """What a kernel takes: a device array, or a Python or NumPy scalar."""
    if type(x) is ndarray:
        return x._host
    if _is_scalar(x):
        return x
    raise _refuse(x)


def _host(x):
    """Any argument of a function: device arrays unwrapped, NumPy arrays refused, settings (axes, shapes, ...) kept."""
    if type(x) is ndarray:
        return x._host
    if isinstance(x, np.ndarray):
        raise _refuse(x)
    if isinstance(x, (list, tuple)):
        return type(x)([_host(item) for item in x])
    return x


def _device(x):
    """A result of NumPy on the device, scalars as 0-dimensional arrays."""
    if x is None:
        return None
    if isinstance(x, list):
        return [_device(item) for item in x]
    if isinstance(x, tuple):
        return tuple(_device(item) for item in x)
    host = np.asarray(x)
    if host.dtype.char not in "?bBhHiIlLqQefd":
        raise ValueError(f"Unsupported dtype {host.dtype}")
    array = object.__new__(ndarray)
    array._host = host
    return array


def _function(line: str, call, result=_device):
    """The device function of one table line, computed by NumPy's `call`."""
    name, _, text = line.rstrip(")").partition("(")
    parameters = [p.strip() for p in text.split(",") if p.strip()]
    variadic = any(p.startswith("*") and p != "*" for p in parameters)
    positional = [p for p in (parameters[: parameters.index("*")] if "*" in parameters else parameters) if p[0] != "*"]
    required = [p for p in positional if not p.endswith("=")]
    optional = [p.rstrip("=") for p in positional if p.endswith("=")]
    allowed = frozenset(p.rstrip("=") for p in parameters if p[0] != "*")
    checked = [(i, p) for i, p in enumerate(required) if p in ARRAYS or p in SEQUENCES]
    all_arrays = any(p in ("*arys", "*xi") for p in parameters)

    def function(*args, **kwargs):
        if not variadic and len(args) > len(required):
            extra = args[len(required) :]
            if len(extra) > len(optional):
                raise TypeError(f"cupy.{name} takes at most {len(positional)} positional arguments, not {len(args)}")
            args, kwargs = args[: len(required)], {**dict(zip(optional, extra)), **kwargs}
        for key in kwargs:
            if key not in allowed:
                raise TypeError(f"cupy.{name} has no keyword argument {key!r}; it has {line}")
        for i, parameter in checked:
            if i < len(args):
                arg = args[i]
                for item in arg if parameter in SEQUENCES else [arg]:
                    if type(item) is not ndarray and not (parameter in LISTS and isinstance(item, (list, int))):
                        raise _refuse(item)
        out = kwargs.get("out")
        for item in (*(args if all_arrays else ()), *(() if out is None else (out,))):
            if type(item) is not ndarray:
                raise _refuse(item)
        with np.errstate(all="ignore"):  # a device raises no floating-point warnings
            value = call(*[_host(a) for a in args], **{k: _host(v) for k, v in kwargs.items()})
        return result(value) if out is None else out

    function.__name__ = function.__qualname__ = name
    function.line = line
    return function


def _table(text: str, source, different: dict, result=_device) -> dict:
    lines = {line.partition("(")[0]: line for line in text.strip().splitlines()}
    return {name: _function(line, different.get(name) or getattr(source, name), result) for name, line in lines.items()}


# ----------------------------------------------------------------------------------------- where CuPy is not NumPy


def _poisoned(host: np.ndarray) -> np.ndarray:
    host.fill({"f": np.nan, "b": True}[host.dtype.kind] if host.dtype.kind in "fb" else np.iinfo(host.dtype).max)
    return host


def _stable(sort):
    def call(a, axis=-1, kind=None):
        if kind not in (None, "stable"):
            raise ValueError(f"cupy sorts with kind=None or 'stable', not {kind!r}")
        return sort(a, axis=axis, kind="stable")

    return call


def _sort_in_place(a, axis=-1):
    a[...] = np.sort(a, axis, kind="stable")


def _where(condition, x=None, y=None):
    if (x is None) != (y is None):
        raise ValueError("Must provide both 'x' and 'y' or neither.")
    return np.nonzero(condition) if x is None else np.where(condition, x, y)


def _arange(start, stop=None, step=1, dtype=None):
    return np.arange(start, dtype=dtype) if stop is None else np.arange(start, stop, step, dtype=dtype)


def _arg_dtype(find):
    def call(a, axis=None, dtype=None, out=None, keepdims=False):
        found = find(a, axis=axis, out=out, keepdims=keepdims)
        return found if dtype is None else found.astype(dtype)

    return call


def _check_repeated(stored: np.ndarray, values) -> None:
    values = np.asarray(values)
    values = values.reshape(values.shape[max(0, values.ndim - stored.ndim) :])  # further leading axes have length 1
    if not np.array_equal(stored, np.broadcast_to(values, stored.shape).astype(stored.dtype), equal_nan=True):
        raise ValueError("an index is repeated with different values: which one a device stores is undefined")


DIFFERENT = {
    "arange": _arange,
    "argmax": _arg_dtype(np.argmax),
    "argmin": _arg_dtype(np.argmin),
    "argsort": _stable(np.argsort),
    "empty": lambda *args, **kwargs: _poisoned(np.empty(*args, **kwargs)),
    "empty_like": lambda *args, **kwargs: _poisoned(np.empty_like(*args, **kwargs)),
    "sort": _stable(np.sort),
    "where": _where,
}


class ufunc:
    """An elementwise function: device arrays and scalars in, a device array out."""

    def __init__(self, name: str):
        self.name = name
        self._numpy = getattr(np, name)
        self.nin, self.nout, self.nargs = self._numpy.nin, self._numpy.nout, self._numpy.nargs

    def __call__(self, *args, out=None, casting="same_kind", dtype=None):
        if len(args) > self.nin:
            if out is not None:
                raise ValueError("Cannot specify 'out' as both a positional and keyword argument")
            args, out = args[: self.nin], args[self.nin :]
        outs = out if isinstance(out, tuple) or out is None else (out,)
        for o in outs or ():
            if type(o) is not ndarray:
                raise _refuse(o)
        host_out = None if outs is None else tuple(o._host for o in outs)
        with np.errstate(all="ignore"):
            value = self._numpy(*[_operand(a) for a in args], out=host_out, casting=casting, dtype=dtype)
        if outs is None:
            return _device(value)
        return outs[0] if self.nout == 1 else outs

    def at(self, a, indices, b=None):
        if self.name not in AT_TYPES:
            raise NotImplementedError(f"cupy_{self.name}.at is not supported yet")
        target = _only_device(a)
        if target.dtype.char not in AT_TYPES[self.name]:
            raise TypeError(f"cupy.{self.name}.at does not support {target.dtype}")
        self._numpy.at(target, _key(indices), np.asarray(_operand(b)).astype(target.dtype))

    def reduce(self, array, axis=0, dtype=None, out=None, keepdims=False):
        return self._fold("reduce", {"add": "sum", "multiply": "prod"}, array, axis, dtype, out, keepdims)

    def accumulate(self, array, axis=0, dtype=None, out=None):
        return self._fold("accumulate", {"add": "cumsum", "multiply": "cumprod"}, array, axis, dtype, out)

    def _fold(self, method: str, folds: dict, array, *args):
        if self.name not in folds:
            raise NotImplementedError(f"cupy_{self.name}.{method} is not supported yet")
        _only_device(array)
        return getattr(array, folds[self.name])(*args)

    def outer(self, A, B, **kwargs):
        a, b = _only_device(A), _only_device(B)
        return self(_device(a.reshape(a.shape + (1,) * b.ndim)), B, **kwargs)


def _only_device(x) -> np.ndarray:
    if type(x) is not ndarray:
        raise _refuse(x)
    return x._host


# --------------------------------------------------------------------------------------------------------- the array


class Flags(NamedTuple):
    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


def _key(key) -> tuple:
    """An index as NumPy takes it, with an Ellipsis, so that even a full integer index gives an array and no scalar."""
    parts, masks = [], 0
    for part in key if isinstance(key, tuple) else (key,):
        if type(part) is ndarray:
            masks += part.dtype.kind == "b"
            part = part._host
        elif isinstance(part, list):
            part = np.asarray(_host(part), dtype=None if part else np.int32)
        elif not (part is None or part is Ellipsis or isinstance(part, (slice, int, np.integer))):
            raise _refuse(part)
        parts.append(part)
    if masks > 1:
        raise IndexError("cupy takes one boolean array in an index, not several")
    return (*parts, Ellipsis) if not any(part is Ellipsis for part in parts) else tuple(parts)


def _binary(name: str, reflected: bool = False):
    call = getattr(np, name)

    def operator(self, other):
        if type(other) is not ndarray and getattr(other, "__array_ufunc__", self) is None:
            return NotImplemented  # a type that wraps arrays (a Tensor) answers instead
        x, y = self._host, _operand(other)
        with np.errstate(all="ignore"):
            return _device(call(y, x) if reflected else call(x, y))

    return operator


def _inplace(name: str):
    call = getattr(np, name)

    def operator(self, other):
        if type(other) is not ndarray and getattr(other, "__array_ufunc__", self) is None:
            return NotImplemented
        with np.errstate(all="ignore"):
            call(self._host, _operand(other), out=self._host)
        return self

    return operator


def _unary(name: str):
    call = getattr(np, name)
    return lambda self: _device(call(self._host))


def _waits(what: str):
    def refuse(self, *args):
        raise TypeError(f"{what} of a device array waits for the device and copies; write .item() where that is meant")

    return refuse


def _attribute(name: str):
    return property(lambda self: getattr(self._host, name))


class ndarray:
    """An array on the device; it is no numpy.ndarray and does not turn into one unless asked (`.get()`)."""

    __slots__ = ("__weakref__", "_host")
    __hash__ = None
    __array_ufunc__ = None  # numpy_array * device_array comes to __rmul__, which refuses it
    __array_priority__ = 100

    def __init__(self, shape, dtype=float, order="C"):
        self._host = _poisoned(np.empty(shape, dtype, order))

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_function__(self, func, types, args, kwargs):
        raise TypeError(f"numpy.{func.__name__} was given a device array; use the array's own library, xp_of(array)")

    shape, dtype, strides = _attribute("shape"), _attribute("dtype"), _attribute("strides")
    ndim, size, itemsize, nbytes = _attribute("ndim"), _attribute("size"), _attribute("itemsize"), _attribute("nbytes")
    T = property(lambda self: _device(self._host.T))
    base = property(lambda self: _device(self._host.base))  # None for an array that owns its memory

    @property
    def flags(self) -> Flags:
        flags = self._host.flags
        return Flags(flags.c_contiguous, flags.f_contiguous, flags.owndata)

    def get(self, stream=None, order="C", out=None, blocking=True) -> np.ndarray:
        """A copy in host memory."""
        if out is None:
            return np.array(self._host, order=order, copy=True)
        if not isinstance(out, np.ndarray):
            raise TypeError("Only numpy.ndarray can be obtained from cupy.ndarray")
        np.copyto(out, self._host, casting="no")
        return out

    def item(self):
        return self._host.item()

    def tolist(self):
        return self._host.tolist()

    def __getitem__(self, key) -> ndarray:
        key = _key(key)
        value = self._host[key]
        copied = any(isinstance(part, np.ndarray) and part.ndim == 0 for part in key)  # NumPy gives a view, CuPy none
        return _device(value.copy() if copied else value)

    def __setitem__(self, key, value) -> None:
        key, value = _key(key), _operand(value)
        self._host[key] = value
        if isinstance(value, np.ndarray) and any(isinstance(part, np.ndarray) and part.dtype != bool for part in key):
            _check_repeated(self._host[key], value)

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError("len() of unsized object")
        return len(self._host)

    def __iter__(self):
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __copy__(self) -> ndarray:
        return self.copy()

    def __deepcopy__(self, memo) -> ndarray:
        return self.copy()

    def __repr__(self) -> str:
        return f"strict_device.{self._host!r}"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return _waits("formatting")(self) if spec else repr(self)

    __float__, __int__, __bool__ = _waits("float()"), _waits("int()"), _waits("bool()")
    __index__ = _waits("use as an integer")

    __neg__, __pos__, __abs__, __invert__ = map(_unary, ("negative", "positive", "absolute", "invert"))
    __eq__, __ne__ = _binary("equal"), _binary("not_equal")
    __lt__, __le__, __gt__, __ge__ = map(_binary, ("less", "less_equal", "greater", "greater_equal"))


for _name in [
    *("add sub:subtract mul:multiply truediv:true_divide floordiv:floor_divide mod:remainder pow:power".split()),
    *("and:bitwise_and or:bitwise_or xor:bitwise_xor lshift:left_shift rshift:right_shift matmul".split()),
]:
    _operator, _, _numpy_name = _name.partition(":")
    _numpy_name = _numpy_name or _operator
    setattr(ndarray, f"__{_operator}__", _binary(_numpy_name))
    setattr(ndarray, f"__r{_operator}__", _binary(_numpy_name, reflected=True))
    if _operator != "matmul":  # CuPy has no __imatmul__ : a @= b makes a new array
        setattr(ndarray, f"__i{_operator}__", _inplace(_numpy_name))

for _name, _method in _table(METHODS.replace("(", "(self, "), np.ndarray, DIFFERENT | {"sort": _sort_in_place}).items():
    setattr(ndarray, _name, _method)


# ---------------------------------------------------------------------------------------------------- the namespace


def asarray(a, dtype=None, order=None, *, copy=None) -> ndarray:
    """The array on the device: an explicit copy from the host, `a` itself if it is there already."""
    if type(a) is ndarray and not copy and dtype in (None, a.dtype):
        return a
    if not isinstance(a, np.ndarray):
        a = _host(a)  # a list is a constant, or holds device arrays that are joined on the device
    return _device(np.array(a, dtype=dtype, order=order or "K", copy=True))


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0) -> ndarray:
    """A new array on the device."""
    made = asarray(obj, dtype, order, copy=copy)
    return _device(made._host.reshape((1,) * (ndmin - made.ndim) + made.shape)) if made.ndim < ndmin else made


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True) -> np.ndarray:
    """A copy in host memory (a NumPy array passes through)."""
    return a if isinstance(a, np.ndarray) else a.get(stream, order, out, blocking)


class Generator:
    """The part of numpy.random.Generator that CuPy has (no normal, no permutation, no choice, no shuffle)."""

    def __init__(self, seed=None):
        self._numpy = np.random.default_rng(seed)

    def random(self, size=None, dtype=np.float64, out=None):
        return self._filled(self._numpy.random, size, dtype, out)

    def standard_normal(self, size=None, dtype=np.float64, out=None):
        return self._filled(self._numpy.standard_normal, size, dtype, out)

    def _filled(self, draw, size, dtype, out):
        if out is None:
            return _device(draw(size, dtype=dtype))
        draw(size, dtype=dtype, out=_only_device(out))
        return out

    def integers(self, low, high=None, size=None, dtype=np.int64, endpoint=False):
        return _device(self._numpy.integers(_host(low), _host(high), size, dtype, endpoint))

    def uniform(self, low=0.0, high=1.0, size=None, dtype=np.float64):
        return _device(self._numpy.uniform(_host(low), _host(high), size)).astype(dtype)

    def exponential(self, scale=1.0, size=None):
        return _device(self._numpy.exponential(_host(scale), size))


NAMESPACE = {
    **_table(FUNCTIONS, np, DIFFERENT),
    **_table(HOST_VALUED, np, {}, result=lambda value: value),
    **{name: ufunc(name) for name in UFUNCS},
    **{name: getattr(np, name) for name in HOST_NAMES},
    "linalg": SimpleNamespace(**_table(LINALG, np.linalg, {}), LinAlgError=np.linalg.LinAlgError),
    "lib": SimpleNamespace(stride_tricks=SimpleNamespace(**_table(STRIDE_TRICKS, np.lib.stride_tricks, {}))),
    "random": SimpleNamespace(Generator=Generator, default_rng=Generator),
}


def __getattr__(name: str):
    try:
        return NAMESPACE[name]
    except KeyError:
        raise AttributeError(f"cupy has no {name!r}, or the stand-in leaves it out (see its docstring)") from None


def __dir__() -> list[str]:
    return sorted([*NAMESPACE, "array", "asarray", "asnumpy", "ndarray", "ufunc"])
