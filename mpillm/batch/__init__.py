"""A batch: the input's lines, the request bodies of each endpoint, the engine's requests, and the answers."""
