"""The planner at work in an engine: what it looks at, when, and what becomes of what it says.

It is there iff the topology is a pool of several meshes and the engine's SLO has a percentile. It is fed by events
alone, woken by the agenda while there is or has been something to do, and acts as a caller of `set_roles` would, with a
drain time of its own: so a replay and a simulation have it for nothing. A caller's roles hold for `Rules.dwell`, as the
planner's own do. Batch requests are no demand: they take what is left.

Between two plans each call is O(1); a plan looks at every mesh once, and predicts as `prediction.py` says, unless what
it sees is what the plan before saw (`alike.py`).
"""

from collections.abc import Mapping

from ..protocol.actions import RolesSettled
from ..protocol.events import RoleName, SetRoles
from .admission import Admission
from .agenda import PLAN, Agenda, Due
from .alike import are_alike
from .demand import DemandWindow
from .handoffs import Handoffs
from .mesh_state import SharedState
from .notes import Planned
from .observations import MeshSize, Observations, Queues, Split, StepTimes
from .planned_times import PlannedTimes
from .planner import RULES, Plan, Rules, flips, plan
from .request import Request
from .roles import Roles

_DRAIN_TIMEOUT = 30.0  # seconds that meshes have to take their roles, as callers have by default
_DIGITS = 6  # of the numbers in a note


class Planning:
    """The plans of one engine."""

    def __init__(
        self,
        shared: SharedState,
        roles: Roles,
        agenda: Agenda[Due],
        admission: Admission,
        handoffs: Handoffs,
        rules: Rules = RULES,
    ):
        """Plan nothing before the first request."""
        self._shared, self._roles, self._agenda, self._rules = shared, roles, agenda, rules
        self._admission, self._handoffs = admission, handoffs
        self._window = DemandWindow(rules.bins, rules.bin_seconds, rules.pairs, rules.memory)
        self._size = _mesh_size(shared)
        self._times = PlannedTimes()
        self._is_awake = False
        self._changed: float | None = None  # when roles were changed last
        self._settling: float | None = None  # seconds that the planner's last change took; None: it is not known
        self._calls = 0
        self.last: Plan | None = None  # the latest plan
        self._seen: Observations | None = None  # what it was made of

    # ---- what is seen

    def arrived(self, request: Request, now: float) -> None:
        """Take in a new request."""
        if request.is_batch:
            return
        self._window.arrived(now, request.prompt_len)
        if not self._is_awake:
            self._is_awake = True
            self._agenda.set((PLAN, 0), now + self._rules.interval)

    def ended(self, request: Request, now: float) -> None:
        """Take in a request that has ended by itself."""
        if not request.is_batch:
            cached = request.cache.cached_tokens if request.cache is not None else 0
            self._window.ended(max(1, request.prompt_len - cached), request.prompt_len, request.confirmed)

    def asked(self, now: float) -> None:
        """Take in that a caller has named roles."""
        self._changed, self._settling = now, None

    # ---- plans

    def due(self, now: float) -> None:
        """Plan, act on it, and have the next plan come."""
        observed = self._observe(now)
        self.last = found = self._plan(observed)
        self._window.new_sample(self._rules.interval)
        if self._shared.notes.are_kept:
            self._shared.notes.add(_note(observed, found))
        if found.roles != observed.roles:
            self._change(found, observed.roles, now)
        self._is_awake = bool(self._shared.requests or any(observed.demand.requests))
        if self._is_awake:
            self._agenda.set((PLAN, 0), now + self._rules.interval)

    def _plan(self, observed: Observations) -> Plan:
        """Plan, or return the plan before where it stands."""
        last, seen, slo = self.last, self._seen, self._shared.config.slo
        if (
            last is not None and last.is_lasting
            and seen is not None and are_alike(observed, seen, or_easier=last.is_beyond_better(self._rules))
        ):  # fmt: skip
            return last
        self._seen = observed
        assert slo is not None
        return plan(observed, slo, self._rules)

    def _change(self, found: Plan, roles: Split, now: float) -> None:
        counted, count = self._shared.counters.planned_flips, flips(roles, found.roles)
        self._shared.counters.planned_flips = counted | {found.reason: counted.get(found.reason, 0) + count}
        self._changed, self._calls = now, self._calls + 1
        call = SetRoles(now, -self._calls, now + _DRAIN_TIMEOUT, _counts(found.roles), {})
        self._settling = None
        self._roles.set_roles(call, self._settled)

    def _settled(self, answer: RolesSettled) -> None:
        """Take in what has become of a change: nobody waits for it, but how long it took says how soon another may
        come."""
        if answer.outcome == "reached" and self._changed is not None and answer.call == -self._calls:
            self._settling = self._shared.costs.now - self._changed

    def _observe(self, now: float) -> Observations:
        window, costs, waiting, credit = (
            self._window.demand(now), self._shared.costs, self._admission.waiting, self._handoffs.waiting,
        )  # fmt: skip
        placed = sum([max(0, mesh.prefill_load - mesh.batch_load) for mesh in self._shared.meshes])
        pairs = window.pairs
        prompt = sum([pair.prompt for pair in pairs]) / len(pairs) if pairs else 0.0
        computed = sum([pair.to_compute for pair in pairs]) / len(pairs) if pairs else 0.0
        to_prefill = placed + waiting.tokens * (computed / prompt if prompt else 1.0)
        first, asking = waiting.first_awake, credit.longest_asking
        begun = len(self._shared.requests) - waiting.count - len(credit)
        return Observations(
            roles=Split(*self._roles.counts().values()),
            demand=window,
            queues=Queues(
                to_prefill=to_prefill,
                oldest_prompt=0.0 if first is None else max(0.0, now - first.accepted),
                for_credit=len(credit),
                oldest_credit=0.0 if asking is None else max(0.0, now - (asking.timeline.prefill_end or now)),
                decoding=max(0, begun - round(placed / computed)) if computed else begun,
            ),
            times=StepTimes(
                *self._times.observe(costs.terms_of_tp(0)), self._handoff_seconds(prompt), costs.is_measured(0)
            ),
            size=self._size,
            is_changing=self._roles.are_changing or self._admission.is_held,  # held: parameters are to change
            since_change=None if self._changed is None else now - self._changed,
            settling=self._settling,
            gains=self._gains(),
        )

    def _gains(self) -> Mapping[Split, float]:
        """Return the gains that the last plan found, if it left the roles as they are."""
        last = self.last
        return {} if last is None or last.now is None or last.roles != last.now.roles else last.gains

    def _handoff_seconds(self, prompt: float) -> float:
        """Return what a hand-off takes; 0 where none was ever seen, as on meshes that all do both: a guess of a link's
        speed could keep them from ever trying, and the first hand-offs tell."""
        mesh, config, costs = self._shared.meshes[0], self._shared.config, self._shared.costs
        if not costs.is_link_measured:
            return 0.0
        return costs.transfer(0, 1, mesh.page_bytes * config.pages_for(int(prompt)))


def _mesh_size(shared: SharedState) -> MeshSize:
    """Return what a mesh of the pool holds: all are alike."""
    config = shared.config
    tokens = config.kv_tokens([group.num_pages for group in shared.meshes[0].pages.groups])
    return MeshSize(
        config.chunk_size, config.prefill_rows, config.max_num_seqs, tokens, config.topology.meshes[0].fused
    )


def _counts(split: Split) -> dict[RoleName, int]:
    counts: dict[RoleName, int] = {"prefill": split.prefill, "decode": split.decode, "both": split.both}
    return {role: count for role, count in counts.items() if count}


def _note(observed: Observations, found: Plan) -> Planned:
    demand, queues, times = observed.demand, observed.queues, observed.times
    return Planned(
        found.reason,
        str(observed.roles),
        str(found.roles),
        None if found.best is None else str(found.best.roles),
        None if found.now is None else found.now.goodput,
        None if found.best is None else found.best.goodput,
        demand.seen,
        _rounded(sum(demand.tokens)),
        _rounded(queues.oldest_prompt),
        _rounded(queues.oldest_credit),
        (_rounded(times.prefill.fixed), _rounded(times.prefill.each)),
        (_rounded(times.decode.fixed), _rounded(times.decode.each)),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
