"""Runs a job: the session of all ranks, the states of a run, and the division of lines over replicas."""
