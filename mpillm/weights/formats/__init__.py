"""Model files as they are published: Hugging Face directories (safetensors) and GGUF files, read slice by slice."""
