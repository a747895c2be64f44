"""What the processes of one mesh have found becomes what the mesh has."""

import pytest
from helpers.tiny_mesh import tiny_config
from msgspec.structs import replace
from twinmesh.engine.startup.worker_part import Found, merge_found, read_found, to_bytes

FOUND = Found({"jax": "1"}, "cpu", "cpu", tiny_config("both=1xtp2"), 8, (100,), {}, "a")


def test_a_mesh_has_no_more_room_than_each_of_its_processes():
    merged = read_found(merge_found([to_bytes(FOUND), to_bytes(replace(FOUND, budgets=(90,), files="b"))]))
    assert merged == replace(FOUND, budgets=(90,), files="a b")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"versions": {"jax": "2"}}, "other versions than process 0 .*'2'.*'1'"),
        ({"device_kind": "NVIDIA H100"}, r"other devices than process 0 \(NVIDIA H100, and cpu\)"),
        ({"kept": {"layers.0.mlp.up_proj": "Q8_0"}}, "other quantised weights than process 0"),
    ],
)
def test_processes_that_are_not_alike_are_refused(change, said):
    with pytest.raises(ValueError, match=f"process 1 of one mesh has {said}.*: let the machines and the model's files"):
        merge_found([to_bytes(FOUND), to_bytes(replace(FOUND, **change))])
