"""Costs from published peaks: at full efficiency they are the floors that were published."""

from dataclasses import replace

import pytest
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.protocol.actions import Chunk, DecodeRow
from twinmesh.engine.scheduler.cost_model import HostCost
from twinmesh.engine.simulation.costs.devices import DEVICES, device_named
from twinmesh.engine.simulation.costs.roofline import USUAL, Efficiency, layer_weights, roofline, share_read
from twinmesh.engine.topology import Topology
from twinmesh.models.config import Experts
from twinmesh.models.families.known import known_config, known_model

# Weights and KV at the peak bandwidth and nothing else, which is what a floor means.
FLOOR = Efficiency(1.0, 1.0, 1.0, kernels_of_layer=0.0, transfer=0.0, host=HostCost())


def make_config(topology="both=1", **changes):
    buckets = dict(prefill_buckets=(512, 8192), decode_buckets=(1, 32, 128, 256), max_num_seqs=256)
    return EngineConfig(Topology.parse(topology), 16384, dtype="bfloat16", **(buckets | changes))


def decode_ms(costs, rows, context=1024):
    return 1e3 * costs.decode_steps(rows, [DecodeRow(i, 0, i, context) for i in range(rows)])


@pytest.mark.parametrize(("model", "floors"), [("qwen3-8b", (4.56, 5.96, 10.3)), ("llama-3.1-8b", (4.52, 5.76, 9.6))])
def test_floors_of_decode_are_those_published_within_half_a_percent(model, floors):
    costs = roofline(known_config(model), make_config(), device_named("h100"), FLOOR)
    assert [decode_ms(costs, rows) for rows in (1, 32, 128)] == pytest.approx(floors, rel=0.005)


@pytest.mark.parametrize(("model", "milliseconds"), [("qwen3-8b", 225), ("llama-3.1-8b", 222)])
def test_prefill_at_sixty_percent_of_the_peak(model, milliseconds):
    costs = roofline(known_config(model), make_config(), device_named("h100"), FLOOR._replace(flops=0.6))
    assert 1e3 * costs.prefill_step(8192, [Chunk(0, 0, 0, 0, 8192, 0, True)]) == pytest.approx(milliseconds, rel=0.005)


@pytest.mark.parametrize(("rows", "published"), [(1, 7.22), (2, 7.30), (4, 7.40), (8, 7.67)])
def test_usual_efficiency_is_near_a_measured_tpot(rows, published):
    config = make_config(decode_buckets=(1, 2, 4, 8, 256))
    costs = roofline(known_config("qwen3-8b"), config, device_named("H100"))
    assert decode_ms(costs, rows) == pytest.approx(published, rel=0.02)


def test_tensor_parallelism_divides_the_work_and_adds_all_reduces():
    model, device = known_config("llama-3.1-70b"), device_named("h100")
    one, four = (roofline(model, make_config(f"both=1xtp{tp}"), device) for tp in (1, 4))
    assert decode_ms(one, 1) / 4 < decode_ms(four, 1) < decode_ms(one, 1) / 2
    assert four.prefill[8192].pair == pytest.approx(one.prefill[8192].pair / 4)


def test_layers_with_a_window_read_no_more_than_it():
    costs = roofline(known_config("gemma-3-27b"), make_config(), device_named("h200"))
    grown = decode_ms(costs, 1, 16000) - decode_ms(costs, 1, 2000)
    whole = 2 * 62 * 16 * 128 * 2 * 14000 / (USUAL.bandwidth * 4.8e12) * 1e3  # all 62 layers; 10 have no window
    assert grown == pytest.approx(whole * 10 / 62)


def test_a_step_multiplies_by_the_chosen_experts_and_reads_those_of_all_its_tokens():
    dense = known_config("llama-3.1-8b")
    model = replace(dense, experts=Experts(16, 4))
    mlp, layers = 3 * model.hidden_size * model.intermediate_size, model.num_layers
    router = 16 * model.hidden_size
    assert layer_weights(model) - layer_weights(dense) == layers * (3 * mlp + router)
    assert [share_read(model, tokens) for tokens in (1, 2, 1000)] == pytest.approx([4 / 16, 7 / 16, 1])
    assert share_read(dense, 1) == 1


@pytest.mark.parametrize(
    ("model", "floors"), [("gpt-oss-20b", (1.11, 3.99, 4.84)), ("gpt-oss-120b", (1.51, 12.9, 20.4))]
)
def test_floors_of_experts_in_mxfp4_are_those_published_within_two_percent(model, floors):
    config, formats = known_model(model)
    costs = roofline(config, make_config(), device_named("h100"), FLOOR, formats)
    assert [decode_ms(costs, rows) for rows in (1, 32, 128)] == pytest.approx(floors, rel=0.02)
    whole = roofline(config, make_config(), device_named("h100"), FLOOR)
    assert decode_ms(whole, 128) > 2.5 * decode_ms(costs, 128)


def test_a_fused_engine_has_fused_steps_that_cost_more_than_prompts_alone():
    costs = roofline(known_config("llama-3.1-8b"), make_config("both(mode=fused)=1"), device_named("h100"))
    assert costs.fused.keys() == costs.prefill.keys()
    assert costs.fused[8192].fixed > costs.prefill[8192].fixed


def test_newer_devices_are_faster():
    model = known_config("llama-3.1-8b")
    times = [decode_ms(roofline(model, make_config(), device), 32) for device in DEVICES.values()]
    assert times == sorted(times, reverse=True)


def test_an_unknown_device_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="'h10' is not known: the devices are h100, h200, b200; the nearest is 'h100'"):
        device_named("h10")
