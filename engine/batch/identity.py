"""What makes two batch runs the same run, and the file beside the output that remembers it.

A run may go on where model, input, default sampling and whatever else decides its results (dtype, deterministic mode)
are the same. Paths, names and times do not count: a model that was copied is the same model. Topology, memory and
lengths may differ from start to start. The file is replaced atomically and is on disk before the first result is.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from ...models.checkpoints.gguf_parts import gguf_parts
from ..api.sampling_params import SamplingParams
from ..host.whole_file import write_whole

_FORMAT = 1
_ENGINE_LEFT_ALONE: Mapping[str, Any] = {
    "quantization": "auto",
    "activations": "int16",
    "kv_cache_dtype": "auto",
    "tool_call_parser": None,
    "reasoning_parser": None,
}
_HEAD_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 256, 4096


@dataclass(frozen=True)
class Identity:
    """What has to be the same in two starts of a batch run, so that the second goes on from where the first ended."""

    model: str  # hash of the model's files, see `model_digest`
    input: str  # hash of the input
    sampling: Mapping[str, Any]  # sampling parameters for what a line does not set
    engine: Mapping[str, Any]  # whatever else decides the results, such as the dtype

    @classmethod
    def of(cls, model: Path, input_digest: str, defaults: SamplingParams, engine: Mapping[str, Any]) -> "Identity":
        """Compute the identity of a run.

        Args:
            model: path of the checkpoint.
            input_digest: a hash of the input.
            defaults: sampling parameters for what a line does not set.
            engine: whatever else decides the results, such as {"dtype": "bfloat16"}.

        Raises:
            ValueError: there is no such model.
            OSError: the model's files cannot be read.
        """
        if not model.exists():
            raise ValueError(f"There is no model at {model}: give the path of a checkpoint.")
        return cls(model_digest(model), input_digest, asdict(defaults), engine)

    def save(self, path: Path) -> None:
        """Write the identity to `path` atomically."""
        write_whole(path, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).encode() + b"\n")

    def differences(self, path: Path) -> list[str]:
        """Return a phrase for each difference from the identity saved at `path`; an empty list if there is none.

        Another version of Twinmesh may have written it: what it does not say counts as left alone.

        Raises:
            ValueError: there is no such file, or it holds no identity.
        """
        try:
            then = json.loads(path.read_bytes())
            known = then["format"] == _FORMAT
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(f"{path} is missing or unreadable")
        now = json.loads(json.dumps(asdict(self)))
        plain = json.loads(json.dumps(asdict(SamplingParams())))
        found = [f"another {name}" for name in ("model", "input") if then.get(name) != now[name]]
        for group in ("sampling", "engine"):
            left_alone = plain if group == "sampling" else _ENGINE_LEFT_ALONE
            old, new = {**left_alone, **then.get(group, {})}, {**left_alone, **now[group]}
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            found += [f"{name}={old.get(name)!r} instead of {new.get(name)!r}" for name in names]
        return found


def model_digest(path: Path) -> str:
    """Hash a model's files in a time that hardly depends on their size.

    Hashed are each file's length, its first MiB, and 256 blocks of 4 KiB spread over the rest. The head of a GGUF or
    safetensors file has the model's configuration and the place of every tensor; the blocks tell models of one shape
    apart, unless they differ in a few tensors only. Of a GGUF file in parts, all parts count; of a directory, every
    file but hidden ones and texts about the model (.md), with its name.

    Raises:
        OSError: a file cannot be read.
    """
    hashed = blake2b(digest_size=16)
    for name, file in _model_files(path):
        size = file.stat().st_size
        hashed.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as opened:
            _sample(opened, size, hashed)
    return hashed.hexdigest()


def _model_files(path: Path) -> list[tuple[str, Path]]:
    """List the files that count for a model's hash, each as the name to hash and the path.

    The name to hash does not depend on what the model is called: it is the path below the model's directory, or, for a
    model in one file, the part's number.
    """
    if path.is_file():
        return [(str(index or ""), part) for index, part in enumerate(gguf_parts(path))]
    named = [(file.relative_to(path).as_posix(), file) for file in sorted(path.rglob("*")) if file.is_file()]
    return [
        (name, file)
        for name, file in named
        if not name.endswith(".md") and not any(part.startswith(".") for part in name.split("/"))
    ]


def _sample(file: IO[bytes], size: int, hashed: "blake2b") -> None:
    hashed.update(file.read(_HEAD_BYTES))
    rest = max(0, size - _HEAD_BYTES)
    if rest <= _SAMPLES * _SAMPLE_BYTES:
        hashed.update(file.read())
        return
    for index in range(_SAMPLES):
        file.seek(_HEAD_BYTES + (rest - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
        hashed.update(file.read(_SAMPLE_BYTES))
