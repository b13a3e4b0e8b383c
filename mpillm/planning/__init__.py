"""What a run takes, computed before it: its layout, the memory of each rank, the size of its steps, and its time."""
