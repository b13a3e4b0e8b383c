"""Inputs of other forms than an object a line: their rows become lines of JSON, in bounded memory."""
