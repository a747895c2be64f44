"""Batch runs with a deadline: they say once that they will miss it, and go on, as batch work or as interactive work."""

import json
import math
import threading

import pytest
from helpers.batch_files import BatchFiles, prompts
from helpers.fake_llm import FakeLLM
from twinmesh.engine.batch.lateness import EVERY


@pytest.fixture
def files(tmp_path):
    return BatchFiles(tmp_path)


class Timed(FakeLLM):
    """An engine whose clock the test moves: `pace` seconds a result, and `stuck` seconds in which none comes."""

    def __init__(self, pace=0.0, stuck=0.0):
        super().__init__()
        self.now, self.pace, self.stuck = 0.0, pace, stuck

    def clock(self):
        return self.now

    def output(self, index, ids, n=1):
        self.now += self.pace
        return super().output(index, ids, n)

    def waits(self, run):
        self.run = run
        if self.now >= self.stuck:
            return False
        self.now += run.every
        return True


def test_a_run_that_will_be_late_says_so_once_and_goes_on(files, capsys):
    llm = Timed(pace=10.0)
    result = files.run(prompts(20), llm, deadline=100.0)
    said = capsys.readouterr().err
    assert said.count("batch: ") == 1
    assert "after its deadline, by what was left over lately; it goes on." in said
    assert result.succeeded == 20
    assert (result.promoted, result.late) == (0, 100.0)
    assert result.predicted_late == pytest.approx(100.0, rel=0.5)
    assert llm.deadlines == [100.0]


def test_a_run_that_will_be_in_time_says_nothing(files, capsys):
    result = files.run(prompts(20), Timed(pace=1.0), deadline=100.0)
    assert not capsys.readouterr().err
    assert (result.predicted_late, result.late) == (None, 0.0)


def test_a_run_that_gets_nothing_says_so_while_nothing_comes(files, capsys):
    llm = Timed(stuck=50.0)
    result = files.run(prompts(5), llm, deadline=100.0)
    assert "left nothing over lately, so this run will miss its deadline; it goes on." in capsys.readouterr().err
    assert math.isinf(result.predicted_late)
    assert result.late == 0.0
    assert llm.run.every == EVERY


def test_a_late_run_that_may_be_promoted_is_and_is_counted(files, capsys):
    llm = Timed(stuck=50.0)
    result = files.run(prompts(5), llm, deadline=100.0, on_late="promote", window=2)
    assert "its lines run as interactive requests from here on." in capsys.readouterr().err
    assert result.promoted == 2
    assert result.summary(devices=1)["promoted"] == 2


def test_without_a_deadline_nobody_waits_to_look(files):
    llm = Timed(pace=1000.0)
    result = files.run(prompts(3), llm)
    assert llm.deadlines == [None]
    assert (result.predicted_late, result.late) == (None, 0.0)


def test_lines_of_earlier_starts_are_no_part_of_what_remains(files, capsys):
    lines = prompts(20)
    llm = FakeLLM(interrupt_after=18)
    with pytest.raises(KeyboardInterrupt):
        files.run(lines, llm)
    result = files.run(None, Timed(pace=10.0), deadline=100.0)
    assert (result.resumed, result.succeeded) == (18, 20)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("deadline", [0, -1, math.nan, math.inf, True, "60", -0.5])
def test_a_deadline_that_is_no_number_above_0_is_refused_before_anything_is_done(files, deadline):
    files.write(prompts(2))
    with pytest.raises(ValueError, match=r"^deadline=.* is not usable: it must be a number of seconds from now on"):
        files.run(None, deadline=deadline)
    assert not files.target.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline": 5.0, "on_late": "stop"}, r"^on_late='stop' is unknown: it is 'say' or 'promote'\."),
        ({"deadline": 5.0, "on_late": None}, r"^on_late=None is unknown"),
        ({"on_late": "promote"}, r"^on_late='promote' needs a deadline"),
    ],
)
def test_an_on_late_that_cannot_be_is_refused(files, options, message):
    files.write(prompts(2))
    with pytest.raises(ValueError, match=message):
        files.run(None, **options)
    assert not files.target.exists()


def test_several_files_run_at_once_from_several_threads(tmp_path):
    llm, results = FakeLLM(), {}
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()

    def run(folder):
        results[folder.name] = BatchFiles(folder).run(prompts(7), llm, deadline=60.0)

    threads = [threading.Thread(target=run, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {name: result.succeeded for name, result in results.items()} == {"a": 7, "b": 7, "c": 7}
    for folder in folders:
        assert len({json.loads(line)["custom_id"] for line in BatchFiles(folder).target.open()}) == 7
