"""Triton's part of the operators: kernels of one launch. A package, so that it is imported only where Triton is.

Arithmetic and results are those of `dmquant.formats`, bit for bit: quotients are rounded to nearest, and a product
before a sum is exact, so that fused multiply-adds change nothing, but for the bias of `finishing`. With
TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""
