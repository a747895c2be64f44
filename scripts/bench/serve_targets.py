"""What `twinmesh bench serve` runs loads on: the engine, the simulator, or one after the other with the same loads.

The simulator beside an engine has that engine's own configuration and pools, so nothing but the time of its steps can
differ. JAX is imported with the engine alone.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from twinmesh.engine.host.extras import need
from twinmesh.engine.options import EngineOptions
from twinmesh.scripts import arguments
from twinmesh.scripts.simulate import OPTIONS

if TYPE_CHECKING:
    from twinmesh.engine.api.llm import LLM
    from twinmesh.engine.benchmark.target import Target
    from twinmesh.engine.metrics.benchmark_file import Accuracy
    from twinmesh.engine.simulation.assemble import Source
    from twinmesh.engine.simulation.simulator import SimulatedEngine


class Asks(NamedTuple):
    """Asks an engine questions."""

    check: Callable[[], None]  # whether there is room for them, before anything is run; raises a ValueError
    ask: Callable[[], "Accuracy"]


class Runs(NamedTuple):
    """A target, and what belongs to it."""

    name: str
    target: "Target"
    is_simulated: bool
    asks: Asks | None = None  # None: it gives no answers


def check(args: argparse.Namespace) -> None:
    """Refuse options that go against each other or would do nothing.

    Raises:
        ValueError: names them.
    """
    if not _is_simulated_alone(args):
        if args.trace is not None and args.seed and not args.simulate:
            raise ValueError("--seed would do nothing here: a load of your own has it among its options.")
        if args.least_score is not None and not args.accuracy and args.preset != "endpoints":
            raise ValueError("--least-score needs a score: give --accuracy too.")
        if args.power:
            need("pynvml", "power", "--power")
        return
    of_engines = {"--accuracy": args.accuracy, "--power": args.power, "--least-score": args.least_score is not None}
    of_engines |= {"--decision-log": args.decision_log is not None, "--metrics-port": args.metrics_port is not None}
    given = [flag for flag, is_given in of_engines.items() if is_given]
    heeded = {*OPTIONS, "model"}
    given += [flag for name, flag in arguments.given_engine_flags(args).items() if name not in heeded]
    if given:
        raise ValueError(
            f"{', '.join(given)} would do nothing on the simulator alone: leave it out, or give --simulate to run on "
            "the engine too."
        )


def made(args: argparse.Namespace, stack: ExitStack) -> Iterator[Runs]:
    """Make what is asked for, each when the one before has been run."""
    if _is_simulated_alone(args):
        yield Runs(args.name or "simulated", _alone(args), is_simulated=True)
        return
    show = stack.enter_context(arguments.metrics_port(args))
    llm = stack.enter_context(arguments.load_llm(args, slo=args.slo))
    show(llm)
    beside = _beside(llm, args) if args.simulate else None  # before the run: its costs may be of something else
    yield Runs(args.name or "measured", _real(llm, args), is_simulated=False, asks=_asks(llm))
    if beside is not None:
        yield Runs("simulated", beside, is_simulated=True)


def _is_simulated_alone(args: argparse.Namespace) -> bool:
    return not args.simulate and (args.device is not None or args.profile is not None)


def _real(llm: "LLM", args: argparse.Namespace) -> "Target":
    from twinmesh.engine.benchmark.engine_target import EngineTarget
    from twinmesh.engine.benchmark.power import NvmlMeter
    from twinmesh.engine.sharding.mesh import find_devices

    meter = NvmlMeter.of(find_devices()[: llm.config.topology.num_devices]) if args.power else None
    return EngineTarget(llm, args.model, policy=args.policy, dollars_per_gpu_hour=args.gpu_hour_price, meter=meter)


def _asks(llm: "LLM") -> Asks:
    from twinmesh.engine.benchmark import accuracy

    items = accuracy.read_items()
    return Asks(lambda: accuracy.check_room(llm, items), lambda: accuracy.ask(llm, items))


def _alone(args: argparse.Namespace) -> "Target":
    """Return a simulated engine that is planned as `twinmesh simulate` plans it."""
    from twinmesh.engine.scheduler.policy import policy_named
    from twinmesh.engine.simulation.assemble import assemble
    from twinmesh.models.checkpoints.known_models import named_model

    source, model = _source(args, None), named_model(args.model)
    given = {name: getattr(args, name) for name in OPTIONS}
    if source.profile is not None:  # where the options name no buckets, those of the profile count
        for name in ("prefill_buckets", "decode_buckets"):
            given[name] = getattr(source.profile, name) if given[name] is None else given[name]
    options = EngineOptions(args.model, slo=args.slo, **given)
    policy = policy_named(args.policy)
    engine = assemble(model.name, model.config, options, source, policy, str(args.profile), model.formats)
    return _simulated(engine, source, model.name, args)


def _beside(llm: "LLM", args: argparse.Namespace) -> "Target":
    """Return the simulated twin of an engine."""
    from twinmesh.engine.scheduler.policy import policy_named
    from twinmesh.engine.sharding.mesh import find_devices
    from twinmesh.engine.simulation.costs.profile import check_profile
    from twinmesh.engine.simulation.costs.roofline import roofline
    from twinmesh.engine.simulation.simulator import SimulatedEngine
    from twinmesh.models.checkpoints.known_models import named_model

    kind, model = find_devices()[0].device_kind, named_model(args.model)
    source = _source(args, kind)
    if source.profile is None:
        assert source.peaks is not None
        costs = roofline(model.config, llm.config, source.peaks)
    else:
        check_profile(source.profile, llm.config, model=model.name, device=kind, name=args.profile)
        costs = source.profile.costs
    pools = tuple(llm.engine.core.inspect(lambda scheduler, _: scheduler.pools))
    engine = SimulatedEngine(llm.config, pools, costs, policy_named(args.policy))
    return _simulated(engine, source, model.name, args)


def _source(args: argparse.Namespace, kind: str | None) -> "Source":
    """Find the costs; `kind` is of the device at hand, None where none is needed."""
    from twinmesh.engine.simulation.assemble import source_of
    from twinmesh.engine.simulation.costs.devices import peaks_of
    from twinmesh.engine.simulation.costs.profile import read_profile

    profile = None if args.profile is None else read_profile(args.profile)
    device = args.device
    if profile is None and device is None and kind is not None:
        peaks = peaks_of(kind)
        if peaks is None:
            raise ValueError(
                f"--simulate needs what a step costs, and nothing is published of {kind}: make a profile with "
                "'twinmesh profile' and give it by --profile."
            )
        device = peaks.name
    return source_of(device, profile, str(args.profile))


def _simulated(engine: "SimulatedEngine", source: "Source", model: str, args: argparse.Namespace) -> "Target":
    from twinmesh.engine.benchmark.simulated_target import SimulatedTarget

    noise = 0.0 if source.profile is None else source.profile.spread
    return SimulatedTarget(
        engine, source, model, seed=args.seed, noise=noise, dollars_per_gpu_hour=args.gpu_hour_price
    )  # fmt: skip
