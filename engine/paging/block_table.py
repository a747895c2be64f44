"""The pages and the slot of a request on one mesh. Data only."""

from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class BlockTable:
    """One request's pages of one cache group."""

    first: int = 0  # page of the sequence that `pages` begins with: 0 unless a window has dropped pages
    pages: list[int] = field(default_factory=list)  # pages[i] holds page `first` + i of the sequence
    spare: list[int] = field(default_factory=list)  # reserved for tokens to come

    @property
    def end(self) -> int:
        """Return one past the last page of the sequence that is here."""
        return self.first + len(self.pages)

    def between(self, start: int, stop: int) -> tuple[int, ...]:
        """Return the ids of pages `start` to `stop` - 1 of the sequence, as far as they are here."""
        return tuple(self.pages[max(0, start - self.first) : max(0, stop - self.first)])


@dataclass(eq=False, slots=True)
class Placement:
    """One request's place on one mesh, from when it is reserved until its pages are freed."""

    mesh: int
    slot: int
    tables: list[BlockTable]  # one per cache group
    writable: int = 0  # tokens before this one may be written, if not cached yet: no other request holds their pages
    remembered: int = 0  # first blocks that were found in the prefix cache or entered into it
    underway: list[bytes] = field(default_factory=list)  # blocks first expected here: to be computed, or to arrive
