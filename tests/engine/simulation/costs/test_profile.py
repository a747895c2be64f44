"""Profiles on file: what was written is read back, and one of something else is refused in a sentence."""

from dataclasses import replace

import msgspec
import pytest
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.scheduler.cost_model import CostModel, HostCost, LinkCost, ProgramCost
from twinmesh.engine.simulation.costs import profile as module
from twinmesh.engine.simulation.costs.profile import (
    Errors,
    check_profile,
    encode,
    profile_of,
    read_profile,
    write_profile,
)
from twinmesh.engine.topology import Topology

CONFIG = EngineConfig(Topology.parse("prefill=1xtp2,decode=1"), 1024, prefill_buckets=(64, 512), decode_buckets=(8, 32))
COSTS = CostModel(
    {64: ProgramCost(0.1), 512: ProgramCost(0.5, pair=1e-7)}, {8: ProgramCost(0.01), 32: ProgramCost(0.02, row=1e-3)},
    {}, LinkCost(1e-3, 1e-9), HostCost(step=1e-4),
)  # fmt: skip
PROFILE = profile_of(
    CONFIG, COSTS, model="tiny", device="some CPU, 2 cores", source="measured", date="2026-11-30",
    errors=[Errors("decode", 3, 0.02, 0.05)],
)  # fmt: skip


def test_it_is_read_as_it_was_written(tmp_path):
    write_profile(PROFILE, tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == PROFILE
    assert PROFILE.tp == (2, 1)
    check_profile(PROFILE, CONFIG, model="tiny", device="some CPU, 2 cores")


def test_an_interrupt_leaves_the_earlier_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    path.write_text("earlier")

    def stop(profile):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        write_profile(PROFILE, path)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\x00", "is no profile"),
        (b"[1, 2]", "is no profile"),
        (b'{"format": "other"}', "is no profile"),
        (encode(PROFILE).replace(b'"version": 1', b'"version": 7'), "of version 7"),
        (encode(PROFILE).replace(b'"page_size": 64', b'"page_size": "x"'), "is damaged"),
        (encode(PROFILE).replace(b'"fixed": 0.01,', b'"fixed": -0.01,'), "decode of 8: fixed is -0.01"),
        (encode(PROFILE).replace(b'"fixed": 0.01,', b'"fixed": 0.0,'), "decode of 8: a step takes no time"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path, content, why):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=why) as error:
        read_profile(tmp_path / "file")
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(model="other"), "another model: it has tiny, and other is asked for"),
        (dict(device="h100"), "another device"),
        (dict(config=replace(CONFIG, dtype="bfloat16")), "another dtype: it has float32"),
        (dict(config=replace(CONFIG, page_size=16)), "another page size"),
        (dict(config=replace(CONFIG, formats=("Q4_1",))), "another formats of quantised weights: it has none"),
        (dict(config=replace(CONFIG, topology=Topology.parse("both=1"))), "tp of prefill and decode: it has 2, 1"),
        (dict(config=replace(CONFIG, prefill_buckets=(64, 128, 512))), "no prefill steps of 128, only of 64, 512"),
    ],
)
def test_a_profile_of_something_else_is_refused(changes, why):
    wanted = dict(config=CONFIG, model="tiny", device="some CPU, 2 cores") | changes
    with pytest.raises(ValueError, match=why):
        check_profile(PROFILE, wanted.pop("config"), **wanted)


def test_a_fused_engine_needs_costs_of_fused_steps():
    config = replace(CONFIG, topology=Topology.parse("both(mode=fused)=1"))
    profile = msgspec.structs.replace(PROFILE, tp=(1, 1))
    with pytest.raises(ValueError, match="no fused steps of 64, 512, only of none"):
        check_profile(profile, config, model="tiny", device="some CPU, 2 cores")
