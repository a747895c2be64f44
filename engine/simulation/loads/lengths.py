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


def drawn_from(span: Span, random: np.random.Generator, count: int) -> np.ndarray:
    """Draw so many numbers of a span, each as likely as any other: [count] int64."""
    return random.integers(*span, count, endpoint=True)


def scaled(length: float, factor: float) -> int:
    """Return a length multiplied by `factor`, rounded, 1 or more."""
    return max(1, round(factor * length))


@dataclass(frozen=True)
class Uniform:
    """Any length of a span is as likely as any other; a span of one length is always that."""

    prompt: Span
    output: Span

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Draw pairs."""
        return np.stack([drawn_from(span, random, count) for span in (self.prompt, self.output)], axis=1)


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


@dataclass(frozen=True)
class Scaled:
    """Lengths multiplied by a factor, rounded: prompts of 1 token or more, answers of 2, so that each has a TPOT."""

    lengths: Lengths
    factor: float

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Draw pairs."""
        drawn = self.lengths.draw(random, count)
        times = np.rint(self.factor * drawn).astype(np.int64)
        kept: np.ndarray = np.maximum(times, np.minimum(drawn, (1, 2)))
        return kept
