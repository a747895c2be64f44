"""Topologies and configurations: what is accepted, and what a refusal says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.config import EngineConfig, bucket_for
from twinmesh.engine.topology import MeshSpec, Role, Topology, TopologyError

COUNT = st.integers(1, 9)


@given(st.booleans(), COUNT, COUNT, COUNT, COUNT)
def test_a_topology_reads_back_what_it_prints(colocated, n, k, m, j):
    text = f"both={n}xtp{k}" if colocated else f"decode={m}xtp{j}, prefill={n}xtp{k}"
    topology = Topology.parse(text)
    assert Topology.parse(str(topology)) == topology
    assert topology.num_devices == (n * k if colocated else n * k + m * j)


def test_prefill_meshes_come_first():
    roles = [spec.role for spec in Topology.parse("decode=1,prefill=2").meshes]
    assert roles == [Role.PREFILL, Role.PREFILL, Role.DECODE]
    assert Topology.parse("both=1xtp4").meshes == (MeshSpec(Role.BOTH, 4),)


def test_experts_are_divided_over_groups_of_a_meshs_devices():
    topology = Topology.parse("prefill=2xtp2ep2,decode=1xtp4ep1")
    assert topology.meshes == (MeshSpec(Role.PREFILL, 2, ep=2),) * 2 + (MeshSpec(Role.DECODE, 4),)
    assert (topology.num_devices, str(topology)) == (8, "prefill=2xtp2ep2,decode=1xtp4")


@given(st.text(alphabet="bothprefildc=,x0123456789 -", max_size=30))
def test_any_text_parses_or_is_refused_in_a_sentence(text):
    try:
        Topology.parse(text)
    except TopologyError as error:
        assert str(error).startswith("topology ")  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not readable at ''"),
        ("both", "not readable at 'both'"),
        ("both=1x2", "not readable at 'both=1x2'"),
        ("both=-1", "not readable"),
        ("both=\N{FULLWIDTH DIGIT ONE}", "not readable"),
        ("both=0", "start at 1"),
        ("both=70000", "at most 65536"),
        ("both=999xtp999", "at most 65536"),
        ("both=99999999999999999999999", "not readable"),
        ("both=1xtp0", "start at 1"),
        ("both=1xtp2ep0", "start at 1"),
        ("both=1ep2", "not readable at 'both=1ep2'"),
        ("both=1xtp4ep3", "divides 4 devices into 3 groups at 'both=1xtp4ep3': use an ep that divides tp"),
        ("encode=1,decode=1", "no role 'encode'"),
        ("prefill=1", "no decode mesh"),
        ("decode=1", "no prefill mesh"),
        ("both=1,decode=1", "mixes 'both'"),
        ("both=1,both=1", "names both twice"),
    ],
)
def test_bad_topologies_say_what_is_wrong(text, message):
    with pytest.raises(TopologyError, match=message):
        Topology.parse(text)


def test_a_topology_without_meshes_is_refused():
    with pytest.raises(TopologyError, match="no prefill mesh"):
        Topology(())


def config(**changes):
    return EngineConfig(**(dict(topology=Topology.parse("both=1"), max_model_len=100) | changes))


@given(st.integers(2, 5000), st.sampled_from([1, 16, 64]))
def test_handoff_buckets_hold_every_request_and_ascend(length, page_size):
    buckets = config(max_model_len=length, page_size=page_size).handoff_buckets
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == -(-length // page_size)
    for pages in range(1, buckets[-1] + 1, 7):
        bucket = bucket_for(pages, buckets)
        assert pages <= bucket < 4 * pages or bucket == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 0}, "page_size=0"),
        ({"max_model_len": 1.5}, "max_model_len=1.5"),
        ({"max_model_len": 1}, "2 or more"),
        ({"max_num_seqs": True}, "max_num_seqs=True"),
        ({"prefill_buckets": (64, 64)}, "prefill_buckets"),
        ({"decode_buckets": (0, 32)}, "decode_buckets"),
        ({"decode_buckets": (8,)}, "max_num_seqs=32"),
        ({"prefill_buckets": 64}, "prefill_buckets=64"),
        ({"prefill_buckets": ("a", "b")}, "prefill_buckets"),
        ({"prefill_buckets": (16.5,)}, "prefill_buckets"),
    ],
)
def test_bad_configurations_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
