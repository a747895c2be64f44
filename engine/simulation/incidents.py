"""What may happen to a simulated engine besides requests: meshes that fail or come late, calls for roles, aborts.

All times are in seconds from the start of the workload.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MeshFails:
    """A mesh fails at `at`; made anew, it begins nothing for `down` seconds."""

    at: float
    mesh: int
    down: float = 0.0


@dataclass(frozen=True)
class MeshGone:
    """The process or host of a mesh is lost at `at`, which is known at once, and joins again, empty, `down` seconds
    later: of a real one what it takes to start it again and to load. Where it is `silent` at first, nobody knows for so
    many seconds: what it is given meanwhile is lost with the rest. Only a transfer from it fails before that."""

    at: float
    mesh: int
    down: float
    silent: float = 0.0

    def __post_init__(self) -> None:
        """Check the times.

        Raises:
            ValueError: it is back before anybody has missed it.
        """
        if not 0 <= self.silent <= self.down:
            raise ValueError(f"silent={self.silent!r}, down={self.down!r}: give 0 <= silent <= down, in seconds.")


@dataclass(frozen=True)
class MeshStarts:
    """A mesh is not ready before `at`: what it is given until then waits."""

    at: float
    mesh: int


@dataclass(frozen=True)
class RolesCalled:
    """Somebody calls `set_roles` at `at`."""

    at: float
    roles: str | Mapping[int, str]
    drain_timeout: float = 600.0


@dataclass(frozen=True)
class Aborted:
    """The caller of request `number` does not want it any more at `at`. Unknown and ended ones are ignored."""

    at: float
    number: int


type Incident = MeshFails | MeshGone | MeshStarts | RolesCalled | Aborted
