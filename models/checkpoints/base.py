"""The interface of an opened model, and the part of it that every kind of checkpoint shares: its text files.

A checkpoint gives facts, parameters and a tokenizer. The caller decides on which devices and meshes arrays are placed.
`open.py` turns a path into a checkpoint.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import jax.numpy as jnp

from ..config import ModelConfig
from ..quantized import Weight
from ..text.chat import ChatTemplate
from ..text.chat_files import chat_template_from_directory
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_files import tokenizer_from_directory
from .host_memory import FileMaps
from .streaming import Packed, Report, Wanted, ignore

# The file that marks a directory as written by `orbax_writer.py`.
DESCRIPTION = "twinmesh.json"


class Checkpoint(Protocol):
    """An opened model: facts are read when it is opened, tensors when `load` asks for them."""

    @property
    def name(self) -> str:
        """Return the model's name in messages and metrics."""
        ...

    @property
    def config(self) -> ModelConfig:
        """Return the sizes and switches of the decoder."""
        ...

    @property
    def dtype(self) -> jnp.dtype:
        """Return the type that most of the weights are stored as; float32 if they are quantised."""
        ...

    @property
    def formats(self) -> Mapping[str, str]:
        """Return the parameters that can be loaded as they are quantised, by path, and each one's format."""
        ...

    @property
    def method(self) -> str | None:
        """Return what quantised the weights, as vLLM's `quantization` names it; None: nothing did."""
        ...

    @property
    def rounds_activations(self) -> bool:
        """Return whether the method is made for activations that are quantised as well, which they are not here."""
        ...

    @property
    def has_kv_scales(self) -> bool:
        """Return whether the files hold scales for 8-bit keys and values, which tokens have of their own here."""
        ...

    @property
    def dequantized(self) -> Mapping[str, Packed]:
        """Return the other parameters that the files hold quantised, by path: they become floats as they are loaded."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Return the bytes that the parameters take in the files."""
        ...

    def load(
        self,
        wanted: Wanted,
        *,
        allow_nonfinite: bool = False,
        maps: FileMaps | None = None,
        report: Report = ignore,
    ) -> Iterator[tuple[str, tuple[Weight, ...]]]:
        """Load parameters straight onto devices, one after another.

        Args:
            wanted: parameter path -> for each mesh a `ShapeDtypeStruct` with its sharding, or a `QuantizedArray` of
                such where the parameter is among `formats` and is to stay quantised. Shapes are those of
                `abstract_params(self.config, dtype, formats)`; a parameter's entries differ in their shardings only.
            allow_nonfinite: load weights that are NaN or infinite, or become so in the wanted dtype.
            maps: takes the files of which CPU devices use parts where they are; None: everything is read.
            report: called with the bytes that were read, which add up to `stored_bytes` if all parameters are wanted.

        Yields:
            (path, arrays): one array per entry, for every path of `wanted` once, in any order.

        Raises:
            CheckpointError: a file that can no longer be read, is damaged or was changed meanwhile, or a weight that
                is not finite.
        """
        ...

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, built on the first call."""
        ...

    def chat_template(self) -> ChatTemplate:
        """Return the chat template; that of a model without one refuses to render."""
        ...


class TextFiles:
    """A checkpoint's tokenizer and chat template, each read on its first use and kept.

    Reads the files of the directory `path`; a subclass whose text is elsewhere overrides the two `_read` methods.
    """

    path: Path  # the directory, or the file
    name: str
    config: ModelConfig
    method: str | None = None
    rounds_activations: bool = False
    has_kv_scales: bool = False

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, built on the first call."""
        return self._tokenizer

    def chat_template(self) -> ChatTemplate:
        """Return the chat template, read on the first call."""
        return self._chat_template

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._read_tokenizer()

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return self._read_chat_template()

    def _read_tokenizer(self) -> Tokenizer:
        return tokenizer_from_directory(self.path, self.config.vocab_size)

    def _read_chat_template(self) -> ChatTemplate:
        return chat_template_from_directory(self.path, self.tokenizer(), name=self.name)
