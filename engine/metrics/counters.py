"""What is counted for the metrics: by scheduler and core, and by what counts compilations."""

from dataclasses import dataclass
from typing import Protocol


@dataclass
class Counters:
    """Counts of the scheduler since start-up."""

    prompt_tokens: int = 0  # of requests, each counted when it is first admitted
    cached_tokens: int = 0  # those of them that came from the prefix cache
    preemptions: int = 0  # requests that gave up their KV while they ran
    migrations: int = 0  # requests that moved their KV while they decoded
    flips: int = 0  # changes of a mesh's role
    conditional_prefills: int = 0  # prompts given to a decode mesh to prefill
    retries: int = 0  # starts after a lost mesh or transfer


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

    def close(self) -> None:
        """Stop counting."""
        ...
