"""Contents for messages, made by hypothesis from the types of their fields."""

import types
import typing

import msgspec
import numpy as np
from hypothesis import strategies as st
from twinmesh.engine.protocol.results import HostScores, StepResult, TokenScores
from twinmesh.engine.protocol.service import SLO

WHOLE = st.integers(-(2**63), 2**63 - 1)  # JSON and MessagePack go as far
FINITE = st.floats(allow_nan=False, allow_infinity=False)  # what a clock gives, and all that JSON has
ARRAYS = st.builds(
    lambda values, kind, is_flat: np.array(values, kind).reshape(-1 if is_flat else (len(values), 1)),
    st.lists(st.integers(-(2**20), 2**20), max_size=5), st.sampled_from(["int32", "float32"]), st.booleans(),
)  # fmt: skip
POSITIVE = st.floats(1e-3, 1e6)
PLAIN = {int: WHOLE, float: FINITE, bool: st.booleans(), str: st.text(), bytes: st.binary(), type(None): st.none()}


def messages(kind):
    """Draw any value of a class of the protocol."""
    hints = typing.get_type_hints(kind)
    names = [name for name in kind.__struct_fields__ if hints[name] != tuple[kind, ...]]
    fields = {name: values_of(hints[name]) for name in names}
    if len(names) < len(kind.__struct_fields__):  # an offer, which may have offers as parts, and these have none
        inner = st.lists(st.builds(kind, **fields), max_size=3).map(tuple)
        fields |= {name: inner for name in kind.__struct_fields__ if name not in names}
    if kind is not StepResult:
        return st.builds(kind, **fields)

    def with_tokens(rows):
        return st.builds(kind, **fields | {"rows": st.just(rows), "tokens": tokens_of(rows)})

    return fields["rows"].flatmap(with_tokens)


def tokens_of(rows):
    """Draw the tokens of a step with these rows, [k, rows] int32."""
    steps = st.lists(st.lists(st.integers(-(2**20), 2**20), min_size=len(rows), max_size=len(rows)), max_size=3)
    return steps.map(lambda values: np.array(values, np.int32).reshape(len(values), len(rows)))


def values_of(kind):
    """Draw any value of the type of a field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind]
    if kind is np.ndarray:
        return ARRAYS
    if kind is SLO:
        return st.builds(SLO, ttft_ms=POSITIVE, tpot_ms=st.none() | POSITIVE)
    if kind == HostScores:
        return st.builds(TokenScores, *[ARRAYS] * 4)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(map(values_of, args))
    if origin is tuple and args[-1:] == (...,):
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, args))
    if origin is frozenset:
        return st.frozensets(values_of(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(*map(values_of, args), max_size=3)
    assert issubclass(kind, msgspec.Struct), kind
    return messages(kind)


def plain(value):
    """Convert a message to what can be compared: arrays become their dtype, shape and values."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tolist()
    if isinstance(value, msgspec.Struct):
        return type(value), [plain(getattr(value, name)) for name in value.__struct_fields__]
    if isinstance(value, tuple):
        return type(value), [plain(part) for part in value]
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return value
