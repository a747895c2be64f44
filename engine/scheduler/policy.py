"""Policies: in which order requests are served, where they go, and which gives way. Nothing else decides that.

A policy decides by facts alone: no clock, no randomness, no state of its own, so that a run can be replayed. What is
possible at all (free slots and pages, steps in flight, blocks that another request is computing) is not its business.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, Protocol

from ..config import EngineConfig, PoolSize
from ..protocol.events import RequestFacts
from ..protocol.timeline import Timeline
from .mesh_state import MeshState, shared_state
from .ranking import decode_terms, prompt_terms
from .request import Request


class Policy(Protocol):
    """What decides between interactive requests, and between meshes.

    Everything follows one order, the lowest `key` first and of equal keys the earlier arrival: the queue, credit at the
    decode meshes, chunks and rows of a step, and backwards the choice of `victim`. Batch requests come after all others
    (`order.py`). `key` is asked once, when a request
    arrives, so the order of two requests never changes, also when one starts over. Completions of one prompt
    (`n > 1`) never come before the first of them, which computes the prompt.
    """

    @property
    def name(self) -> str:
        """Return the name of the policy in the decision log."""
        ...

    def key(self, request: Request) -> Any:
        """Return the request's place in the order: a value that `<` compares with every other request's key.

        Of the request `facts`, `number`, `timeline.arrival`, `accepted`, `tokens_before` and, of its priority, `delay`
        and `delay_tokens` are known. A policy that looks at none of the last two does not know priorities.
        """
        ...

    def prefill_rank(self, request: Request, mesh: MeshState) -> Any:
        """Rank a mesh that could prefill the request now; the lowest rank with room is taken.

        Of many meshes only a few are ranked (`router.py`), here and in `decode_rank`. `request.home` is the one where
        its conversation has left its KV.
        """
        ...

    def decode_rank(self, request: Request, mesh: MeshState) -> Any:
        """Rank a mesh that could decode the request; the lowest rank with room is taken."""
        ...

    def victim(self, candidates: Sequence[Request]) -> Request:
        """Choose the request that gives up its pages on a full mesh.

        `candidates`, at least one, are in order: the request that needs pages and those after it. The first of all on
        the mesh is never among them, so that it finishes whatever is chosen here.
        """
        ...


class FirstComeFirstServed:
    """Requests in order of arrival, as though those of a higher priority number had arrived later; prompts go where the
    least is left to do, decoding where most pages are free; the last in the order gives way.

    key = arrival + priority x `age_seconds`, so a request waits for one that comes after it only if that one's priority
    number is lower, and came no later than the difference of the two x `age_seconds` after it.
    """

    name = "fcfs"

    def key(self, request: Request) -> float:
        """Order requests by arrival and priority."""
        return request.accepted + request.delay

    def prefill_rank(self, request: Request, mesh: MeshState) -> tuple[float, ...]:
        """Prefer where it costs the fewest seconds, of the request and of others (`ranking.py`); then where the fewest
        tokens are to be computed, and of equal ones the conversation's own."""
        seconds = sum(prompt_terms(request, mesh))
        left = mesh.load_before(request) - mesh.pages.hit(request.hashes, request.to_prefill)
        is_strange = mesh.index != request.home
        return mesh.index == request.lost_on, seconds, left, is_strange, -mesh.pages.slots.num_free

    def decode_rank(self, request: Request, mesh: MeshState) -> tuple[float, ...]:
        """Prefer where it costs the fewest seconds, the hand-off included; then the mesh with the most free pages, and
        of equal ones the conversation's own."""
        seconds = sum(decode_terms(request, mesh))
        return mesh.index == request.lost_on, seconds, -mesh.pages.room, mesh.index != request.home

    def victim(self, candidates: Sequence[Request]) -> Request:
        """Choose the last candidate in the order."""
        return candidates[-1]


class ShortestPromptFirst(FirstComeFirstServed):
    """Short prompts first, with ageing by work: a request is overtaken only by so many prompt tokens.

    key = prompt tokens + `AGEING` x prompt tokens that arrived before. A later request overtakes one of L tokens only
    if its own prompt is shorter by more than `AGEING` x the tokens that arrived in between, with the L tokens counted.
    So the prompts that ever overtake it hold fewer than L x (1 / `AGEING` - 1) tokens together: with 1 / 64, 63 L, and
    none of L tokens or more. At P prefill tokens per second it waits less than 63 L / P seconds longer than behind
    those that arrived before it alone, what is computed again after a preemption apart. The bound knows no clock and
    no speed: it is the same on every machine.

    A level of priority is as much as the longest prompt: of prompts that arrive together the lower priority number goes
    first, however long, and a difference of d lets d x (1 / `AGEING`) x the longest prompt's tokens more overtake. So
    priorities too are worth an amount of work here, where fcfs has `age_seconds` x d.
    """

    name = "spf"
    AGEING = 1 / 64

    def key(self, request: Request) -> float:
        """Order requests by length, priority, and the prompt tokens that arrived before them."""
        return request.prompt_len + request.delay_tokens + self.AGEING * request.tokens_before


FCFS = FirstComeFirstServed()
POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": FirstComeFirstServed, "spf": ShortestPromptFirst}


def policy_named(name: str) -> Policy:
    """Make the policy of this name.

    Raises:
        ValueError: there is no such policy; names the nearest.
    """
    if name in POLICIES:
        return POLICIES[name]()
    near = get_close_matches(str(name), POLICIES, n=1, cutoff=0.0)
    raise ValueError(f"policy={name!r} is unknown: the policies are {', '.join(POLICIES)}; the nearest is {near[0]!r}.")


_COMPARED = 16  # values that all others are compared with, to see whether they can be ordered


def check_policy(policy: Policy, config: EngineConfig) -> None:
    """Try a policy on two sample requests and on empty meshes of this configuration.

    Raises:
        ValueError: a method is missing or fails, or what it gives cannot be compared.
    """
    pools = [PoolSize((1,) * len(config.windows), (), 0)] * len(config.topology.meshes)
    meshes = shared_state(config, pools, lambda action: None).meshes
    name = getattr(policy, "name", None)
    if not isinstance(name, str):
        raise ValueError(f"policy {policy!r} has no name: give it a `name`, a str that the decision log can record.")
    for method in ("key", "prefill_rank", "decode_rank", "victim"):
        if not callable(getattr(policy, method, None)):
            raise ValueError(
                f"policy {name!r} has no method {method}: add it, as engine/scheduler/policy.py describes."
            )
    first, second = _sample(0, 3), _sample(1, 2)
    _check_order(name, "key", "for every request", lambda: [policy.key(first), policy.key(second)])
    _check_order(name, "prefill_rank", "for every mesh", lambda: [policy.prefill_rank(first, m) for m in meshes])
    _check_order(name, "decode_rank", "for every mesh", lambda: [policy.decode_rank(first, m) for m in meshes])
    chosen = _tried(name, "victim", "for every list of requests", lambda: policy.victim([first, second]))
    if chosen not in (first, second):
        raise ValueError(f"policy {name!r} chooses {chosen!r} by victim: let it return one of the candidates.")


def _sample(number: int, prompt_len: int) -> Request:
    return Request(RequestFacts(number, prompt_len, 1), number, Timeline(float(number)), 3 * number)


def _check_order(name: str, method: str, when: str, values: Callable[[], list[Any]]) -> None:
    given = _tried(name, method, when, values)
    try:
        # With the first ones alone: an engine may have thousands of meshes.
        is_ordered = all(bool(a < b) + bool(b < a) + bool(a == b) == 1 for a in given for b in given[:_COMPARED])
    except Exception:
        is_ordered = False
    if not is_ordered:
        raise ValueError(
            f"policy {name!r} gives values by {method} that cannot be ordered ({', '.join(map(repr, given))}): "
            "let it return numbers, or tuples of numbers, that `<` compares."
        )


def _tried[T](name: str, method: str, when: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as error:
        raise ValueError(
            f"policy {name!r} fails in {method} ({type(error).__name__}: {error}): let it return a value {when}."
        ) from error
