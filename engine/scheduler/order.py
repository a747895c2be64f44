"""The one order that everything follows: seats, credit, chunks and rows of a step and, backwards, victims.

Interactive requests come before batch requests. Inside the interactive class the policy's key decides, which knows of
priorities by what they are worth (`weigh`); inside the batch class the earliest due comes first; and of equal ones the
earlier arrival. An order is fixed when a request is accepted, so that of two requests the same is always first, and
ageing needs no clock: who waits is overtaken only by those whose keys say so.
"""

from math import inf
from typing import Any

from ..config import EngineConfig
from .policy import Policy
from .request import Request

type Order = tuple[Any, ...]  # (class, key, number); a longer one comes right after the one that it begins with

INTERACTIVE, BATCH = 0, 1


def weigh(request: Request, config: EngineConfig) -> None:
    """Note what a request's priority is worth, in seconds and in tokens."""
    priority = request.facts.service.priority
    request.delay, request.delay_tokens = priority * config.age_seconds, priority * config.max_model_len


def place_in_order(request: Request, policy: Policy, leader: Request | None) -> Order:
    """Find a request's place in the order, which is never before that of the `leader` that it forks."""
    service = request.facts.service
    if service.is_batch:
        order: Order = BATCH, inf if service.due is None else service.due, request.number
    else:
        order = INTERACTIVE, policy.key(request), request.number
    return order if leader is None else max(order, (*leader.order[:2], request.number))


def level(request: Request) -> tuple[int, int]:
    """Return the class and priority of a request: one of a lower level may take the place of one of a higher."""
    service = request.facts.service
    return (BATCH, 0) if service.is_batch else (INTERACTIVE, service.priority)
