"""What holds for every test: eight CPU devices, set before anything can initialise a JAX backend, and Ctrl-C as it is
in the foreground; and the tiny model on disk."""

import signal

import jax
import pytest
from helpers.tiny_gguf import write_tiny_gguf

jax.config.update("jax_num_cpu_devices", 8)
# A shell has what it runs in the background ignore Ctrl-C, children included; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
