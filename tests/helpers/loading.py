"""A checkpoint's parameters on one device."""

import jax
from twinmesh.models.decoder import abstract_params
from twinmesh.models.quantized import placed


def load_on_one_device(checkpoint, dtype, *, formats=None, **options):
    """Load every parameter onto JAX's default device: by path, in the order of `abstract_params`.

    `formats` are those that stay quantised; `options` are those of `load`.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    specs = abstract_params(checkpoint.config, dtype, formats).specs
    wanted = {path: (placed(spec.value, lambda _: device),) for path, spec in specs.items()}
    loaded = {path: array for path, (array,) in checkpoint.load(wanted, **options)}
    return {path: loaded[path] for path in specs}
