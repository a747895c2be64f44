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
from .streaming import Wanted
from .tokenizer import Tokenizer


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

    Raises:
        CheckpointError: no such file, a directory, not GGUF, truncated or damaged, an architecture or feature that is
            not implemented, or tensors that are missing, superfluous or of another shape.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a directory: only GGUF files are supported so far; name the .gguf file itself."
        )
    return GGUFCheckpoint(path)


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
