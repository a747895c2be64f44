"""Breaks the time of one step down by kind of kernel, from a profile of several calls.

JAX's profiler writes an XSpace; `jax.profiler.ProfileData` reads it. On a GPU the kernels are the events on the streams
of a device's plane; on a CPU, the events of its worker threads that name an HLO operation. A kernel is classified by
the scopes (`jax.named_scope`) of its HLO instruction, if known, and by its own name, as products of libraries have
names of their own. `gap` is the time between the first kernel and the last in which none runs. Kernels of a CUDA graph
may come without their instruction; a profile with command buffers off names it for all.

Not here: how long a step should take (`steps.py`).
"""

import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

KINDS = ("attention", "gemm", "append", "sampling", "elementwise", "copy")

# A kernel is of the first kind whose pattern matches its instruction's scopes or its name.
_KINDS = (
    ("attention", re.compile(r"paged_(decode|prefill)_attention|combine")),
    ("append", re.compile(r"append_kv|prepare_heads")),
    ("sampling", re.compile(r"\bsample\b|sort|top_?k", re.IGNORECASE)),
)
_GEMM = re.compile(
    r"grouped_matmul|dot_general|\bdot\b|gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|wgmma", re.IGNORECASE
)
_CONTROL = re.compile(r"while|conditional|call")  # operations that only hold others
_COPY = re.compile(r"memcpy|memset|^copy", re.IGNORECASE)


class Event(NamedTuple):
    """One run of a kernel."""

    name: str
    operation: str  # name of the HLO instruction; "" where unknown
    start: float  # nanoseconds
    duration: float  # nanoseconds


def measure_budget(call: Callable[[], Any], hlo: str, step_ms: float, calls: int = 8) -> dict[str, Any]:
    """Break the milliseconds of one call down by kind of kernel.

    Args:
        call: runs the program once.
        hlo: the program's optimised text.
        step_ms: milliseconds of a call without the profiler; `profiled_over_plain` relates the profile's time to it,
            which says how far to trust the other figures.
        calls: how many calls to profile.
    """
    jax.block_until_ready(call())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # following Python slows the host, which would show as gaps
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready([call() for _ in range(calls)])
        events = read_events(Path(folder))
    if not events:
        return {"failed": "the profile has no kernels"}
    facts = budget(events, scopes(hlo), calls)
    return facts | {"profiled_over_plain": facts["span_ms"] / step_ms}


def read_events(folder: Path) -> list[Event]:
    """Read the kernels of the last profile under a folder."""
    paths = sorted(folder.rglob("*.xplane.pb"))
    if not paths:
        return []
    with warnings.catch_warnings():
        # The reader's types warn of themselves on first use; where warnings are errors, that ends the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        profile = ProfileData.from_file(str(paths[-1]))  # planes do not keep it alive
        planes = list(profile.planes)
        on_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
        return [event for plane in on_gpu or planes for event in _kernels(plane, bool(on_gpu))]


def _kernels(plane: Any, on_gpu: bool) -> Iterator[Event]:
    for line in plane.lines:
        if on_gpu and not line.name.startswith("Stream"):
            continue  # the profiler derives other lines from the streams
        for event in line.events:
            operation = str(next((value for key, value in event.stats if key == "hlo_op"), ""))
            if on_gpu or (operation and not _CONTROL.match(event.name)):
                yield Event(event.name, operation, event.start_ns, event.duration_ns)


def scopes(hlo: str) -> dict[str, str]:
    """Map instructions to scopes and primitive ("jit(step)/layer0/mlp/dot_general"), from a program's HLO."""
    pattern = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', re.MULTILINE)
    return {plain_name(name): scope for name, scope in pattern.findall(hlo)}


def plain_name(name: str) -> str:
    """Spell an instruction's name as in the names of its kernels."""
    return re.sub(r"\W", "_", name.lstrip("%"))


def kind_of(event: Event, scope_of: Mapping[str, str]) -> str:
    """Classify a kernel as one of KINDS."""
    scope = scope_of.get(plain_name(event.operation)) or scope_of.get(plain_name(event.name)) or ""
    for kind, pattern in _KINDS:
        if pattern.search(scope) or pattern.search(event.name):
            return kind
    if _GEMM.search(event.name) or scope.endswith("dot_general"):
        return "gemm"
    return "copy" if _COPY.search(event.name) else "elementwise"


def budget(events: Iterable[Event], scope_of: Mapping[str, str], calls: int) -> dict[str, Any]:
    """Add up milliseconds per call: by kind, of gaps, from the first kernel to the last, and of the longest by name."""
    kinds, names = dict.fromkeys(KINDS, 0.0), dict[str, float]()
    ordered = sorted(events, key=lambda event: event.start)
    covered, busy = ordered[0].start, 0.0
    for event in ordered:
        kinds[kind_of(event, scope_of)] += event.duration
        name = re.sub(r"\d+", "N", event.name)[:80]
        names[name] = names.get(name, 0.0) + event.duration
        end = event.start + event.duration
        busy += max(0.0, end - max(covered, event.start))
        covered = max(covered, end)
    span = covered - ordered[0].start
    per_call = 1e-6 / calls
    longest = sorted(names, key=lambda name: -names[name])[:10]
    return {
        "span_ms": span * per_call,
        "kinds_ms": {kind: total * per_call for kind, total in kinds.items()},
        "gap_ms": (span - busy) * per_call,
        "kernels": len(ordered) / calls,
        "longest_ms": {name: names[name] * per_call for name in longest},
    }
