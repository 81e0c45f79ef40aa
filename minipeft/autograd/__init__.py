"""Reverse-mode automatic differentiation: `tensor` is the engine, `ops` the book of derivatives, `kernels` (for NumPy) and
`device` (for CuPy) hold faster forms of its definitions, `gradcheck` is the judge."""

from . import device as device  # importing the engine gives the ops (Tensor's operators) in their fastest forms
from . import kernels as kernels
from . import ops as ops
