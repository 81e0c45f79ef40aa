"""A linear layer that holds its weight in four bits.

    y = x Wᵀ + b,  W = q[code] c (see nf4.py)         dx = g W;  W itself is frozen and has no gradient

The graph keeps nothing but the packed codes, which the layer holds anyway: `kernels` dequantizes a tile of W at a time (on
a device all of it), in forward and again in backward. Source: QLoRA (Dettmers et al. 2023, arXiv:2305.14314, eq. 5 and 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..autograd.on_device import products_sum
from ..autograd.tensor import Tensor, kernel, op
from ..backend import Array, Rng, xp_of
from ..cuda import product
from ..nn.layers import Conv1D, Linear
from ..nn.module import Module, Parameter
from .bitsandbytes import QuantState, dequantize_4bit, quantize_4bit
from .checks import QuantError
from .kernels import Tiles, on_device, times, times_transposed


@op
def linear_4bit(x, packed, state, bias=None):
    """y = x Wᵀ + b with x [..., in] and the codes of W [out, in] (`quantize_4bit`); no gradient reaches them.

    The product has x's dtype. Raises ValueError where x does not match the weight, or is not floating-point.
    """
    _check(x, state)
    n_out, n_in = state.shape
    y = times_transposed(x.reshape(-1, n_in), packed, state)  # [n, out]
    if bias is not None:
        y += bias

    def dx(g):
        return times(g, packed, state)

    return y.reshape(*x.shape[:-1], n_out), dx, None, None, lambda g: g.reshape(-1, n_out).sum(axis=0)


@kernel(linear_4bit, "cupy")
def _linear_4bit(x, packed, state, bias=None):
    """The whole weight at once: one launch makes it, one product takes it, and its memory is free again."""
    if x.dtype.char not in "fd":
        return linear_4bit.definition(x, packed, state, bias)
    _check(x, state)
    y = product(x.reshape(-1, x.shape[-1]), on_device(packed, state, x.dtype).T)
    if bias is not None:
        y += bias

    def dx(g):
        return products_sum(g.reshape(-1, g.shape[-1]), on_device(packed, state, g.dtype))

    return y.reshape(*x.shape[:-1], y.shape[1]), dx, None, None, lambda g: g.reshape(-1, g.shape[-1]).sum(axis=0)


def _check(x: Array, state: QuantState) -> None:
    if len(state.shape) != 2 or x.ndim == 0 or x.shape[-1] != state.shape[1]:
        raise ValueError(f"linear_4bit: input {x.shape} does not match the quantized weight {tuple(state.shape)}")
    if x.dtype.kind != "f":
        raise ValueError(f"linear_4bit: the input must be floating-point, not {x.dtype}")


class Linear4bit(Module):
    """y = x Wᵀ + b with W [out_features, in_features] in four bits (bitsandbytes' Linear4bit).

    Its state dict is bitsandbytes': `weight` (packed codes), `weight.absmax`, `weight.quant_map`, with double quantization
    `weight.nested_absmax` and `weight.nested_quant_map`, `weight.quant_state.bitsandbytes__nf4` (JSON as bytes), `bias`. All
    but the bias are frozen. A GPT-2 Conv1D becomes a Linear4bit of its transposed weight, as it does in transformers.

    Args:
        packed, state: what `quantize_4bit` gave for a matrix [out, in].
        bias: the layer's parameter, kept as it is, or None.

    Raises QuantError where they do not fit each other, or the weight is no matrix.
    """

    def __init__(self, packed: Array, state: QuantState, bias: Parameter | None = None):
        state.check(packed)
        if len(state.shape) != 2:
            raise QuantError(f"the weight of a Linear4bit is a matrix [out, in], not of the shape {tuple(state.shape)}")
        if bias is not None and bias.shape != state.shape[:1]:
            raise QuantError(f"a bias of shape {bias.shape} does not match a weight {tuple(state.shape)}")
        self.weight = Parameter(packed, requires_grad=False)
        for key, array in state.as_dict(packed=True).items():
            setattr(self, f"weight.{key}", Parameter(array, requires_grad=False))
        self.bias = bias
        self._read: tuple[list[Array], QuantState] | None = None

    @classmethod
    def from_linear(
        cls, layer: Linear | Conv1D, blocksize: int = 64, quant_type: str = "nf4", compress_statistics: bool = True
    ) -> Linear4bit:
        """The layer with its weight quantized; it shares the bias. Raises QuantError as `quantize_4bit`."""
        W = layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
        return cls(*quantize_4bit(W, blocksize, quant_type, compress_statistics), layer.bias)

    @classmethod
    def from_state_dict(cls, arrays: Mapping[str, Array]) -> Linear4bit:
        """The layer from a checkpoint's entries, ours or bitsandbytes': weight, weight.absmax, ..., and bias if any.

        Raises QuantError naming what is missing or contradictory.
        """
        if "weight" not in arrays:
            raise QuantError(f"a quantized layer has an entry 'weight'; there are {', '.join(arrays) or 'none'}")
        state = QuantState.from_dict({k[len("weight.") :]: a for k, a in arrays.items() if k.startswith("weight.")})
        bias = Parameter(arrays["bias"], requires_grad=False) if "bias" in arrays else None
        return cls(arrays["weight"], state, bias)

    @property
    def quant_state(self) -> QuantState:
        """How the weight is quantized, as its arrays say."""
        entries = {name[len("weight.") :]: p.data for name, p in self.__dict__.items() if name.startswith("weight.")}
        arrays = list(entries.values())
        if self._read is None or any(a is not b for a, b in zip(arrays, self._read[0])):  # moved, or loaded again
            self._read = arrays, QuantState.from_dict(entries)
        return self._read[1]

    in_features = property(lambda self: self.quant_state.shape[1])
    out_features = property(lambda self: self.quant_state.shape[0])

    def extra_repr(self) -> str:
        s, bias = self.quant_state, "" if self.bias is None else f", bias {list(self.bias.shape)}"
        return f"weight {list(s.shape)} in {s.quant_type}, blocks of {s.blocksize}{bias}"

    def requires_grad_(self, requires_grad: bool = True) -> Linear4bit:
        """Set `requires_grad` of the bias: codes and their scales have no gradient. Returns self."""
        if self.bias is not None:
            self.bias.requires_grad = requires_grad
        return self

    def forward(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear_4bit(x, self.weight, self.quant_state, self.bias)

    def dequantize(self) -> Array:
        """The weight, [out, in], as a whole, in the dtype it had."""
        return dequantize_4bit(self.weight.data, self.quant_state)

    def tiles(self) -> Iterator[tuple[slice, Array]]:
        """(rows, float32 values [rows, in]) through the weight; each is overwritten by the next. On a device there is one."""
        packed, state = self.weight.data, self.quant_state
        if xp_of(packed).__name__ == "cupy":
            return iter([(slice(0, state.shape[0]), on_device(packed, state, "float32"))])
        return Tiles(packed, state).rows()

    def quantize(self, W: Array) -> Linear4bit:
        """A layer with another weight [out, in], quantized in the same way, and this bias.

        Raises QuantError as `quantize_4bit`.
        """
        state = self.quant_state
        packed, new = quantize_4bit(W.astype(state.dtype, copy=False), state.blocksize, state.quant_type, state.nested)
        return Linear4bit(packed, new, self.bias)
