"""From a model's files to parameters: one interface over every source.

`open_checkpoint` finds out what a path is. The sources themselves are `gguf.py`, `hugging_face.py` and
`orbax.py`; where arrays live, and on how many meshes, is the caller's business.
"""

import os
from pathlib import Path

import jax

from ..decoder import abstract_params
from ..errors import CheckpointError
from .base import DESCRIPTION, Checkpoint
from .gguf import GGUFCheckpoint
from .hugging_face import CONFIG, HuggingFaceCheckpoint, refuse_pickles


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model's files and check their structure; no tensor is read yet.

    A file is taken for GGUF. A directory is an Orbax checkpoint where it holds twinmesh.json, and in Hugging Face's
    format where it holds config.json.

    Raises:
        CheckpointError: no such file, a directory or file of another kind, truncated or damaged, an architecture or
            feature that is not implemented, or tensors that are missing, superfluous or of another shape.
    """
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir, it takes names of any length
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} holds tensors only: name the directory with its config.json and tokenizer.")
        return GGUFCheckpoint(path)
    if (path / DESCRIPTION).is_file():
        from .orbax import OrbaxCheckpoint

        return OrbaxCheckpoint(path)
    if (path / CONFIG).is_file():
        return HuggingFaceCheckpoint(path)
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


def load_on_one_device(checkpoint: Checkpoint, dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
    """Every parameter on JAX's default device, by path, in the order of `abstract_params`. For tests and scripts."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    specs = abstract_params(checkpoint.config, dtype).specs
    wanted = {
        path: (jax.ShapeDtypeStruct(spec.value.shape, spec.value.dtype, sharding=device),)
        for path, spec in specs.items()
    }
    loaded = {path: array for path, (array,) in checkpoint.load(wanted)}
    return {path: loaded[path] for path in specs}
