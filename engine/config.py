"""The engine's frozen configuration, checked when it is made. Control-plane module: no JAX here.

A `Topology` says which meshes exist and what each is for; an `EngineConfig` adds lengths, pages and buckets. Every
message says what to change. Nothing here looks at devices or memory: `mesh.py` and `kv_cache.py` do.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

# Of weights, activations and KV.
DTYPES = ("float32", "bfloat16", "float16")


class TopologyError(ValueError):
    """A topology that cannot be read, or that the devices cannot carry."""


class Role(StrEnum):
    """What a mesh is for. `BOTH` alternates a prefill chunk and a decode step."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


@dataclass(frozen=True)
class MeshSpec:
    """One mesh: its role and its tensor-parallel degree, which is its number of devices."""

    role: Role
    tp: int = 1

    @property
    def prefills(self) -> bool:
        """Whether prompts are prefilled here."""
        return self.role is not Role.DECODE

    @property
    def decodes(self) -> bool:
        """Whether tokens are decoded here."""
        return self.role is not Role.PREFILL


_GROUP = re.compile(r"(?P<role>\w+)=(?P<count>\d{1,6})(xtp(?P<tp>\d{1,6}))?")
_MOST_DEVICES = 1024
_EXAMPLES = "'both=1', 'prefill=1,decode=1' or 'prefill=2,decode=1'"


@dataclass(frozen=True)
class Topology:
    """The meshes of one engine, prefill meshes before decode meshes.

    Raises:
        TopologyError: a set of roles that cannot serve.
    """

    meshes: tuple[MeshSpec, ...]

    def __post_init__(self) -> None:
        """Refuse what could prefill and not decode, or the other way round."""
        _check_roles({spec.role for spec in self.meshes}, str(self))

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Read `role=N` or `role=NxtpK`, joined by commas: N meshes of K devices each for that role.

        Raises:
            TopologyError: unreadable text, a zero count, a role given twice, or a set of roles that cannot serve.
        """
        groups: dict[Role, tuple[MeshSpec, ...]] = {}
        for part in text.replace(" ", "").split(","):
            role, specs = _parse_group(part, text)
            if role in groups:
                raise TopologyError(f"topology {text!r} names {role} twice: give one count for each role.")
            groups[role] = specs
        ordered = [groups[role] for role in (Role.PREFILL, Role.DECODE, Role.BOTH) if role in groups]
        return cls(tuple(spec for specs in ordered for spec in specs))

    @property
    def num_devices(self) -> int:
        """Devices needed when no two meshes share one."""
        return sum(spec.tp for spec in self.meshes)

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        roles = {spec.role: spec.tp for spec in self.meshes}
        counts = {role: sum(spec.role is role for spec in self.meshes) for role in roles}
        return ",".join(f"{role}={counts[role]}" + (f"xtp{tp}" if tp > 1 else "") for role, tp in roles.items())


def _parse_group(part: str, text: str) -> tuple[Role, tuple[MeshSpec, ...]]:
    match = _GROUP.fullmatch(part)
    if match is None:
        raise TopologyError(f"topology {text!r} is not readable at {part!r}: write for example {_EXAMPLES}.")
    if match["role"] not in set(Role):
        raise TopologyError(f"topology {text!r} has no role {match['role']!r}: the roles are {', '.join(Role)}.")
    count, tp = int(match["count"]), int(match["tp"] or 1)
    if count < 1 or tp < 1:
        raise TopologyError(f"topology {text!r} asks for none at {part!r}: counts and tp start at 1.")
    if count * tp > _MOST_DEVICES:
        raise TopologyError(
            f"topology {text!r} asks for {count * tp} devices at {part!r}: use at most {_MOST_DEVICES}."
        )
    role = Role(match["role"])
    return role, (MeshSpec(role, tp),) * count


def _check_roles(roles: set[Role], text: str) -> None:
    if Role.BOTH in roles and len(roles) > 1:
        raise TopologyError(f"topology {text!r} mixes 'both' with other roles: write for example {_EXAMPLES}.")
    if Role.BOTH not in roles and len(roles) < 2:
        missing = Role.DECODE if Role.PREFILL in roles else Role.PREFILL
        raise TopologyError(f"topology {text!r} has no {missing} mesh: write for example 'prefill=1,decode=1'.")


@dataclass(frozen=True)
class EngineConfig:
    """Lengths and buckets of one engine; the same on every mesh.

    `max_model_len`: prompt and completion together, in tokens. `page_size`: tokens per KV page. `max_num_seqs`: slots,
    the requests a mesh holds at once. `prefill_buckets`: token counts that a prefill step is padded to; the largest is
    the chunk size. `prefill_rows`: requests packed into one prefill step. `decode_buckets`: row counts of decode steps.

    Raises:
        ValueError: a value out of range, or buckets that do not ascend or do not reach `max_num_seqs`.
    """

    topology: Topology
    max_model_len: int
    page_size: int = 64
    max_num_seqs: int = 32
    prefill_buckets: tuple[int, ...] = (64, 256, 512)
    prefill_rows: int = 8
    decode_buckets: tuple[int, ...] = (1, 8, 32)

    def __post_init__(self) -> None:
        """Refuse what no step could run."""
        # A prompt and one more token is the least that can be served.
        for name, least in (("max_model_len", 2), ("page_size", 1), ("max_num_seqs", 1), ("prefill_rows", 1)):
            check_whole_number(name, getattr(self, name), least)
        for name in ("prefill_buckets", "decode_buckets"):
            _check_buckets(name, getattr(self, name))
        if self.decode_buckets[-1] < self.max_num_seqs:
            raise ValueError(
                f"decode_buckets={self.decode_buckets} do not hold max_num_seqs={self.max_num_seqs} requests: "
                "let the last bucket be at least max_num_seqs."
            )

    @property
    def max_pages(self) -> int:
        """Pages of the longest request: the width of a page table."""
        return self.pages_for(self.max_model_len)

    @property
    def handoff_buckets(self) -> tuple[int, ...]:
        """Page counts that a hand-off is padded to: powers of two up to a whole request."""
        powers = [1 << i for i in range(self.max_pages.bit_length()) if 1 << i < self.max_pages]
        return (*powers, self.max_pages)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)


@dataclass(frozen=True)
class PoolSize:
    """One mesh's KV memory, in pages: the pool, and `staging` for hand-offs on their way (0: it takes part in none)."""

    pages: int
    staging: int


def bucket_for(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`; `buckets` ascend and the last one holds it."""
    return next(bucket for bucket in buckets if bucket >= size)


def check_whole_number(name: str, value: object, least: int) -> None:
    """Raise ValueError, naming the option, unless `value` is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is not usable: it must be a whole number, {least} or more.")


def _check_buckets(name: str, buckets: object) -> None:
    wanted = f"{name}={buckets!r} is not usable: give ascending whole numbers, 1 or more, in a tuple."
    if not isinstance(buckets, tuple) or not buckets or not all(type(bucket) is int for bucket in buckets):
        raise ValueError(wanted)
    if buckets[0] < 1 or not all(a < b for a, b in pairwise(buckets)):
        raise ValueError(wanted)
