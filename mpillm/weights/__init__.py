"""Weights: model files as they are, read slice by slice, made kernel-ready in a bounded cache."""
