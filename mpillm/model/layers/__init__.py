"""The kinds of parts that layers are made of: each class owns its tensors, its cuts, its cache and how it computes."""
