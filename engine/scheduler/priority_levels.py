"""Which classes and priorities have requests on which meshes: where somebody may have to make way, found without a
look at every mesh."""

from collections import Counter
from collections.abc import Iterable, Iterator

type Level = tuple[int, int]  # the class, and in the interactive class the priority; the lowest comes first


class PriorityLevels:
    """Counts of the requests that are placed on meshes, those included whose place there is reserved."""

    def __init__(self) -> None:
        self._meshes: dict[Level, dict[int, int]] = {}  # for each level, how many it has on which mesh
        self.entered = 0  # how often a request was placed

    def enter(self, level: Level, mesh: int) -> None:
        """Count a request that is placed on a mesh."""
        counts = self._meshes.setdefault(level, {})
        counts[mesh] = counts.get(mesh, 0) + 1
        self.entered += 1

    def leave(self, level: Level, mesh: int) -> None:
        """Count it no more."""
        counts = self._meshes[level]
        counts[mesh] -= 1
        if not counts[mesh]:
            del counts[mesh]
            if not counts:
                del self._meshes[level]

    @property
    def are_several(self) -> bool:
        """Return whether requests of more than one level have a place."""
        return len(self._meshes) > 1

    def has_above(self, level: Level) -> bool:
        """Return whether any mesh has a request of a higher level."""
        return any(other > level for other in self._meshes)

    def meshes_above(self, level: Level) -> Iterator[int]:
        """Yield the meshes that have requests of higher levels, those of the highest first, each once."""
        seen: set[int] = set()
        for other in sorted((other for other in self._meshes if other > level), reverse=True):
            for mesh in self._meshes[other]:
                if mesh not in seen:
                    seen.add(mesh)
                    yield mesh

    def check(self, placed: Iterable[tuple[Level, int]]) -> None:
        """Raise unless these are the levels and meshes of all that are placed."""
        counted = Counter({(level, mesh): n for level, counts in self._meshes.items() for mesh, n in counts.items()})
        if counted != Counter(placed):
            raise RuntimeError(f"levels of placed requests are counted as {dict(counted)}")
