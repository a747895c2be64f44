"""Methods that vLLM's engines have besides those that make requests, and what to use instead of those that are missing.

`BaseLLM` inherits them. A missing one is an AttributeError of one sentence, so `hasattr` is false of it.
"""

from typing import TYPE_CHECKING, Any, Self

import jax

from .sampling_params import SamplingParams
from .vllm_metrics import Metric, listed
from .vllm_tables import METHODS

if TYPE_CHECKING:
    from ..startup.build import Engine


class VllmMethods:
    """What is the same for threads and for coroutines, and does not wait."""

    engine: "Engine"

    @classmethod
    def from_engine_args(cls, engine_args: Any) -> Self:
        """Make an engine of `EngineArgs`, as `cls(**vars(engine_args))` does; raises as that does."""
        return cls(**vars(engine_args))

    def get_default_sampling_params(self) -> SamplingParams:
        """Return parameters for a request that names none, to be assigned to: `SamplingParams()`.

        What a checkpoint's generation_config.json recommends is not part of it.
        """
        return SamplingParams()

    def get_metrics(self) -> list[Metric]:
        """Return every figure of `metrics` as vLLM's `get_metrics` does: counters, gauges and histograms."""
        return listed(self.engine.core.metrics())

    def start_profile(self) -> None:
        """Let JAX trace devices and host into the folder of the option `profile_dir` from here on.

        Raises:
            ValueError: a trace is being written.
        """
        try:
            jax.profiler.start_trace(str(self.engine.profile_dir))
        except RuntimeError as error:
            raise ValueError(f"a trace is being written ({error}): call stop_profile first.") from None

    def stop_profile(self) -> None:
        """End the trace and write it.

        Raises:
            ValueError: none is being written.
        """
        try:
            jax.profiler.stop_trace()
        except RuntimeError as error:
            raise ValueError(f"no trace is being written ({error}): call start_profile first.") from None

    def __getattr__(self, name: str) -> Any:
        own = type(self).__name__
        if name in METHODS:
            raise AttributeError(f"{own} has no method {name}, which vLLM has: {METHODS[name]}.")
        raise AttributeError(f"{own!r} object has no attribute {name!r}")
