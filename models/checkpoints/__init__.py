"""Files that hold a model: GGUF, Hugging Face directories, Orbax."""
