"""Hub ids: what they mean, and what `huggingface_hub` says as one sentence. No network: its cache, or a stand-in."""

import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from twinmesh.models.checkpoints.catalog import resolve_model
from twinmesh.models.checkpoints.hub import HubModel, parse_hub_id
from twinmesh.models.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("org/name", HubModel("org/name", None, None)),
        ("Qwen/Qwen2.5-0.5B", HubModel("Qwen/Qwen2.5-0.5B", None, None)),
        ("org/name@v1.0", HubModel("org/name", "v1.0", None)),
        ("org/name@refs/pr/1", HubModel("org/name", "refs/pr/1", None)),
        ("org/name:Q4_K_M", HubModel("org/name", None, "Q4_K_M")),
        ("org/name@main:a-b.gguf", HubModel("org/name", "main", "a-b.gguf")),
        ("name", None),
        ("./name", None),
        ("../name", None),
        ("/org/name", None),
        ("a/b/c", None),
        ("org/na me", None),
        ("org/name:", None),
    ],
)
def test_what_is_written_as_an_id(text, model):
    assert parse_hub_id(text) == model
    assert model is None or str(model) == text


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An offline cache with one repository of safetensors and GGUF files."""
    folder = tmp_path / "models--org--name"
    snapshot = folder / "snapshots" / COMMIT
    (snapshot / "sub").mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "m-Q4_K_M.gguf", "m-q8_0.gguf", "m-Q2_K.gguf", "n-Q2_K.gguf"):
        (snapshot / file).write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_cached_model_is_found_offline(hub_cache):
    assert resolve_model("org/name") == hub_cache
    assert resolve_model(f"org/name@{COMMIT}") == hub_cache


def test_a_gguf_file_by_name_or_quantisation(hub_cache):
    assert resolve_model("org/name:m-Q4_K_M.gguf") == hub_cache / "m-Q4_K_M.gguf"
    assert resolve_model("org/name:q4_k_m") == hub_cache / "m-Q4_K_M.gguf"
    assert resolve_model("org/name:Q8_0") == hub_cache / "m-q8_0.gguf"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("org/name:Q2_K", r"org/name:Q2_K must mean one GGUF file and means m-Q2_K.gguf, n-Q2_K.gguf: give a file's"),
        ("org/name:none.gguf", r"org/name:none.gguf must mean one GGUF file and means none"),
        ("org/other", r"org/other is neither a file or directory here nor in the cache .* which was not reached\.$"),
        ("org/name@v2", r"org/name@v2 is neither .* not reached"),
        ("org/a--b", r"org/a--b is neither .* an id that the Hugging Face hub allows"),
    ],
)
def test_what_is_not_there_is_one_sentence(hub_cache, text, says):
    with pytest.raises(CheckpointError, match=says):
        resolve_model(text)


def test_a_repository_without_a_configuration(hub_cache):
    (hub_cache / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"org/name holds no config.json.*write org/name:FILE.gguf"):
        resolve_model("org/name")


def test_a_local_directory_of_that_name_wins(hub_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert str(resolve_model("org/name")) == "org/name"


def test_only_what_is_read_is_fetched(tmp_path, monkeypatch):
    files = [
        "config.json", "tokenizer.json", "chat_template.jinja", "model-00001-of-00002.safetensors", "merges.txt",
        "model.safetensors.index.json", "pytorch_model.bin", "consolidated.safetensors", "original/params.json",
        "onnx/model.onnx", "README.md", "tf_model.h5", "adapter_model.safetensors", "model-Q4_0.gguf",
    ]  # fmt: skip
    kept = []

    def snapshot_download(repo, *, revision, allow_patterns, ignore_patterns):
        kept.extend(
            huggingface_hub.utils.filter_repo_objects(
                files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/name") == tmp_path
    assert kept == files[:6]


def http(kind):
    response = SimpleNamespace(headers={}, status_code=404, request=None)
    return kind("404 Client Error.\n\nMore lines.", response=response)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (lambda: http(errors.GatedRepoError), "needs its licence to be accepted on the hub"),
        (lambda: http(errors.RepositoryNotFoundError), "nor a model that the Hugging Face hub shows to you"),
        (lambda: http(errors.RevisionNotFoundError), "has no revision 'v9'"),
        (lambda: http(errors.HfHubHTTPError), "could not be fetched from the Hugging Face hub: 404 Client Error"),
        (lambda: OSError(28, "No space left on device"), "could not be fetched .* No space left on device"),
    ],
)
def test_what_the_hub_answers_is_one_sentence(monkeypatch, error, says):
    def fail(*args, **options):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=f"^org/name@v9 .*{says}") as caught:
        resolve_model("org/name@v9")
    assert "\n" not in str(caught.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"need the package huggingface_hub: run: pip install 'twinmesh\[hub\]'"):
        resolve_model("org/name")
