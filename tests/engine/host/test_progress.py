"""The line that says how far something has come, on a terminal and elsewhere."""

import io
import itertools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.host.progress import ELSEWHERE, ON_TERMINAL, Progress, amount, duration, say


class Screen(io.StringIO):
    """A stream that notes when it is written to."""

    def __init__(self, clock, *, is_terminal=True):
        super().__init__()
        self.clock, self.is_terminal, self.times = clock, is_terminal, []

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        self.times.append(self.clock.now)
        return super().write(text)

    @property
    def lines(self):
        """What a reader sees at last: of each line, what was written over the rest."""
        return [line.split("\r")[-1].rstrip() for line in self.getvalue().removesuffix("\n").split("\n")]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def start(clock, *args, is_terminal=True, **options):
    screen = Screen(clock, is_terminal=is_terminal)
    return Progress(*args, stream=screen, clock=clock, **options), screen


def test_a_terminal_shows_one_line_that_is_written_over(clock):
    line, screen = start(clock, "weights", 98_000_000, "B")
    with line:
        for _ in range(49):
            clock.now += 0.2
            line.advance(2_000_000)
    assert screen.lines == ["weights: 98 of 98 MB, 9.8 s"]
    assert "\rweights: 40 of 98 MB, 5.8 s left" in screen.getvalue()
    assert screen.getvalue().count("\n") == 1


def test_a_shorter_text_leaves_nothing_of_a_longer_one(clock):
    line, screen = start(clock, "x", None)
    with line:
        line.advance(1, "a long note")
        clock.now += 1
        line.advance(1, "b")
    first, second, last = screen.getvalue().removeprefix("\r").split("\r")
    assert len(second) >= len(first)
    assert last.rstrip() == "x: 2, b, 1.0 s"


@given(gaps=st.lists(st.floats(0, 2), max_size=60), is_terminal=st.booleans())
def test_updates_are_never_closer_than_they_may_be(gaps, is_terminal):
    clock = Clock()
    line, screen = start(clock, "x", 60, is_terminal=is_terminal)
    for gap in gaps:
        clock.now += gap
        line.advance(1)
    every = ON_TERMINAL if is_terminal else ELSEWHERE
    times = screen.times
    assert all(later - earlier >= every - 1e-9 for earlier, later in itertools.pairwise(times))


def test_elsewhere_nothing_is_written_but_a_line_every_ten_seconds(clock):
    line, screen = start(clock, "batch", 1000, "lines", is_terminal=False)
    with line:
        for _ in range(280):
            clock.now += 0.125
            line.advance(1, "7 tokens/s")
    assert [text.split(",")[0] for text in screen.getvalue().splitlines()] == [
        "batch: 80 of 1",
        "batch: 160 of 1",
        "batch: 240 of 1",
    ]
    assert "\r" not in screen.getvalue()
    assert screen.lines[0] == "batch: 80 of 1,000 lines, 7 tokens/s, 1:55 left"


def test_what_is_quick_writes_nothing_elsewhere(clock):
    line, screen = start(clock, "weights", 5, "B", is_terminal=False)
    with line:
        line.advance(5)
    assert screen.getvalue() == ""


def test_what_is_done_is_named_while_it_is(clock):
    line, screen = start(clock, "compiling", 3, "programs")
    with line:
        with line.doing("decode 32"):
            clock.now += 1
            with line.doing("prefill 512"):
                clock.now += 1
            assert screen.lines[-1].startswith("compiling: 1 of 3 programs, decode 32, 4.0 s left")
            assert "compiling: 0 of 3 programs, decode 32, prefill 512" in screen.getvalue()
        clock.now += 1
        with line.doing("score 8"):
            assert "compiling: 2 of 3 programs, score 8" in screen.getvalue()
    assert screen.lines == ["compiling: 3 of 3 programs, 3.0 s"]


def test_the_same_name_twice_at_once_stays_until_both_are_done(clock):
    line, screen = start(clock, "compiling", 2, "programs")
    with line, line.doing("a"):
        clock.now += 1
        with line.doing("a"):
            clock.now += 1
        assert screen.lines[-1].startswith("compiling: 1 of 2 programs, a,")


def test_what_was_there_before_says_nothing_of_how_long_the_rest_takes(clock):
    line, screen = start(clock, "batch", 100, "lines", done=80)
    with line:
        clock.now += 10
        line.advance(10)
        assert screen.lines == ["batch: 90 of 100 lines, 10.0 s left"]


def test_an_error_ends_the_line_where_it_was(clock):
    line, screen = start(clock, "weights", 10)

    def fail():
        with line:
            line.advance(4)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert screen.getvalue().endswith("\n")
    assert screen.lines == ["weights: 4 of 10, 0.0 s"]


def test_it_can_be_switched_off(clock):
    line, screen = start(clock, "weights", 10, shown=False)
    with line:
        line.advance(10)
        with line.doing("x"):
            pass
    assert screen.times == []


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_stream_that_cannot_be_written_to_stops_nothing(clock, is_closed):
    class Broken(Screen):
        def write(self, text):
            raise OSError(32, "Broken pipe")

    screen = Broken(clock)
    if is_closed:
        screen.close()
    with Progress("x", 3, stream=screen, clock=clock) as line:
        for _ in range(3):
            clock.now += 1
            line.advance(1)


def test_without_a_stderr_nothing_is_written(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with Progress("x", 1) as line:
        line.advance(1)
    say("nothing")


def test_a_line_is_no_longer_than_the_terminal(clock):
    line, screen = start(clock, "x", None)
    with line:
        line.advance(1, "y" * 500)
    assert max(len(part) for part in screen.getvalue().split("\r")) <= 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((7, 22, "programs"), "7 of 22 programs"),
        ((1200, None, "lines"), "1,200 lines"),
        ((45_400_000, 98_000_000, "B"), "45 of 98 MB"),
        ((1_000_000_000, 16_000_000_000, "B"), "1.00 of 16.00 GB"),
        ((3, 4, ""), "3 of 4"),
    ],
)
def test_amounts(arguments, said):
    assert amount(*arguments) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0.0 s"), (59.94, "59.9 s"), (60, "1:00"), (245, "4:05"), (3845, "1:04:05")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said
