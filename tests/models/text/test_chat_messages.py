"""What callers give becomes JSON's own types, whatever types of theirs it is made of."""

import enum

import numpy as np
import pytest
from twinmesh.models.text.chat_messages import plain, read_messages


class Role(str, enum.Enum):  # noqa: UP042 (as libraries define theirs)
    USER = "user"


class Shouting(str):
    __slots__ = ()

    def __str__(self):
        return self.upper()


class Strict(enum.StrEnum):
    USER = "user"


class Count(enum.IntEnum):
    TWO = 2


class Loud(int):
    def __int__(self):
        return 99

    def __str__(self):
        return "many"


class Share(float, enum.Enum):
    HALF = 0.5


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (Role.USER, "user"),
        (Strict.USER, "user"),
        (Shouting("hi"), "hi"),
        (np.str_("hi"), "hi"),
        (Count.TWO, 2),
        (Loud(3), 3),
        (Share.HALF, 0.5),
        (np.float64(0.25), 0.25),
        ({Role.USER: [Role.USER]}, {"user": ["user"]}),
    ],
)
def test_values_of_derived_types_are_what_they_hold(given, wanted):
    made = plain(given, "here")
    assert made == wanted
    assert type(made) is type(wanted)


def test_a_role_may_be_of_an_enum():
    (message,) = read_messages([{"role": Role.USER, "content": "hi"}])
    assert message == {"role": "user", "content": "hi"}
    assert type(message["role"]) is str
