"""Opens a directory as Hugging Face's libraries write it: config.json, safetensors, tokenizer.json.

Weights are in `model.safetensors`, or in the files that `model.safetensors.index.json` lists. Pickles
(pytorch_model.bin, *.pt, *.pth) are never opened: to read one is to run the code in it. Before any tensor is read, it
is checked that exactly the expected ones exist.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..config import ModelConfig
from ..errors import CheckpointError
from ..families import HUGGING_FACE, format_named
from ..families.family import Format
from ..families.from_hugging_face import NAMES
from ..families.packing import KEY, Packing, of_family, packing_of
from ..families.raw_config import Settings
from ..families.tensor_source import Places, each, renamed
from ..families.towers import refuse_towers
from ..json_file import read_json
from .base import TextFiles
from .mxfp4 import MXFP4Files
from .packed_files import PackedFiles
from .quantized_streaming import StreamedWeights
from .safetensors import INDEX, SafetensorsFiles, open_sharded
from .tensor_check import check_tensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_EMBEDDING, _HEAD = f"{NAMES.embedding}.weight", f"{NAMES.head}.weight"
_KV_SCALES = (".k_scale", ".v_scale", ".kv_scale")
_ROWS_COMPARED = 4096  # at a time
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class HuggingFaceCheckpoint(TextFiles, StreamedWeights[SafetensorsFiles]):
    """A directory of a supported family, checked to hold exactly the tensors that the family needs."""

    def __init__(self, directory: Path, overrides: Mapping[str, Any] | None = None) -> None:
        """Open `directory`; see `open_checkpoint` for what it raises. `overrides` replace entries of config.json."""
        self.path = directory
        self.name = _name(directory)
        settings = Settings({**read_json(directory / CONFIG), **(overrides or {})})
        self._file: SafetensorsFiles = _open_weights(directory)
        self._blocks: MXFP4Files | PackedFiles | None = None
        try:
            refuse_towers(settings, {name: tensor.path for name, tensor in self._file.tensors.items()})
            self._packing: Packing | None = packing_of(settings)
            chosen = format_named(HUGGING_FACE, settings.get("model_type"), "model_type")
            config = chosen.config(of_family(settings, self._packing, has_own=chosen.packed_sources is not None))
        except ValueError as error:
            raise CheckpointError(f"{directory / CONFIG}: {error}") from None
        self.has_kv_scales = any(name.endswith(_KV_SCALES) for name in self._file.tensors)
        if self._packing is not None:
            self.method, self.rounds_activations = self._packing.method, self._packing.rounds_activations
            self._file = self._blocks = _packed(self._file, chosen, self._packing, directory)
        self.config: ModelConfig = _as_stored(config, self._file)
        sources = chosen.sources if self._packing is None else chosen.packed_sources or chosen.sources
        self._sources: Mapping[str, Places] = sources(self.config)
        if self.config.tie_embeddings and _EMBEDDING not in self._file.tensors and _HEAD in self._file.tensors:
            self._sources = _renamed(self._sources, {_EMBEDDING: _HEAD})
        expected = {source.tensor: source.shape for source in self._matrices()}
        check_tensors(directory, self._file.shapes, expected, self._is_harmless)
        self._file.check_readable(expected)
        self.dtype = jnp.dtype(self._file.dtype())
        self.formats: Mapping[str, str] = self._kept()

    def _kept(self) -> dict[str, str]:
        """Find the parameters that can stay as the files hold them: all matrices of a stack in the same format."""
        if self._blocks is None:
            return {}
        kept = {}
        for path, places in self._sources.items():
            found = {self._blocks.kept_format(source.tensor) for source in each(places)}
            name = found.pop()
            if name is not None and not found:
                kept[path] = name
        return kept

    def _is_harmless(self, name: str) -> bool:
        """Return whether an unexpected tensor may be ignored.

        These are rotary frequencies, which follow from config.json and were saved with early Llamas, the copy of the
        embedding that some tools save as a head although config.json says that the head is the embedding, and scales
        for a cache of 8 bits, which every token has of its own here.
        """
        is_copy = self.config.tie_embeddings and name == _HEAD
        return is_copy or name.endswith((".rotary_emb.inv_freq", *_KV_SCALES))


def _packed(
    file: SafetensorsFiles, chosen: Format[Settings], packing: Packing, directory: Path
) -> MXFP4Files | PackedFiles:
    """Find the packed weights.

    Raises:
        CheckpointError: there are none, or tensors that make none.
    """
    if chosen.packed_sources is not None:
        return MXFP4Files(file)
    found = PackedFiles(file, packing)
    if not any(found.packed()):
        raise CheckpointError(
            f"{directory / CONFIG}: {KEY} names {packing.method}, but no tensor is packed by it: remove it, or fetch "
            "the model again."
        )
    return found


def _as_stored(config: ModelConfig, file: SafetensorsFiles) -> ModelConfig:
    """Untie the head if config.json says that it is the embedding but the files hold another one, as transformers does.

    Usually the head in the files is a copy of the embedding, and then the model needs only one of them.
    """
    if not config.tie_embeddings or not {_EMBEDDING, _HEAD} <= file.tensors.keys():
        return config
    if file.tensors[_HEAD].shape != file.tensors[_EMBEDDING].shape:
        return replace(config, tie_embeddings=False)
    for start in range(0, file.tensors[_HEAD].shape[0], _ROWS_COMPARED):
        stop = min(start + _ROWS_COMPARED, file.tensors[_HEAD].shape[0])
        if not np.array_equal(file.read_rows(_HEAD, start, stop), file.read_rows(_EMBEDDING, start, stop)):
            return replace(config, tie_embeddings=False)
    return config


def _renamed(sources: Mapping[str, Places], names: Mapping[str, str]) -> dict[str, Places]:
    """Replace the names of tensors in the sources."""
    return {path: renamed(places, lambda name: names.get(name, name)) for path, places in sources.items()}


def _name(directory: Path) -> str:
    """Return the directory's name; for a folder of the hub's cache (models--org--name/snapshots/COMMIT), org/name."""
    directory = directory.absolute()
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return directory.name


def _open_weights(directory: Path) -> SafetensorsFiles:
    if (directory / WEIGHTS).is_file():
        return SafetensorsFiles([directory / WEIGHTS])
    if (directory / INDEX).is_file():
        return open_sharded(directory / INDEX)
    refuse_pickles(directory)
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    only = f", only {others[0]}" if others else ""
    raise CheckpointError(
        f"{directory} holds neither {WEIGHTS} nor {INDEX}{only}: fetch the weights, and their index if in shards."
    )


def refuse_pickles(directory: Path) -> None:
    """Refuse a directory whose weights are pickles.

    Raises:
        CheckpointError: it holds at least one; names the first.
    """
    if found := sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern)):
        raise CheckpointError(
            f"{directory} holds weights as a pickle only ({found[0]}), which is never opened because it can run code: "
            "fetch the model's safetensors, or convert it to them where you trust it."
        )
