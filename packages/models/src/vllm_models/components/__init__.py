"""Layers that architectures are composed of. They know shapes and weights, not batches."""
