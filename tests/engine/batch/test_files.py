"""Files that are replaced, and names that are compared."""

from twinmesh.engine.batch.files import is_inside, is_same


def test_names_of_one_file_are_the_same_whether_it_is_there_or_not(tmp_path):
    (tmp_path / "there").touch()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "hard").hardlink_to(tmp_path / "there")
    assert is_same(tmp_path / "there", tmp_path / "link")
    assert is_same(tmp_path / "there", tmp_path / "hard")
    assert is_same(tmp_path / "missing", tmp_path / "x" / ".." / "missing")
    assert not is_same(tmp_path / "there", tmp_path / "missing")


def test_a_file_is_inside_a_directory_also_through_a_link(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    assert is_inside(tmp_path / "link" / "new", tmp_path / "model")
    assert not is_inside(tmp_path / "model.jsonl", tmp_path / "model")
    assert not is_inside(tmp_path / "missing" / "new", tmp_path / "missing")
