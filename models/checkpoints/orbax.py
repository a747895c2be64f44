"""Orbax checkpoints of the decoder's own parameters: written by `twinmesh convert`, restored shard by shard.

A directory holds `twinmesh.json` (what the model is, and the length of every file), `params/` (Orbax: a flat dict,
dotted path -> array, in the shapes of `abstract_params`) and the tokenizer's files. Arrays lie in chunks of a few
megabytes, uncompressed, so that a device reads little more than its own shard and a mesh may have any degree of tensor
parallelism; they are cast to the dtype asked for as they are read.

Writing takes one parameter at a time from the source. The directory is made under a temporary name beside the final one
and renamed, so that whatever stops it leaves nothing half-made. Only checkpoints written here are read: another tool's
parameters have other names and shapes.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from cattrs.errors import BaseValidationError
from cattrs.preconf.json import make_converter

from ..config import ModelConfig
from ..decoder import abstract_params
from ..errors import CheckpointError
from ..json_file import read_json
from ..text.chat import ChatTemplate
from ..text.chat_files import chat_template_from_directory
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_files import tokenizer_from_directory
from .base import DESCRIPTION
from .streaming import Wanted
from .tensor_check import check_tensors

_PARAMS = "params"
_FORMAT = 1
_CHUNK_BYTES = 4 << 20
# Called after each parameter that was written, with its length in bytes.
type Progress = Callable[[int], object]


@dataclass(frozen=True)
class Description:
    """What `twinmesh.json` says. `files` maps the path of every other file in the directory to its length in bytes."""

    format: int
    name: str
    dtype: str
    config: ModelConfig
    files: dict[str, int]


_CONVERTER = make_converter(forbid_extra_keys=True)


class OrbaxCheckpoint:
    """A directory that `write` made, checked to be whole."""

    def __init__(self, directory: Path) -> None:
        """Open `directory`. Orbax is not asked yet: it would start JAX, before the engine has asked for its devices.

        Raises:
            CheckpointError: a description that is damaged or of another version, or files that are missing or
                truncated.
        """
        self.path = directory
        description = _read_description(directory)
        self.name, self.config, self.dtype = description.name, description.config, jnp.dtype(description.dtype)
        self._params = directory.absolute() / _PARAMS
        self._tokenizer: Tokenizer | None = None
        self._chat_template: ChatTemplate | None = None

    def load(self, wanted: Wanted) -> Iterator[tuple[str, tuple[jax.Array, ...]]]:
        """Parameters straight onto devices; see `Checkpoint.load`."""
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        self._check_params(checkpointer)
        for paths in _batches({path: _nbytes(places[0]) for path, places in wanted.items()}):
            meshes = zip(*(wanted[path] for path in paths), strict=True)
            restored = [self._restore(checkpointer, dict(zip(paths, places, strict=True))) for places in meshes]
            for path in paths:
                yield path, tuple(arrays.pop(path) for arrays in restored)

    def _check_params(self, checkpointer: ocp.Checkpointer) -> None:
        with _one_sentence(f"{self._params} cannot be read"):
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
        with _one_sentence(f"{self._params}: {', '.join(places)[:80]} cannot be restored"):
            arrays: dict[str, jax.Array] = checkpointer.restore(self._params, args=request)
            jax.block_until_ready(arrays)
        return arrays

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, built on the first call."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_from_directory(self.path, self.config.vocab_size)
        return self._tokenizer

    def chat_template(self) -> ChatTemplate:
        """The chat template, read on the first call."""
        if self._chat_template is None:
            self._chat_template = chat_template_from_directory(self.path, self.tokenizer(), name=self.name)
        return self._chat_template


def _nbytes(array: jax.ShapeDtypeStruct) -> int:
    total: int = math.prod(array.shape) * array.dtype.itemsize
    return total


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Paths to restore together, the largest first.

    While it restores, TensorStore holds about twice as much again. So what is largest comes while little is there yet,
    and the rest in quarters of that: one by one would cost some 10 ms each.
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


def _read_description(directory: Path) -> Description:
    """The description, with every file that it lists looked at."""
    path = directory / DESCRIPTION
    content = read_json(path)
    if content.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is of format {str(content.get('format'))[:40]}, and this version reads {_FORMAT}: convert the "
            "model again."
        )
    try:
        description = _CONVERTER.structure(content, Description)
        jnp.dtype(description.dtype)
    except (BaseValidationError, ValueError, TypeError):
        raise CheckpointError(f"{path} is damaged: it does not describe a model; convert the model again.") from None
    for name, size in description.files.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            how = "is missing" if found is None else f"has {found} bytes and should have {size}"
            raise CheckpointError(f"{directory} is incomplete: {name} {how}; copy or convert the model again.")
    return description


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Orbax raises whatever TensorStore said, over many lines and as any kind of exception, and logs it as well."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except (CheckpointError, jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if number := re.search(r"os_error_code='(\d+)'", text):
            text = os.strerror(int(number[1]))
        raise CheckpointError(f"{what}: {text[:160].rstrip('.')}.") from None
    finally:
        log.setLevel(level)
