"""The table of metrics for Prometheus: names, units, labels, and where each figure comes from. It needs no package.

Names follow Prometheus' conventions: the prefix `twinmesh_`, base units as suffixes (seconds, bytes, tokens), `_total`
for what only grows. What has several kinds is one name with labels; a mesh is its number in the topology's order.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from .histograms import BUCKETS, Quantity
from .metrics import Metrics

type Labelled = Mapping[tuple[str, ...], float]  # label values, in the order of the labels' names -> figure
_ROLES = ("prefill", "decode", "both")


class Exposed(NamedTuple):
    """A counter or a gauge: its name without prefix and `_total`."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    read: Callable[[Metrics], float | Labelled]
    labels: tuple[str, ...] = ()


class ExposedHistogram(NamedTuple):
    """A histogram: its name without prefix."""

    name: str
    help: str
    quantity: Quantity

    @property
    def buckets(self) -> tuple[float, ...]:
        """Return the upper ends of its buckets, in seconds or tokens."""
        return BUCKETS[self.quantity]


def _by_name(counts: Mapping[Any, float]) -> Labelled:
    return {(str(name),): count for name, count in counts.items()}


def _flips(m: Metrics) -> Labelled:
    called = m.flips - sum(m.planned_flips.values())
    return _by_name({"called for": called, **m.planned_flips})


def _links(m: Metrics, index: int) -> Labelled:
    return {(str(source), str(to)): link[index] for (source, to), link in m.links.items()}


def _of_meshes(m: Metrics, figures: Iterable[float]) -> Labelled:
    return {(str(mesh),): figure for mesh, figure in zip(range(len(m.meshes)), figures, strict=True)}


def _roles(m: Metrics) -> Labelled:
    return {(str(mesh), role): float(one.role == role) for mesh, one in enumerate(m.meshes) for role in _ROLES}


def _pages(m: Metrics) -> Labelled:
    return {
        (str(mesh), str(group), state): count
        for mesh, one in enumerate(m.meshes)
        for group, pages in enumerate(one.pages)
        for state, count in pages.items()
    }


def _steps(m: Metrics) -> Labelled:
    return {(str(mesh), kind): count for mesh, one in enumerate(m.meshes) for kind, count in one.steps.items()}


EXPOSED: tuple[Exposed, ...] = (
    Exposed("requests", "counter", "Requests that have ended, by reason.", lambda m: _by_name(m.requests), ("reason",)),
    Exposed("requests_waiting", "gauge", "Requests without a place on a mesh.", lambda m: m.waiting),
    Exposed("requests_running", "gauge", "Requests with a place on a mesh.", lambda m: m.running - m.waiting),
    Exposed(
        "oldest_waiting_seconds", "gauge", "Age of the waiting request that came first.", lambda m: m.oldest_waiting
    ),
    Exposed("prompt_tokens", "counter", "Prompt tokens of requests that have begun.", lambda m: m.prompt_tokens),
    Exposed("cached_tokens", "counter", "Prompt tokens that the prefix cache spared.", lambda m: m.cached_tokens),
    Exposed(
        "missed_tokens", "counter", "Prompt tokens that the prefix cache did not spare, by reason.",
        lambda m: _by_name(m.missed_tokens), ("reason",),
    ),
    Exposed(
        "missed_requests", "counter", "Requests with such tokens, by reason.", lambda m: _by_name(m.missed_requests),
        ("reason",),
    ),
    Exposed("generated_tokens", "counter", "Generated tokens.", lambda m: m.generated_tokens + m.running_tokens),
    Exposed("preemptions", "counter", "Times that a request gave up its KV while it ran.", lambda m: m.preemptions),
    Exposed("migrations", "counter", "Times that a request moved its KV while it decoded.", lambda m: m.migrations),
    Exposed("retries", "counter", "Starts after a lost mesh or transfer.", lambda m: m.retries),
    Exposed("conditional_prefills", "counter", "Prompts given to a decode mesh.", lambda m: m.conditional_prefills),
    Exposed("role_flips", "counter", "Changes of the role of a pool's mesh, by reason.", _flips, ("reason",)),
    Exposed(
        "handoffs", "counter", "Transfers of KV that arrived.", lambda m: _links(m, 0), ("source", "destination"),
    ),
    Exposed(
        "handoff_bytes", "counter", "KV and state that these moved.", lambda m: _links(m, 1), ("source", "destination"),
    ),
    Exposed(
        "handoff_seconds", "counter", "Time of these from dispatch to arrival, summed.", lambda m: _links(m, 2),
        ("source", "destination"),
    ),
    Exposed("mesh_role", "gauge", "1 for the role that a mesh has now, 0 for the others.", _roles, ("mesh", "role")),
    Exposed(
        "mesh_draining", "gauge", "1 while a mesh has work left that its role has no more.",
        lambda m: _of_meshes(m, (float(one.draining is not None) for one in m.meshes)), ("mesh",),
    ),
    Exposed(
        "mesh_devices", "gauge", "Devices of a mesh.", lambda m: _of_meshes(m, (one.devices for one in m.meshes)),
        ("mesh",),
    ),
    Exposed(
        "mesh_requests", "gauge", "Requests with a place on a mesh, or one reserved.",
        lambda m: _of_meshes(m, (one.requests for one in m.meshes)), ("mesh",),
    ),
    Exposed(
        "mesh_busy_seconds", "counter", "Time in which a mesh has computed.",
        lambda m: _of_meshes(m, (one.busy for one in m.meshes)), ("mesh",),
    ),
    Exposed("steps", "counter", "Steps dispatched.", _steps, ("mesh", "kind")),
    Exposed(
        "kv_pages", "gauge", "KV pages of a cache group: used by requests, cached and free to be taken, or free.",
        _pages, ("mesh", "group", "state"),
    ),
    Exposed("host_cpu_seconds", "counter", "CPU time of the dispatching thread.", lambda m: m.host_seconds),
    Exposed("slo_requests", "counter", "Ended requests that had an SLO, aborted ones apart.", lambda m: m.with_slo),
    Exposed("slo_met_requests", "counter", "Those of them that have kept to it.", lambda m: m.met_slo),
    Exposed("compilations", "counter", "Compilations since all programs were there.", lambda m: m.compiles),
)  # fmt: skip

HISTOGRAMS: tuple[ExposedHistogram, ...] = (
    ExposedHistogram("time_to_first_token_seconds", "From arrival to the first token.", "ttft"),
    ExposedHistogram("inter_token_latency_seconds", "Gaps between two tokens of a request.", "itl"),
    ExposedHistogram(
        "time_per_output_token_seconds", "(Last - first token) / (tokens - 1), of requests that finished.", "tpot"
    ),
    ExposedHistogram("e2e_request_latency_seconds", "From arrival to the end, of requests that finished.", "e2e"),
    ExposedHistogram(
        "request_queue_time_seconds", "From arrival to the first chunk, of requests with a token.", "queue"
    ),
    ExposedHistogram("request_handoff_seconds", "From the first token to its KV in place, where it moved.", "handoff"),
    ExposedHistogram("request_prompt_tokens", "Prompt tokens of requests that finished.", "prompt"),
    ExposedHistogram("request_generated_tokens", "Generated tokens of requests that finished.", "output"),
)
