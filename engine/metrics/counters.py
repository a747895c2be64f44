"""What is counted for the metrics: by scheduler and core, and by what counts compilations."""

from dataclasses import dataclass, field
from typing import Protocol

from ..protocol.cache_report import MissReason, PrefixCacheReport


def no_misses() -> dict[MissReason, int]:
    """Make a count of nothing for every reason. It never grows, so another thread may copy it at any time."""
    return dict.fromkeys(MissReason, 0)


@dataclass
class Counters:
    """Counts of the scheduler since start-up."""

    prompt_tokens: int = 0  # of requests, each counted when it is first admitted
    cached_tokens: int = 0  # those of them that came from the prefix cache
    missed_tokens: dict[MissReason, int] = field(default_factory=no_misses)  # those that did not, by reason
    missed_requests: dict[MissReason, int] = field(default_factory=no_misses)  # requests with such tokens
    preemptions: int = 0  # requests that gave up their KV while they ran
    migrations: int = 0  # requests that moved their KV while they decoded
    flips: int = 0  # changes of a mesh's role
    planned_flips: dict[str, int] = field(default_factory=dict)  # those that the planner asked for, by its reason
    conditional_prefills: int = 0  # prompts given to a decode mesh to prefill
    retries: int = 0  # starts after a lost mesh or transfer

    def count_prompt(self, tokens: int, report: PrefixCacheReport) -> None:
        """Count a prompt of so many tokens that begins to be computed."""
        self.prompt_tokens += tokens
        self.cached_tokens += report.cached_tokens
        for miss in report.missed:
            self.missed_tokens[miss.reason] += miss.tokens
        for reason in {miss.reason for miss in report.missed}:
            self.missed_requests[reason] += 1


@dataclass
class HostTime:
    """What the dispatching thread has done since start-up."""

    seconds: float = 0.0  # of its CPU time
    steps: int = 0  # dispatched


class Compilations(Protocol):
    """A counter of compilations in this process, which counts until it is closed, but not those of the engine's own
    programs."""

    count: int

    @property
    def coming(self) -> tuple[str, ...]:
        """Name the sizes of steps whose programs are still being compiled."""
        ...

    def prepare_masks(self) -> None:
        """Compile what masks over tokens need, on the calling thread, unless it is there; none of it counts."""
        ...

    def close(self) -> None:
        """Stop counting."""
        ...
