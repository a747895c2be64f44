"""`twinmesh.plan_topology`: which topology to run a model with on devices that need not be there. No JAX, no device."""

from collections.abc import Callable
from os import PathLike, fspath
from pathlib import Path

from ...models.checkpoints.known_models import named_model
from ..config import EngineConfig
from ..options import EngineOptions
from ..protocol.service import SLO, read_slo
from ..scheduler.cost_model import CostModel
from ..simulation.devices import device_named
from ..simulation.load_spec import read_workload
from ..simulation.plan_candidates import Choice
from ..simulation.plan_search import BUDGET, REQUESTS, Answer, Problem, search
from ..simulation.profile import check_profile, read_profile
from ..simulation.workload import Workload
from ..sizing.defaults import defaults_for


def plan_topology(
    model: str | Path,
    device: str,
    devices: int,
    workload: str | Workload,
    slo: str | SLO,
    *,
    profile: str | PathLike[str] | None = None,
    dtype: str = "bfloat16",
    max_model_len: int | None = None,
    requests: int = REQUESTS,
    budget: int = BUDGET,
    say: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Find the topology to recommend, by simulating a load under the candidates of `plan_candidates.py`.

    Args:
        model: a name that is known, such as llama-3.1-8b, or a model's files, of which config.json is enough.
        device: h100, h200 or b200.
        devices: how many there are.
        workload: a load as on the command line (`simulation/load_spec.py`), or one made in Python.
        slo: the target, as in "ttft=1000ms,tpot=50ms,percentile=99"; without a percentile it is of 99 %.
        profile: costs that were measured, as `twinmesh profile` writes them; None: the roofline of the device's peaks.
        dtype: of weights, activations and KV.
        max_model_len: longest prompt and completion together, in tokens; None: the model's, or what memory allows.
        requests: of the workload so many are simulated, the first.
        budget: topologies that are simulated at most; what would have to change takes up to 15 more simulations.
        say: is told what is being done.

    Raises:
        ValueError: something is unknown or unusable, or the model does not fit, with the arithmetic.
        OSError: a file cannot be read.
    """
    named, peaks = named_model(model), device_named(device)
    load = read_workload(workload) if isinstance(workload, str) else workload
    target = read_slo(slo) if isinstance(slo, str) else slo
    if target.percentile is None:
        target = SLO(ttft_ms=target.ttft_ms, tpot_ms=target.tpot_ms, percentile=99.0)
    buckets = defaults_for("gpu", peaks.name.upper()).prefill_buckets

    def options(choice: Choice, wanted: SLO) -> EngineOptions:
        chunk = choice.chunk
        sizes = None if chunk is None else (*(size for size in buckets if size < chunk), chunk)
        return EngineOptions(
            model, topology=choice.topology, prefill_buckets=sizes, max_model_len=max_model_len, slo=wanted
        )

    problem = Problem(
        named.config, named.name, peaks, devices, load, target, options, dtype,
        None if profile is None else _costs_of(profile, named.name, peaks.name), budget, requests,
    )  # fmt: skip
    return search(problem, say)


def _costs_of(path: str | PathLike[str], model: str, device: str) -> Callable[[EngineConfig], CostModel]:
    """Return what gives the profile's costs for configurations that it is of, and refuses others."""
    profile = read_profile(path)

    def costs(config: EngineConfig) -> CostModel:
        check_profile(profile, config, model=model, device=device, name=fspath(path))
        return profile.costs

    return costs
