"""The roles of a pool's meshes over a run, and why each changed. It looks; nothing here decides."""

from ..metrics.load_report import Flip
from ..scheduler.scheduler import Scheduler


class RoleChanges:
    """Roles from a time on, and the changes between them; times are those that `look` is given."""

    def __init__(self, scheduler: Scheduler, now: float) -> None:
        """Begin with the roles that there are."""
        counters = scheduler.counters
        self._count, self._planned = counters.flips, dict(counters.planned_flips)
        self.roles: list[tuple[float, tuple[str, ...]]] = [(now, _roles(scheduler))]
        self.flips: list[Flip] = []

    def look(self, scheduler: Scheduler, now: float) -> None:
        """See new roles, and whose wish they are: a caller's, or the planner's and for what reason."""
        counters = scheduler.counters
        if counters.flips == self._count:
            return
        planned = counters.planned_flips
        reason = next((why for why, count in planned.items() if count != self._planned.get(why, 0)), "called for")
        before, after = self.roles[-1][1], _roles(scheduler)
        self.roles.append((now, after))
        self.flips += [
            Flip(t=now, mesh=mesh, before=old, after=new, reason=reason)
            for mesh, (old, new) in enumerate(zip(before, after, strict=True))
            if old != new
        ]
        self._count, self._planned = counters.flips, dict(planned)


def _roles(scheduler: Scheduler) -> tuple[str, ...]:
    return tuple(mesh.role.value for mesh in scheduler.meshes)
