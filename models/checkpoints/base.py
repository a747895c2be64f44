"""What every kind of checkpoint offers."""

from collections.abc import Iterator
from typing import Protocol

import jax
import jax.numpy as jnp

from ..config import ModelConfig
from ..text.chat import ChatTemplate
from ..text.tokenizer import Tokenizer
from .streaming import Wanted

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
