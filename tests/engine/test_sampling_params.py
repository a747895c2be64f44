"""Sampling parameters are refused when they are made, with the field, the value and the range."""

import math

import pytest
from twinmesh import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", True),
        ("temperature", 10**400),
        ("temperature", 1.1e6),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", 2**31),
        ("max_tokens", 0),
        ("max_tokens", "3"),
        ("seed", -1),
        ("seed", 2**32),
        ("stop_token_ids", 5),
        ("stop_token_ids", "ab"),
        ("stop_token_ids", [1, -1]),
        ("stop_token_ids", [None]),
    ],
)
def test_values_out_of_range_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}=.* is not usable: it must be .*\\.$"):
        SamplingParams(**{field: value})


def test_whole_numbers_do_for_real_ones_and_lists_for_tuples():
    params = SamplingParams(temperature=0, top_p=1, stop_token_ids=[1, 2])
    assert params.stop_token_ids == (1, 2)
    assert hash(params) == hash(SamplingParams(temperature=0, top_p=1, stop_token_ids=(1, 2)))
