"""Runs of `simulators.py`: the same loads through our simulator and AISimulate, questions to it and aiconfigurator.

Every run is pinned to one core. AISimulate's requests per second are by the time that it states for its replay, ours by
that of `simulate`: neither has the start of its process in it, nor the reading of models and kernels' times.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from twinmesh.engine.metrics.request_records import RequestRecords
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.scheduler.cost_model import HostCost
from twinmesh.engine.simulation.capacity import DeviceMemory, capacity
from twinmesh.engine.simulation.costs.devices import device_named
from twinmesh.engine.simulation.costs.roofline import USUAL, roofline
from twinmesh.engine.simulation.loads.scaling import first, superimposed
from twinmesh.engine.simulation.loads.traces import MOONCAKE_BLOCK, read_trace
from twinmesh.engine.simulation.simulator import SimulatedEngine, simulate
from twinmesh.engine.simulation.workload import Workload, WorkRequest
from twinmesh.engine.topology import Role, Topology
from twinmesh.models.checkpoints.known_models import known_model
from twinmesh.scripts.bench.published import Published

LATENCIES = ("ttft p50", "ttft p90", "ttft p99", "tpot p50", "tpot p90", "tpot p99")  # in ms
SYSTEMS = {"h100": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm"}  # as the peers call them
_BACKEND = "vllm"  # whose measured kernels the peers take


class Setting(NamedTuple):
    """What serves which trace."""

    model: str
    device: str
    topology: str
    trace: str
    copies: int  # of the trace at once
    requests: int | None = None  # the first so many; None: all
    has_host: bool = True  # whether our host takes time; the peers know devices alone

    @property
    def name(self) -> str:
        """Return it in a line."""
        name = f"{self.device} {self.topology}" + (f", the trace {self.copies} times" if self.copies > 1 else "")
        return name if self.requests is None else f"{name}, its first {self.requests:,} requests"


# ---- ours


def ours_on_trace(setting: Setting, core: int) -> dict[str, float]:
    """Simulate a trace in a process of its own."""
    return _pinned(core, partial(simulate_trace, setting))


def ours_on_load(published: Published, core: int) -> dict[str, float]:
    """Simulate the load of a published figure in a process of its own."""
    return _pinned(core, partial(simulate_load, published))


def _pinned(core: int, call: Callable[[], dict[str, float]]) -> dict[str, float]:
    with ProcessPoolExecutor(1, get_context("spawn"), os.sched_setaffinity, (0, {core})) as pool:
        return pool.submit(call).result()


def simulate_trace(setting: Setting) -> dict[str, float]:
    """Simulate a trace; return milliseconds, tokens per second, and requests per second of wall time."""
    workload = Workload("", list(load_of(setting).requests))
    return _simulated(setting.model, setting.device, setting.topology, workload, has_host=setting.has_host)


def simulate_load(published: Published) -> dict[str, float]:
    """Simulate the load of a published figure on one GPU; return what `simulate_trace` does."""
    each = published.prompt, published.output
    requests = [
        WorkRequest(*each, 0.0) if n < published.concurrency else WorkRequest(*each, after=n - published.concurrency)
        for n in range(published.requests)
    ]
    return _simulated(published.model, published.device, "both=1", Workload("", requests))


def load_of(setting: Setting) -> Workload:
    """Return the trace, as often at once as the setting says, and as much of it."""
    workload = read_trace(setting.trace)
    if setting.copies > 1:
        workload = superimposed(workload, setting.copies)
    return workload if setting.requests is None else first(workload, setting.requests)


def _simulated(name: str, device: str, topology: str, workload: Workload, *, has_host: bool = True) -> dict[str, float]:
    model, peaks = known_model(name), device_named(device)
    config, pools = capacity(model, EngineOptions(name, topology=topology), DeviceMemory(peaks.name, peaks.memory))
    efficiency = USUAL if has_host else USUAL._replace(host=HostCost())
    engine = SimulatedEngine(config, pools, roofline(model, config, peaks, efficiency))
    begin = time.perf_counter()
    records = simulate(workload, engine).records
    return _figures(records) | {"requests_per_second": len(records) / (time.perf_counter() - begin)}


def _figures(records: RequestRecords) -> dict[str, float]:
    arrival, first, last = (records.column(name) for name in ("arrival", "first_token", "last_token"))
    output = records.column("output_len")
    many = output > 1
    times = {"ttft": first - arrival, "tpot": (last - first)[many] / (output[many] - 1)}
    found = {}
    for name in LATENCIES:
        what, percentile = name.split()
        found[name] = 1e3 * float(np.percentile(times[what], int(percentile[1:])))
    return found | {"output tokens/s": float(output.sum() / (last.max() - arrival.min()))}


def our_steps(
    name: str, device: str, prefill: Sequence[int], decode: Sequence[tuple[int, int]]
) -> dict[str, list[float]]:
    """Return the milliseconds of the steps that `simulator_peer.steps` is asked for, each in the least bucket."""
    model, peaks = known_model(name), device_named(device)
    config, _ = capacity(model, EngineOptions(name, topology="both=1"), DeviceMemory(peaks.name, peaks.memory))
    costs = roofline(model, config, peaks)
    chunks, steps = [], []
    for tokens in prefill:
        program = costs.prefill[min(bucket for bucket in costs.prefill if bucket >= tokens)]
        chunks.append(1e3 * (program.fixed + program.chunk + program.pair * (tokens * (tokens + 1) // 2)))
    for rows, tokens in decode:
        program = costs.decode[min(bucket for bucket in costs.decode if bucket >= rows)]
        steps.append(1e3 * (program.fixed + rows * (program.row + program.context * tokens)))
    return {"prefill": chunks, "decode": steps}


# ---- peers


def aisimulate_on_trace(environment: Path, setting: Setting, core: int) -> dict[str, float]:
    """Let AISimulate predict a trace."""
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        write_mooncake(load_of(setting).requests, trace)
        source = {"type": "trace", "paths": [str(trace)], "format": "mooncake", "block_size": MOONCAKE_BLOCK}
        traffic = {"source": source, "load": {"type": "trace_timestamps"}}
        engine = engine_config(setting.model, setting.device, setting.topology)
        return _predicted(environment, {"traffic": traffic, "engine": engine}, Path(folder), core)


def aisimulate_on_load(environment: Path, published: Published, core: int) -> dict[str, float]:
    """Let AISimulate predict the load of a published figure, in that precision where it is another than the model's."""
    source = {"type": "synthetic", "input_tokens": published.prompt, "output_tokens": published.output}
    traffic = {
        "source": source,
        "load": {"type": "concurrency", "concurrency": published.concurrency},
        "stop": {"requests": published.requests},
    }
    engine = engine_config(published.model, published.device, "both=1") | quantised(published)
    # As the runs behind these figures allow, where all is queued at once.
    engine["workers"]["aggregated"]["scheduler"] = {"max_sequences": min(1024, max(256, published.concurrency))}
    with TemporaryDirectory() as folder:
        return _predicted(environment, {"traffic": traffic, "engine": engine}, Path(folder), core)


def write_mooncake(requests: Iterable[WorkRequest], path: Path) -> None:
    """Write requests, which share nothing, as Mooncake's traces are: a line each."""
    block = 0
    with path.open("w") as file:
        for request in requests:
            count = -(-request.prompt_len // MOONCAKE_BLOCK)
            line: dict[str, Any] = {"timestamp": round(1e3 * request.time, 3), "input_length": request.prompt_len}
            line |= {"output_length": request.output_len, "hash_ids": list(range(block, block + count))}
            block += count
            file.write(json.dumps(line) + "\n")


def ask(environment: Path, questions: Sequence[dict[str, Any]], core: int) -> list[dict[str, Any]]:
    """Put questions to a peer (`simulator_peer.py`).

    Raises:
        SystemExit: the peer does not run.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder) / "questions.json"
        file.write_text(json.dumps(questions))
        script = Path(__file__).with_name("simulator_peer.py")
        answers: list[dict[str, Any]] = json.loads(
            _run([str(environment / "bin" / "python"), str(script), str(file)], core).splitlines()[-1]
        )
        return answers


def engine_config(model: str, device: str, topology: str) -> dict[str, Any]:
    """Describe an engine to AISimulate."""
    meshes = Topology.parse(topology).meshes
    workers: dict[str, Any] = {}
    for spec in dict.fromkeys(meshes):
        name = {Role.BOTH: "aggregated", Role.PREFILL: "prefill", Role.DECODE: "decode"}[spec.role]
        workers[name] = {"parallelism": {"replicas": meshes.count(spec), "tensor": spec.tp}}
    mode = "aggregated" if "aggregated" in workers else "disaggregated"
    return {"mode": mode, "model": model, "hardware": SYSTEMS[device], "backend": _BACKEND, "workers": workers}


def quantised(published: Published) -> dict[str, str]:
    """Return what a peer is told of a precision that is not the model's own."""
    if published.precision != "float8":
        return {}  # MXFP4 is how the model is published
    return {"gemm_quant_mode": "fp8", "kvcache_quant_mode": "fp8", "fmha_quant_mode": "fp8"}


def _predicted(environment: Path, config: dict[str, Any], folder: Path, core: int) -> dict[str, float]:
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    command = [str(environment / "bin" / "aisimulate"), "predict", "--config", str(file), "--format", "json"]
    found = json.loads(_run([*command, "--output-dir", str(folder / "out")], core))
    figures = {}
    for name in LATENCIES:
        what, percentile = name.split()
        figures[name] = float(found[f"{'median' if percentile == 'p50' else percentile}_{what}_ms"])
    figures["output tokens/s"] = float(found["output_throughput_tok_s"])
    return figures | {"requests_per_second": 1e3 * found["num_requests"] / found["wall_time_ms"]}


def _run(command: Sequence[str], core: int) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=partial(os.sched_setaffinity, 0, {core}), check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-3:]
        raise SystemExit(f"simulators: {' '.join(command[:2])} ended with {done.returncode}: {' '.join(last)}")
    return done.stdout
