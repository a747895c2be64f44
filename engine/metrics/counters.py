"""What scheduler and core count for the metrics."""

from dataclasses import dataclass


@dataclass
class Counters:
    """Counts of the scheduler since start-up."""

    prompt_tokens: int = 0  # of requests, each counted when it is first admitted
    cached_tokens: int = 0  # those of them that came from the prefix cache
    preemptions: int = 0  # requests that gave up their KV while they ran
    migrations: int = 0  # requests that moved their KV while they decoded
    retries: int = 0  # starts after a lost mesh or transfer


@dataclass
class HostTime:
    """What the dispatching thread has done since start-up."""

    seconds: float = 0.0  # of its CPU time
    steps: int = 0  # dispatched
