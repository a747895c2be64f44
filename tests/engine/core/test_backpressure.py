"""A decode side five times too slow: what waits for it is bounded, first tokens come as ever, callers are told."""

import numpy as np
import pytest
from helpers.fake_device import FakeDevice, block_hashes
from helpers.virtual_time import VirtualTime
from twinmesh import Overloaded
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.core.submission import Submission
from twinmesh.engine.core.waiting_room import RoomKeeper, WaitingRoom
from twinmesh.engine.protocol.actions import Decode, Finish
from twinmesh.engine.protocol.events import Arrived, RequestFacts
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.scheduler.request import State
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.topology import Topology

PAGE, PROMPT, OUTPUT, PAGES, STAGING = 4, 16, 10, 64, 8
CONFIG = EngineConfig(
    Topology.parse("prefill=1,decode=1"), max_model_len=32, page_size=PAGE, max_num_seqs=16, prefill_buckets=(8,),
    prefill_rows=1, decode_buckets=(16,), max_waiting=20,
)  # fmt: skip
ARRIVALS = 10.0  # a second
CHUNK = 0.03  # seconds: prompts are computed at 16 a second
FAST, SLOW = 0.1, 0.8  # of a decode step: answers end at 16 and at 2 a second


class Spike:
    """Sixty seconds of arrivals."""

    def __init__(self, decode_step):
        pools = [PoolSize((pages,), (1,), STAGING) for pages in (PAGES, 2 * PAGES)]
        self.scheduler = Scheduler(CONFIG, pools)
        self.device = FakeDevice(self.scheduler, {})
        self.time = VirtualTime(
            self.scheduler, self.device, lambda step: decode_step if isinstance(step, Decode) else CHUNK
        )
        self.room = WaitingRoom(CONFIG.max_waiting, None, lambda: self.time.now)
        self.keeper = RoomKeeper(self.room, self.scheduler)
        self.requests, self.seated, self.refused, self.most_kept, self.most_waiting = {}, {}, 0, 0, 0
        self._ended, self.times_backed_up = 0, 0
        for number in range(int(60 * ARRIVALS)):
            self.time.at(number / ARRIVALS, lambda number=number: self._submit(number))
        self.time.run(60.0, self._look)
        self.waited = self.scheduler.requests.copy()
        self.time.run(1e9, self._look)

    def _submit(self, number):
        hashes = block_hashes(f"p{number}", PROMPT, PAGE)
        facts = RequestFacts(number, PROMPT, OUTPUT, hashes)
        submission = Submission(
            self.time.now, facts, np.zeros(PROMPT, np.int32), SamplingPlan(0.0, 1), frozenset(), None, None
        )
        try:
            self.room.enter_or_refuse([submission])
        except Overloaded:
            self.refused += 1
            return
        self.device.prompts[number] = (f"p{number}", PROMPT)
        self.scheduler.on(Arrived(self.time.now, facts))
        self.requests[number] = self.scheduler.requests[number]
        self.keeper.received((submission,))

    def _look(self):
        """After every decision: what waits for credit, and who was seated."""
        prefill, decode = self.scheduler.meshes
        kept = [r for r in prefill.placed if r.state is State.HANDOFF and r.placement.mesh == 0]
        pages = sum(len(request.placement.tables[0].pages) for request in kept)
        self.most_kept = max(self.most_kept, pages)
        self.times_backed_up += prefill.is_backed_up
        assert 0 <= prefill.staging <= STAGING
        assert 0 <= decode.staging <= STAGING
        # At most the chunk that runs, and then all that is to be computed there.
        ahead = CHUNK + prefill.prefill_load / CONFIG.chunk_size * CHUNK
        self.seated.update(dict.fromkeys(self.scheduler.seated, (self.time.now, ahead)))
        waiting = sum(request.state is State.WAITING for request in self.scheduler.requests.values())
        self.most_waiting = max(self.most_waiting, waiting)
        ended = list(self.device.finished)[self._ended :]
        self._ended += len(ended)
        self.keeper.decided(self.scheduler, [Finish(id_, "length") for id_ in ended])


@pytest.fixture(scope="module")
def fast():
    return Spike(FAST)


@pytest.fixture(scope="module")
def slow():
    return Spike(SLOW)


def test_pages_that_wait_for_credit_stay_within_their_bound(slow):
    assert slow.times_backed_up > 100
    assert slow.most_kept <= PAGES // 2 + PROMPT // PAGE


@pytest.mark.parametrize("speed", ["fast", "slow"])
def test_first_tokens_of_admitted_prompts_wait_for_what_is_before_them_on_their_mesh_alone(speed, request):
    spike = request.getfixturevalue(speed)
    for id_, (t, ahead) in spike.seated.items():
        assert spike.requests[id_].timeline.first_token - t <= 1.05 * ahead


def test_the_queue_grows_instead_and_callers_are_refused(fast, slow):
    assert fast.refused == 0
    assert fast.most_waiting <= 2
    assert slow.refused > 300
    assert slow.most_waiting == CONFIG.max_waiting


def test_afterwards_nothing_is_left(slow):
    assert slow.waited
    assert set(slow.device.finished) == set(slow.requests)
    assert set(slow.device.finished.values()) == {"length"}
    for mesh in slow.scheduler.meshes:
        assert all(pages.num_free == pages.num_pages for pages in mesh.pages.groups)
        assert mesh.staging == STAGING
        assert not mesh.placed
    slow.scheduler.check_integrity()
