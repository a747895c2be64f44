"""What callers may say of how requests are to be served, and what they are told of values that cannot be used."""

import math

import pytest
from twinmesh import SLO
from twinmesh.engine.api.service_options import service_of, services_of
from twinmesh.engine.protocol.service import Service


def test_nothing_said_is_the_default():
    assert service_of({}) == Service()


def test_what_is_said_is_taken():
    said = dict(priority=-3, deadline=2.5, first_token_deadline=1, session="s", slo=SLO(ttft_ms=200))
    assert service_of(said) == Service(**said)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 2**31, -(2**31) - 1])
def test_a_priority_is_a_whole_number_of_32_bits(value):
    with pytest.raises(ValueError, match=r"priority=.* whole number from"):
        service_of({"priority": value})


@pytest.mark.parametrize("name", ["deadline", "first_token_deadline"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, -math.inf, "1", True, 10**400])
def test_a_deadline_is_a_time_to_come(name, value):
    with pytest.raises(ValueError, match=rf"{name}=.* above 0"):
        service_of({name: value})


@pytest.mark.parametrize("value", ["", 7, b"s", "\ud800"])
def test_a_session_is_a_text(value):
    with pytest.raises(ValueError, match=r"session=.* text"):
        service_of({"session": value})


def test_an_slo_is_an_slo():
    with pytest.raises(ValueError, match=r"slo=.* must be an SLO"):
        service_of({"slo": {"ttft_ms": 100}})


@pytest.mark.parametrize("times", [{}, {"ttft_ms": 0}, {"tpot_ms": math.nan}, {"ttft_ms": True}, {"tpot_ms": "5"}])
def test_an_slo_has_times(times):
    with pytest.raises(ValueError, match=r"SLO|ms="):
        SLO(**times)


def test_one_value_is_for_all_and_a_list_for_each():
    assert services_of({"priority": [1, 2], "session": "s"}, 2) == [
        Service(priority=1, session="s"), Service(priority=2, session="s"),
    ]  # fmt: skip
    assert services_of({}, 2) == [Service()] * 2


def test_a_list_of_another_length_is_refused():
    with pytest.raises(ValueError, match="There are 3 prompts and 2 values of priority"):
        services_of({"priority": [1, 2]}, 3)
