"""Messages as bytes and back: a version, then MessagePack, in which a message is a map with its class name as `type`.

Host arrays travel as dtype, shape and raw little-endian bytes. What arrives is checked against the message's fields, so
that nothing but a well-formed message comes out; everything else is a `WireError`, a sentence about what was wrong.
`read_command` and `read_completion` make of it the failure of one mesh, for executors whose other half is elsewhere.
Workers and their driver send many at once, in messages of their own (`worker.py`).
"""

import math
from typing import Any

import msgspec
import numpy as np

from .actions import Command
from .results import Completion, MeshLost
from .worker import FromWorker, ToWorker

VERSION = 1
_DTYPES = frozenset({"<i4", "<f4"})


class WireError(ValueError):
    """Bytes that are no message."""


class _Array(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def pack_array(value: Any) -> _Array:
    """Convert a host array to plain data, for an encoder's `enc_hook`; raise TypeError for any other value."""
    if not isinstance(value, np.ndarray) or value.dtype.str not in _DTYPES:
        raise TypeError(f"{type(value).__name__} does not go into messages.")
    return _Array(value.dtype.str, value.shape, value.tobytes())


def unpack_array(kind: type, value: object) -> Any:
    """Rebuild the host array, read-only, from what `pack_array` made of it, for a decoder's `dec_hook`."""
    if kind is not np.ndarray:
        raise TypeError(f"{kind.__name__} does not come out of messages.")
    array = msgspec.convert(value, _Array)
    if array.dtype not in _DTYPES or min(array.shape, default=0) < 0:
        raise ValueError(f"an array of dtype {array.dtype[:20]!r} and shape {array.shape}")
    if len(array.data) != 4 * math.prod(array.shape):
        raise ValueError(f"{len(array.data)} bytes for an array of shape {array.shape}")
    return np.frombuffer(array.data, array.dtype).reshape(array.shape)


class _Kind(msgspec.Struct):
    type: str


_KINDS = msgspec.msgpack.Decoder(_Kind)
_ENCODER = msgspec.msgpack.Encoder(enc_hook=pack_array)
_COMMANDS: Any = msgspec.msgpack.Decoder(Command, dec_hook=unpack_array)
_COMPLETIONS: Any = msgspec.msgpack.Decoder(Completion, dec_hook=unpack_array)
_TO_WORKER: Any = msgspec.msgpack.Decoder(ToWorker, dec_hook=unpack_array)
_FROM_WORKER: Any = msgspec.msgpack.Decoder(FromWorker, dec_hook=unpack_array)


def encode(message: Command | Completion | ToWorker | FromWorker) -> bytes:
    """Encode the message as bytes."""
    return bytes((VERSION,)) + _ENCODER.encode(message)


def decode_command(data: bytes) -> Command:
    """Decode the command in `data`.

    Raises:
        WireError: `data` is of another version or an unknown type, cut short or otherwise damaged.
    """
    command: Command = _decode(_COMMANDS, data)
    return command


def decode_completion(data: bytes) -> Completion:
    """Decode the completion in `data`; raises as `decode_command` does."""
    completion: Completion = _decode(_COMPLETIONS, data)
    return completion


def decode_to_worker(data: bytes) -> ToWorker:
    """Decode what a driver sent to a worker, with all that is in it; raises as `decode_command` does."""
    message: ToWorker = _decode(_TO_WORKER, data)
    return message


def decode_from_worker(data: bytes) -> FromWorker:
    """Decode what a worker sent to its driver, with all that is in it; raises as `decode_command` does."""
    message: FromWorker = _decode(_FROM_WORKER, data)
    return message


def kind_of(data: bytes) -> str | None:
    """Return the type of a message, and read nothing else of it; None: it is not readable."""
    try:
        return _KINDS.decode(memoryview(data)[1:]).type if data[:1] == bytes((VERSION,)) else None
    except (ValueError, RecursionError):
        return None


def read_command(data: bytes, mesh: int, t: float) -> Command | MeshLost:
    """Decode the command in `data`, sent to `mesh`; return that mesh's failure at time `t` if it is unreadable."""
    try:
        return decode_command(data)
    except WireError as error:
        return MeshLost(t, mesh, f"mesh {mesh} could not read what it was sent: {error}")


def read_completion(data: bytes, mesh: int, t: float) -> Completion:
    """Decode the completion in `data`, sent by `mesh`; return that mesh's failure at time `t` if it is unreadable."""
    try:
        completion = decode_completion(data)
        if getattr(completion, "mesh", mesh) != mesh:
            raise WireError(f"it speaks for mesh {completion.mesh}.")  # type: ignore[union-attr]
        return completion
    except WireError as error:
        return MeshLost(t, mesh, f"what mesh {mesh} sent could not be read: {error}")


def _decode(decoder: Any, data: bytes) -> Any:
    if not data:
        raise WireError("the message is empty, cut short before its version.")
    if data[0] != VERSION:
        raise WireError(
            f"the message is of version {data[0]}, and this Twinmesh reads version {VERSION}: run the same Twinmesh on "
            "both sides."
        )
    try:
        return decoder.decode(memoryview(data)[1:])
    except msgspec.ValidationError as error:
        raise WireError(_what_is_wrong(data, error)) from None
    except (ValueError, RecursionError) as error:  # of text that is not UTF-8, and of depth without end
        how = "cut short" if "truncated" in str(error) else "damaged"
        raise WireError(f"the message is {how} after {len(data)} bytes.") from None


def _what_is_wrong(data: bytes, error: Exception) -> str:
    """Say in a sentence why bytes that are MessagePack are no message."""
    try:
        content = msgspec.msgpack.decode(memoryview(data)[1:])
    except (ValueError, TypeError, RecursionError):
        content = None
    kind = content.get("type") if isinstance(content, dict) else None
    if not isinstance(kind, str):
        return "the message has no type: it is damaged, or of another program."
    if "$.type" in str(error):
        return f"the message is of unknown type {kind[:40]!r}: run the same Twinmesh on both sides."
    details = ascii(str(error))[1:-1][:160]  # which may quote what came
    return f"the {ascii(kind)[1:-1][:40]} is not as it should be ({details}): it is damaged, or of another Twinmesh."
