"""Eight CPU devices for every test, set before anything can initialise a JAX backend; and the tiny model on disk."""

import jax
import pytest
from helpers.tiny_gguf import write_tiny_gguf

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
