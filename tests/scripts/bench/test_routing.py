"""The comparison of routers over traces: what is read, what load means, and that bad ranks show as bad."""

import json
from random import Random

import pytest
from twinmesh.engine.protocol.actions import Chunk, Prefill
from twinmesh.engine.simulation.workload import WorkRequest
from twinmesh.engine.topology import Topology
from twinmesh.scripts.bench import routing
from twinmesh.scripts.bench.ranks import RoundRobin
from twinmesh.scripts.bench.routing import OURS, Work, compare, make, replay, verdict
from twinmesh.scripts.bench.virtual_engine import StepTime

LINE = '{"timestamp": %d, "input_length": %d, "output_length": %d, "hash_ids": %s}\n'


def arrival(at, prompt_len, output_len, blocks=()):
    return WorkRequest(prompt_len, output_len, at, blocks=blocks)


def conversations(count, seed=0):
    """Arrivals by turns of a few conversations that grow, all with the same first block."""
    random, ids, talks = Random(seed), iter(range(1, 100_000)), [[] for _ in range(count // 5)]
    arrivals = []
    for number in range(count):
        talk = random.choice(talks)
        talk += [next(ids) for _ in range(random.randint(1, 4))]
        arrivals.append(arrival(number * 0.05, 512 * (1 + len(talk)), random.randint(2, 40), (0, *talk)))
    return arrivals


@pytest.mark.parametrize("line", ["{", "5", LINE % (0, 1000, 7, "[0]"), '{"timestamp": 0}', LINE % (0, 9, 7, '["a"]')])
def test_a_line_that_is_no_request_is_named(tmp_path, capsys, line):
    path = tmp_path / "trace.jsonl"
    path.write_text(LINE % (500, 1000, 7, "[0, 1]") + line.strip() + "\n")
    assert routing.main(["--traces", str(path)]) == 2
    assert "trace.jsonl, line 2: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty: give a trace"), (2 * (LINE % (5, 9, 7, "[0]")), "no later than")]
)
def test_a_trace_that_cannot_be_replayed_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "trace.jsonl").write_text(text)
    assert routing.main(["--traces", str(tmp_path / "trace.jsonl")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["both=3", "prefill=2,decode=3"])
def test_round_robin_gives_every_mesh_the_same_number_of_prompts_and_of_answers(text):
    topology = Topology.parse(text)
    places = []

    class Seen(RoundRobin):
        """Notes where each prompt was begun."""

        def prefill_rank(self, request, mesh):
            found = super().prefill_rank(request, mesh)
            places.append((request.number, mesh.index)) if found == (0,) else None
            return found

    replay([arrival(n * 1.0, 100, 3) for n in range(12)], make([arrival(0.0, 100, 3)], topology, Seen(topology.meshes)))
    prefills = [index for index, spec in enumerate(topology.meshes) if spec.prefills]
    assert dict(places) == {number: prefills[number % len(prefills)] for number in range(12)}


def test_the_most_of_a_mesh_is_over_any_minute_and_among_those_with_its_role():
    work = Work(StepTime())
    for second in range(120):
        for mesh, tokens in enumerate((100, 100 if second < 60 else 300, 900)):
            chunk = Chunk(0, 0, 0, 0, tokens, 0, False)
            work.observe(second, second + 0.5, Prefill(mesh, second, 1024, (chunk,)))
    assert work.most(120, [(0, 1), (2,)]) == pytest.approx((1.5, 1.0))
    assert work.most(60, [(0, 1), (2,)]) == pytest.approx((1.0, 1.0))
    assert work.busy_share(120, 3) == pytest.approx(0.5)


def test_every_rank_serves_all_and_those_that_look_at_caches_hit_more():
    topology = Topology.parse("both=4")
    arrivals = routing.at_load(conversations(80), 0.8, topology)
    rows = compare(arrivals, topology, routing.RANKS)
    assert rows[OURS]["hits"] > 1.2 * rows["round robin"]["hits"]
    assert all(0 < row["ttft"]["p50"] <= row["ttft"]["p99"] for row in rows.values())
    found = verdict(rows)
    assert found["ttft_p99_ratio"] == rows[OURS]["ttft"]["p99"] / min(
        row["ttft"]["p99"] for name, row in rows.items() if name != OURS
    )


def test_requests_that_come_faster_than_they_are_served_find_all_meshes_busy():
    topology = Topology.parse("both=2")
    slow, fast = (routing.at_load(conversations(60), load, topology) for load in (0.2, 2.0))
    assert slow[-1].at == pytest.approx(10 * fast[-1].at)
    busy = [
        routing.measure(arrivals, topology, routing.rank("least load", topology))["busy"] for arrivals in (slow, fast)
    ]
    assert busy[0] < 0.6 < 0.9 < busy[1]


def test_the_command_writes_the_same_figures_each_time(tmp_path, capsys):
    lines = [LINE % (1000 * a.at, a.prompt_len, a.output_len, list(a.blocks)) for a in conversations(20)]
    (tmp_path / "trace.jsonl").write_text("".join(lines))
    found = []
    for _ in range(2):
        options = ["--traces", str(tmp_path / "trace.jsonl"), "--json", str(tmp_path / "out.json")]
        assert routing.main([*options, "--ranks", OURS, "efd1214"]) == 0
        found.append(json.loads((tmp_path / "out.json").read_text())["found"])
    assert found[0] == found[1]
    assert [(row["trace"], row["topology"]) for row in found[0]] == [
        ("trace.jsonl", "both=8"), ("trace.jsonl", "prefill=4,decode=4"),
    ]  # fmt: skip
    assert set(found[0][0]["ratios"]) == {"ttft_p99_ratio", "hits_ratio", "most", "is_met"}
    assert "ours to the best" in capsys.readouterr().out
