"""Model families by architecture name. Adding a model is adding one file here and one entry in the registry."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError
from . import llama
from .source import Source


@dataclass(frozen=True)
class Family:
    """What a family knows: its configuration and where its weights are.

    `config(metadata, tensor_names)` reads GGUF metadata; `sources(config)` maps each parameter path of the decoder to
    a `Source`, a tensor of the file and how it becomes the parameter.
    """

    config: Callable[[Mapping[str, Any], Collection[str]], ModelConfig]
    sources: Callable[[ModelConfig], dict[str, Source]]


FAMILIES: Mapping[str, Family] = {"llama": Family(llama.config, llama.sources)}


def family(architecture: str) -> Family:
    """The family of a GGUF `general.architecture`.

    Raises:
        CheckpointError: an architecture that is not implemented.
    """
    if architecture not in FAMILIES:
        raise CheckpointError(f"Architecture {architecture!r} is not supported; supported: {', '.join(FAMILIES)}.")
    return FAMILIES[architecture]


__all__ = ["FAMILIES", "Family", "Source", "family"]
