"""What a family of models is: how its configurations and weights are read, from either kind of checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

from ..config import ModelConfig
from .from_gguf import GGUFHeader
from .raw_config import Settings
from .tensor_source import Source


@dataclass(frozen=True)
class Format[Header]:
    """One kind of checkpoint: `names` are what it calls the family (config.json's `model_type`, GGUF's
    `general.architecture`), `config` reads its header, `sources` says where each parameter of the decoder is.

    Both raise CheckpointError for what is missing, absurd or not implemented.
    """

    names: tuple[str, ...]
    config: Callable[[Header], ModelConfig]
    sources: Callable[[ModelConfig], dict[str, Source]]


@dataclass(frozen=True)
class Family:
    """A family as Hugging Face directories have it, and as GGUF files do; None: under another family's name."""

    hugging_face: Format[Settings]
    gguf: Format[GGUFHeader] | None
