"""The engine: which sequences run in a step, what a step says to all ranks, and how tokens are drawn."""
