"""What the CPU kernels reach, as shares of what the machine can do in the same run."""
