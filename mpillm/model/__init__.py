"""The decoder of all architectures: they differ in data, which `ModelConfig` holds."""
