"""How long prompts and answers are: pairs of tokens, drawn one request after the other.

A trace gives pairs, never two marginals: in real traffic the length of an answer depends on that of its prompt, and not
in one direction only.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..workload import WorkRequest

type Span = tuple[int, int]  # from and to, both included


class Lengths(Protocol):
    """A joint distribution of prompt and answer lengths."""

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Draw pairs: [count, 2] int64, prompt and answer tokens, 1 or more."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Any length of a span is as likely as any other; a span of one length is always that."""

    prompt: Span
    output: Span

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Draw pairs."""
        return np.stack([random.integers(low, high + 1, count) for low, high in (self.prompt, self.output)], axis=1)


@dataclass(frozen=True)
class Pairs:
    """Pairs of recorded requests, drawn with replacement."""

    pairs: np.ndarray  # [n, 2] int64

    @classmethod
    def of(cls, requests: Iterable[WorkRequest]) -> "Pairs":
        """Take the pairs of these requests, of which there is at least one."""
        return cls(np.array([(request.prompt_len, request.output_len) for request in requests], np.int64))

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Draw pairs."""
        drawn: np.ndarray = self.pairs[random.integers(0, len(self.pairs), count)]
        return drawn
