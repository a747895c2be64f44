"""Runs presets and loads on a target, point by point. It knows no engine, no clock and no files."""

from collections.abc import Callable

from ..metrics.benchmark_file import About, Accuracy, Benchmark, Point
from ..metrics.report_file import Measured
from ..simulation.workload import Workload
from .presets import Preset
from .target import Load, Target

type Each = Callable[[Point], None]  # told of each point when it has been run
type Ask = Callable[[], Accuracy]  # asks the engine a set of questions


def run_load(target: Target, workload: Workload, about: About, each: Each, ask: Ask | None = None) -> Benchmark:
    """Run one load as a benchmark of one point; raises as `Target.run`. `ask`: for accuracy, afterwards."""
    measured = target.run(Load(workload))
    times = [request.at for request in workload.requests if request.at is not None]
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None
    point = Point(workload.name, measured, rate=rate, accuracy=None if ask is None else ask())
    each(point)
    return Benchmark(about, (point,))


def run_preset(
    target: Target,
    preset: Preset,
    about: About,
    each: Each,
    *,
    scale: float = 1.0,
    ask: Ask | None = None,
    seed: int = 0,
) -> Benchmark:
    """Run a preset, until its last concurrency or until throughput is flat.

    Args:
        target: what it runs on.
        preset: with the concurrencies that are wanted.
        about: what the report says of it.
        each: told of each point.
        scale: of lengths and times, above 0 and at most 1.
        ask: for accuracy, after each point; None: nobody asks.
        seed: of lengths and pauses.

    Raises:
        ValueError: a request does not fit into the engine.
        EngineError: the engine has ended.
    """
    points: list[Point] = []
    for concurrency in preset.concurrencies:
        name = f"{preset.name}, concurrency {concurrency}"
        measured = target.run(preset.shape.load(name, concurrency, target.longest, seed, scale))
        accuracy = None if ask is None else ask()
        points.append(Point(f"concurrency {concurrency}", measured, concurrency, accuracy=accuracy))
        each(points[-1])
        if preset.flat is not None and len(points) > 1 and _gain(points[-2].measured, measured) < preset.flat:
            break
    return Benchmark(about, tuple(points))


def _gain(before: Measured, after: Measured) -> float:
    """Return by what share the output tokens per second have grown."""
    rate = before.report.output_tokens_per_second
    return after.report.output_tokens_per_second / rate - 1 if rate > 0 else 0.0
