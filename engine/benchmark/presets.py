"""Presets: loads shaped like benchmarks that the field knows, as data. None of them is that benchmark: whoever runs one
gets unofficial figures, and the report says so.

A length is in tokens; the model's own end is ignored, so that answers have the length that was asked for. Sources:

- inferencex: SemiAnalysis' InferenceX, its `benchmark_serving` calls: random lengths with a range ratio of 0.8, so
  uniform from 0.8 L to L, 10 prompts and 2 warm-ups for each of C users, an infinite rate, EOS ignored, C doubling
  (`.github/configs/CONFIGS.md`). 8k/1k is what is left of it; 1k/1k, as gpt-oss 120B and Llama 70B
  were run, was retired in July 2026.
- endpoints: MLCommons' MLPerf Endpoints 1.0 (docs.mlcommons.org/endpoints-submission-docs): fixed concurrency, from 7
  to 32 points, one of them from 1 to 32 and the others in three regions that are evenly wide in log2 above that, up to
  C_max; whole passes over the data; output tokens/s against 1000 / P90 TPOT (ms), and P90 of TTFT; drawn as steps.
  Regions by `submission_checker/models/regions.py` of mlcommons/endpoints-submission-cli. Its steady state of 600 s and
  more is not asked for here. A run of the questions follows each point. Data: 13,368 requests with answers of 128
  tokens, as many as its Llama 3.1 8B has (CNN/DailyMail); its prompts are not ours to ship, so lengths from 128 to
  2,540 tokens are made up, which leave room for the answer in the 2,668 that its reference runs with.
- aa-load: Artificial Analysis' System Load Test (artificialanalysis.ai/methodology/system-and-hardware-benchmarking):
  phases of 3 minutes, 1, 2, 4, ... 64 queries at once, then 64 more each time until output throughput is flat, 1,000
  tokens in and out. What "flat" is, is ours: less than 5 % more. Ramps are in our phases.
- agents: SemiAnalysis' AgentX as AIPerf runs it (`docs/tutorials/agentx-mvp.md`): C sessions at any time, 30 minutes,
  gaps between turns from end to start and 10 s at most, 1 / P90(E2E / output tokens). Its corpus,
  cc-traces-weka-062126, is read where it is at hand. Without it sessions are drawn with its medians and spreads as
  counted by readers of the corpus: 65 turns a session (P90 330), 1,664 new prompt tokens a turn (mean 3,792), 616
  output tokens (P90 3,502), 4.9 s between turns (P90 131.5). Sessions begin at their first turn, where AgentX begins in
  the middle.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from math import log2

from ..simulation.loads.agent_sessions import LogNormal
from ..simulation.loads.lengths import Uniform
from . import published
from .published import Figure
from .shapes import Lanes, OnePass, Shape, Users

_LEAST_POINTS = 7  # of `endpoints`
_ULTRA_LOW = 32  # the highest concurrency of its first region
_C_MAX = 1024


@dataclass(frozen=True)
class Preset:
    """A load at one concurrency after the other."""

    name: str
    shaped_like: str
    shape: Shape
    concurrencies: tuple[int, ...]  # ascending
    figures: tuple[Figure, ...]  # that the benchmark sums a point up by
    flat: float | None = None  # it ends when output tokens/s grow by less than this share; None: after the last
    asks_accuracy: bool = False  # after each point, on the same engine
    has_regions: bool = False  # the points follow from the highest concurrency

    def up_to(self, most: int) -> "Preset":
        """Return the same with no concurrency above `most`.

        Raises:
            ValueError: none or too few are left.
        """
        if self.has_regions:
            return replace(self, concurrencies=region_points(most))
        kept = tuple(one for one in self.concurrencies if one <= most)
        if not kept:
            least = self.concurrencies[0]
            raise ValueError(f"the preset {self.name} begins with a concurrency of {least}: give no less than that.")
        return replace(self, concurrencies=kept)


def region_points(most: int) -> tuple[int, ...]:
    """Return seven concurrencies up to `most`, ascending: 1, and the middle and the end of each of three regions.

    The regions are evenly wide in log2 of what is above 32. With no more than 32 all points are in the first region of
    MLPerf Endpoints, evenly apart in log2: that is not its coverage.

    Raises:
        ValueError: there is no room for seven.
    """
    above = most - _ULTRA_LOW
    if above > 0:
        width = log2(above) / (_LEAST_POINTS - 1)
        found = {1} | {round(_ULTRA_LOW + 2 ** (width * step)) for step in range(1, _LEAST_POINTS)}
    else:
        width = log2(most) / (_LEAST_POINTS - 1)
        found = {round(2 ** (width * step)) for step in range(_LEAST_POINTS)}
        missing = (one for one in range(1, most) if one not in found)
        found |= set(islice(missing, _LEAST_POINTS - len(found)))
    if len(found) < _LEAST_POINTS:
        raise ValueError(
            f"up to a concurrency of {most} there are no {_LEAST_POINTS} points as the preset endpoints has them: give "
            f"another one, such as {_LEAST_POINTS}, 32, 64 or {_C_MAX}."
        )
    return tuple(sorted(found))


def _inferencex(name: str, setting: str, prompt: int, output: int, most: int) -> Preset:
    """InferenceX: lengths from 0.8 L to L, 10 C requests and 2 C warm-ups at each concurrency C."""
    spans = [(round(0.8 * length), length) for length in (prompt, output)]
    users = tuple(2**power for power in range(2, most.bit_length()))
    figures = (published.PER_GPU, published.SYSTEM, published.MEDIAN_SPEED, published.TTFT_MEDIAN, published.E2E_MEDIAN)
    return Preset(name, f"InferenceX, {setting}", Users(Uniform(*spans), 10, 2), users, figures)


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        _inferencex("inferencex", "8k/1k", 8192, 1024, 64),
        _inferencex("inferencex-1k1k", "the archived 1k/1k of gpt-oss 120B and Llama 70B", 1024, 1024, 64),
        Preset(
            "endpoints", "MLPerf Endpoints 1.0", OnePass(Uniform((128, 2540), (128, 128)), 13_368),
            region_points(_C_MAX), (published.SYSTEM, published.SPEED_P90, published.TTFT_P90),
            asks_accuracy=True, has_regions=True,
        ),
        Preset(
            "aa-load", "Artificial Analysis' load test, phases of 3 minutes, 1000/1000",
            Users(Uniform((1000, 1000), (1000, 1000)), 500, seconds=180.0),
            (*(2**power for power in range(6)), *range(64, 4097, 64)),
            (published.SYSTEM, published.RESPONSE_RATE, published.E2E_MEDIAN, published.MEDIAN_SPEED), flat=0.05,
        ),
        Preset(
            "agents", "AgentX, lanes of agents' sessions",
            Lanes(
                LogNormal.of(65, 330), LogNormal.with_mean(1664, 3792), LogNormal.of(616, 3502),
                LogNormal.of(4.9, 131.5), cap=10.0, per_lane=4, seconds=1800.0,
            ),
            (1, 2, 4, 8, 16, 32),
            (published.NORMALISED_P90, published.PER_GPU, published.HIT_RATE, published.TTFT_P90),
        ),
    )
}  # fmt: skip
