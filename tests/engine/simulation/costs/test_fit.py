"""Coefficients of a cost model from measured steps: known ones are found again from noisy times."""

import msgspec
import numpy as np
import pytest
from twinmesh.engine.scheduler.cost_model import ProgramCost
from twinmesh.engine.simulation.costs.fit import fit_costs, fit_host, fit_link, predicted
from twinmesh.engine.simulation.costs.measured import (
    Beside,
    Entered,
    HostWork,
    MeasuredStep,
    MeasuredTransfer,
    without_cold,
)

PREFILL = ProgramCost(fixed=0.2, chunk=0.004, pair=2e-7, beside_prefill=0.9, beside_decode=0.4)
DECODE = ProgramCost(fixed=0.01, row=0.0005, context=1e-7, beside_prefill=0.7, beside_decode=0.2)
HOST = 0.003  # what the host adds to a step of an idle mesh


def draw_steps(count, noise=0.0, seed=0):
    """Steps of both programs, alone and beside others, on meshes with work and on idle ones."""
    random = np.random.default_rng(seed)
    steps = []
    for index in range(count):
        kind = ("prefill", "decode")[index % 2]
        program = PREFILL if kind == "prefill" else DECODE
        chunks, rows = int(random.integers(1, 8)), int(random.integers(1, 32))
        counts = dict(chunks=chunks, pairs=int(random.integers(1e4, 1e6)), rows=0, context=0)
        if kind == "decode":
            counts = dict(chunks=0, pairs=0, rows=rows, context=rows * int(random.integers(50, 4000)))
        alone = (
            program.fixed + program.chunk * counts["chunks"] + program.pair * counts["pairs"]
            + program.row * counts["rows"] + program.context * counts["context"]
        )  # fmt: skip
        alone *= float(random.lognormal(-noise * noise / 2, noise))
        is_queued, others, part = index % 5 != 0, (index // 2) % 3, float(random.uniform(0.3, 1))
        seconds, beside = alone, ()
        if others:
            prefills, decodes = ((1, 0), (0, 1))[others - 1]
            slowed = part * alone * program.slowdown(prefills, decodes)
            seconds, beside = alone * (1 - part) + slowed, (Beside(slowed, prefills, decodes),)
        seconds += 0 if is_queued else HOST
        steps.append(MeasuredStep(0, kind, 512, 1, **counts, seconds=seconds, beside=beside, is_queued=is_queued))
    return steps


def assert_close(found, wanted, tolerance):
    for name in wanted.__struct_fields__:
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=tolerance, abs=1e-12), name


def test_exact_times_give_the_coefficients_back():
    costs = fit_costs(draw_steps(300))
    assert_close(costs.prefill[512], PREFILL, 1e-3)
    assert_close(costs.decode[512], DECODE, 1e-3)
    assert costs.host.idle == pytest.approx(HOST, rel=1e-3)


def errors(costs):
    """Relative errors for steps whose times are the means of theirs."""
    return [predicted(costs, step) / step.seconds - 1 for step in draw_steps(200, seed=1)]


@pytest.mark.parametrize("noise", [0.05, 0.4])
def test_what_is_predicted_is_the_mean_of_noisy_times(noise):
    found = errors(fit_costs(draw_steps(4000, noise)))
    assert abs(np.mean(found)) < 0.03
    assert np.max(np.abs(found)) < 0.1 + noise / 2


def test_stalls_change_predictions_little():
    steps = draw_steps(2000, noise=0.05)
    for index in range(7, len(steps), 200):  # one in two hundred stands still for long
        steps[index] = msgspec.structs.replace(steps[index], seconds=100 * steps[index].seconds, beside=())
    assert np.max(np.abs(errors(fit_costs(steps)))) < 0.1


def test_no_coefficient_is_negative():
    # The longer the context the faster: nothing that a cost can say.
    steps = [MeasuredStep(0, "decode", 8, 1, 0, 0, 4, 1000 * n, 0.02 / n) for n in range(1, 10)]
    assert min(msgspec.structs.astuple(fit_costs(steps).decode[8])) == 0


def test_several_passes_count_as_so_many_steps():
    steps = [MeasuredStep(0, "decode", 8, n, 0, 0, 4 * n, 0, n * 0.03) for n in range(1, 9)]
    costs = fit_costs(steps)
    assert predicted(costs, steps[0]) == pytest.approx(0.03)
    assert predicted(costs, steps[7]) == pytest.approx(0.24)


def test_a_program_that_never_ran_alone_is_slowed_down_as_its_kind_is():
    steps = draw_steps(300)
    other = [msgspec.structs.replace(s, bucket=64) for s in draw_steps(200, seed=3) if s.beside and s.kind == "decode"]
    costs = fit_costs(steps + other)
    assert_close(costs.decode[64], DECODE, 0.02)


def test_beside_what_it_never_ran_a_program_slows_down_as_beside_what_it_did():
    steps = [s for s in draw_steps(600) if s.kind == "prefill" or not any(part.decodes for part in s.beside)]
    costs = fit_costs(steps)
    assert costs.decode[512].beside_prefill == pytest.approx(DECODE.beside_prefill, rel=1e-2)
    assert costs.decode[512].beside_decode == costs.decode[512].beside_prefill
    assert costs.prefill[512].beside_decode == pytest.approx(PREFILL.beside_decode, rel=1e-2)


def test_the_first_run_of_each_program_on_each_mesh_is_left_out():
    steps = [
        MeasuredStep(mesh, kind, bucket, 1, 1, 1, 0, 0, 1.0)
        for mesh, kind, bucket in [(0, "prefill", 64), (0, "prefill", 64), (1, "prefill", 64), (0, "decode", 64)]
    ]
    assert without_cold(steps) == [steps[1]]


def test_links_and_the_host():
    link = fit_link([MeasuredTransfer(size, 0.001 + 2e-9 * size) for size in (10**5, 10**6, 10**7)])
    assert (link.fixed, link.byte) == (pytest.approx(0.001), pytest.approx(2e-9))
    host = fit_host(
        [Entered(n, 1e-4 + 1e-6 * n) for n in (10, 100, 1000)],
        [HostWork(2e-4 * s + 1e-6 * r + 5e-5 * q, s, r, q) for s, r, q in [(10, 10, 1), (20, 500, 2), (5, 100, 30)]],
        [0.002, 0.003, 0.003, 0.004, 0.5],
    )
    assert (host.arrival, host.token) == (pytest.approx(1e-4), pytest.approx(1e-6))
    assert (host.step, host.row) == (pytest.approx(2e-4), pytest.approx(1e-6))
    assert host.read == pytest.approx((0.002 + 0.003 + 0.003 + 0.004 + 4 * 0.003) / 5)


def test_what_a_gather_or_a_scatter_takes_is_found_apart_from_the_step_behind_it():
    steps = draw_steps(300)
    moved = [
        msgspec.structs.replace(s, seconds=s.seconds + 2e-9 * n + 5e-9 * m, gathered=n, scattered=m)
        for s, n, m in zip(draw_steps(90, seed=2), [10**6, 10**7, 0] * 30, [0, 2 * 10**6, 10**6] * 30, strict=True)
        if not s.beside
    ]
    costs = fit_costs(steps + moved)
    assert_close(costs.decode[512], DECODE, 1e-3)
    assert (costs.link.gather, costs.link.scatter) == (pytest.approx(2e-9, rel=1e-2), pytest.approx(5e-9, rel=1e-2))
    assert predicted(costs, moved[0]) == pytest.approx(moved[0].seconds, rel=1e-2)


def test_nothing_measured_is_refused():
    with pytest.raises(ValueError, match="no steps were measured"):
        fit_costs([])
