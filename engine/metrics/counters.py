"""What scheduler and core count for the metrics."""

from dataclasses import dataclass


@dataclass
class Counters:
    """Since start-up. Prompt tokens are counted when a request is first admitted; `cached_tokens` of them came from the
    prefix cache. `retries`: starts after a lost mesh or transfer."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    migrations: int = 0
    retries: int = 0


@dataclass
class HostTime:
    """What the dispatching thread has done since start-up."""

    seconds: float = 0.0  # of its CPU time
    steps: int = 0  # dispatched
