"""Kernels for CPUs: one module here is one kernel, its `KERNEL`, or what kernels share."""
