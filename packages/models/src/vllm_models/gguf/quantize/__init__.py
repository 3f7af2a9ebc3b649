"""Weights to the blocks of GGUF, a few thousand blocks at a time; the reverse is `dequantize`."""
