"""Roles of a pool's meshes as people write them: read and checked, before anything runs.

"prefill=1,decode=3" says how many meshes have which role; {0: "prefill"} names meshes, and the others keep theirs.
Which meshes change, and how, is decided elsewhere (`scheduler/roles.py`).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .protocol.events import RoleName
from .topology import Role, Topology, TopologyError

ROLES = (Role.PREFILL, Role.DECODE, Role.BOTH)
NAMES: dict[Role, RoleName] = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.BOTH: "both"}  # in events
_PART = re.compile(r"(?P<role>\w+)(\(mode=(?P<mode>\w+)\))?=(?P<count>[0-9]{1,6})")
_EXAMPLE = "'prefill=1,decode=3' or 'both=1,decode=3'"


@dataclass(frozen=True)
class Goal:
    """What roles are wanted: so many meshes of each, or these meshes. One of the two is empty."""

    counts: dict[Role, int] = field(default_factory=dict)  # in the order in which they were written
    meshes: dict[int, Role] = field(default_factory=dict)


def read_goal(wanted: str | Mapping[int, str], topology: Topology) -> Goal:
    """Read the roles that a running pool is to have.

    Raises:
        TopologyError: no pool, unreadable text, a role or mesh that does not exist, counts that do not add up, or
            nobody left to prefill or to decode.
    """
    if not topology.is_pool:
        raise TopologyError(f"topology '{topology}' is no pool, so its roles stay: start with topology='pool=N'.")
    if isinstance(wanted, str):
        counts, is_fused = _read_counts(wanted, len(topology.meshes))
        if is_fused and not topology.meshes[0].fused:
            raise TopologyError(
                f"roles {wanted!r} need programs of fused steps, which this engine has not compiled: "
                "name both(mode=fused) in roles= when it starts."
            )
        return Goal(counts=counts)
    if isinstance(wanted, Mapping):
        return Goal(meshes=_read_meshes(wanted, len(topology.meshes)))
    raise TopologyError(
        f"roles {wanted!r} are not usable: write for example {_EXAMPLE}, or name meshes as {{0: 'both'}}."
    )


def starting_roles(text: str | None, topology: Topology) -> tuple[Role, ...]:
    """Return the role that each mesh of a pool begins with, in the order written; None: all do both. Of a topology that
    is no pool: none.

    Raises:
        TopologyError: as `read_goal`.
    """
    if not topology.is_pool:
        if text is None:
            return ()
        raise TopologyError(
            f"roles={text!r} goes with a pool, and topology '{topology}' is none: write 'pool=N', or leave roles= out."
        )
    if text is None:
        return (Role.BOTH,) * len(topology.meshes)
    counts, _ = _read_counts(text, len(topology.meshes))
    return tuple(role for role, count in counts.items() for _ in range(count))


def names_fused(text: str | None) -> bool:
    """Return whether roles name both(mode=fused)."""
    return text is not None and "(mode=fused)" in text.replace(" ", "")


def uncovered(roles: Iterable[Role]) -> str | None:
    """Say which phase no mesh of these roles serves, "prefill" or "decode"; None: both are served."""
    present = set(roles)
    if not any(role.prefills for role in present):
        return "prefill"
    return None if any(role.decodes for role in present) else "decode"


def as_text(roles: Iterable[Role]) -> str:
    """Write roles as counts, as `read_goal` reads them."""
    counts = Counter(roles)
    return ",".join(f"{role}={counts[role]}" for role in ROLES if counts[role])


def check_roles(roles: Sequence[Role], topology: Topology) -> None:
    """Refuse starting roles that do not go with a topology.

    Raises:
        TopologyError: roles without a pool, or not one for each mesh, or nobody to prefill or to decode.
    """
    if not roles:
        return
    if not topology.is_pool or len(roles) != len(topology.meshes) or Role.POOL in roles:
        raise TopologyError(
            f"roles {as_text(roles)!r} do not go with topology '{topology}': give each mesh of a pool one."
        )
    _check_covered(roles, as_text(roles))


def _read_counts(text: str, meshes: int) -> tuple[dict[Role, int], bool]:
    """Read counts, and whether meshes that do both are to be fused."""
    counts: dict[Role, int] = {}
    is_fused = False
    for part in text.replace(" ", "").split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise TopologyError(f"roles {text!r} are not readable at {part!r}: write for example {_EXAMPLE}.")
        role, count = _role(match["role"], f"roles {text!r}"), int(match["count"])
        if role in counts or count < 1:
            raise TopologyError(
                f"roles {text!r} do not give one count of 1 or more for each role, at {part!r}: leave out roles that "
                "no mesh has."
            )
        if match["mode"] not in (None, "alternate", "fused") or (match["mode"] and role is not Role.BOTH):
            raise TopologyError(
                f"roles {text!r} have no mode {match['mode']!r} at {part!r}: only both has modes, alternate and fused."
            )
        counts[role] = count
        is_fused |= match["mode"] == "fused"
    if sum(counts.values()) != meshes:
        raise TopologyError(
            f"roles {text!r} are of {sum(counts.values())} meshes and the pool has {meshes}: let the counts add up to "
            f"{meshes}."
        )
    _check_covered(counts, text)
    return counts, is_fused


def _read_meshes(wanted: Mapping[int, str], meshes: int) -> dict[int, Role]:
    if not wanted:
        raise TopologyError(f"roles {{}} name no mesh: write for example {_EXAMPLE}, or {{0: 'both'}}.")
    for mesh in wanted:
        if not isinstance(mesh, int) or isinstance(mesh, bool) or not 0 <= mesh < meshes:
            raise TopologyError(
                f"roles name mesh {mesh!r}, which is not in the pool: its meshes are 0 to {meshes - 1}."
            )
    return {mesh: _role(name, f"mesh {mesh}") for mesh, name in sorted(wanted.items())}


def _role(name: object, where: str) -> Role:
    if name not in ROLES:
        raise TopologyError(
            f"{where}: there is no role {name!r} for a mesh of a pool: the roles are {', '.join(ROLES)}."
        )
    return Role(str(name))


def _check_covered(roles: Iterable[Role], text: str) -> None:
    missing = uncovered(roles)
    if missing is not None:
        raise TopologyError(f"roles {text!r} leave no mesh to {missing}: give one the role {missing} or both.")
