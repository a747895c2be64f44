"""A checkpoint's parameters on one device."""

import jax
from twinmesh.models.decoder import abstract_params


def load_on_one_device(checkpoint, dtype):
    """Load every parameter onto JAX's default device: arrays by path, in the order of `abstract_params`."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    specs = abstract_params(checkpoint.config, dtype).specs
    wanted = {
        path: (jax.ShapeDtypeStruct(spec.value.shape, spec.value.dtype, sharding=device),)
        for path, spec in specs.items()
    }
    loaded = {path: array for path, (array,) in checkpoint.load(wanted)}
    return {path: loaded[path] for path in specs}
