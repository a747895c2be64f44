"""Full pages of one cache group, found by the hash of all tokens up to their end.

A block's hash stands for its whole chain, so equal hashes have equal ancestors. That is why `_parents` can remember for
all requests at once which blocks are cached with all that come before them: how far a chain is cached is then found by
bisection, however long it is, and only what was cached since is walked. Invariant: a block in `_parents` is cached, and
so are all before it; when one of them is evicted the memory is void, unless nothing in it comes after that one.
What is entered and struck out goes to the index of all meshes too.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from .prefix_index import CacheListing


class Run(NamedTuple):
    """Pages of blocks that follow each other, as a list and as an array; neither is changed."""

    pages: list[int]
    array: np.ndarray


_NO_PAGES = Run([], np.zeros(0, np.intp))


class PrefixCache:
    """Cached pages and their hashes, one to one."""

    def __init__(self, listing: CacheListing | None = None) -> None:
        """Begin empty; `listing` is told of every block, None: nobody is."""
        self._listing = listing
        self.changes = 0  # how often a page was entered or struck out
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._parents: dict[bytes, bytes] = {}  # block -> the one before it; b"": it is a first one
        self._children: dict[bytes, int] = {}  # block -> how many of `_parents` come right after it
        self._last_count = 0  # what `run_length` found last: prompts that begin alike are asked for one after the other
        self._last_run: tuple[int, bytes, Run] = 0, b"", _NO_PAGES  # likewise of `run`: blocks, the last of them, pages

    def __contains__(self, page: int) -> bool:
        return page in self._hash_of

    @property
    def blocks(self) -> Collection[bytes]:
        """Return the hashes of all cached pages."""
        return self._page_of.keys()

    def find(self, block_hash: bytes) -> int | None:
        """Find the cached page with these tokens."""
        return self._page_of.get(block_hash)

    def add(self, pages: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Enter full pages by the hashes of their blocks; the first page with a hash stays."""
        page_of, hash_of, entered = self._page_of, self._hash_of, list[bytes]()
        for page, block_hash in zip(pages, hashes, strict=True):
            if block_hash not in page_of and page not in hash_of:
                page_of[block_hash] = page
                hash_of[page] = block_hash
                entered.append(block_hash)
        self.changes += len(entered)
        if self._listing is not None:
            self._listing.enter(entered)

    def evict(self, pages: Collection[int]) -> None:
        """Strike pages out."""
        self.changes += 1
        self._last_run = 0, b"", _NO_PAGES
        hashes = [self._hash_of.pop(page) for page in pages]
        page_of, parents, children = self._page_of, self._parents, self._children
        for block_hash in hashes:
            del page_of[block_hash]
            if block_hash in children:
                self._forget()
            elif block_hash in parents:
                parent = parents.pop(block_hash)
                if children[parent] > 1:
                    children[parent] -= 1
                else:
                    del children[parent]
        if self._listing is not None:
            self._listing.evict(hashes)

    def clear(self) -> None:
        """Strike all pages out."""
        self.changes += 1
        if self._listing is not None:
            self._listing.strike(self._page_of)
        self._page_of.clear()
        self._hash_of.clear()
        self._forget()

    def run_length(self, hashes: Sequence[bytes], stop: int) -> int:
        """Count the first blocks of a chain that are cached, up to the first that is not; `stop` at most."""
        known, count = self._parents, self._known(hashes, stop)
        while count < stop and hashes[count] in self._page_of:
            parent = hashes[count - 1] if count else b""
            known[hashes[count]] = parent
            self._children[parent] = self._children.get(parent, 0) + 1
            count += 1
        self._last_count = count
        return count

    def run(self, hashes: Sequence[bytes]) -> Run:
        """Find the pages of blocks that follow each other and are all cached."""
        if not hashes:
            return _NO_PAGES
        count, last, run = self._last_run
        if count != len(hashes) or last != hashes[-1]:
            pages = list(map(self._page_of.__getitem__, hashes))
            run = Run(pages, np.array(pages, np.intp))
            self._last_run = len(hashes), hashes[-1], run
        return run

    def _known(self, hashes: Sequence[bytes], stop: int) -> int:
        """Count the first blocks of a chain that are in `_parents`: if one is, so are all before it."""
        known, low, high = self._parents, 0, stop
        if (guess := min(self._last_count, stop)) > 0 and hashes[guess - 1] in known:
            if guess == stop or hashes[guess] not in known:
                return guess
            low = guess + 1
        while low < high:
            middle = (low + high) // 2
            if hashes[middle] in known:
                low = middle + 1
            else:
                high = middle
        return low

    def _forget(self) -> None:
        self._parents.clear()
        self._children.clear()
        self._last_run = 0, b"", _NO_PAGES

    def check(self) -> None:
        """Raise unless pages and hashes are one to one, and what is remembered of chains is so."""
        if {page: key for key, page in self._page_of.items()} != self._hash_of:
            raise RuntimeError("the prefix cache and its pages do not match")
        known = self._parents
        if not known.keys() <= self._page_of.keys() or not set(known.values()) - {b""} <= known.keys():
            raise RuntimeError("the prefix cache remembers chains that are not whole")
        if Counter(known.values()) != self._children:
            raise RuntimeError("the prefix cache has miscounted the blocks that come after one")
