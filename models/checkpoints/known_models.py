"""What a model's name or place says about its sizes, without its weights: for plans and simulations.

A name that is known (`families/known.py`), however the hub spells it; a config.json, alone or in a directory without
weights, also where the hub's cache has it; or whatever an engine could load, whose files' headers are read: a directory
with weights, a fetched model, a GGUF file. Nothing is ever downloaded here.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..config import ModelConfig
from ..errors import CheckpointError
from ..families.described import described
from ..families.known import known_model as known_by_name
from ..families.known import known_name
from ..families.raw_config import Settings
from ..json_file import read_json
from .catalog import CATALOG, cache_directory
from .hub import cached_config, parse_hub_id

_CONFIG = "config.json"
_WEIGHTS = "model*.safetensors"  # beside it, whose headers say more; an index alone says nothing


class NamedModel(NamedTuple):
    """A model and what profiles call it."""

    name: str
    config: ModelConfig
    formats: Mapping[str, str] = {}  # path -> format, of what its files, if there are any, hold quantised


def known_model(name: str | Path) -> ModelConfig:
    """Return the sizes of a model; raises as `named_model`."""
    return named_model(name).config


def named_model(name: str | Path) -> NamedModel:
    """Return a model's sizes, and the name that it has in profiles, the same for all spellings.

    Raises:
        CheckpointError: nobody knows a model of this name, or its files cannot be used.
    """
    text, path = str(name), Path(os.path.expanduser(name))
    if _exists(path):
        return NamedModel(profile_name(name), *_of_files(path))
    if known_name(text) is None and text in CATALOG and _exists(CATALOG[text].cached(cache_directory())):
        return NamedModel(text, *_of_files(CATALOG[text].cached(cache_directory())))
    if known_name(text) is None and (on_hub := parse_hub_id(text)) is not None:
        config = cached_config(on_hub)
        if config is not None:
            return NamedModel(profile_name(name), *_of_config(config))
    return NamedModel(profile_name(name), *known_by_name(text))


def profile_name(name: str | Path) -> str:
    """Return what profiles call a model, the same for all spellings; that of a file is its name."""
    return known_name(str(name)) or Path(os.path.expanduser(name)).absolute().stem.lower()


def _of_files(path: Path) -> tuple[ModelConfig, Mapping[str, str]]:
    """Read the sizes from a model's own files, and what they hold quantised."""
    config = path / _CONFIG if path.is_dir() else path
    if config.name.endswith(".json") and config.is_file() and not any(path.glob(_WEIGHTS)):
        return _of_config(config)
    from .open import open_checkpoint  # which imports JAX

    checkpoint = open_checkpoint(path)
    return checkpoint.config, checkpoint.formats


def _of_config(path: Path) -> tuple[ModelConfig, Mapping[str, str]]:
    """Read the sizes from a file such as config.json."""
    settings = Settings(read_json(path))
    try:
        return described(settings)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False
