"""Reads Orbax checkpoints of the decoder's own parameters, as `twinmesh convert` writes them, shard by shard.

Parameters are cast to the wanted dtype as they are read. Only checkpoints written by `orbax_writer.py` are read:
another tool's parameters have other names and shapes. `orbax_format.py` documents the format.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ...kernels_pallas.quantized import QuantizedArray
from ..decoder import abstract_params
from ..errors import CheckpointError
from ..placing import put
from ..quantized import Described, Weight, nbytes, placed
from .base import TextFiles
from .finite import check_array
from .host_memory import FileMaps
from .orbax_format import PARAMS, one_sentence, read_description, stored
from .quantized_streaming import as_floats
from .streaming import Packed, Report, Wanted, divide, ignore
from .tensor_check import check_tensors


class OrbaxCheckpoint(TextFiles):
    """A directory that `orbax_writer.write` made, checked to be whole."""

    def __init__(self, directory: Path) -> None:
        """Open `directory` without Orbax, which would start JAX before the engine has requested its devices.

        Raises:
            CheckpointError: a description that is damaged or of another version, or files that are missing or
                truncated.
        """
        self.path = directory
        description = read_description(directory)
        self.name, self.config, self.dtype = description.name, description.config, jnp.dtype(description.dtype)
        self.formats: Mapping[str, str] = description.formats
        self.method = description.method
        known = abstract_params(self.config, self.dtype, self.formats).formats if self.formats else {}
        for path in self.formats.keys() - known.keys():
            raise CheckpointError(
                f"{directory} names a format of {path[:80]!r}, which no matrix of the model is called."
            )
        self._params = directory.absolute() / PARAMS

    @property
    def dequantized(self) -> Mapping[str, Packed]:
        """Return none: all that is stored quantised can stay so."""
        return {}

    @property
    def stored_bytes(self) -> int:
        """Return the bytes that the parameters take in the files, which are not compressed."""
        return sum(map(nbytes, self._described().values()))

    def _described(self) -> dict[str, Described]:
        specs = abstract_params(self.config, self.dtype, self.formats).specs
        return {path: spec.value for path, spec in specs.items()}

    def load(
        self,
        wanted: Wanted,
        *,
        allow_nonfinite: bool = False,
        maps: FileMaps | None = None,
        report: Report = ignore,
    ) -> Iterator[tuple[str, tuple[Weight, ...]]]:
        """Load parameters straight onto devices; see `Checkpoint.load`. Nothing is mapped: arrays lie in chunks."""
        checkpointer, described = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()), self._described()
        self._check_params(checkpointer, described)
        floats, _ = divide(wanted)
        loose = {path: places for path, places in floats.items() if path in self.formats}
        rest = {path: places for path, places in wanted.items() if path not in loose}
        for path, parameters in self._load_as_stored(checkpointer, rest, allow_nonfinite):
            report(nbytes(described[path]))
            yield path, parameters
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        for path, places in loose.items():
            whole = {path: (placed(described[path], lambda _: host),)}
            for _, (quantized,) in self._load_as_stored(checkpointer, whole, allow_nonfinite):
                host_floats = as_floats(jax.tree.map(np.asarray, quantized), places[0].dtype)
                arrays = tuple(put(host_floats, place.sharding) for place in places)
                if not allow_nonfinite:
                    check_array(self._params, path, arrays[0])
                report(nbytes(described[path]))
                yield path, jax.block_until_ready(arrays)

    def _load_as_stored(
        self, checkpointer: ocp.Checkpointer, wanted: Wanted, allow_nonfinite: bool
    ) -> Iterator[tuple[str, tuple[Weight, ...]]]:
        for paths in _batches({path: nbytes(places[0]) for path, places in wanted.items()}):
            meshes = list(zip(*(wanted[path] for path in paths), strict=True))
            restored = [self._restore(checkpointer, dict(zip(paths, places, strict=True))) for places in meshes]
            for path in paths:
                if not allow_nonfinite:  # those of the other meshes are the same
                    for name, array in stored(path, restored[0][path]).items():
                        check_array(self._params, name, array)
                yield path, tuple(parameters.pop(path) for parameters in restored)

    def _check_params(self, checkpointer: ocp.Checkpointer, described: Mapping[str, Described]) -> None:
        """Check that exactly the arrays of these parameters are stored."""
        with one_sentence(f"{self._params} cannot be read"):
            found = checkpointer.metadata(self._params).item_metadata.tree
        expected = {name: x.shape for path, like in described.items() for name, x in stored(path, like).items()}
        check_tensors(self._params, {name: tuple(array.shape) for name, array in found.items()}, expected)

    def _restore(self, checkpointer: ocp.Checkpointer, places: Mapping[str, Described]) -> dict[str, Weight]:
        item = {name: like for path, place in places.items() for name, like in stored(path, place).items()}
        args = {
            name: ocp.ArrayRestoreArgs(sharding=like.sharding, dtype=like.dtype, global_shape=like.shape)
            for name, like in item.items()
        }
        request = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
        with one_sentence(f"{self._params}: {', '.join(places)[:80]} cannot be restored"):
            arrays: dict[str, jax.Array] = checkpointer.restore(self._params, args=request)
            jax.block_until_ready(arrays)
        return {path: _gathered(arrays, path, place) for path, place in places.items()}


def _gathered(arrays: Mapping[str, jax.Array], path: str, place: Described) -> Weight:
    """Take a parameter's arrays out of those that were restored."""
    if not isinstance(place, QuantizedArray):
        return arrays[path]
    return place.with_parts({name: arrays[f"{path}.{name}"] for name, _ in place.parts()})


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Group paths to restore together, the largest first.

    While it restores, TensorStore holds about twice as much again. So the largest parameter is restored while little
    is loaded, and the rest in batches of a quarter of its size: one by one would cost some 10 ms each.
    """
    batch: list[str] = []
    most, total = max(sizes.values(), default=0) // 4, 0
    for path in sorted(sizes, key=lambda path: sizes[path], reverse=True):
        if batch and total + sizes[path] > most:
            yield batch
            batch, total = [], 0
        batch.append(path)
        total += sizes[path]
    if batch:
        yield batch
