"""`twinmesh explain` and `twinmesh whatif`, from a log to what they print."""

import json

import pytest
from helpers.logged_runs import config_of, engine_of, mixed_load, simulated
from twinmesh.scripts.cli import main


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "run.log"
    path.write_text(simulated(engine_of(config_of("both=2")), mixed_load(12))[0])
    return str(path)


def test_explain_prints_parts_that_add_up(log, capsys):
    assert main(["explain", log, "--worst", "2", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["ttft"] >= second["ttft"]
    assert sum(first["parts"].values()) == pytest.approx(first["ttft"])
    assert main(["explain", log, "--request", str(first["request_id"])]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"request {first['request_id']}: first token after {1000 * first['ttft']:,.1f} ms")
    assert "utilisation meanwhile" in page


def test_whatif_prints_its_own_error_and_the_other_topology(log, capsys):
    assert main(["whatif", log, "--topology", "prefill=1,decode=1", "--slo", "ttft=500ms", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["otherwise"]["run"]["topology"] == "prefill=1,decode=1"
    assert abs(found["errors"]["TTFT P50"]) < 0.05
    assert main(["whatif", log]) == 0
    page = capsys.readouterr().out
    assert "error" in page
    assert "change" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "LOG", "--request", "99"], "has no request 99"),
        (["explain", "LOG", "--worst", "0"], "--worst"),
        (["whatif", "LOG", "--slo", "ttft=500"], "write ttft=500ms"),
        (["whatif", "LOG", "--topology", "both=1xtp2"], "of tp 1"),
        (["whatif", "LOG", "--policy", "best"], "best"),
        (["whatif", "LOG", "--profile", "LOG"], "is no profile"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(log, arguments, message, capsys):
    try:
        code = main([log if argument == "LOG" else argument for argument in arguments])
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
