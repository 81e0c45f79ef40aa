"""A stand-in for CuPy that needs neither CuPy nor a GPU: NumPy behind a wall.

`pytest --device cupy` runs the same tests on CuPy itself, which alone knows its signatures, dtypes and rounding. This
module catches, wherever the tests run, the habits that only NumPy forgives:

1. Host and device arrays never meet silently. A NumPy array given to a device function, or a device array given to
   NumPy, raises TypeError. The only crossings are `asarray` and `array` (to the device) and `.get()`, `.item()`,
   `.tolist()`, `asnumpy` (to the host). An `out=` is a device array. A list is not an array.
2. Nothing that reads one number waits for the device silently: `float()`, `int()`, `bool()`, `if` and formatting raise
   TypeError (CuPy copies and waits).
3. Reductions and integer indexing give 0-dimensional device arrays, never scalars.
4. A function, method or keyword argument that CuPy lacks is missing here too.
5. What CuPy leaves undefined fails: `empty` is filled with NaN or the largest integer, an index out of range raises
   IndexError (CuPy wraps around), and one element that is assigned two different values raises ValueError.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np

FUNCTIONS = """
sum prod mean var std max min amax amin ptp argmax argmin any all cumsum cumprod count_nonzero nansum nanmean nanmax
nanmin median quantile percentile average reshape ravel transpose swapaxes moveaxis expand_dims squeeze broadcast_to
flip roll repeat tile split array_split pad take take_along_axis put_along_axis where nonzero flatnonzero argwhere
compress diagonal diag tril triu trace fill_diagonal copyto sort argsort partition argpartition searchsorted digitize
unique bincount isin dot vdot inner outer tensordot kron clip round nan_to_num interp diff allclose isclose
array_equal packbits unpackbits zeros_like ones_like empty_like full_like ascontiguousarray copy
""".split()  # the first argument is an array
JOINS = "concatenate stack hstack vstack".split()  # the first argument is a sequence of arrays
VARIADIC = "einsum broadcast_arrays atleast_1d atleast_2d meshgrid".split()  # every argument is an array, or a text
CREATE = "zeros ones empty full arange linspace eye identity tri indices tril_indices triu_indices".split()
HOST_VALUED = "ndim shape size result_type can_cast promote_types issubdtype isscalar shares_memory".split()
LINALG = "cholesky det eigh eigvalsh inv lstsq matrix_rank norm pinv qr slogdet solve svd".split()
UFUNCS = """
add subtract multiply divide true_divide floor_divide remainder mod fmod power negative positive reciprocal absolute abs
fabs sign rint floor ceil trunc copysign hypot exp exp2 expm1 log log2 log10 log1p logaddexp logaddexp2 sqrt cbrt square
sin cos tan arcsin arccos arctan arctan2 sinh cosh tanh arcsinh arccosh arctanh maximum minimum fmax fmin isfinite isinf
isnan signbit ldexp frexp modf nextafter equal not_equal less less_equal greater greater_equal logical_and logical_or
logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not invert left_shift right_shift matmul
""".split()
HOST_NAMES = """
bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 int_ intp float16 float32 float64 dtype finfo iinfo generic
number integer signedinteger unsignedinteger inexact floating pi e inf nan newaxis
""".split()
METHODS = """
all any argmax argmin argsort astype clip copy cumprod cumsum diagonal dot fill flatten max mean min
nonzero prod ravel repeat reshape round sort squeeze std sum swapaxes take trace transpose var view
""".split()
ATTRIBUTES = "shape dtype strides ndim size itemsize nbytes flags".split()
OPERATORS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "lshift": "left_shift", "rshift": "right_shift", "matmul": "matmul",
}  # fmt: skip
ORDER = {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal"}
UNARY = {"neg": "negative", "pos": "positive", "abs": "absolute", "invert": "invert"}
AT_TYPES = {"add": "efdiILQ", "subtract": "iI", "maximum": "fdiILQ", "minimum": "fdiILQ"}  # CuPy's atomic operations
NUMPY_ONLY = frozenset("where initial like device correction mean stable stat_length".split())  # keywords

# ---------------------------------------------------------------------------------------------------------- the wall


def _only_device(x) -> np.ndarray:
    if type(x) is ndarray:
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError("Unsupported type numpy.ndarray: move it to the device first, with xp.asarray(array)")
    raise TypeError(f"Unsupported type {type(x).__name__}: a device function takes device arrays")


def _operand(x):
    """What an elementwise function takes: a device array, or a Python or NumPy scalar."""
    return x if isinstance(x, (bool, int, float, np.number, np.bool_)) else _only_device(x)


def _host(x):
    """Any argument: device arrays unwrapped, NumPy arrays refused, settings (axes, shapes, ...) as they are."""
    if isinstance(x, (list, tuple)):
        return type(x)([_host(item) for item in x])
    return _only_device(x) if isinstance(x, (ndarray, np.ndarray)) else x


def _device(x):
    """A result of NumPy's, with scalars as 0-dimensional arrays."""
    if x is None:
        return None
    if isinstance(x, (list, tuple)):
        return type(x)(map(_device, x)) if type(x) in (list, tuple) else tuple(map(_device, x))
    host = np.asarray(x)
    if host.dtype.char not in "?bBhHiIlLqQefd":
        raise ValueError(f"Unsupported dtype {host.dtype}")
    array = object.__new__(ndarray)
    array._host = host
    return array


def _function(name: str, call, arrays=lambda args: args[:1], result=_device):
    """A device function or method, computed by NumPy's `call`; `arrays` picks those arguments that must be arrays."""

    def function(*args, out=None, **kwargs):
        if not NUMPY_ONLY.isdisjoint(kwargs) and name != "copyto":
            raise TypeError(f"cupy.{name} has no keyword argument {min(NUMPY_ONLY & kwargs.keys())!r}")
        for array in arrays(args):
            _only_device(array)
        if out is not None:
            kwargs["out"] = out if type(out) is ndarray else _only_device(out)
        with np.errstate(all="ignore"):  # a device raises no floating-point warnings
            value = call(*[_host(a) for a in args], **{k: _host(v) for k, v in kwargs.items()})
        return result(value) if out is None else out

    return function


class ufunc:
    """An elementwise function: device arrays and scalars in, a device array out."""

    def __init__(self, name: str):
        self.name, self._numpy = name, getattr(np, name)
        self.nin, self.nout = self._numpy.nin, self._numpy.nout

    def __call__(self, *args, out=None, **kwargs):
        if kwargs.keys() - {"casting", "dtype"}:
            raise TypeError(f"cupy.{self.name} has no keyword argument {min(kwargs.keys() - {'casting', 'dtype'})!r}")
        args, out = args[: self.nin], args[self.nin :] or out
        outs = (out,) if out is not None and not isinstance(out, tuple) else out
        with np.errstate(all="ignore"):
            value = self._numpy(*map(_operand, args), out=outs and tuple(map(_only_device, outs)), **kwargs)
        return _device(value) if outs is None else outs[0] if self.nout == 1 else outs

    def at(self, a, indices, b) -> None:
        target = _only_device(a)
        if target.dtype.char not in AT_TYPES.get(self.name, ""):
            raise TypeError(f"cupy.{self.name}.at does not support {target.dtype}")
        self._numpy.at(target, _key(indices), np.asarray(_operand(b)).astype(target.dtype))


def _key(key) -> tuple:
    """An index as NumPy takes it, with an Ellipsis, so that even a full integer index gives an array and no scalar."""
    parts = tuple(map(_host, key if isinstance(key, tuple) else (key,)))
    return parts if any(part is Ellipsis for part in parts) else (*parts, Ellipsis)


def _operator(name: str, reflected: bool = False, inplace: bool = False):
    call = ufunc(name)

    def operator(self, other):
        if type(other) is not ndarray and getattr(other, "__array_ufunc__", self) is None:
            return NotImplemented  # a type that wraps arrays (a Tensor) answers instead
        return call(other, self) if reflected else call(self, other, out=self if inplace else None)

    return operator


def _waits(what: str):
    def refuse(self, *args):
        raise TypeError(f"{what} of a device array waits for the device and copies; write .item() where that is meant")

    return refuse


class ndarray:
    """An array on the device. It is no numpy.ndarray and does not turn into one unless asked (`.get()`)."""

    __slots__ = ("__weakref__", "_host")
    __hash__ = None
    __array_ufunc__ = None  # numpy_array * device_array comes to __rmul__, which refuses it

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to copy it.")

    def __array_function__(self, func, types, args, kwargs):
        raise TypeError(f"numpy.{func.__name__} was given a device array; use the array's own library, xp_of(array)")

    T = property(lambda self: _device(self._host.T))
    base = property(lambda self: _device(self._host.base))  # None for an array that owns its memory
    get, item, tolist = (lambda self, name=name: getattr(self._host, name)() for name in ("copy", "item", "tolist"))

    def __getitem__(self, key) -> ndarray:
        return _device(self._host[_key(key)])

    def __setitem__(self, key, value) -> None:
        key, value = _key(key), _operand(value)
        self._host[key] = value
        if isinstance(value, np.ndarray) and any(isinstance(part, np.ndarray) and part.dtype != bool for part in key):
            stored = self._host[key]
            meant = np.empty_like(stored)
            meant[...] = value
            if not np.array_equal(stored, meant, equal_nan=True):
                raise ValueError("an index is repeated with different values: which one a device stores is undefined")

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __deepcopy__(self, memo) -> ndarray:
        return self.copy()

    __float__, __int__, __bool__ = _waits("float()"), _waits("int()"), _waits("bool()")
    __index__, __format__ = _waits("use as an integer"), _waits("formatting")


for _name in ATTRIBUTES:
    setattr(ndarray, _name, property(lambda self, name=_name: getattr(self._host, name)))
for _name in METHODS:
    setattr(ndarray, _name, _function(_name, getattr(np.ndarray, _name)))
for _name, _ufunc in (OPERATORS | ORDER).items():
    setattr(ndarray, f"__{_name}__", _operator(_ufunc))
for _name, _ufunc in OPERATORS.items():
    setattr(ndarray, f"__r{_name}__", _operator(_ufunc, reflected=True))
    if _name != "matmul":  # CuPy has no __imatmul__ : a @= b makes a new array
        setattr(ndarray, f"__i{_name}__", _operator(_ufunc, inplace=True))
for _name, _ufunc in UNARY.items():
    setattr(ndarray, f"__{_name}__", _function(_name, getattr(np, _ufunc)))


def _poisoned(make, *args, **kwargs) -> np.ndarray:
    host = make(*args, **kwargs)
    host.fill({"f": np.nan, "b": True}[host.dtype.kind] if host.dtype.kind in "fb" else np.iinfo(host.dtype).max)
    return host


def asarray(a, dtype=None, order=None, *, copy=None) -> ndarray:
    """The array on the device: an explicit copy from the host, or `a` itself if it is there already."""
    if type(a) is ndarray and not copy and dtype in (None, a.dtype):
        return a
    return _device(np.array(a if isinstance(a, np.ndarray) else _host(a), dtype=dtype, order=order or "K", copy=True))


array = partial(asarray, copy=True)


def asnumpy(a) -> np.ndarray:
    """A copy in host memory (a NumPy array passes through)."""
    return a if isinstance(a, np.ndarray) else a.get()


def default_rng(seed=None) -> SimpleNamespace:
    """A part of what CuPy's Generator has of NumPy's (it has no normal, permutation, choice or shuffle)."""
    rng, names = np.random.default_rng(seed), ("random", "standard_normal", "integers")
    return SimpleNamespace(**{name: _function(name, getattr(rng, name), lambda args: ()) for name in names})


DIFFERENT = {"empty": partial(_poisoned, np.empty), "empty_like": partial(_poisoned, np.empty_like)}


def _table(names, source, *options) -> dict:
    return {name: _function(name, DIFFERENT.get(name) or getattr(source, name), *options) for name in names}


NAMESPACE = {
    **_table(FUNCTIONS, np),
    **_table(JOINS, np, lambda args: args[0]),
    **_table(VARIADIC, np, lambda args: [a for a in args if not isinstance(a, str)]),
    **_table(CREATE, np, lambda args: ()),
    **_table(HOST_VALUED, np, lambda args: (), lambda value: value),
    **{name: ufunc(name) for name in UFUNCS},
    **{name: getattr(np, name) for name in HOST_NAMES},
    "linalg": SimpleNamespace(**_table(LINALG, np.linalg), LinAlgError=np.linalg.LinAlgError),
    "random": SimpleNamespace(default_rng=default_rng),
}


def __getattr__(name: str):
    try:
        return NAMESPACE[name]
    except KeyError:
        raise AttributeError(f"cupy has no {name!r}, or the stand-in leaves it out") from None
