"""How a walk is counted: made-up functions entered, and pages in made-up values."""

import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import twinmesh
from twinmesh.scripts import walk
from twinmesh.scripts.walk import CALLER, DISPATCHING, OTHERS, Entry, Holding

CORE, SCHEDULER, QUEUE = "engine/core/loop.py", "engine/scheduler/scheduler.py", "engine/scheduler/queue.py"


def entries(*steps, thread=DISPATCHING):
    return [Entry(thread, source, target) for source, target in steps]


def test_a_change_is_where_the_next_function_lies_in_another_file():
    found = walk.count(entries((None, CORE), (CORE, SCHEDULER), (SCHEDULER, SCHEDULER), (CORE, CORE), (CORE, QUEUE)))
    assert found["files"] == [CORE, SCHEDULER, QUEUE]
    assert found["changes"] == 3
    assert found["entries"] == {CORE: 2, SCHEDULER: 1, QUEUE: 1}


def test_a_call_is_counted_where_it_comes_from_another_file_though_that_was_not_entered_last():
    found = walk.count(entries((None, CORE), (CORE, SCHEDULER), (CORE, SCHEDULER), (SCHEDULER, SCHEDULER)))
    assert found["changes"] == 1
    assert found["calls"] == 2
    assert found["called"] == {SCHEDULER: 2}


def test_threads_are_counted_each_by_itself_however_they_took_turns():
    one = entries((None, CORE), (CORE, SCHEDULER), (CORE, CORE))
    other = entries((None, QUEUE), (QUEUE, CORE), thread=CALLER)
    mixed = walk.count([one[0], other[0], one[1], other[1], one[2]])
    assert mixed == walk.count(one + other)
    assert mixed["changes"] == 3
    assert mixed["files"] == [QUEUE, CORE, SCHEDULER]
    assert {name: found["changes"] for name, found in mixed["threads"].items()} == {CALLER: 1, DISPATCHING: 2}
    assert OTHERS not in mixed["threads"]


def test_the_protocol_is_counted_apart():
    steps = entries((None, CORE), (CORE, SCHEDULER))
    apart = Entry(DISPATCHING, SCHEDULER, "engine/protocol/actions.py", is_protocol=True)
    found = walk.count([steps[0], apart, steps[1], apart])
    assert found["protocol"] == {"engine/protocol/actions.py": 2}
    assert found | {"protocol": {}, "threads": {}} == walk.count(steps) | {"threads": {}}


def test_rooms_are_entered_from_other_rooms():
    found = walk.count(entries((None, CORE), (CORE, SCHEDULER), (SCHEDULER, QUEUE), (CORE, QUEUE)))["rooms"]
    assert found == {"changes": 1, "entries": {"core": 1, "scheduler": 1}, "calls": 2, "called": {"scheduler": 2}}


@pytest.mark.parametrize(
    ("file", "room"),
    [
        ("engine/scheduler/queue.py", "scheduler"),
        ("engine/config.py", "config"),
        ("engine/departures.py", "scheduler"),  # of efd1214, and the next as well
        ("engine/mesh_cache.py", "paging"),
        ("models/text/chat.py", "models"),
    ],
)
def test_a_file_has_the_room_that_its_folder_is_or_that_it_became(file, room):
    assert walk.room_of(file) == room


def test_some_functions_of_a_file_may_be_the_protocols():
    assert walk.is_protocol("engine/protocol/events.py", "anything")
    assert walk.is_protocol("engine/request.py", "Timeline.ttft")
    assert not walk.is_protocol("engine/request.py", "Request.move_to")
    assert not walk.is_protocol("engine/scheduler/scheduler.py", "Timeline.ttft")


def test_a_page_is_followed_where_it_is_in_hand_and_no_other():
    holdings = [
        Holding(("pages.py", "cache.py"), frozenset({3, 4})),
        Holding(("cache.py",), frozenset({3})),
        Holding(("elsewhere.py",), frozenset({5})),
        Holding(("core.py",), frozenset({7})),
    ]
    found = walk.follow(holdings, frozenset({3, 7}))
    assert found == ["pages.py", "cache.py", "core.py"]
    assert walk.count_places(found)["changes"] == 2


def of_the_package(kind):
    """As if the package defined it."""
    kind.__module__ = "twinmesh.engine.made_up"
    return kind


@of_the_package
class Table:
    def __init__(self, pages):
        self.first, self.pages = 9, pages


@of_the_package
class Placement:
    def __init__(self, *tables):
        self.slot, self.tables = 8, list(tables)


@of_the_package
class Assign(NamedTuple):
    slot: int
    pages: tuple[int, ...]


@pytest.mark.parametrize(
    ("value", "name", "pages"),
    [
        (Assign(1, (2, 3)), "action", {2, 3}),
        ([Assign(1, (2, 3)), Assign(1, (4,))], "actions", {2, 3, 4}),
        (((2, 3), (4,)), "source_pages", {2, 3, 4}),
        (5, "page", {5}),
        (5, "page_size", set()),
        (True, "page", set()),
        ([5, 6], "tokens", set()),
        (Placement(Table([1]), Table([2])), "placement", {1, 2}),
        (types.SimpleNamespace(pages=[1]), "not_of_the_package", set()),
        (b"\x01", "pages", set()),
    ],
)
def test_pages_are_found_by_the_names_that_they_stand_under(value, name, pages):
    assert walk.pages_in(value, name) == pages


def test_pages_further_away_than_two_attributes_are_not_in_hand():
    @of_the_package
    class Request:
        def __init__(self):
            self.placement = Placement(Table([1]))

    assert walk.pages_in(Request(), "request") == set()


def test_a_recording_has_the_calls_of_the_package_and_no_others(tmp_path):
    (tmp_path / "one.py").write_text("def call(f):\n    return f()\n")
    (tmp_path / "two.py").write_text("def numbers():\n    yield 1\n\ndef add():\n    return sum(numbers())\n")
    one, two = (load(tmp_path / name) for name in ("one.py", "two.py"))
    found = walk.record(str(tmp_path), lambda: one["call"](lambda: two["add"]())).entries
    assert [entry[1:3] for entry in found] == [
        (None, "one.py"), ("one.py", "two.py"), ("two.py", "two.py"), ("two.py", "two.py"),
    ]  # fmt: skip
    assert {entry.thread for entry in found} == {CALLER}


def load(path):
    names = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return names


def test_a_folder_that_is_no_checkout_is_refused_in_one_sentence(tmp_path):
    script = Path(twinmesh.__file__).parent / "scripts" / "walk.py"
    done = subprocess.run([sys.executable, script, "--package", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"walk: {tmp_path} has no folder engine: give the root of a checkout of Twinmesh.\n"
