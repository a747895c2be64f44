"""Twenty runs recorded at efd1214 are decided the same: given the same events, the scheduler gives the same actions.

The recordings (`tests/record_decisions.py` made them, and says what they hold) keep the names of their day. What has
another name or form now is said in one place below, under "Then and now"; the rest of this file knows neither.
"""

import json
import lzma
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import pytest
from helpers.plain import field_names, plain
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.protocol.actions import Action, Chunk, DecodeRow
from twinmesh.engine.protocol.events import Event, Outcome, RequestFacts
from twinmesh.engine.scheduler.admission import Admission
from twinmesh.engine.scheduler.mesh_state import MeshState, sorted_requests
from twinmesh.engine.scheduler.policy import FirstComeFirstServed
from twinmesh.engine.scheduler.priority_inheritance import PriorityInheritance
from twinmesh.engine.scheduler.request import State
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.scheduler.waiting import WaitingRequests
from twinmesh.engine.topology import Topology

RUNS = sorted((Path(__file__).parents[2] / "fixtures" / "decisions").glob("*.json.xz"))

# ---- Then and now

# The types that messages are made of now.
TYPES = (*get_args(Event), *get_args(Action), RequestFacts, Outcome, Chunk, DecodeRow, PoolSize)
# Name of a type then -> now.
RENAMED_TYPES: dict[str, str] = {}
# (name of the type then, field then) -> field now, or None: it has none.
RENAMED_FIELDS: dict[tuple[str, str], str | None] = {}
# (name of the type now, field now) -> what an event, a pool or a configuration has there that had no such field then.
NEW_FIELDS: dict[tuple[str, str], object] = {
    ("EngineConfig", "handoff_factor"): 2,
    ("EngineConfig", "age_seconds"): 0.0,
}
# (name of the type now, field now): fields of actions that are no decisions and have nothing to compare with.
NOT_COMPARED: frozenset[tuple[str, str]] = frozenset()
# Names of types of events now that there were none of then, and likewise of actions.
NEW_EVENTS = frozenset({"RequestFailed", "ServiceChanged", "SetRoles", "Tick"})
NEW_ACTIONS = frozenset({"RolesSettled"})
# Fields, by their names then, that hold the id of a request; bytes, as hexadecimal.
ID_FIELDS = frozenset({"id", "fork_of", "request_id"})
BYTES_FIELDS = frozenset({"block_hash", "block_hashes"})


def id_now(name, ids):
    """What a request is called now that had this name; `ids`: a dict of the run's own, to keep what was given."""
    return ids.setdefault(name, len(ids))


class RanksOfThen(FirstComeFirstServed):
    """Meshes were ranked for prompts by tokens to compute alone, for decoding by free pages; requests that ran there
    counted for nothing."""

    def prefill_rank(self, request, mesh):
        cached = mesh.pages.hit(request.hashes, request.to_prefill)
        return mesh.index == request.lost_on, mesh.prefill_load - cached, -mesh.pages.slots.num_free

    def decode_rank(self, request, mesh):
        return mesh.index == request.lost_on, -mesh.pages.room


class QueueOfThen(WaitingRequests):
    """A pass looked at those only that stood among the first `most` of all when it began."""

    def __init__(self, most, page_size):
        super().__init__(page_size)
        self._most, self._all, self._last = most, sorted_requests(), None

    def add(self, request):
        super().add(request)
        self._all.add(request)

    def remove(self, request):
        super().remove(request)
        self._all.remove(request)

    def begin(self):
        self._last = self._all[self._most - 1].order if len(self._all) > self._most else None

    def first(self, is_under_way):
        request = super().first(is_under_way)
        return None if request is None or (self._last is not None and request.order > self._last) else request


class AdmissionOfThen(Admission):
    """Its queue is that of then."""

    def __init__(self, shared, *others):
        super().__init__(shared, *others)
        self._waiting = QueueOfThen(2 * shared.config.max_num_seqs, shared.config.page_size)

    def admit(self, now):
        self._waiting.begin()
        super().admit(now)


class InheritanceOfThen(PriorityInheritance):
    """Nobody ran at another's urgency."""

    def lend(self, how, block, order):
        pass


class MeshOfThen(MeshState):
    """A mesh was backed up when what waited filled over half of it; what was to wait soon did not count."""

    @property
    def is_backed_up(self):
        waiting = [r.placement for r in self.placed if r.state is State.HANDOFF and r.placement is not None]
        tables = zip(*(placement.tables for placement in waiting if placement.mesh == self.index), strict=True)
        pages = [len(set().union(*(table.pages for table in group))) for group in tables]
        return any(2 * count > group.num_pages for count, group in zip(pages, self.pages.groups, strict=False))


def make_scheduler(config, pools):
    with (
        patch("twinmesh.engine.scheduler.scheduler.Admission", AdmissionOfThen),
        patch("twinmesh.engine.scheduler.handoffs.PriorityInheritance", InheritanceOfThen),
        patch("twinmesh.engine.scheduler.mesh_state.MeshState", MeshOfThen),
    ):
        return Scheduler(config, pools, RanksOfThen())


# ---- reading


class Translation:
    """From a run's plain values, with the names of then, to plain values with the names of now."""

    def __init__(self):
        self._ids = {}

    def translate(self, value, field=None):
        if value is None:
            return None
        if field in ID_FIELDS:
            return id_now(value, self._ids)
        if isinstance(value, list):
            return [self.translate(item, field) for item in value]
        if not isinstance(value, dict):
            return value
        then = value["type"]
        result = {"type": RENAMED_TYPES.get(then, then)}
        for name, item in value.items():
            if name != "type" and (now := RENAMED_FIELDS.get((then, name), name)) is not None:
                result[now] = self.translate(item, name)
        return result


BYTES_FIELDS_NOW = BYTES_FIELDS | {now for (_, then), now in RENAMED_FIELDS.items() if then in BYTES_FIELDS}
BY_NAME = {kind.__name__: kind for kind in TYPES}


def build(value, field=None):
    """An object of now from its plain form."""
    if isinstance(value, list):
        return tuple(build(item, field) for item in value)
    if isinstance(value, dict):
        kind = BY_NAME[value["type"]]
        values = {name: build(item, name) for name, item in value.items() if name != "type"}
        return kind(**new_fields(kind.__name__) | values)
    return bytes.fromhex(value) if field in BYTES_FIELDS_NOW and value is not None else value


def new_fields(kind):
    return {field: value for (name, field), value in NEW_FIELDS.items() if name == kind}


def decided(actions):
    """What was decided now, in plain form and without what is not compared."""
    return [compared(action) for action in map(plain, actions) if action["type"] not in NEW_ACTIONS]


def compared(value):
    if isinstance(value, list):
        return [compared(item) for item in value]
    if isinstance(value, dict):
        kind = value["type"]
        return {name: compared(item) for name, item in value.items() if (kind, name) not in NOT_COMPARED}
    return value


# ---- comparing


def read(path):
    return json.loads(lzma.decompress(path.read_bytes()))


def start(run):
    """A scheduler for a run, and its translation."""
    translation = Translation()
    config = translation.translate(run["config"])
    config["topology"] = Topology.parse(run["config"]["topology"])
    pools = [build(translation.translate(pool)) for pool in run["pools"]]
    values = {name: build(value) for name, value in config.items() if name != "type"}
    return make_scheduler(EngineConfig(**new_fields("EngineConfig") | values), pools), translation


def check(run):
    """Raise AssertionError at the first action that differs."""
    scheduler, translation = start(run)
    count = 0
    for turn in run["turns"]:
        for event in turn["events"]:
            scheduler.on(build(translation.translate(event)))
            count += 1
        expected = compared(translation.translate(turn["actions"]))
        found = decided(scheduler.actions())
        if expected != found:
            last = json.dumps(turn["events"][-1] if turn["events"] else None)
            raise AssertionError(f"run {run['name']}, after event {count} ({last}): {difference(expected, found)}")


def difference(expected, found):
    """The first action that differs."""
    index = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
    index = min(len(expected), len(found)) if index is None else index
    was, now = (json.dumps(actions[index]) if index < len(actions) else "none" for actions in (expected, found))
    return f"action {index} of {len(expected)}\n  expected {was}\n  found    {now}"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name.removesuffix(".json.xz"))
def test_a_recorded_run_is_decided_the_same(path):
    check(read(path))


def test_the_runs_hold_every_event_and_every_action():
    seen = {
        RENAMED_TYPES.get(message["type"], message["type"])
        for path in RUNS
        for turn in read(path)["turns"]
        for message in (*turn["events"], *turn["actions"])
    }
    assert len(RUNS) == 20
    assert seen == {kind.__name__ for kind in (*get_args(Event), *get_args(Action))} - NEW_ACTIONS - NEW_EVENTS


def test_every_field_of_an_action_is_compared():
    for path in RUNS:
        for turn in read(path)["turns"]:
            for message in messages(Translation().translate(turn["actions"])):
                left_out = {name for kind, name in NOT_COMPARED if kind == message["type"]}
                assert message.keys() - {"type"} | left_out == set(field_names(BY_NAME[message["type"]]))


def messages(value):
    """Every message in a plain value, with those that it holds."""
    if isinstance(value, list):
        for item in value:
            yield from messages(item)
    elif isinstance(value, dict):
        yield value
        yield from messages(list(value.values()))


def test_another_decision_is_found_and_shown():
    run = read(RUNS[0])
    turn = next(turn for turn in run["turns"] if any(action["type"] == "Decode" for action in turn["actions"]))
    decode = next(action for action in turn["actions"] if action["type"] == "Decode")
    decode["bucket"] += 1
    with pytest.raises(AssertionError, match=r"(?s)run both, after event \d+ .*action \d+ of.*expected.*found.*bucket"):
        check(run)


def test_a_decision_that_is_missing_is_found():
    run = read(RUNS[0])
    next(turn for turn in run["turns"] if turn["actions"])["actions"].pop()
    with pytest.raises(AssertionError, match="expected none"):
        check(run)
