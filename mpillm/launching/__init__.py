"""Starting ranks with mpiexec: its command and its hostfiles, and the supervisor that starts a run again."""
