"""Workers on Ray. Those that are `long` start a real cluster on this machine; they are skipped where Ray is not."""

import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from twinmesh import LLM, SamplingParams
from twinmesh.engine.host import extras
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.startup.worker_main import serve
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.remote import ray_actors
from twinmesh.engine.worker.remote.ray_actors import Actor, Ordered, RayWorkers
from twinmesh.engine.worker.remote.ray_cluster import join, reserve

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed")
LONG, GROUPS = 60.0, "ray.util.placement_group"
PROMPTS, GREEDY = ["hello world", "abc", "the quick brown fox"], SamplingParams(max_tokens=24, temperature=0.0)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_messages_go_on_by_their_numbers_whatever_order_calls_come_in(order):
    batches, taken = [(0, [b"a", b"b"]), (2, [b"c"]), (3, [b"d", b"e"])], []
    ordered = Ordered(taken.append)
    for index in order:
        ordered.add(*batches[index])
    assert taken == [b"a", b"b", b"c", b"d", b"e"]


def test_ray_that_is_not_installed_names_the_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(ValueError, match=r"^workers='ray' needs the package of the extra 'ray': pip install"):
        RayWorkers(Topology.parse("prefill=1,decode=1"), serve)


class FakeActor:
    """An actor and the Ray that it is of: calls of `put` wait until `go` is set, answers until it was killed."""

    def __init__(self):
        self.calls, self.began, self.go, self.dead = [], threading.Semaphore(0), threading.Event(), threading.Event()
        self.put, self.take = SimpleNamespace(remote=self._put), SimpleNamespace(remote=lambda number: number)

    def _put(self, first, messages):
        self.calls.append((first, messages))
        self.began.release()
        assert self.go.wait(LONG)

    def get(self, answer):
        assert self.dead.wait(LONG)
        raise RuntimeError("it was killed")

    def kill(self, actor, no_restart):
        self.dead.set()


def test_what_has_gathered_goes_in_calls_of_bounded_size(monkeypatch):
    monkeypatch.setattr(ray_actors, "MOST_BYTES", 10)
    fake, ends = FakeActor(), []
    actor = Actor(fake, fake, lambda data: None, ends.append)
    actor.send(b"beat")
    assert fake.began.acquire(timeout=LONG)
    sent = [bytes([number]) * 6 for number in range(5)]
    for data in sent:
        actor.send(data)
    actor.send(b"last")
    fake.go.set()
    assert all(fake.began.acquire(timeout=LONG) for _ in range(3))
    actor.kill()
    actor.join()
    assert [first for first, _ in fake.calls] == [0, 1, 3, 5]
    assert [data for _, messages in fake.calls for data in messages] == [b"beat", *sent, b"last"]
    assert ends == ["its actor is gone: it was killed."]


def test_what_was_reserved_is_given_back_where_the_wait_for_it_is_interrupted(monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    group, removed = SimpleNamespace(wait=interrupted), []
    groups = SimpleNamespace(placement_group=lambda wants, strategy: group, remove_placement_group=removed.append)
    for name, module in (("ray", SimpleNamespace()), ("ray.util", SimpleNamespace()), (GROUPS, groups)):
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(KeyboardInterrupt):
        reserve(None, [{"CPU": 1.0}])
    assert removed == [group]


def test_a_process_that_is_in_another_cluster_is_refused():
    here = SimpleNamespace(gcs_address="10.0.0.1:6379")
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: here)
    assert [join(ray, address, 1) for address in (None, "auto", "10.0.0.1:6379")] == [False] * 3
    with pytest.raises(ValueError, match=r"^ray_address names 10\.0\.0\.2:6379, and this process has joined .* at 10"):
        join(ray, "10.0.0.2:6379", 1)


OTHER_VERSIONS = (
    "Version mismatch: The cluster was started with:\n    Ray: 2.58.0\n    Python: 3.12.1\n"
    "This process on 10.0.0.2:0 was started with:\n    Ray: 2.60.0\n    Python: 3.12.4\n"
)


@pytest.mark.parametrize(
    ("ray_says", "says"),
    [
        (OTHER_VERSIONS, "the cluster has Ray 2.58.0 and Python 3.12.1, this process Ray 2.60.0 and Python 3.12.4: "
                         "install the same everywhere."),
        ("Failed to connect.\nSee the log.", "Failed to connect."),
    ],
    ids=["other versions", "another error"],
)  # fmt: skip
def test_a_cluster_that_cannot_be_joined_is_refused_in_a_sentence(ray_says, says):
    def init(**_):
        raise RuntimeError(ray_says)

    ray = SimpleNamespace(is_initialized=lambda: False, init=init, __version__="2.60.0")
    whole = f"Ray 2.60.0 does not start or join a cluster at 10.0.0.1:6379: {says}"
    with pytest.raises(ValueError, match=f"^{re.escape(whole)}$"):
        join(ray, "10.0.0.1:6379", 1)


@pytest.mark.parametrize("name", ["ray_address", "mesh_hosts"])
def test_options_of_ray_are_refused_without_it(name):
    with pytest.raises(ValueError, match=f"^{name} is of workers='ray' alone"):
        EngineOptions("model", workers="processes", **{name: "10.0.0.1"})


# ---- on a cluster


@pytest.fixture(scope="module")
def ray():
    """A cluster of four CPUs that this process has joined, so that engines join it and leave it running."""
    ray = pytest.importorskip("ray")
    quiet = {"include_dashboard": False, "log_to_driver": False, "_system_config": {"worker_niceness": 0}}
    ray.init(address="local", num_cpus=4, **quiet)
    yield ray
    ray.shutdown()


@pytest.mark.long
@needs_ray
@pytest.mark.parametrize(
    ("topology", "hosts", "says"),
    [
        ("prefill=1xtp4,decode=1", None, r"^the meshes need 5 CPUs and the Ray cluster has 4: use fewer"),
        ("prefill=1,decode=1", ["here"], r"^mesh_hosts names 1 hosts and topology .* has 2 meshes"),
        ("prefill=1,decode=1", ["here", "there"], r"^mesh_hosts names 'here', which is no node of the Ray cluster"),
    ],
)
def test_what_the_cluster_has_not_is_refused_in_a_sentence(ray, topology, hosts, says):
    with pytest.raises(ValueError, match=says):
        RayWorkers(Topology.parse(topology), serve, mesh_hosts=hosts)
    assert ray.available_resources()["CPU"] == 4


@pytest.fixture(scope="module")
def tokens(tiny_path):
    """What one process answers in deterministic mode."""
    with LLM(tiny_path, topology="prefill=1,decode=1", max_model_len=64, deterministic=True) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def on_ray(path, **options):
    return LLM(path, workers="ray", max_model_len=64, deterministic=True, **options)


@pytest.mark.long
@needs_ray
@pytest.mark.parametrize("on_one_host", [False, True])
def test_actors_give_the_tokens_of_one_process(ray, tiny_path, tokens, on_one_host):
    hosts = ",".join([ray.util.get_node_ip_address()] * 2) if on_one_host else None
    with on_ray(tiny_path, topology="prefill=1,decode=1", mesh_hosts=hosts) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)] == tokens
        assert len(actors()) == 2 - on_one_host
    assert actors() == []


def actors():
    """The processes of actors on this test's own cluster, which its process has started."""
    parents = {int(p.name): int(stat.rpartition(")")[2].split()[1]) for p, stat in read_all("stat")}
    named = [int(p.name) for p, line in read_all("cmdline") if line.startswith("ray::WorkerActor")]
    return sorted(pid for pid in named if is_below(pid, os.getpid(), parents))


def wait_for_actors(count):
    deadline = time.monotonic() + 120
    while len(actors()) != count and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(actors()) == count


def read_all(name):
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            yield process, (process / name).read_text()


def is_below(pid, ancestor, parents):
    while pid in parents and pid != ancestor:
        pid = parents[pid]
    return pid == ancestor


@pytest.mark.long
@needs_ray
@pytest.mark.parametrize("worker", [0, 1])
def test_an_actor_that_is_killed_loses_no_request_and_comes_back(ray, tiny_path, tokens, worker):
    with on_ray(tiny_path, topology="prefill=1,decode=1") as llm:
        for _ in range(2):
            wait_for_actors(2)  # Ray says by no event that one is back
            stream = iter(llm.stream(PROMPTS[0], GREEDY))
            got = list(next(stream).token_ids)
            os.kill(actors()[worker], signal.SIGKILL)
            for delta in stream:
                got += delta.token_ids
            assert got == list(tokens[0])
        assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)] == tokens


_DRIVER = """
import sys, time
from twinmesh import LLM
llm = LLM(sys.argv[1], topology="prefill=1,decode=1", workers="ray", ray_address=sys.argv[2], max_model_len=64)
print("serving", flush=True)
sys.stdin.read()
"""


@pytest.mark.long
@needs_ray
def test_no_actor_outlives_a_driver_that_was_killed(ray, tiny_path):
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", _DRIVER, str(tiny_path), address]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "serving\n"
    assert len(actors()) == 2
    driver.kill()
    driver.wait()
    wait_for_actors(0)
