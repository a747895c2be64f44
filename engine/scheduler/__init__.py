"""Policy: what runs where, and when. No JAX, no clock."""
