"""What the comparison with peers makes of moments and turns; the engines are not for tests."""

import itertools
import json
from pathlib import Path

import pytest
from twinmesh.scripts.bench import peer_steps, peers

SIZE = {"file": 90, "weights": 100, "kv": 6}


def moments(first, *, step, tokens):
    return [first + step * i for i in range(tokens)]


def test_steps_count_from_where_all_requests_decode_until_the_first_ends():
    early = [0.5, 1.5, *moments(3.0, step=0.1, tokens=20)]
    late = moments(3.0, step=0.1, tokens=30)
    figures = peer_steps.decode_figures((0.0, [early, late]), 16)
    assert figures["steps"] == 20 - 1 - peer_steps.SKIPPED
    assert figures["rows"] == pytest.approx(2)
    assert figures["step_ms"] == pytest.approx(100)
    assert figures["tokens_per_second"] == pytest.approx(20)


def test_one_slow_step_is_in_the_window_and_not_in_the_median():
    gaps = [0.1] * 10 + [1.0] + [0.1] * 10
    stamps = list(itertools.accumulate(gaps, initial=0.0))
    figures = peer_steps.decode_figures((0.0, [stamps]), 15)
    assert figures["steps"] == 15
    assert figures["median_step_ms"] == pytest.approx(100)
    assert figures["step_ms"] == pytest.approx(160)


def test_a_window_without_enough_common_steps_is_no_figure():
    early, late = moments(0.0, step=0.1, tokens=20), moments(1.7, step=0.1, tokens=20)
    with pytest.raises(SystemExit, match="of 16 had all 2 requests"):
        peer_steps.decode_figures((0.0, [early, late]), 16)


def test_prefill_lasts_until_the_last_first_token():
    assert peer_steps.prefill_rate((1.0, [[2.0], [3.0, 9.0]]), 100) == pytest.approx(100)


def test_prompts_are_the_same_each_time_and_differ():
    made = peer_steps.prompts(3, 5)
    assert made == peer_steps.prompts(3, 5)
    assert [len(prompt) for prompt in made] == [5] * 3
    assert len(set(map(tuple, made))) == 3


@pytest.mark.parametrize(
    ("way", "weights", "kv"),
    [
        ("twinmesh-file-float32", 90, 4),
        ("twinmesh-file-bfloat16", 90, 2),
        ("twinmesh-bfloat16", 200, 2),
        ("vllm-float32", 400, 4),
        ("llama.cpp-file", 90, 2),
        ("llama.cpp-F32", 400, 2),
        ("llama.cpp-Q8_0", 106.25, 2),
    ],
)
def test_a_step_reads_weights_as_stored_and_the_kv_of_all_requests(way, weights, kv):
    assert peers.step_bytes(way, 8, 10.0, SIZE) == pytest.approx(weights + 8 * 10 * 6 * kv)


def turn(way, rate, peak):
    step = {"steps": 128, "step_ms": 1e3 / rate, "median_step_ms": 1e3 / rate, "tokens_per_second": rate}
    memory = {"peak": peak, "anonymous": 1.0, "file": 1.0}
    return {"way": way, "decode": {"1": step}, "prefill": {"tokens_per_second": 2 * rate}, "memory": memory}


def test_best_median_and_range_are_of_all_turns_and_ratios_of_the_best():
    turns = [turn("twinmesh-float32", rate, peak) for rate, peak in ((10.0, 30.0), (30.0, 20.0), (20.0, 50.0))]
    turns += [turn("llama.cpp-F32", 15.0, 10.0), turn("llama.cpp-Q8_0", 60.0, 5.0), turn("vllm-float32", 20.0, 40.0)]
    report = peers.summarise(turns, 1e6, SIZE, 512)
    ours = report["rows"]["twinmesh-float32"]
    assert ours["decode 1 tokens/s"] == {"best": 30.0, "median": 20.0, "range": [10.0, 30.0]}
    assert ours["peak MB"] == {"best": 20.0, "median": 30.0, "range": [20.0, 50.0]}
    assert ours["decode 1 of floor"]["best"] == pytest.approx(30 * peers.step_bytes("x-float32", 1, 580.0, SIZE) / 1e6)
    ratios = report["ratios"]["twinmesh-float32"]
    assert ratios["llama.cpp"]["decode 1 tokens/s"] == pytest.approx(0.5)
    assert ratios["peers"]["decode 1 tokens/s"] == pytest.approx(1.5)
    assert ratios["peers"]["peak MB"] == pytest.approx(2.0)
    assert "llama.cpp-Q8_0" in peers.as_table(report)
    json.dumps(report)


def test_ways_are_those_whose_python_is_named():
    own = ["twinmesh-file-float32", "twinmesh-file-bfloat16", "twinmesh-float32", "twinmesh-bfloat16"]
    assert list(peers.commands(peers.arguments([]), Path("f"))) == own
    args = peers.arguments(["--model", "m.gguf", "--vllm", "p", "--vllm-preload", "a.so"])
    ways = peers.commands(args, Path("f"))
    assert list(ways) == [*own, "vllm-float32", "vllm-bfloat16"]
    assert ways["vllm-float32"][0][:3] == ["env", "LD_PRELOAD=a.so", "p"]


def test_a_way_without_its_python_is_refused():
    with pytest.raises(SystemExit, match="vllm-float32: no such way, or no Python given for it"):
        peers.main(["--only", "vllm-float32"])
