"""Kernels for GPUs: one module here is one kernel, its `KERNEL`, or what kernels share."""
