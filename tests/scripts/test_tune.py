"""The tuner with made-up times, and its kernels traced; nothing is timed."""

import functools
import json

import jax
import numpy as np
import pytest
from twinmesh.kernels_pallas.tiles import DecodeTiles, PrefillTiles
from twinmesh.scripts import tune
from twinmesh.scripts.gpu.timing import Heads, queries

OTHER = ["decode", "sm_90", 256, 2, 16, 8192, [512, 2]]


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({"in use": 100.0, "a": 97.0, "b": 90.0}, "b"),
        ({"in use": 100.0, "a": 98.5, "b": 120.0}, None),  # within the margin
        ({"in use": 100.0, "a": 98.0, "b": 120.0}, None),
        ({"in use": None, "a": 300.0, "b": 200.0}, "b"),  # what is in use does not compile
        ({"in use": 100.0, "a": None, "b": None}, None),
        ({"in use": None, "a": None, "b": None}, None),
    ],
)
def test_tiles_are_worth_a_row_where_they_are_clearly_faster(times, best, capsys):
    def measure(choice):
        if times[choice] is None:
            raise ValueError("Mosaic GPU kernel exceeds available shared memory\nmore")
        return times[choice]

    assert tune.best_of("decode", ["a", "b"], "in use", measure) == best
    said = capsys.readouterr().out
    assert said.count("\n") == 3
    assert "more" not in said


def faster(which, factor):
    """Times in which some tiles take `factor` of all others' time."""
    return lambda heads, cache, *arguments: factor if arguments[-1].keywords["tiles"] == which else 1.0


def test_a_row_replaces_that_of_the_same_key_and_leaves_the_others(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    old = ["prefill", "sm_90", 64, 2, 64, 2048, [64, 2]]
    path.write_text(json.dumps([OTHER, old]))
    monkeypatch.setattr(tune, "time_decode", faster(DecodeTiles(256, 3), 0.5))
    monkeypatch.setattr(tune, "time_prefill", faster(PrefillTiles(256, 4), 0.9))
    monkeypatch.setattr(tune, "cached", lambda *_, **__: None)
    tune.run([(4, 2, 64)], [64], [300], 132, path)
    rows = json.loads(path.read_text())
    assert rows == [
        ["decode", "sm_90", 64, 2, 64, 2048, [256, 3]],
        OTHER,
        ["prefill", "sm_90", 64, 2, 64, 2048, [256, 4]],
    ]
    assert path.read_text().count("\n") == 5
    # Nothing is faster than what is in use by more than the margin: the table stays as it is.
    monkeypatch.setattr(tune, "time_decode", faster(DecodeTiles(256, 3), 0.9))
    monkeypatch.setattr(tune, "time_prefill", faster(PrefillTiles(128, 2), 0.985))
    tune.run([(4, 2, 64)], [64], [300], 132, path)
    assert json.loads(path.read_text()) == rows


def test_what_is_in_use_is_the_row_of_the_table_that_is_tuned(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    rows = [["decode", "sm_90", 64, 2, 64, 2048, [256, 3]], ["prefill", "sm_90", 64, 2, 64, 2048, [64, 4]]]
    path.write_text(json.dumps(rows))
    monkeypatch.setattr(tune, "time_decode", faster(DecodeTiles(256, 3), 0.5))
    monkeypatch.setattr(tune, "time_prefill", faster(PrefillTiles(64, 4), 0.985))
    monkeypatch.setattr(tune, "cached", lambda *_, **__: None)
    in_use = []
    best_of = tune.best_of
    monkeypatch.setattr(tune, "best_of", lambda *args: in_use.append(args[2]) or best_of(*args))
    tune.run([(4, 2, 64)], [64], [300], 132, path)
    assert in_use == [DecodeTiles(256, 3), PrefillTiles(64, 4)]
    assert json.loads(path.read_text()) == rows


def test_a_combination_that_does_not_fit_the_memory_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiles.json"
    path.write_text("[]")

    def cached(heads, lengths, *, most_bytes):
        if len(lengths) > 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setattr(tune, "time_prefill", faster(PrefillTiles(256, 4), 0.5))
    monkeypatch.setattr(tune, "cached", cached)
    tune.run([(4, 2, 64)], [64], [300], 132, path)
    assert "decode 4/2x64p64 300: RuntimeError: RESOURCE_EXHAUSTED: out of memory\n" in capsys.readouterr().out
    assert json.loads(path.read_text()) == [["prefill", "sm_90", 64, 2, 64, 2048, [256, 4]]]


def test_an_empty_table_is_an_empty_list(tmp_path):
    assert json.loads(tune.table_text({})) == []


def test_the_kernels_take_all_that_the_tuner_gives_them(monkeypatch):
    seen = []

    def traced(heads, cache, *arguments):
        *chunks, attention = arguments
        seen.append(attention.keywords["tiles"])
        starts = [np.cumsum([0, *chunks[0]]).astype(np.int32)] if chunks else []
        q = queries(heads, sum(chunks[0]) if chunks else len(cache.kv_len))
        out = jax.eval_shape(functools.partial(attention, scale=0.1), q, *cache.layer(0), *starts)
        assert out.shape == q.shape
        return 1.0

    monkeypatch.setattr(tune, "time_decode", traced)
    monkeypatch.setattr(tune, "time_prefill", traced)
    heads = Heads(2, 1, 64)
    assert tune.tune_decode(heads, 70, 132, None) is None
    assert tune.tune_prefill(heads, 70, 132, None) is None
    assert len(seen) == len(set(seen)) == 16 + 12
    assert {type(each) for each in seen} == {DecodeTiles, PrefillTiles}


def test_without_a_hopper_gpu_it_says_so(capsys, monkeypatch):
    cpus = jax.local_devices(backend="cpu")
    monkeypatch.setattr(tune.jax, "devices", lambda: cpus)  # on a GPU it would begin
    assert tune.main([]) == 2
    assert "JAX's first device is 'cpu', not a Hopper GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--heads", "32,8"],
            "'32,8' must be three numbers: query heads, key/value heads, head_dim, such as 32,8,128.",
        ),
        (["--heads", "32,x,64"], "'32,x,64' must be whole numbers with commas between them."),
        (["--heads", "32,8,96"], "has head_dim 96: it must be one of (64, 128, 256)."),
        (["--heads", "9,2,64"], "query heads must be a multiple of the key/value heads"),
        (["--heads", "128,1,64"], "up to 64 times as many"),
        (["--page-sizes", "64,48"], "page size 48: it must be one of (16, 32, 64, 128)."),
        (["--lengths", "0"], "length 0: it must be 1 to 131072 tokens."),
        (["--lengths", "1000,9000,2000"], "lengths 1000 and 2000 are of one class, up to 2048 tokens"),
        (["--table", "/no/such.json"], "there is no such file"),
    ],
)
def test_bad_arguments_get_one_clear_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert message in capsys.readouterr().err
