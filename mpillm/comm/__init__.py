"""How ranks talk to each other: the MPI world, its messages, its deadlines, and what is done about lost ranks."""
