"""Reads a checkpoint's own settings, GGUF metadata or a Hugging Face config.json, one checked value at a time.

A setting that changes what the model computes and is not implemented has to be refused by name: `refuse`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import CheckpointError

_MOST_SHOWN = 80  # characters of a value in a message
_BOUND = 2**63  # JSON's integers have no bound, but they are multiplied by floats and used as array lengths


class Settings:
    """Settings by key; a value is checked when it is read.

    Args:
        values: by full key.
        prefix: precedes every key in `values` and in messages ("llama." in GGUF metadata).
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values, self._prefix = values, prefix

    def __contains__(self, key: str) -> bool:
        """Return whether the key has a value other than null."""
        return self.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys, as `get` takes them."""
        return (key.removeprefix(self._prefix) for key in self._values if key.startswith(self._prefix))

    def without(self, key: str) -> "Settings":
        """Return the settings but for one key."""
        return Settings(
            {name: value for name, value in self._values.items() if name != self._prefix + key}, self._prefix
        )

    def including(self, key: str, value: Any) -> "Settings":
        """Return these settings with one more, or with another value of one."""
        return Settings({**self._values, self._prefix + key: value}, self._prefix)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value unchecked; `default` where the key is absent, not where it is null."""
        return self._values.get(self._prefix + key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number.

        Raises:
            CheckpointError: the key is absent and has no default, or its value is not one positive number.
        """
        found = self.get(key, default)
        if found is None and (found := default) is None:
            raise CheckpointError(f"The settings have no {self._prefix + key!r}, which the architecture needs.")
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < _BOUND:
            raise self.refusal(key, "one positive number is expected")
        return found

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; raises as `number` does."""
        found = self.number(key, default)
        if not isinstance(found, int):
            raise self.refusal(key, "an integer is expected")
        return found

    def same_integer(self, key: str, layers: int, default: int | None = None) -> int:
        """Return a positive integer that the file gives once, or once for each of `layers` layers, always the same.

        Raises:
            CheckpointError: as `integer` does, or layers that differ.
        """
        found = self.get(key)
        if not isinstance(found, list):
            return self.integer(key, default)
        if len(found) != layers or found.count(found[0]) != layers:
            raise self.refusal(key, f"one number, or the same {layers} times, is expected")
        return Settings({self._prefix + key: found[0]}, self._prefix).integer(key)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean.

        Raises:
            CheckpointError: a value of another kind.
        """
        found = self.get(key, default)
        if not isinstance(found, bool):
            raise self.refusal(key, "true or false is expected")
        return found

    def section(self, key: str) -> "Settings | None":
        """Return the settings under a key whose value is an object; None where it is absent or null.

        Raises:
            CheckpointError: a value of another kind.
        """
        found = self.get(key)
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise self.refusal(key, "an object is expected")
        return Settings(
            {f"{self._prefix}{key}.{name}": value for name, value in found.items()}, f"{self._prefix}{key}."
        )

    def refuse(self, key: str, *unused: Any) -> None:
        """Refuse any value of `key` but null and those that mean "not used".

        Raises:
            CheckpointError: names the key and its value.
        """
        found = self.get(key)
        if found is not None and found not in unused:
            raise self.refusal(key)

    def refusal(self, key: str, expected: str = "") -> CheckpointError:
        """Make the error for a value that is not implemented; the caller raises it."""
        shown = repr(self.get(key))[:_MOST_SHOWN]
        return CheckpointError(f"{self._prefix}{key} = {shown} is not implemented{expected and f': {expected}'}.")
