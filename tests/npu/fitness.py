"""What in the record of a training step does not suit an NPU. A step is a list of (phase, name, tensors, place): see
witness.py and simulator/recorder.h."""

from collections import Counter

import torch
from small_runs import SIMULATOR

# Copies have their own names in a record. The device makes those within itself, and takes batches from the host.
COPIES = {"copy_", "copy_from_host", "copy_to_host"}

# Operators that compute nothing, other looks at the same memory, do not reach the device; neither do composites, which
# torch takes apart into the operators that do.


def native_operators() -> set[str]:
    """The aten operators that torch_npu 2.13.0 registers for the NPU. Others run on its host."""
    lines = (SIMULATOR / "native_operators.txt").read_text().splitlines()
    return {line for line in lines if not line.startswith("#")}


def outside_native(step: list) -> list[str]:
    """The operators of the step that an NPU would hand to its host."""
    return sorted({name for _, name, *_ in step} - native_operators() - COPIES - {"synchronize"})


def data_dependent(step: list) -> list[str]:
    """The operators of the step whose output's shape depends on values: nonzero, masked_select, indexing by a mask."""
    return [f"{name} {tensors}" for _, name, tensors, _ in step if _has_dynamic_shape(name, tensors)]


def _has_dynamic_shape(name: str, tensors: list[str]) -> bool:
    if name in COPIES or name == "synchronize":
        return False
    packet, _, overload = name.partition(".")
    if packet in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = tensors[1:] if packet == "index" else tensors[1:-1]
        return any(" Bool" in index or " Byte" in index for index in indices)
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return torch.Tag.dynamic_output_shape in operator.tags


def host_waits(step: list) -> list[str]:
    """Where the host waits for the device: "operator at file:line"."""
    return [f"{name} at {place}" for _, name, _, place in step if place]


def shapes(step: list) -> Counter:
    """How often each operator is given tensors of which type and shape."""
    return Counter((name, *tensors) for _, name, tensors, _ in step)


def tensors_in_optimizer_phase(step: list) -> int:
    """The number of tensors that all operators after backward are handed, lists counted by their length."""
    return sum(len(tensors) for phase, _, tensors, _ in step if phase == "optimizer")
