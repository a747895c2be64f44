"""Who holds which KV page of one mesh, and which slot. Control-plane module: no JAX here.

Invariant: every page is either free or held, never both, and never held twice; `check_integrity` proves it. Sharing
pages between holders comes with the prefix cache.
"""

from collections import deque


class PageAllocator:
    """Pages 0 to num_pages - 1. A holder is a name (a request id) and gets its pages all at once."""

    def __init__(self, num_pages: int):
        """All pages free."""
        self.num_pages = num_pages
        self._free = deque(range(num_pages))
        self._held: dict[str, tuple[int, ...]] = {}

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def holders(self) -> set[str]:
        """Who holds pages."""
        return set(self._held)

    def can_allocate(self, count: int) -> bool:
        """Whether `allocate` would succeed."""
        return count <= len(self._free)

    def allocate(self, holder: str, count: int) -> tuple[int, ...]:
        """Give `count` pages to `holder`, which holds none yet. The caller has asked `can_allocate`."""
        if holder in self._held or not self.can_allocate(count):
            raise RuntimeError(f"{holder} cannot be given {count} pages: {self.num_free} free, held {self._held}")
        pages = tuple(self._free.popleft() for _ in range(count))
        self._held[holder] = pages
        return pages

    def release(self, holder: str) -> None:
        """Free every page of `holder`. Oldest-freed pages are given out first."""
        self._free.extend(self._held.pop(holder))

    def check_integrity(self) -> None:
        """Raise if a page is lost, free twice, or both free and held."""
        seen = [*self._free, *(page for pages in self._held.values() for page in pages)]
        if sorted(seen) != list(range(self.num_pages)):
            raise RuntimeError(f"pages lost or doubled: free {list(self._free)}, held {self._held}")


class SlotTable:
    """Rows of a mesh's per-request device state. Each tenancy of a slot has its own epoch."""

    def __init__(self, num_slots: int):
        """All slots free, all epochs 0."""
        self._free = deque(range(num_slots))
        self._epochs = [0] * num_slots
        self._tenants: dict[int, str] = {}

    @property
    def num_free(self) -> int:
        """Slots without a tenant."""
        return len(self._free)

    @property
    def tenants(self) -> set[str]:
        """Who sits in a slot."""
        return set(self._tenants.values())

    def allocate(self, tenant: str) -> tuple[int, int]:
        """A free slot and its new epoch; the caller has asked `num_free`."""
        slot = self._free.popleft()
        self._epochs[slot] += 1
        self._tenants[slot] = tenant
        return slot, self._epochs[slot]

    def release(self, slot: int) -> None:
        """End the tenancy. A later result with the old epoch finds no tenant."""
        del self._tenants[slot]
        self._free.append(slot)

    def tenant(self, slot: int, epoch: int) -> str | None:
        """Who sits in `slot` if that is still the tenancy of `epoch`."""
        return self._tenants.get(slot) if self._epochs[slot] == epoch else None

    def check_integrity(self) -> None:
        """Raise if a slot is lost, free twice, or both free and taken."""
        if sorted([*self._free, *self._tenants]) != list(range(len(self._epochs))):
            raise RuntimeError(f"slots lost or doubled: free {list(self._free)}, taken {self._tenants}")
