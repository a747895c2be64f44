"""Which mesh of a pool has which role, and how that changes while requests run.

Invariants: at no event is a phase without a mesh; a role is gained at once, and what the mesh loses is drained
(`drains.py`): new work goes elsewhere meanwhile. Every call is answered once: when all meshes have their roles and
nothing drains, when a later call takes its place, when its time is over, or at once where it would leave a phase
without a mesh. When the time is over, meshes that have drained keep their new roles, as far as both phases stay
covered; those that have not take the role that they had. Where a mesh that is gone leaves a phase without one, another
mesh of the pool does both until it is back.
"""

from collections.abc import Callable, Iterable, Mapping

from ..protocol.actions import RolesOutcome, RolesSettled
from ..protocol.events import SetRoles
from ..roles import ROLES, as_text, uncovered
from ..topology import Role
from .agenda import ROLES_CALL, Agenda, Due
from .drains import Drains
from .mesh_state import MeshState, SharedState


class Roles:
    """The roles of one engine."""

    def __init__(self, shared: SharedState, drains: Drains, agenda: Agenda[Due]):
        """Begin in the meshes' roles."""
        self._meshes, self._drains, self._agenda = shared.meshes, drains, agenda
        self._counters, self._emit = shared.counters, shared.emit
        self._meshes_of: dict[Role, dict[int, None]] = {role: {} for role in ROLES}
        for mesh in self._meshes:
            self._meshes_of[mesh.role][mesh.index] = None
        self._call: SetRoles | None = None  # that was not answered
        self._answer: Callable[[RolesSettled], None] = shared.emit  # takes the answer
        self._before: dict[int, Role] = {}  # of meshes that have changed, their role when all was settled last
        self._stand_ins: dict[int, Role] = {}  # meshes that do both for one that is gone, and the role that they had

    def shown(self) -> list[str]:
        """Return each mesh's role, with what is left of the one before."""
        return [mesh.shown_role for mesh in self._meshes]

    def counts(self) -> dict[Role, int]:
        """Return how many meshes have each role, or gain it."""
        return {role: len(meshes) for role, meshes in self._meshes_of.items()}

    @property
    def are_changing(self) -> bool:
        """Return whether a call was not answered yet or a mesh still drains."""
        return self._call is not None or bool(self._drains.meshes)

    def set_roles(self, call: SetRoles, answer: Callable[[RolesSettled], None] | None = None) -> None:
        """Begin a change of roles. `answer` takes the answer; None: it is an action, for the core."""
        answer = answer or self._emit
        counts = {Role(name): count for name, count in call.counts.items()}
        changes = self._cheapest(counts) if counts else self._named(call.meshes)
        missing = uncovered(self._after(changes))
        if missing is not None:
            why = f"these roles leave no mesh to {missing}: the roles are {as_text(self._roles())}."
            answer(RolesSettled(call.call, "refused", why))
            return
        if self._call is not None:
            self._settle("superseded")
        self._call, self._answer = call, answer
        self._stand_ins.clear()
        self._agenda.set((ROLES_CALL, call.call), call.due)
        self._drains.new_flip()
        self._change(changes)

    def left(self, mesh: MeshState) -> None:
        """Take in that a mesh is gone: another of the pool does its part where nobody else does."""
        mesh.leave()
        self._cover()

    def joined(self, mesh: MeshState) -> None:
        """Take in that a mesh is back: those that stood in for it have their own role again, as far as that leaves no
        phase without a mesh."""
        mesh.join()
        self._cover()
        back = {index: role for index, role in self._stand_ins.items() if self._meshes[index].role is Role.BOTH}
        self._stand_ins.clear()
        for index, role in back.items():
            if uncovered(self._after({index: role})) is None:
                self._change({index: role})
            else:
                self._stand_ins[index] = role

    def _cover(self) -> None:
        """Let the mesh with the least to do do both, if a phase of the pool has none of those that are there."""
        there = [mesh for mesh in self._meshes if not mesh.is_gone]
        if there and self._meshes[0].spec.role is Role.POOL and uncovered(mesh.role for mesh in there) is not None:
            least = min(there, key=lambda mesh: (mesh.load, mesh.index))
            self._stand_ins.setdefault(least.index, least.role)
            self._change({least.index: Role.BOTH})

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
        while (missing := uncovered(self._after(back))) is not None:
            served_it = [index for index, role in self._before.items() if index not in back and _serves(role, missing)]
            if not served_it:  # it is gone
                break
            back |= {(index := min(served_it)): self._before[index]}
        self._change(back)
        self._cover()
        self._before.clear()
        self._settle("late", f"the roles were not reached in time: {held}; the roles are {as_text(self._roles())}.")

    def _roles(self) -> list[Role]:
        return [mesh.role for mesh in self._meshes]

    def _settle(self, outcome: RolesOutcome, why: str | None = None) -> None:
        assert self._call is not None
        call, self._call = self._call.call, None
        self._agenda.drop((ROLES_CALL, call))
        self._answer(RolesSettled(call, outcome, why))

    # ---- which meshes

    def _named(self, wanted: Mapping[int, str]) -> dict[int, Role]:
        return {index: Role(role) for index, role in wanted.items() if self._meshes[index].role != role}

    def _cheapest(self, wanted: Mapping[Role, int]) -> dict[int, Role]:
        """Choose the fewest changes that lead to these counts, of the meshes with least to drain and of equals the
        first."""
        more = {role: wanted.get(role, 0) - len(self._meshes_of[role]) for role in ROLES}
        pairs = [(old, new) for old in ROLES if more[old] < 0 for new in ROLES if more[new] > 0]
        changes: dict[int, Role] = {}
        offers = [offer for pair in pairs for offer in self._offers(*pair)]
        for _, index, old, new in sorted(offers, key=lambda offer: (*offer[:2], ROLES.index(offer[3]))):
            if index not in changes and more[new] > 0 and more[old] < 0:
                changes[index] = new
                more[new] -= 1
                more[old] += 1
        return changes

    def _offers(self, old: Role, new: Role) -> list[tuple[int, int, Role, Role]]:
        """List the meshes of a role that may take another: what each would have to drain, roughly and in tokens, its
        number, and both roles. -1: it still drains what it would get back."""
        meshes, size = [self._meshes[index] for index in self._meshes_of[old]], self._meshes[0].pages.page_size
        if old.prefills and not new.prefills:
            offers = [(mesh.prefill_load, mesh.index, old, new) for mesh in meshes]
        elif old.decodes and not new.decodes:
            offers = [(size * len(mesh.placed), mesh.index, old, new) for mesh in meshes]
        else:
            offers = [(0, mesh.index, old, new) for mesh in meshes]
        draining = [self._meshes[index] for index in self._drains.meshes]
        return offers + [
            (-1, mesh.index, old, new)
            for mesh in draining
            if mesh.role is old and mesh.draining is not None and _serves(new, mesh.draining)
        ]

    def _after(self, changes: Mapping[int, Role]) -> list[Role]:
        """List the roles that some mesh that is there has after these changes."""
        counts = {
            role: sum(not self._meshes[index].is_gone for index in meshes) for role, meshes in self._meshes_of.items()
        }
        for index, role in changes.items():
            if not self._meshes[index].is_gone:
                counts[self._meshes[index].role] -= 1
                counts[role] += 1
        return [role for role, count in counts.items() if count]

    # ---- the change

    def _change(self, changes: Mapping[int, Role]) -> None:
        """Give meshes other roles: all of them gain first."""
        for index, role in changes.items():
            mesh = self._meshes[index]
            if self._before.setdefault(index, mesh.role) is role:
                del self._before[index]
            del self._meshes_of[mesh.role][index]
            self._meshes_of[role][index] = None
            mesh.take_role(role)
            self._counters.flips += 1
        for index in changes:
            self._drains.begin(self._meshes[index])

    def check(self) -> None:
        """Raise unless both phases are covered and every drain is known."""
        for role, meshes in self._meshes_of.items():
            if meshes.keys() != {mesh.index for mesh in self._meshes if mesh.role is role}:
                raise RuntimeError(f"the roles are {as_text(self._roles())}, and {list(meshes)} are listed as {role}")
        there = [mesh.role for mesh in self._meshes if not mesh.is_gone]
        if there and self._meshes[0].spec.role is Role.POOL and (missing := uncovered(there)) is not None:
            raise RuntimeError(f"the roles {as_text(there)} of the meshes that are there leave no mesh to {missing}")
        self._drains.check()


def _serves(role: Role, phase: str) -> bool:
    return role.prefills if phase == "prefill" else role.decodes
