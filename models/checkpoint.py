"""From a model's files to parameters: one interface over every source, and a loader that streams.

Only GGUF files are a source so far. The loader holds one dequantised tensor at a time and hands each to `put`; where
the arrays live, and on how many meshes, is the caller's business.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .chat import ChatTemplate
from .config import ModelConfig
from .decoder import abstract_params
from .errors import CheckpointError
from .families import family
from .gguf import GGUFFile
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

    def load_tensor(self, path: str) -> np.ndarray:
        """Parameter `path` of the decoder ("layers.0.attention.q_proj") as float32 in its logical shape."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, built on the first call."""
        ...

    def chat_template(self) -> ChatTemplate:
        """The chat template; a model without one gives a template that refuses to render."""
        ...


class GGUFCheckpoint:
    """A GGUF file of a supported architecture, checked to hold exactly the tensors that the architecture needs."""

    def __init__(self, path: Path) -> None:
        """Open `path`; see `open_checkpoint` for what it raises."""
        self._file = GGUFFile(path)
        metadata = self._file.metadata
        self.name = str(metadata.get("general.name", path.stem))
        architecture = metadata.get("general.architecture")
        try:
            chosen = family(str(architecture))
            self.config = chosen.config(metadata, self._file.tensors.keys())
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        self._sources = chosen.sources(self.config)
        self._file.check({source.tensor: source.shape for source in self._sources.values()})
        self._tokenizer: Tokenizer | None = None
        self._chat_template: ChatTemplate | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    def load_tensor(self, path: str) -> np.ndarray:
        """Parameter `path` as float32 in its logical shape; not always contiguous."""
        source = self._sources[path]
        return source.transform(self._file.read(source.tensor))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, built on the first call."""
        if self._tokenizer is None:
            try:
                tokenizer = Tokenizer(self._file.metadata)
            except CheckpointError as error:
                raise CheckpointError(f"{self.path}: {error}") from None
            if tokenizer.vocab_size != self.config.vocab_size:
                raise CheckpointError(
                    f"{self.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {self.config.vocab_size}."
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    def chat_template(self) -> ChatTemplate:
        """The template under `tokenizer.chat_template`, compiled on its first use."""
        if self._chat_template is None:
            source = self._file.metadata.get("tokenizer.chat_template")
            self._chat_template = ChatTemplate(source, self.tokenizer(), name=self.name)
        return self._chat_template


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model file and check its structure; no tensor is read yet.

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


def load_params[T](
    checkpoint: Checkpoint,
    dtype: DTypeLike,
    put: Callable[[str, np.ndarray], T],
    *,
    progress: Callable[[Iterable[str]], Iterable[str]] | None = None,
) -> tuple[T, ...]:
    """Stream the parameters in the order of `abstract_params(checkpoint.config, dtype).specs`.

    Args:
        checkpoint: where the values come from.
        dtype: dtype of the arrays handed to `put`.
        put: takes a parameter's path and its contiguous host array, and returns what stands for it: a `jax.Array`, or
            one per mesh (a tensor is read and dequantised once, however many meshes it goes to).
        progress: wraps the iteration over paths, such as `functools.partial(tqdm, desc="weights")`.

    Returns:
        One entry per parameter. With `put` giving one array per mesh, `zip(*result)` gives one tuple per mesh.
    """
    paths: Iterable[str] = abstract_params(checkpoint.config, dtype).specs
    host_dtype = jnp.dtype(dtype)
    loaded = []
    for path in progress(list(paths)) if progress else paths:
        loaded.append(put(path, np.ascontiguousarray(checkpoint.load_tensor(path), host_dtype)))
    return tuple(loaded)
