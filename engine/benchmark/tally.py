"""Gathers what becomes of requests on a real engine: a record of each, the gaps between tokens, what failures say."""

from collections import defaultdict

from ..metrics.gaps import Gaps
from ..metrics.request_records import Reason, RequestRecord, RequestRecords, divide_ttft
from ..protocol.service import SLO
from ..protocol.timeline import Timeline


class Tally:
    """What has become of a run's requests so far; one thread writes it."""

    def __init__(self) -> None:
        self.records = RequestRecords()  # in the order in which they ended
        self.gaps = Gaps()
        self.errors: defaultdict[str, int] = defaultdict(int)  # what failed requests say, and how often

    def refuse(self, number: int, arrival: float, prompt_len: int, slo: SLO | None) -> None:
        """Count a request that was turned away."""
        self.records.append(RequestRecord(number, arrival, prompt_len, 0, reason="refused", slo=slo))

    def end(
        self,
        number: int,
        prompt_len: int,
        line: Timeline,
        reason: Reason,
        *,
        taken_in: float | None = None,
        cached_len: int = 0,
        error: str | None = None,
        slo: SLO | None = None,
    ) -> None:
        """Count a request that has ended.

        Args:
            number: its place in the load.
            prompt_len: tokens.
            line: its stamps.
            reason: how it ended.
            taken_in: when the dispatching thread had it; None: nobody saw, and until then it counts as queued.
            cached_len: prompt tokens that the prefix cache spared.
            error: what a failure says.
            slo: its own.
        """
        for gap in line.itl:
            self.gaps.add(gap)
        if error is not None:
            self.errors[error] += 1
        arrived = line.arrival if taken_in is None else taken_in
        parts = divide_ttft(line.arrival, arrived, line.prefill_start, line.first_token)
        self.records.append(
            RequestRecord(
                number, line.arrival, prompt_len, len(line.tokens), cached_len, line.first_token,
                line.tokens[-1] if line.tokens else None, line.finish, parts.queue, parts.prefill, line.handoff or 0.0,
                parts.host, reason, slo,
            )
        )  # fmt: skip
