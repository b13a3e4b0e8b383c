"""Running a job: the model to use, the plan, the memory, the session of all ranks, and the runner that leads it."""
