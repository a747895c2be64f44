"""Eight CPU devices for every test, set before anything can initialise a JAX backend."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
