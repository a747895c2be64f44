"""LoadGen's own logs of a run, read back: whether it calls the run VALID, why not, and its figures.

The detail log has a line for each key: ":::MLLOG " and an object with `key`, `value` and `metadata`. Texts for readers
are in the summary, which stays where it is. Nothing here is computed from our own stamps.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .loadgen_settings import Limits, Scenario

DETAIL, SUMMARY = "detail.txt", "summary.txt"
PREFIX = "mlperf_log_"  # of its files, as MLPerf's tools look for them
_MARK = ":::MLLOG "
# What has to be true for VALID, in the words of the summary.
_DEMANDS = {
    "result_perf_constraints_met": "performance constraints",
    "result_min_duration_met": "minimum duration",
    "result_min_queries_met": "minimum queries",
    "early_stopping_met": "early stopping",
}
_ADVICE = ("result_invalid_reason", "early_stopping_ttft_result", "early_stopping_tpot_result")


class LoadGenLog(NamedTuple):
    """What LoadGen says of a run."""

    version: str
    is_valid: bool
    why_not: tuple[str, ...]  # what it misses, its advice, and errors; empty where the run is valid
    values: Mapping[str, Any]  # by key; of a key that comes again, the last

    def milliseconds(self, key: str) -> float | None:
        """Return a value that is in nanoseconds; None: it is not there."""
        value = self.values.get(key)
        return None if value is None else float(value) / 1e6


def read_log(folder: Path) -> LoadGenLog:
    """Read the detail log in a folder.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no log of LoadGen's, or the run did not come to its end.
    """
    path = folder / f"{PREFIX}{DETAIL}"
    entries = list(_entries(path))
    values = {entry["key"]: entry["value"] for entry in entries}
    if "result_validity" not in values:
        raise ValueError(f"{path} has no result: the run did not come to its end.")
    errors = tuple(str(entry["value"]) for entry in entries if entry["metadata"]["is_error"])
    is_valid = values["result_validity"] == "VALID" and not errors
    return LoadGenLog(str(values["loadgen_version"]), is_valid, () if is_valid else _why_not(values, errors), values)


def check_in_force(log: LoadGenLog, scenario: Scenario, limits: Limits) -> None:
    """Check that the run was held to these limits, by what LoadGen has logged of them.

    Raises:
        ValueError: something else was in force; names it.
    """
    wanted: dict[str, object] = {
        "effective_scenario": scenario,
        "effective_test_mode": "PerformanceOnly",
        "effective_min_duration_ms": round(1000 * limits.seconds),
        "requested_min_query_count": limits.queries,
        "effective_performance_sample_count": limits.samples,
        "requested_use_token_latencies": True,
    }
    if scenario == "Server":
        wanted |= {
            "requested_server_ttft_latency": round(1e6 * limits.ttft_ms),
            "requested_server_tpot_latency": round(1e6 * limits.tpot_ms),
            "effective_target_latency_percentile": limits.percentile,
        }
    for key, value in wanted.items():
        if log.values.get(key) != value:
            raise ValueError(f"LoadGen has run with {key} {log.values.get(key)!r} in force, not {value!r}.")


def notes_of(log: LoadGenLog) -> Iterator[str]:
    """Yield what a report says of it, a sentence each."""
    scenario = log.values["effective_scenario"]
    yield f"LoadGen {log.version}, {scenario}: {log.values['result_validity']}" + "".join(
        f"; {one}" for one in log.why_not
    )
    latencies = {
        "TTFT P99": "result_first_token_99.00_percentile_latency_ns",
        "TPOT P99": "result_time_per_output_token_99.00_percentile_ns",
        "E2E P99": "result_99.00_percentile_latency_ns",
    }
    found = {name: log.milliseconds(key) for name, key in latencies.items()}
    yield "LoadGen's figures: " + ", ".join(f"{name} {ms:,.1f} ms" for name, ms in found.items() if ms is not None)
    rates = {"samples": ("result_completed_samples_per_sec", "result_samples_per_second")}
    rates["tokens"] = ("result_completed_tokens_per_second", "result_tokens_per_second")
    said = [(name, log.values.get(a, log.values.get(b))) for name, (a, b) in rates.items()]
    yield "LoadGen's rates: " + ", ".join(f"{rate:,.2f} {name}/s" for name, rate in said if rate is not None)


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        if line.startswith(_MARK):
            try:
                yield json.loads(line.removeprefix(_MARK), strict=False)  # texts have line feeds as they are
            except ValueError:
                raise ValueError(f"{path} is no log of LoadGen's: {line[:60]!r}.") from None


def _why_not(values: Mapping[str, Any], errors: tuple[str, ...]) -> tuple[str, ...]:
    missed = [f"not satisfied: {name}" for key, name in _DEMANDS.items() if values.get(key) is False]
    advice = [" ".join(str(values.get(key, "")).split()) for key in _ADVICE]
    return (*missed, *filter(None, advice), *(f"error: {error}" for error in errors))
