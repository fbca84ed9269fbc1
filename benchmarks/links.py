"""What an all-reduce costs between devices: hierarchies of links, each with its latency and bandwidth.

Devices first reduce-scatter over the fastest links, then all-reduce what each of them is left with over the next ones, then
gather over the first again: what NCCL and HCCL do in servers of eight. The time of a level of c devices with s bytes each:

    ring              2 (c - 1) latency + 2 (c - 1) / c * s / bandwidth
    mesh              2 latency         + 2 (c - 1) / c * s / bandwidth      (links to all others are used at once)
    halving-doubling  2 log2(c) latency + 2 (c - 1) / c * s / bandwidth

(Thakur, Rabenseifner, Gropp: Optimization of Collective Communication Operations in MPICH, 2005; the factor of the last term
is that of "bus bandwidth" in nccl-tests' doc/PERFORMANCE.md). The next level has s / c. Only the standard library is imported.
"""

import math
from dataclasses import dataclass

GIGA = 1e9
MICRO = 1e-6
# NCCL's own model of latencies (src/graph/tuning.cc, protocol Simple): of a call, of a step by NVLink, PCIe and network. HCCL
# publishes none: its levels are given the same.
CALL, NVLINK, PCIE, NETWORK = 8.4 * MICRO, 3.4 * MICRO, 5.7 * MICRO, 14.0 * MICRO
# What is reached of what makers state: 380 of 450 GB/s from one H100 to another (NVIDIA/nccl#1264), 230 to 250 of 300 in
# nccl-tests' all-reduce on 8 A100.
ACHIEVED = 0.8


@dataclass(frozen=True)
class Level:
    """Links of one kind.

    count: devices, or groups of them, that they join; 0: as many as there are. bandwidth: bytes per second of one device in
    one direction, over all its links of the kind, as stated. latency: seconds of a step.
    """

    name: str
    count: int
    bandwidth: float
    latency: float
    algorithm: str


@dataclass(frozen=True)
class System:
    """A kind of server and its network. device: its name in utils/device_peaks.py. source: of the links' speeds."""

    name: str
    device: str
    levels: tuple[Level, ...]
    source: str


SYSTEMS = {
    "ascend-910": System(
        "Atlas 800 (model 9000), Ascend 910",
        "Ascend910",
        (
            Level("HCCS", 4, 3 * 30 * GIGA, NVLINK, "mesh"),
            Level("PCIe 4.0 x16", 2, 32 * GIGA, PCIE, "ring"),
            Level("RoCE 100 Gb/s", 0, 12.5 * GIGA, NETWORK, "halving-doubling"),
        ),
        "HCCS of 3 links of 240 Gbit/s: Huawei, Hot Chips 31 (2019); two groups of four joined by PCIe: Huawei Cloud CCE, "
        "cce-gpu-topology-predicate; 100 Gbit/s a device, ring and halving-doubling: Huawei, EDOC1100164821",
    ),
    "ascend-910b": System(
        "Atlas 800T A2, Ascend 910B",
        "Ascend910B3",
        (
            Level("HCCS", 8, 7 * 28 * GIGA, NVLINK, "mesh"),
            Level("RoCE 200 Gb/s", 0, 25 * GIGA, NETWORK, "halving-doubling"),
        ),
        "HCCS: full mesh of 56 GB/s in both directions together, 392 GB/s a device (meemx.com/p/hccl-contest-log-overall, with "
        "npu-smi's topology); 200 Gbit/s a device: Huawei's data sheet",
    ),
    "a100": System(
        "DGX A100",
        "A100",
        (
            Level("NVLink 3", 8, 300 * GIGA, NVLINK, "ring"),
            Level("RoCE 200 Gb/s", 0, 25 * GIGA, NETWORK, "halving-doubling"),
        ),
        "600 GB/s in both directions together, eight ports of 200 Gbit/s: NVIDIA's data sheet of DGX A100",
    ),
    "h100": System(
        "DGX H100",
        "H100 SXM",
        (
            Level("NVLink 4", 8, 450 * GIGA, NVLINK, "ring"),
            Level("RoCE 400 Gb/s", 0, 50 * GIGA, NETWORK, "halving-doubling"),
        ),
        "900 GB/s in both directions together, eight ports of 400 Gbit/s: NVIDIA's data sheet of DGX H100",
    ),
}


def level_seconds(level: Level, count: int, size: float, achieved: float = ACHIEVED) -> float:
    """Seconds in which `count` devices all-reduce `size` bytes each over links of one kind."""
    if count == 1:
        return 0.0
    steps = {"ring": count - 1, "mesh": 1, "halving-doubling": math.ceil(math.log2(count))}[level.algorithm]
    return 2 * steps * level.latency + 2 * (count - 1) / count * size / (level.bandwidth * achieved)


def all_reduce_seconds(system: System, devices: int, size: float, achieved: float = ACHIEVED) -> float:
    """Seconds in which all devices of `system` all-reduce `size` bytes each.

    Raises ValueError for devices that do not fill the servers they are in.
    """
    if devices == 1:
        return 0.0
    seconds, left = CALL, devices
    for level in system.levels:
        count = min(level.count or left, left)
        if left % count:
            raise ValueError(f"{devices} devices do not fill groups of {level.count} by {level.name}")
        seconds += level_seconds(level, count, size, achieved)
        size, left = size / count, left // count
    return seconds
