"""The Python interface: `LLM`, `Job` and `read_results`, as `mpillm` exports them."""
