"""Ranks that differ, in random layouts: `mpiexec -n 4 python -m tests.unequal`."""
