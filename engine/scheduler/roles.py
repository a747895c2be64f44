"""Which mesh of a pool has which role, and how that changes while requests run.

Invariants: at no event is a phase without a mesh; a role is gained at once, and what the mesh loses is drained
(`drains.py`): new work goes elsewhere meanwhile. Every call is answered once: when all meshes have their roles and
nothing drains, when a later call takes its place, when its time is over, or at once where it would leave a phase
without a mesh. When the time is over, meshes that have drained keep their new roles, as far as both phases stay
covered; those that have not take the role that they had.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..metrics.counters import Counters
from ..protocol.actions import Action, RolesOutcome, RolesSettled
from ..protocol.events import SetRoles
from ..roles import ROLES, as_text, uncovered
from ..topology import Role
from .agenda import Agenda
from .drains import Drains
from .mesh_state import MeshState

DUE = "roles"  # the kind of what is due in the agenda, for a call


class Roles:
    """The roles of one engine."""

    def __init__(
        self,
        meshes: Sequence[MeshState],
        drains: Drains,
        agenda: Agenda[tuple[str, int]],
        counters: Counters,
        emit: Callable[[Action], None],
    ):
        """Begin in the meshes' roles; `emit` takes the answers."""
        self._meshes, self._drains, self._agenda = meshes, drains, agenda
        self._counters, self._emit = counters, emit
        self._counts = Counter(mesh.role for mesh in meshes)
        self._call: SetRoles | None = None  # that was not answered
        self._before: dict[int, Role] = {}  # of meshes that have changed, their role when all was settled last

    def shown(self) -> list[str]:
        """Return each mesh's role, with what is left of the one before."""
        return [mesh.shown_role for mesh in self._meshes]

    def set_roles(self, call: SetRoles) -> None:
        """Begin a change of roles."""
        counts = {Role(name): count for name, count in call.counts.items()}
        changes = self._cheapest(counts) if counts else self._named(call.meshes)
        missing = uncovered(self._counts_after(changes))
        if missing is not None:
            why = f"these roles leave no mesh to {missing}: the roles are {as_text(self._roles())}."
            self._emit(RolesSettled(call.call, "refused", why))
            return
        if self._call is not None:
            self._settle("superseded")
        self._call = call
        self._agenda.set((DUE, call.call), call.due)
        self._drains.new_flip()
        self._change(changes)

    def look(self, due: Iterable[int]) -> None:
        """Go on with drains, on meshes where something has happened, and answer the call if all is done."""
        if self._drains.meshes:
            self._drains.look(due)
        if self._call is not None and not self._drains.meshes:
            self._before.clear()
            self._settle("reached")

    def end_time(self, call: int) -> None:
        """Take roles back that were not reached, since the time of this call is over."""
        self.look(list(self._drains.meshes))
        if self._call is None or self._call.call != call:
            return
        held = "; ".join(self._drains.held_by(self._meshes[index]) for index in self._drains.meshes)
        back = {index: self._before[index] for index in self._drains.meshes if index in self._before}
        while (missing := uncovered(self._counts_after(back))) is not None:
            served_it = (index for index, role in self._before.items() if index not in back and _serves(role, missing))
            back |= {(index := min(served_it)): self._before[index]}
        self._change(back)
        self._before.clear()
        self._settle("late", f"the roles were not reached in time: {held}; the roles are {as_text(self._roles())}.")

    def _roles(self) -> list[Role]:
        return list(self._counts.elements())

    def _settle(self, outcome: RolesOutcome, why: str | None = None) -> None:
        assert self._call is not None
        call, self._call = self._call.call, None
        self._agenda.drop((DUE, call))
        self._emit(RolesSettled(call, outcome, why))

    # ---- which meshes

    def _named(self, wanted: Mapping[int, str]) -> dict[int, Role]:
        return {index: Role(role) for index, role in wanted.items() if self._meshes[index].role != role}

    def _cheapest(self, wanted: Mapping[Role, int]) -> dict[int, Role]:
        """Choose the fewest changes that lead to these counts, of the meshes with least to drain and of equals the
        first."""
        more = {role: wanted.get(role, 0) - self._counts[role] for role in ROLES}
        gaining = [role for role in ROLES if more[role] > 0]
        offers = [
            (_to_drain(mesh, role), mesh.index, role)
            for mesh in (self._meshes if gaining else ())
            if more[mesh.role] < 0
            for role in gaining
        ]
        changes: dict[int, Role] = {}
        for _, index, role in sorted(offers):
            old = self._meshes[index].role
            if index not in changes and more[role] > 0 and more[old] < 0:
                changes[index] = role
                more[role] -= 1
                more[old] += 1
        return changes

    def _counts_after(self, changes: Mapping[int, Role]) -> Counter[Role]:
        counts = self._counts.copy()
        counts.subtract(self._meshes[index].role for index in changes)
        counts.update(changes.values())
        return +counts

    # ---- the change

    def _change(self, changes: Mapping[int, Role]) -> None:
        """Give meshes other roles: all of them gain first."""
        self._counts = self._counts_after(changes)
        for index, role in changes.items():
            mesh = self._meshes[index]
            if self._before.setdefault(index, mesh.role) is role:
                del self._before[index]
            mesh.take_role(role)
            self._counters.flips += 1
        for index in changes:
            self._drains.begin(self._meshes[index])

    def check(self) -> None:
        """Raise unless both phases are covered and every drain is known."""
        roles = Counter(mesh.role for mesh in self._meshes)
        if roles != self._counts or (self._meshes[0].spec.role is Role.POOL and uncovered(roles) is not None):
            raise RuntimeError(f"the roles are {as_text(roles.elements())}, counted as {as_text(self._roles())}")
        self._drains.check()


def _to_drain(mesh: MeshState, role: Role) -> int:
    """Estimate roughly, in tokens, what a mesh would have to finish or move before it has this role alone; -1: it still
    drains what the role would give it back."""
    if mesh.draining is not None and _serves(role, mesh.draining):
        return -1
    prompts = mesh.prefill_load if mesh.prefills and not role.prefills else 0
    decodes = mesh.pages.page_size * len(mesh.placed) if mesh.decodes and not role.decodes else 0
    return prompts + decodes


def _serves(role: Role, phase: str) -> bool:
    return role.prefills if phase == "prefill" else role.decodes
