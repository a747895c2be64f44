"""Loads openai-harmony without network: the vocabulary that it would download is written from the model's own.

openai-harmony 0.0.8 reads `o200k_base.tiktoken` from the folder in TIKTOKEN_ENCODINGS_BASE, and checks its hash. A line
is the bytes of a token in base64 and its rank, which is its id: what tokenizer.json holds too. Where the variable is
set already, the folder is the user's.
"""

import hashlib
import os
import threading
from base64 import b64encode
from pathlib import Path
from typing import Any

from ...models.checkpoints.catalog import cache_directory
from ...models.errors import ChatTemplateError
from ...models.text.harmony_tokens import TEXTS
from ...models.text.tokenizer import Tokenizer
from ..host.extras import need
from ..host.whole_file import write_whole

_VARIABLE, _FILE = "TIKTOKEN_ENCODINGS_BASE", "o200k_base.tiktoken"
# Of the file, as openai-harmony 0.0.8 has it.
_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
_ENCODING = "HarmonyGptOss"
# Of the process: while a vocabulary is loaded the environment says where it is.
_LOCK = threading.Lock()


def load_encoding(tokenizer: Tokenizer, name: str) -> Any:
    """Load the package's encoding, for a model called `name` whose tokenizer this is.

    Raises:
        ValueError: the package is not installed, the tokenizer has another vocabulary, or the cache cannot be written.
    """
    package = need("openai_harmony", "harmony", f"The harmony format of {name}")
    ranks = ranks_of(tokenizer)
    if hashlib.sha256(ranks).hexdigest() != _SHA256:
        raise _another(name)
    with _LOCK:
        encoding = _load(package, ranks)
    # Text by id is what special tokens are known by, in both.
    if any(encoding.encode(text, allowed_special="all") != [tokenizer.backend.token_to_id(text)] for text in TEXTS):
        raise _another(name)
    return encoding


def _another(name: str) -> ChatTemplateError:
    return ChatTemplateError(
        f"{name} has the markers of the harmony format, and another vocabulary than o200k_base, which is that of "
        "openai-harmony: give it a chat_template."
    )


def _load(package: Any, ranks: bytes) -> Any:
    """Load it where the environment says, or from our own file."""
    if _VARIABLE in os.environ:
        return package.load_harmony_encoding(_ENCODING)
    os.environ[_VARIABLE] = str(_written(ranks))
    try:
        return package.load_harmony_encoding(_ENCODING)
    finally:
        del os.environ[_VARIABLE]


def _written(ranks: bytes) -> Path:
    """Write the file where it is missing or another; return its folder."""
    folder = cache_directory() / "harmony"
    path = folder / _FILE
    try:
        if path.exists() and path.read_bytes() == ranks:
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, ranks)
    except OSError as error:
        raise ChatTemplateError(
            f"{path}, which openai-harmony reads, cannot be written: {error.strerror or error}."
        ) from None
    return folder


def ranks_of(tokenizer: Tokenizer) -> bytes:
    """Spell the ordinary tokens of a vocabulary as tiktoken's files do."""
    added = tokenizer.backend.get_added_tokens_decoder()
    ordinary = tokenizer.backend.get_vocab(with_added_tokens=False).values()
    ranks = sorted(i for i in ordinary if i not in added)
    return b"".join(b64encode(tokenizer.piece(rank)) + f" {rank}\n".encode() for rank in ranks)
