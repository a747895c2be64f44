"""The tokens of conversations that have gone on before are kept within bounds."""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
from twinmesh.engine.core import conversations
from twinmesh.engine.core.conversations import Conversations


def running(session, tokens, length=None):
    """A request of a conversation that has ended with so many tokens; `length`: that it is taken to have."""
    service = SimpleNamespace(session=session)
    return SimpleNamespace(
        submission=SimpleNamespace(facts=SimpleNamespace(service=service)),
        request=SimpleNamespace(is_remembered=True),
        tokens=np.zeros(tokens, np.int32),
        length=tokens if length is None else length,
    )


def kept(conversation):
    return list(conversation._tokens)  # noqa: SLF001 (there is no other sign of what is kept)


def test_those_used_least_recently_are_forgotten_beyond_either_bound():
    some = Conversations(4, most_tokens=10)
    for name in "abc":
        some.end(running(name, 4))
    assert kept(some) == ["b", "c"]
    with patch.object(conversations, "MOST_SESSIONS", 3):
        for name in "defg":
            some.end(running(name, 1))
    assert kept(some) == ["e", "f", "g"]


def test_tokens_that_nobody_has_take_no_room():
    """As in a simulation, whose requests have lengths alone."""
    some = Conversations(4, most_tokens=10)
    for name in "ab":
        some.end(running(name, 0, length=8))
    assert kept(some) == ["a", "b"]
