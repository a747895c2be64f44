"""Turns arrays under Hugging Face's names into the decoder's parameters, as loading a directory of them would.

The family's own mapping is used: rows are transposed, divided into heads, taken out of fused tensors and stacked, and
Gemma's norms get their 1. Values are cast to the parameter's dtype, as they are when a file is loaded. Names are those
of files on the hub. What is quantised, in the engine or in the arrays, is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..config import ModelConfig
from ..families import HUGGING_FACE, format_named
from ..families.from_hugging_face import NAMES
from ..families.tensor_source import Places, each
from ..quantized import Described, QuantizedArray
from .streaming import Plain, read

_EMBEDDING, _HEAD = f"{NAMES.embedding}.weight", f"{NAMES.head}.weight"
PREFIXES = ("model.", f"{NAMES.head}.")  # of all such names, and of none of the decoder's
_DERIVED = ".rotary_emb.inv_freq"  # follows from the configuration
# Families whose `model_type` is not their name here.
_MODEL_TYPES = {"gemma3": "gemma3_text"}


def sources_by_path(config: ModelConfig) -> dict[str, Places]:
    """Return the place of each parameter in files of the model's family, whatever kind of file it was read from."""
    family = "mixtral" if config.family == "llama" and config.experts is not None else config.family
    return format_named(HUGGING_FACE, _MODEL_TYPES.get(family, family), "family").sources(config)


def from_state_dict(
    given: Mapping[str, Any], config: ModelConfig, specs: Mapping[str, Described]
) -> dict[str, np.ndarray]:
    """Make parameters by path of tensors by Hugging Face's names; whole parameters only.

    Args:
        given: arrays of floats.
        config: the model's.
        specs: the description of each of its parameters.

    Raises:
        ValueError: a name that the family's files do not have, another shape, a part of a parameter, or a parameter
            that is quantised; names it.
    """
    sources, tensors = sources_by_path(config), _without_copies(given, config)
    shapes = {source.tensor: source.shape for places in sources.values() for source in each(places)}
    for name, tensor in tensors.items():
        if name not in shapes:
            raise ValueError(
                f"params names {name!r}, which files of the family {config.family} do not have: use names as files on "
                f"the hub have them, such as {next(iter(shapes))!r}, or those that parameters() lists."
            )
        if not jnp.issubdtype(getattr(tensor, "dtype", object), jnp.floating):
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"params[{name!r}] is of type {kind}: give an array of floats.")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"params[{name!r}] has shape {list(tensor.shape)}: it must be {list(shapes[name])}.")
    file, made = _Arrays(tensors), dict[str, np.ndarray]()
    for path, places in sources.items():
        names = dict.fromkeys(source.tensor for source in each(places))
        present = [name for name in names if name in tensors]
        if not present:
            continue
        if len(present) < len(names):
            missing = next(name for name in names if name not in tensors)
            raise ValueError(f"params has {present[0]!r} but not {missing!r}, and both are in {path}: give all of it.")
        like = specs[path]
        if isinstance(like, QuantizedArray):
            raise ValueError(
                f"params[{present[0]!r}] is {path} here, which is {like.format}: round it with `quantize` of "
                "twinmesh.models.quantized under that name, or start the engine with quantization='none'."
            )
        made[path] = read(file, places, [like], allow_nonfinite=True)
    return made


def _without_copies(given: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Leave out what follows from the rest: the head of a model whose head is the embedding, rotary frequencies."""
    tensors = {name: tensor for name, tensor in given.items() if not name.endswith(_DERIVED)}
    if config.tie_embeddings and _HEAD in tensors:
        head = tensors.pop(_HEAD)
        if _EMBEDDING not in tensors or not np.array_equal(np.asarray(head), np.asarray(tensors[_EMBEDDING])):
            raise ValueError(
                f"params[{_HEAD!r}] is not {_EMBEDDING!r}, which is this model's head as well: leave it out, or give "
                "both alike."
            )
    return tensors


class _Arrays:
    """Arrays as a `TensorFile`."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors, self.stamps = tensors, dict[Path, Any]()

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        tensor = self._tensors[name]
        rows = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else 1)
        return np.asarray(rows[start:stop]).astype(np.float32)

    def path_of(self, name: str) -> Path:
        return Path(name)

    def paths_of(self, name: str) -> tuple[Path, ...]:
        return ()

    def nbytes(self, name: str) -> int:
        return int(self._tensors[name].nbytes)

    def plain(self, name: str) -> Plain | None:
        return None

    def format_of(self, name: str) -> str | None:
        return None
