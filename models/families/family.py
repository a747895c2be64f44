"""The description of a model family: how its configurations and weights are read, from either kind of checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

from ..config import ModelConfig
from .from_gguf import GGUFHeader
from .raw_config import Settings
from .tensor_source import Places


@dataclass(frozen=True)
class Format[Header]:
    """How one kind of checkpoint holds the family.

    `config` raises CheckpointError for settings that are missing, absurd or not implemented.
    """

    names: tuple[str, ...]  # of the family: config.json's `model_type`, GGUF's `general.architecture`
    config: Callable[[Header], ModelConfig]  # reads the configuration from the header
    sources: Callable[[ModelConfig], dict[str, Places]]  # finds each parameter of the decoder, by path
    # The same in files of which `quantization_config` says how they are packed; None: such files are refused.
    packed_sources: Callable[[ModelConfig], dict[str, Places]] | None = None


@dataclass(frozen=True)
class Family:
    """A model family."""

    hugging_face: Format[Settings]
    gguf: Format[GGUFHeader] | None  # None: GGUF files have it under another family's name
