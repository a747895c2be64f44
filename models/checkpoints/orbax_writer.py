"""Writes Orbax checkpoints, one parameter at a time from the source.

The directory is made under a temporary name beside the final one and renamed, so that an interruption leaves nothing
half-made. `orbax_format.py` documents the format.
"""

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
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
from ..quantized import Described, QuantizedArray, nbytes, placed, quantize
from ..text.tokenizer_files import save_tokenizer
from .base import Checkpoint
from .orbax_format import FORMAT, PARAMS, Description, one_sentence, stored
from .rounded import Rounding, rounded_formats

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
    rounding: Rounding | None = None,
) -> None:
    """Write `checkpoint` as an Orbax checkpoint.

    Args:
        checkpoint: any source.
        directory: the new directory; it must not exist, or be empty.
        dtype: of the stored parameters. By default the checkpoint's own, and what can be kept quantised is kept.
        progress: called with the length in bytes of each parameter as it is written.
        chunk_bytes: the most that is stored together, and so read together by a device that needs part of it.
        allow_nonfinite: write weights that are NaN or infinite.
        rounding: what projections are rounded to that would be written as floats; None: none are.

    Raises:
        CheckpointError: the source cannot be read or has a weight that is not finite, `directory` is there and not
            empty, or Orbax fails to write it; or both `allow_nonfinite` and `rounding`.
        OSError: there is no place for the directory, or the system refuses to write it: no space is left. Nothing is.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists and is not an empty directory: give another name.")
    if allow_nonfinite and rounding is not None:
        raise CheckpointError(
            f"{checkpoint.name} cannot be rounded to {rounding} with allow_nonfinite: NaN and infinity have no nearest "
            "number, leave out one of the two."
        )
    described, formats = _described(checkpoint, dtype, rounding), formats_written(checkpoint, dtype, rounding)
    tokenizer, template = checkpoint.tokenizer(), checkpoint.chat_template()
    parent = directory.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with _named(directory), tempfile.TemporaryDirectory(dir=parent, prefix=".convert-") as scratch:
        out = Path(scratch) / "checkpoint"
        out.mkdir()
        save_tokenizer(tokenizer, template, out)
        with one_sentence(f"{directory} cannot be written", directory):
            _write_params(checkpoint, out / PARAMS, described, progress, chunk_bytes, allow_nonfinite)
        files = {path.relative_to(out).as_posix(): path.stat().st_size for path in out.rglob("*") if path.is_file()}
        stored_dtype = jnp.dtype(checkpoint.dtype if dtype is None else dtype).name
        method = (checkpoint.method if dtype is None else None) or rounding
        Description(FORMAT, checkpoint.name, stored_dtype, checkpoint.config, files, formats, method).write(out)
        try:
            out.replace(directory)
        except OSError as error:  # its own sentence would name the temporary directory
            raise CheckpointError(
                f"{directory} cannot be made, {error.strerror or error}: was it written to meanwhile? Give another."
            ) from None


@contextmanager
def _named(directory: Path) -> Iterator[None]:
    """Have the system's errors name the directory that is asked for, not a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(directory)) from None


def written_bytes(checkpoint: Checkpoint, dtype: DTypeLike | None, rounding: Rounding | None = None) -> int:
    """Return the bytes of all parameters as `write` stores them."""
    return sum(map(nbytes, _described(checkpoint, dtype, rounding).values()))


def formats_written(
    checkpoint: Checkpoint, dtype: DTypeLike | None, rounding: Rounding | None = None
) -> dict[str, str]:
    """Return the format of each parameter that `write` stores quantised, by path.

    Raises:
        CheckpointError: there is nothing to round.
    """
    kept = dict(checkpoint.formats) if dtype is None else {}
    if rounding is None:
        return kept
    rounded = rounded_formats(checkpoint.config, rounding)
    if not rounded.keys() - kept.keys():
        why = "no projection has inputs of whole blocks of 32"
        if rounded:
            why = "its projections are quantised already; name a dtype to round them all the same"
        raise CheckpointError(f"{checkpoint.name} cannot be rounded to {rounding}: {why}.")
    return rounded | kept


def _described(
    checkpoint: Checkpoint, dtype: DTypeLike | None, rounding: Rounding | None = None
) -> dict[str, Described]:
    """Describe the parameters as they are to be stored, by path."""
    formats = formats_written(checkpoint, dtype, rounding)
    specs = abstract_params(checkpoint.config, checkpoint.dtype if dtype is None else dtype, formats).specs
    return {path: spec.value for path, spec in specs.items()}


def _write_params(
    checkpoint: Checkpoint,
    directory: Path,
    described: Mapping[str, Described],
    progress: Progress,
    chunk_bytes: int,
    allow_nonfinite: bool,
) -> None:
    """Write the parameters of this description, holding one at a time.

    Orbax asks for the values of all parameters at once, so it gets stand-ins, and each array when its turn comes. It
    writes from a thread of its own, which an interruption must wait for: otherwise files would appear in a directory
    that is being removed.
    """
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    rounded = _rounded(checkpoint, described)
    loaded = {path: jax.ShapeDtypeStruct(like.shape, jnp.float32) for path, like in rounded.items()}
    wanted = {path: (placed(loaded.get(path, like), lambda _: place),) for path, like in described.items()}
    pending = {
        name: _Pending(path, name, like)
        for path, one in described.items()
        for name, like in stored(path, one).items()
    }  # fmt: skip
    stopping = threading.Event()

    def load(paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        some = {path: wanted[path] for path in paths}
        for path, (read,) in checkpoint.load(some, allow_nonfinite=allow_nonfinite):
            parameter = read
            if path in rounded and not isinstance(read, QuantizedArray):
                parameter = quantize(read, rounded[path])
            for name, array in stored(path, parameter).items():
                if stopping.is_set():
                    return
                yield name, np.asarray(array)
            progress(parameter.nbytes)

    handlers = type_handlers.create_type_handler_registry(
        (_Pending, _StreamingHandler(load)), (jax.Array, type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
    request = ocp.args.PyTreeSave(
        pending, save_args={name: ocp.SaveArgs(chunk_byte_size=chunk_bytes) for name in pending}
    )
    thread = ThreadPoolExecutor(1)
    saved = thread.submit(ocp.Checkpointer(handler).save, directory, args=request)
    try:
        saved.result()
    finally:
        _end(saved, stopping)
        thread.shutdown(wait=False)


def _rounded(checkpoint: Checkpoint, described: Mapping[str, Described]) -> dict[str, QuantizedArray]:
    """Find the parameters that are written in a format which they are not stored in."""
    stored_as = checkpoint.formats
    return {
        path: like
        for path, like in described.items()
        if isinstance(like, QuantizedArray) and stored_as.get(path) != like.format
    }


def _end(saved: "Future[None]", stopping: threading.Event) -> None:
    """Wait for the current parameter, and that no more is written, however often Ctrl-C is pressed meanwhile.

    Not by joining the thread: Python 3.12 takes a thread for ended once a join was interrupted.
    """
    while True:
        try:
            stopping.set()
            wait([saved])
            return
        except KeyboardInterrupt:
            continue


class _Pending:
    """Stands in for an array of a parameter that has not been read yet."""

    def __init__(self, path: str, name: str, like: jax.ShapeDtypeStruct) -> None:
        self.path, self.name, self.shape, self.dtype = path, name, like.shape, like.dtype
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
        options = dict(zip((value.name for value in values), zip(infos, args or (), strict=True), strict=True))
        for name, array in self._load(dict.fromkeys(value.path for value in values)):
            info, arg = options[name]
            for future in await super().serialize([array], [info], [arg]):
                future.result()
                done.append(future)
        return done
