"""Reverse-mode automatic differentiation: `tensor` is the engine, `ops` the book of derivatives, `gradcheck` the judge."""

from . import ops as ops  # gives Tensor its operators: whoever imports the engine has them

