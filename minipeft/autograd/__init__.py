"""Reverse-mode automatic differentiation: `tensor` is the engine, `ops` the book of derivatives, `gradcheck` the judge."""
