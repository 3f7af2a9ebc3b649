"""Measurements on a GPU: what it can do, kernels, the engine, and serving."""
