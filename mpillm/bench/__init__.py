"""Benchmarks: the limits of this machine, and how close the kernels, the engine and a peer come to them."""
