"""Runs presets and loads on a target, point by point. It knows no engine, no clock and no files."""

from collections.abc import Callable, Sequence

from ..metrics.benchmark_file import About, Accuracy, Benchmark, Point
from ..metrics.report_file import Measured
from ..simulation.loads.generators import ClosedLoop
from ..simulation.loads.lengths import Uniform
from ..simulation.workload import Workload
from .presets import Sweep
from .target import Load, Target

type Each = Callable[[Point], None]  # told of each point when it has been run
type Ask = Callable[[], Accuracy]  # asks the engine a set of questions


def run_load(target: Target, workload: Workload, about: About, each: Each) -> Benchmark:
    """Run one load as a benchmark of one point; raises as `Target.run`."""
    measured = target.run(Load(workload))
    times = [request.at for request in workload.requests if request.at is not None]
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None
    point = Point(workload.name, measured, rate=rate)
    each(point)
    return Benchmark(about, (point,))


def run_sweep(
    target: Target,
    sweep: Sweep,
    about: About,
    each: Each,
    *,
    concurrencies: Sequence[int] | None = None,
    ask: Ask | None = None,
    seed: int = 0,
) -> Benchmark:
    """Run a sweep, until its last concurrency or until throughput is flat.

    Args:
        target: what it runs on.
        sweep: the preset, scaled already.
        about: what the report says of it.
        each: told of each point.
        concurrencies: instead of the preset's, ascending.
        ask: for accuracy, after each point of a preset that asks; None: nobody asks.
        seed: of the lengths.

    Raises:
        ValueError: a request does not fit into the engine.
        EngineError: the engine has ended.
    """
    points: list[Point] = []
    for concurrency in concurrencies or sweep.concurrencies:
        measured = target.run(_load(sweep, concurrency, seed))
        accuracy = ask() if ask is not None and sweep.asks_accuracy else None
        points.append(Point(f"concurrency {concurrency}", measured, concurrency, accuracy=accuracy))
        each(points[-1])
        if sweep.flat is not None and len(points) > 1 and _gain(points[-2].measured, measured) < sweep.flat:
            break
    return Benchmark(about, tuple(points))


def _load(sweep: Sweep, concurrency: int, seed: int) -> Load:
    def users(per_user: int, stream: int) -> Workload:
        lengths = Uniform(sweep.prompt, sweep.output)
        loop = ClosedLoop(concurrency, per_user * concurrency, lengths, 0.0, 2 * seed + stream)
        return Workload(f"{sweep.name}, concurrency {concurrency}", loop)

    warmup = users(sweep.warmups_per_user, 1) if sweep.warmups_per_user else None
    return Load(users(sweep.requests_per_user, 0), warmup, sweep.seconds)


def _gain(before: Measured, after: Measured) -> float:
    """Return by what share the output tokens per second have grown."""
    rate = before.report.output_tokens_per_second
    return after.report.output_tokens_per_second / rate - 1 if rate > 0 else 0.0
