"""Refuses models that take more than text: they have towers beside their decoder, and none is implemented."""

from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError
from .raw_config import Settings

# By the setting that describes it: what a tower reads, and what names of its tensors contain.
_TOWERS = {"vision_config": ("vision", ("vision", "visual")), "audio_config": ("audio", ("audio",))}


def refuse_towers(settings: Settings, files: Mapping[str, Path] | None = None) -> None:
    """Refuse a model with a tower for vision or audio: a better reason than an unknown model_type.

    Args:
        settings: of config.json.
        files: the file of each tensor, by its name; None: there are no tensors yet.

    Raises:
        CheckpointError: names the setting, and the first tensor of the tower with its file, where there is one.
    """
    for key, (what, words) in _TOWERS.items():
        if key not in settings:
            continue
        own = (name for name in sorted(files or {}) if any(word in name for word in words))
        first = next(own, None)
        where = "" if files is None or first is None else f", tensor {first!r} in {files[first]},"
        raise CheckpointError(
            f"{key} says that the model has a {what} tower{where} and none is implemented: give a checkpoint of its "
            "language model alone."
        )
