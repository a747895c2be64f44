"""Opens a path as a checkpoint: `open_checkpoint` finds out which kind of model it holds.

The kinds are `gguf.py`, `hugging_face.py` and `orbax.py`; `base.py` is the interface that they share.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .base import DESCRIPTION, Checkpoint
from .gguf import GGUFCheckpoint
from .hugging_face import CONFIG, HuggingFaceCheckpoint, refuse_pickles


def open_checkpoint(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """Open a model's files and check their structure; no tensor is read yet. In `path` "~" is the user's home.

    A file is opened as GGUF. A directory is an Orbax checkpoint if it holds twinmesh.json, and in Hugging Face's format
    if it holds config.json, of which `overrides` replace entries by name.

    Raises:
        CheckpointError: overrides of a checkpoint without a config.json, no such file, a directory or file of another
            kind, truncated or damaged, an architecture or feature that is not implemented, or tensors that are missing,
            superfluous or of another shape.
    """
    path = Path(os.path.expanduser(path))
    if overrides and not ((path / CONFIG).is_file() and not (path / DESCRIPTION).is_file()):
        raise CheckpointError(
            f"{path} has no {CONFIG} that hf_overrides could change: leave them out, or name a directory in Hugging "
            "Face's format."
        )
    if not os.path.isdir(path):  # unlike Path.is_dir, it takes names of any length
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} holds tensors only: name the directory with its config.json and tokenizer.")
        return GGUFCheckpoint(path)
    if (path / DESCRIPTION).is_file():
        from .orbax import OrbaxCheckpoint

        return OrbaxCheckpoint(path)
    if (path / CONFIG).is_file():
        return HuggingFaceCheckpoint(path, overrides)
    raise CheckpointError(_what_is_missing(path))


def _what_is_missing(directory: Path) -> str:
    refuse_pickles(directory)
    if (directory / "_METADATA").is_file() or (directory / "_CHECKPOINT_METADATA").is_file():
        return (
            f"{directory} is an Orbax checkpoint without {DESCRIPTION}: only what 'twinmesh convert' has written is "
            "read; name the directory that it wrote."
        )
    files = sorted(file.name for file in directory.glob("*.gguf"))
    if files:
        return f"{directory} is a directory of GGUF files: name the file itself, such as {directory / files[0]}."
    return (
        f"{directory} holds no model: there is neither a {CONFIG} (Hugging Face) nor a {DESCRIPTION} (written by "
        "'twinmesh convert') in it."
    )
