"""What has changed in the meshes' room since it was looked at: slots and pages that were taken or freed.

Whoever keeps meshes sorted by room looks again at those in `changed` alone, and empties it. Whoever found no room need
not try again while `freed` is the same.
"""


class RoomChanges:
    """One record for all meshes of an engine."""

    def __init__(self) -> None:
        self.changed: set[int] = set()
        self.freed = 0  # how often slots or pages became free, on any mesh

    def less(self, mesh: int) -> None:
        """Note that this mesh has less room, or other work."""
        self.changed.add(mesh)

    def more(self, mesh: int) -> None:
        """Note that this mesh may have more room."""
        self.changed.add(mesh)
        self.freed += 1
