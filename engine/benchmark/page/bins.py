"""A run's samples and requests by stretches of its time, for curves that people can read. Pure arithmetic.

Peaks stay: what is thinned keeps the largest of a stretch. What only grows (seconds of computing, tokens) is divided by
stretches evenly, each the difference over its length; between two samples it is taken to grow evenly.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...metrics.load_report import LoadReport
from ...metrics.request_records import FINISHED, RequestRecords
from ...metrics.series import Series

_MOST = 60  # stretches


class Stretches(NamedTuple):
    """Even stretches of a run."""

    edges: np.ndarray  # [n + 1] seconds from the first arrival

    @property
    def middles(self) -> np.ndarray:
        """Return their middles [n]."""
        middles: np.ndarray = (self.edges[1:] + self.edges[:-1]) / 2
        return middles


def stretches(series: Series) -> Stretches | None:
    """Return at most so many stretches that have a sample each in the mean; None: there are too few samples."""
    if len(series.t) < 4 or series.t[-1] <= series.t[0]:
        return None
    return Stretches(np.linspace(series.t[0], series.t[-1], min(_MOST, len(series.t) // 2) + 1))


def grown(series: Series, values: Sequence[float], over: Stretches) -> np.ndarray:
    """Return by how much a value that only grows has grown in each stretch [n]."""
    return np.diff(np.interp(over.edges, series.t, values))


def utilisation(series: Series, report: LoadReport, over: Stretches) -> np.ndarray:
    """Return the share [n] of the time of all GPUs in which they ran steps."""
    gpus = np.array([mesh.gpus for mesh in report.meshes], np.float64)
    shares: np.ndarray = gpus @ _busy(series, over) / gpus.sum()
    return shares


def utilisation_by_role(series: Series, report: LoadReport, over: Stretches) -> dict[str, np.ndarray]:
    """Return the same of the GPUs that had a role in the middle of a stretch; NaN where none had it."""
    busy = _busy(series, over)
    gpus = np.array([mesh.gpus for mesh in report.meshes], np.float64)
    roles = np.array([roles_at(series, t) for t in over.middles]).T  # [meshes, n]
    found = {}
    for role in sorted(set(roles.ravel().tolist())):
        weights = (roles == role) * gpus[:, None]
        total = weights.sum(0)
        found[role] = np.where(total > 0, (weights * busy).sum(0) / np.maximum(total, 1e-9), np.nan)
    return found


def _busy(series: Series, over: Stretches) -> np.ndarray:
    """Return the share [meshes, n] of each stretch in which a mesh computed."""
    length = over.edges[1] - over.edges[0]
    return np.array([np.clip(grown(series, mesh.busy, over) / length, 0, 1) for mesh in series.meshes])


def roles_at(series: Series, t: float) -> tuple[str, ...]:
    """Return the roles of all meshes at a time."""
    known = [roles for since, roles in series.roles if since <= t]
    return known[-1] if known else series.roles[0][1]


def ttft_by_arrival(records: RequestRecords, over: Stretches, percentile: float) -> np.ndarray:
    """Return a percentile [n] of the TTFT of the finished requests that arrived in each stretch; NaN: none did."""
    arrival = records.column("arrival")
    ttft, since = records.column("first_token") - arrival, arrival - arrival.min()
    places = np.clip(np.searchsorted(over.edges, since, "right") - 1, 0, len(over.middles) - 1)
    usable = (records.column("reason") < FINISHED) & ~np.isnan(ttft) & (since <= over.edges[-1])
    chosen = [ttft[usable & (places == place)] for place in range(len(over.middles))]
    return np.array([np.percentile(one, percentile) if len(one) else np.nan for one in chosen])


def peaks(t: Sequence[float], values: Sequence[float], most: int = 160) -> tuple[list[float], list[float]]:
    """Return samples thinned to at most so many: of each stretch of samples the largest, at its own time."""
    if len(t) <= most:
        return list(t), list(values)
    parts = np.array_split(np.arange(len(t)), most)
    places = [int(part[np.argmax(np.asarray(values, np.float64)[part])]) for part in parts]
    return [t[place] for place in places], [values[place] for place in places]
