"""MLPerf's LoadGen (mlcommons-loadgen 6.0.17): its settings for a model and scenario, and the limits in force.

What only a run tells of 6.0.17, and what follows:
- `FromConfig(path, model, scenario, 1)` reads the mlperf.conf that is compiled in, and then the file, which has to
  exist and may be empty; conf_type 2 with no file returns -2. It returns 0 for a model that it does not know too, and
  leaves its defaults in force (no token latencies): `use_token_latencies` tells.
- A second `FromConfig` in a process changes nothing, whatever model it names: a process for each scenario.
- In force are 600 s and 100 queries (Offline of llama3_1-8b: 13,368); the sample counts are 13,368 and 6,396. Its
  models have it issue whole permutations of the samples, so a run has a multiple of that many queries. A Server run is
  VALID only if early stopping says so too: with a percentile of 99 % it takes 459 queries of which none is late.
"""

from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from ..host.extras import need
from ..protocol.service import SLO

type Scenario = Literal["Server", "Offline"]
SCENARIOS: tuple[Scenario, ...] = ("Server", "Offline")
MODELS = ("llama3_1-8b", "llama3_1-8b-interactive", "gpt-oss-120b", "gpt-oss-120b-interactive")
EXTRA = "loadgen"


class Limits(NamedTuple):
    """What LoadGen holds a run to, as it says itself."""

    ttft_ms: float
    tpot_ms: float
    percentile: float  # 0 to 1, of requests that have to keep to both
    seconds: float  # a run lasts at least
    queries: int  # and has at least
    samples: int  # of the data set in use

    @property
    def slo(self) -> SLO:
        """Return the latencies as an SLO."""
        return SLO(ttft_ms=self.ttft_ms, tpot_ms=self.tpot_ms, percentile=100 * self.percentile)


def load_settings(model: str, scenario: Scenario) -> tuple[Any, Limits]:
    """Return LoadGen's `TestSettings` of a performance run, and what is in force. Once in a process.

    Raises:
        ValueError: LoadGen is not installed, does not know the model, or has read its configuration before.
    """
    loadgen = need("mlperf_loadgen", EXTRA, "The preset mlperf")
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, scenario)
    settings.mode = loadgen.TestMode.PerformanceOnly
    with TemporaryDirectory() as folder:
        nothing = Path(folder, "user.conf")
        nothing.touch()
        code = settings.FromConfig(str(nothing), model, scenario, 1)
    if code != 0 or not settings.use_token_latencies:
        raise ValueError(
            f"LoadGen has put no limits for tokens of model {model!r} in force: give one of {', '.join(MODELS)}, once "
            "in a process, since it reads its configuration only once."
        )
    return settings, limits_of(settings)


def limits_of(settings: Any) -> Limits:
    """Return the limits that are in force."""
    return Limits(
        settings.ttft_latency / 1e6,
        settings.tpot_latency / 1e6,
        settings.server_target_latency_percentile,
        settings.min_duration_ms / 1000,
        settings.min_query_count,
        settings.performance_sample_count_override,
    )


def shorten(settings: Any, scale: float) -> None:
    """Multiply duration, queries and samples by `scale`, above 0 and at most 1; below 1 it is no valid run."""
    settings.min_duration_ms = ceil(settings.min_duration_ms * scale)
    settings.min_query_count = ceil(settings.min_query_count * scale)
    settings.performance_sample_count_override = ceil(settings.performance_sample_count_override * scale)


def expect(settings: Any, rate: float) -> None:
    """Have queries come at `rate` a second (Server), or expect so many answers a second (Offline), which tells LoadGen
    how many to issue."""
    settings.server_target_qps = rate
    settings.offline_expected_qps = rate
