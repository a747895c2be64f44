"""What numbers weights may be kept as: plain data, without JAX, for kernels, checkpoints and plans alike."""
