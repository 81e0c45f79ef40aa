"""A stand-in for a device's array library that needs no GPU: NumPy behind a wall.

It catches, wherever the tests run, habits that NumPy forgives and that on a device are errors or cost time in silence:

1. Host and device arrays never meet. A NumPy array given to a device function, or a device array given to NumPy, raises
   TypeError. Only `asarray` and `array` move there, and `.get()`, `.item()`, `.tolist()` and `asnumpy` back.
2. What makes a Python number of a device array (`float()`, `int()`, `bool()`, `if`, formatting) raises TypeError: CuPy
   copies it, and waits for the device.
3. Reductions and integer indexing give 0-dimensional device arrays, never scalars.
4. What a device leaves undefined fails: `empty` holds NaN or the largest integer, an index out of range raises
   IndexError, and one element that is assigned two different values raises ValueError.

The rest only CuPy itself can say, with `pytest --device cupy`: which functions, keywords and dtypes it has, and its
last digits. Here is all of NumPy; `a[mask]`, `nonzero`, `flatnonzero`, `argwhere` and `unique` pass, though on a device
they wait; subnormal numbers are not flushed to zero; and sums are made in one order, where atomics have none.
"""

from __future__ import annotations

from functools import cache, partial
from types import ModuleType, SimpleNamespace

import numpy as np

OPERATORS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "lshift": "left_shift", "rshift": "right_shift", "matmul": "matmul",
}  # fmt: skip
ORDER = {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal"}
UNARY = {"neg": "negative", "pos": "positive", "abs": "absolute", "invert": "invert"}


# ---------------------------------------------------------------------------------------------------------- the wall


def _host(x):
    """An argument as NumPy takes it: device arrays unwrapped, NumPy arrays refused, the rest as it is."""
    if type(x) is ndarray:
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError("Unsupported type numpy.ndarray: move it to the device first, with xp.asarray(array)")
    return type(x)([_host(item) for item in x]) if isinstance(x, (list, tuple)) else x


def _device(x):
    """A result of NumPy's: arrays wrapped, and scalars as 0-dimensional arrays."""
    if type(x) is not np.ndarray:
        if isinstance(x, (list, tuple)):
            return type(x)(map(_device, x)) if type(x) in (list, tuple) else tuple(map(_device, x))
        if not isinstance(x, (np.ndarray, np.generic)):
            return x
    array = object.__new__(ndarray)
    array._host = np.asarray(x)
    return array


def _wrapped(x):
    """What NumPy has under a name, as the device has it."""
    if isinstance(x, ModuleType):
        return SimpleNamespace(**{name: _wrapped(getattr(x, name)) for name in x.__all__})
    if isinstance(x, type) or not callable(x):
        return _device(x) if isinstance(x, np.ndarray) else x

    def function(*args, **kwargs):
        with np.errstate(all="ignore"):  # a device raises no floating-point warnings
            value = x(*map(_host, args), **{k: _host(v) for k, v in kwargs.items()} if kwargs else kwargs)
        for a in (*args, *kwargs.values()):
            if type(a) is ndarray and a._host is value:  # an out=
                return a
        return _device(value)

    if isinstance(x, np.ufunc):
        function.at = _wrapped(x.at)
    return function


def _key(key) -> tuple:
    """An index as NumPy takes it, with an Ellipsis, so that even a full integer index gives an array and no scalar."""
    parts = tuple(map(_host, key if isinstance(key, tuple) else (key,)))
    return parts if any(part is Ellipsis for part in parts) else (*parts, Ellipsis)


def _operator(name: str, reflected: bool = False, inplace: bool = False):
    call = _wrapped(getattr(np, name))

    def operator(self, other):
        if type(other) is not ndarray and getattr(other, "__array_ufunc__", self) is None:
            return NotImplemented  # a type that wraps arrays (a Tensor) answers instead
        return call(other, self) if reflected else call(self, other, out=self) if inplace else call(self, other)

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

    dtype, strides = property(lambda self: self._host.dtype), property(lambda self: self._host.strides)
    shape, ndim, size = (property(lambda self, name=name: getattr(self._host, name)) for name in ("shape", "ndim", "size"))
    get, item, tolist = (lambda self, name=name: getattr(self._host, name)() for name in ("copy", "item", "tolist"))

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(f"a device array has no {name!r}")
        return _wrapped(getattr(self._host, name))

    def __getitem__(self, key) -> ndarray:
        return _device(self._host[_key(key)])

    def __setitem__(self, key, value) -> None:
        key, value = _key(key), _host(value)
        self._host[key] = value
        if isinstance(value, np.ndarray) and any(isinstance(part, np.ndarray) and part.dtype != bool for part in key):
            stored = self._host[key]
            if not np.array_equal(stored, np.broadcast_to(value, stored.shape).astype(stored.dtype), equal_nan=True):
                raise ValueError("an index is repeated with different values: which one a device stores is undefined")

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __deepcopy__(self, memo) -> ndarray:
        return self.copy()

    __float__, __int__, __bool__ = _waits("float()"), _waits("int()"), _waits("bool()")
    __index__, __format__ = _waits("use as an integer"), _waits("formatting")


for _name, _ufunc in (OPERATORS | ORDER).items():
    setattr(ndarray, f"__{_name}__", _operator(_ufunc))
for _name, _ufunc in OPERATORS.items():
    setattr(ndarray, f"__r{_name}__", _operator(_ufunc, reflected=True))
    if _name != "matmul":  # CuPy has no __imatmul__ : a @= b makes a new array
        setattr(ndarray, f"__i{_name}__", _operator(_ufunc, inplace=True))
for _name, _ufunc in UNARY.items():
    setattr(ndarray, f"__{_name}__", _wrapped(getattr(np, _ufunc)))


def asarray(a, dtype=None, order=None, *, copy=None) -> ndarray:
    """The array on the device: an explicit copy from the host, or `a` itself if it is there already."""
    if type(a) is ndarray and not copy and dtype in (None, a.dtype):
        return a
    return _device(np.array(a if isinstance(a, np.ndarray) else _host(a), dtype=dtype, order=order or "K", copy=True))


array = partial(asarray, copy=True)


def asnumpy(a) -> np.ndarray:
    """A copy in host memory (a NumPy array passes through)."""
    return a if isinstance(a, np.ndarray) else a.get()


def _poisoned(make, *args, **kwargs) -> ndarray:
    host = make(*map(_host, args), **kwargs)
    host.fill({"f": np.nan, "b": True}[host.dtype.kind] if host.dtype.kind in "fb" else np.iinfo(host.dtype).max)
    return _device(host)


empty, empty_like = partial(_poisoned, np.empty), partial(_poisoned, np.empty_like)


def _generator(seed=None) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    return SimpleNamespace(**{name: _wrapped(getattr(rng, name)) for name in ("random", "standard_normal", "integers")})


random = SimpleNamespace(default_rng=_generator)


def __getattr__(name: str):
    if name.startswith("_"):
        raise AttributeError(name)
    return _of_numpy(name)


_of_numpy = cache(lambda name: _wrapped(getattr(np, name)))
