"""What config.json alone says of a model: its sizes, and which parameters the files hold packed."""

from collections.abc import Mapping
from typing import NamedTuple

from ..config import ModelConfig
from ..errors import CheckpointError
from . import HUGGING_FACE, format_named
from .declared_formats import declared_formats, declared_packing
from .packing import KEY
from .raw_config import Settings

_TOWERS = {"vision_config": "vision", "audio_config": "audio"}


class Described(NamedTuple):
    """A model without its files."""

    config: ModelConfig
    formats: Mapping[str, str]  # path -> format, of the parameters that are packed


def described(settings: Settings) -> Described:
    """Read the whole of config.json.

    Raises:
        CheckpointError: a model with a tower, an unknown family or way of packing, or a setting that is missing, absurd
            or not implemented.
    """
    refuse_towers(settings)
    chosen = format_named(HUGGING_FACE, settings.get("model_type"), "model_type")
    packing = declared_packing(settings)
    config = chosen.config(settings.without(KEY))  # of floats, which every family reads
    return Described(config, declared_formats(packing, config, chosen.sources(config)))


def refuse_towers(settings: Settings) -> None:
    """Refuse a model that has more than a decoder of text: a better reason than an unknown model_type.

    Raises:
        CheckpointError: names the tower.
    """
    for key, what in _TOWERS.items():
        if key in settings:
            raise CheckpointError(
                f"{key}: the model has {what} input, which is not implemented: take a checkpoint of its text model "
                "alone."
            )
