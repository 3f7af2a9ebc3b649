"""Kernels for GPUs in Triton: each file has the kernel, what launches it, and its reference.

Nothing here is imported before a tensor lies on a GPU, see `launch.kernels_for`.
"""
