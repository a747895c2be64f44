"""What has changed in the meshes' room since it was looked at: slots and pages that were taken or freed, and blocks
that were cached, so that a prompt that has them needs less room.

Whoever keeps meshes sorted by room looks again at those in `changed` alone, and empties it. A request that found no
room is not asked again as long as its `Refusal` holds.
"""

from collections.abc import Sequence


class RoomChanges:
    """One record for all meshes of an engine."""

    def __init__(self) -> None:
        self.changed: set[int] = set()
        self.freed = 0  # how often slots or pages became free, on any mesh
        self._refusals: list[Refusal] = []

    def touch(self, mesh: int) -> None:
        """Note that the room or the work of this mesh has changed, and that there is no more room than before."""
        self.changed.add(mesh)

    def more(self, mesh: int) -> None:
        """Note that this mesh may have more room."""
        self.changed.add(mesh)
        self.freed += 1

    def cached(self, hashes: Sequence[bytes], first: int) -> None:
        """Note that blocks of a prompt were cached on some mesh, from the `first` on."""
        for refusal in self._refusals:
            refusal.has_news(hashes, first)

    def refusal(self) -> "Refusal":
        """Make the refusal of a queue, which ends when there may be room."""
        refusal = Refusal(self)
        self._refusals.append(refusal)
        return refusal


class Refusal:
    """Which request of a queue found no room, and whether it would be in vain to ask again."""

    def __init__(self, room: RoomChanges):
        self._room = room
        self._who: object | None = None
        self._hashes: Sequence[bytes] = ()
        self._freed = 0  # how often something had become free then

    def note(self, who: object, hashes: Sequence[bytes]) -> None:
        """Note that this one, with these blocks, found no room."""
        self._who, self._hashes, self._freed = who, hashes, self._room.freed

    def holds(self, who: object) -> bool:
        """Return whether this one found no room, and nothing has changed for it."""
        return self._who is who and self._freed == self._room.freed

    def has_news(self, hashes: Sequence[bytes], first: int) -> None:
        """End the refusal if the refused one has some of the blocks of a prompt from the `first` on: the `first` then,
        since a hash stands for all blocks before it too."""
        if first < min(len(hashes), len(self._hashes)) and hashes[first] == self._hashes[first]:
            self._who = None
