"""Loads on a command line: what each text means, and one sentence for each that means nothing."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.engine.metrics.load_report import LoadReport, Run
from twinmesh.engine.metrics.report_file import write_report
from twinmesh.engine.metrics.request_records import RequestRecord, RequestRecords
from twinmesh.engine.simulation.loads.generators import GENERATORS
from twinmesh.engine.simulation.loads.load_spec import read_workload
from twinmesh.engine.simulation.workload import Workload, WorkRequest

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02},{100 * (second + 1)},{second + 1}\n" for second in range(10)
)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "a:trace.csv"  # a path may have a colon
    path.write_text(TRACE)
    return str(path)


def test_a_path_is_a_trace(trace):
    assert len(list(read_workload(trace).requests)) == 10


def test_a_trace_is_scaled_in_one_order_wherever_the_keys_stand(trace):
    workload = read_workload(f"{trace}:longer=0.5,faster=2,limit=4,copies=3")
    found = list(workload.requests)
    assert len(found) == 12
    assert max(request.at for request in found) <= 1.5
    assert sorted({request.prompt_len for request in found}) == [50, 100, 150, 200]
    assert workload.name == "a:trace.csv, the first 4, 3 x superimposed, 2 x as fast, 0.5 x as long"
    assert len(list(read_workload(f"{trace}:keep=0.5").requests)) < 10


def test_the_load_of_an_earlier_run_is_read_from_its_report(tmp_path):
    records = RequestRecords(
        [
            RequestRecord(1, 107.0, 30, 3, 0, 108.0, 109.0, 109.0),
            RequestRecord(0, 105.0, 20, 0, reason="refused"),
            RequestRecord(2, 107.0, 40, 4, 0, 108.0, 109.0, 109.0),
        ]
    )
    run = Run(source="measured", workload="mine", model="m", device="d", gpus=1, topology="both=1")
    write_report(tmp_path / "report.json", LoadReport.of(records, run), records)
    workload = read_workload(str(tmp_path / "report.json"))
    assert workload.name == "the requests of mine"
    assert list(workload.requests) == [WorkRequest(20, 1, 0.0), WorkRequest(30, 3, 2.0), WorkRequest(40, 4, 2.0)]
    write_report(tmp_path / "bare.json", LoadReport.of(records, run))
    with pytest.raises(ValueError, match="has no records of its requests"):
        read_workload(str(tmp_path / "bare.json"))


@pytest.mark.parametrize("line", [{"custom_id": "a", "body": {}}, {"prompt": "Hello"}, {"messages": []}])
def test_a_batch_file_needs_somebody_who_reads_texts(tmp_path, line):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"in\.jsonl is a batch file.*: name a model"):
        read_workload(str(path))
    mine = Workload("mine", [WorkRequest(1, 1, 0.0)])
    assert read_workload(str(path), lambda given: mine if given == str(path) else None) is mine


def test_a_decision_log_is_no_load(tmp_path):
    (tmp_path / "run.log").write_text('{"format":"twinmesh decision log","version":4}\n')
    with pytest.raises(ValueError, match="is a decision log, not a load: 'twinmesh whatif'"):
        read_workload(str(tmp_path / "run.log"))


OPEN = "input=5,output=5,seconds=10"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poison:rate=1", "there is no file 'poison', and no generator of that name: the nearest generator is poisson"),
        ("xyz", "no generator of that name: generators are poisson, gamma"),
        (f"poisson:{OPEN}", "rate= is missing"),
        (f"poisson:rate=0,{OPEN}", "rate=0 is not usable: it must be a number above 0"),
        (f"poisson:rate=-1,{OPEN}", "rate=-1 is not usable"),
        (f"poisson:rate=nan,{OPEN}", "rate=nan is not usable"),
        (f"poisson:rate=inf,{OPEN}", "rate=inf is not usable"),
        (f"poisson:rate=1,rate=2,{OPEN}", "rate is there twice"),
        (f"poisson:rate,{OPEN}", "'rate' is no key=value"),
        (f"poisson:rate=1,cv=2,{OPEN}", "there is no cv="),
        (f"poisson:rat=1,rate=1,{OPEN}", "there is no rat=: the nearest is rate="),
        ("poisson:rate=1,input=5,output=5", "seconds= is missing"),
        ("poisson:rate=1,seconds=5,output=5", "input= is missing"),
        ("poisson:rate=1,seconds=5,output=5,input=9-3", "input=9-3 is not usable: give a whole number"),
        ("poisson:rate=1,seconds=5,output=0,input=9", "output=0 is not usable"),
        ("poisson:rate=1,requests=1.5,output=1,input=9", "requests=1.5 is not usable: it must be a whole number"),
        (f"gamma:rate=1,cv=-1,{OPEN}", "cv=-1 is not usable: it must be a number, 0 or more"),
        (f"diurnal:rate=1,depth=2,{OPEN}", "depth=2 is not usable: it must be a number above 0 and at most 1"),
        ("ramp:rate=1,to=2,requests=5,input=1,output=1", "seconds= is missing"),
        ("closed:concurrency=0,requests=5,input=1,output=1", "concurrency=0 is not usable"),
        ("agents:lanes=2,turns=2,tool=1,input=1,output=1", "conversations= is missing"),
        ("poisson:rate=0.0001,input=5,output=5,seconds=1", "no request comes in that time"),
        (f"poisson:rate=5,{OPEN},faster=0", "faster=0 is not usable"),
        (f"poisson:rate=5,{OPEN},copies=0", "copies=0 is not usable"),
    ],
)
def test_a_load_that_means_nothing_is_refused_in_a_sentence(text, message):
    with pytest.raises(ValueError, match="load ") as error:
        read_workload(text)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_that_is_not_there_is_the_system_s_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_workload(str(tmp_path / "nowhere.csv"))


KEYS = (
    "rate",
    "seconds",
    "requests",
    "input",
    "output",
    "cv",
    "to",
    "think",
    "turns",
    "lanes",
    "conversations",
    "limit",
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(GENERATORS)),
    st.lists(
        st.tuples(st.sampled_from(KEYS), st.sampled_from(["1", "2", "0", "-1", "1-3", "x", "", "1e9", "5=5"])),
        max_size=7,
    ),
)
def test_no_options_end_in_a_traceback(name, options):
    text = f"{name}:{','.join(f'{key}={value}' for key, value in options)},limit=3"
    try:
        found = list(read_workload(text).requests)
    except ValueError as error:
        found = str(error)
    assert len(found) <= 3 or found.startswith("load ")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("poisson:rate=1e12,input=10,output=2,seconds=5", "5e+12 requests are more than"),
        ("poisson:rate=1,input=10,output=2,seconds=1e18", "seconds=1e18 is not usable"),
        ("spike:rate=2,factor=1e18,begin=0,length=60,input=5,output=5,seconds=20", "requests are more than"),
        ("spike:rate=1e300,factor=1e300,begin=0,length=60,input=5,output=5,seconds=20", "requests are more than"),
        ("ramp:rate=0.1,to=1e12,input=5,output=5,seconds=20", "1e+13 requests are more than"),
        ("diurnal:rate=1,input=5,output=5,seconds=100,period=1e-9", "period=1e-9 is not usable"),
        ("closed:concurrency=1,requests=1000000000000,input=5,output=5", "requests are more than"),
        ("sessions:rate=1e10,turns=2,think=1,input=5,output=5,seconds=9", "requests are more than"),
        ("agents:lanes=1000000000000,conversations=2,turns=2,tool=1,input=5,output=5", "requests are more than"),
        ("poisson:rate=1,input=5,output=5,requests=5,copies=1000000000", "copies=1000000000 of 5 requests"),
    ],
)
def test_what_would_never_end_is_refused_at_once(text, what):
    with pytest.raises(ValueError, match=what.replace("+", r"\+")):
        read_workload(text)


def test_as_many_requests_as_a_rate_and_a_time_allow_are_made():
    for text in ("poisson:rate=100,seconds=1e9,requests=3", "spike:rate=1,factor=5,begin=1,length=2,seconds=10"):
        assert list(read_workload(f"{text},input=5,output=5").requests)


def test_a_compressed_trace_is_to_be_unpacked(tmp_path):
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(TRACE.encode())[:60])
    with pytest.raises(ValueError, match="is compressed: unpack it first"):
        read_workload(str(path))


def test_a_line_without_a_field_says_which_there_have_to_be(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 10, "output_length": 5}\n')
    with pytest.raises(ValueError, match=r"line 1: .*hash_ids.*: give an object with timestamp"):
        read_workload(str(path))
