"""Which device a run uses: Ascend NPU, CUDA or CPU. Nothing else in this package names a device or a backend.

`import torch_npu` happens here alone, and only where the package is installed.
"""

import importlib.util
import os
import time

import torch

# How each kind of device names itself in results ("1p-NPU"), and the variable that hides all but some of its devices.
NAMES = {"npu": "NPU", "cuda": "GPU", "cpu": "CPU", "mps": "MPS", "xpu": "XPU"}
VISIBLE_DEVICES = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}


def accelerator() -> str | None:
    """ "npu", "cuda" or another accelerator that torch can use here; None on a machine with a CPU alone."""
    if importlib.util.find_spec("torch_npu") is not None:
        import torch_npu

        if torch_npu.npu.is_available():
            return "npu"
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None else None


def process_count() -> int:
    """The number of processes that a launcher such as torchrun says it has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def select_device(device_id: int) -> None:
    """Makes `device_id` the only device that this process sees. Must come before the device is first used.

    Raises ValueError under a launcher with several processes, each of which has a device of its own, and for a number
    below zero.
    """
    if device_id < 0:
        raise ValueError(f"--device_id {device_id}: devices are numbered from 0")
    if process_count() > 1:
        raise ValueError(f"--device_id {device_id}: torchrun gives each process its own device; leave the flag out")
    for variable in VISIBLE_DEVICES.values():
        visible = os.environ.get(variable)
        if visible is None:
            os.environ[variable] = str(device_id)
        elif device_id < len(visible.split(",")):
            os.environ[variable] = visible.split(",")[device_id]
        else:
            raise ValueError(f"--device_id {device_id}: {variable}={visible} leaves no such device")


def display_name(device: torch.device, processes: int) -> str:
    """The device as results tables name it: "1p-CPU", "8p-NPU"."""
    return f"{processes}p-{NAMES.get(device.type, device.type.upper())}"


def half_slowdown(device: torch.device, dtype: torch.dtype) -> float:
    """How many times longer a matrix product takes in `dtype` than in float32, measured in about 0.2 s; on a CPU only.

    Processor flags do not tell: a CPU may list avx512_bf16 and still run at a hundredth of its float32 speed, for want
    of a kernel that uses it. Accelerators are taken to be built for half precision: 1.0.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return 1.0

    def seconds(matrix: torch.Tensor, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
        return min(times)

    # Busy cores only ever slow a product down, so the least of many is the true time.
    ones = torch.ones(256, 256)
    return seconds(ones.to(dtype), 3) / seconds(ones, 50)


def fused_adamw_obeys_grad_scale(device: torch.device) -> bool:
    """Whether torch._fused_adamw_ uses its `grad_scale`: torch_npu's kernel accepts the argument and ignores it."""
    return device.type in ("cpu", "cuda")


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that was launched. Nothing to wait for on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def demo_flags() -> str:
    """The precision flags that suit this machine: O2 in float16, unless its CPU lacks units for that."""
    on = torch.device(accelerator() or "cpu")
    return "" if half_slowdown(on, torch.float16) > 3 else "--fp16 --fp16_opt_level O2"


if __name__ == "__main__":
    print(demo_flags())
