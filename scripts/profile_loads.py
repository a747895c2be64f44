"""The loads that a profile is measured under: requests with made-up tokens that bring every program into its range.

Each load is run by itself on chosen meshes, and what the engine does in it is seen by an observer. The loads of a grid
are for the fit; those of another, with lengths and rows between, are points that the fit is held against. Most bring
one program to one size; some serve requests of many lengths as an engine in use does, with prompts between decode
steps, batches that change, meshes that fall idle, and threads that wait for answers: there steps take longer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from twinmesh.engine.config import EngineConfig
from twinmesh.engine.scheduler.mesh_state import MeshState
from twinmesh.engine.scheduler.policy import FirstComeFirstServed
from twinmesh.engine.scheduler.request import Request
from twinmesh.engine.topology import Role

_MESHES = 1024  # more than there are


@dataclass(frozen=True)
class Place:
    """The meshes that a request is to go to."""

    prefill: int
    decode: int

    @property
    def priority(self) -> int:
        """Return the number by which `OnMesh` knows it."""
        return self.prefill * _MESHES + self.decode


class OnMesh(FirstComeFirstServed):
    """Requests go where their priority says, which here means nothing else."""

    name = "profile"

    def key(self, request: Request) -> float:
        """Order requests by arrival."""
        return request.accepted

    def prefill_rank(self, request: Request, mesh: MeshState) -> tuple[float, ...]:
        """Prefer the mesh that the request names."""
        return mesh.index != request.facts.service.priority // _MESHES, mesh.index

    def decode_rank(self, request: Request, mesh: MeshState) -> tuple[float, ...]:
        """Prefer the mesh that the request names."""
        return mesh.index != request.facts.service.priority % _MESHES, mesh.index


@dataclass(frozen=True)
class Load:
    """Requests that come at once."""

    name: str
    prompts: tuple[int, ...]  # their lengths
    tokens: int  # that each generates
    place: Place
    is_fitted: bool  # it is for the fit; if not, the fit is held against it
    behind: "Load | None" = None  # what decodes beside it, from before its start to its end


@dataclass(frozen=True)
class Served:
    """A request: tokens of its prompt and its answer, and where it goes."""

    prompt: int
    tokens: int
    place: Place


@dataclass(frozen=True)
class Serving:
    """Requests that come as others end, so that there are always as many (closed loop)."""

    name: str
    requests: tuple[Served, ...]
    concurrency: int
    is_fitted: bool

    @property
    def prompts(self) -> tuple[int, ...]:
        """Return the lengths of the prompts."""
        return tuple(request.prompt for request in self.requests)


def places(config: EngineConfig) -> list[Place]:
    """List where a request may be prefilled and decoded: all pairs that begin with another mesh."""
    roles = [config.starting_role(mesh) for mesh in range(len(config.topology.meshes))]
    decode = [mesh for mesh, role in enumerate(roles) if role.decodes]
    return [
        Place(mesh, mesh if role is Role.BOTH else decode[mesh % len(decode)])
        for mesh, role in enumerate(roles)
        if role.prefills
    ]


class Grid:
    """The loads for one engine."""

    def __init__(self, config: EngineConfig, room: int, *, is_quick: bool) -> None:
        """Plan nothing yet; `room` is how many tokens of KV a mesh has."""
        self._config, self._quick = config, is_quick
        self._places = places(config)
        # No more prompt tokens at a time than some chunks of them, so that a grid takes minutes.
        self._most = min(room, (2 if is_quick else 16) * config.chunk_size)
        self._answer = 6 if is_quick else 24

    def loads(self) -> Iterator[Load | Serving]:
        """List all loads, in the order in which they are to run."""
        for is_fitted in (True, False):
            for load in (*self._prompts(is_fitted), *self._answers(is_fitted), *self._beside(is_fitted)):
                if self._has_room(load) and (load.behind is None or self._has_room(load.behind)):
                    yield load
            yield from self._serving(is_fitted)

    def _has_room(self, load: Load) -> bool:
        longest = max(load.prompts) + load.tokens
        return load.tokens > 0 and longest <= self._config.max_model_len and sum(load.prompts) <= self._most

    # ---- alone

    def _prompts(self, is_fitted: bool) -> Iterator[Load]:
        """Prompts one by one, full and nearly empty steps, those that others have begun, and several in a step."""
        buckets, chunk = self._config.prefill_buckets, self._config.chunk_size
        before = (0, *buckets[:-1])
        repeats = 2 if is_fitted and not self._quick else 1
        for low, bucket in zip(before, buckets, strict=True):
            lengths = (bucket, low + 1) if is_fitted else ((low + bucket + 1) // 2,)
            for length in lengths:
                for _ in range(repeats):
                    yield self._load("prompt", [length], 1, is_fitted)
        for start, sizes in ((1, buckets), (5, buckets[-1:])) if is_fitted else ((2, buckets[-1:]),):
            for bucket in sizes:
                rest = bucket if is_fitted else max(1, 3 * bucket // 4)
                yield self._load("long prompt", [start * chunk + rest], 1, is_fitted)
        for count in (2, 4, 8) if is_fitted else (3, 6):
            yield self._load("prompts", [max(1, chunk // count)] * 2 * count, 1, is_fitted)

    def _answers(self, is_fitted: bool) -> Iterator[Load]:
        """Rows that decode, few and many, short and long."""
        chunk = self._config.chunk_size
        for bucket, fewer in zip(self._config.decode_buckets, (0, *self._config.decode_buckets), strict=False):
            most = min(bucket, self._config.max_num_seqs)
            counts = {most, fewer + 1} if is_fitted else {(most + fewer + 1) // 2}
            for rows in sorted(counts):
                for context in (chunk // 8, chunk, 4 * chunk) if is_fitted else (chunk // 4, 2 * chunk):
                    yield self._load("answers", [max(1, context)] * rows, self._answer, is_fitted)

    # ---- beside others

    def _beside(self, is_fitted: bool) -> Iterator[Load]:
        """Prompts and answers while other meshes, or in fused steps this one, decode."""
        chunk, answer = self._config.chunk_size, self._answer
        lengths = [*self._config.prefill_buckets] if is_fitted else [max(1, 3 * chunk // 4)]
        for behind in self._behind(is_fitted):
            for place in self._places:
                if place.prefill == behind.place.decode and not self._config.topology.meshes[place.prefill].fused:
                    continue
                name = f"prompts beside {len(behind.prompts)} rows"
                yield Load(name, tuple(lengths * 2), 1, place, is_fitted, behind)
                if place.decode != behind.place.decode:
                    yield Load(
                        f"answers beside {len(behind.prompts)} rows",
                        (max(1, chunk // 8),) * len(behind.prompts), answer, place, is_fitted, behind,
                    )  # fmt: skip
        if len(self._places) > 1:  # prompts beside prompts
            for place in self._places[1:]:
                chunks = (4 if is_fitted else 2) // (2 if self._quick else 1)
                behind = self._load("prompts", [chunks * chunk], 1, is_fitted)
                yield Load("prompts beside prompts", behind.prompts, 1, place, is_fitted, behind)

    def _behind(self, is_fitted: bool) -> Iterator[Load]:
        buckets, most = self._config.decode_buckets, self._config.max_num_seqs
        chunk = self._config.chunk_size
        counts = {min(bucket, most) for bucket in buckets} if is_fitted else {max(1, most // 2)}
        for rows in sorted(counts):
            for context in (max(1, chunk // 8), chunk) if is_fitted else (max(1, chunk // 4),):
                endless = self._config.max_model_len - context
                yield self._load("behind", [context] * rows, endless, is_fitted)

    # ---- as in use

    def _serving(self, is_fitted: bool) -> Iterator[Serving]:
        """Requests of many lengths, few and many at a time on every mesh."""
        most, places = self._config.max_num_seqs, self._places
        longest = min(3 * self._config.chunk_size, self._config.max_model_len - self._answer, self._most // most)
        if longest < 1:
            return
        for each in sorted({1, max(1, most // 4), most} if is_fitted else {max(1, most // 2)}):
            random, count = Random(each), (2 if self._quick else 4) * (each + 2) * len(places)
            requests = [
                Served(random.randint(1, longest), random.randint(1, self._answer), places[n % len(places)])
                for n in range(count)
            ]
            yield Serving(f"served {each} at a time", tuple(requests), each * len(places), is_fitted)

    def _load(self, name: str, prompts: Sequence[int], tokens: int, is_fitted: bool) -> Load:
        return Load(name, tuple(prompts), tokens, self._places[0], is_fitted)
