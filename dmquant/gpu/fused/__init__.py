"""Triton's part of the operators: kernels of one launch. A package, so that it is imported only where Triton is.

Arithmetic and results are those of `dmquant.formats`, bit for bit: quotients are rounded to nearest, and nothing may
contract the two sums with an anchor. With TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""
