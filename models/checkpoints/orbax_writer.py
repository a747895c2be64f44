"""Writes Orbax checkpoints, one parameter at a time from the source.

The directory is made under a temporary name beside the final one and renamed, so that an interruption leaves nothing
half-made. `orbax_format.py` documents the format.
"""

import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.typing import DTypeLike
from orbax.checkpoint import type_handlers

from ..decoder import abstract_params
from ..errors import CheckpointError
from ..text.tokenizer_files import save_tokenizer
from .base import Checkpoint
from .orbax_format import FORMAT, PARAMS, Description, nbytes, one_sentence

# Called after each parameter that was written, with its length in bytes.
type Progress = Callable[[int], object]


def write(
    checkpoint: Checkpoint,
    directory: Path,
    dtype: DTypeLike | None = None,
    progress: Progress = lambda nbytes: None,
    chunk_bytes: int = 4 << 20,
    *,
    allow_nonfinite: bool = False,
) -> None:
    """Write `checkpoint` as an Orbax checkpoint.

    Args:
        checkpoint: any source.
        directory: the new directory; it must not exist, or be empty.
        dtype: of the stored parameters; the checkpoint's own by default.
        progress: called with the length in bytes of each parameter as it is written.
        chunk_bytes: the most that is stored together, and so read together by a device that needs part of it.
        allow_nonfinite: write weights that are NaN or infinite.

    Raises:
        CheckpointError: the source cannot be read or has a weight that is not finite, `directory` is there and not
            empty, or it cannot be written.
        OSError: there is no place for the directory.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists and is not an empty directory: give another name.")
    dtype = checkpoint.dtype if dtype is None else jnp.dtype(dtype)
    parent = directory.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".convert-") as scratch:
        out = Path(scratch) / "checkpoint"
        out.mkdir()
        save_tokenizer(checkpoint.tokenizer(), checkpoint.chat_template(), out)
        with one_sentence(f"{directory} cannot be written"):
            _write_params(checkpoint, out / PARAMS, dtype, progress, chunk_bytes, allow_nonfinite)
        files = {path.relative_to(out).as_posix(): path.stat().st_size for path in out.rglob("*") if path.is_file()}
        Description(FORMAT, checkpoint.name, dtype.name, checkpoint.config, files).write(out)
        out.replace(directory)


def _write_params(
    checkpoint: Checkpoint,
    directory: Path,
    dtype: jnp.dtype,
    progress: Progress,
    chunk_bytes: int,
    allow_nonfinite: bool,
) -> None:
    """Write all parameters, holding one at a time.

    Orbax asks for the values of all parameters at once, so it gets stand-ins, and each array when its turn comes. It
    writes from a thread of its own, which an interruption must wait for: otherwise files would appear in a directory
    that is being removed.
    """
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    wanted = {
        path: (jax.ShapeDtypeStruct(spec.value.shape, spec.value.dtype, sharding=place),)
        for path, spec in abstract_params(checkpoint.config, dtype).specs.items()
    }
    stopping = threading.Event()

    def load(paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        some = {path: wanted[path] for path in paths}
        for path, (array,) in checkpoint.load(some, allow_nonfinite=allow_nonfinite):
            if stopping.is_set():
                return
            yield path, np.asarray(array)
            progress(array.nbytes)

    handlers = type_handlers.create_type_handler_registry(
        (_Pending, _StreamingHandler(load)), (jax.Array, type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
    request = ocp.args.PyTreeSave(
        {path: _Pending(path, like) for path, (like,) in wanted.items()},
        save_args={path: ocp.SaveArgs(chunk_byte_size=chunk_bytes) for path in wanted},
    )
    thread = ThreadPoolExecutor(1)
    try:
        thread.submit(ocp.Checkpointer(handler).save, directory, args=request).result()
    finally:
        _end(thread, stopping)


def _end(thread: ThreadPoolExecutor, stopping: threading.Event) -> None:
    """Wait for the thread's current parameter and end it, however often Ctrl-C is pressed meanwhile."""
    while True:
        try:
            stopping.set()
            thread.shutdown()
            return
        except KeyboardInterrupt:
            continue


class _Pending:
    """Stands in for a parameter that has not been read yet."""

    def __init__(self, path: str, like: jax.ShapeDtypeStruct) -> None:
        self.path, self.shape, self.dtype = path, like.shape, like.dtype
        self.ndim, self.size, self.nbytes = len(like.shape), like.size, nbytes(like)


class _StreamingHandler(type_handlers.NumpyHandler):  # type: ignore[misc]
    """Writes parameters as numpy arrays, each as it is read, and waits for it before the next is read."""

    def __init__(self, load: Callable[[Iterable[str]], Iterator[tuple[str, np.ndarray]]]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._load = load

    async def serialize(
        self, values: Sequence[_Pending], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        """Write `values`; the futures that are returned are done."""
        done: list[Any] = []
        options = dict(zip((value.path for value in values), zip(infos, args or (), strict=True), strict=True))
        for path, array in self._load(options):
            info, arg = options[path]
            for future in await super().serialize([array], [info], [arg]):
                future.result()
                done.append(future)
        return done
