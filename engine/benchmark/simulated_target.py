"""A simulated engine as a target: the same loads as on a real one, in virtual time, and the same report."""

from math import inf

from ..metrics.gaps import Gaps
from ..metrics.report_file import Measured
from ..simulation.assemble import Source
from ..simulation.simulated_report import measured_of
from ..simulation.simulator import SimulatedEngine, simulate
from .target import Load


class SimulatedTarget:
    """An engine that exists in numbers alone."""

    def __init__(
        self,
        engine: SimulatedEngine,
        source: Source,
        model: str,
        *,
        seed: int = 0,
        noise: float = 0.0,
        dollars_per_gpu_hour: float | None = None,
    ) -> None:
        """Simulate `engine`, whose costs come from `source`, with a model of that name; `seed` and `noise` are those of
        `simulate`, and the price is that of `measured_of`."""
        self._engine, self._source, self._model, self._seed, self._noise = engine, source, model, seed, noise
        self._dollars = dollars_per_gpu_hour

    @property
    def longest(self) -> int:
        """Return the most tokens that prompt and answer may have together."""
        return self._engine.config.max_model_len

    def run(self, load: Load) -> Measured:
        """Run a load, as `Target.run`; its warm-up is not needed."""
        gaps = Gaps()
        done = simulate(
            load.workload, self._engine, seed=self._seed, noise=self._noise, gaps=gaps, samples=True,
            stop_after=inf if load.stop_after is None else load.stop_after,
        )  # fmt: skip
        return measured_of(
            done, self._engine, self._source, workload=load.workload.name, model=self._model, seed=self._seed,
            gaps=gaps, dollars_per_gpu_hour=self._dollars,
        )  # fmt: skip
