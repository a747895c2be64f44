"""Roles of a pool as they are written: what is read, and one sentence for everything that is not."""

import pytest
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.roles import Goal, as_text, read_goal, starting_roles, uncovered
from twinmesh.engine.topology import MeshSpec, Role, Topology, TopologyError

POOL = Topology.parse("pool=4xtp1")
P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH


def test_counts_and_meshes_are_read():
    assert read_goal("prefill=1, decode=3", POOL) == Goal(counts={P: 1, D: 3})
    assert read_goal({2: "both", 0: "decode"}, POOL) == Goal(meshes={0: D, 2: B})
    assert as_text([D, P, D, D]) == "prefill=1,decode=3"


def test_a_pool_begins_in_the_order_written_and_by_default_its_meshes_do_both():
    assert starting_roles("decode=1,prefill=3", POOL) == (D, P, P, P)
    assert starting_roles(None, POOL) == (B,) * 4
    assert starting_roles(None, Topology.parse("both=2")) == ()


def test_a_phase_without_a_mesh_is_named():
    assert uncovered([P, P]) == "decode"
    assert uncovered([D]) == "prefill"
    assert uncovered([B]) is uncovered([P, D]) is None


@pytest.mark.parametrize(
    ("roles", "sentence"),
    [
        ("prefill=4", "leave no mesh to decode"),
        ("decode=4", "leave no mesh to prefill"),
        ("prefill=1,decode=2", "are of 3 meshes and the pool has 4"),
        ("prefill=1,prefill=3", "one count of 1 or more for each role"),
        ("prefill=0,decode=4", "one count of 1 or more for each role"),
        ("prefil=1,decode=3", "no role 'prefil'"),
        ("pool=4", "no role 'pool'"),
        ("prefill", "not readable at 'prefill'"),
        ("prefill=1xtp2,decode=3", "not readable at 'prefill=1xtp2'"),
        ("decode(mode=fused)=1,both=3", "only both has modes"),
        ("both(mode=fused)=4", "programs of fused steps"),
        ({4: "prefill"}, "mesh 4, which is not in the pool: its meshes are 0 to 3"),
        ({"0": "prefill"}, "mesh '0', which is not in the pool"),
        ({True: "prefill"}, "mesh True, which is not in the pool"),
        ({0: "idle"}, "mesh 0: there is no role 'idle'"),
        ({0: ["both"]}, "there is no role"),
        ({}, "name no mesh"),
        (4, "roles 4 are not usable"),
    ],
)
def test_roles_that_cannot_be_are_refused_in_one_sentence(roles, sentence):
    with pytest.raises(TopologyError, match=sentence) as error:
        read_goal(roles, POOL)
    assert str(error.value).count(". ") == 0
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("topology", ["both=2", "prefill=1,decode=1"])
def test_roles_of_what_is_no_pool_stay(topology):
    with pytest.raises(TopologyError, match="is no pool, so its roles stay"):
        read_goal("both=2", Topology.parse(topology))
    with pytest.raises(TopologyError, match="goes with a pool"):
        EngineOptions("m", topology=topology, roles="both=2")


def test_a_pool_is_of_one_kind_of_mesh_and_stands_alone():
    assert str(Topology.parse("pool=3xtp2")) == "pool=3xtp2"
    assert Topology.parse(str(Topology.parse("pool(mode=fused)=2"))).meshes[0].fused
    assert POOL.is_pool
    assert not Topology.parse("both=4").is_pool
    with pytest.raises(TopologyError, match="a pool beside other meshes"):
        Topology.parse("pool=2,decode=1")
    with pytest.raises(TopologyError, match="same tp and mode"):
        Topology((MeshSpec(Role.POOL, 1), MeshSpec(Role.POOL, 2)))


def test_only_a_pool_whose_roles_name_it_is_fused():
    fused = EngineOptions("m", topology="pool=2", roles="both(mode=fused)=1,decode=1").parsed_topology
    assert all(spec.fused for spec in fused.meshes)
    assert read_goal("both(mode=fused)=2", fused) == Goal(counts={B: 2})
    assert not any(spec.fused for spec in EngineOptions("m", topology="pool=2").parsed_topology.meshes)
    with pytest.raises(ValueError, match="deterministic=True does not go with"):
        EngineConfig(fused, 64, prefill_buckets=(16,), decode_buckets=(32,), deterministic=True)


@pytest.mark.parametrize("roles", [(P, P), (P,), (Role.POOL, D)])
def test_a_configuration_refuses_roles_that_do_not_fit(roles):
    with pytest.raises(TopologyError, match="roles"):
        EngineConfig(Topology.parse("pool=2"), 64, roles=roles)


@pytest.mark.parametrize("roles", [3, ["both"], b"both=1"])
def test_roles_of_another_type_are_refused(roles):
    with pytest.raises(ValueError, match="roles="):
        EngineOptions("m", topology="pool=1", roles=roles)
