"""Priority inheritance: whoever is to bring a block that a more urgent request waits for runs at that one's urgency,
right behind it in the order, until the block is there or will not come from it. So there is no inversion.

Invariants: an order that was lent is in place of the request's own in every list that keeps the order; whoever has
nothing to bring any more has its own again. Requests in the queue never borrow: they bring nothing.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

from ..paging.prefix_index import members
from .credit_queue import CreditQueue
from .mesh_state import SharedState
from .order import Order
from .request import Awaited, Request, State

type How = Literal["computing", "arriving"]  # what is done to a block: it is computed, or on its way to a mesh
type _Loan = tuple[How, bytes]


class PriorityInheritance:
    """Who runs at whose urgency, in one engine."""

    def __init__(self, shared: SharedState, asking: CreditQueue):
        """Begin without any; `asking` is the queue for credit, which keeps the order too."""
        self._meshes, self._shared, self._asking = shared.meshes, shared, asking
        self._own: dict[Request, Order] = {}  # of those that borrow
        self._lent: dict[Request, dict[_Loan, Order]] = {}  # to them
        self._borrowers: dict[_Loan, list[Request]] = {}

    def lend(self, how: How, block: bytes, order: Order) -> None:
        """Lend the order of one that waits for a block to those that are to compute it, or to bring it along."""
        for request in self._bringing(how, block):
            lent = *order, request.number
            if lent < self._own.get(request, request.order):
                self._own.setdefault(request, request.order)
                loans = self._lent.setdefault(request, {})
                loans[how, block] = min(lent, loans.get((how, block), lent))
                borrowers = self._borrowers.setdefault((how, block), [])
                if request not in borrowers:
                    borrowers.append(request)
                self._reorder(request)

    def repay(self, how: How, blocks: Iterable[Awaited]) -> None:
        """Note that these blocks are there, or that one that was to bring them will not."""
        for block in blocks if self._borrowers else ():
            if not isinstance(block, bytes):
                continue
            for request in self._borrowers.pop((how, block), ()):
                del self._lent[request][how, block]
                self._reorder(request)

    def forget(self, request: Request) -> None:
        """Give a request that leaves its own order back."""
        for loan in self._lent.pop(request, ()):
            self._borrowers[loan].remove(request)
            if not self._borrowers[loan]:
                del self._borrowers[loan]
        self._reorder(request)

    def _bringing(self, how: How, block: bytes) -> Iterator[Request]:
        is_computed = how == "computing"
        for index in members((self._shared.computing if is_computed else self._shared.arriving).get(block, 0)):
            mesh = self._meshes[index]
            placement = (mesh.computing if is_computed else mesh.arriving)[block]
            for request in mesh.placed:
                handoff = request.handoff
                if placement is request.placement or (handoff is not None and placement is handoff.placement):
                    yield request
                    break

    def _reorder(self, request: Request) -> None:
        """Put a request where it belongs now, in every list."""
        own, lent = self._own.get(request), self._lent.get(request)
        if own is None:
            return
        order = min(lent.values()) if lent else own
        if not lent:
            del self._own[request]
            self._lent.pop(request, None)
        if order == request.order:
            return
        handoff, asks = request.handoff, request.state is State.HANDOFF and request.placement is not None
        placements = [request.placement, None if handoff is None else handoff.placement]
        meshes = [self._meshes[placement.mesh] for placement in placements if placement is not None]
        for mesh in meshes:
            mesh.placed.remove(request)
        if asks:
            self._asking.remove(request)
        request.order = order
        for mesh in meshes:
            mesh.placed.add(request)
        if asks:
            self._asking.add(request)

    def check(self, requests: Iterable[Request]) -> None:
        """Raise unless those who borrow have something to bring, and the lists keep the order."""
        here = set(requests)
        for (how, block), borrowers in self._borrowers.items():
            if not borrowers or not set(borrowers) <= set(self._bringing(how, block)):
                raise RuntimeError(f"{len(borrowers)} requests borrow for {block!r}, which they do not bring")
        lent = {(request, loan) for request, loans in self._lent.items() for loan in loans}
        if self._own.keys() != self._lent.keys() or not self._own.keys() <= here:
            raise RuntimeError(f"{len(self._own)} requests have another order than their own, {len(self._lent)} borrow")
        if lent != {(request, loan) for loan, borrowers in self._borrowers.items() for request in borrowers}:
            raise RuntimeError("what was lent is not what was borrowed")
        for mesh in self._meshes:
            orders = [request.order for request in mesh.placed]
            if orders != sorted(orders):
                raise RuntimeError(f"mesh {mesh.index}: requests are not in order")
