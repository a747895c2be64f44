"""Reads Orbax checkpoints of the decoder's own parameters, as `twinmesh convert` writes them, shard by shard.

Parameters are cast to the wanted dtype as they are read. Only checkpoints written by `orbax_writer.py` are read:
another tool's parameters have other names and shapes. `orbax_format.py` documents the format.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ..decoder import abstract_params
from .base import TextFiles
from .finite import check_array
from .host_memory import FileMaps
from .orbax_format import PARAMS, nbytes, one_sentence, read_description
from .streaming import Report, Wanted, ignore
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
        self._params = directory.absolute() / PARAMS

    @property
    def stored_bytes(self) -> int:
        """Return the bytes that the parameters take in the files, which are not compressed."""
        return sum(self._stored().values())

    def _stored(self) -> dict[str, int]:
        specs = abstract_params(self.config, self.dtype).specs
        return {path: nbytes(spec.value) for path, spec in specs.items()}

    def load(
        self,
        wanted: Wanted,
        *,
        allow_nonfinite: bool = False,
        maps: FileMaps | None = None,
        report: Report = ignore,
    ) -> Iterator[tuple[str, tuple[jax.Array, ...]]]:
        """Load parameters straight onto devices; see `Checkpoint.load`. Nothing is mapped: arrays lie in chunks."""
        stored = self._stored()
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        self._check_params(checkpointer)
        for paths in _batches({path: nbytes(places[0]) for path, places in wanted.items()}):
            meshes = zip(*(wanted[path] for path in paths), strict=True)
            restored = [self._restore(checkpointer, dict(zip(paths, places, strict=True))) for places in meshes]
            for path in paths:
                if not allow_nonfinite:
                    check_array(self._params, path, restored[0][path])  # those of the other meshes are the same
                report(stored[path])
                yield path, tuple(arrays.pop(path) for arrays in restored)

    def _check_params(self, checkpointer: ocp.Checkpointer) -> None:
        with one_sentence(f"{self._params} cannot be read"):
            found = checkpointer.metadata(self._params).item_metadata.tree
        specs = abstract_params(self.config, self.dtype).specs
        check_tensors(
            self._params,
            {path: tuple(array.shape) for path, array in found.items()},
            {path: spec.value.shape for path, spec in specs.items()},
        )

    def _restore(
        self, checkpointer: ocp.Checkpointer, places: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        args = {
            path: ocp.ArrayRestoreArgs(sharding=place.sharding, dtype=place.dtype, global_shape=place.shape)
            for path, place in places.items()
        }
        request = ocp.args.PyTreeRestore(item=dict(places), restore_args=args, partial_restore=True)
        with one_sentence(f"{self._params}: {', '.join(places)[:80]} cannot be restored"):
            arrays: dict[str, jax.Array] = checkpointer.restore(self._params, args=request)
            jax.block_until_ready(arrays)
        return arrays


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
