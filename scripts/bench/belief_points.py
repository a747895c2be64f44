"""What `belief.py` runs: topologies, lengths and rates, and the arrivals of each point, the same for both engines.

A point is a topology, a mix of lengths, and a load as a share of what the slowest topology can do; where roles flip, it
has calls for roles besides. Arrivals are Poisson's from a seed that depends on mix and load alone, so that all
topologies get the same requests at the same times. Prompts share nothing.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from twinmesh.engine.simulation.workload import Workload, WorkRequest


@dataclass(frozen=True)
class Mix:
    """Lengths of prompts and answers, each drawn evenly between two bounds, both included."""

    name: str
    prompt: tuple[int, int]
    output: tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> "Mix":
        """Read NAME=LOW-HIGH/LOW-HIGH, prompt before answer.

        Raises:
            argparse.ArgumentTypeError: it is none.
        """
        found = re.fullmatch(r"([\w-]+)=(\d+)-(\d+)/(\d+)-(\d+)", text)
        bounds = [int(number) for number in found.groups()[1:]] if found else []
        if found is None or not (1 <= bounds[0] <= bounds[1] and 1 <= bounds[2] <= bounds[3]):
            raise argparse.ArgumentTypeError(f"{text!r} is no mix: give one such as chat=16-48/8-24")
        return cls(found[1], (bounds[0], bounds[1]), (bounds[2], bounds[3]))

    @property
    def longest(self) -> int:
        """Return the most tokens of a request."""
        return self.prompt[1] + self.output[1]

    def lengths(self, count: int, random: np.random.Generator) -> list[tuple[int, int]]:
        """Draw the lengths of so many requests."""
        prompts = random.integers(*self.prompt, count, endpoint=True).tolist()
        outputs = random.integers(*self.output, count, endpoint=True).tolist()
        return list(zip(prompts, outputs, strict=True))


@dataclass(frozen=True)
class Engine:
    """An engine of its own: a topology, and for pools the roles that it begins with and is called to by turns."""

    topology: str
    roles: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Engine":
        """Read TOPOLOGY, or TOPOLOGY:ROLES:ROLES... for a pool whose roles change."""
        topology, *roles = text.split(":")
        return cls(topology, tuple(roles))

    @property
    def name(self) -> str:
        """Return the text that it is read from."""
        return ":".join((self.topology, *self.roles))


@dataclass(frozen=True)
class Point:
    """One load of one engine."""

    engine: Engine
    mix: Mix
    load: float  # share of the requests per second that the slowest topology sustains

    @property
    def name(self) -> str:
        """Return what it is called in reports and compared by."""
        return f"{self.engine.name} {self.mix.name} {self.load:g}"


def points(engines: Sequence[Engine], mixes: Sequence[Mix], loads: Sequence[float]) -> list[Point]:
    """List all points, those of an engine together."""
    return [Point(engine, mix, load) for engine in engines for mix in mixes for load in loads]


def at_once(mix: Mix, count: int, seed: int) -> Workload:
    """Make requests that are all there at the start."""
    random = np.random.default_rng(seed)
    return Workload(mix.name, [WorkRequest(*lengths, 0.0) for lengths in mix.lengths(count, random)])


def arrivals(mix: Mix, rate: float, count: int, seed: int) -> Workload:
    """Make requests that come at random, `rate` a second in the mean."""
    random = np.random.default_rng(seed)
    times = np.cumsum(random.exponential(1 / rate, count)).tolist()
    lengths = mix.lengths(count, random)
    name = f"{mix.name} at {rate:.3g}/s"
    return Workload(name, [WorkRequest(*pair, at) for pair, at in zip(lengths, times, strict=True)])


def flips(engine: Engine, seconds: float) -> list[tuple[float, str]]:
    """Return when an engine is called to which roles, in a load of so many seconds: evenly, none at start and end."""
    later = engine.roles[1:]
    return [(seconds * (index + 1) / (len(later) + 1), roles) for index, roles in enumerate(later)]
