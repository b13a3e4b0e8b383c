"""Tools beside a run: packing a model, and checking a machine or a cluster."""
