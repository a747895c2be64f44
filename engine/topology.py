"""Topologies: which meshes an engine has, and the role of each. It looks at no device."""

import re
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

AUTO = "auto"  # in place of a topology: start-up chooses one


class TopologyError(ValueError):
    """A topology that cannot be read, or that the devices cannot carry."""


class Role(StrEnum):
    """What a mesh is for. `BOTH` alternates a prefill chunk and a decode step, or packs them into one (`fused`).

    `POOL` is of topologies alone: a mesh that can take each of the other roles, and changes it while it runs.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"
    POOL = "pool"

    @property
    def prefills(self) -> bool:
        """Return whether prompts are, or may be, prefilled by a mesh of this role."""
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        """Return whether tokens are, or may be, decoded by a mesh of this role."""
        return self is not Role.PREFILL


@dataclass(frozen=True)
class MeshSpec:
    """What one mesh is for and how large it is."""

    role: Role
    tp: int = 1  # tensor-parallel degree, which is its number of devices
    # BOTH, and POOL while it does both: a step may hold prompt chunks and decode rows at once (Sarathi-Serve, Agrawal
    # 2024).
    fused: bool = False
    # Expert-parallel degree: the mesh's devices in so many groups, each with its share of the experts (`sharding/
    # rules.py`). Attention is divided over all devices whatever it is.
    ep: int = 1

    @property
    def prefills(self) -> bool:
        """Return whether prompts are prefilled here, or will be if its role says so."""
        return self.role.prefills

    @property
    def decodes(self) -> bool:
        """Return whether tokens are decoded here, or will be if its role says so."""
        return self.role.decodes


_GROUP = re.compile(
    r"(?P<role>\w+)(\(mode=(?P<mode>\w+)\))?=(?P<count>[0-9]{1,18})(xtp(?P<tp>[0-9]{1,18})(ep(?P<ep>[0-9]{1,18}))?)?"
)
_MODES = ("alternate", "fused")
_MODES_TEXT = " and ".join(_MODES)
_MOST_DEVICES = 65536  # that a topology may name; how many a real engine may have is `sharding/mesh.py`'s business
_EXAMPLES = "'both=1', 'both(mode=fused)=2', 'prefill=1,decode=1', 'prefill=2xtp2,decode=1xtp4ep4' or 'pool=4'"


@dataclass(frozen=True)
class Topology:
    """The meshes of one engine, prefill meshes before decode meshes; or those of a pool.

    Raises:
        TopologyError: a set of roles that cannot serve, or meshes beside a pool that do not belong to it.
    """

    meshes: tuple[MeshSpec, ...]

    def __post_init__(self) -> None:
        """Refuse meshes that could prefill and not decode, or the other way round."""
        _check_roles({spec.role for spec in self.meshes}, str(self))
        if self.is_pool and len(set(self.meshes)) > 1:
            raise TopologyError(f"topology {self} is no pool: let all meshes of a pool have the same tp and mode.")

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Read `role=N` or `role=NxtpK`, joined by commas: N meshes of K devices each for that role.

        `role=NxtpKepE` divides the experts of a mixture over E groups of the K devices, and each expert's columns over
        the K / E devices of a group.

        `both(mode=fused)=N` packs prompt chunks and decode rows into one step; `both(mode=alternate)=N` is `both=N`.
        `pool=N` stands alone: its meshes change roles (`roles.py`); those of `pool(mode=fused)=N` that do both are
        fused.

        Raises:
            TopologyError: unreadable text, a zero count, a role given twice, or a set of roles that cannot serve.
        """
        if text.strip() == AUTO:
            raise TopologyError(
                f"topology {AUTO!r} is for an engine that starts on the devices that it finds: name the meshes here, "
                "for example as 'twinmesh plan' recommends."
            )
        groups: dict[Role, tuple[MeshSpec, ...]] = {}
        for part in text.replace(" ", "").split(","):
            role, specs = _parse_group(part, text)
            if role in groups:
                raise TopologyError(f"topology {text!r} names {role} twice: give one count for each role.")
            groups[role] = specs
        ordered = [groups[role] for role in Role if role in groups]
        return cls(tuple(spec for specs in ordered for spec in specs))

    @property
    def is_pool(self) -> bool:
        """Return whether the meshes change roles while they run."""
        return any(spec.role is Role.POOL for spec in self.meshes)

    @property
    def num_devices(self) -> int:
        """Return the number of devices needed when no two meshes share one."""
        return sum(spec.tp for spec in self.meshes)

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        return ",".join(
            f"{spec.role}{'(mode=fused)' if spec.fused else ''}={count}{_degrees(spec)}"
            for spec, count in Counter(self.meshes).items()
        )


def _degrees(spec: MeshSpec) -> str:
    experts = f"ep{spec.ep}" if spec.ep > 1 else ""
    return f"xtp{spec.tp}{experts}" if spec.tp > 1 else ""


def _parse_group(part: str, text: str) -> tuple[Role, tuple[MeshSpec, ...]]:
    match = _GROUP.fullmatch(part)
    if match is None:
        raise TopologyError(f"topology {text!r} is not readable at {part!r}: write for example {_EXAMPLES}.")
    if match["role"] not in set(Role):
        raise TopologyError(f"topology {text!r} has no role {match['role']!r}: the roles are {', '.join(Role)}.")
    count, tp, ep = int(match["count"]), int(match["tp"] or 1), int(match["ep"] or 1)
    if count < 1 or tp < 1 or ep < 1:
        raise TopologyError(f"topology {text!r} asks for none at {part!r}: counts, tp and ep start at 1.")
    if tp % ep:
        raise TopologyError(
            f"topology {text!r} divides {tp} devices into {ep} groups at {part!r}: use an ep that divides tp."
        )
    if count * tp > _MOST_DEVICES:
        raise TopologyError(
            f"topology {text!r} asks for {count * tp} devices at {part!r}: use at most {_MOST_DEVICES}."
        )
    role, mode = Role(match["role"]), match["mode"] or "alternate"
    if mode not in _MODES or (role in (Role.PREFILL, Role.DECODE) and match["mode"]):
        raise TopologyError(
            f"topology {text!r} has no mode {mode!r} at {part!r}: only both and pool have modes, {_MODES_TEXT}."
        )
    return role, (MeshSpec(role, tp, mode == "fused", ep),) * count


def _check_roles(roles: set[Role], text: str) -> None:
    if Role.POOL in roles:
        if len(roles) > 1:
            raise TopologyError(
                f"topology {text!r} has a pool beside other meshes: write 'pool=N' alone, and its roles in roles=."
            )
        return
    if Role.BOTH in roles and len(roles) > 1:
        raise TopologyError(
            f"topology {text!r} mixes 'both' with other roles, which only a pool does: write for example {_EXAMPLES}."
        )
    if Role.BOTH not in roles and len(roles) < 2:
        missing = Role.DECODE if Role.PREFILL in roles else Role.PREFILL
        raise TopologyError(f"topology {text!r} has no {missing} mesh: write for example 'prefill=1,decode=1'.")
