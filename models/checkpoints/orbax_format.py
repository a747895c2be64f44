"""The format of an Orbax checkpoint: shared by its reader (`orbax.py`) and its writer (`orbax_writer.py`).

A directory holds `twinmesh.json` (what the model is, and the length of every file), `params/` (Orbax: a flat dict,
dotted path -> array, in the shapes of `abstract_params`; of a quantised parameter PATH.values, PATH.scales and, where
its format has them, PATH.mins) and the tokenizer's files. Arrays are stored in chunks of a few megabytes, uncompressed,
so that a device reads little more than its own shard and a mesh may have any degree of tensor parallelism.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
from cattrs.errors import BaseValidationError
from cattrs.preconf.json import make_converter

from ...kernels_pallas.block_tiles import LAYOUTS
from ...kernels_pallas.quantized import QuantizedArray
from ..config import ModelConfig
from ..errors import CheckpointError
from ..json_file import read_json
from .base import DESCRIPTION

PARAMS = "params"  # the folder of the arrays
FORMAT = 3
_READ = (1, 2, FORMAT)  # 1 had no quantised parameters, 2 only those of GGUF and MXFP4
_CONVERTER = make_converter(forbid_extra_keys=True)


@dataclass(frozen=True)
class Description:
    """The contents of `twinmesh.json`."""

    format: int  # `FORMAT` of the version that wrote it
    name: str  # the model's
    dtype: str  # of the stored parameters, norms and quantised ones apart
    config: ModelConfig
    files: dict[str, int]  # path of every other file in the directory -> its length in bytes
    formats: dict[str, str] = field(default_factory=dict)  # path of every quantised parameter -> its format
    method: str | None = None  # that quantised them, as `Checkpoint.method`

    def write(self, directory: Path) -> None:
        """Write `twinmesh.json` into `directory`."""
        (directory / DESCRIPTION).write_text(json.dumps(_CONVERTER.unstructure(self), indent=1))


def read_description(directory: Path) -> Description:
    """Read `twinmesh.json`, and check that every file it lists is there and whole.

    Raises:
        CheckpointError: it is damaged or of another version, or files are missing or truncated.
    """
    path = directory / DESCRIPTION
    content = read_json(path)
    if content.get("format") not in _READ:
        raise CheckpointError(
            f"{path} is of format {str(content.get('format'))[:40]}, and this version reads up to {FORMAT}: convert "
            "the model again."
        )
    try:
        description = _CONVERTER.structure(content, Description)
        jnp.dtype(description.dtype)
        unknown = description.formats.values() - LAYOUTS.keys()
    except (BaseValidationError, ValueError, TypeError):
        raise CheckpointError(f"{path} is damaged: it does not describe a model; convert the model again.") from None
    if unknown:
        raise CheckpointError(f"{path} names the format {min(unknown)[:40]!r}, which this version does not know.")
    for name, size in description.files.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            how = "is missing" if found is None else f"has {found} bytes and should have {size}"
            raise CheckpointError(f"{directory} is incomplete: {name} {how}; copy or convert the model again.")
    return description


@contextmanager
def one_sentence(what: str, written: Path | None = None) -> Iterator[None]:
    """Turn any exception of Orbax into one `CheckpointError` that begins with `what`; where something is `written` and
    the system refuses, as for want of space, into its own `OSError` about that path.

    Orbax passes on TensorStore's messages, over many lines and as any kind of exception, and logs them as well.
    """
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
            if written is not None:
                raise OSError(int(number[1]), text, str(written)) from None
        raise CheckpointError(f"{what}: {text[:160].rstrip('.')}.") from None
    finally:
        log.setLevel(level)


def stored[Array](path: str, parameter: Array | QuantizedArray) -> dict[str, Array]:
    """Return the arrays of a parameter, or their descriptions, by the names that they are stored under."""
    if not isinstance(parameter, QuantizedArray):
        return {path: parameter}
    return {f"{path}.{name}": array for name, array in parameter.parts()}
