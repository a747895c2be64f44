"""Reading traces: what becomes of each column, and that whatever is wrong is one sentence with its line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.engine.simulation.loads.traces import read_trace
from twinmesh.engine.simulation.workload import WorkRequest, page_hashes

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
OF_2023 = HEADER + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
OF_2024 = HEADER + "2024-05-12 00:00:00+00:00,1452,3\n2024-05-12 00:00:00.041683+00:00,584,0\n"
LINE = '{"timestamp": %s, "input_length": %d, "output_length": %d, "hash_ids": %s}\n'


def requests(tmp_path, text, name="trace.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(read_trace(path).requests)


def test_times_are_seconds_from_the_first_line(tmp_path):
    first, second = requests(tmp_path, OF_2023)
    assert first == WorkRequest(374, 44, 0.0)
    assert (second.prompt_len, second.output_len, second.at) == (396, 109, pytest.approx(4.314579, abs=1e-6))


def test_times_with_zones_and_without_fractions_are_read_as_azure_writes_them_in_2024(tmp_path):
    first, second = requests(tmp_path, OF_2024)
    assert first == WorkRequest(1452, 3, 0.0)
    assert (second.output_len, second.at) == (1, pytest.approx(0.041683, abs=1e-6))


def test_columns_are_found_by_name(tmp_path):
    text = "NumImages,GeneratedTokens,TIMESTAMP,ContextTokens\n2,7,2024-05-12 02:00:00+02:00,9\n"
    assert requests(tmp_path, "\ufeff" + text + "0,1,2024-05-12 00:00:01+00:00,0\n") == [
        WorkRequest(9, 7, 0.0), WorkRequest(1, 1, 1.0),
    ]  # fmt: skip


def test_blocks_of_mooncake_are_read(tmp_path):
    text = LINE % (500, 1000, 7, "[0, 1]") + LINE % (1500.5, 700, 0, "[0, 2]")
    assert requests(tmp_path, text, "trace.jsonl") == [
        WorkRequest(1000, 7, 0.0, blocks=(0, 1)), WorkRequest(700, 1, 1.0005, blocks=(0, 2)),
    ]  # fmt: skip


def test_a_workload_is_the_same_each_time(tmp_path):
    (tmp_path / "trace.csv").write_text(OF_2023)
    workload = read_trace(tmp_path / "trace.csv")
    assert list(workload.requests) == list(workload.requests)
    assert workload.name == "trace.csv"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: give a trace"),
        ("a,b\n", "line 1: there is no column TIMESTAMP and no ContextTokens and no GeneratedTokens: give a CSV"),
        ("TIMESTAMP,ContextTokens\n", "line 1: there is no column GeneratedTokens: give a CSV"),
        (HEADER, "has a header and no request"),
        (OF_2023 + "yesterday,5,5\n", "line 4: 'yesterday,5,5' is no request: give a time"),
        (OF_2023 + "2023-11-16 18:16:00,many,5\n", "line 4: .* is no request"),
        (OF_2023 + "2023-11-16 18:16:00,5\n", "line 4: .* is no request"),
        (OF_2023 + "2023-11-16 18:16:00,-5,5\n", "line 4: .* is no request"),
        (OF_2023 + "2023-11-16 18:16:00,5000000000,5\n", "line 4: .* is no request"),
        (OF_2023 + "9999-12-31 23:59:59-23:59,5,5\n0001-01-01 00:00:00+23:59,5,5\n", "line 5: it comes before"),
        (OF_2023 + "\n", "line 4: .* is no request"),
        (OF_2023.encode() + b"\xff\x00,1,1\n", "line 4: .* is no request"),
        (OF_2023 + "2023-11-16 18:15:46,5,5\n", "line 4: it comes before the line above: sort the lines"),
    ],
)
def test_a_csv_that_is_no_trace_is_refused_with_the_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"trace\.csv,? {message}") as error:
        requests(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ""), ("5", ""), ("{}", ".*timestamp"),
        (LINE % (600, 1000, 7, "[0]"), "1 hash_ids for 1000 tokens: give one"),
        (LINE % (600, 9, 7, '["a"]'), ""), (LINE % (600, -1, 7, "[]"), "a length is below 0"),
        (LINE % (400, 9, 7, "[0]"), "it comes before the line above"), (LINE % ("1e999", 9, 7, "[0]"), ""),
        ("[" * 100_000, ""), ("", ""),
    ],
)  # fmt: skip
def test_a_jsonl_that_is_no_trace_is_refused_with_the_line(tmp_path, line, message):
    with pytest.raises(ValueError, match=rf"trace\.jsonl, line 2: {message}"):
        requests(tmp_path, LINE % (500, 1000, 7, "[0, 1]") + line + "\n", "trace.jsonl")


def test_what_is_wrong_in_the_first_line_is_told_when_the_file_is_opened(tmp_path):
    (tmp_path / "trace.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column TIMESTAMP"):
        read_trace(tmp_path / "trace.csv")
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "nowhere.csv")


def read_or_refused(path):
    """The requests of a file, or the sentence that refuses it."""
    try:
        return list(read_trace(path).requests)
    except ValueError as error:
        return str(error)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"", HEADER.encode(), OF_2023.encode(), b"{", LINE.encode()]))
def test_no_file_ends_in_anything_but_requests_or_a_sentence(tmp_path_factory, tail, head):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(head + tail)
    found = read_or_refused(path)
    if isinstance(found, str):
        assert str(path) in found
        assert len(found.splitlines()) == 1
    else:
        assert found
        assert all(request.prompt_len > 0 and request.output_len > 0 for request in found)


VALUES = st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["", "1", "nan", "\u00e9"])


@settings(max_examples=50, deadline=None)
@given(
    VALUES | st.lists(VALUES, max_size=3), st.sampled_from(["timestamp", "input_length", "output_length", "hash_ids"])
)
def test_no_value_in_a_line_of_json_ends_in_a_traceback(tmp_path_factory, value, name):
    row = {"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": [1]} | {name: value}
    path = tmp_path_factory.getbasetemp() / "row.jsonl"
    path.write_text(json.dumps(row) + "\n")
    found = read_or_refused(path)
    assert len(found) == 1 or "line 1: " in found


@pytest.mark.parametrize(("page", "block"), [(64, 512), (512, 64), (48, 20), (1, 1)])
def test_pages_are_equal_where_what_they_hold_and_what_is_before_is(page, block):
    mine, others = (tuple(range(30)), tuple([*range(12), *range(100, 130)]))  # 12 blocks alike
    a, b = (page_hashes(blocks, block, 25 * block, page) for blocks in (mine, others))
    assert len(a) == len(b) == 25 * block // page
    alike = 12 * block // page
    assert a[:alike] == b[:alike]
    assert not set(a[alike:]) & set(b)
    assert len(set(a)) == len(a)


def test_pages_behind_the_last_id_have_no_hash():
    assert len(page_hashes((1, 2), 64, 1000, 64)) == 2
    assert len(page_hashes((1, 2), 64, 100, 64)) == 1
    assert page_hashes((), 64, 1000, 64) == ()
