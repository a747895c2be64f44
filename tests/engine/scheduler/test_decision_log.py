"""The decision log: every value survives it, a replay decides alike, and a damaged log is refused in one sentence."""

import io
import json
import subprocess
import sys
from random import Random
from typing import get_args

import pytest
from helpers.messages import messages
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.protocol.actions import Action, Decode, DecodeRow
from twinmesh.engine.protocol.events import (
    AbortRequested,
    Arrived,
    Event,
    Hold,
    MeshFailed,
    MigrateRequested,
    PreemptRequested,
    RequestFacts,
    Resume,
    TransferFailed,
)
from twinmesh.engine.protocol.stamps import Stamp
from twinmesh.engine.scheduler.cost import Priors
from twinmesh.engine.scheduler.decision_log import DecisionLog, RecordingScheduler, read_line
from twinmesh.engine.scheduler.line_fit import Terms
from twinmesh.engine.scheduler.notes import Note
from twinmesh.engine.scheduler.policy import POLICIES
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.simulation.logs.replay import DivergedError, replay
from twinmesh.engine.topology import Topology
from twinmesh.scripts.cli import main

from . import test_scheduler

MODES = [
    ("prefill=1,decode=1", {}),
    ("prefill=2,decode=2", {"windows": (None, 6)}),
    ("both=2", {"decode_steps": 3}),
    ("both(mode=fused)=1", {"windows": (3,)}),
    ("prefill=1,decode=2", {"deterministic": True, "prefill_buckets": (8,)}),
]


@pytest.fixture
def record(monkeypatch):
    """A recorded engine's control plane on a fake device, and its log so far."""

    def make(*args, **options):
        file = io.StringIO()
        recording = lambda config, pools, policy: RecordingScheduler(config, pools, DecisionLog(file))  # noqa: E731
        monkeypatch.setattr(test_scheduler, "Scheduler", recording)
        return *test_scheduler.make(*args, **options), file

    return make


def happen(scheduler, device, kind, t, random):
    """One thing that may befall a running engine."""
    name = random.choice([*scheduler.requests, -1])
    busy = [mesh for mesh, steps in enumerate(device.steps) if steps]
    if kind == "arrive":
        length = random.randint(1, 20)
        session = random.choice([None, "s", "t"])
        test_scheduler.arrive(
            scheduler, device, t, length, random.randint(1, 9), t, random.choice("pq"), session=session
        )
    elif kind == "step" and busy:
        device.complete_step(random.choice(busy), t, stops=lambda request: random.random() < 0.05)
    elif kind == "transfer" and device.transfers:
        device.complete_transfer(random.randrange(len(device.transfers)), t)
    elif kind == "break" and device.transfers:
        scheduler.on(TransferFailed(t, device.transfers.pop(0), "it broke"))
    elif kind == "lose" and t % 4 == 0:
        device.lose(0)
        scheduler.on(MeshFailed(t, 0, "out of memory"))
    elif kind in ("abort", "preempt", "migrate"):
        made = {"abort": AbortRequested, "preempt": PreemptRequested, "migrate": MigrateRequested}[kind]
        scheduler.on(made(t, name))


def a_busy_run(scheduler, device, seed=0):
    """A bit of everything, to its end, in an order that follows from the seed."""
    random = Random(seed)
    kinds = ["arrive"] * 2 + ["step"] * 3 + ["transfer"] * 2
    kinds += ["break", "lose", "abort", "preempt", "migrate"]
    for t in range(120):
        happen(scheduler, device, random.choice(kinds), t, random)
        device.perform(scheduler.actions())
    scheduler.on(Hold(120.0))
    scheduler.on(Resume(121.0))
    device.drain(122.0)


def a_short_log(record):
    """The lines of a run of one request."""
    scheduler, device, file = record()
    test_scheduler.arrive(scheduler, device, 0)
    device.drain(1.0)
    return file.getvalue().splitlines(keepends=True)


def replay_lines(lines):
    return replay(io.StringIO("".join(lines)))


@pytest.mark.parametrize(("topology", "options"), MODES)
def test_a_replay_makes_the_decisions_of_the_run(record, topology, options):
    scheduler, device, file = record(topology, pages=12, **options)
    a_busy_run(scheduler, device)
    result = replay_lines([file.getvalue()])
    assert result.scheduler.counters == scheduler.counters  # reasons of misses included
    lines = [json.loads(line) for line in file.getvalue().splitlines()[1:]]
    assert result.finished == device.finished
    assert set(device.finished.values()) >= {"length", "abort"}
    events = {kind.__name__ for kind in get_args(Event)}
    assert result.events == sum(isinstance(line, dict) and line["type"] in events for line in lines)
    assert result.decisions == sum(len(line) for line in lines if isinstance(line, list))
    assert result.scheduler.config == scheduler.config
    assert result.scheduler.counters == scheduler.counters
    result.scheduler.check_integrity()


def test_a_replay_has_the_timelines_of_the_run(record):
    scheduler, device, file = record()
    request = test_scheduler.arrive(scheduler, device, 0, t=0.1)
    for t in (1 / 3, 2 / 3):
        device.perform(scheduler.actions())
        device.complete_step(0, t) if t < 0.5 else device.complete_transfer(0, t)
    device.drain(1.0)
    assert list(replay_lines([file.getvalue()]).ended.recent) == [request.timeline]


def test_requests_of_a_killed_run_are_running_at_the_end_of_its_replay(record):
    scheduler, device, file = record()
    test_scheduler.arrive(scheduler, device, 0)
    device.perform(scheduler.actions())
    result = replay_lines([file.getvalue()])
    assert result.finished == {}
    assert list(result.scheduler.requests) == [0]


def test_another_decision_diverges_where_it_was_made(record):
    lines = a_short_log(record)
    line = next(i for i, text in enumerate(lines) if '"type":"Prefill"' in text)
    lines[line] = lines[line].replace('"bucket":8', '"bucket":4')
    with pytest.raises(DivergedError, match=rf"line {line + 1}: actions\[1\].bucket was 4 .* is 8 now") as caught:
        replay_lines(lines)
    assert caught.value.line == line + 1
    assert [type(action) for action in caught.value.expected] == [type(action) for action in caught.value.actual]


def test_a_decision_more_or_less_diverges(record):
    lines = a_short_log(record)
    line = next(i for i, text in enumerate(lines) if text == "[]\n")
    with pytest.raises(DivergedError, match=rf"line {line + 1}: actions\[0\] was Finish\(.* is nothing now"):
        replay_lines([*lines[:line], '[{"type":"Finish","request_id":0,"reason":"stop","error":null}]\n'])
    with pytest.raises(DivergedError, match=r"line 3: actions\[0\] was nothing .* is AssignPages\("):
        replay_lines([*lines[:2], "[]\n"])


@pytest.mark.parametrize("cut", [1, 7, -1])
def test_a_torn_last_line_is_ignored(record, cut):
    lines = a_short_log(record)
    whole = replay_lines(lines[:4])
    torn = replay_lines([*lines[:4], lines[4][:cut] if cut > 0 else lines[4][: cut - 1]])
    assert (torn.events, torn.decisions) == (whole.events, whole.decisions)


@pytest.mark.parametrize(
    "damaged", ["{}", "{", "7", "\0\0\0", '{"t":1.0,"type":"Dance"}', '{"t":1.0,"type":"Hold","x":1}', "[7]", ""]
)
def test_a_log_damaged_in_the_middle_is_refused(record, damaged):
    lines = a_short_log(record)
    lines[3] = damaged + "\n"
    with pytest.raises(ValueError, match="damaged at line 4"):
        replay_lines(lines)


def test_a_file_that_is_no_log_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    for content in (b"", b"\xff\xfe\x00", b"[]\n", b'{"prompt": "a"}\n', b'{"format":"twinmesh decis'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.gguf is no decision log"):
            replay(path)


@pytest.mark.parametrize("version", [1, 2, 3, 4, 6])
def test_a_log_of_another_version_is_refused(record, version):
    lines = a_short_log(record)
    lines[0] = lines[0].replace('"version":5', f'"version":{version}')
    with pytest.raises(ValueError, match=f"of version {version}, and this Twinmesh reads version 5"):
        replay_lines(lines)


@pytest.mark.parametrize(
    "change",
    [('"page_size":4', '"page_size":0'), ('"config"', '"konfig"'), ('"pools":[', '"pools":[],"x":[')],
    ids=["bad value", "unknown name", "no pools"],
)
def test_a_header_that_no_engine_has_is_refused(record, change):
    lines = a_short_log(record)
    lines[0] = lines[0].replace(*change)
    with pytest.raises(ValueError, match="damaged at line 1"):
        replay_lines(lines)


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(Topology.parse("prefill=2xtp2,decode=1xtp4"), 512, windows=(None, 128), decode_steps=4),
        EngineConfig(Topology.parse("both(mode=fused)=2"), 64, prefix_cache=False),
        EngineConfig(
            Topology.parse("both=1"), 64, prefill_buckets=(64,), decode_buckets=(32,), deterministic=True, max_retries=0
        ),
    ],
    ids=["two groups", "fused", "deterministic"],
)
def test_the_header_brings_configuration_and_pools_back(config, tmp_path, monkeypatch):
    pools = [PoolSize((i + 1,) * len(config.windows), (1 << 40, 3)[: len(config.windows)], 7) for i in range(4)]
    pools = pools[: len(config.topology.meshes)]
    costs = Priors(prefill=Terms(0.5, 0.25))
    log = DecisionLog(tmp_path / "log")
    RecordingScheduler(config, pools, log, POLICIES["spf"](), costs)
    log.close()
    made = []

    def make(*args):
        made.append(args)
        return Scheduler(*args)

    monkeypatch.setattr("twinmesh.engine.simulation.logs.replay.Scheduler", make)
    replay(tmp_path / "log")
    ((read_config, read_pools, policy, read_costs),) = made
    assert (read_config, read_pools, policy.name, read_costs) == (config, tuple(pools), "spf", costs)


def written_by(write):
    """What a log holds, read back: the values of one line."""
    file = io.StringIO()
    write(DecisionLog(file))
    return read_line(file.getvalue())


@pytest.mark.parametrize("kind", get_args(Event))
def test_every_event_survives_the_log(kind):
    @given(messages(kind))
    def check(event):
        assert written_by(lambda log: log.event(event)) == event

    check()


@pytest.mark.parametrize("kind", get_args(Action))
def test_every_action_survives_the_log(kind):
    @given(st.lists(messages(kind), max_size=3))
    def check(actions):
        assert written_by(lambda log: log.actions(actions)) == actions

    check()


@pytest.mark.parametrize("kind", get_args(Note) or [Note])
def test_every_note_survives_the_log(kind):
    @given(messages(kind))
    def check(note):
        assert written_by(lambda log: log.notes([note])) == note

    check()


@pytest.mark.parametrize("kind", get_args(Stamp))
def test_every_stamp_survives_the_log_and_is_no_matter_to_a_replay(kind, record):
    lines = a_short_log(record)

    @given(messages(kind))
    def check(stamp):
        file = io.StringIO()
        DecisionLog(file).stamp(stamp)
        assert read_line(file.getvalue()) == stamp
        assert replay_lines([lines[0], file.getvalue(), *lines[1:]]).finished == {0: "length"}

    check()


def test_a_note_that_a_replay_does_not_make_diverges(record):
    scheduler, device, file = record("both=1")
    test_scheduler.arrive(scheduler, device, 0, max_tokens=9)
    device.drain(1.0)
    lines = file.getvalue().splitlines(keepends=True)
    line = next(i for i, text in enumerate(lines) if '"type":"Measured"' in text)
    note = json.loads(lines[line])
    changed = json.dumps(note | {"fixed": 77.0}) + "\n"
    with pytest.raises(DivergedError, match=rf"line {line + 1}: notes\[0\].fixed was 77.0 .* is {note['fixed']} now"):
        replay_lines([*lines[:line], changed, *lines[line + 1 :]])
    with pytest.raises(DivergedError, match=rf"line {line + 1}: notes\[0\] was nothing .* is Measured\("):
        replay_lines([*lines[:line], *lines[line + 1 :]])
    with pytest.raises(DivergedError, match=rf"line {line + 2}: notes\[0\] was Measured\(.* is nothing now"):
        replay_lines([*lines[: line + 1], *lines[line:]])


def test_the_log_says_what_each_mesh_would_have_cost_and_which_was_taken(record):
    scheduler, device, file = record("prefill=2,decode=2")
    test_scheduler.arrive(scheduler, device, 0)
    device.drain(1.0)
    notes = [json.loads(line) for line in file.getvalue().splitlines() if '"type":"Routed"' in line]
    assert [note["phase"] for note in notes] == ["prefill", "decode"]
    for note in notes:
        (_, first, _, terms), (_, second, _, others) = note["ranked"]
        assert note["mesh"] == first != second
        assert sum(terms.values()) <= sum(others.values())
    assert terms.keys() == {"link", "wait", "decode", "room"}


def test_no_note_is_made_where_no_log_is_written():
    scheduler, device = test_scheduler.make("both=1")
    test_scheduler.arrive(scheduler, device, 0, max_tokens=9)
    device.drain(1.0)
    assert scheduler.take_notes() == []


def test_rows_take_little_room():
    rows = tuple(DecodeRow(i, 0, i, 1000 + i) for i in range(64))
    file = io.StringIO()
    DecisionLog(file).actions([Decode(0, 1, 64, 1, rows)])
    assert len(file.getvalue()) < 64 * 40


def test_an_event_that_the_scheduler_cannot_bear_is_in_the_log(record):
    scheduler, _, file = record()
    with pytest.raises(IndexError):
        scheduler.on(MeshFailed(1.0, 9, "no such mesh"))
    with pytest.raises(IndexError):
        replay_lines([file.getvalue()])


def test_an_earlier_file_is_overwritten_and_each_line_is_there_at_once(tmp_path):
    path = tmp_path / "log"
    path.write_text("old\n" * 100)
    config = EngineConfig(Topology.parse("both=1"), 64)
    log = DecisionLog(path)
    scheduler = RecordingScheduler(config, [PoolSize((9,), (1,), 0)], log)
    scheduler.on(Arrived(0.0, RequestFacts(0, 4, 1)))
    scheduler.actions()
    assert replay(path).events == 1
    log.close()
    log.close()


def test_a_replay_needs_no_jax(record, tmp_path):
    path = tmp_path / "log"
    path.write_text("".join(a_short_log(record)))
    code = (
        "import sys; from twinmesh.engine.simulation.logs.replay import replay; from twinmesh.scripts.cli import main\n"
        f"assert replay({str(path)!r}).finished == {{0: 'length'}}\n"
        f"assert main(['replay', {str(path)!r}]) == 0\n"
        "assert not {'jax', 'flax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_prints_a_summary(record, tmp_path, capsys):
    path = tmp_path / "log"
    path.write_text("".join(a_short_log(record)))
    assert main(["replay", str(path)]) == 0
    out = capsys.readouterr().out
    assert "all the same." in out
    assert "1 request ended (1 length), 0 still running." in out
    assert "TTFT" in out


def test_the_command_fails_with_the_first_divergence(record, tmp_path, capsys):
    path = tmp_path / "log"
    path.write_text("".join([*a_short_log(record)[:2], "[]\n"]))
    assert main(["replay", str(path)]) == 1
    err = capsys.readouterr().err
    assert "diverges at line 3" in err
    assert err.count("\n") == 1


def test_the_command_refuses_what_is_no_log_or_not_there(tmp_path, capsys):
    (tmp_path / "log").write_text("hello\n")
    assert main(["replay", str(tmp_path / "log")]) == 2
    assert main(["replay", str(tmp_path / "none")]) == 1
    assert "no decision log" in capsys.readouterr().err


def test_recording_changes_no_decision(record):
    recording, device, _ = record("both=1")
    plain = Scheduler(recording.config, [PoolSize((16,), (1,), 8)])
    facts = RequestFacts(0, 6, 4)
    device.prompts[0] = ("a", 6)
    for scheduler in (recording, plain):
        scheduler.on(Arrived(0.0, facts))
    assert recording.actions() == plain.actions()
