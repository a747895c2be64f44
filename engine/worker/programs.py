"""The programs of a mesh: which it needs, what is compiled first, and which sizes of steps can run already.

How requests sample makes no difference to a step, which is compiled once per size; the stages of sampling behind it are
programs of their own, by rows of logits. They are small: steps take nearly all of the time.

Compiled objects are called directly, so an unforeseen shape raises instead of compiling. A step whose size is still
being compiled runs in a larger size that is there: `Programs.size_for` says in which. Invariant: a size is ready once
everything that a step of that size may call is there, and the largest of each phase is ready before a mesh serves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jax.stages import Compiled

from ..config import bucket_for
from ..sampling.request_rows import Stage
from .mesh_plan import MeshPlan

# What is compiled for several sizes: "prefill" in tokens, fused steps included, and "decode" in rows.
Phase = Literal["prefill", "decode"]


@dataclass
class Programs:
    """One mesh's compiled programs."""

    allocate: Compiled | None = None  # makes an empty state, and dense rows
    prefill: dict[int, Compiled] = field(default_factory=dict)  # by bucket in tokens
    fused: dict[int, Compiled] = field(default_factory=dict)  # by bucket in tokens
    score: dict[int, Compiled] = field(default_factory=dict)  # by bucket in tokens
    decode: dict[int, Compiled] = field(default_factory=dict)  # by bucket in rows
    decode_steps: dict[tuple[int, int], Compiled] = field(default_factory=dict)  # by bucket in rows, and steps
    sample: dict[tuple[Stage, int], Compiled] = field(default_factory=dict)  # by stage of sampling, and rows of logits
    allow: dict[int, Compiled] = field(default_factory=dict)  # by rows of logits; there once masks were asked for
    gather: dict[tuple[int, int], Compiled] = field(default_factory=dict)  # by destination's tp, and bucket in pages
    scatter: dict[tuple[int, int], Compiled] = field(default_factory=dict)  # by source's tp, and bucket in pages
    scales: Compiled | None = None  # the channels' scales of 8-bit pages, its own and those of what it sends
    copy_page: dict[int, Compiled] = field(default_factory=dict)  # by cache group
    load_dense: Compiled | None = None
    ready: dict[Phase, tuple[int, ...]] = field(default_factory=dict)  # sizes of steps that can run, ascending

    def add(self, job: "Job", made: Compiled) -> None:
        """Take a compiled program in."""
        if not job.size:
            setattr(self, job.kind, made)
        else:
            getattr(self, job.kind)[job.size[0] if len(job.size) == 1 else job.size] = made

    def size_for(self, phase: Phase, size: int) -> int:
        """Return the size in which a step of this size runs: its own, or a larger one until that is ready."""
        return bucket_for(size, self.ready[phase])


class Job(NamedTuple):
    """A program to be compiled: the name of a field of `Programs`, and that field's key."""

    kind: str
    size: tuple[Any, ...] = ()


class Bundle(NamedTuple):
    """Programs that are of use only together: those of a step's size, or (no phase) those that all sizes need."""

    phase: Phase | None
    size: int
    jobs: tuple[Job, ...]


def bundles(plan: MeshPlan, needs: Callable[[Job], bool] = lambda job: True) -> tuple[list[Bundle], list[Bundle]]:
    """List what a mesh needs: the bundles that it cannot serve without, and the rest. `needs` may leave programs out.

    Of each phase the largest size comes first, because it can serve every step; the others follow from the smallest
    on, where a larger one costs most.
    """
    first, rest = [], []
    for phase, sizes, list_jobs in _phases(plan):
        of_phase = [Bundle(phase, size, tuple(filter(needs, list_jobs(plan, size)))) for size in sizes]
        first += of_phase[-1:]
        rest += of_phase[:-1]
    return [*first, Bundle(None, 0, tuple(filter(needs, _of_all(plan))))], rest


def jobs_of_masks(plan: MeshPlan) -> tuple[Job, ...]:
    """List what a mesh needs besides, once some request constrains its tokens by masks."""
    rows = _rows_of_prefill(plan) | set(plan.config.decode_buckets if plan.spec.decodes else ())
    return tuple(Job("allow", (count,)) for count in sorted(rows))


def _phases(plan: MeshPlan) -> Iterator[tuple[Phase, tuple[int, ...], Callable[[MeshPlan, int], Iterator[Job]]]]:
    """List the mesh's phases, their sizes, and what lists the programs of one."""
    if plan.spec.prefills:
        yield "prefill", plan.config.prefill_buckets, _of_prefill
    if plan.spec.decodes:
        yield "decode", plan.config.decode_buckets, _of_decode


def _of_prefill(plan: MeshPlan, tokens: int) -> Iterator[Job]:
    yield Job("prefill", (tokens,))
    if plan.spec.fused:
        yield Job("fused", (tokens,))
    yield Job("score", (tokens,))


def _of_decode(plan: MeshPlan, rows: int) -> Iterator[Job]:
    yield Job("decode", (rows,))
    if plan.config.decode_steps > 1:
        yield Job("decode_steps", (rows, plan.config.decode_steps))
    if rows not in _rows_of_prefill(plan):
        yield from (Job("sample", (stage, rows)) for stage in Stage)


def _of_all(plan: MeshPlan) -> Iterator[Job]:
    """List what serves steps of every size. Hand-offs are here, as their staging is counted in their own sizes."""
    config = plan.config
    yield Job("allocate")
    yield from (Job("sample", (stage, rows)) for rows in sorted(_rows_of_prefill(plan)) for stage in Stage)
    yield Job("load_dense")
    if plan.has_scales:
        yield Job("scales")
    for tp in sorted(plan.destinations):
        yield from (Job("gather", (tp, pages)) for pages in config.handoff_buckets)
    for tp in sorted(plan.sources):
        yield from (Job("scatter", (tp, pages)) for pages in config.handoff_buckets)
    yield from (Job("copy_page", (group,)) for group in range(len(config.windows)))


def _rows_of_prefill(plan: MeshPlan) -> set[int]:
    """Return how many rows of logits a prefill or fused step of any size returns."""
    config, spec = plan.config, plan.spec
    fused = {config.prefill_rows + config.decode_buckets[-1]} if spec.fused else set()
    return ({config.prefill_rows} if spec.prefills else set()) | fused
