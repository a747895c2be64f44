"""A batch run that commit efd1214 began, kept as files: it goes on, and what makes it another run is named.

In a checkout of that commit `files = BatchFiles(Path("."))` ran `LINES` with `defaults=DEFAULTS`, `engine=ENGINE` and
`FakeLLM(interrupt_after=4, fail="bad")`, four requests at a time, into `fixtures/batch_efd1214`.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from helpers.batch_files import BatchFiles
from helpers.fake_llm import FakeLLM
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.batch.identity import Identity
from twinmesh.engine.batch.result_lines import line_number

FIXTURE = Path(__file__).parents[2] / "fixtures" / "batch_efd1214"
DEFAULTS = SamplingParams(temperature=0.5, max_tokens=8, stop=["#"], logit_bias={5: 1.5, 7: float("-inf")}, seed=3)
ENGINE = {"dtype": "auto", "deterministic": False}


@pytest.fixture
def files(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "run")
    return BatchFiles(tmp_path / "run")


def go_on(files, llm=None, **changes):
    return files.run(llm=llm, **({"defaults": DEFAULTS, "engine": ENGINE} | changes))


def test_it_goes_on_and_computes_only_what_is_missing(files):
    before, llm = files.target.read_bytes(), FakeLLM()
    result = go_on(files, llm)
    assert (result.resumed, result.mended, result.finished, result.failed) == (5, 0, 7, 2)
    assert len(llm.sampling) == 2
    assert files.target.read_bytes().startswith(before)
    assert sorted(line_number(line) for line in files.read()) == list(range(1, 8))


def test_its_errors_are_retried_and_its_torn_line_is_mended(files):
    files.target.write_bytes(files.target.read_bytes()[:-9])
    llm = FakeLLM()
    result = go_on(files, llm, retry_errors=True)
    assert (result.mended, result.retried, result.failed) == (1, 1, 1)  # the torn line was an error, too
    assert {line["custom_id"] for line in files.read() if line["error"]} == {"line-4"}


def test_ids_of_its_responses_and_of_those_that_follow_differ(files):
    go_on(files)
    ids = [line["response"]["body"]["id"] for line in files.read() if line["response"]]
    assert len(ids) == len(set(ids)) == 5


def test_it_can_be_finished_as_parquet_is_by_its_journal(files):
    """A Parquet run's results are lines like these until it is done."""
    target = files.target.with_name("out.parquet")
    files.target.rename(target.with_name("out.parquet.jsonl"))
    files.target.with_name("out.jsonl.run").rename(target.with_name("out.parquet.run"))
    assert go_on(replace(files, output_name="out.parquet")).resumed == 5
    assert target.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"defaults": replace(DEFAULTS, temperature=0.0)}, "temperature=0.5 instead of 0.0"),
        ({"defaults": replace(DEFAULTS, stop=None)}, r"stop=\['#'\] instead of \[\]"),
        ({"engine": ENGINE | {"dtype": "float32"}}, "dtype='auto' instead of 'float32'"),
        ({"engine": ENGINE | {"speculation": 4}}, "speculation=None instead of 4"),
    ],
)
def test_what_makes_it_another_run_is_named(files, changes, says):
    before = files.target.read_bytes()
    with pytest.raises(ValueError, match=rf"holds results of another run \({says}\)"):
        go_on(files, **changes)
    assert files.target.read_bytes() == before


@pytest.mark.parametrize("name", ["tiny.gguf", "in.jsonl"])
def test_another_model_or_input_is_named(files, name):
    with (files.folder / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(ValueError, match=rf"another run \(another {'model' if 'gguf' in name else 'input'}\)"):
        go_on(files)


@dataclass(frozen=True)
class LaterParams(SamplingParams):
    """As a later version would have them."""

    novelty: float = 0.0


def test_a_way_of_sampling_that_it_did_not_know_is_as_if_it_had_been_left_alone(files, monkeypatch):
    monkeypatch.setattr("twinmesh.engine.batch.identity.SamplingParams", LaterParams)
    sidecar = files.target.with_name("out.jsonl.run")

    def differences(**changes):
        given = {name: getattr(DEFAULTS, name) for name in DEFAULTS.__dataclass_fields__} | changes
        then = json.loads(sidecar.read_text())
        return Identity.of(files.model, then["input"], LaterParams(**given), ENGINE).differences(sidecar)

    assert differences() == []
    assert differences(novelty=0.5) == ["novelty=0.0 instead of 0.5"]


def test_a_way_of_sampling_that_is_gone_matters_unless_it_was_left_alone(files):
    sidecar = files.target.with_name("out.jsonl.run")
    then = json.loads(sidecar.read_text())
    then["sampling"] |= {"gone": None}
    sidecar.write_text(json.dumps(then))
    assert go_on(files).resumed == 5
    then["sampling"] |= {"gone": 3}
    sidecar.write_text(json.dumps(then))
    with pytest.raises(ValueError, match="gone=3 instead of None"):
        go_on(files)
