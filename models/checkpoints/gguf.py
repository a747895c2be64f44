"""Opens a GGUF file as a checkpoint: it holds configuration, weights, tokenizer and chat template."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp

from ...kernels_pallas.block_tiles import LAYOUTS
from ..errors import CheckpointError
from ..families import GGUF, format_named
from ..families.from_gguf import NAMES, ROPE_FACTORS, GGUFHeader
from ..families.raw_config import Settings
from ..families.tensor_source import each
from ..text.chat import ChatTemplate
from ..text.chat_files import templates_from_gguf
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_gguf import tokenizer_from_gguf
from .base import TextFiles
from .gguf_file import GGUFFile
from .quantized_streaming import StreamedWeights


class GGUFCheckpoint(TextFiles, StreamedWeights[GGUFFile]):
    """A GGUF file of a supported architecture, checked to hold exactly the tensors that the architecture needs."""

    dtype = jnp.dtype(jnp.float32)
    method = "gguf"

    def __init__(self, path: Path) -> None:
        """Open `path`; see `open_checkpoint` for what it raises."""
        self.path, self._file = path, GGUFFile(path)
        self._blocks = self._file
        metadata = self._file.metadata
        self.name = str(metadata.get("general.name", path.stem))
        architecture = metadata.get("general.architecture")
        try:
            chosen = format_named(GGUF, architecture, "Architecture")
            self.config = chosen.config(self._header(f"{architecture}."))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        self._sources = chosen.sources(self.config)
        factors = {ROPE_FACTORS: (self.config.head_dim // 2,)} if ROPE_FACTORS in self._file.tensors else {}
        expected = {source.tensor: source.shape for source in self._matrices()} | factors
        self._file.check(expected | self._scales(), self._is_input_scale)
        self.formats: Mapping[str, str] = self._formats()

    def _header(self, prefix: str) -> GGUFHeader:
        """Describe the file to its family.

        As in llama.cpp its own vocab_size decides nothing: the number of tokens does, which is the embedding's rows.
        """
        embedding = self._file.tensors.get(f"{NAMES.embedding}.weight")
        tokens = self._file.metadata.get("tokenizer.ggml.tokens")
        listed = len(tokens) if isinstance(tokens, list) else None

        def vector(name: str) -> tuple[float, ...]:
            return tuple(self._file.read_rows(name, 0, self._file.tensors[name].shape[0])[:, 0].tolist())

        return GGUFHeader(
            Settings(self._file.metadata, prefix),
            vocabulary=listed if embedding is None else embedding.shape[0],
            tensors=self._file.tensors.keys(),
            vector=vector,
        )

    def _scales(self) -> dict[str, tuple[int, ...]]:
        """Find the second scales of weights, one number each, as llama.cpp does: of projections and the head."""
        embedding = f"{NAMES.embedding}.weight"
        matrices = {s.tensor for s in self._matrices() if len(s.shape) == 2 and s.tensor != embedding}
        names = (f"{tensor.removesuffix('.weight')}.scale" for tensor in matrices)
        return {name: (1,) for name in names if name in self._file.tensors}

    def _formats(self) -> dict[str, str]:
        """Find the parameters whose tensors are of a format that need not be dequantised, and have no second scale."""
        scales = self._scales()
        matrices = {path: each(places)[0] for path, places in self._sources.items()}
        kinds = {
            path: self._file.tensors[source.tensor].kind.name
            for path, source in matrices.items()
            if len(source.shape) > 1 and f"{source.tensor.removesuffix('.weight')}.scale" not in scales
        }
        return {path: kind for path, kind in kinds.items() if kind in LAYOUTS}

    @staticmethod
    def _is_input_scale(name: str) -> bool:
        """Return whether a tensor only says how activations may be quantised, which are not, here or in llama.cpp."""
        return name.endswith(".input_scale")

    def _read_tokenizer(self) -> Tokenizer:
        try:
            tokenizer = tokenizer_from_gguf(self._file.metadata)
            tokenizer.limit(self.config.vocab_size)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        return tokenizer

    def _read_chat_template(self) -> ChatTemplate:
        return ChatTemplate(templates_from_gguf(self._file.metadata), self.tokenizer(), name=self.name)
