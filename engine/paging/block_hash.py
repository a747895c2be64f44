"""Hashes of full pages of tokens, chained, so that equal hashes mean equal prefixes. No JAX here.

A page's hash covers every token up to its end: blake2b, 16 bytes, over the hash of the page before (nothing for the
first) and the page's token ids as 32-bit little-endian integers. The prefix cache compares nothing else, hence a
cryptographic hash: nobody may find two prompts that share one.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_BYTES_PER_TOKEN = 4


def salted(salt: str) -> bytes:
    """Return what the chain of a prompt with this salt begins with, so that it shares no hash with any other salt."""
    return blake2b(salt.encode(errors="surrogatepass"), digest_size=16, person=b"twinmesh salt").digest()


def block_hashes(token_ids: Sequence[int] | np.ndarray, page_size: int, parent: bytes = b"") -> tuple[bytes, ...]:
    """Hash the full pages of a sequence, `token_ids` [n], of `page_size` tokens each: 16 bytes for each, first to last.

    What does not fill a page at the end has no hash. `parent` begins the chain: nothing, or what `salted` returns.
    """
    data = memoryview(_encode(token_ids))
    size, hashes = page_size * _BYTES_PER_TOKEN, list[bytes]()
    for start in range(0, len(data) - size + 1, size):
        parent = _chain(parent, data[start : start + size])
        hashes.append(parent)
    return tuple(hashes)


def next_block(parent: bytes, tokens: Sequence[int] | np.ndarray) -> bytes:
    """Hash the page of `tokens` [page_size] that follows the page with hash `parent`; empty: the first page."""
    return _chain(parent, _encode(tokens))


def _encode(tokens: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(tokens, dtype="<i4").tobytes()


def _chain(parent: bytes, page: bytes | memoryview) -> bytes:
    hashed = blake2b(parent, digest_size=16)
    hashed.update(page)
    return hashed.digest()
