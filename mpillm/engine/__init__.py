"""The engine: it schedules sequences, sends each step to all ranks, and draws tokens from their replies."""
