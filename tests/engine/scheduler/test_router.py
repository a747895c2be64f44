"""Where prompts and decoding requests go: short lists, load before length of match, and no cost by number of meshes."""

import gc
import sys
from collections import Counter

import pytest
from helpers.fake_device import block_hashes
from twinmesh.engine.protocol.actions import Decode, Prefill
from twinmesh.engine.protocol.events import AbortRequested, Arrived, Outcome, RequestFacts, StepDone
from twinmesh.engine.scheduler.policy import FirstComeFirstServed
from twinmesh.engine.scheduler.request import State
from twinmesh.engine.scheduler.router import MOST

from .test_scheduler import PAGE, arrive, make, only, step


class Asked(FirstComeFirstServed):
    """Counts the meshes that are ranked."""

    def __init__(self):
        self.prompts, self.decodes = [], []

    def prefill_rank(self, request, mesh):
        self.prompts.append(mesh.index)
        return super().prefill_rank(request, mesh)

    def decode_rank(self, request, mesh):
        self.decodes.append(mesh.index)
        return super().decode_rank(request, mesh)


class LongestPrefixFirst(FirstComeFirstServed):
    name = "longest prefix first"

    def prefill_rank(self, request, mesh):
        return -mesh.pages.hit(request.hashes, request.to_prefill)


def spread(policy, topology="both=12", requests=24):
    """How many of these requests, which begin with the same block, run on each mesh. Each has its first token before
    the next arrives, and none ends."""
    scheduler, _ = make(topology, pages=2000, slots=requests, length=256, policy=policy)
    for number in range(requests):
        hashes = (b"shared", *block_hashes(f"r{number}", 4 * PAGE, PAGE)[1:])
        scheduler.on(Arrived(float(number), RequestFacts(number, 4 * PAGE, 200, hashes)))
        while not scheduler.requests[number].confirmed:
            for action in scheduler.actions():
                if isinstance(action, Prefill | Decode):
                    scheduler.on(StepDone(float(number), action.mesh, action.step, outcomes(action)))
    return Counter(request.placement.mesh for request in scheduler.requests.values())


def outcomes(action):
    rows = action.rows if isinstance(action, Decode) else [chunk for chunk in action.chunks if chunk.is_last]
    return tuple(Outcome(row.request_id, False) for row in rows)


def test_a_block_that_all_requests_share_draws_them_to_no_mesh():
    assert max(spread(FirstComeFirstServed()).values()) <= 3
    assert max(spread(FirstComeFirstServed(), "both=4").values()) <= 7
    assert spread(LongestPrefixFirst()) == {0: 24}


def test_at_most_eight_meshes_are_ranked_and_the_one_with_the_prefix_is_among_them():
    policy = Asked()
    scheduler, device = make("both=40", pages=64, length=64, policy=policy)
    for number in range(30):
        arrive(scheduler, device, f"r{number}", prompt_len=8, max_tokens=40)
    step(scheduler, device)
    mesh = scheduler.requests["r17"].placement.mesh
    policy.prompts.clear()
    again = arrive(scheduler, device, "again", prompt_len=40, prompt="r17")
    while again.state is State.WAITING:  # what it shares with r17 is dispatched, and not waited for
        step(scheduler, device)
    assert len(set(policy.prompts)) == MOST
    assert mesh in policy.prompts


def test_at_most_eight_meshes_are_ranked_for_decoding():
    policy = Asked()
    scheduler, device = make("prefill=1,decode=40", pages=64, policy=policy)
    policy.decodes.clear()
    arrive(scheduler, device, "a")
    device.drain(1.0)
    assert len(policy.decodes) == MOST


def test_the_one_mesh_with_room_is_found_behind_any_number_with_less_to_do():
    scheduler, device = make("both=30", pages=24, length=80, slots=4)
    for number in range(29):
        arrive(scheduler, device, f"r{number}", prompt_len=56, max_tokens=20)  # over half of the pages each
    for number in range(2):
        arrive(scheduler, device, f"s{number}", prompt_len=4, max_tokens=20)
    for _ in range(16):
        step(scheduler, device)
        for mesh in range(30):
            device.complete_step(mesh, 1.0)
    step(scheduler, device)
    meshes = {request.placement.mesh for request in scheduler.requests.values() if request.id.startswith("s")}
    assert [mesh.load for mesh in scheduler.meshes if mesh.index not in meshes] == [PAGE] * 29
    request = arrive(scheduler, device, "long", prompt_len=40, max_tokens=20)
    step(scheduler, device)
    assert {request.placement.mesh} == meshes
    scheduler.check_integrity()


def calls(function):
    """How many Python functions are called; those that hypothesis has Python call at a garbage collection apart."""
    count = 0

    def count_call(frame, event, argument):
        nonlocal count
        count += event == "call"

    gc.disable()
    sys.setprofile(count_call)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def busy(topology, waiting, slots=2):
    """An engine whose slots are all taken, and so many requests that wait."""
    scheduler, device = make(topology, pages=64, length=64, slots=slots)
    meshes = len(scheduler.meshes)
    for number in range(slots * meshes + waiting):
        arrive(scheduler, device, f"r{number}", prompt_len=8, max_tokens=40)
    for _ in range(6):
        step(scheduler, device)
        for mesh in range(meshes):
            if device.steps[mesh]:
                device.complete_step(mesh, 1.0)
        while device.transfers:
            device.complete_transfer(0, 1.0)
    step(scheduler, device)
    return scheduler, device


def cost_of_each_kind(topology, waiting):
    scheduler, device = busy(topology, waiting)
    last = f"r{len(device.prompts) - 1}"
    device.prompts["new"] = ("new", 8)
    new = Arrived(2.0, RequestFacts("new", 8, 4, block_hashes("new", 8, PAGE)))
    mesh = next(mesh for mesh in range(len(device.steps) - 1, -1, -1) if len(device.steps[mesh]) == 2)
    device.complete_step(mesh, 2.0)
    device.perform(scheduler.actions())
    return {
        "arrival": calls(lambda: (scheduler.on(new), scheduler.actions())),
        "abort": calls(lambda: (scheduler.on(AbortRequested(3.0, last)), scheduler.actions())),
        "step": calls(lambda: (device.complete_step(mesh, 4.0), scheduler.actions())),
    }


@pytest.mark.parametrize("role", ["both={}", "prefill={},decode={}"])
def test_a_decision_asks_as_much_however_many_meshes_there_are(role):
    few, many = (cost_of_each_kind(role.format(count, count), 5) for count in (4, 40))
    assert few == many


def test_a_mesh_is_chosen_by_asking_as_much_however_many_there_are():
    costs = []
    for meshes in (40, 160):
        scheduler, device = make(f"both={meshes}", pages=64, length=64)
        for number in range(20):
            arrive(scheduler, device, f"r{number}", prompt_len=24, prompt="p")
            step(scheduler, device)
            device.complete_step(scheduler.requests[f"r{number}"].prefilled_on, 1.0)
            step(scheduler, device)
        costs.append(
            calls(lambda: (arrive(scheduler, device, "new", prompt_len=24, prompt="p"), scheduler.actions()))  # noqa: B023
        )
    assert costs[0] == costs[1]


def test_of_many_meshes_with_a_prefix_the_least_loaded_are_ranked():
    policy = Asked()
    scheduler, device = make("both=40", pages=64, length=64, policy=policy)
    for number in range(40):
        arrive(scheduler, device, f"r{number}", prompt_len=8, max_tokens=40, prompt=f"p{number}")
    step(scheduler, device)
    for mesh in scheduler.meshes:
        mesh.pages.remember(next(iter(mesh.placed)).placement, block_hashes("all", 8, PAGE), 8)
    for number in range(30):  # a second request on most
        arrive(scheduler, device, f"s{number}", prompt_len=8, max_tokens=40)
    step(scheduler, device)
    idle = {mesh.index for mesh in scheduler.meshes if len(mesh.placed) == 1}
    policy.prompts.clear()
    arrive(scheduler, device, "new", prompt_len=12, prompt="all")
    step(scheduler, device)
    assert set(policy.prompts) <= idle


def test_a_decision_asks_as_much_however_many_requests_wait():
    few, many = (cost_of_each_kind("both=2", waiting) for waiting in (20, 600))
    assert all(many[kind] <= few[kind] + 4 for kind in few)
    assert few["step"] == many["step"]


def test_a_chunk_asks_as_much_however_many_requests_wait_for_what_it_computes():
    costs, actions = [], []
    for waiting in (5, 500):
        scheduler, device = make("both=1", pages=600, length=128, slots=16, prefill_buckets=(8,))
        for number in range(waiting):
            arrive(scheduler, device, f"r{number}", prompt_len=100, prompt="p", max_tokens=2)
        step(scheduler, device)
        costs.append([])
        for _ in range(8):  # chunks of the first prompt
            costs[-1].append(calls(lambda device=device: device.complete_step(0, 1.0)))
            costs[-1].append(calls(lambda scheduler=scheduler: actions.extend(scheduler.actions())))
            device.perform(actions)
            actions.clear()
        assert sum(request.state is State.WAITING for request in scheduler.requests.values()) == waiting - 1
    assert costs[0] == costs[1]


def test_what_waits_for_one_prefix_goes_on_together_and_is_placed_in_order():
    scheduler, device = make("both=1", pages=600, length=64, slots=8, prefill_buckets=(8,))
    for number in range(40):
        arrive(scheduler, device, f"r{number}", prompt_len=40 + number % 3, prompt="pq"[number % 2], max_tokens=2)
    begun = []
    for _ in range(2000):
        begun += [c.request_id for action in only(step(scheduler, device), Prefill) for c in action.chunks]
        scheduler.check_integrity()
        if not device.steps[0]:
            break
        device.complete_step(0, 1.0)
    assert len(device.finished) == 40
    order = [int(name[1:]) for name in dict.fromkeys(begun)]
    for first in (0, 1):
        assert [number for number in order if number % 2 == first] == list(range(first, 40, 2))
