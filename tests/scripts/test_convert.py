"""`twinmesh convert`: the command over what `tests/models/checkpoints/test_orbax.py` covers."""

from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.scripts.cli import main


def test_it_converts_and_prints_the_directory(tiny_path, tmp_path, capsys):
    target = tmp_path / "out"
    assert main(["convert", str(tiny_path), str(target), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr()
    assert out.out == f"{target}\n"
    assert out.err == ""  # no terminal, and no ten seconds
    assert open_checkpoint(target).dtype == "bfloat16"


def test_the_dtype_is_the_checkpoints_own_where_none_is_asked_for(tiny_path, tmp_path):
    assert main(["convert", str(tiny_path), str(tmp_path / "out")]) == 0
    assert open_checkpoint(tmp_path / "out").dtype == "float32"


def test_what_is_wrong_is_one_sentence(tiny_path, tmp_path, capsys):
    assert main(["convert", str(tiny_path), str(tmp_path)]) == 0
    assert main(["convert", str(tiny_path), str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(
        f"twinmesh: {tmp_path} exists and is not an empty directory: give another name.\n"
    )
    assert main(["convert", "gpt5", str(tmp_path / "out")]) == 2
    assert "no model named 'gpt5'" in capsys.readouterr().err


def test_what_is_not_finite_is_not_rounded(tiny_path, tmp_path, capsys):
    arguments = ["convert", str(tiny_path), str(tmp_path / "out"), "--quantize", "mxfp4", "--allow-nonfinite"]
    assert main(arguments) == 2
    assert "cannot be rounded to mxfp4 with allow_nonfinite: NaN and" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
