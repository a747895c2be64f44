"""The production scheduler without devices. No JAX."""
