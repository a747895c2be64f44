"""KV pages: which are free, which requests hold them, and which prompts find them again. No JAX."""
