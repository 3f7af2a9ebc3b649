"""Kernels for GPUs in Triton: what launches them, and what they are compared with.

`kernels` lists the launchers that layers call. `launch`, `layout`, `spans` and `stacked` are what
the host has to know without them: they import no Triton, which a process that computes on a CPU
never does.
"""
