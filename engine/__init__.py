"""The engine: control plane (decides, no JAX) and device plane (does)."""
