"""Nobody waits for ever, in virtual time: a request is seated within what its priority costs it and the work ahead.

Of two requests the order says once and for all which comes first, and `age_seconds` how much later one may arrive and
still come first. So behind a stream that the meshes can keep up with a request is seated within the difference of
priorities x `age_seconds` and the seconds of work ahead of it when it was accepted; behind one that overloads them, in
so many seconds of work as were ahead or have come ahead of it until then.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.protocol.events import Arrived, RequestFacts
from twinmesh.engine.protocol.service import Service
from twinmesh.engine.scheduler.request import State
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.topology import Topology
from twinmesh.scripts.bench.virtual_engine import StepTime, VirtualEngine

TIMES = StepTime(step=0.02, token=0.001, row=0.002, chunk=64)
AGE = 2.0
LENGTH, SLOTS, PAGE = 256, 2, 16


def seconds(prompt, output):
    """The work of so many tokens, each row in steps of its own."""
    return TIMES.step * -(-prompt // TIMES.chunk) + TIMES.token * prompt + output * (TIMES.step + TIMES.row)


LONGEST_STEP = TIMES.step + TIMES.chunk * TIMES.token + SLOTS * TIMES.row


class Watched(Scheduler):
    """A scheduler that notes the work ahead of each request when it is accepted, and when it is seated."""

    def __init__(self, topology, pages=None, slots=SLOTS):
        config = EngineConfig(
            Topology.parse(topology), LENGTH, page_size=PAGE, max_num_seqs=slots, prefill_buckets=(TIMES.chunk,),
            decode_buckets=(slots,), prefix_cache=False, age_seconds=AGE,
        )  # fmt: skip
        pool = PoolSize((pages or 4 * slots * config.max_pages,), (1,), 64 * config.max_pages)
        super().__init__(config, [pool] * len(config.topology.meshes))
        self.accepted, self.ahead, self.seated_at, self.waiting = {}, {}, {}, []

    def on(self, event):
        super().on(event)
        if isinstance(event, Arrived):
            new = self.requests[event.facts.id]
            self.accepted[new.id], self.ahead[new.id] = new, sum(map(left, self.before(new)))
            for other in self.waiting:  # of one instant, those that come ahead of it are ahead of it
                if other.accepted == new.accepted and other.order > new.order:
                    self.ahead[other.id] += left(new)
            self.waiting.append(new)

    def before(self, new):
        """Those that run and those that wait before it."""
        return [
            r for r in self.requests.values() if r is not new and (r.state is not State.WAITING or r.order < new.order)
        ]

    def actions(self):
        out = super().actions()
        for request in [request for request in self.waiting if request.state is not State.WAITING]:
            self.waiting.remove(request)
            self.seated_at[request.id] = self._now
        return out

    def waited(self, request):
        return self.seated_at[request.id] - request.accepted


def left(request):
    """The work that a request has left."""
    return seconds(request.to_prefill - request.prefilled, request.max_tokens - request.confirmed)


def run(topology, arrivals, **size):
    """Serve requests (t, prompt, output, priority) to their end."""
    scheduler = Watched(topology, **size)
    engine = VirtualEngine(scheduler, TIMES)
    for number, (t, prompt, output, priority) in enumerate(arrivals):
        engine.post(Arrived(t, RequestFacts(number, prompt, output, service=Service(priority=priority))))
    assert [request.state for request in engine.run()] == [State.FINISHED] * len(arrivals)
    return scheduler


SIZES = st.tuples(st.integers(1, 200), st.integers(1, 40), st.integers(-2, 2))


@settings(max_examples=60, deadline=None)
@given(
    topology=st.sampled_from(["both=1", "both(mode=fused)=1", "prefill=1,decode=1", "both=2"]),
    at_once=st.lists(SIZES, min_size=1, max_size=30),
    later=st.lists(st.tuples(SIZES, st.floats(1.0, 3.0)), max_size=60),
)
def test_a_request_is_seated_within_what_its_priority_costs_and_the_work_ahead(topology, at_once, later):
    """Those that come later come no faster than one mesh serves them one by one."""
    arrivals, t = [(0.0, *size) for size in at_once], 0.0
    for (prompt, output, priority), slower in later:
        t += seconds(prompt, output) * slower
        arrivals.append((t, prompt, output, priority))
    scheduler = run(topology, arrivals)
    lowest = min(priority for *_, priority in arrivals)
    for request in scheduler.accepted.values():
        grace = (request.facts.service.priority - lowest) * AGE
        # Two steps are under way when it is accepted, and two when it may be seated.
        assert scheduler.waited(request) <= grace + scheduler.ahead[request.id] + 4 * LONGEST_STEP


def stream(priority, load, until, prompt=64, output=8):
    """Requests of one priority that bring `load` times the work that two slots of one mesh can do."""
    gap = seconds(prompt, output) / 2 / load
    return [(index * gap, prompt, output, priority) for index in range(int(until / gap))]


@pytest.mark.parametrize("topology", ["both=1", "prefill=1,decode=1"])
@pytest.mark.parametrize("levels", [1, 3])
def test_a_stream_of_higher_priority_that_overloads_the_engine_starves_nobody(topology, levels):
    arrivals = sorted([*stream(-levels, 2.0, 2 * AGE + 2 * levels * AGE), (1.0, 64, 8, 0), (2.0, 64, 8, 0)])
    scheduler = run(topology, arrivals)
    low = [request for request in scheduler.accepted.values() if request.facts.service.priority == 0]
    assert len(low) == 2
    for request in low:
        ahead = [other for other in scheduler.accepted.values() if other.order < request.order]
        came = [other for other in ahead if other.accepted > request.accepted]
        assert len(came) > 20  # the stream does come before it, for so long:
        assert max(other.accepted for other in came) <= request.accepted + levels * AGE
        after = [other for other in scheduler.accepted.values() if other.accepted > request.accepted + levels * AGE]
        assert len(after) > 20
        assert all(scheduler.seated_at[other.id] >= scheduler.seated_at[request.id] for other in after)
        work = scheduler.ahead[request.id] + sum(seconds(r.prompt_len, r.max_tokens) for r in came)
        assert scheduler.waited(request) <= work + 4 * LONGEST_STEP


def test_of_those_that_wait_the_lower_number_goes_first():
    scheduler = run("both=1", [*[(0.0, 64, 8, 0)] * 6, (0.1, 64, 8, -1), (0.1, 64, 8, 1)])
    order = sorted(scheduler.seated_at, key=scheduler.seated_at.__getitem__)
    assert order.index(6) == SLOTS
    assert order.index(7) == 7


def test_requests_of_one_priority_are_seated_in_order_of_arrival():
    scheduler = run("both=1", stream(2, 2.0, 20.0))
    times = [scheduler.seated_at[number] for number in sorted(scheduler.seated_at)]
    assert times == sorted(times)


def test_a_prompt_that_finds_no_room_is_passed_over_for_so_long_and_no_longer():
    """Short ones keep the pages taken that a long one needs; from then on what they free is kept for it."""
    whole = LENGTH // PAGE
    arrivals = sorted([*stream(0, 2.0, 6 * AGE), (0.5, LENGTH - 20, 8, 0)])
    scheduler = run("both=1", arrivals, pages=whole + 1, slots=4)
    (long,) = [request for request in scheduler.accepted.values() if request.prompt_len > 64]
    passed = [other for other in scheduler.accepted.values() if other.number > long.number]
    before = [other for other in passed if scheduler.seated_at[other.id] < scheduler.seated_at[long.id]]
    assert len(before) > 5
    assert scheduler.waited(long) >= AGE
    assert scheduler.waited(long) <= AGE + scheduler.ahead[long.id] + 4 * seconds(64, 8)
