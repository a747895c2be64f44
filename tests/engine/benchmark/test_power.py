"""Power by NVML's counters, with a library that says what it is told: nothing is said where it cannot be read."""

import sys
from types import SimpleNamespace

import pytest
from twinmesh.engine.benchmark.power import NvmlMeter, Reading, boards


class Nvml:
    """Two GPUs whose counters go up with every reading; `fails` as soon as it is read."""

    class NVMLError(Exception):
        pass

    def __init__(self, fails=False):
        self.open, self._fails, self._millijoules = 0, fails, {0: 1000, 1: 5000, "GPU-b": 9000}

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        if index not in self._millijoules:
            raise self.NVMLError
        return index

    nvmlDeviceGetHandleByUUID = nvmlDeviceGetHandleByIndex

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self._fails:
            raise self.NVMLError
        self._millijoules[handle] += 7_000
        return self._millijoules[handle]


@pytest.fixture
def nvml(monkeypatch):
    found = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


def test_the_mean_power_of_a_board_is_energy_over_the_window(nvml, monkeypatch):
    times = iter([100.0, 104.0])
    monkeypatch.setattr("twinmesh.engine.benchmark.power.time.monotonic", lambda: next(times))
    meter = NvmlMeter(2)
    started = meter.start()
    assert started == Reading(100.0, 20.0)  # joules of both
    power = meter.stop(started)
    assert (power.watts, power.basis) == (14 / 4 / 2, "board")
    assert nvml.open == 0


def test_nothing_is_said_where_a_board_cannot_be_read(nvml, monkeypatch):
    assert NvmlMeter(3).start() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert NvmlMeter(1).start() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(fails=True))
    assert NvmlMeter(1).start() is None
    assert nvml.open == 0


def test_a_counter_that_has_begun_anew_measures_nothing(nvml):
    assert NvmlMeter(1).stop(Reading(0.0, 1e9)) is None


def test_boards_are_those_that_cuda_sees():
    assert boards([0, 1], None) == [0, 1]
    assert boards([0, 1], "3, GPU-b") == [3, "GPU-b"]
    assert boards([1], "0") is None
    assert boards([0], "MIG-x") is None
    assert boards([0], "") is None


def test_devices_that_are_no_gpus_are_refused(nvml):
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", local_hardware_id=1)
    assert NvmlMeter.of([gpu]).start().joules == 12.0
    cpu = SimpleNamespace(platform="cpu", device_kind="cpu", local_hardware_id=0)
    with pytest.raises(ValueError, match="NVIDIA GPUs alone, and these devices are cpu"):
        NvmlMeter.of([cpu])


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ValueError, match=r"twinmesh\[power\]"):
        NvmlMeter(1)
