"""Which roles the meshes of a pool should have: from a window of observations and a target to a plan and its reason.

A pure function: no clock, no randomness, no state. What it looks at and how it acts is elsewhere (`planning.py`), how
well a split of the meshes is predicted to do as well (`prediction.py`). Invariants: every phase keeps a mesh; roles
change only where the predicted goodput grows by at least `Rules.gain`, and a prediction does not depend on the roles of
the moment, so under observations that stay the same no split ever comes back; nothing is planned on observations that
are missing or old; a mesh is taken from a phase only where that phase is predicted to do without it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..protocol.service import SLO
from .candidates import candidates, near
from .observations import Observations, Outlook, Split
from .prediction import predict

_MOST_TRIED = 8  # splits whose prediction is asked for with more demand

# Why a plan is as it is. The sentence of each is in `SENTENCES`.
Reason = Literal[
    "few arrivals",
    "few ended",
    "not measured",
    "changing",
    "dwell",
    "meets",
    "better",
    "more prefill",
    "more decode",
    "saturated",
    "separate again",
    "one fewer misses",
    "not for long",
    "no gain",
    "out of reach",
]

SENTENCES: dict[Reason, str] = {
    "few arrivals": "too few requests came lately to plan by: the roles stay",
    "few ended": "too few requests have ended to know how long answers are: the roles stay",
    "not measured": "prompts or decode steps were not measured yet: the roles stay",
    "changing": "meshes still take the roles that they were given last, or parameters are to change: the roles stay",
    "dwell": "other roles would do better, and the last change is too recent",
    "meets": "the roles meet the target",
    "better": "the roles meet the target, and others would do better by more than the error of a prediction",
    "more prefill": "prompts would miss the target with the meshes that prefill now",
    "more decode": "tokens would miss the target with the meshes that decode now",
    "saturated": "prefill and decode apart would both miss the target: more meshes do both",
    "separate again": "prefill and decode apart would do better than meshes that do both",
    "one fewer misses": "other roles would do better, and the phase that gives a mesh up would miss the target",
    "not for long": "other roles would do better by now, and not for long enough yet to act on it",
    "no gain": "the roles miss the target, and none would do better by more than the error of a prediction",
    "out of reach": "no roles meet the target: these are the best",
}


@dataclass(frozen=True)
class Rules:
    """By what a plan is made, and when."""

    interval: float = 2.5  # seconds between two plans
    dwell: float = 20.0  # the most seconds for which roles stay that were changed
    least_dwell: float = 5.0  # and the fewest: what is decided by chance is not to be undone by chance at the next plan
    dwell_of_settling: float = 4.0  # times what the last change took, for which they stay: a fifth of the time drains
    settling: float = 5.0  # seconds of the meshes that change, the most that a change is taken to cost
    gain: float = 0.02  # part of all requests that has to meet the target more before roles change
    gain_to_meet: float = 0.005  # likewise where the target is met then and was not before
    gain_out_of_reach: float = 0.05  # likewise where no roles meet the target
    newest: float = 0.5  # weight of the newest plan in a gain, beside those before it
    headroom: float = 1.1  # a phase that gives up a mesh meets the target at so many times the demand
    fewest: int = 20  # arrivals in the window without which nothing is planned
    bins: int = 64  # intervals that are predicted
    bin_seconds: float = 1.0
    memory: int = 256  # intervals that are remembered
    pairs: int = 128  # in the sample of lengths


RULES = Rules()


@dataclass(frozen=True)
class Plan:
    """What the roles should be, and why."""

    roles: Split
    reason: Reason
    now: Outlook | None = None  # of the roles now; None: nothing was predicted
    best: Outlook | None = None  # of the split with the highest goodput
    is_reachable: bool = True  # whether some split meets the target
    # By how much each split is better than the roles now, in this plan and, fading, in those before it.
    gains: Mapping[Split, float] = field(default_factory=dict)

    @property
    def is_lasting(self) -> bool:
        """Return whether it leaves the roles as they are and nothing else was better, so that it stands for all
        observations alike."""
        is_quiet = self.reason in ("meets", "no gain", "out of reach")
        return is_quiet and self.now is not None and self.now.roles == self.roles

    def is_beyond_better(self, rules: Rules) -> bool:
        """Return whether no roles could do better by what a change asks for."""
        return self.now is not None and self.now.value + rules.gain > Outlook(self.roles, 1.0, 1.0, 1.0, 1.0).value

    @property
    def sentence(self) -> str:
        """Say what the roles should be and why, for people."""
        text = f"{self.roles}: {SENTENCES[self.reason]}"
        if self.now is not None:
            text += f"; {self.now.goodput:.1%} of requests are expected to meet the target with {self.now.roles}"
            if self.best is not None and self.best.roles != self.now.roles:
                text += f", {self.best.goodput:.1%} with {self.best.roles}"
        return text + "."


def plan(observed: Observations, slo: SLO, rules: Rules = RULES) -> Plan:
    """Choose the roles under which most requests are predicted to keep to `slo`, which has a percentile."""
    hold = _hold(observed, rules)
    if hold is not None:
        return Plan(observed.roles, hold)
    assert slo.percentile is not None
    target = slo.percentile / 100
    scale = rules.headroom if _is_late(observed, slo) else 1.0
    outlooks = _outlooks(observed, slo, scale)
    now, best = (
        outlooks[observed.roles],
        max(outlooks.values(), key=lambda o: (o.value, -flips(observed.roles, o.roles))),
    )
    is_reachable = any(o.goodput >= target for o in outlooks.values())
    gains = {
        split: (1 - rules.newest) * observed.gains.get(split, 0.0) + rules.newest * (o.value - now.value)
        for split, o in outlooks.items()
    }
    needed = {o: _needed(o, now, observed, target, rules, is_reachable=is_reachable) for o in outlooks.values()}
    better = [o for o, least in needed.items() if o.value - now.value >= least]
    lasting = [o for o in better if gains[o.roles] >= needed[o]]
    chosen = _safest(observed, slo, now, lasting, target, rules, scale) if lasting else None

    def stay(reason: Reason) -> Plan:
        return Plan(observed.roles, reason, now, best, is_reachable, gains)

    if chosen is None:
        if better and not lasting:
            return stay("not for long")
        if now.goodput >= target:
            return stay("meets")
        return stay("one fewer misses" if lasting else "no gain" if is_reachable else "out of reach")
    if observed.since_change is not None and observed.since_change < dwell(observed, rules):
        return stay("dwell")
    return Plan(chosen.roles, _why(now, chosen, outlooks.values(), target), now, best, is_reachable)


def dwell(observed: Observations, rules: Rules = RULES) -> float:
    """Return the seconds for which roles stay, from what the last change of them took: what is cheap may come again
    soon."""
    if observed.settling is None:
        return rules.dwell
    return min(rules.dwell, max(rules.least_dwell, rules.dwell_of_settling * observed.settling))


def flips(now: Split, then: Split) -> int:
    """Count the meshes that take another role."""
    return sum(max(0, new - old) for old, new in zip(now, then, strict=True))


def _hold(observed: Observations, rules: Rules) -> Reason | None:
    """Say why nothing can be planned; None: it can."""
    if observed.is_changing:
        return "changing"
    if observed.demand.seen < rules.fewest or not observed.demand.pairs:
        return "few arrivals"
    if not observed.demand.are_lengths_known:
        return "few ended"
    return None if observed.times.is_measured else "not measured"


def _is_late(observed: Observations, slo: SLO) -> bool:
    """Return whether a queue is older than the target allows: more than was foreseen has come, or steps take longer, so
    that the prediction is made for more demand. Whose fault it is, is left to the prediction."""
    queues, pairs = observed.queues, observed.demand.pairs
    prompts = slo.ttft_ms is not None and 1000 * queues.oldest_prompt > slo.ttft_ms
    answer = sum([pair.output for pair in pairs]) / len(pairs)
    return prompts or (slo.tpot_ms is not None and 1000 * queues.oldest_credit > slo.tpot_ms * answer)


def _outlooks(observed: Observations, slo: SLO, scale: float) -> dict[Split, Outlook]:
    """Predict the splits worth a look, and those near the best of them."""
    found = _by_split(predict(observed, slo, candidates(observed.roles), scale))
    best = max(found.values(), key=lambda o: o.value).roles
    more = [split for split in near(best) if split not in found]
    return found | _by_split(predict(observed, slo, more, scale)) if more else found


def _by_split(outlooks: Iterable[Outlook]) -> dict[Split, Outlook]:
    return {outlook.roles: outlook for outlook in outlooks}


def _needed(
    then: Outlook, now: Outlook, observed: Observations, target: float, rules: Rules, *, is_reachable: bool
) -> float:
    """Return by how much a split has to be better than the one now: by more than the error of a prediction, and by what
    the change costs, of all that is done in the time that is predicted: all that the meshes which change could do until
    it has settled, but not more than `Rules.settling`, since meshes that drain work on."""
    least = rules.gain_to_meet if now.goodput < target <= then.goodput else rules.gain
    if not is_reachable:
        least = rules.gain_out_of_reach
    seconds = rules.settling if observed.settling is None else min(rules.settling, observed.settling)
    return least + flips(now.roles, then.roles) / sum(now.roles) * seconds / (rules.bins * rules.bin_seconds)


def _safest(
    observed: Observations,
    slo: SLO,
    now: Outlook,
    better: Sequence[Outlook],
    target: float,
    rules: Rules,
    scale: float,
) -> Outlook | None:
    """Choose, of the best of these, the one that does best should more come than is forecast; None: a phase that gives
    up a mesh would then miss the target in each of them, or all are worse than the roles now."""
    grade = {o: (-int(o.value / rules.gain_to_meet), flips(now.roles, o.roles)) for o in better}
    first = sorted(better, key=grade.__getitem__)[:_MOST_TRIED]
    now_then, *more = predict(observed, slo, [o.roles for o in (now, *first)], rules.headroom * scale)
    allowed = [
        (o, then)
        for o, then in zip(first, more, strict=True)
        if then.value >= now_then.value
        and (_spares(now.roles, then, target) or (now.goodput < target and then.value >= now_then.value + rules.gain))
    ]
    if not allowed:
        return None
    top = max(o.value for o, _ in allowed) - rules.gain_to_meet
    return max(
        (pair for pair in allowed if pair[0].value >= top), key=lambda pair: (pair[1].value, -grade[pair[0]][1])
    )[0]


def _spares(now: Split, then: Outlook, target: float) -> bool:
    """Return whether the phases that have fewer meshes then meet the target without them."""
    prefills = then.roles.prefill + then.roles.both >= now.prefill + now.both or then.ttft >= target
    decodes = then.roles.decode + then.roles.both >= now.decode + now.both or then.tpot >= target
    return prefills and decodes


def _why(now: Outlook, then: Outlook, outlooks: Iterable[Outlook], target: float) -> Reason:
    """Name what is wrong with the roles now that others put right."""
    met = [outlook.roles for outlook in outlooks if outlook.goodput >= target]
    if not met:
        return "out of reach"
    if now.goodput >= target:
        return "better"
    if then.roles.both < now.roles.both:
        return "separate again"
    if then.roles.both > now.roles.both and all(split.both for split in met):
        return "saturated"
    return "more decode" if now.tpot < now.ttft else "more prefill"
