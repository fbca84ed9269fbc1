"""utils/device_peaks.py and what utils/device.py makes of it."""

import pytest
import torch

from utils import device
from utils.device_peaks import PEAKS, stated_tflops

NAMES = {
    "Ascend910B3": (313, 78),
    "Ascend910B2C": (376, 94),
    "Ascend910_9362": (376, 94),
    "Ascend910ProB": (256, None),
    "NVIDIA H100 80GB HBM3": (989.4, 66.9),
    "NVIDIA H100 PCIe": (756, 51.2),
    "NVIDIA H200": (989.4, 66.9),
    "NVIDIA A100-SXM4-40GB": (312, 19.5),
    "Tesla V100-SXM2-16GB": (125, 15.7),
    "Tesla V100-PCIE-32GB": (112, 14),
    "NVIDIA L4": (121, 30.3),
    "NVIDIA L40S": (362, 91.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
}


@pytest.mark.parametrize("name", NAMES)
def test_devices_are_known_by_the_names_that_torch_gives(name):
    assert (stated_tflops(name, "half"), stated_tflops(name, "float32")) == NAMES[name]


def test_tf32_counts_where_there_is_a_unit_for_it():
    assert stated_tflops("NVIDIA A100-SXM4-80GB", "tf32") == 156
    assert stated_tflops("Tesla V100-SXM2-16GB", "tf32") == 15.7


@pytest.mark.parametrize("name", ["CPU", "NVIDIA RTX A1000", "NVIDIA A10G", "Radeon RX 7900"])
def test_what_is_not_listed_has_no_stated_peak(name):
    assert stated_tflops(name, "half") is None


def test_half_is_never_slower_than_float32():
    assert all(half >= (tensor_float or single or 0) >= (single or 0) for half, tensor_float, single in PEAKS.values())


def test_a_cpus_peak_is_measured_once():
    device._measure_flops.cache_clear()
    flops, is_measured = device.peak_flops(torch.device("cpu"), torch.float32)
    assert is_measured and 1e9 < flops < 1e14
    assert device.peak_flops(torch.device("cpu"), torch.float32) == (flops, True)


@pytest.mark.parametrize(
    "slowed, pauses, found",
    [({}, 0, 70), ({256: [1]}, 1, 70), ({1024: [5]}, 1, 70), ({256: [3, 3, 3, 3]}, 3, 3)],
    ids=["never busy", "at the first size", "at the last size", "all the time"],
)
def test_pauses_are_for_a_busy_machine_alone(slowed, pauses, found, monkeypatch):
    """A CPU of 70 GFLOP/s. slowed: {size: speeds of its first measurements, while others are at work}."""
    slept = []

    def least_seconds(matrix, repeats):
        size = len(matrix)
        return 2 * size**3 / 1e9 / (slowed[size].pop(0) if slowed.get(size) else 70)

    monkeypatch.setattr(device, "_least_seconds", least_seconds)
    monkeypatch.setattr(device.time, "sleep", slept.append)
    flops = device._measure_flops.__wrapped__(torch.device("cpu"), torch.float32)
    assert flops == pytest.approx(found * 1e9) and len(slept) == pauses


def test_a_listed_device_is_not_measured(monkeypatch):
    monkeypatch.setattr(device, "describe", lambda on: "Ascend910B3")
    assert device.peak_flops(torch.device("cpu"), torch.bfloat16) == (313e12, False)


def test_marks_tell_seconds_on_a_cpu():
    start = device.mark(torch.device("cpu"))
    end = device.mark(torch.device("cpu"))
    assert 0 <= device.seconds_between(start, end) < 1
