"""Who holds which KV page. No JAX."""
