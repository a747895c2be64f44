"""Messages survive bytes, hold plain data only, and whatever is no message is refused in one sentence."""

import collections.abc
import types
import typing
from contextlib import suppress

import msgspec
import numpy as np
import pytest
from helpers.messages import messages, plain
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.protocol.actions import Accept, Action, AssignPages, Command, Decode, DecodeRow
from twinmesh.engine.protocol.events import Event
from twinmesh.engine.protocol.results import Completion, MeshLost, StepFailed, StepResult, TokenScores
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.protocol.wire import (
    VERSION,
    WireError,
    decode_command,
    decode_completion,
    decode_from_worker,
    decode_to_worker,
    encode,
    pack_array,
    read_command,
    read_completion,
)
from twinmesh.engine.protocol.worker import FromWorker, Posted, ToWorker, Turn

COMMANDS, COMPLETIONS = typing.get_args(Command), typing.get_args(Completion)
TO_WORKER, FROM_WORKER = typing.get_args(ToWorker), typing.get_args(FromWorker)
DECODE = Decode(0, 7, 8, 1, (DecodeRow(3, 4, 0, 17), DecodeRow(5, 6, 1, 9, True)))
PROMPT = np.arange(5, dtype=np.int32)
ACCEPT = Accept(3, PROMPT, SamplingPlan(0.5, 9, logit_bias={4: 1.5}, stop_ids=frozenset({1, 2})), PROMPT[:0])
SCORES = TokenScores(*(np.ones((1, 2), np.float32),) * 4)
RESULT = StepResult(1.5, 0, 7, DECODE.rows, np.array([[8, 9]], np.int32), SCORES, {0: SCORES})


@pytest.mark.parametrize(
    ("kind", "decode"),
    [(kind, decode_command) for kind in COMMANDS]
    + [(kind, decode_completion) for kind in COMPLETIONS]
    + [(kind, decode_to_worker) for kind in TO_WORKER]
    + [(kind, decode_from_worker) for kind in FROM_WORKER],
)
def test_every_message_survives_bytes(kind, decode):
    @given(messages(kind))
    def check(message):
        assert plain(decode(encode(message))) == plain(message)

    check()


def test_a_turn_and_its_answer_take_less_than_200_bytes_a_decode_row():
    rows = tuple(DecodeRow(2**31 + index, 2**31 + index, index, 131_072 + index) for index in range(64))
    grown = tuple(AssignPages(3, row.slot, 0, 2048, (2**20 + row.slot,)) for row in rows)
    turn = Turn(7, (*grown, Decode(3, 2**31, 64, 1, rows)))
    answer = Posted(7, 1e6 / 3, (StepResult(1e6 / 7, 3, 2**31, rows, np.full((1, 64), 2**17, np.int32)),))
    assert (len(encode(turn)) + len(encode(answer))) / len(rows) < 200


@given(st.sampled_from([Turn(3, (DECODE, ACCEPT)), Posted(3, 1.0, (RESULT,))]), st.data())
def test_damaged_batches_never_raise_anything_else(message, data):
    damaged = bytearray(encode(message))
    for index in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[index] = data.draw(st.integers(0, 255))
    for decode in (decode_to_worker, decode_from_worker):
        with suppress(WireError):
            decode(bytes(damaged))


def test_messages_are_equal_by_content_and_cannot_be_changed():
    again = decode_command(encode(DECODE))
    assert again == DECODE
    assert repr(again) == repr(DECODE)
    with pytest.raises(AttributeError, match="immutable"):
        again.step = 8
    with pytest.raises(ValueError, match="read-only"):
        decode_command(encode(ACCEPT)).prompt[0] = 1


# ---- the types


def reachable(kind, seen):
    """All types that values of this one are made of."""
    if kind in seen:
        return seen
    seen[kind] = None
    parts = typing.get_args(kind) if typing.get_origin(kind) in CONTAINERS else ()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        parts = [typing.get_type_hints(kind)[name] for name in kind.__struct_fields__]
    elif typing.get_origin(kind) is typing.Literal:
        parts = map(type, parts)
    for part in parts:
        if part is not ...:
            reachable(part, seen)
    return seen


PLAIN = {int, float, bool, str, bytes, type(None), np.ndarray}
CONTAINERS = {tuple, frozenset, dict, typing.Literal, typing.Union, types.UnionType, TokenScores}


def unfit(kind):
    """The types reachable from this one that may not be in a message."""
    return [
        part
        for part in reachable(kind, {})
        if part not in PLAIN
        and typing.get_origin(part) not in CONTAINERS
        and not (isinstance(part, type) and issubclass(part, msgspec.Struct) and part.__struct_config__.frozen)
    ]


@pytest.mark.parametrize(
    "union",
    [Command, Completion, Event, Action, ToWorker, FromWorker],
    ids=["command", "completion", "event", "action", "to a worker", "from a worker"],
)
def test_messages_are_made_of_plain_data(union):
    assert unfit(union) == []
    assert len(reachable(union, {})) > len(typing.get_args(union))


@pytest.mark.parametrize("kind", [collections.abc.Callable[[int], int], typing.Any, object, list[int], msgspec.Struct])
def test_types_that_may_not_be_in_a_message_are_found(kind):
    inner = msgspec.defstruct("Inner", [("field", tuple[kind, ...])], frozen=True)
    assert unfit(msgspec.defstruct("Outer", [("inner", inner)], frozen=True))


# ---- what is no message


@pytest.mark.parametrize("message", [DECODE, ACCEPT, RESULT, StepFailed(1.0, 2, 3, "it broke")])
def test_a_message_that_is_cut_short_is_refused_wherever_it_is_cut(message):
    decode = decode_command if isinstance(message, Command) else decode_completion
    data = encode(message)
    for length in range(len(data)):
        with pytest.raises(WireError, match=r"^the message is .*cut short .*\.$"):
            decode(data[:length])
    assert plain(decode(data)) == plain(message)


@pytest.mark.parametrize("version", [0, VERSION + 1, 255])
def test_another_version_is_refused_by_its_number(version):
    with pytest.raises(WireError, match=rf"is of version {version}, and this Twinmesh reads version {VERSION}: run"):
        decode_command(bytes((version,)) + encode(DECODE)[1:])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (encode(DECODE).replace(b"Decode", b"Dencod", 1), "is of unknown type 'Dencod'"),
        (encode(ACCEPT), "is of unknown type 'Accept'"),
        (encode(RESULT) + b"\0", "is damaged"),
        (encode(RESULT).replace(b"\xa4step", b"\xa4stop"), "the StepResult is not as it should be"),
        (encode(RESULT).replace(b"<i4", b"<i8"), "the StepResult is not as it should be"),
        (encode(RESULT).replace(b"\x92\x01\x02", b"\x92\x01\x03"), "the StepResult is not as it should be"),
        (encode(RESULT).replace(b"DecodeRow", b"DecodeRaw"), "the StepResult is not as it should be"),
        (bytes((VERSION, 7)), "has no type"),
        (bytes((VERSION,)) + b"\x91" * 100_000, "has no type"),
    ],
)
def test_a_message_that_cannot_be_read_is_refused_in_one_sentence(data, says):
    with pytest.raises(WireError, match=says) as caught:
        decode_completion(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.sampled_from([ACCEPT, DECODE, RESULT]), st.data())
def test_damaged_bytes_never_raise_anything_else(message, data):
    damaged = bytearray(encode(message))
    for index in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[index] = data.draw(st.integers(0, 255))
    for decode in (decode_command, decode_completion):
        try:
            decode(bytes(damaged))
        except WireError as error:
            said = str(error)
        else:
            said = ""
        assert "\n" not in said


def test_what_cannot_be_read_is_the_failure_of_its_mesh():
    assert read_command(encode(DECODE), 1, 2.0) == DECODE
    assert plain(read_completion(encode(RESULT), 0, 2.0)) == plain(RESULT)
    for read in (read_command, read_completion):
        lost = read(b"\x09", 1, 2.0)
        assert (type(lost), lost.mesh, lost.t) == (MeshLost, 1, 2.0)
        assert "of version 9" in lost.reason


@pytest.mark.parametrize("array", [np.ones(2), np.array(["a"]), np.array([1], object)])
def test_only_arrays_of_a_known_dtype_are_sent(array):
    with pytest.raises(TypeError, match="does not go into messages"):
        encode(Accept(1, array, ACCEPT.plan, PROMPT))


@pytest.mark.parametrize(
    "tokens",
    [np.zeros((1, 3), np.int32), np.zeros(2, np.int32), np.zeros((1, 2), np.float32)],
    ids=["rows", "flat", "float"],
)
def test_tokens_that_are_not_those_of_the_rows_are_the_meshs_fault(tokens):
    rows = (DecodeRow(0, 0, 0, 5), DecodeRow(1, 0, 1, 5))
    good = StepResult(1.0, 0, 3, rows, np.zeros((1, 2), np.int32))
    damaged = encode(good).replace(encode_part(good.tokens), encode_part(tokens))
    assert isinstance(read_completion(damaged, 0, 2.0), MeshLost)


def encode_part(array):
    """An array as it stands within a message."""
    return msgspec.msgpack.encode(pack_array(array))


def test_a_completion_of_another_mesh_is_the_senders_fault():
    lost = read_completion(encode(RESULT), 1, 2.0)
    assert isinstance(lost, MeshLost)
    assert lost.mesh == 1
