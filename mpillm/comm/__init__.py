"""How ranks share a model and talk: the grid of stages and shards, the MPI world, and its messages."""
