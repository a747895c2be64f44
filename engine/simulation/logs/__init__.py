"""What a run's decision log tells: its replay, what took how long and why, and what might have been. No JAX."""
