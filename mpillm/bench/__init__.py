"""Measuring: what this machine could do, what the kernels and the engine do with it, and what a peer does with it."""
