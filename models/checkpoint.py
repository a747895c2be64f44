"""From a model's files to parameters: one interface over every source.

`open_checkpoint` finds out what a path is. The sources themselves are `gguf_checkpoint.py`, `hugging_face.py` and
`orbax.py`; where arrays live, and on how many meshes, is the caller's business.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp

from .chat import ChatTemplate
from .config import ModelConfig
from .decoder import abstract_params
from .errors import CheckpointError
from .gguf_checkpoint import GGUFCheckpoint
from .hugging_face import CONFIG, HuggingFaceCheckpoint, refuse_pickles
from .streaming import Wanted
from .tokenizer import Tokenizer

# What marks a directory as written by `orbax.py`.
DESCRIPTION = "twinmesh.json"


class Checkpoint(Protocol):
    """An opened model: small facts at once, tensors when asked for."""

    @property
    def name(self) -> str:
        """A human name for messages and metrics."""
        ...

    @property
    def config(self) -> ModelConfig:
        """Sizes and switches of the decoder."""
        ...

    @property
    def dtype(self) -> jnp.dtype:
        """What most of the weights are stored as; float32 where they are quantised."""
        ...

    def load(self, wanted: Wanted) -> Iterator[tuple[str, tuple[jax.Array, ...]]]:
        """Parameters straight onto devices, one after another.

        Args:
            wanted: parameter path -> for each mesh a `ShapeDtypeStruct` with its sharding. Shapes are those of
                `abstract_params(self.config, dtype)`; a parameter's entries differ in their shardings only.

        Yields:
            (path, arrays): one array per entry, for every path of `wanted` once. The order may be another.

        Raises:
            CheckpointError: a file that can no longer be read or is damaged.
        """
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, built on the first call."""
        ...

    def chat_template(self) -> ChatTemplate:
        """The chat template; a model without one gives a template that refuses to render."""
        ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model's files and check their structure; no tensor is read yet.

    A file is taken for GGUF. A directory is an Orbax checkpoint where it holds twinmesh.json, and in Hugging Face's
    format where it holds config.json.

    Raises:
        CheckpointError: no such file, a directory or file of another kind, truncated or damaged, an architecture or
            feature that is not implemented, or tensors that are missing, superfluous or of another shape.
    """
    path = Path(path)
    if not path.is_dir():
        return GGUFCheckpoint(path)
    if (path / DESCRIPTION).is_file():
        from .orbax import OrbaxCheckpoint  # Orbax takes a third of a second to import

        return OrbaxCheckpoint(path)
    if (path / CONFIG).is_file():
        return HuggingFaceCheckpoint(path)
    raise CheckpointError(_what_is_missing(path))


def _what_is_missing(directory: Path) -> str:
    refuse_pickles(directory)
    if (directory / "_METADATA").is_file() or (directory / "_CHECKPOINT_METADATA").is_file():
        return (
            f"{directory} is an Orbax checkpoint without {DESCRIPTION}: only what 'twinmesh convert' has written is "
            "read; name the directory that it wrote."
        )
    files = sorted(file.name for file in directory.glob("*.gguf"))
    if files:
        return f"{directory} is a directory of GGUF files: name the file itself, such as {directory / files[0]}."
    return (
        f"{directory} holds no model: there is neither a {CONFIG} (Hugging Face) nor a {DESCRIPTION} (written by "
        "'twinmesh convert') in it."
    )


def load_on_one_device(checkpoint: Checkpoint, dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
    """Every parameter on JAX's default device, by path, in the order of `abstract_params`. For tests and scripts."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    specs = abstract_params(checkpoint.config, dtype).specs
    wanted = {
        path: (jax.ShapeDtypeStruct(spec.value.shape, spec.value.dtype, sharding=device),)
        for path, spec in specs.items()
    }
    loaded = {path: array for path, (array,) in checkpoint.load(wanted)}
    return {path: loaded[path] for path in specs}
