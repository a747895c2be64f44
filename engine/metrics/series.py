"""How an engine's state went over a run: samples in columns, of a real run and of a simulated one alike.

A sample is taken when the scheduler has decided something and some time has passed since the last one. In between
nothing is known; in a simulation decode steps that are taken in many at once have no samples among them. When there
are `MOST`, every other one is dropped and they are taken half as often from then on, so a run of any length has at
most so many. Counts and seconds that only grow are given as they were, so that any two samples give a rate.
"""

import msgspec
from msgspec.structs import replace

MOST = 2048


class MeshSeries(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One mesh: a value for each sample."""

    busy: list[float]  # seconds in which it has computed since the run began
    kv_used: list[float]  # 0 to 1: pages that requests hold over all pages, of its fullest cache group
    placed: list[int]  # requests that have a place there


class Series(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run."""

    t: list[float]  # seconds on the run's clock; in a report from the first arrival
    waiting: list[int]  # requests without a place
    oldest: list[float]  # seconds since the arrival of the one that came first of them; 0: none waits
    running: list[int]  # requests that have not ended, those that wait among them
    prompt_tokens: list[int]  # of prompts that have begun
    cached_tokens: list[int]  # those of them that the prefix cache spared
    missed_tokens: dict[str, list[int]]  # those that it did not, by reason
    meshes: list[MeshSeries]
    roles: list[tuple[float, tuple[str, ...]]]  # of all meshes, from when on

    def since(self, start: float) -> "Series":
        """Return the same with times that count from `start`."""
        roles = [(t - start, roles) for t, roles in self.roles]
        return replace(self, t=[t - start for t in self.t], roles=roles)
