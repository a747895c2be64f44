"""`twinmesh.plan_topology`: which topology to run a model with on devices that need not be there. No JAX, no device."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path

from ...models.checkpoints.known_models import named_model
from ..options import EngineOptions
from ..protocol.service import SLO, read_slo
from ..simulation.assemble import source_of
from ..simulation.costs.profile import read_profile
from ..simulation.loads.load_spec import read_workload
from ..simulation.planning.candidates import BUDGET, REQUESTS, Choice
from ..simulation.planning.search import Answer, Problem, search
from ..simulation.workload import Workload


def plan_topology(
    model: str | Path,
    *,
    devices: int,
    workload: str | Workload,
    slo: str | SLO,
    device: str | None = None,
    profile: str | PathLike[str] | None = None,
    max_model_len: int | None = None,
    kv_cache_bytes: int | None = None,
    quantization: str = "auto",
    requests: int = REQUESTS,
    budget: int = BUDGET,
    say: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Find the topology to recommend, by simulating a load under the candidates of `simulation/planning/candidates.py`.

    Args:
        model: a name that is known, such as llama-3.1-8b, or a model's files, of which config.json is enough.
        devices: how many there are.
        workload: a load as on the command line (`simulation/loads/load_spec.py`), or one made in Python.
        slo: the target, as in "ttft=1000ms,tpot=50ms,percentile=99"; without a percentile it is of 99 %.
        device: h100, h200 or b200; None: the profile's.
        profile: costs that were measured, as `twinmesh profile` writes them; None: the roofline of the device's peaks.
        max_model_len: longest prompt and completion together, in tokens; None: the model's, or what memory allows.
        kv_cache_bytes: most memory of a mesh for KV; None: what the device leaves.
        quantization: what becomes of weights that the files hold quantised: auto, keep or none.
        requests: of the workload so many are simulated, the first.
        budget: topologies that are simulated at most; what would have to change takes up to 15 more simulations.
        say: is told what is being done.

    Raises:
        ValueError: something is unknown or unusable, or the model does not fit, with the arithmetic.
        OSError: a file cannot be read.
    """
    named, costs = named_model(model), None if profile is None else read_profile(profile)
    source = source_of(device, costs, str(profile))
    load = read_workload(workload) if isinstance(workload, str) else workload
    target = (read_slo(slo) if isinstance(slo, str) else slo).with_percentile()
    rows = None if costs is None else costs.decode_buckets
    buckets = source.memory.defaults.prefill_buckets if costs is None else costs.prefill_buckets

    def options(choice: Choice, wanted: SLO) -> EngineOptions:
        chunk = buckets[-1] if choice.chunk is None else choice.chunk
        return EngineOptions(
            model,
            topology=choice.topology,
            prefill_buckets=(*(size for size in buckets if size < chunk), chunk),
            decode_buckets=rows,
            page_size=64 if costs is None else costs.page_size,
            max_model_len=max_model_len,
            kv_cache_bytes=kv_cache_bytes,
            quantization=quantization,
            slo=wanted,
        )

    problem = Problem(
        named.config, named.name, source, devices, load, target, options,
        budget=budget, requests=requests, formats=named.formats,
    )  # fmt: skip
    return search(problem, say)
