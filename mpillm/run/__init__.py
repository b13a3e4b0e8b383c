"""Running a job: the session of all ranks, the runner that leads it, and how replicas share the lines."""
