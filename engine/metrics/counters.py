"""What the scheduler counts for the metrics."""

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
class Traffic:
    """What hand-offs have moved since start-up: transfers that arrived, their bytes of KV and request state, and the
    seconds from the dispatch of each to its arrival, added up."""

    transfers: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass
class HostTime:
    """What the dispatching thread has spent since start-up, in seconds of its CPU time, and the steps it dispatched."""

    seconds: float = 0.0
    steps: int = 0
