"""The tokens of each conversation's latest request that has ended: a miss can then name the first token that differs.

The scheduler knows blocks alone, and says which is the first that differs (`scheduler/cache_reports.py`); only that one
is compared here. Bounded: the conversations used least recently are forgotten, and then a miss names the block alone.
For the dispatching thread alone.
"""

from collections import OrderedDict

import numpy as np
from msgspec.structs import replace

from ..protocol.cache_report import Miss, MissReason
from ..scheduler.sessions import MOST_SESSIONS
from .running_request import RunningRequest

MOST_TOKENS = 2**22  # 16 MB of them


class Conversations:
    """The conversations of one engine."""

    def __init__(self, page_size: int, most_tokens: int = MOST_TOKENS) -> None:
        """Begin without any."""
        self._size, self._most = page_size, most_tokens
        self._tokens: OrderedDict[str, np.ndarray] = (
            OrderedDict()
        )  # name -> [n] int32, the one used least recently first
        self._count = 0  # of all tokens

    def end(self, running: RunningRequest) -> None:
        """Keep the tokens of a request that ends, if the scheduler remembers its blocks."""
        name = running.submission.facts.service.session
        if name is None or not running.request.is_remembered:
            return
        self._drop(name)
        self._tokens[name] = running.tokens
        self._count += len(self._tokens[name])  # a simulated one has none, however long it is
        while self._count > self._most or len(self._tokens) > MOST_SESSIONS:
            self._drop(next(iter(self._tokens)))

    def name_token(self, running: RunningRequest) -> None:
        """Put the first token that differs into the report of a request that begins, as far as it is known."""
        name, report = running.submission.facts.service.session, running.request.cache
        if name is None or report is None or name not in self._tokens:
            return
        self._tokens.move_to_end(name)
        missed = tuple(self._sharper(miss, self._tokens[name], running.submission.prompt) for miss in report.missed)
        running.request.cache = replace(report, missed=missed)

    def _sharper(self, miss: Miss, earlier: np.ndarray, prompt: np.ndarray) -> Miss:
        if miss.reason is not MissReason.DIFFERS or miss.block is None:
            return miss
        start, stop = miss.block * self._size, (miss.block + 1) * self._size
        block = earlier[start:stop]
        differs = np.flatnonzero(block != prompt[start : start + len(block)])
        return replace(miss, token=start + int(differs[0])) if len(differs) else miss

    def _drop(self, name: str) -> None:
        tokens = self._tokens.pop(name, None)
        if tokens is not None:
            self._count -= len(tokens)
