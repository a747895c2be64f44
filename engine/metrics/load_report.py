"""What a load got from an engine: latencies, goodput, throughput, utilisation, cost; of a real run or a simulated one.

Definitions, the same for both. TTFT counts from arrival, queueing included; TPOT = (last token - first token) /
(n - 1), n >= 2; ITL are the raw gaps; E2E is from arrival to the end. Latencies are of requests that finished. Goodput
counts the requests that finished and met every SLO, over the wall time from first arrival to last end; requests that
failed, were refused or ran into a deadline are misses; those that their caller aborted count nowhere but in `ended`.
Throughput counts the tokens of finished requests, and per GPU it divides by all GPUs. It reads no clock.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

from ..protocol.service import SLO
from .dispersion import dispersion
from .distribution import Distribution
from .gaps import Gaps
from .request_records import FINISHED, REASONS, RequestRecord, RequestRecords


class Run(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ran: the reader of a report has nothing else to go by."""

    source: Literal["measured", "simulated"]
    workload: str
    model: str
    device: str  # its kind
    gpus: int  # devices of all meshes together, and those that are left over and paid for
    topology: str
    policy: str = "fcfs"
    seed: int | None = None
    notes: tuple[str, ...] = ()  # what holds these figures back: "roofline only", "unofficial"


class MeshUse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a mesh computed."""

    role: str  # at the end
    gpus: int
    busy: float  # seconds in which it ran a step


class Flip(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mesh changed its role."""

    t: float  # seconds from the first arrival
    mesh: int
    before: str
    after: str
    reason: str


class Power(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a GPU draws."""

    watts: float
    basis: Literal["name plate", "board"]  # the first is the most it may draw, all in; the second was measured


class Parts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of TTFT, in seconds: means of what adds up to it. `handoff` comes after the first token and is in E2E."""

    queue: float
    prefill: float
    host: float
    handoff: float


class Goodput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the SLO was kept to."""

    slo: SLO | None  # of requests without one of their own
    judged: int  # requests with an SLO, but for aborted ones
    met: int  # those that finished and kept to it
    per_second: float
    ttft_share: float  # of the judged: finished, with the TTFT that was asked for
    tpot_share: float

    @property
    def share(self) -> float:
        """Return the share, 0 to 1, of judged requests that met their SLO."""
        return self.met / self.judged

    @property
    def is_attained(self) -> bool | None:
        """Return whether as many kept to each target as the SLO's percentile asks for; None: it has none."""
        if self.slo is None or self.slo.percentile is None:
            return None
        return 100 * min(self.ttft_share, self.tpot_share) >= self.slo.percentile


class Tokens(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens of finished requests."""

    prompt: int
    cached: int  # of the prompts' tokens, those that the prefix cache spared
    output: int


class Dollars(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """$ per million tokens: each is the whole cost over one kind of tokens, so they do not add up."""

    per_gpu_hour: float
    input: float | None
    output: float | None
    total: float | None


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run under load, summed up."""

    run: Run
    wall: float  # seconds from the first arrival to the last end
    ended: dict[str, int]  # requests by how they ended
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None  # None: the gaps are not known
    itl_counts: tuple[tuple[float, int], ...]  # seconds and how many gaps are as long, ascending, in steps of 1 %
    e2e: Distribution | None
    parts: Parts | None  # over all that finished
    worst_parts: Parts | None  # over those of them with a TTFT at P99 or above
    goodput: Goodput | None  # None: nothing has an SLO
    tokens: Tokens
    meshes: tuple[MeshUse, ...]
    flips: tuple[Flip, ...]
    dispersion: dict[int, float | None]  # of arrivals, by seconds of a window
    dollars_per_gpu_hour: float | None
    power: Power | None
    missed_tokens: dict[str, int]  # prompt tokens that the prefix cache did not spare, by reason; empty: not known
    late: Distribution | None  # seconds by which requests were sent after their times; None: they came in virtual time

    @classmethod
    def of(
        cls,
        records: RequestRecords | Iterable[RequestRecord],
        run: Run,
        *,
        slo: SLO | None = None,
        meshes: Sequence[MeshUse] = (),
        flips: Sequence[Flip] = (),
        gaps: Gaps | None = None,
        dollars_per_gpu_hour: float | None = None,
        power: Power | None = None,
        missed_tokens: Mapping[str, int] | None = None,
        late: Distribution | None = None,
    ) -> "LoadReport":
        """Sum up a run.

        Raises:
            ValueError: there are no records.
        """
        table = records if isinstance(records, RequestRecords) else RequestRecords(records)
        if not len(table):
            raise ValueError("no request ended: there is nothing to report.")
        columns = _Columns(table)
        return cls(
            run=run,
            wall=columns.wall,
            ended=columns.ended(),
            ttft=Distribution.of(columns.ttft[columns.finished]),
            tpot=Distribution.of(columns.tpot[columns.finished]),
            itl=None if gaps is None else gaps.distribution(),
            itl_counts=() if gaps is None else gaps.counts(),
            e2e=Distribution.of(columns.e2e[columns.finished]),
            parts=columns.parts(columns.finished),
            worst_parts=columns.parts(columns.worst()),
            goodput=columns.goodput(slo, table.slos()),
            tokens=columns.tokens(),
            meshes=tuple(meshes),
            flips=tuple(flips),
            dispersion=dispersion(columns["arrival"]),
            dollars_per_gpu_hour=dollars_per_gpu_hour,
            power=power,
            missed_tokens=dict(missed_tokens or {}),
            late=late,
        )

    @property
    def requests(self) -> int:
        """Return how many requests ended."""
        return sum(self.ended.values())

    @property
    def finished(self) -> int:
        """Return how many of them ran to their end."""
        return sum(self.ended.get(reason, 0) for reason in REASONS[:FINISHED])

    @property
    def output_tokens_per_second(self) -> float:
        """Return generated tokens over the wall time."""
        return self._per_second(self.tokens.output)

    @property
    def total_tokens_per_second(self) -> float:
        """Return prompt and generated tokens over the wall time; what the cache spared counts as served."""
        return self._per_second(self.tokens.prompt + self.tokens.output)

    @property
    def output_tokens_per_second_per_gpu(self) -> float:
        """Return generated tokens over the wall time and all GPUs."""
        return self.output_tokens_per_second / self.run.gpus

    @property
    def total_tokens_per_second_per_gpu(self) -> float:
        """Return prompt and generated tokens over the wall time and all GPUs."""
        return self.total_tokens_per_second / self.run.gpus

    @property
    def hit_rate(self) -> float | None:
        """Return the share, 0 to 1, of prompt tokens that the prefix cache spared; None where there were none."""
        return self.tokens.cached / self.tokens.prompt if self.tokens.prompt else None

    @property
    def utilisation(self) -> float | None:
        """Return the share, 0 to 1, of wall time in which GPUs ran steps; None where it is not known."""
        gpus = sum(mesh.gpus for mesh in self.meshes)
        busy = sum(mesh.busy * mesh.gpus for mesh in self.meshes)
        return busy / self.wall / gpus if gpus and self.wall > 0 else None

    @property
    def dollars(self) -> Dollars | None:
        """Return $ per million tokens; None where no price is known.

        As InferenceX has it: $/GPU-hour / (tokens/s a GPU x 0.0036), which is the seconds of an hour over a million.
        """
        price = self.dollars_per_gpu_hour
        if price is None:
            return None

        def of(count: int) -> float | None:
            rate = self._per_second(count) / self.run.gpus
            return price / (rate * 0.0036) if rate > 0 else None

        prompt, output = self.tokens.prompt, self.tokens.output
        return Dollars(per_gpu_hour=price, input=of(prompt), output=of(output), total=of(prompt + output))

    @property
    def joules(self) -> float | None:
        """Return what all GPUs draw over the wall time; None where the power is not known."""
        return None if self.power is None else self.power.watts * self.run.gpus * self.wall

    @property
    def joules_per_output_token(self) -> float | None:
        """Return the same over generated tokens; None where the power is not known, or there are none."""
        return None if self.joules is None or not self.tokens.output else self.joules / self.tokens.output

    def _per_second(self, count: int) -> float:
        return count / self.wall if self.wall > 0 else 0.0


class _Columns:
    """Columns of the records, and what follows from them: each [records]."""

    def __init__(self, table: RequestRecords) -> None:
        self._table = table
        arrival, first, last, finish = (self[name] for name in ("arrival", "first_token", "last_token", "finish"))
        output = self["output_len"]
        self.finished: np.ndarray = self["reason"] < FINISHED
        self.ttft, self.e2e = first - arrival, finish - arrival
        self.tpot: np.ndarray = np.where(output > 1, last - first, np.nan) / np.maximum(output - 1, 1)
        self.wall = float(np.fmax(arrival, finish).max() - arrival.min())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._table.column(name)

    def ended(self) -> dict[str, int]:
        counts = np.bincount(self["reason"], minlength=len(REASONS))
        return {reason: int(count) for reason, count in zip(REASONS, counts, strict=True) if count}

    def worst(self) -> np.ndarray:
        """Return which finished requests had a TTFT at P99 or above."""
        if not self.finished.any():
            return self.finished
        least = np.nanpercentile(self.ttft[self.finished], 99)
        worst: np.ndarray = self.finished & (self.ttft >= least)
        return worst

    def parts(self, which: np.ndarray) -> Parts | None:
        if not which.any():
            return None
        names = ("queue", "prefill", "host", "handoff")
        return Parts(**{name: float(self[name][which].mean()) for name in names})

    def tokens(self) -> Tokens:
        names = {"prompt": "prompt_len", "cached": "cached_len", "output": "output_len"}
        return Tokens(**{name: int(self[column][self.finished].sum()) for name, column in names.items()})

    def goodput(self, slo: SLO | None, own: dict[int, SLO]) -> Goodput | None:
        ttft_limit, tpot_limit = self._limits(slo, own)
        judged = (self["reason"] != REASONS.index("abort")) & ~(np.isinf(ttft_limit) & np.isinf(tpot_limit))
        if not judged.any():
            return None
        # One token has no TPOT, and keeps to any.
        ttft_met = judged & self.finished & (1000 * self.ttft <= ttft_limit)
        tpot_met = judged & self.finished & ((1000 * self.tpot <= tpot_limit) | np.isnan(self.tpot))
        count, met = int(judged.sum()), int((ttft_met & tpot_met).sum())
        return Goodput(
            slo=slo,
            judged=count,
            met=met,
            per_second=met / self.wall if self.wall > 0 else 0.0,
            ttft_share=float(ttft_met.sum() / count),
            tpot_share=float(tpot_met.sum() / count),
        )

    def _limits(self, slo: SLO | None, own: dict[int, SLO]) -> tuple[np.ndarray, np.ndarray]:
        """Return the TTFT and TPOT asked of each request, in milliseconds; infinite where nothing is."""
        limits = []
        for name in ("ttft_ms", "tpot_ms"):
            limit = np.full(len(self._table), _limit(slo, name))
            for place, theirs in own.items():
                limit[place] = _limit(theirs, name)
            limits.append(limit)
        return limits[0], limits[1]


def _limit(slo: SLO | None, name: str) -> float:
    value = None if slo is None else getattr(slo, name)
    return np.inf if value is None else float(value)
