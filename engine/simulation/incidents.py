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
    later: of a real one what it takes to miss it, to start it again and to load."""

    at: float
    mesh: int
    down: float


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
