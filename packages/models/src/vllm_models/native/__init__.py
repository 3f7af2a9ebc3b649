"""Kernels for CPUs in C, built by the system's compiler at first use, with their packed weights.

Without a compiler, or with VLLM_LITE_NATIVE=off, nothing here is used and torch computes instead.
"""
