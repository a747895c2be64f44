"""Record twenty seeded runs of the scheduler, its events and its decisions, as `fixtures/decisions/*.json.xz`.

The recordings are of commit efd1214, made there by

    python tests/record_decisions.py

with `twinmesh` being that checkout, and this file and `helpers/plain.py` copied into its tests; run again there, it
writes the same values. It imports that commit's modules and helpers, does not run here, and is kept to say how the
recordings came to be: `engine/scheduler/test_recorded_decisions.py` reads them and nothing else,
and they are not made anew when the scheduler changes, for then they would say nothing.

A run is an object of `name`, `seed`, `config` (the topology as text), `pools`, one per mesh, and `turns`: of each the
`events` that the scheduler heard and the `actions` that it gave out when it was asked next. Events and actions carry
the names of types and fields that they had at efd1214; bytes are hexadecimal. A device made of dicts
(`helpers/fake_device.py`) performs the actions and checks that every token sees the KV that it should.
"""

import json
import lzma
from collections import Counter
from pathlib import Path
from random import Random
from typing import get_args

from helpers.fake_device import FakeDevice, block_hashes
from helpers.plain import plain
from twinmesh.engine.config import EngineConfig, PoolSize, Topology
from twinmesh.engine.protocol import (
    AbortRequested,
    Action,
    Arrived,
    CopyPage,
    Decode,
    Event,
    Fused,
    Hold,
    MeshFailed,
    MigrateRequested,
    PreemptRequested,
    Prefill,
    Resume,
    Scatter,
    StartTransfer,
    TransferFailed,
)
from twinmesh.engine.request import FINAL, RequestFacts, State
from twinmesh.engine.scheduler import Scheduler

FOLDER = Path(__file__).parent / "fixtures" / "decisions"
# How often what befalls a run, unless the run says otherwise.
WEIGHTS = {
    "arrive": 6, "step": 24, "transfer": 9, "abort": 1, "preempt": 1, "migrate": 1, "break": 0.4, "lose": 0.2,
    "hold": 0.3,
}  # fmt: skip
# What is left to chance besides: the longest prompt and completion, how many texts prompts begin with, how often one
# shares its prompt with siblings, and an action fails as it is performed; the most requests at once; and events of a
# run before it is let run out.
CHANCES = {"prompt": 30, "completion": 14, "texts": 4, "siblings": 0.15, "fail": 0.001, "crowd": 14, "events": 260}
# name -> topology, options of the engine's configuration, options of the pools, weights, chances.
RUNS = {
    "both": ("both=1", {}, {}, {"migrate": 0}, {}),
    "both-several-decode-steps": ("both=1", {"decode_steps": 4}, {"pages": 24}, {"migrate": 0, "arrive": 3}, {}),
    "both-two-meshes": ("both=2", {}, {"pages": 15}, {"migrate": 4}, {}),
    "both-two-windows": ("both=2", {"windows": (None, 6)}, {"pages": 15}, {"migrate": 3}, {}),
    "both-deterministic": (
        "both=2", {"deterministic": True, "prefill_buckets": (8,)}, {"pages": 14}, {"preempt": 3, "migrate": 2}, {},
    ),
    "fused": ("both(mode=fused)=1", {}, {}, {"migrate": 0, "preempt": 2}, {}),
    "fused-one-window": ("both(mode=fused)=2", {"windows": (3,)}, {"spare": 0}, {"migrate": 3}, {"texts": 1}),
    "apart": ("prefill=1,decode=1", {}, {}, {}, {}),
    "apart-deterministic": (
        "prefill=1,decode=1", {"deterministic": True, "prefill_buckets": (8,)}, {"pages": 13}, {"preempt": 2}, {},
    ),
    "apart-no-prefix-cache": ("prefill=1,decode=1", {"prefix_cache": False}, {"pages": 14}, {}, {}),
    "apart-long-prompts": (
        "prefill=1,decode=1", {"max_model_len": 96}, {"pages": 40, "state": 3}, {"lose": 0.8},
        {"prompt": 84, "completion": 10, "events": 300},
    ),
    "apart-held": ("prefill=1,decode=1", {"decode_steps": 2}, {"pages": 16}, {"hold": 3}, {}),
    "two-and-two": ("prefill=2,decode=2", {}, {"pages": 14}, {"migrate": 3}, {"events": 320}),
    "two-and-two-windows": (
        "prefill=2,decode=2", {"windows": (None, 6, 12), "decode_steps": 2}, {"pages": 14, "spare": 2},
        {"migrate": 3}, {"events": 320},
    ),
    "two-and-two-pressure": (
        "prefill=2,decode=2", {"deterministic": True, "prefill_buckets": (12,), "max_num_seqs": 6}, {"pages": 12},
        {"arrive": 9, "migrate": 2}, {"completion": 18, "events": 320},
    ),
    "two-and-two-failures": (
        "prefill=2,decode=2", {"max_retries": 1}, {"pages": 16, "stagings": 3},
        {"break": 3, "lose": 1.5}, {"fail": 0.015, "events": 320},
    ),
    "one-and-three": ("prefill=1,decode=3", {}, {"pages": 12}, {"migrate": 5, "arrive": 9}, {"events": 360}),
    "one-and-three-decode-steps": (
        "prefill=1,decode=3", {"decode_steps": 3, "windows": (None, 6)}, {"pages": 40, "spare": 1},
        {"migrate": 3, "preempt": 2}, {"texts": 1, "prompt": 40, "siblings": 0.3},
    ),
    "tensor-parallel": (
        "prefill=2xtp2,decode=1xtp4", {"max_retries": 0}, {"pages": 18, "stagings": 2}, {"break": 1}, {},
    ),
    "shared-prompts": (
        "prefill=2,decode=2",
        {"page_size": 16, "max_model_len": 256, "max_num_seqs": 8, "prefill_buckets": (32, 64), "prefill_rows": 4},
        {"pages": 48, "stagings": 2, "state": 8}, {"arrive": 9},
        {"prompt": 200, "completion": 40, "texts": 3, "siblings": 0.5, "events": 400},
    ),
}  # fmt: skip


class Recorder(Scheduler):
    """A scheduler that notes what it hears and says. `turns`: what the file will hold."""

    def __init__(self, config, pools):
        super().__init__(config, pools)
        self.turns, self.heard, self.seen = [], [], Counter()

    def on(self, event):
        self.heard.append(plain(event))
        self._count(event)
        super().on(event)

    def actions(self):
        actions = super().actions()
        self.turns.append({"events": self.heard, "actions": plain(actions)})
        self.heard = []
        self.seen.update(type(action).__name__ for action in actions)
        return actions

    def _count(self, event):
        """The event, and for what callers ask the state that it meets."""
        name = type(event).__name__
        self.seen[name] += 1
        if (request := self.requests.get(getattr(event, "request_id", ""))) is not None:
            self.seen[name, request.state] += 1
        if isinstance(event, MigrateRequested):
            self.seen[name, "anywhere" if event.destination is None else "named"] += 1


class Run:
    """One run under way: the scheduler, its device, and what may befall them."""

    def __init__(self, name, seed):
        self.name, self.seed, self.random = name, seed, Random(seed)
        topology, options, pools, weights, chances = RUNS[name]
        self.weights, self.chances = WEIGHTS | weights, CHANCES | chances
        self.config = make_config(topology, options)
        self.pools = make_pools(self.config, **pools)
        self.scheduler = Recorder(self.config, self.pools)
        self.device = FakeDevice(self.scheduler, {})
        self.names, self.now, self.is_held = [], 0.0, False
        self.sources = {}  # transfer -> mesh

    def record(self):
        """The whole of it, to rest."""
        kinds, weights = zip(*self.weights.items(), strict=True)
        while sum(len(turn["events"]) for turn in self.scheduler.turns) < self.chances["events"]:
            kind = self.random.choices(kinds, weights)[0]
            if self.is_held and self.scheduler.is_drained and self.random.random() < 0.2:
                kind = "hold"  # or nothing more would happen for long
            getattr(self, f"_{kind}")()
            self._act()
        self.device.drain(self._tick())
        if self.is_held:
            self.scheduler.on(Resume(self._tick()))
            self.device.drain(self._tick())
        assert set(self.device.finished) == set(self.names), self.name
        assert not self.scheduler.requests
        return {
            "name": self.name, "seed": self.seed, "config": plain_config(self.config), "pools": plain(self.pools),
            "turns": self.scheduler.turns,
        }  # fmt: skip

    def _tick(self):
        """The time of an event; of one in ten a little before the last one's, as other threads' stamps may be."""
        self.now = round(self.now + self.random.expovariate(100), 4)
        return round(max(0, self.now - 0.01), 4) if self.random.random() < 0.1 else self.now

    def _act(self):
        """Perform what was decided, as `EngineCore` does."""
        if not self.scheduler.heard:
            return
        while actions := self.scheduler.actions():
            lost = set()
            for action in actions:
                self._perform(action, lost)
            self.scheduler.check_integrity()

    def _perform(self, action, lost):
        if not lost.isdisjoint(meshes_of(action)):
            if isinstance(action, Scatter):
                self.device.staged.pop(action.transfer)
            elif isinstance(action, StartTransfer):
                self.device.staged[action.transfer] = None
                self.scheduler.on(TransferFailed(self._tick(), action.transfer, "its mesh was lost."))
        elif meshes_of(action) and self.random.random() < self.chances["fail"]:
            self._fail(action, lost)
        else:
            if isinstance(action, StartTransfer):
                self.sources[action.transfer] = action.source
            self.device.perform([action])

    def _fail(self, action, lost):
        """The action raises: a transfer fails alone, others take their mesh along."""
        if isinstance(action, StartTransfer):
            self.device.staged[action.transfer] = None
            self.scheduler.on(TransferFailed(self._tick(), action.transfer, "no memory for staging"))
            return
        if isinstance(action, Scatter):
            self.device.staged.pop(action.transfer)
        lost |= meshes_of(action)
        self._lose_mesh(*meshes_of(action))

    # ---- what may befall a run

    def _arrive(self):
        if len(self.scheduler.requests) >= self.chances["crowd"]:
            return
        text, chances = self.random.choice("pqrstuv"[: self.chances["texts"]]), self.chances
        prompt_len = self.random.randint(1, min(chances["prompt"], self.config.max_model_len - 1))
        most = min(chances["completion"], self.config.max_model_len - prompt_len)
        hashes = block_hashes(text, prompt_len, self.config.page_size)
        if not self.config.prefix_cache or self.random.random() < 0.1:  # as for a prompt whose tokens are all scored
            hashes = ()
        siblings = self.random.randint(1, 3) if self.random.random() < chances["siblings"] else 0
        max_tokens, leader, t = self.random.randint(1, most), None, self._tick()
        for _ in range(1 + siblings):
            name = f"r{len(self.names)}"
            self.names.append(name)
            self.device.prompts[name] = (text, prompt_len)
            self.scheduler.on(Arrived(t, RequestFacts(name, prompt_len, max_tokens, hashes, leader)))
            leader = leader or name

    def _step(self):
        busy = [mesh for mesh, steps in enumerate(self.device.steps) if steps]
        if busy:
            self.device.complete_step(
                self.random.choice(busy), self._tick(), stops=lambda request: self.random.random() < 0.04
            )

    def _transfer(self):
        if self.device.transfers:
            self.device.complete_transfer(self.random.randrange(len(self.device.transfers)), self._tick())

    def _break(self):
        if self.device.transfers:
            number = self.device.transfers.pop(self.random.randrange(len(self.device.transfers)))
            source = self.sources[number]
            self.scheduler.on(TransferFailed(self._tick(), number, "the link broke"))
            if self.random.random() < 0.4:  # because the mesh that it came from is lost, which shows a little later
                self._act()
                self._lose_mesh(source)

    def _lose(self):
        mesh = self.random.randrange(len(self.scheduler.meshes))
        if self.device.steps[mesh]:
            self._lose_mesh(mesh)

    def _lose_mesh(self, mesh):
        self.device.lose(mesh)
        self.scheduler.on(MeshFailed(self._tick(), mesh, "RuntimeError: out of memory"))

    def _abort(self):
        self.scheduler.on(AbortRequested(self._tick(), self._some()))

    def _preempt(self):
        self.scheduler.on(PreemptRequested(self._tick(), self._some()))

    def _migrate(self):
        destination = self.random.choice([None, self.random.randrange(len(self.scheduler.meshes))])
        self.scheduler.on(MigrateRequested(self._tick(), self._some(State.DECODE), destination))

    def _hold(self):
        if not self.is_held:
            self.scheduler.on(Hold(self._tick()))
        elif self.scheduler.is_drained:
            self.scheduler.on(Resume(self._tick()))
        else:
            return
        self.is_held = not self.is_held

    def _some(self, preferred=None):
        """A request, most often one that runs: of the preferred state, or of each state alike; or of no such name."""
        running = list(self.scheduler.requests.values())
        if not running or self.random.random() < 0.05:
            return self.random.choice([*self.names, "nobody"])
        states = sorted({request.state for request in running})
        state = preferred if preferred in states else self.random.choice(states)
        return self.random.choice([request for request in running if request.state is state]).id


def meshes_of(action):
    """Meshes whose device order the action is part of; they are lost with it."""
    match action:
        case Prefill(mesh=mesh) | Decode(mesh=mesh) | Fused(mesh=mesh) | CopyPage(mesh=mesh):
            return {mesh}
        case Scatter(destination=mesh):
            return {mesh}
        case StartTransfer(source=source, destination=destination):
            return {source, destination}
        case _:
            return set()


def make_config(topology, options):
    defaults = {
        "max_model_len": 48, "page_size": 4, "max_num_seqs": 4, "prefill_buckets": (4, 8), "prefill_rows": 3,
    }  # fmt: skip
    options = defaults | options
    slots = options["max_num_seqs"]
    buckets = (slots,) if options.get("deterministic") else (1, slots)
    return EngineConfig(topology=Topology.parse(topology), **{"decode_buckets": buckets} | options)


def make_pools(config, pages=16, spare=None, stagings=1, state=0):
    """Pages of every group, or of a windowed one what a request needs and `spare` more; `stagings`: transfers of the
    largest size that may be under way at once. Every second mesh has a few pages more."""
    caps = [config.pages_to_send(window) for window in config.windows]
    pools = []
    for index in range(len(config.topology.meshes)):
        counts = [
            (pages if window is None or spare is None else config.most_pages(window) + spare) + 2 * (index % 2)
            for window in config.windows
        ]
        sizes = tuple(range(1, len(caps) + 1))
        one = sum(cap * size for cap, size in zip(caps, sizes, strict=True)) + state
        pools.append(PoolSize(tuple(counts), sizes, stagings * one, state))
    return pools


def plain_config(config):
    return plain(config) | {"topology": str(config.topology)}


def check(runs):
    """Everything that can happen did, over all runs."""
    seen = sum((run.scheduler.seen for run in runs), Counter())
    counts = sum((Counter(vars(run.scheduler.tally)) for run in runs), Counter())
    for kind in (*get_args(Event), *get_args(Action)):
        assert seen[kind.__name__], kind
    for state in set(State) - FINAL:
        assert seen["AbortRequested", state], state
        assert seen["PreemptRequested", state], state
    assert seen["MigrateRequested", "anywhere"]
    assert seen["MigrateRequested", "named"]
    for what in ("preemptions", "migrations", "retries", "cached_tokens"):
        assert counts[what], what
    assert {reason for run in runs for reason in run.device.finished.values()} == {"stop", "length", "abort", "error"}
    return seen, counts


def main():
    runs = []
    for seed, name in enumerate(RUNS, 1):
        runs.append(Run(name, seed))
        text = json.dumps(runs[-1].record(), separators=(",", ":"))
        turns = runs[-1].scheduler.turns
        path = FOLDER / f"{seed:02}-{name}.json.xz"
        path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
        counts = [sum(len(turn[kind]) for turn in turns) for kind in ("events", "actions")]
        print(f"{path.name}: {counts[0]} events, {counts[1]} actions, {path.stat().st_size} bytes")
    for counts in check(runs):
        print(*(f"{key}: {value}" for key, value in sorted(counts.items(), key=str)), sep=", ")


if __name__ == "__main__":
    main()
