"""mpillm: batches of LLM requests on CPUs, over MPI."""

__version__ = "0.1.0"
