"""The one order that everything follows: seats, credit, chunks and rows of a step and, backwards, victims.

Interactive requests come before batch requests. Inside the interactive class the policy's key decides, which knows of
priorities by what they are worth (`weigh`); inside the batch class the earliest due comes first; and of equal ones the
earlier arrival. An order is fixed when a request is accepted, so that of two requests the same is always first, and
ageing needs no clock: who waits is overtaken only by those whose keys say so.
"""

from collections.abc import Sequence
from math import inf
from typing import Any

from ..config import EngineConfig
from .policy import Policy
from .request import Request

type Order = tuple[Any, ...]  # (class, key, number); a longer one comes right after the one that it begins with

INTERACTIVE, BATCH = 0, 1

# So often a request gives way to others of its own class.
MOST_PREEMPTIONS = 3


def weigh(request: Request, config: EngineConfig) -> None:
    """Note a request's class and priority, and what the latter is worth in seconds and in tokens."""
    priority = request.facts.service.priority
    request.level = (BATCH, 0) if request.facts.service.is_batch else (INTERACTIVE, priority)
    request.delay, request.delay_tokens = priority * float(config.age_seconds), priority * config.max_model_len


def place_in_order(request: Request, policy: Policy, leader: Request | None) -> Order:
    """Find a request's place in the order, which is never before that of the `leader` that it forks."""
    service = request.facts.service
    if service.is_batch:
        order: Order = BATCH, inf if service.due is None else service.due, request.number
    else:
        order = INTERACTIVE, policy.key(request), request.number
    return order if leader is None else max(order, (*leader.order[:2], request.number))


def candidates(request: Request, others: Sequence[Request]) -> Sequence[Request]:
    """Narrow down, in order, who may give up pages for a request that grows: itself, or others behind it.

    Batch requests where there are some and an interactive one grows; not those of its own class that have given way
    often enough, unless there are no others: then the first on its mesh could not go on.
    """
    behind = [other for other in others if other.level[0] > request.level[0]]
    if behind:
        return behind
    return [other for other in others if other is request or other.preempted < MOST_PREEMPTIONS] or others
