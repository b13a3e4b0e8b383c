"""Paging: what a rank holds of the weights, in bounded caches that read ahead of their use."""
