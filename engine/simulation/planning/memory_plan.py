"""What each device would hold of an engine that has not been started: a plan of memory as a table and as plain data.

All of it is planned, from a model's sizes and an engine's options; what compiled steps take is XLA's own analysis where
there is one. No device is asked, and no JAX is here.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, NamedTuple

from ....models.config import ModelConfig
from ...config import PoolSize
from ...metrics.report_text import WIDTH
from ...sizing.cache_groups import groups
from ...sizing.fitting import Need
from ...sizing.memory_needs import transit_bytes
from ...topology import MeshSpec
from ..capacity import Planned

FORMAT, VERSION = "twinmesh plan --memory", 1


class StepMemory(NamedTuple):
    """Bytes that a compiled program takes on each device besides what it is given."""

    program: str
    bytes: int


class Analysed(NamedTuple):
    """What the largest steps of each kind of mesh take, and who says so."""

    steps: dict[MeshSpec, list[StepMemory]]
    how: str  # as in "compiled for this GPU"


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of an engine's devices."""

    name: str  # of the model
    model: ModelConfig
    device: str  # its kind
    device_bytes: int | None  # None: nobody says
    planned: Planned
    analysed: Analysed | None = None  # None: nothing was compiled
    notes: tuple[str, ...] = ()

    @property
    def is_host(self) -> bool:
        """Return whether all meshes share one host's memory."""
        return self.planned.memory is not None and self.planned.memory.is_host


class KVGroup(NamedTuple):
    """The KV pool of one cache group."""

    window: int | None  # None: the layers attend to all tokens
    layers: int
    pages: int
    tokens: int  # that the pages hold
    bytes: int  # on each device, or on a host


class MeshMemory(NamedTuple):
    """What a mesh holds on each of its devices; on a host, on all of them together."""

    spec: MeshSpec
    need: Need
    groups: tuple[KVGroup, ...]
    staging: int  # bytes of hand-offs on their way

    @property
    def kv(self) -> int:
        """Return the bytes of all pools."""
        return sum(group.bytes for group in self.groups)

    @property
    def total(self) -> int:
        """Return the bytes of all that is planned."""
        return self.need.weight_bytes + self.need.state + self.need.temporaries + self.kv + self.staging


def meshes_of(plan: MemoryPlan) -> list[MeshMemory]:
    """Return what each mesh holds, in the topology's order."""
    config, pools, needs, _ = plan.planned
    return [
        _mesh(plan, spec, need, pool) for spec, need, pool in zip(config.topology.meshes, needs, pools, strict=True)
    ]


def _mesh(plan: MemoryPlan, spec: MeshSpec, need: Need, pool: PoolSize) -> MeshMemory:
    config, parts = plan.planned.config, 1 if plan.is_host else spec.tp
    # What goes along with hand-offs of requests' state is counted there.
    staging = max(0, pool.staging_bytes - (transit_bytes(config) * spec.tp if config.has_handoffs else 0))
    found = (
        KVGroup(group.window, len(group.layers), pages, pages * config.page_size, pages * size // parts)
        for group, pages, size in zip(groups(plan.model), pool.pages, pool.page_bytes, strict=True)
    )
    return MeshMemory(spec, need, tuple(found), staging // parts)


def as_text(plan: MemoryPlan) -> str:
    """Return the table, lines ended by a line feed."""
    lines = [*_heading(plan)]
    for mesh, count in Counter(meshes_of(plan)).items():
        lines += ["", *_table(plan, mesh, count), *_steps(plan, mesh)]
    lines += ["", *_notes(plan)]
    return "".join(f"{line}\n" for line in lines)


def _heading(plan: MemoryPlan) -> Iterator[str]:
    config = plan.planned.config
    yield from _wrapped(f"{plan.name} on {plan.device}: {config.topology}, {config.dtype}, planned and not measured")
    yield from _wrapped(
        f"max_model_len {config.max_model_len:,}, max_num_seqs {config.max_num_seqs:,}, prefill steps up to "
        f"{config.chunk_size:,} tokens, decode steps up to {config.decode_buckets[-1]:,} rows"
    )


def _table(plan: MemoryPlan, mesh: MeshMemory, count: int) -> Iterator[str]:
    what = f"{count} {mesh.spec.role} {'meshes' if count > 1 else 'mesh'}, tp {mesh.spec.tp}"
    yield _row(what, "GiB of the host" if plan.is_host else "GiB of a device")
    yield _row("weights", _gib(mesh.need.weight_bytes))
    yield from (_row(f"  {part.kind:12}{part.format}", _gib(part.bytes)) for part in mesh.need.weights)
    yield _row("request state, page tables", _gib(mesh.need.state))
    yield _row("temporaries that are set aside", _gib(mesh.need.temporaries))
    yield _row("staging of hand-offs", _gib(mesh.staging))
    yield _row("KV", _gib(mesh.kv))
    for group in mesh.groups:
        window = "all tokens" if group.window is None else f"window {group.window:,}"
        shown = f"  {window:12}{group.layers} layers, {group.pages:,} pages, {group.tokens:,} tokens"
        yield _row(shown, _gib(group.bytes))
    memory = plan.planned.memory
    if memory is not None and not plan.is_host:
        yield _row("left", _gib(memory.usable - mesh.total))
        yield _row(f"what an engine takes: {memory.share}", _gib(memory.usable))


def _steps(plan: MemoryPlan, mesh: MeshMemory) -> Iterator[str]:
    if plan.analysed is None:
        return
    steps = sorted(plan.analysed.steps[mesh.spec], key=lambda step: -step.bytes)
    yield from _wrapped(
        f"Steps take {_gib(steps[0].bytes)} GiB of the temporaries at most, {plan.analysed.how}: "
        f"{', '.join(f'{step.program} {_gib(step.bytes)}' for step in steps)}."
    )


def _notes(plan: MemoryPlan) -> Iterator[str]:
    if plan.is_host and plan.planned.memory is not None:
        left = plan.planned.memory.usable - sum(mesh.total for mesh in meshes_of(plan))
        yield from _wrapped(f"The host has {_gib(plan.planned.memory.usable)} GiB available; {_gib(left)} are left.")
    if plan.analysed is None:
        yield from _wrapped("Nothing was compiled: temporaries are an upper bound.")
    yield from (line for note in plan.notes for line in _wrapped(note))


def as_data(plan: MemoryPlan) -> dict[str, Any]:
    """Return the same for JSON, in bytes."""
    config, memory = plan.planned.config, plan.planned.memory
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": plan.name,
        "device": plan.device,
        "device_bytes": plan.device_bytes,
        "usable_bytes": None if memory is None else memory.usable,
        "topology": str(config.topology),
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "page_size": config.page_size,
        "meshes": [_mesh_data(plan, mesh) for mesh in meshes_of(plan)],
        "temporaries": None if plan.analysed is None else plan.analysed.how,
        "notes": list(plan.notes),
    }


def _mesh_data(plan: MemoryPlan, mesh: MeshMemory) -> dict[str, Any]:
    memory, steps = plan.planned.memory, None if plan.analysed is None else plan.analysed.steps[mesh.spec]
    return {
        "role": str(mesh.spec.role),
        "tp": mesh.spec.tp,
        "weights": [part._asdict() for part in mesh.need.weights],
        "request_state": mesh.need.state,
        "temporaries": mesh.need.temporaries,
        "staging": mesh.staging,
        "kv": [group._asdict() for group in mesh.groups],
        "left": None if memory is None or plan.is_host else memory.usable - mesh.total,
        "steps": None if steps is None else [step._asdict() for step in steps],
    }


def _row(what: str, value: str) -> str:
    return f"{what:{WIDTH - 16}}{value:>16}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}" if size >= 1 << 26 or size == 0 else f"{size / 2**30:,.4f}"


def _wrapped(text: str) -> list[str]:
    return wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
