"""Fetches models named as on the Hugging Face hub, through `huggingface_hub` and its cache.

    org/name                     safetensors, configuration and tokenizer
    org/name@revision            the same at a branch, tag or commit
    org/name:model-Q4_K_M.gguf   one GGUF file of the repository
    org/name:Q4_K_M              the one GGUF file of that quantisation, as llama.cpp and vLLM name them

Only files that are read are fetched: never pickles, other frameworks' weights or files in folders. That library's own
settings choose the hub's address, its cache, tokens and offline mode (HF_HUB_OFFLINE).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?(:(?P<gguf>[\w./-]+))?", re.ASCII)
_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model")
# Folders hold other formats; files of these names hold the weights a second time, or only part of them.
_NOT_THESE = ("*/*", "consolidated*", "adapter_*")


@dataclass(frozen=True)
class HubModel:
    """A model on the hub."""

    repo: str  # org/name
    revision: str | None  # a branch, tag or commit; None: the main branch
    gguf: str | None  # a file's name or a quantisation; None: the repository's safetensors

    def __str__(self) -> str:
        """Return the id as the user wrote it."""
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.gguf}" if self.gguf else "")


def parse_hub_id(text: str) -> HubModel | None:
    """Parse a hub id; None if `text` does not have the form of one."""
    match = _HUB_ID.fullmatch(text)
    if match is None or text.startswith("."):
        return None
    return HubModel(match["repo"], match["revision"], match["gguf"])


def fetch_from_hub(model: HubModel) -> Path:
    """Return the model's directory or GGUF file in the hub's cache, after downloading what is missing there.

    Raises:
        CheckpointError: huggingface_hub is not installed; the model, revision or file does not exist, needs a licence
            to be accepted, or is not in the cache while the hub cannot be reached.
    """
    patterns = _FILES if model.gguf is None else _gguf_patterns(model.gguf)
    directory = _snapshot(model, patterns, _NOT_THESE if model.gguf is None else ())
    if model.gguf is None:
        if not (directory / "config.json").is_file():
            raise CheckpointError(
                f"{model.repo} holds no config.json, so it is no model in Hugging Face's format: for a GGUF file in it "
                f"write {model}:FILE.gguf."
            )
        return directory
    found = sorted(path for pattern in patterns for path in directory.glob(pattern))
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(directory)) for path in found) or "none"
        raise CheckpointError(f"{model} must mean one GGUF file and means {names}: give a file's whole name.")
    return found[0]


def cached_config(model: HubModel) -> Path | None:
    """Return the model's config.json where the hub's cache has it; nothing is fetched. None: it has none, or the
    library of the hub is not installed."""
    try:
        from huggingface_hub import constants, errors, try_to_load_from_cache
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(
            model.repo, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=model.revision
        )
    except errors.HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _gguf_patterns(gguf: str) -> tuple[str, ...]:
    if gguf.endswith(".gguf"):
        return (gguf,)
    cases = dict.fromkeys((gguf, gguf.upper(), gguf.lower()))
    return tuple(f"*{mark}{case}.gguf" for case in cases for mark in "-._")


def _snapshot(model: HubModel, patterns: tuple[str, ...], ignored: tuple[str, ...]) -> Path:
    """Return the repository's folder in the cache with the matching files; every failure is one sentence."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{model} is neither a file nor a directory here, and models of the Hugging Face hub need the package "
            "huggingface_hub: run: pip install 'twinmesh[hub]'"
        ) from None
    try:
        return Path(
            snapshot_download(
                model.repo, revision=model.revision, allow_patterns=list(patterns), ignore_patterns=list(ignored)
            )
        )
    except errors.GatedRepoError:
        problem = "needs its licence to be accepted on the hub, and a token: run: hf auth login"
    except errors.RepositoryNotFoundError:
        problem = "is neither a file or directory here nor a model that the Hugging Face hub shows to you"
    except errors.RevisionNotFoundError:
        problem = f"has no revision {model.revision!r}"
    except errors.LocalEntryNotFoundError:
        problem = "is neither a file or directory here nor in the cache of the Hugging Face hub, which was not reached"
    except errors.HFValidationError:
        problem = "is neither a file or directory here nor an id that the Hugging Face hub allows"
    except Exception as error:  # any error of its HTTP client, or a full disk
        problem = f"could not be fetched from the Hugging Face hub: {' '.join(str(error).split())[:200].rstrip('.')}"
    raise CheckpointError(f"{model} {problem}.")
