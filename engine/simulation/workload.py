"""What a load consists of: requests with lengths, when each comes, and which prompts begin alike. No text, no tokens.

A request comes at a time of its own (open loop), or some time after an earlier one has ended (a closed loop, or the
next turn of a conversation): then nobody knows when before that has happened, in a simulation as in a run. Where loads
come from is elsewhere: `load_spec.py` names files and generators, and a decision log holds the load of its run.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

from msgspec.structs import replace

from ..protocol.service import DEFAULT, Service

LATEST = 1e9  # seconds that a workload may last; a clock that counts much further misses the length of a step


@dataclass(frozen=True, slots=True)
class WorkRequest:
    """One request of a workload; its number is its place in it, from 0."""

    prompt_len: int  # tokens, 1 or more
    output_len: int  # tokens that it generates, 1 or more, whatever they are
    at: float | None = None  # seconds from the workload's start; None: it waits for `after`
    after: int | None = None  # the number of an earlier request whose end it waits for
    pause: float = 0.0  # seconds from that end until it comes: somebody thinks, or a tool runs
    # An id for each block of `Workload.block_tokens` tokens of the prompt, the last for what does not fill one: it
    # stands for that block and all before it, so two prompts are the same as far as their ids are. Where a later
    # prompt goes on with the answer, the ids go on over the answer. Empty: it shares nothing.
    blocks: tuple[int, ...] = ()
    session: str | None = None  # the conversation that it goes on with
    service: Service = DEFAULT

    @property
    def time(self) -> float:
        """Return the time at which it comes, in seconds from the workload's start.

        Raises:
            ValueError: nobody knows it, since it waits for another.
        """
        if self.at is None:
            raise ValueError("the request waits for another one, and has no time of its own.")
        return self.at

    @property
    def served(self) -> Service:
        """Return how it is to be served, its conversation included."""
        service = self.service
        if self.session is None or service.session is not None:
            return service
        return replace(service, session=self.session)


@dataclass(frozen=True)
class Workload:
    """Requests, in the order of their times; one that waits for another comes anywhere after that one."""

    name: str  # for reports
    requests: Iterable[WorkRequest]  # again and again the same
    block_tokens: int = 512  # prompt tokens of a block


def checked(requests: Iterable[WorkRequest], name: str, longest: int) -> Iterator[WorkRequest]:
    """Yield the requests of workload `name`; prompt and answer may have `longest` tokens together.

    Raises:
        ValueError: one that cannot be, or for which there is no room; at that one.
    """
    last = 0.0
    for number, work in enumerate(requests):
        where = f"request {number} of {name}"
        if work.prompt_len < 1 or work.output_len < 1 or not 0 <= work.pause <= LATEST:
            raise ValueError(
                f"{where} has {work.prompt_len} prompt and {work.output_len} output tokens and a pause of "
                f"{work.pause:g} s: it needs 1 or more of each, and a pause from 0 to {LATEST:g} s."
            )
        if work.prompt_len + work.output_len > longest:
            raise ValueError(
                f"{where} has {work.prompt_len} prompt and {work.output_len} output tokens, and the engine has "
                f"room for max_model_len={longest} together: raise it, or leave such requests out."
            )
        if work.at is not None:
            if work.at > LATEST:
                raise ValueError(f"{where} comes at {work.at:.3g} s: only times up to {LATEST:g} s are possible.")
            if not last <= work.at < inf:
                raise ValueError(f"{where} comes at {work.at} s, after one at {last} s: sort them by their times.")
            last = work.at
        elif work.after is None or not 0 <= work.after < number:
            raise ValueError(f"{where} has no time and waits for no earlier one: give it `at` or `after`.")
        yield work


def page_hashes(blocks: Sequence[int], block_tokens: int, length: int, page_size: int) -> tuple[bytes, ...]:
    """Return hashes of the full pages of the first `length` tokens, as far as `blocks` tells what they are.

    They are equal exactly where two sequences hold the same page behind the same prefix. A page that ends inside a
    block has that block's id and its own place; sizes of pages and blocks need not divide each other.
    """
    pages = min(length, len(blocks) * block_tokens) // page_size
    return tuple(
        [
            b"%d:%d" % (blocks[(end - 1) // block_tokens], end)
            for end in range(page_size, pages * page_size + 1, page_size)
        ]
    )
