"""Files and memory: mapping, direct reads, and what the operating system says about both."""
