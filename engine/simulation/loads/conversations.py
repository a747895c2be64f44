"""Conversations: requests whose prompts go on with an earlier prompt and its answer, after a pause.

The tokens of a conversation are one sequence: a system prompt, which many conversations share, a first message, its
answer, the next message, and so on. The prompt of a turn is all of it up to there. With people the pause is one of
thought and the messages are short; with agents a tool runs meanwhile, and what it returns is the next message.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ..workload import WorkRequest
from .arrival_times import ArrivalTimes
from .lengths import Lengths, Span, drawn_from

BLOCK = 16  # tokens; a divisor of every usual page, so that whatever pages are shared are found
_SPAN = 2**32  # ids of one conversation, more than it has blocks; those of system prompts come before all of them
_SYSTEM_SPAN = 2**16  # of one system prompt
MOST_SYSTEMS, LONGEST_SYSTEM = _SPAN // _SYSTEM_SPAN, _SYSTEM_SPAN * BLOCK


@dataclass(frozen=True)
class Talk:
    """What conversations are like."""

    lengths: Lengths  # of each turn's new tokens and of its answer
    turns: Span
    pause: float  # seconds, the mean of an exponential distribution
    system: int = 0  # tokens of the system prompt
    systems: int = 1  # different ones, each as likely
    opening: Span | None = None  # tokens of the first message; None: as of any other
    longest: int | None = None  # a turn that would have more tokens, its answer included, is the end; None: any


@dataclass(frozen=True)
class OpenConversations:
    """Conversations that begin at times of their own."""

    talk: Talk
    times: ArrivalTimes
    seed: int

    def __iter__(self) -> Iterator[WorkRequest]:
        """Yield the turns of one conversation after the other, in the order in which they begin."""
        number = 0
        for index, at in enumerate(chain.from_iterable(self.times.draw(np.random.default_rng(self.seed)))):
            random = np.random.default_rng((self.seed, index))
            for request in _turns(self.talk, random, index, number, float(at), None):
                yield request
                number += 1


@dataclass(frozen=True)
class LanesOfConversations:
    """A closed loop: each lane has one conversation after the other, with a pause between them as within."""

    talk: Talk
    lanes: int
    count: int  # conversations, of all lanes together
    seed: int

    def __iter__(self) -> Iterator[WorkRequest]:
        """Yield the turns of one conversation after the other; conversation i is of lane i modulo `lanes`."""
        last, number = [0] * self.lanes, 0  # of each lane, the number of its latest request
        for index in range(self.count):
            lane, random = index % self.lanes, np.random.default_rng((self.seed, index))
            at, after = (0.0, None) if index < self.lanes else (None, last[lane])
            for request in _turns(self.talk, random, index, number, at, after):
                yield request
                last[lane] = number
                number += 1


def _turns(
    talk: Talk, random: np.random.Generator, index: int, number: int, at: float | None, after: int | None
) -> Iterator[WorkRequest]:
    """Yield one conversation, whose first turn has this `number` and comes `at` a time or after a pause."""
    turns = int(drawn_from(talk.turns, random, 1)[0])
    pairs = talk.lengths.draw(random, turns)
    if talk.opening is not None:
        pairs[:1, 0] = drawn_from(talk.opening, random, 1)
    pauses = random.exponential(talk.pause, turns) if talk.pause > 0 else np.zeros(turns)
    system, length = int(random.integers(talk.systems)), talk.system
    for turn, ((new, output), pause) in enumerate(zip(pairs.tolist(), pauses.tolist(), strict=True)):
        prompt = length + new
        length = prompt + output
        if talk.longest is not None and length > talk.longest and turn:
            return
        blocks, session = _blocks(talk.system, system, index, length), f"c{index}"
        if turn == 0 and at is not None:
            yield WorkRequest(prompt, output, at, blocks=blocks, session=session)
        else:
            yield WorkRequest(prompt, output, None, after, pause, blocks, session)
        after = number + turn


def _blocks(shared: int, system: int, index: int, length: int) -> tuple[int, ...]:
    """Return ids of the first `length` tokens of a conversation; blocks of the system prompt are those of others too.

    The block in which they end has the id that it has when it is full: as far as it goes, what is in it is the same.
    """
    count = -(-length // BLOCK)
    common = min(shared // BLOCK, count)
    own, begin = (index + 1) * _SPAN, system * _SYSTEM_SPAN
    return (*range(begin, begin + common), *range(own + common, own + count))
