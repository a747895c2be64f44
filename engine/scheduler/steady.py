"""Meshes that only decode: what their next decisions will be, as long as nothing but results of their own steps comes.

Two steps are in flight; when a result is read, every row has a token more, and the next step of the rows that are not
at their last token is dispatched. Until a row ends nothing else can happen but that rows take pages (`grow`), so it can
be said ahead how many results that lasts, and any number of them can be taken in at once. Whatever looks at a mesh
meanwhile finds slots, pages and loads as they would be; what the steps cost is taken in as each is read
(`Costs.foresee`).

Invariant: after `advance` requests, pages and costs are what as many `StepDone` events, with the decisions after each,
would have left. Nothing is decided here; `batching.py` does, and would have decided the same.
"""

from array import array
from dataclasses import dataclass

from .mesh_state import MAX_STEPS_IN_FLIGHT, MeshState, SharedState
from .request import Request


@dataclass(eq=False, slots=True)
class Steady:
    """A mesh that only decodes, as it was found. Result i, from 1 on, is of a step in flight or of a later one, and the
    step that is dispatched on it is of the rows that it finds ready."""

    mesh: MeshState
    rows: list[Request]  # of the steps to come, in the policy's order
    since: tuple[list[Request], list[Request], list[Request]]  # those of them that are in the step that runs now, those
    # that come with the one behind it, and those that are new
    results: int  # that can be taken in before a row ends
    growth: int  # results before the one on which rows need pages next; no less than `results`: none do
    tokens: int  # that the rows of the next step to be dispatched have in the cache, those being fed included

    def last_rows(self) -> list[Request]:
        """List the rows of the step that is dispatched on the last of `results`; of all before it they are `rows`."""
        return [request for request in self.rows if request.max_tokens - request.dispatched >= self.results]


def may_be_steady(shared: SharedState) -> bool:
    """Return whether meshes of this engine may be steady at all."""
    config = shared.config
    return config.windows == (None,) and config.decode_steps == 1 and not config.deterministic


def find_steady(mesh: MeshState, running: list[Request], queued: list[Request]) -> Steady | None:
    """Look whether a mesh only decodes, whose two steps in flight are decode steps of these rows; None: it does not."""
    if (
        len(mesh.in_flight) != MAX_STEPS_IN_FLIGHT
        or mesh.prefill_load
        or mesh.batch
        or mesh.constrained
        or mesh.draining is not None
        or not mesh.kept.is_empty
        or mesh.shared.notes.are_kept
    ):
        return None
    rows = mesh.ready()
    if not rows or len(running) > len(queued) or len(queued) > len(rows):
        return None
    least, growth, tokens = 1 << 62, 1 << 62, 0  # the fewest steps that are left to a row; see `Steady.growth`
    for request in rows:
        placement, dispatched = request.placement, request.dispatched
        if placement is None or request.handoff is not None:
            return None
        left, kv_len = request.max_tokens - dispatched, request.prompt_len + dispatched
        tokens += kv_len
        if left < least:
            least = left
        fit = placement.writable - kv_len + 1
        if fit < growth and fit < left:
            growth = fit
    if growth < 0:
        return None
    if running == rows and queued == rows:
        since: tuple[list[Request], list[Request], list[Request]] = (rows, [], [])
    else:
        here, there = set(running), set(queued)
        since = (
            [r for r in rows if r in here],
            [r for r in rows if r in there and r not in here],
            [r for r in rows if r not in there],
        )
        if len(since[0]) != len(running) or len(since[0]) + len(since[1]) != len(queued):
            return None
    return Steady(mesh, rows, since, least + 1, growth, tokens)


def advance(steady: Steady, ends: "array[float]", results: int, steps: int) -> None:
    """Take in that the first `results` of the steps were read, at the first of these `ends`, and that so many `steps`
    were dispatched meanwhile, for which the pages are there."""
    for request in steady.rows:
        left = request.max_tokens - request.dispatched
        request.dispatched += steps if steps < left else left
    for first, requests in enumerate(steady.since):
        if first < results and requests:
            count, stamps = results - first, ends[first:results]
            for request in requests:
                request.confirmed += count
                request.timeline.stamp_tokens(stamps)


def grow(steady: Steady) -> bool:
    """Give the rows the pages that they need after `steady.growth` results, none of which was taken in yet, and find
    when they need some again; False: too few may be free, and nothing was done."""
    pages, now, growing, growth = steady.mesh.pages, steady.growth, [], 1 << 62
    for request in steady.rows:
        placement, dispatched = request.placement, request.dispatched
        left, kv_len = request.max_tokens - dispatched, request.prompt_len + dispatched
        assert placement is not None
        fit = placement.writable - kv_len + 1
        if fit >= left:
            continue
        if fit <= now:
            growing.append((placement, left, kv_len))
        elif fit < growth:
            growth = fit
    if any([group.num_free < 2 * len(growing) for group in pages.groups]):  # a shared one is copied
        return False
    for placement, left, kv_len in growing:
        if not pages.grow(placement, kv_len + now - 1, kv_len + now):
            raise RuntimeError(f"mesh {steady.mesh.index}: no page for a row where enough are free")
        fit = placement.writable - kv_len + 1
        if fit < growth and fit < left:
            growth = fit
    steady.growth = growth
    return True
