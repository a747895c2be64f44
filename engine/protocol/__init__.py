"""The language between control plane and device plane: plain data. No JAX, nothing of the engine imported."""
