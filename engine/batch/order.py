"""The order in which a batch run gives its requests to the engine.

Prompts that begin alike follow each other, so that their shared beginning is computed once, before the prefix cache
drops it. Apart from that, the request that may run longest goes first, so that a run ends with several short requests
side by side, not with a long one alone. Only `ahead` requests and `tokens` prompt tokens are looked at together, so an
input of any size streams through; blocks of that size keep the input's order. No JAX here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from .request_lines import BatchRequest

LOOK_AHEAD = 1024
LOOK_AHEAD_TOKENS = 1 << 20
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Prepared:
    """A request that the engine will take, with its prompt as token ids."""

    request: BatchRequest
    key: bytes  # the prompt's token ids, 4 bytes each

    @classmethod
    def of(cls, request: BatchRequest, token_ids: list[int]) -> "Prepared":
        """Combine a request with its prompt's token ids."""
        return cls(request, np.array(token_ids, np.int32).tobytes())

    @property
    def token_ids(self) -> np.ndarray:
        """Return the prompt's token ids, [n] int32."""
        return np.frombuffer(self.key, np.int32)

    @property
    def longest(self) -> float:
        """Return the most tokens that all completions together may have; infinite if the request sets no limit."""
        params = self.request.sampling_params
        return float("inf") if params.max_tokens is None else params.n * params.max_tokens


def arrange(
    requests: Iterable[Prepared], *, page_size: int, ahead: int = LOOK_AHEAD, tokens: int = LOOK_AHEAD_TOKENS
) -> Iterator[Prepared]:
    """Yield the same requests in a better order, reading them as they are needed.

    Args:
        requests: read up to two at a time once the first block has been read.
        page_size: tokens per KV page; prompts share whole pages.
        ahead: the most requests in a block. Two blocks are held at once.
        tokens: prompt tokens after which a block is full, whatever the number of its requests.
    """
    source = iter(requests)
    block = _Block(source, ahead, tokens)
    block.read(ahead)
    while block.requests:
        following = _Block(source, ahead, tokens)
        for request in _by_prefix(block.requests, page_size * _BYTES_PER_TOKEN):
            yield request
            following.read(2)  # so that blocks grow back after one that long prompts filled early
        block = following


class _Block:
    """Requests that are put in order together."""

    def __init__(self, source: Iterator[Prepared], ahead: int, tokens: int) -> None:
        self.requests: list[Prepared] = []
        self._source, self._ahead, self._room = source, ahead, tokens * _BYTES_PER_TOKEN

    def read(self, most: int) -> None:
        """Read up to `most` more requests from the source, while the block has room."""
        for request in islice(self._source, min(most, self._ahead - len(self.requests)) if self._room > 0 else 0):
            self.requests.append(request)
            self._room -= len(request.key)
            if self._room <= 0:
                return


def _by_prefix(requests: list[Prepared], page: int) -> Iterator[Prepared]:
    """Yield requests in the order of a walk over the tree of their shared pages, of `page` bytes each.

    Where the tree branches, the branch with the request that may run longest comes first.
    """
    stack = [(requests, 0)]
    while stack:
        group, start = stack.pop()
        if len(group) == 1 or all(len(request.key) <= start for request in group):
            yield from group
            continue
        branches: dict[bytes, list[Prepared]] = {}
        for request in group:
            branches.setdefault(request.key[start : start + page], []).append(request)
        # The top of the stack comes first: ascending, and equals from last to first.
        last_to_first = list(branches.values())[::-1]
        stack += [(branch, start + page) for branch in sorted(last_to_first, key=_longest)]


def _longest(branch: list[Prepared]) -> float:
    return max(request.longest for request in branch)
