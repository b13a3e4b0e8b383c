"""Plan a run before it starts: its layout, the memory of each rank, the size of its steps, and its time."""
