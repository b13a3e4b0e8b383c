"""The communication of ranks: the MPI world, its messages, its deadlines, and the recovery from lost ranks."""
