"""The tiny model, made once; the real one, where it has been fetched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loading import load_on_one_device
from twinmesh.models.checkpoints.catalog import resolve_model
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.decoder import abstract_params, bind, dense_hidden
from twinmesh.models.errors import CheckpointError


@pytest.fixture(scope="session")
def tiny(tiny_path):
    return open_checkpoint(tiny_path)


@pytest.fixture(scope="session")
def smollm2():
    try:
        return open_checkpoint(resolve_model("smollm2"))
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def dense_forward():
    """`dense_forward(checkpoint, dtype)` -> ids [T] -> logits [T, V] as numpy; compiles once per length."""

    def make(checkpoint, dtype=jnp.float32):
        graphdef, _ = abstract_params(checkpoint.config, dtype)
        params = tuple(load_on_one_device(checkpoint, dtype).values())

        @jax.jit
        def forward(params, ids):
            decoder = bind(graphdef, params)
            return decoder.logits(dense_hidden(decoder, ids))

        return lambda ids: np.asarray(forward(params, jnp.asarray(ids, jnp.int32)))

    return make
