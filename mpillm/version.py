"""The version of mpillm."""

__version__ = "0.1.0"
