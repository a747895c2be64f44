"""The forms in which callers hold prompts: arrays of any library, series, generators; one prompt, or many.

It finds out which is which and makes lists and numpy arrays of them. What is in them is for `prompts.py` to check.
No library is imported for it: arrays are known by their methods.
"""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

REFUSAL = "A prompt must be text or a list of token ids."
# Of numpy's dtypes, those whose elements are any objects or texts.
_NOT_NUMBERS = "OUST"


def split_prompts(prompts: object) -> list[Any]:
    """Return one prompt or many as a list.

    One is a text, a dict, and whole numbers in one dimension. Many are anything else that has an order: lists, tuples,
    generators and series of prompts, and arrays of two dimensions, a row each.

    Raises:
        ValueError: it has no order, or is none of these.
    """
    if isinstance(prompts, str | bytes | bytearray | Mapping):
        return [prompts]
    plain = as_plain(prompts)
    if isinstance(plain, np.ndarray):
        return [plain] if plain.ndim == 1 else list(plain)
    return [plain] if len(plain) and _is_number(plain[0]) else list(plain)


def as_plain(values: object) -> Sequence[Any] | np.ndarray:
    """Return what has an order as a numpy array of numbers, or as a sequence.

    Raises:
        ValueError: it has none.
    """
    if isinstance(values, list | tuple):
        # One look: what is behind the first number is checked by `prompts.py`, for thousands of ids at once.
        is_scalars = bool(values) and not isinstance(values[0], Integral) and _is_number(values[0])
        return [_item(value) for value in values] if is_scalars else values
    if isinstance(values, str | bytes | bytearray | Mapping | set | frozenset):
        raise ValueError(REFUSAL)
    if hasattr(values, "__array__"):
        return _from_array(values)
    if isinstance(values, Iterable):
        return as_plain(list(values))
    raise ValueError(REFUSAL)


def _from_array(values: Any) -> Sequence[Any] | np.ndarray:
    if isinstance(values, np.ma.MaskedArray):
        return list(values.tolist())  # with None for what is masked
    try:
        array = np.asarray(values)
    except (TypeError, RuntimeError):  # torch, of what is on a GPU
        if not hasattr(values, "tolist"):  # as JAX's random keys
            raise ValueError(REFUSAL) from None
        array = np.array(values.tolist())
    if array.ndim == 0:
        raise ValueError(REFUSAL)
    if array.dtype.kind in _NOT_NUMBERS:
        return as_plain(array.tolist())
    return array


def _is_number(value: object) -> bool:
    """Whether it is an element of a prompt: a number, or an array without dimensions, as an array is made of."""
    return isinstance(value, Integral) or getattr(value, "ndim", None) == 0


def _item(value: Any) -> Any:
    try:
        return value.item() if getattr(value, "ndim", None) == 0 else value
    except NotImplementedError:  # as JAX's random keys
        raise ValueError(REFUSAL) from None
