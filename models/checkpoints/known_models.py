"""What a model's name or place says about its sizes, without its weights: for plans and simulations.

A name that is known (`families/known.py`), however the hub spells it; a directory, of which config.json is enough; or
whatever else an engine could load: a fetched model, a GGUF file. Nothing is ever downloaded here.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..config import ModelConfig
from ..errors import CheckpointError
from ..families import HUGGING_FACE, format_named
from ..families.known import known_config, known_name
from ..families.raw_config import Settings
from ..json_file import read_json
from .catalog import CATALOG, cache_directory
from .packing import of_family, packing_of

_CONFIG = "config.json"


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
    return NamedModel(profile_name(name), known_config(text))


def profile_name(name: str | Path) -> str:
    """Return what profiles call a model, the same for all spellings; that of a file is its name."""
    return known_name(str(name)) or Path(os.path.expanduser(name)).absolute().stem.lower()


def _of_files(path: Path) -> tuple[ModelConfig, Mapping[str, str]]:
    """Read the sizes from a model's own files, and what they hold quantised."""
    config = path / _CONFIG
    if config.is_file():
        settings = Settings(read_json(config))
        try:
            settings.refuse("vision_config")
            chosen = format_named(HUGGING_FACE, settings.get("model_type"), "model_type")
            model = chosen.config(of_family(settings, packing_of(settings), has_own=chosen.packed_sources is not None))
        except ValueError as error:
            raise CheckpointError(f"{config}: {error}") from None
        return model, {}
    from .open import open_checkpoint  # which imports JAX

    checkpoint = open_checkpoint(path)
    return checkpoint.config, checkpoint.formats


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False
