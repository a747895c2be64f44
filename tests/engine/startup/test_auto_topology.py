"""topology="auto" on devices of this machine and on ones that are not there: which meshes, which roles, and why."""

from dataclasses import dataclass

import jax
import pytest
from helpers.core_engine import greedy, make_engine, model_with_windows
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.sizing.device_memory import Share
from twinmesh.engine.startup.auto_topology import choose_topology
from twinmesh.models.decoder import abstract_params
from twinmesh.models.families.known import known_config

H100, TARGET = "NVIDIA H100 80GB HBM3", SLO(ttft_ms=1000, tpot_ms=50)


@dataclass(frozen=True)
class Device:
    """What is asked of a device."""

    device_kind: str = H100
    platform: str = "gpu"
    memory: int | None = 72 * 10**9  # 0.9 of the card, as JAX's allocator reports it

    def memory_stats(self):
        return None if self.memory is None else {"bytes_limit": self.memory, "bytes_in_use": 0}


H200 = Device("NVIDIA H200", memory=127 * 10**9)


def chosen(model="llama-3.1-8b", count=8, device=None, slo=TARGET, formats=None, is_for_one=False, **options):
    asked = EngineOptions(model, topology="auto", slo=slo, **options)
    devices = [device or Device()] * count
    return choose_topology(
        asked, known_config(model), "bfloat16", devices, Share(0.9), formats or {}, is_for_one=is_for_one
    )


def test_a_small_model_gets_a_pool_of_single_devices_whose_roles_are_planned():
    found = chosen()
    assert found.options.topology == "pool=8"
    assert found.options.slo == SLO(ttft_ms=1000, tpot_ms=50, percentile=99)
    assert found.options.roles is not None
    assert sum(int(part.split("=")[1]) for part in found.options.roles.split(",")) == 8
    assert "fits at tp 1" in found.why
    assert "\n" not in found.why


def test_a_model_that_one_device_cannot_hold_gets_the_fewest_that_can():
    assert chosen("llama-3.1-70b").options.topology in ("pool=4xtp2", "pool=2xtp4")
    assert chosen("llama-3.1-70b", count=4).options.topology in ("pool=2xtp2", "both=1xtp4")


def test_devices_that_make_no_mesh_stay_idle_and_the_line_says_so():
    found = chosen("llama-3.1-70b", count=3, device=H200)
    assert found.options.topology == "both=1xtp2"
    assert "llama-3.1-70b fits at tp 2 and leaves 1 of them idle" in found.why
    given = [H200] * 7
    assert chosen("llama-3.1-70b", count=7, device=H200, devices=given).options.devices == given[:6]
    assert "idle" not in chosen("llama-3.1-8b", count=3, is_for_one=True).why


def test_weights_that_stay_quantised_count_with_their_own_bytes():
    model = known_config("llama-3.1-70b")
    matrices = [path for path, spec in abstract_params(model, "bfloat16").specs.items() if len(spec.axes) > 1]
    formats = dict.fromkeys(matrices, "Q4_0")
    assert chosen("llama-3.1-70b", count=1, formats=formats, quantization="keep").options.topology == "both=1"
    with pytest.raises(ValueError, match=r"llama-3.1-70b does not fit at tp 1"):  # without a kernel they are floats
        chosen("llama-3.1-70b", count=1, formats=formats)


def test_without_a_target_all_meshes_do_both():
    found = chosen(slo=None)
    assert (found.options.topology, found.options.roles, found.options.slo) == ("pool=8", None, None)
    assert "without an SLO" in found.why


def test_a_device_of_unknown_speed_begins_with_all_meshes_doing_both():
    found = chosen(device=Device("NVIDIA T1000"), model="llama-3.1-8b")
    assert (found.options.topology, found.options.roles) == ("pool=8", None)
    assert "nothing is known" in found.why


def test_one_device_does_both():
    assert chosen(count=1).options.topology == "both=1"


def test_a_model_that_fits_nowhere_is_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"GiB of weights.* of KV for one request.* and there are .*: tp 4 fits"):
        chosen("llama-3.1-70b", count=1)


def test_cpu_devices_are_one_mesh_unless_they_are_given():
    cpu = Device("cpu", "cpu", None)
    assert chosen(device=cpu).options.topology == "both=1"
    given = chosen(device=cpu, devices=[cpu] * 4, count=4, kv_cache_bytes=1 << 30)
    assert given.options.topology == "pool=4"


def test_roles_are_not_given_beside_it():
    with pytest.raises(ValueError, match="leave one of the two out"):
        EngineOptions("m", topology="auto", roles="both=2")


def test_an_engine_starts_with_it_and_answers():
    model = model_with_windows(None)
    devices = jax.devices()[:1] * 2  # whose meshes share programs
    with make_engine(model, "auto", devices=devices, kv_cache_bytes=1 << 20, slo=TARGET) as llm:
        assert str(llm.config.topology) == "pool=2"
        assert llm.config.plans_roles
        (output,) = llm.generate([5, 6, 7], greedy(4))
        assert len(output.outputs[0].token_ids) == 4
