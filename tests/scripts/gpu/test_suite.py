"""The GPU suite, tried on the CPU: what it runs, what it writes, how it stops. What it measures is not for tests."""

import importlib
import importlib.util
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from twinmesh.scripts import gpu_suite
from twinmesh.scripts.gpu import aims as gpu_aims
from twinmesh.scripts.gpu import attention as gpu_attention
from twinmesh.scripts.gpu import checks as gpu_checks
from twinmesh.scripts.gpu import facts as gpu_facts
from twinmesh.scripts.gpu import transformers_peer as gpu_transformers
from twinmesh.scripts.gpu.peers import Measured, measured, page_lists, sets
from twinmesh.scripts.gpu.timing import Cached, Heads, cached, prefill_flops

SMALL = Heads(4, 2, 64, 16)


no_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Also where there is a GPU: on one, the suite would begin."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_without_a_gpu_the_suite_says_so_in_one_sentence(capfd):
    assert gpu_suite.main([]) == 2
    said = capfd.readouterr().err
    assert said.startswith("No GPU was found (JAX's first device is 'cpu'): ")
    assert "--scale" in said
    assert said.count("\n") == 1


def test_sections_of_a_tiny_suite_write_one_report(tmp_path):
    path = tmp_path / "gpu.json"
    assert gpu_suite.main(["--scale", "0.001", "--only", "ceilings", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert {"command", "date", "driver", "device", "jax", "aims", "graphs", "total_seconds"} <= set(report)
    assert report["ceilings"]["copy_tb_s"] > 0
    assert report["not_yet_measured"] == "This tries the suite itself, on cpu at 0.001."
    assert all(aim["met"] is None for aim in report["aims"].values())


def test_a_section_that_hangs_is_stopped_and_one_that_dies_says_why(monkeypatch, tmp_path):
    processes = gpu_suite.Processes(0.001, str(tmp_path))
    assert processes.run("ceilings", 0.2) == {"failed": "Stopped after 0 s: what would have come later is missing."}
    broken = gpu_suite.Section("attention", "ceilings", 30, "--xla_no_such_flag=1")
    monkeypatch.setitem(gpu_suite.SECTIONS, "ceilings", broken)
    failed = processes.run("ceilings", 60)["failed"]
    assert failed.startswith("Exit code ")
    assert "xla_no_such_flag" in failed
    assert not processes.running


def test_what_runs_beside_is_ended_with_the_suite(tmp_path):
    processes, found = gpu_suite.Processes(0.001, str(tmp_path)), {}
    thread = threading.Thread(target=lambda: found.update(processes.run("ceilings", 60)))
    thread.start()
    while not processes.running:
        thread.join(0.01)
    processes.end()
    thread.join()
    assert found["failed"].startswith("Exit code -9")
    assert not processes.running


def test_a_section_that_is_over_at_its_limit_was_not_stopped():
    stopped = threading.Event()
    with subprocess.Popen([sys.executable, "-c", ""], start_new_session=True) as process:
        process.wait()
        gpu_suite.stop(process, stopped)
    assert not stopped.is_set()


def test_what_does_not_fit_before_the_deadline_is_not_begun(tmp_path):
    calls = []

    class Fake(gpu_suite.Processes):
        def run(self, name, limit, found=None):
            calls.append((name, limit))
            return {"found": name}

    report, fake = {}, Fake(1.0, "")
    now = gpu_suite.time.monotonic()
    gpu_suite.run_sections(report, ["checks", "decode"], fake, now + 100, str(tmp_path / "x.json"))
    assert sorted(name for name, _ in calls) == ["build_peers", "checks", "decode"]
    assert all(limit <= 100 for _, limit in calls)
    assert report["build_peers"] == {"found": "build_peers"}
    gpu_suite.run_sections(report, ["gemms"], fake, now + 5, None)
    assert report["gemms"]["failed"] == "Not begun: the suite's deadline was near."
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "decode,nothing"], "--only: nothing is not a section; there are checks, "),
        (["--scale", "2"], "--scale 2.0: it must be above 0 and at most 1."),
        (["--json", "/no/such/folder/x.json"], "its directory does not exist"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(arguments)
    assert message in capsys.readouterr().err


def test_every_section_exists_and_all_fit_into_the_deadline_even_when_all_hang():
    for section in (gpu_suite.SECTIONS | gpu_suite.HIDDEN).values():
        assert callable(getattr(importlib.import_module(f"twinmesh.scripts.gpu.{section.module}"), section.function))
    assert next(iter(gpu_suite.SECTIONS)) == "checks"
    shares = [section.share for section in gpu_suite.SECTIONS.values()]
    assert gpu_suite.DEVICE.share + sum(shares) <= gpu_suite.DEADLINE < 600
    assert gpu_suite.BUILD.share <= shares[0]  # it runs beside the checks, and what comes next waits for it


def test_a_section_may_take_what_those_before_it_left_and_never_the_share_of_one_after_it():
    names = list(gpu_suite.SECTIONS)
    left = sum(section.share for section in gpu_suite.SECTIONS.values()) + 7
    for place, name in enumerate(names):
        limit = gpu_suite.limit_of(names[place:], left)
        assert limit == gpu_suite.SECTIONS[name].share + 7
        left -= limit - 7  # it hangs, or leaves seven seconds
    assert gpu_suite.limit_of(["gemms", "transformers"], 12) == 12
    assert gpu_suite.limit_of(["gemms", "transformers"], 30) == gpu_suite.SECTIONS["gemms"].share


def test_pieces_of_a_section_become_one():
    facts = {"rows": {"a": {"ms": 1}}}
    gpu_facts.merge(facts, {"rows": {"a": {"budget": {}}, "b": {}}, "failed": "x"})
    assert facts == {"rows": {"a": {"ms": 1, "budget": {}}, "b": {}}, "failed": "x"}


def test_a_piece_is_valid_json_and_half_a_line_is_no_piece():
    line = gpu_facts.line({"a": [float("nan"), 1.5], "b": {"c": float("-inf")}})
    assert line == '{"a": [null, 1.5], "b": {"c": null}}'
    assert gpu_facts.read(line) == {"a": [None, 1.5], "b": {"c": None}}
    assert gpu_facts.read(line[:9]) == gpu_facts.read("1") == {}


def test_a_report_is_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    gpu_facts.save({"a": 1}, path)
    with pytest.raises(TypeError):
        gpu_facts.save({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_rows_hold_ratios_and_null_with_the_reason_where_a_peer_is_absent(monkeypatch):
    for name in ("DECODE_CALLS", "PREFILL_CALLS"):
        monkeypatch.setattr(gpu_attention, name, 1)

    def twice(heads, cache, lengths, chunks):
        return Measured(1e3, np.zeros((len(lengths), heads.query, heads.dim)))

    def absent(heads, cache, lengths, chunks):
        raise ModuleNotFoundError("No module named 'flashinfer'\nmore")

    row = gpu_attention.decode_row(SMALL, [20, 33], 1e9, {"twice": twice, "absent": absent})
    peers = row["peers"]
    assert peers["twice"]["ratio"] == peers["best_ratio"] == pytest.approx(1e9 / row["us"])
    assert peers["twice"]["difference"] == pytest.approx(1.0)
    reason = "ModuleNotFoundError: No module named 'flashinfer'"
    assert peers["absent"] == {"us": None, "ratio": None, "reason": reason}
    prefill = gpu_attention.prefill_row(SMALL, [20, 33], [20, 3], 1e9)
    assert all(peer["us"] is None and peer["reason"] for name, peer in prefill["peers"].items() if name != "best_ratio")
    assert prefill["tflop_s"] > 0
    json.dumps([row, prefill])


def test_a_row_of_the_append_has_the_time_and_the_bytes_of_one_call():
    row = gpu_attention.append_row(SMALL, 32, 0.001)
    assert row["us"] > 0
    assert row["bytes"] == 32 * 4 * 2 * 64


@pytest.mark.parametrize("has_8k", [True, False])
def test_rates_are_compared_with_the_prompt_of_8k_or_with_nothing(monkeypatch, has_8k):
    def row(heads, lengths, chunks, matmul):
        if lengths == [8192] and not has_8k:
            raise ValueError("it does not fit")
        return {"tflop_s": 2.0 if lengths == [8192] else 1.0}

    monkeypatch.setattr(gpu_attention, "prefill_row", row)
    monkeypatch.setattr(gpu_attention, "device_rates", lambda scale: {"copy_tb_s": 1.0, "matmul_tflop_s": 1.0})
    found = {}
    for piece in gpu_attention.prefill(1.0):
        gpu_facts.merge(found, piece)
    for name, facts in found["rows"].items():
        assert facts.get("of_dense_rate") == (0.5 if has_8k and not name.endswith(" 8k") else None)
    assert ("failed" in found) != has_8k
    aim = gpu_aims.aims({"prefill": {"rows": {"a 2k of 18k": {"peers": {"best_ratio": None}}}}})[
        "chunk of the dense rate"
    ]
    assert aim["met"] is None


@no_torch
def test_peers_that_are_not_installed_are_a_reason():
    cache = cached(SMALL, [20], most_bytes=1)
    assert isinstance(cache, Cached)
    for peers in (gpu_attention.DECODE, gpu_attention.PREFILL):
        assert all(isinstance(measured(peer, SMALL, cache, [20], [20]), str) for peer in peers.values())


def test_a_peer_gets_the_pages_of_each_request_and_the_tokens_of_its_last():
    cache = cached(SMALL, [33, 16, 1], most_bytes=1)
    table = np.asarray(cache.page_table)
    begin, pages, tails = page_lists(16, table, [33, 16, 1])
    assert begin.tolist() == [0, 3, 4, 5]
    assert pages.tolist() == [*table[0, :3], table[1, 0], table[2, 0]]
    assert tails.tolist() == [1, 16, 1]


def test_dense_peers_read_so_many_keys_and_values_in_turn_that_no_cache_holds_them():
    for heads in gpu_attention.HEADS:
        for lengths in ([1024] * 32, [8192], [8192] * 128, [4096, 1000, 6000, 300]):
            count = sets(heads, lengths)
            assert count * sum(lengths) * heads.token_bytes >= 3e8
    assert sets(gpu_attention.HEADS[0], [8192] * 128) == 1


def test_inputs_of_checks_hold_nan_wherever_no_request_has_a_token():
    inputs = gpu_checks.make_inputs(gpu_checks.Case(SMALL, "float16", longest=100), 1.0)
    size, lengths, table = SMALL.page_size, np.asarray(inputs.kv_len), np.asarray(inputs.page_table)
    held = {(table[r, t // size], t % size) for r, length in enumerate(lengths) for t in range(length)}
    finite = np.isfinite(np.asarray(inputs.k_pages, np.float32)).all(axis=(2, 3))
    assert {(page, slot) for page, slot in zip(*np.nonzero(finite), strict=True)} == held
    assert set(lengths) >= {0, 1, size - 1, size, size + 1, 100}
    assert list(table[9, : lengths[9] // size]) == list(table[8, : lengths[9] // size])
    assert inputs.q_prefill.shape[0] > inputs.q_start[-1]


def test_checks_find_no_error_in_plain_xla_and_do_find_wrong_rows():
    case = gpu_checks.Case(SMALL, "bfloat16", {"window": 20, "softcap": 20.0, "sink": True}, longest=60)
    errors = gpu_checks.attention_errors(case, 1.0)
    assert len(errors) == 2
    assert all(0 < error < gpu_checks.LIMITS["bfloat16"] for error in errors.values())
    want = np.ones((2, 3, 4))
    want[1, 2] = 0
    assert gpu_checks.distance(want, want) == 0
    for index, value in (((0, 0, 0), np.nan), ((1, 2, 3), 1e-9)):
        got = want.copy()
        got[index] = value
        assert gpu_checks.distance(got, want) == np.inf
    got = want.copy()
    got[0, 1] *= 1.5
    assert gpu_checks.distance(got, want) == pytest.approx(0.5)


def test_checks_go_on_where_a_kernel_does_not_compile_and_fail_in_the_end(monkeypatch):
    def broken(case, scale):
        if case.dtype == "bfloat16":
            raise ValueError("it does not fit\nmore")
        return {str(case): 0.1}

    monkeypatch.setattr(gpu_checks, "attention_errors", broken)
    monkeypatch.setattr(gpu_checks, "CASES", [gpu_checks.Case(SMALL, "float16"), gpu_checks.Case(SMALL, "bfloat16")])
    for name in ("append_facts", "handoff_facts", "pytest_facts"):
        monkeypatch.setattr(gpu_checks, name, lambda scale: {"right": True})
    facts = {}
    for piece in gpu_checks.checks(0.1):
        gpu_facts.merge(facts, piece)
    assert facts["errors"] == {
        "4/2x64p16 float16 4097": 0.1,
        "4/2x64p16 bfloat16 4097": "ValueError: it does not fit",
    }
    assert facts["failed"] == "4/2x64p16 float16 4097: 0.1; 4/2x64p16 bfloat16 4097: ValueError: it does not fit"
    assert facts["pytest"] == {"right": True}


def test_checks_of_the_append_pass_on_the_cpu():
    assert gpu_checks.append_facts(0.001) == {"in_place": True, "right": True, "peak_bytes_added": None}


def test_every_dtype_head_dim_page_size_and_option_is_checked():
    cases = gpu_checks.CASES
    for what, wanted in (
        (lambda case: case.heads.dim, {64, 128, 256}),
        (lambda case: case.heads.page_size, {16, 32, 64, 128}),
        (lambda case: case.dtype, {"bfloat16", "float16"}),
    ):
        assert {what(case) for case in cases} == wanted
    assert {16} <= {case.heads.query // case.heads.kv for case in cases}
    assert any(case.heads.kv == 1 for case in cases)
    assert any(case.longest == 131072 for case in cases)
    assert {option for case in cases for option in case.options} == {"window", "softcap", "sink"}


def test_flops_count_what_is_visible():
    assert prefill_flops(SMALL, [10], [4]) == 4 * 4 * 64 * (7 + 8 + 9 + 10)


def test_aims_are_the_worst_rows_and_null_where_nothing_was_measured():
    report = {
        "decode": {"rows": {"a": {"of_copy": 0.9, "peers": {"best_ratio": 1.2}}, "b": {"of_copy": 0.8, "peers": {
            "best_ratio": None}}}},
        "prefill": {"rows": {"32/8x128p64 8k": {"tflop_s": 560, "of_dense_rate": 1.0, "peers": {"best_ratio": 0.9}}}},
        "steps": {"decode": {"1": {"ms": 5.0, "of_floor": 0.8}}, "prefill": {"of_matmul": 0.5}},
        "steps_without_graphs": {"decode": {"1": {"ms": 6.0}, "8": {"ms": 7.0}}},
        "transformers": {"decode": {"1": {"ms": 20.0}, "32": {"ms": 9.0}}},
    }  # fmt: skip
    found = gpu_aims.aims(report)
    assert found["decode of copy bandwidth"] == {"aim": 0.85, "found": 0.8, "row": "b", "met": False}
    assert found["decode over the best peer"] == {"aim": 1.0, "found": 1.2, "row": "a", "met": True}
    assert found["prefill TFLOP/s of 128"]["met"]
    assert found["prefill TFLOP/s of 64"]["met"] is None
    assert found["decode step over transformers"]["found"] == 4
    assert not found["prefill step of matmul rate"]["met"]
    assert gpu_aims.graphs(report) == {"1": {"ms": 5.0, "ms_without": 6.0, "saved_ms": 1.0}}
    assert all(aim["found"] is None for aim in gpu_aims.aims({"steps": {"failed": "x"}}).values())


@no_torch
def test_transformers_are_null_where_torch_is_not_installed():
    (facts,) = gpu_transformers.transformers(0.01)
    assert facts["decode"] is None
    assert "No module named" in facts["reason"]
