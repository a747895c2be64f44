"""Sessions of coding agents in lanes: each lane has one session after the other, and an idle gap is capped.

Sessions are recorded ones, or drawn like them. A JSONL of recorded sessions has an object a line with `requests`, each
with t (s), in and out (tokens), hash_ids, and api_time (s), and those of helper agents in an entry with `requests` of
its own: the format of SemiAnalysis' cc-traces corpora, which AIPerf's documentation describes (docs/tutorials/
weka-trace.md, docs/benchmark-modes/semianalysis-agentx-faq.md). A gap counts from the end of one request to the start
of the next. An id stands for `block_size` tokens and all before it; the answer that a prompt goes on with is the
recorded one, so it is the ids' and not the engine's. Sessions share nothing, however often one is played.

Simpler than the original: helper agents take their turns one after the other with their session's own, in the order of
their starts, and a lane's next session is given beforehand, not the next of all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from os import PathLike
from pathlib import Path

import msgspec
import numpy as np

from ..workload import LATEST, WorkRequest
from .lengths import scaled

BLOCK = 64  # tokens, as the corpora have them
_SPAN = 2**32  # ids of one session, more than it has blocks


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session."""

    prompt_len: int
    output_len: int
    gap: float  # seconds from the end of the turn before it
    blocks: tuple[int, ...]  # from 0, of the session's own


type Session = Sequence[Turn]


@dataclass(frozen=True)
class LanesOfSessions:
    """A closed loop of sessions."""

    sessions: Callable[[int], Session]  # by its number, from 0
    lanes: int
    count: int  # sessions, of all lanes together
    cap: float  # seconds that a gap lasts at most

    def __iter__(self) -> Iterator[WorkRequest]:
        """Yield the turns of one session after the other; session i is of lane i modulo `lanes`."""
        last, number = [0] * self.lanes, 0  # of each lane, the number of its latest request
        for index in range(self.count):
            lane = index % self.lanes
            for turn, one in enumerate(self.sessions(index)):
                blocks = tuple([block + (index + 1) * _SPAN for block in one.blocks])
                begins = turn == 0 and index < self.lanes
                at, after = (0.0, None) if begins else (None, last[lane])
                gap = 0.0 if turn == 0 else min(one.gap, self.cap)
                yield WorkRequest(one.prompt_len, one.output_len, at, after, gap, blocks, f"s{index}")
                last[lane] = number
                number += 1


@dataclass(frozen=True)
class LogNormal:
    """A quantity whose logarithm is normal."""

    median: float
    sigma: float  # of the logarithm

    @classmethod
    def of(cls, median: float, p90: float) -> "LogNormal":
        """Return that with this median and 90th percentile, which is 1.2816 standard deviations above."""
        return cls(median, float(np.log(p90 / median)) / 1.2816)

    @classmethod
    def with_mean(cls, median: float, mean: float) -> "LogNormal":
        """Return that with this median and mean: mean = median x exp(sigma^2 / 2)."""
        return cls(median, float(np.sqrt(2 * np.log(mean / median))))

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Draw so many: [count]."""
        values: np.ndarray = self.median * np.exp(self.sigma * random.standard_normal(count))
        return values


@dataclass(frozen=True)
class DrawnSessions:
    """Sessions that grow: the prompt of a turn is all before it, answers included, and what is new."""

    turns: LogNormal
    new: LogNormal  # tokens of a prompt that no turn before it had
    output: LogNormal  # tokens of an answer
    gap: LogNormal  # seconds
    longest: int  # tokens: a turn that would have more, its answer included, is the end
    scale: float  # of lengths and gaps
    seed: int

    def __call__(self, index: int) -> Session:
        """Return session `index`."""
        random = np.random.default_rng((self.seed, index))
        count = max(1, round(self.turns.draw(random, 1)[0]))
        news, outputs = (self._lengths(kind, random, count) for kind in (self.new, self.output))
        gaps = np.minimum(self.scale * self.gap.draw(random, count), LATEST).tolist()
        turns, length = list[Turn](), 0
        for new, output, gap in zip(news, outputs, gaps, strict=True):
            prompt, most = length + new, self.longest - 1
            if prompt + output > self.longest:
                if turns:
                    break
                prompt = min(prompt, most)  # the first turn of a session is there, cut to what there is room for
            length = min(prompt + output, self.longest)
            turns.append(Turn(prompt, length - prompt, gap, tuple(range(-(-length // BLOCK)))))
        return turns

    def _lengths(self, kind: LogNormal, random: np.random.Generator, count: int) -> list[int]:
        return [scaled(length, self.scale) for length in kind.draw(random, count).tolist()]


class _Request(msgspec.Struct):
    """One entry of a session; other fields are ignored."""

    t: float
    length: int = msgspec.field(name="in", default=0)
    out: int = 0
    hash_ids: tuple[int, ...] = ()
    api_time: float = 0.0
    requests: tuple["_Request", ...] = ()


class _Recorded(msgspec.Struct):
    """One line."""

    requests: tuple[_Request, ...]
    block_size: int = BLOCK


def read_sessions(path: str | PathLike[str], longest: int, scale: float = 1.0) -> list[Session]:
    """Read the recorded sessions none of whose turns has more than `longest` tokens, its answer included.

    Lengths and gaps are multiplied by `scale`; blocks stand for fewer tokens then, and shared ones stay shared.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no session, or none fits.
    """
    decode, found, number = msgspec.json.Decoder(_Recorded).decode, list[Session](), 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                session = _session(decode(line), scale)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: {error}: give a session with requests, each with t, in, out, hash_ids and "
                    "api_time."
                ) from None
            if session and max(turn.prompt_len + turn.output_len for turn in session) <= longest:
                found.append(session)
    if not found:
        raise ValueError(
            f"{path}: none of its {number} sessions fits into {longest:,} tokens: raise max_model_len, or scale more."
        )
    return found


def _session(recorded: _Recorded, scale: float) -> Session:
    if recorded.block_size != BLOCK:
        raise ValueError(f"its blocks have {recorded.block_size} tokens, not {BLOCK}")
    requests = sorted(_flat(recorded.requests), key=lambda one: one.t)
    places: dict[int, int] = {}
    turns, end = list[Turn](), 0.0
    for one in requests:
        if one.length < 1 or one.out < 1:
            continue  # asked for nothing: it has no first token
        ids = tuple([places.setdefault(block, len(places)) for block in one.hash_ids])
        prompt, output = (scaled(length, scale) for length in (one.length, one.out))
        turns.append(Turn(prompt, output, scale * max(0.0, one.t - end), _thinned(ids, prompt, scale)))
        end = max(end, one.t + one.api_time)
    return turns


def _flat(requests: Sequence[_Request]) -> Iterator[_Request]:
    for one in requests:
        if one.requests:
            yield from _flat(one.requests)
        else:
            yield one


def _thinned(ids: tuple[int, ...], prompt: int, scale: float) -> tuple[int, ...]:
    """Return an id for each full block of `prompt` tokens: that of the recorded block in which its end was."""
    if scale == 1:
        return ids
    count = min(prompt // BLOCK, int(len(ids) * scale))
    return tuple([ids[min(ceil((place + 1) / scale - 1e-9), len(ids)) - 1] for place in range(count)])
