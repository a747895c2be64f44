"""Where a request sits on a mesh, and how it moves to another: slots, page tables, transfers. Data only; no JAX."""

from collections import deque
from dataclasses import dataclass, field


@dataclass(eq=False)
class BlockTable:
    """One request's pages of one cache group. `pages[i]` holds page `first` + i of the sequence.

    `first` is 0 where all tokens are kept; a windowed group drops pages that no later token sees. `spare`: pages
    reserved for tokens to come.
    """

    first: int = 0
    pages: list[int] = field(default_factory=list)
    spare: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        """One past the last page of the sequence that is here."""
        return self.first + len(self.pages)

    def between(self, start: int, stop: int) -> tuple[int, ...]:
        """Ids of pages `start` to `stop` - 1 of the sequence."""
        return tuple(self.pages[max(0, start - self.first) : max(0, stop - self.first)])


@dataclass(eq=False)
class Seat:
    """A request's place on one mesh; `tables` has one entry per cache group. Tokens before `writable` that are not
    in the cache yet may be written: their pages are here and nobody else's."""

    mesh: int
    slot: int
    tables: list[BlockTable]
    writable: int = 0


@dataclass(eq=False)
class Transfer:
    """Pages of one request on their way: from which mesh to which, bytes of staging on the one and on the other, and
    the pages per group that they will be written to. `has_state`: the last of a hand-off, with the request's state."""

    number: int
    source: int
    destination: int
    staged: tuple[int, int]
    pages: tuple[tuple[int, ...], ...]
    has_state: bool
    is_ready: bool = False


@dataclass(eq=False)
class Handoff:
    """A request's way to another mesh: the seat reserved there (credit), for each cache group the first page of the
    sequence that was not sent yet, and the transfers under way, in order."""

    seat: Seat
    unsent: list[int]
    transfers: deque[Transfer] = field(default_factory=deque)
