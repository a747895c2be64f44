"""What config.json alone says of a model: its sizes, and which parameters the files hold packed."""

from collections.abc import Mapping
from typing import NamedTuple

from ..config import ModelConfig
from . import HUGGING_FACE, format_named
from .declared_formats import declared_formats
from .packing import of_family, packing_of
from .raw_config import Settings
from .towers import refuse_towers


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
    packing = packing_of(settings)
    config = chosen.config(of_family(settings, packing, has_own=chosen.packed_sources is not None))
    sources = chosen.sources if packing is None else chosen.packed_sources or chosen.sources
    return Described(config, declared_formats(packing, sources(config)))
