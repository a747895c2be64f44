"""Loads a serialised program onto other devices than it was compiled for, of the same kind and as many.

What JAX has for this (`deserialize_and_load`) finds devices by their numbers, and has XLA run the program where it was
compiled for; both are told otherwise here. Whatever JAX changes about that raises, and the program is compiled.
"""

import io
import pickle
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled
from jaxlib import xla_client


def load_onto(
    devices: Sequence[jax.Device], compiled_for: Sequence[int], program: bytes, arguments: Any, results: Any
) -> Compiled:
    """Load a program onto `devices`, in the order of those that it was compiled for.

    Args:
        devices: of one mesh.
        compiled_for: the devices' numbers in `program`.
        program: as `jax.experimental.serialize_executable.serialize` made it; must be trusted.
        arguments: the structure of its arguments, as made there.
        results: the structure of its results, as made there.
    """
    executable, described, no_kwargs = _Moving(program, dict(zip(compiled_for, devices, strict=True))).load()
    return Compiled(executable.load(), [], arguments.unflatten(described), results, no_kwargs=no_kwargs)


class _Moving(pickle.Unpickler):
    """Reads what JAX's pickler wrote, with other devices in place of those that it names."""

    def __init__(self, data: bytes, devices: dict[int, jax.Device]) -> None:
        super().__init__(io.BytesIO(data))
        self._devices = devices

    def persistent_load(self, pid: Any) -> Any:
        """Return what JAX's pickler has left to its reader: executables, devices and the client."""
        match pid:
            case ("device", number):
                return self._devices[number]
            case ("client",):
                return self._client
            case ("exec", data):
                return self._client.deserialize_executable(data, self._list, self._options)
        raise pickle.UnpicklingError(f"JAX's pickler wrote {pid!r}, which is not known here")

    @property
    def _client(self) -> Any:
        return next(iter(self._devices.values())).client

    @property
    def _list(self) -> Any:
        return xla_client.DeviceList(tuple(self._devices.values()))

    @property
    def _options(self) -> Any:
        """Options of which only where the program runs counts: it is compiled."""
        options = xla_client.CompileOptions()
        options.num_replicas, options.num_partitions = 1, len(self._devices)
        numbers = [device.id for device in self._devices.values()]
        options.device_assignment = xla_client.DeviceAssignment.create(np.array([numbers]))
        return options
