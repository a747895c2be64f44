"""The loop: events to the scheduler, actions to an executor, tokens to callers. No JAX."""
